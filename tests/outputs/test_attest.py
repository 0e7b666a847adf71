"""Provenance and bill of materials: what stands in them is true, valid by their own schemas, and the same again."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import run_cli, tensor_shapes, write_family, write_recipe
from google.protobuf.json_format import ParseDict
from hub_server import HubServer
from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
from in_toto_attestation.v1 import statement_pb2
from in_toto_attestation.v1.statement import Statement
from packageurl import PackageURL
from schemas import fits_bom

import skillmerge
from skillmerge.errors import CheckFailed


@pytest.fixture
def hashed(tmp_path: Path) -> Path:
    recipe = write_family(tmp_path / "family", tensor_shapes(layers=1, hidden=8))
    return skillmerge.apply(recipe, coefficients={"lam": 0.4}, hash_inputs=True).output


@pytest.fixture
def from_hub(hub: HubServer, tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """An output whose parents are on the Hub, and their commits."""
    recipe = write_family(tmp_path / "family", tensor_shapes(layers=1, hidden=8))
    commits = {
        name: hub.create_from(f"Acme/{name}", recipe.parent / name, card={"license": "apache-2.0"})
        for name in ("target", "rl", "sft")
    }
    recipe = write_recipe(tmp_path, models={name: f"hf://Acme/{name}" for name in commits})
    return skillmerge.apply(recipe, tmp_path / "merged").output, commits


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_statement(path: Path) -> dict[str, Any]:
    """The statement, which in-toto's own messages accept: strictly, unknown fields are refused."""
    document: dict[str, Any] = json.loads(path.read_bytes())
    check_statement(document)
    return document


def check_statement(document: dict[str, Any]) -> None:
    Statement.copy_from_pb(ParseDict(document, statement_pb2.Statement())).validate()
    assert document["predicateType"] == "https://slsa.dev/provenance/v1"
    ParseDict(document["predicate"], provenance_pb2.Provenance())


def read_bom(path: Path) -> dict[str, Any]:
    text = path.read_text()
    fits_bom(text)
    document: dict[str, Any] = json.loads(text)
    return document


# -------------------------------------------------------------------------------------------------- provenance


def test_every_file_of_the_output_is_a_subject(hashed: Path) -> None:
    made = skillmerge.attest(hashed)
    assert made.attestation == hashed.with_name("merged.intoto.json")
    statement = read_statement(made.attestation)
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert {subject["name"]: subject["digest"] for subject in statement["subject"]} == {
        path.name: {"sha256": sha256(path)} for path in hashed.iterdir()
    }
    assert made.subjects == 6
    skillmerge.verify(hashed)


def test_recipe_run_and_builder_are_told(hashed: Path) -> None:
    builder = "https://ci.example/builders/release@v3"
    made = skillmerge.attest(hashed, builder_id=builder, invocation_id="run-17")
    predicate = read_statement(made.attestation)["predicate"]
    definition, details = predicate["buildDefinition"], predicate["runDetails"]
    text = (hashed.parent / "recipe.yaml").read_text()
    assert definition["buildType"] == "urn:skillmerge:build-type:merge:1"
    recipe = {"text": text, "sha256": hashlib.sha256(text.encode()).hexdigest(), "pathsShortened": False}
    assert definition["externalParameters"] == {"recipe": recipe, "coefficients": {"lam": 0.4}}
    proof = json.loads((hashed / "skillmerge.manifest.json").read_text())
    assert definition["internalParameters"]["planDigest"] == proof["plan_digest"]
    assert details["builder"]["id"] == builder
    assert details["builder"]["version"]["skillmerge"] == skillmerge.__version__
    assert details["metadata"]["invocationId"] == "run-17"
    log = json.loads((hashed / "skillmerge.run.json").read_text())
    assert details["metadata"]["finishedOn"] == log["finished"]
    assert details["metadata"]["startedOn"] <= log["finished"]


