"""Signatures: made here and checked by model-signing's own command line, made there and checked here; and every
tampering refused by both."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from conftest import flip, run_cli, tensor_shapes, write_family
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID
from hub_server import HubServer

import skillmerge
from skillmerge.errors import CheckFailed, UsageError

PASSWORD = "correct horse canary staple"
SHARD = "model-00001-of-00002.safetensors"
ROOT, TWIN = "root", "twin"


pytestmark = pytest.mark.usefixtures("no_network")


def write_key(path: Path, key: Any, password: str | None = None) -> None:
    """KEY.pem and KEY.pub."""
    hidden = serialization.BestAvailableEncryption(password.encode()) if password else serialization.NoEncryption()
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, hidden))
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    path.with_suffix(".pub").write_bytes(public)


def certificate(subject: str, key: Any, issuer: str, signer: Any, *, authority: bool) -> x509.Certificate:
    today = datetime.now(timezone.utc)
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "crl_sign",
         "encipher_only", "decipher_only"),
        False,
    )  # fmt: skip
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(today - timedelta(days=1))
        .not_valid_after(today + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(digital_signature=not authority, key_cert_sign=authority, **usage), critical=True)
        .sign(signer, hashes.SHA256())
    )


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys (`key`, `other`, `p384`, `locked`), and `signer.crt` with `chain.crt` up to `root.crt`; `twin.crt` is a
    root of the same name with another key."""
    folder = tmp_path_factory.mktemp("keys")
    made = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("key", "other", "middle", ROOT, TWIN)}
    for name, key in made.items():
        write_key(folder / f"{name}.pem", key)
    write_key(folder / "p384.pem", ec.generate_private_key(ec.SECP384R1()))
    write_key(folder / "locked.pem", made["key"], PASSWORD)
    write_key(folder / "rsa.pem", rsa.generate_private_key(65537, 2048))
    write_key(folder / "k1.pem", ec.generate_private_key(ec.SECP256K1()))
    chain = {
        "signer": certificate("release", made["key"], "middle", made["middle"], authority=False),
        "middle": certificate("middle", made["middle"], ROOT, made[ROOT], authority=True),
        ROOT: certificate(ROOT, made[ROOT], ROOT, made[ROOT], authority=True),
        TWIN: certificate(ROOT, made[TWIN], ROOT, made[TWIN], authority=True),
    }
    for name, made_certificate in chain.items():
        (folder / f"{name}.crt").write_bytes(made_certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "chain.crt").write_bytes((folder / "middle.crt").read_bytes() + (folder / "root.crt").read_bytes())
    return folder


@pytest.fixture
def signed(output: Path, keys: Path) -> Path:
    skillmerge.sign(output, private_key=keys / "key.pem")
    return output


@pytest.fixture
def certified(output: Path, keys: Path) -> Path:
    options: dict[str, Any] = {"signing_certificate": keys / "signer.crt", "certificate_chain": [keys / "chain.crt"]}
    skillmerge.sign(output, private_key=keys / "key.pem", **options)
    return output


def model_signing(*arguments: str | Path) -> Result:
    """The other tool's own command line, in this process."""
    from model_signing._cli import main

    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def theirs_accepts(output: Path, key: Path, *more: str | Path) -> bool:
    process = model_signing("verify", "key", output, "--signature", output / "model.sig", "--public_key", key, *more)
    assert process.exit_code in (0, 1), process.output
    return process.exit_code == 0


def ours_accepts(output: Path, key: Path) -> bool:
    try:
        skillmerge.verify_signed(output, public_key=key)
    except CheckFailed:
        return False
    return True


# ---------------------------------------------------------------------------------------------------- both ways


@pytest.mark.parametrize("key", ["key", "p384"])
def test_signature_holds_here_and_there(output: Path, keys: Path, key: str) -> None:
    made = skillmerge.sign(output, private_key=keys / f"{key}.pem")
    assert made.path == output / "model.sig"
    assert made.files == 8, "every file of the output, manifest and run log included"
    assert skillmerge.verify_signed(output, public_key=keys / f"{key}.pub").signer == made.signer
    assert theirs_accepts(output, keys / f"{key}.pub")
    skillmerge.verify(output)


def test_signature_made_there_holds_here(output: Path, keys: Path) -> None:
    process = model_signing(
        "sign", "key", output, "--signature", output / "model.sig", "--private_key", keys / "key.pem"
    )
    assert process.exit_code == 0, process.output
    assert ours_accepts(output, keys / "key.pub")
    assert not ours_accepts(output, keys / "other.pub")


