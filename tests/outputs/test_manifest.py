"""The proof is canonical, and the same whoever made it, wherever, whenever and however fast."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import read_checkpoint, run_cli, write_checkpoint, write_family, write_recipe

import skillmerge
from skillmerge.errors import CheckFailed
from skillmerge.outputs import manifest
from skillmerge.study.gates import gate
from skillmerge.threads import hash_file
from skillmerge.verbs.rebuild import check_rebuild

MANIFEST = "skillmerge.manifest.json"
SHAPES = {
    "model.embed_tokens.weight": (1024, 512),
    "model.layers.0.mlp.up_proj.weight": (2000, 301),
    "model.layers.0.self_attn.q_proj.weight": (256, 512),
    "model.layers.1.mlp.up_proj.weight": (131, 4001),
    "model.layers.1.input_layernorm.weight": (5,),
}


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """The recipe of a family whose tensors take several tiles at the smallest tile size."""
    return write_family(tmp_path / "here", SHAPES, shards=2)


def parts(output: Path) -> tuple[dict[str, Any], dict[str, Any], str]:
    """What must not depend on the circumstances, what may, and the digest of both."""
    document = json.loads((output / MANIFEST).read_text())
    return document, document.pop("environment"), document.pop("digest")


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


# ----------------------------------------------------------------------------------------- what it depends upon


def variations(recipe: Path, tmp_path: Path) -> dict[str, Callable[[Path], object]]:
    """Ways to run one recipe that may not show."""
    elsewhere = tmp_path / "elsewhere" / "deeper"

    def in_another_place(output: Path) -> None:
        shutil.copytree(recipe.parent, elsewhere, ignore=shutil.ignore_patterns("merged*"))
        assert run_cli("apply", "recipe.yaml", "-o", output, cwd=elsewhere).returncode == 0

    def at_another_time(output: Path) -> None:
        time.sleep(1.1)  # the run log counts in seconds
        skillmerge.apply(recipe, output)

    return {
        "threads": lambda output: skillmerge.apply(recipe, output, threads=7),
        "memory": lambda output: skillmerge.apply(recipe, output, threads=1, memory_limit=smallest_limit(recipe)),
        "place": in_another_place,
        "time": at_another_time,
    }


def smallest_limit(recipe: Path) -> int:
    """The memory limit under which tiles are as small as they get."""
    from skillmerge.plans.budget import budget
    from skillmerge.tensors import BLOCK

    plan = skillmerge.plan(recipe)
    limits = range(200_000_000, 900_000_000, 1_000_000)
    for limit in limits:
        try:
            found = budget(plan, threads=1, memory_limit=limit)
        except skillmerge.errors.ResourceError:
            continue
        assert found.tile == BLOCK
        return limit
    raise AssertionError("no limit is enough")


@pytest.mark.parametrize("stats", ["sampled", "full"])
@pytest.mark.parametrize("variation", ["threads", "memory", "place", "time"])
def test_manifest_does_not_depend_on_the_circumstances(
    large: Path, tmp_path: Path, variation: str, stats: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SKILLMERGE_STATS", stats)
    original = skillmerge.apply

    def apply(*arguments: Any, **options: Any) -> Any:
        return original(*arguments, **options, stats=stats)

    monkeypatch.setattr(skillmerge, "apply", apply)
    skillmerge.apply(large, tmp_path / "one")
    variations(large, tmp_path)[variation](tmp_path / "two")
    one, other = parts(tmp_path / "one"), parts(tmp_path / "two")
    assert one[0] == other[0]
    assert json.dumps(one[0]) == json.dumps(other[0]), "the order of keys"
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    if variation in ("place", "time"):
        assert one[1] != other[1], "the environment says what was different"
        assert one[2] != other[2], "the digest covers the environment too"


def test_manifest_says_where_it_was_made_only_under_environment(large: Path, tmp_path: Path) -> None:
    skillmerge.apply(large)
    document, environment, _ = parts(large.parent / "merged")
    assert str(tmp_path) not in json.dumps(document)
    made = {"python", "platform", "torch", "safetensors", "device", "run_log"}
    assert set(environment) == made | {"recipe_folder", "inputs", "stats", "allow_nonfinite"}
    assert environment["torch"] == torch.__version__.partition("+")[0] or environment["torch"] == torch.__version__
    assert environment["device"] == "cpu" or environment["device"].startswith("cuda")


@pytest.mark.parametrize(
    "change",
    [
        {"coefficients": {"lam": 0.25}},
        {"merge": "target + lam * (sft - rl)"},
        {"output": {"path": "merged", "dtype": "float32"}},
        {"output": {"path": "merged", "rounding": "stochastic"}},
        {"output": {"path": "merged", "shard_size": "100KB"}},
    ],
    ids=["coefficient", "expression", "dtype", "rounding", "shards"],
)
def test_manifest_depends_on_what_was_asked(family: Path, edit: Callable[..., Path], change: dict[str, Any]) -> None:
    skillmerge.apply(family)
    before = parts(family.parent / "merged")[0]
    skillmerge.apply(edit(family, **change), overwrite=True)
    after = parts(family.parent / "merged")[0]
    assert before["plan_digest"] != after["plan_digest"]
    assert before["recipe"]["sha256"] != after["recipe"]["sha256"]


# --------------------------------------------------------------------------------------------------- what it says


def test_manifest_tells_the_truth_about_every_file(family: Path) -> None:
    (family.parent / "target" / "tokenizer.json").write_text("{}")
    skillmerge.apply(family, hash_inputs=True)
    output = family.parent / "merged"
    document, environment, _ = parts(output)
    said = {file["name"]: (file["size"], file["sha256"]) for file in document["files"]}
    found = {
        path.name: (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in output.iterdir()
        if path.name not in (MANIFEST, "skillmerge.run.json")
    }
    assert said == found
    assert list(said) == sorted(said)
    log = (output / "skillmerge.run.json").read_bytes()
    assert environment["run_log"] == {"name": "skillmerge.run.json", "sha256": hashlib.sha256(log).hexdigest()}
    text = family.read_text()
    assert document["recipe"] == {"text": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    for model in document["inputs"]:
        files = {file["name"]: (file["size"], file["sha256"]) for file in model["files"]}
        assert files == {
            path.name: (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
            for path in (family.parent / model["name"]).glob("*.safetensors")
        }
        assert environment["inputs"][model["name"]] == {
            name: [size, (family.parent / model["name"] / name).stat().st_mtime_ns] for name, (size, _) in files.items()
        }
    assert [model["name"] for model in document["inputs"]] == ["target", "rl", "sft"]


def test_manifest_tells_the_truth_about_every_tensor(family: Path) -> None:
    skillmerge.apply(family, stats="full")
    output = family.parent / "merged"
    document = parts(output)[0]
    tensors = read_checkpoint(output)
    assert {tensor["name"]: tensor["shape"] for tensor in document["tensors"]} == {
        name: list(tensor.shape) for name, tensor in tensors.items()
    }
    before = read_checkpoint(family.parent / "target")
    for tensor in document["tensors"]:
        changed = int((tensors[tensor["name"]] != before[tensor["name"]]).sum())
        assert tensor["statistics"]["changed"] == changed
        assert tensor["coefficients"] == [0.7]
    assert document["statistics"]["mode"] == "full"


def test_manifest_of_resumed_work_carries_its_statistics(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics of shards finished earlier come from the journal, to the last bit."""
    from skillmerge.outputs.staging import Staging

    skillmerge.apply(family, family.parent / "whole")
    record = Staging.record

    def record_and_die(staging: Staging, entry: dict[str, Any]) -> None:
        record(staging, entry)
        raise KeyboardInterrupt

    monkeypatch.setattr(Staging, "record", record_and_die)
    with pytest.raises(KeyboardInterrupt):
        skillmerge.apply(family, threads=1)
    monkeypatch.undo()
    assert (family.parent / "merged.partial" / "journal.jsonl").read_text().count("sha256") >= 1
    skillmerge.apply(family)
    assert parts(family.parent / "merged")[0] == parts(family.parent / "whole")[0]