def test_local_inputs_have_digests_and_no_paths(hashed: Path) -> None:
    made = skillmerge.attest(hashed, bom_file=hashed.with_name("bom.json"))
    assert made.unpinned == ()
    dependencies = read_statement(made.attestation)["predicate"]["buildDefinition"]["resolvedDependencies"]
    assert {item["name"]: item["digest"]["sha256"] for item in dependencies} == {
        f"{model}/{path.name}": sha256(path)
        for model in ("target", "rl", "sft")
        for path in (hashed.parent / model).glob("*.safetensors")
    }
    assert not any("uri" in item for item in dependencies)


@pytest.mark.parametrize("style", ["json", "yaml"])
def test_absolute_paths_of_a_recipe_are_not_told(tmp_path: Path, style: str) -> None:
    recipe = write_family(tmp_path / "secret-host", tensor_shapes(layers=1, hidden=8))
    document = json.loads(recipe.read_text())
    document["models"] = {name: str(recipe.parent / name) for name in document["models"]}
    document["output"] = {"path": str(tmp_path / "secret-host" / "merged")}
    recipe.write_text(json.dumps(document))
    if style == "yaml":
        models = "".join(f"  {name}: '{path}'\n" for name, path in document["models"].items())
        recipe.write_text(
            f"skillmerge: 1\nmodels:\n{models}coefficients: {{lam: 0.7}}\nmerge: target + lam * (rl - sft)\n"
            f"output:\n  path: {document['output']['path']}\n"
        )
    output = skillmerge.apply(recipe).output
    made = skillmerge.attest(output, bom_file=tmp_path / "bom.json")
    assert made.bom is not None
    for path in (made.attestation, made.bom):
        assert "secret-host" not in path.read_text()
        assert str(tmp_path) not in path.read_text()
    told = read_statement(made.attestation)["predicate"]["buildDefinition"]["externalParameters"]["recipe"]
    assert told["pathsShortened"]
    assert told["sha256"] == sha256(recipe)
    assert "target + lam * (rl - sft)" in told["text"]


def test_inputs_without_digests_are_told(tmp_path: Path) -> None:
    output = skillmerge.apply(write_family(tmp_path / "family", tensor_shapes(layers=1, hidden=8))).output
    assert skillmerge.attest(output).unpinned == ("target", "rl", "sft")
    process = run_cli("attest", output)
    assert process.returncode == 0
    assert "--hash-inputs" in process.stderr


def test_inputs_on_the_hub_have_commits_and_digests(from_hub: tuple[Path, dict[str, str]]) -> None:
    output, commits = from_hub
    made = skillmerge.attest(output)
    assert made.unpinned == ()
    dependencies = read_statement(made.attestation)["predicate"]["buildDefinition"]["resolvedDependencies"]
    by_name = {item["name"]: item for item in dependencies}
    for model, commit in commits.items():
        assert by_name[model]["uri"] == f"hf://Acme/{model}@{commit}"
        assert by_name[model]["digest"] == {"gitCommit": commit}
        for path in (output.parent / "family" / model).glob("*.safetensors"):
            assert by_name[f"{model}/{path.name}"]["digest"] == {"sha256": sha256(path)}
            assert by_name[f"{model}/{path.name}"]["uri"] == f"hf://Acme/{model}@{commit}/{path.name}"


