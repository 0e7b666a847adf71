"""The verb attest: a finished output -> its provenance, in the format of release pipelines.

An in-toto Statement v1 (https://github.com/in-toto/attestation, spec/v1) with the SLSA provenance v1 predicate
(https://slsa.dev/spec/v1.0/provenance), and on request a bill of materials (`bom`). Knows the manifest and the run
log; reads weights only to verify them. The same output gives the same documents.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path, PurePosixPath
from typing import Any

from skillmerge.brief import brief, drawn
from skillmerge.checkpoints.place import on_hub
from skillmerge.durable import disk_errors, write_whole
from skillmerge.errors import UsageError
from skillmerge.outputs.manifest import Input, Manifest
from skillmerge.outputs.output import RunLog, check_folder
from skillmerge.outputs.proof import bom
from skillmerge.outputs.proof.sign import read_private_key
from skillmerge.outputs.staging import MANIFEST_FILE
from skillmerge.outputs.verify import verify_files
from skillmerge.recipes.parse import parse_recipe
from skillmerge.reporter import Reporter, default_reporter

PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
BUILD_TYPE = "urn:skillmerge:build-type:merge:1"
"""The build type, which defines the parameters; see docs/proof.md."""
LOCAL_BUILDER = "urn:skillmerge:builder:local"
"""The default builder: a local machine."""

_AnyPath = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Attested:
    """An attestation that was written. unpinned: inputs without a commit or every sha256 in the manifest.

    folder: the output, as it was named.
    """

    attestation: Path
    bom: Path | None
    subjects: int
    unpinned: tuple[str, ...]
    folder: str

    __repr__ = brief
    _repr_html_ = drawn

    def as_dict(self) -> dict[str, Any]:
        return {
            "folder": self.folder,
            "attestation": str(self.attestation),
            "bom": str(self.bom) if self.bom else None,
            "subjects": self.subjects,
            "unpinned": list(self.unpinned),
        }


def attest(
    folder: _AnyPath,
    output: _AnyPath | None = None,
    *,
    bom_file: _AnyPath | None = None,
    builder_id: str = LOCAL_BUILDER,
    invocation_id: str | None = None,
    private_key: _AnyPath | None = None,
    password: str | None = None,
    allow_nonfinite: bool = False,
    reporter: Reporter | None = None,
) -> Attested:
    """Verify an output and write its provenance (default: NAME.intoto.json beside it); and a bill of materials.

    builder_id: URI of the builder that ran the merge; invocation_id: the builder's name for the run. private_key: also
    sign it, as a DSSE envelope (then the file is NAME.intoto.jsonl); see `sign.sign`.
    Raises CheckFailed if the output does not verify, UsageError, ResourceError.
    """
    root = check_folder(folder)
    _check_libraries(bom_file is not None, private_key is not None)
    suffix = ".intoto.jsonl" if private_key is not None else ".intoto.json"
    named = root if root.name not in ("", "..") else root.resolve()
    place = Path(output) if output is not None else named.with_name(named.name + suffix)
    _check_place(place, ("_type", "payloadType"))
    if bom_file is not None:
        _check_place(Path(bom_file), ("bomFormat",))
    key = read_private_key(private_key, password) if private_key is not None else None
    made = verify_files(root, allow_nonfinite=allow_nonfinite, reporter=reporter).output
    made.refuse_failed()
    proof, log, files = made.manifest, made.run_log(), made.digests()
    content = _statement(proof, log, files, builder_id, invocation_id)
    if key is not None:
        content = _envelope(content, key)
    with disk_errors(place):
        write_whole(place.absolute(), content)
    if bom_file is not None:
        materials = bom.build(named.name, proof, files, _time(log.finished))
        with disk_errors(Path(bom_file)):
            write_whole(Path(bom_file).absolute(), materials.encode())
    other = named.with_name(f"{named.name}.intoto.json{'l' if key is None else ''}")
    if output is None and other.exists():
        told = f"{other} is an older attestation, and is not signed: remove it"
        if key is None:
            told = f"{other} is an older attestation, and is signed: to replace it, pass `--private-key KEY`"
        (reporter or default_reporter()).note(told)
    unpinned = tuple(item.name for item in proof.inputs if not _is_pinned(item))
    written = Path(bom_file) if bom_file is not None else None
    return Attested(place, written, len(files), unpinned, os.fspath(folder))


def _statement(
    proof: Manifest,
    log: RunLog,
    files: Mapping[str, str],
    builder_id: str,
    invocation_id: str | None,
) -> bytes:
    """Return the statement as JSON. files: the output's, and their sha256."""
    from google.protobuf.json_format import MessageToDict
    from in_toto_attestation.v1.statement import Statement

    subjects = [_descriptor(name, sha256=sha256) for name, sha256 in sorted(files.items())]
    predicate = MessageToDict(_provenance(proof, log, builder_id, invocation_id))
    statement = Statement(subjects, PREDICATE_TYPE, predicate)
    statement.validate()
    # Sorted, because the order of a protobuf map is undefined.
    return (json.dumps(MessageToDict(statement.pb), indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _provenance(proof: Manifest, log: RunLog, builder_id: str, invocation_id: str | None) -> Any:
    from in_toto_attestation.predicates.provenance.v1 import provenance_pb2

    environment, recipe = proof.environment, proof.recipe
    made = provenance_pb2.Provenance()
    definition, details = made.build_definition, made.run_details
    definition.build_type = BUILD_TYPE
    text, shortened = _without_host_paths(recipe.text)
    definition.external_parameters.update(
        {
            "recipe": {"text": text, "sha256": recipe.sha256, "pathsShortened": shortened},
            "coefficients": dict(proof.overrides),
        }
    )
    definition.internal_parameters.update(
        {
            "planDigest": proof.plan_digest,
            "manifestDigest": proof.digest,
            "device": environment.device,
            "platform": environment.platform,
        }
    )
    entries = parse_recipe(recipe.text, "the manifest's recipe", Path("/")).entries
    definition.resolved_dependencies.extend(
        descriptor for item in proof.inputs for descriptor in _dependencies(item, entries[item.name].onto is not None)
    )
    details.builder.id = builder_id
    details.builder.version.update(
        {proof.tool.name: proof.tool.version}
        | {name: getattr(environment, name) for name in ("python", "torch", "safetensors")}
    )
    details.metadata.invocation_id = invocation_id or ""
    finished = _time(log.finished)
    details.metadata.started_on.FromDatetime((finished - timedelta(seconds=log.seconds)).replace(microsecond=0))
    details.metadata.finished_on.FromDatetime(finished)
    return made


def _dependencies(item: Input, is_put_onto: bool) -> Iterator[Any]:
    """Yield an input's commit, where it has one, and its weight files. A local input appears under its name in the
    recipe, not its path. A stack has neither: what it is made of are inputs too.

    is_put_onto: whether its files are those of the model beneath, with what its own place holds put onto them.
    """
    if item.stack:
        return
    place = on_hub(item.uri)
    at = place.at(item.revision) if place is not None and item.revision else None
    if at is not None:
        page = f"https://huggingface.co/{at.repository}/tree/{at.revision}"
        yield _descriptor(item.name, uri=str(at), download_location=page, gitCommit=at.revision)
    for file in item.files:
        yield _descriptor(
            f"{item.name}/{file.name}",
            uri=f"{at}/{file.name}" if at and not is_put_onto else "",
            annotations={"size": str(file.size), "headerSha256": file.header_sha256},
            sha256=file.sha256 or file.stated_sha256,
        )


def _descriptor(
    name: str, *, uri: str = "", download_location: str = "", annotations: dict[str, Any] | None = None, **digest: Any
) -> Any:
    from in_toto_attestation.v1.resource_descriptor import ResourceDescriptor

    known = {algorithm: value for algorithm, value in digest.items() if value}
    descriptor = ResourceDescriptor(name, uri, known, download_location=download_location, annotations=annotations)
    descriptor.validate()
    return descriptor.pb


def _is_pinned(item: Input) -> bool:
    return bool(item.revision or item.stack) or all(file.sha256 or file.stated_sha256 for file in item.files)


def _without_host_paths(text: str) -> tuple[str, bool]:
    """Return a recipe's text with the last parts of absolute paths alone, and whether it had any: a machine's folders
    are private. The manifest keeps the original text, and its digest."""
    recipe = parse_recipe(text, "the manifest's recipe", Path("/"))
    found = sorted({value for value in _strings(recipe.document.data) if value.startswith(("/", "~"))}, key=len)
    for value in reversed(found):
        if value not in text:  # written with escapes, which hide what else to look for
            return "", True
        text = text.replace(value, PurePosixPath(value).name)
    return text, bool(found)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, str):
        yield value


def _envelope(content: bytes, key: Any) -> bytes:
    """Return a DSSE envelope (https://github.com/secure-systems-lab/dsse, v1), on one line as in an in-toto bundle."""
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import CryptoSigner

    envelope = Envelope(content, PAYLOAD_TYPE, {})
    envelope.sign(CryptoSigner(key))
    return (json.dumps(envelope.to_dict()) + "\n").encode()


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


def _check_place(place: Path, keys: tuple[str, ...]) -> None:
    """Check that a document is outside the output, in an existing folder, and replaces only one of its own kind.
    Raises UsageError."""
    if any((folder / MANIFEST_FILE).exists() for folder in place.resolve().parents):
        raise UsageError(f"{place} is inside an output, and would make it invalid", fix="choose another file")
    if not place.absolute().parent.is_dir():
        raise UsageError(f"{place.absolute().parent} is not a folder", fix="create it first, or choose another file")
    if os.path.lexists(place):
        try:
            document = json.loads(place.read_bytes() if place.is_file() else b"")
        except (ValueError, OSError, RecursionError):
            document = None
        if not isinstance(document, dict) or not document.keys() & set(keys):
            raise UsageError(f"{place} already exists and is a different kind of file", fix="choose another file")


def _check_libraries(with_bom: bool, signed: bool) -> None:
    """Raise UsageError if a package is missing."""
    try:
        import in_toto_attestation  # noqa: F401

        if with_bom:
            bom.check_library()
        if signed:
            import securesystemslib  # noqa: F401
    except ImportError as error:
        extras = "attest,sign" if signed else "attest"
        raise UsageError(
            f"attestations need a missing package: {error.name}",
            fix=f"pip install 'skillmerge[{extras}]'",
        ) from error