def test_certificate_holds_here_and_there_offline(certified: Path, keys: Path) -> None:
    checked = skillmerge.verify_signed(certified, certificate_chain=[keys / "root.crt"])
    assert checked.signer == "CN=release"
    verify = ("verify", "certificate", certified, "--signature", certified / "model.sig")
    assert model_signing(*verify, "--certificate_chain", keys / "root.crt").exit_code == 0
    for untrusted in ("twin.crt", "middle.crt"):
        with pytest.raises(CheckFailed, match="signature is invalid"):
            skillmerge.verify_signed(certified, certificate_chain=[keys / untrusted])
        assert model_signing(*verify, "--certificate_chain", keys / untrusted).exit_code == 1


def test_certificate_of_there_holds_here(output: Path, keys: Path) -> None:
    process = model_signing(
        "sign", "certificate", output, "--signature", output / "model.sig", "--private_key", keys / "key.pem",
        "--signing_certificate", keys / "signer.crt", "--certificate_chain", keys / "chain.crt",
    )  # fmt: skip
    assert process.exit_code == 0, process.output
    assert skillmerge.verify_signed(output, certificate_chain=[keys / "root.crt"]).signer == "CN=release"


def test_key_and_certificate_are_not_taken_for_each_other(output: Path, keys: Path, certified: Path) -> None:
    with pytest.raises(CheckFailed):
        skillmerge.verify_signed(certified, public_key=keys / "other.pub")
    skillmerge.sign(output, private_key=keys / "key.pem")
    with pytest.raises(CheckFailed):
        skillmerge.verify_signed(output, certificate_chain=[keys / "root.crt"])


def test_what_the_hub_adds_does_not_break_it(signed: Path, keys: Path) -> None:
    (signed / "README.md").write_text("# A card")
    (signed / ".gitattributes").write_text("*.safetensors filter=lfs")
    assert ours_accepts(signed, keys / "key.pub")
    assert theirs_accepts(signed, keys / "key.pub"), "without a flag: the signature says what it leaves out"


def test_notes_of_the_hubs_client_do_not_break_it(signed: Path, output: Path, keys: Path) -> None:
    notes = signed / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    (notes / "config.json.metadata").write_text("1")
    assert ours_accepts(signed, keys / "key.pub")
    assert theirs_accepts(signed, keys / "key.pub")
    (signed / ".cache" / "other").write_text("1")
    assert not ours_accepts(signed, keys / "key.pub")


def test_card_that_was_signed_is_signed(output: Path, keys: Path) -> None:
    (output / "README.md").write_text("# A card")
    model_signing("sign", "key", output, "--signature", output / "model.sig", "--private_key", keys / "key.pem")
    assert ours_accepts(output, keys / "key.pub")
    (output / "README.md").write_text("# Another card")
    assert not ours_accepts(output, keys / "key.pub")


# --------------------------------------------------------------------------------------------------- tamperings


