"""The verb verify: an output's bytes, signature and loading, and a skill's parent."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from skillmerge.engine.runner import check_words
from skillmerge.errors import UsageError
from skillmerge.outputs.buckets.at_hand import at_hand
from skillmerge.outputs.proof.sign import Signature, verify_signature
from skillmerge.outputs.verify import SIGNATURE_FILE, Verdict, checked, verify_files
from skillmerge.reporter import Reporter, default_reporter
from skillmerge.study.loads.loading import asked_runtimes, check_load, need
from skillmerge.verbs.extract import check_parent

_AnyPath = str | os.PathLike[str]


_TO_CHECK = "to check it, pass `--public-key KEY`, or `--certificate-chain ROOT` if a certificate was used"


def verify(
    folder: _AnyPath,
    *,
    load: bool | str | Sequence[str] = False,
    parent: str | None = None,
    signature: _AnyPath | bool | None = None,
    public_key: _AnyPath | None = None,
    certificate_chain: Sequence[_AnyPath] = (),
    shard: tuple[int, int] | None = None,
    allow_nonfinite: bool = False,
    follow_links: bool = False,
    reporter: Reporter | None = None,
) -> Verdict:
    """Check every file of an output against its manifest.

    load: also load it and its tokenizer with transformers, in a separate process. Names of runtimes (`transformers`,
    `vllm`) select others, which must generate what transformers does. parent: for a skill, a model that it must have
    been extracted from. signature: True for the output's own `model.sig`, or another file. It must be made with the
    key of `public_key`, or with a certificate that leads to `certificate_chain`; either requires a signature.
    shard: (I, N) to read only part I of N of the files, counted from 0, and to check no more of the others than names,
    sizes and headers.
    Raises CheckFailed with the first difference, UsageError if there is no folder or a package is missing,
    ResourceError if it cannot be loaded and the machine is at fault.
    """
    runtimes = asked_runtimes(load)
    if runtimes:
        need(runtimes)
    reporter = reporter or default_reporter("verifying")
    is_signed = bool(signature or public_key is not None or certificate_chain)
    whole = bool(runtimes or is_signed or parent)
    if shard is not None:
        _check_part(*shard, alone=not whole)
    with at_hand(folder, whole=whole, reporter=reporter) as found:
        root = found.folder if found.place else folder
        if is_signed:
            file = None if isinstance(signature, bool) else signature
            how: dict[str, Any] = {"load": runtimes, "allow_nonfinite": allow_nonfinite, "reporter": reporter}
            signed = verify_signed(root, file, public_key=public_key, certificate_chain=certificate_chain, **how)
            verdict = replace(signed.verdict, signature=_signature(signed))
        else:
            verdict = verify_files(
                root, allow_nonfinite=allow_nonfinite, shard=shard, reporter=reporter, contents=found.open
            )
            if shard is None and (verdict.folder / SIGNATURE_FILE).is_file():
                reporter.note(f"{found.place or verdict.folder} has a signature, which was not checked: {_TO_CHECK}")
            verdict = _loaded(verdict, runtimes, reporter)
        if parent is not None:
            verdict = replace(verdict, parent=check_parent(root, parent, follow_links=follow_links))
        return replace(verdict, output=replace(verdict.output, place=found.place))


def _signature(signed: Signature) -> dict[str, Any]:
    return {"path": str(signed.path), "files": signed.files, "signer": signed.signer}


def _check_part(index: int, of: int, *, alone: bool) -> None:
    """Raise UsageError for numbers that are no part, or if more is to be checked than a part."""
    if not alone:
        raise UsageError("`shard` reads a part of the bytes, and checks nothing else", fix="check the rest without")
    check_words(index=index, of=of)
    if index >= of:
        fix = f"use 0/{of} to {of - 1}/{of}"
        raise UsageError(f"there is no part {index} of {of}: parts count from 0", fix=fix)


def verify_signed(
    folder: _AnyPath,
    signature: _AnyPath | None = None,
    *,
    public_key: _AnyPath | None = None,
    certificate_chain: Sequence[_AnyPath] = (),
    load: bool | str | Sequence[str] = False,
    allow_nonfinite: bool = False,
    reporter: Reporter | None = None,
) -> Signature:
    """Check an output as `verify` does, and return who signed it.

    The other arguments are those of `skillmerge.outputs.proof.sign.verify_signature`.
    """
    signed = verify_signature(
        folder,
        signature,
        public_key=public_key,
        certificate_chain=certificate_chain,
        allow_nonfinite=allow_nonfinite,
        reporter=reporter,
    )
    return replace(signed, verdict=_loaded(signed.verdict, asked_runtimes(load), reporter))


def _loaded(verdict: Verdict, runtimes: Sequence[str], reporter: Reporter | None) -> Verdict:
    if not runtimes:
        return verdict
    if verdict.output.manifest.output.kind == "adapter":
        raise UsageError(
            f"{verdict.output.shown} is an adapter, which no runtime loads alone",
            fix="load it with its base: `PeftModel.from_pretrained(BASE, FOLDER)` in peft",
        )
    reporter = reporter or default_reporter("verifying")
    with checked(reporter, f"loads in {' and '.join(runtimes)}"):
        return replace(verdict, load=check_load(verdict.folder, runtimes, reporter))