def test_signed_attestation_is_a_dsse_envelope_that_openssl_verifies(hashed: Path, tmp_path: Path) -> None:
    key, public = tmp_path / "key.pem", tmp_path / "key.pub"
    subprocess.run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", key], check=True)
    subprocess.run(["openssl", "ec", "-in", key, "-pubout", "-out", public], check=True, capture_output=True)
    unsigned = skillmerge.attest(hashed).attestation
    process = run_cli("attest", hashed, "--private-key", key)
    assert f"note: {unsigned} is an older attestation, and is not signed: remove it\n" in process.stderr
    made = skillmerge.attest(hashed, private_key=key)
    assert made.attestation.name == "merged.intoto.jsonl"
    assert (
        f"note: {made.attestation} is an older attestation, and is signed: to replace it, pass `--private-key KEY`\n"
        in run_cli("attest", hashed).stderr
    )
    (line,) = made.attestation.read_text().splitlines()
    envelope = json.loads(line)
    payload = base64.b64decode(envelope["payload"])
    check_statement(json.loads(payload))
    assert payload == skillmerge.attest(hashed).attestation.read_bytes()
    (tmp_path / "sig").write_bytes(base64.b64decode(envelope["signatures"][0]["sig"]))
    for content, status in ((payload, 0), (payload.replace(b'"lam": 0.4', b'"lam": 0.5'), 1)):
        kind = envelope["payloadType"].encode()
        (tmp_path / "pae").write_bytes(b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(content), content))
        command = ["openssl", "dgst", "-sha256", "-verify", public, "-signature", tmp_path / "sig", tmp_path / "pae"]
        assert subprocess.run(command, check=False, capture_output=True).returncode == status


# ------------------------------------------------------------------------------------------ bill of materials