def change_signed_digest(output: Path) -> None:
    """What is signed names other bytes, and the bytes are those."""
    path = output / "model.sig"
    document = json.loads(path.read_text())
    statement = json.loads(base64.b64decode(document["dsseEnvelope"]["payload"]))
    statement["subject"][0]["name"] = "another"
    document["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    path.write_text(json.dumps(document))


def exchange_signature(output: Path) -> None:
    path = output / "model.sig"
    document = json.loads(path.read_text())
    document["dsseEnvelope"]["signatures"] = [{"sig": base64.b64encode(b"0" * 70).decode(), "keyid": ""}]
    path.write_text(json.dumps(document))


FILES = [
    "config.json", SHARD, "model.safetensors.index.json", "tokenizer.json", "1_Pooling/config.json",
    "skillmerge.manifest.json", "skillmerge.run.json",
]  # fmt: skip
TAMPERINGS: dict[str, Callable[[Path], object]] = {
    **{f"changed {name}": lambda output, name=name: flip(output / name, 5) for name in FILES},
    "removed": lambda output: (output / "tokenizer.json").unlink(),
    "added": lambda output: (output / "extra.json").write_text("{}"),
    "added below": lambda output: (output / "1_Pooling" / "extra.json").write_text("{}"),
    "renamed": lambda output: (output / "tokenizer.json").rename(output / "tokenizer_config.json"),
    "exchanged": lambda output: os.rename(output / SHARD, output / SHARD.replace("1-of", "2-of")),
    "signed digests": change_signed_digest,
    "signature": exchange_signature,
    "garbage": lambda output: (output / "model.sig").write_text("not a signature"),
    "no signature": lambda output: (output / "model.sig").unlink(),
}


@pytest.mark.parametrize("name", TAMPERINGS)
def test_tampering_is_refused_here_and_there(signed: Path, keys: Path, name: str) -> None:
    TAMPERINGS[name](signed)
    assert not ours_accepts(signed, keys / "key.pub")
    assert not theirs_accepts(signed, keys / "key.pub")


def test_output_that_is_sound_but_not_the_signed_one_is_refused(signed: Path, keys: Path) -> None:
    """Who has the tool can make an output that verifies; not one that is signed."""
    recipe = write_family(signed.parent / "family", tensor_shapes(layers=1, hidden=8))
    (recipe.parent / "target" / "tokenizer.json").write_text('{"version": "1.0", "model": {"vocab": {"a": 0}}}')
    (recipe.parent / "target" / "1_Pooling").mkdir()
    (recipe.parent / "target" / "1_Pooling" / "config.json").write_text("{}")
    forged = skillmerge.apply(recipe, coefficients={"lam": 0.1}).output
    shutil.copy(signed / "model.sig", forged / "model.sig")
    skillmerge.verify(forged)
    with pytest.raises(CheckFailed, match=r"does not match these files: .*model-00001"):
        skillmerge.verify_signed(forged, public_key=keys / "key.pub")
    assert not theirs_accepts(forged, keys / "key.pub")


def test_signature_that_leaves_files_out_is_refused(output: Path, keys: Path) -> None:
    """The other tool signs what it is told to; here all of an output is signed or none."""
    model_signing(
        "sign", "key", output, "--signature", output / "model.sig", "--private_key", keys / "key.pem",
        "--ignore-paths", output / SHARD,
    )  # fmt: skip
    assert theirs_accepts(output, keys / "key.pub")
    with pytest.raises(CheckFailed, match=f"does not match these files: {SHARD}"):
        skillmerge.verify_signed(output, public_key=keys / "key.pub")


def test_other_key_is_refused(signed: Path, keys: Path) -> None:
    assert not ours_accepts(signed, keys / "other.pub")
    assert not theirs_accepts(signed, keys / "other.pub")


# --------------------------------------------------------------------------------------------------- signing


def test_what_does_not_verify_is_not_signed(output: Path, keys: Path) -> None:
    flip(output / SHARD)
    with pytest.raises(CheckFailed):
        skillmerge.sign(output, private_key=keys / "key.pem")
    assert not (output / "model.sig").exists()


def test_what_changes_while_it_is_signed_is_not_signed(
    output: Path, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from skillmerge.outputs.proof import sign

    def verified(root: Path, **options: Any) -> Any:
        verdict = skillmerge.verify(root, **options)
        flip(root / SHARD)
        return verdict

    monkeypatch.setattr(sign, "verify_files", verified)
    with pytest.raises(CheckFailed, match=f"does not match these files: {SHARD}"):
        skillmerge.sign(output, private_key=keys / "key.pem")
    assert not (output / "model.sig").exists()


def test_signature_is_replaced_by_a_new_one(signed: Path, keys: Path) -> None:
    skillmerge.sign(signed, private_key=keys / "other.pem")
    assert ours_accepts(signed, keys / "other.pub")
    assert not ours_accepts(signed, keys / "key.pub")
    (signed / "model.sig").write_text("half of a")
    skillmerge.sign(signed, private_key=keys / "key.pem")
    assert ours_accepts(signed, keys / "key.pub")


def test_signature_may_lie_elsewhere(output: Path, keys: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "merged.sig"
    skillmerge.sign(output, private_key=keys / "key.pem", signature=elsewhere)
    assert not (output / "model.sig").exists()
    skillmerge.verify_signed(output, elsewhere, public_key=keys / "key.pub")
    process = model_signing("verify", "key", output, "--signature", elsewhere, "--public_key", keys / "key.pub")
    assert process.exit_code == 0, process.output
    skillmerge.sign(output, private_key=keys / "other.pem", signature=elsewhere)
    elsewhere.write_text("notes")
    with pytest.raises(UsageError, match="not a signature"):
        skillmerge.sign(output, private_key=keys / "key.pem", signature=elsewhere)
    with pytest.raises(UsageError, match="inside the output"):
        skillmerge.sign(output, private_key=keys / "key.pem", signature=output / "other.sig")


def test_link_in_place_of_a_signature_is_refused(signed: Path, tmp_path: Path) -> None:
    (signed / "model.sig").rename(tmp_path / "model.sig")
    (signed / "model.sig").symlink_to(tmp_path / "model.sig")
    with pytest.raises(CheckFailed, match="plain file"):
        skillmerge.verify(signed)


def test_new_output_has_no_old_signature(merged: Path, keys: Path, tmp_path: Path) -> None:
    recipe = merged.parent / "recipe.yaml"
    output = skillmerge.apply(recipe, tmp_path / "again").output
    skillmerge.sign(output, private_key=keys / "key.pem")
    assert skillmerge.apply(recipe, output).already, "a signature is no reason to merge again"
    skillmerge.apply(recipe, output, coefficients={"lam": 0.2}, overwrite=True)
    assert not (output / "model.sig").exists()


# --------------------------------------------------------------------------------------------------- keys


@pytest.mark.parametrize("traditional", [False, True])
@pytest.mark.parametrize("with_certificate", [False, True])
def test_password_comes_from_environment_or_file_and_is_never_seen(
    output: Path, keys: Path, tmp_path: Path, with_certificate: bool, traditional: bool
) -> None:
    key = keys / "locked.pem"
    if traditional:
        key = tmp_path / "old.pem"
        subprocess.run(
            ["openssl", "ec", "-in", keys / "key.pem", "-aes256", "-passout", f"pass:{PASSWORD}", "-out", key],
            check=True, capture_output=True,
        )  # fmt: skip
    command: list[str | Path] = ["sign", output, "--private-key", key]
    if with_certificate:
        command += ["--signing-certificate", keys / "signer.crt", "--certificate-chain", keys / "chain.crt"]
    asked = run_cli(*command)
    assert asked.returncode == 2
    assert "is encrypted" in asked.stderr
    assert "--password-file" in asked.stderr
    wrong = run_cli(*command, SKILLMERGE_KEY_PASSWORD="wrong canary")
    assert wrong.returncode == 2
    given = run_cli(*command, SKILLMERGE_KEY_PASSWORD=PASSWORD)
    assert given.returncode == 0, given.stderr
    (tmp_path / "password").write_text(PASSWORD + "\n")
    from_file = run_cli(*command, "--password-file", tmp_path / "password")
    assert from_file.returncode == 0, from_file.stderr
    for process in (asked, wrong, given, from_file):
        assert "canary" not in process.stdout + process.stderr
    assert b"canary" not in b"".join(path.read_bytes() for path in output.rglob("*") if path.is_file())
    trusted = ("--certificate-chain", keys / "root.crt") if with_certificate else ("--public-key", keys / "key.pub")
    assert run_cli("verify", output, "--signature", *trusted).returncode == 0


def test_password_that_is_not_needed_is_no_trouble(output: Path, keys: Path) -> None:
    assert run_cli("sign", output, "--private-key", keys / "key.pem", SKILLMERGE_KEY_PASSWORD="x").returncode == 0


@pytest.mark.parametrize("key", ["rsa.pem", "k1.pem", "key.pub", "signer.crt", "missing.pem"])
def test_key_that_cannot_sign_is_a_usage_error(output: Path, keys: Path, key: str) -> None:
    with pytest.raises(UsageError, match=key):
        skillmerge.sign(output, private_key=keys / key)


@pytest.mark.parametrize(
    ("key", "what", "fix"),
    [
        ("key.pub", "is a public key", "pass the private key"),
        ("signer.crt", "is a certificate", "--signing-certificate"),
        ("missing.pem", "No such file", "check the path"),
        ("text.pem", "is it a PEM file?", "create one: openssl"),
    ],
)
def test_key_that_cannot_sign_is_called_what_it_is(output: Path, keys: Path, key: str, what: str, fix: str) -> None:
    (keys / "text.pem").write_text("hello\n")
    with pytest.raises(UsageError) as caught:
        skillmerge.sign(output, private_key=keys / key)
    assert what in caught.value.message
    assert fix in str(caught.value.fix)


@pytest.mark.parametrize("key", ["rsa.pub", "k1.pub", "key.pem", "signer.crt", "missing.pub"])
def test_key_that_cannot_check_is_a_usage_error(signed: Path, keys: Path, key: str) -> None:
    with pytest.raises(UsageError, match=key):
        skillmerge.verify_signed(signed, public_key=keys / key)


def test_certificate_of_another_key_and_no_chain_are_usage_errors(output: Path, keys: Path) -> None:
    chain = [keys / "chain.crt"]
    with pytest.raises(UsageError, match="does not match"):
        skillmerge.sign(
            output, private_key=keys / "other.pem", signing_certificate=keys / "signer.crt", certificate_chain=chain
        )
    with pytest.raises(UsageError, match="chain to a root"):
        skillmerge.sign(output, private_key=keys / "key.pem", signing_certificate=keys / "signer.crt")
    with pytest.raises(UsageError, match=r"key\.pub has no certificate"):
        skillmerge.verify_signed(output, certificate_chain=[keys / "key.pub"])


def test_whom_to_trust_has_to_be_said(signed: Path, keys: Path) -> None:
    with pytest.raises(UsageError, match=r"^`--signature` needs `--public-key` or `--certificate-chain`"):
        skillmerge.verify_signed(signed)
    with pytest.raises(UsageError, match="exclude each other"):
        skillmerge.verify_signed(signed, public_key=keys / "key.pub", certificate_chain=[keys / "root.crt"])


# ------------------------------------------------------------------------------------------------ command line


def test_verify_demands_a_signature_where_it_is_told_to(output: Path, keys: Path, tmp_path: Path) -> None:
    demanded = ("--signature", "--public-key", keys / "key.pub")
    unsigned = run_cli("verify", output, *demanded)
    assert unsigned.returncode == 3
    assert "is not signed" in unsigned.stderr
    assert f"help: sign it with `skillmerge sign {output} --private-key KEY`" in unsigned.stderr
    assert run_cli("verify", output, "--public-key", keys / "key.pub").returncode == 3
    made = json.loads(run_cli("sign", output, "--private-key", keys / "key.pem", "--json").stdout)
    assert made["ok"]
    assert made["files"] == 8
    process = run_cli("verify", output, *demanded)
    assert process.returncode == 0, process.stderr
    assert "signed by key sha256:" in process.stdout
    found = json.loads(run_cli("verify", output, *demanded, "--json").stdout)
    assert found["signature"]["signer"] == made["signer"]
    assert json.loads(run_cli("verify", output, "--json").stdout)["signature"] is None
    shutil.move(output / "model.sig", tmp_path / "beside.sig")
    beside = ("--signature", tmp_path / "beside.sig", "--public-key", keys / "key.pub")
    assert run_cli("verify", output, *beside).returncode == 0
    assert run_cli("verify", output, "--signature").returncode == 2
    assert run_cli("sign", output).returncode == 2


def test_missing_package_is_told_with_its_extra(signed: Path, keys: Path, hide: Callable[[str], None]) -> None:
    hide("model_signing")
    for command in (
        ("sign", signed, "--private-key", keys / "key.pem"),
        ("verify", signed, "--signature", "--public-key", keys / "key.pub"),
    ):
        process = run_cli(*command)
        assert process.returncode == 2
        assert "pip install 'skillmerge[sign]'" in process.stderr
    assert run_cli("verify", signed).returncode == 0


# ---------------------------------------------------------------------------------------------------- the Hub


def test_signature_goes_to_the_hub_and_holds_for_who_downloads(
    hub: HubServer, signed: Path, keys: Path, tmp_path: Path
) -> None:
    from huggingface_hub import snapshot_download

    skillmerge.push(signed, "acme/merged", license="mit")
    back = Path(snapshot_download("acme/merged", local_dir=tmp_path / "back", cache_dir=tmp_path / "cache"))
    shutil.rmtree(back / ".cache")
    assert {"README.md", ".gitattributes", "model.sig"} <= {path.name for path in back.iterdir()}
    assert ours_accepts(back, keys / "key.pub")
    assert theirs_accepts(back, keys / "key.pub")


def test_signature_of_another_output_is_not_pushed(hub: HubServer, signed: Path) -> None:
    change = json.loads((signed / "model.sig").read_text())
    statement = json.loads(base64.b64decode(change["dsseEnvelope"]["payload"]))
    statement["predicate"]["resources"][0]["digest"] = "00" * 32
    change["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    (signed / "model.sig").write_text(json.dumps(change))
    with pytest.raises(CheckFailed, match="does not match these files"):
        skillmerge.push(signed, "acme/merged", license="mit")
    assert hub.requests == []


def test_signature_of_the_model_before_leaves_the_repository_with_it(
    hub: HubServer, signed: Path, merged: Path, tmp_path: Path
) -> None:
    skillmerge.push(signed, "acme/merged", license="mit")
    other = skillmerge.apply(merged.parent / "recipe.yaml", tmp_path / "other", coefficients={"lam": 0.3}).output
    skillmerge.push(other, "acme/merged", license="mit", pull_request=False)
    assert "model.sig" not in hub.tree("acme/merged")
