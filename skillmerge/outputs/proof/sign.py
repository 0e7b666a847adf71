"""The verb sign: a finished output and a private key -> a signature; and its verification.

Signatures are those of OpenSSF Model Signing 1.0 (https://github.com/sigstore/model-transparency), made and read by
its own library: a Sigstore bundle with a DSSE envelope with the sha256 of every file. Knows keys, certificates and
files, nothing about tensors. Needs no network.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skillmerge.brief import brief, drawn
from skillmerge.durable import disk_errors, scratch_folder
from skillmerge.errors import CheckFailed, UsageError, some
from skillmerge.outputs.output import Output, check_folder
from skillmerge.outputs.verify import BESIDE, DOWNLOADS, SIGNATURE_FILE, Verdict, checked, verify_files
from skillmerge.reporter import Reporter, default_reporter

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey


_CURVES = ("secp256r1", "secp384r1", "secp521r1")
_PREDICATE = "https://model_signing/signature/v1.0"
_WHOM = "pass `--public-key KEY`, or `--certificate-chain ROOT` if a certificate was used"

_NEW_KEY = "create one: openssl ecparam -name prime256v1 -genkey -noout -out key.pem"

_UNSIGNED = BESIDE | {DOWNLOADS}
"""What a signature leaves out."""

_AnyPath = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Signature:
    """A signature that was made or verified. signer: the key's digest, or the certificate's subject.

    folder: the output, as it was named.
    """

    path: Path
    files: int
    signer: str
    verdict: Verdict
    folder: str

    __repr__ = brief
    _repr_html_ = drawn

    def as_dict(self) -> dict[str, Any]:
        return {"folder": self.folder, "path": str(self.path), "files": self.files, "signer": self.signer}


def sign(
    folder: _AnyPath,
    *,
    private_key: _AnyPath,
    password: str | None = None,
    signing_certificate: _AnyPath | None = None,
    certificate_chain: Sequence[_AnyPath] = (),
    signature: _AnyPath | None = None,
    allow_nonfinite: bool = False,
    reporter: Reporter | None = None,
) -> Signature:
    """Verify an output, sign every file of it, and write the signature (default: `model.sig` in the folder).

    private_key: a PEM file, an EC key on P-256, P-384 or P-521; password: where it is encrypted. signing_certificate:
    a PEM file for that key, with certificate_chain: those that lead from it to a root. An existing signature is
    replaced. Raises CheckFailed if the output does not verify, UsageError for keys and certificates that cannot be
    used and where the package is missing, ResourceError.
    """
    root = check_folder(folder)
    place = _place(root, signature)
    key = read_private_key(private_key, password)
    configuration = _signer(key, signing_certificate, certificate_chain)
    _check_replaceable(root, place)
    verdict = verify_files(root, allow_nonfinite=allow_nonfinite, reporter=reporter)
    verdict.output.refuse_failed()
    with scratch_folder() as scratch:
        made = scratch / SIGNATURE_FILE
        try:
            configuration.set_hashing_config(_hashing(_UNSIGNED)).sign(root, made)
        except (ValueError, OSError) as error:
            raise CheckFailed(f"{root} could not be signed: {error}") from error
        content = made.read_bytes()
    # The files were read again for signing: what was signed must be what was verified.
    bundle = _read(content, place)
    bundle.check_covers(Output.open(root))
    with disk_errors(place):
        place.write_bytes(content)  # without a temporary name: a crash must leave nothing else in the output
    return Signature(place, len(bundle.files), bundle.signer, verdict, os.fspath(folder))


def verify_signature(
    folder: _AnyPath,
    signature: _AnyPath | None = None,
    *,
    public_key: _AnyPath | None = None,
    certificate_chain: Sequence[_AnyPath] = (),
    allow_nonfinite: bool = False,
    reporter: Reporter | None = None,
) -> Signature:
    """Verify an output's files, its signature, and the signer.

    signature: replaces `model.sig` in the folder. public_key: of the key that signed; or certificate_chain: the
    roots (and what leads to them) that are trusted. Certificates are judged as of the first day of the signing one;
    nothing is asked about revocation.
    Raises CheckFailed if there is no signature or it does not hold, UsageError.
    """
    root = Path(folder)
    if public_key is not None and certificate_chain:
        raise UsageError("a public key and a certificate chain exclude each other", fix=_WHOM)
    if public_key is None and not certificate_chain:
        raise UsageError("`--signature` needs `--public-key` or `--certificate-chain`", fix=_WHOM)
    check_folder(root)
    configuration = _verifier(public_key, certificate_chain)
    place = _place(root, signature)
    reporter = reporter or default_reporter("verifying")
    verdict = verify_files(root, allow_nonfinite=allow_nonfinite, reporter=reporter)
    with checked(reporter, "signature"):
        bundle = _check_signature(verdict.output, place, configuration)
    return Signature(place, len(bundle.files), bundle.signer, verdict, os.fspath(folder))


def _check_signature(output: Output, place: Path, configuration: Any) -> _Bundle:
    """Check that the signature at `place` is valid and covers every file of the output. Raises CheckFailed."""
    root = output.folder
    try:
        bundle = _read(place.read_bytes(), place)
    except OSError as error:
        raise CheckFailed(
            f"{root} is not signed: {place}: {error.strerror}",
            fix=f"sign it with `skillmerge sign {shlex.quote(str(root))} --private-key KEY`, or name its signature: "
            "`--signature FILE`",
        ) from error
    bundle.check_covers(output)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it reports old signatures on stdout, where results go
            configuration.set_hashing_config(_hashing(_unsigned(bundle.files))).verify(root, place)
    except Exception as error:  # any error that a forged signature leads to
        reason = str(error).strip() or "it was not made with that key"
        raise CheckFailed(f"{place}: the signature is invalid: {reason}") from error
    return bundle


def signature_beside(output: Output) -> bytes | None:
    """Return the content of an output's own signature, or None. Raises CheckFailed if it covers other files.

    Does not check the signer.
    """
    place = output.folder / SIGNATURE_FILE
    if not place.is_file():
        return None
    content = place.read_bytes()
    _read(content, place).check_covers(output)
    return content


def read_private_key(path: _AnyPath, password: str | None = None) -> EllipticCurvePrivateKey:
    """Return an EC key that signatures can be made with. Raises UsageError; the password is in no message."""
    ec, serialization = _cryptography()
    content = _read_file(path, "the private key")
    try:
        key: Any = serialization.load_pem_private_key(content, password.encode() if password is not None else None)
    except TypeError as error:
        if password is None:
            raise UsageError(
                f"the private key {os.fspath(path)} is encrypted",
                fix="set SKILLMERGE_KEY_PASSWORD to its password, or pass `--password-file FILE`",
            ) from error
        return read_private_key(path)  # it is not encrypted, and needs none
    except Exception as error:  # also raised for what the library does not support
        if b"-----BEGIN PUBLIC KEY-----" in content:
            what, fix = "is a public key", "pass the private key that it was derived from"
        elif b"-----BEGIN CERTIFICATE-----" in content:
            what, fix = "is a certificate", "pass it with `--signing-certificate`, and its key with `--private-key`"
        else:
            what = "cannot be read" + (" with that password" if password is not None else ": is it a PEM file?")
            fix = _NEW_KEY if password is None else "check the password"
        raise UsageError(f"the private key {os.fspath(path)} {what}", fix=fix) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name not in _CURVES:
        raise UsageError(
            f"the private key {os.fspath(path)} is not an EC key on P-256, P-384 or P-521",
            fix=_NEW_KEY,
        )
    loaded: EllipticCurvePrivateKey = key
    return loaded


@dataclass(frozen=True, slots=True)
class _Bundle:
    """The unverified content of a signature. files: names and their sha256."""

    path: Path
    files: Mapping[str, str]
    material: Mapping[str, Any]

    @property
    def signer(self) -> str:
        """The key's digest or the certificate's subject, as the signature itself states them."""
        if "x509CertificateChain" not in self.material:
            return f"key sha256:{self.material['publicKey'].get('hint')}"
        from cryptography.x509 import load_der_x509_certificate

        raw = self.material["x509CertificateChain"]["certificates"][0]["rawBytes"]
        return load_der_x509_certificate(base64.b64decode(raw)).subject.rfc4514_string()

    def check_covers(self, output: Output) -> None:
        """Check that the signature covers every file of an output as it is now. Raises CheckFailed."""
        wanted = output.digests()
        if other := sorted(name for name in wanted if self.files.get(name) != wanted[name]):
            raise CheckFailed(
                f"{self.path}: the signature does not match these files: {some(other)}",
                fix="they were changed after signing, or it belongs to another output",
            )


def _read(content: bytes, path: Path) -> _Bundle:
    """Read a signature. Raises CheckFailed if it is not one of Model Signing 1.0."""
    try:
        document = json.loads(content)
        statement = json.loads(base64.b64decode(document["dsseEnvelope"]["payload"]))
        if statement["predicateType"] != _PREDICATE:
            raise CheckFailed(f"{path}: is a signature of an unknown kind: {statement['predicateType']}")
        files = {file["name"]: file["digest"] for file in statement["predicate"]["resources"]}
        return _Bundle(path, files, dict(document["verificationMaterial"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckFailed(f"{path}: is not a signature of a model") from error


def _place(root: Path, signature: _AnyPath | None) -> Path:
    """Return where the signature goes. Raises UsageError if it would be inside the output under another name."""
    own = root / SIGNATURE_FILE
    place = Path(signature) if signature is not None else own
    if place.resolve() != own.resolve() and root.resolve() in place.resolve().parents:
        raise UsageError(
            f"{place} is inside the output, where a signature must be named {SIGNATURE_FILE}",
            fix="leave `--signature` out, or choose a file elsewhere",
        )
    return place


def _check_replaceable(root: Path, place: Path) -> None:
    """Raise UsageError if a signature outside the output would replace anything but a signature."""
    if place.resolve() == (root / SIGNATURE_FILE).resolve() or not os.path.lexists(place):
        return
    try:
        _read(place.read_bytes() if place.is_file() else b"", place)
    except (CheckFailed, OSError) as error:
        raise UsageError(f"{place} already exists and is not a signature", fix="choose another file") from error


def _signer(key: EllipticCurvePrivateKey, certificate: _AnyPath | None, chain: Sequence[_AnyPath]) -> Any:
    signing, _, _ = _model_signing()
    with _in_memory(key) as path:
        if certificate is None and not chain:
            return signing.Config().use_elliptic_key_signer(private_key=path)
        if certificate is None or not chain:
            raise UsageError(
                "signing with a certificate needs the certificate and its chain to a root",
                fix="pass `--signing-certificate CERT --certificate-chain CHAIN`",
            )
        for file in (certificate, *chain):
            _check_certificates(file)
        try:
            return signing.Config().use_certificate_signer(
                private_key=path, signing_certificate=certificate, certificate_chain=list(chain)
            )
        except ValueError as error:
            raise UsageError(f"the certificate {os.fspath(certificate)} cannot be used: {error}") from error


def _verifier(public_key: _AnyPath | None, chain: Sequence[_AnyPath]) -> Any:
    _, verifying, _ = _model_signing()
    if public_key is None:
        for file in chain:
            _check_certificates(file)
        return verifying.Config().use_certificate_verifier(certificate_chain=list(chain))
    _read_file(public_key, "the public key")
    try:
        return verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    except Exception as error:  # not PEM, not EC, an unsupported curve, a private key
        raise UsageError(
            f"the public key {os.fspath(public_key)} cannot be used: {error}",
            fix="derive it from the private key: openssl ec -in key.pem -pubout -out key.pub",
        ) from error


def _unsigned(signed: Iterable[str]) -> frozenset[str]:
    """Return what a signature of these files leaves out."""
    return frozenset(path for path in _UNSIGNED if not any(f"{name}/".startswith(f"{path}/") for name in signed))


def _hashing(ignored: frozenset[str]) -> Any:
    # The list is part of the signature, so that other verifiers ignore the same files.
    _, _, hashing = _model_signing()
    return hashing.Config().set_ignored_paths(paths=sorted(ignored), ignore_git_paths=False)


@contextlib.contextmanager
def _in_memory(key: EllipticCurvePrivateKey) -> Iterator[Path]:
    """Yield a path at which a decrypted key can be read once: the library reads only files, takes no password with a
    certificate, and a decrypted key must never be on a disk."""
    _, serialization = _cryptography()
    content = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    reader, writer = os.pipe()
    try:
        with open(writer, "wb") as stream:
            stream.write(content)  # small enough for any pipe
        yield Path(f"/dev/fd/{reader}")
    finally:
        os.close(reader)


def _check_certificates(path: _AnyPath) -> None:
    from cryptography.x509 import load_pem_x509_certificates

    try:
        load_pem_x509_certificates(_read_file(path, "the certificate"))
    except ValueError as error:
        raise UsageError(f"{os.fspath(path)} has no certificate in PEM format") from error


def _read_file(path: _AnyPath, what: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        fix = "check the path" if isinstance(error, FileNotFoundError) else "check the file and its permissions"
        raise UsageError(f"{what} {os.fspath(path)} cannot be read: {error.strerror}", fix=fix) from error


def _model_signing() -> tuple[Any, Any, Any]:
    """Return the library's parts: signing, verifying, hashing. Raises UsageError."""
    try:
        from model_signing import hashing, signing, verifying
    except ImportError as error:
        raise _missing() from error
    return signing, verifying, hashing


def _cryptography() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError as error:
        raise _missing() from error
    return ec, serialization


def _missing() -> UsageError:
    return UsageError("signatures need the package model-signing", fix="pip install 'skillmerge[sign]'")