def test_manifest_of_numbers_that_are_none_is_still_json(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = {model: torch.ones(300, 300, dtype=torch.bfloat16) for model in ("target", "rl", "sft")}
    tensors["rl"][0, 0], tensors["rl"][1, 1], tensors["rl"][2, 2] = math.nan, math.inf, -math.inf
    for model, tensor in tensors.items():
        write_checkpoint(tmp_path / model, {name: tensor})
    done = run_cli("apply", write_recipe(tmp_path), "--allow-nonfinite", "--stats", "full", "--json")
    assert done.returncode == 0, done.stderr
    for text in (done.stdout, (tmp_path / "merged" / MANIFEST).read_text()):
        json.loads(text, parse_constant=pytest.fail)
    skillmerge.verify(tmp_path / "merged", allow_nonfinite=True)
    with pytest.raises(CheckFailed, match="NaN"):
        skillmerge.verify(tmp_path / "merged")


# ------------------------------------------------------------------------------------------------ canonical form


def with_digest(document: dict[str, Any]) -> dict[str, Any]:
    text = json.dumps(document, ensure_ascii=False, separators=(", ", ": "))
    return {**document, "digest": hashlib.sha256(text.encode()).hexdigest()}


def test_manifest_is_written_in_its_one_form(family: Path) -> None:
    skillmerge.apply(family)
    content = (family.parent / "merged" / MANIFEST).read_bytes()
    document = manifest.read(family.parent / "merged").as_dict()
    assert manifest.to_bytes(document) == content
    assert json.loads(content) == document
    body = {key: value for key, value in document.items() if key != "digest"}
    assert with_digest(body) == document
    assert content.endswith(b"}\n")
    # One line per file, input and tensor: so that two of them can be compared by diff.
    lines = content.decode().splitlines()
    assert sum('"shape":' in line for line in lines) == len(document["tensors"])
    assert sum(line.startswith('    {"name": "model-') and '"sha256"' in line for line in lines) == 2


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text + "\n",
        lambda text: "\ufeff" + text,
        lambda text: text.replace('": ', '":  ', 1),
        lambda text: json.dumps(json.loads(text), indent=1),
        lambda text: json.dumps(dict(reversed(json.loads(text).items()))),
        lambda text: text.replace("[0.7]", "[0.70]"),
        lambda text: text.replace("model.norm", "model\\u002enorm", 1),
        lambda text: text.replace('{"name"', '{"name": "first", "name"', 1),
    ],
    ids=["line ends", "line at the end", "mark", "space", "indent", "order", "number", "escape", "twice"],
)
def test_manifest_in_another_form_is_refused(family: Path, spoil: Callable[[str], str]) -> None:
    """The same document, spelt otherwise, is not the same proof."""
    skillmerge.apply(family)
    path = family.parent / "merged" / MANIFEST
    before = path.read_bytes()
    path.write_bytes(spoil(before.decode()).encode())
    assert path.read_bytes() != before
    with pytest.raises(CheckFailed):
        manifest.read(path.parent)


