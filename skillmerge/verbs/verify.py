"""Check a finished output: every byte of it, its signature, and whether transformers loads it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from skillmerge.outputs.sign import Signature, verify_signature
from skillmerge.outputs.verify import Verdict, checked, verify_files
from skillmerge.reporter import Reporter
from skillmerge.study.loading import check_load


def verify(
    folder: str | os.PathLike[str],
    *,
    load: bool = False,
    allow_nonfinite: bool = False,
    reporter: Reporter | None = None,
) -> Verdict:
    """Check every file of an output against its manifest.

    load: also load it with transformers, in a separate process.
    Raises CheckFailed with the first difference, UsageError where there is no folder or transformers is missing.
    """
    verdict = verify_files(folder, allow_nonfinite=allow_nonfinite, reporter=reporter)
    return _loaded(verdict, reporter) if load else verdict


def verify_signed(
    folder: str | os.PathLike[str],
    signature: str | os.PathLike[str] | None = None,
    *,
    public_key: str | os.PathLike[str] | None = None,
    certificate_chain: Sequence[str | os.PathLike[str]] = (),
    load: bool = False,
    allow_nonfinite: bool = False,
    reporter: Reporter | None = None,
) -> Signature:
    """`verify`, and also check who signed the output; the other arguments are those of `verify_signature`."""
    signed = verify_signature(
        folder,
        signature,
        public_key=public_key,
        certificate_chain=certificate_chain,
        allow_nonfinite=allow_nonfinite,
        reporter=reporter,
    )
    return replace(signed, verdict=_loaded(signed.verdict, reporter)) if load else signed


def _loaded(verdict: Verdict, reporter: Reporter | None) -> Verdict:
    with checked(reporter or Reporter(), "loads in transformers"):
        return replace(verdict, load=check_load(verdict.folder))