def test_bill_of_materials_names_the_model_its_files_and_its_parents(
    from_hub: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    output, commits = from_hub
    skillmerge.attest(output, bom_file=tmp_path / "bom.json")
    document = read_bom(tmp_path / "bom.json")
    model = document["metadata"]["component"]
    assert (model["type"], model["name"]) == ("machine-learning-model", "merged")
    assert model["hashes"] == [{"alg": "SHA-256", "content": sha256(output / "skillmerge.manifest.json")}]
    assert model["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    assert {file["name"]: file["hashes"][0]["content"] for file in model["components"]} == {
        path.name: sha256(path) for path in output.iterdir()
    }
    parents = {part["name"]: part for part in document["components"]}
    for name, commit in commits.items():
        purl = PackageURL.from_string(parents[name]["purl"])
        assert (purl.type, purl.namespace, purl.name, purl.version) == ("huggingface", "Acme", name, commit)
        assert {file["name"]: file["hashes"][0]["content"] for file in parents[name]["components"]} == {
            path.name: sha256(path) for path in (tmp_path / "family" / name).glob("*.safetensors")
        }
    assert {part["purl"] for part in model["pedigree"]["ancestors"]} == {part["purl"] for part in parents.values()}
    assert document["metadata"]["tools"]["components"][0]["name"] == "skillmerge"
    depends = next(item["dependsOn"] for item in document["dependencies"] if item["ref"] == "model")
    assert sorted(depends) == ["input/rl", "input/sft", "input/target"]


def test_license_that_is_not_settled_or_has_no_spdx_name_is_no_trouble(hashed: Path, tmp_path: Path) -> None:
    skillmerge.attest(hashed, bom_file=tmp_path / "bom.json")
    assert "licenses" not in read_bom(tmp_path / "bom.json")["metadata"]["component"]
    recipe = write_recipe(hashed.parent, output={"path": "other", "license": "llama3.2"})
    skillmerge.attest(skillmerge.apply(recipe).output, bom_file=tmp_path / "other.json")
    found = read_bom(tmp_path / "other.json")["metadata"]["component"]["licenses"]
    assert found == [{"license": {"name": "llama3.2"}}]


# ------------------------------------------------------------------------------------------------- as documents


def test_same_output_gives_the_same_documents(hashed: Path, tmp_path: Path) -> None:
    documents = set()
    for number, seed in enumerate(("1", "2")):
        folder = tmp_path / str(number)
        folder.mkdir()
        shutil.copytree(hashed, folder / "merged")
        process = run_cli("attest", "merged", "--bom", "bom.json", "-q", cwd=folder, PYTHONHASHSEED=seed)
        assert process.returncode == 0, process.stderr
        documents.add((folder / "merged.intoto.json").read_bytes() + (folder / "bom.json").read_bytes())
    assert len(documents) == 1


def test_other_output_has_another_serial_number(hashed: Path, tmp_path: Path) -> None:
    other = skillmerge.apply(hashed.parent / "recipe.yaml", tmp_path / "merged").output
    serials = set()
    for folder in (hashed, other):
        skillmerge.attest(folder, bom_file=tmp_path / "bom.json")
        serials.add(read_bom(tmp_path / "bom.json")["serialNumber"])
    assert len(serials) == 2


def test_what_does_not_verify_is_not_attested(hashed: Path) -> None:
    (hashed / "config.json").write_text("[]")
    with pytest.raises(CheckFailed):
        skillmerge.attest(hashed)
    assert not hashed.with_name("merged.intoto.json").exists()


def test_skill_can_be_attested(tmp_path: Path) -> None:
    recipe = write_family(tmp_path / "family", tensor_shapes(layers=1, hidden=8))
    skill = skillmerge.extract(recipe.parent / "rl", recipe.parent / "sft", tmp_path / "skill").output
    made = skillmerge.attest(skill, bom_file=tmp_path / "bom.json")
    names = {subject["name"] for subject in read_statement(made.attestation)["subject"]}
    assert names == {path.name for path in skill.iterdir()}
    assert str(tmp_path) not in made.attestation.read_text()
    assert len(read_bom(tmp_path / "bom.json")["components"]) == 2


@pytest.mark.parametrize("option", ["--output", "--bom"])
def test_documents_replace_their_own_kind_and_lie_beside_the_output(hashed: Path, tmp_path: Path, option: str) -> None:
    place = tmp_path / "document.json"
    for _ in range(2):
        assert run_cli("attest", hashed, option, place).returncode == 0
    for content in ("notes", '{"mine": 1}', "[]"):
        place.write_text(content)
        process = run_cli("attest", hashed, option, place)
        assert process.returncode == 2
        assert place.read_text() == content
    assert run_cli("attest", hashed, option, hashed / "document.json").returncode == 2
    assert run_cli("attest", hashed, option, tmp_path / "nowhere" / "document.json").returncode == 2
    skillmerge.verify(hashed)


def test_attest_prints_one_json_object(hashed: Path, tmp_path: Path) -> None:
    document = json.loads(run_cli("attest", hashed, "--bom", tmp_path / "bom.json", "--json").stdout)
    assert document["ok"]
    assert document["subjects"] == 6
    assert document["attestation"] == str(hashed.with_name("merged.intoto.json"))
    assert document["bom"] == str(tmp_path / "bom.json")
    assert run_cli("attest", tmp_path / "nothing").returncode == 2


@pytest.mark.parametrize("package", ["in_toto_attestation", "cyclonedx", "securesystemslib"])
def test_missing_package_is_told_with_its_extra(
    hashed: Path, tmp_path: Path, hide: Callable[[str], None], package: str
) -> None:
    hide(package)
    process = run_cli("attest", hashed, "--bom", tmp_path / "bom.json", "--private-key", "key.pem")
    assert process.returncode == 2
    assert package in process.stderr
    assert "pip install 'skillmerge[attest" in process.stderr


def test_verify_says_that_a_signature_was_not_checked(hashed: Path, tmp_path: Path) -> None:
    key = tmp_path / "key.pem"
    subprocess.run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", key], check=True)
    subprocess.run(["openssl", "ec", "-in", key, "-pubout", "-out", tmp_path / "key.pub"], check=True)
    assert "signature" not in run_cli("verify", hashed).stderr
    skillmerge.sign(hashed, private_key=key)
    assert run_cli("verify", hashed).stderr.endswith(
        f"note: {hashed} has a signature, which was not checked: to check it, pass `--public-key KEY`, or "
        "`--certificate-chain ROOT` if a certificate was used\n"
    )
    assert "signature" not in run_cli("verify", hashed, "--public-key", tmp_path / "key.pub").stderr
    (hashed / "model.sig").unlink()