def test_manifest_round_trips_any_text(tmp_path: Path) -> None:
    document = json.loads((skillmerge.apply(write_family(tmp_path)).output / MANIFEST).read_text())
    del document["digest"]
    document["files"].append({"name": 'ünï\t"\\ \u2028 code', "size": 1, "sha256": ""})
    document["plan_digest"] = "λ"
    document["more"] = {"tiny": 5e-324, "third": 1 / 3, "large": 1e308, "whole": 2**63, "none": None}
    (tmp_path / MANIFEST).write_bytes(manifest.to_bytes(with_digest(document)))
    del document["more"]
    assert {**manifest.read(tmp_path).as_dict(), "digest": ""} == {**document, "digest": ""}


def test_hash_file_reads_all_of_it(tmp_path: Path) -> None:
    for size in (0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3 << 20):
        data = bytes(size % 251 for size in range(size))
        (tmp_path / "file").write_bytes(data)
        assert hash_file(tmp_path / "file") == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda it: it["statistics"].pop("modules"),
        lambda it: it["statistics"]["all"].update(changed="much"),
        lambda it: it["environment"].pop("stats"),
        lambda it: it["environment"].update(recipe_folder="\0"),
        lambda it: it["recipe"].pop("sha256"),
        lambda it: it.pop("tool"),
        lambda it: it["inputs"][0].update(revision=3),
        lambda it: it["inputs"][0].update(license=["mit"]),
        lambda it: it.update(overrides=None),
        lambda it: it.update(plan_digest=7),
        lambda it: it["tensors"][0].update(sources=[["rl"]]),
    ],
)
@pytest.mark.parametrize(
    "verb", [skillmerge.verify, gate, check_rebuild, skillmerge.attest], ids=lambda it: it.__name__
)
def test_forged_manifest_is_a_failed_check_for_every_verb(
    tmp_path: Path, spoil: Callable[[dict[str, Any]], Any], verb: Callable[[Path], Any]
) -> None:
    output = skillmerge.apply(write_family(tmp_path)).output
    document = json.loads((output / MANIFEST).read_text())
    del document["digest"]
    spoil(document)
    (output / MANIFEST).write_bytes(manifest.to_bytes(with_digest(document)))
    with pytest.raises(CheckFailed):
        verb(output)
