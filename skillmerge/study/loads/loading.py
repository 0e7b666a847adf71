"""Whether a finished model loads in the requested runtimes, and what they generate."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from skillmerge.errors import CheckFailed, ResourceError, UsageError, did_you_mean
from skillmerge.reporter import Reporter
from skillmerge.study.loads import vllm_probe
from skillmerge.study.loads.child import run
from skillmerge.study.loads.generation import LIKELY, TOKENS, compare, first_difference

RUNTIMES = {"transformers": "pip install 'skillmerge[transformers]'", "vllm": "pip install vllm"}
"""What can load an output, and how to install it."""
_KEY_SETS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


def asked_runtimes(asked: bool | str | Sequence[str]) -> tuple[str, ...]:
    """Return the runtimes of `load=` in the order of the table. True is transformers. Raises UsageError for others."""
    names = ["transformers"] * asked if isinstance(asked, bool) else [asked] if isinstance(asked, str) else list(asked)
    for name in names:
        if name not in RUNTIMES:
            near = did_you_mean(name, list(RUNTIMES))
            raise UsageError(f"`{name}` is not a runtime", fix=near or f"the runtimes are {', '.join(RUNTIMES)}")
    return tuple(name for name in RUNTIMES if name in names)


def need(runtimes: Sequence[str], what: str = "this") -> None:
    """Raise UsageError for a runtime that is not installed; the others are compared with transformers."""
    for name in dict.fromkeys(["transformers", *runtimes]):
        if find_spec(name) is None:
            raise UsageError(f"{what} needs {name}", fix=RUNTIMES[name])


def check_load(
    root: Path, runtimes: Sequence[str] = ("transformers",), reporter: Reporter | None = None
) -> dict[str, Any]:
    """Load the model and its tokenizer with transformers, offline, in a process of its own; then with the other
    runtimes, each of which has to generate what transformers does.

    Returns what `load_probe` reports, with a key for each other runtime. Raises CheckFailed if the model is at
    fault, ResourceError if the machine or its installation is, UsageError if a runtime is not installed.
    """
    need(runtimes)
    others = [name for name in runtimes if name != "transformers"]
    report = load(root, tokens=TOKENS if others else 0)
    if not report["ok"]:
        raise CheckFailed(f"{root}: transformers could not load it cleanly: {report['why']}")
    if "transformers" in runtimes:
        check_tokenizer(root, report, reporter)
    for name in others:
        report[name] = check_generation(root, report, name)
    report.pop("generated", None)
    return report


def load(root: Path, text: Path | None = None, tokens: int = 0) -> dict[str, Any]:
    """Return the report of `load_probe` on a model, with the perplexity of `text` and `tokens` generated tokens.

    Raises CheckFailed if it cannot report at all, ResourceError if the machine is at fault, UsageError if
    transformers is not installed.
    """
    file = os.path.abspath(text) if text else None
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    report = run("load_probe", "transformers", root, hidden, folder=os.path.abspath(root), text=file, tokens=tokens)
    if report.get("absent"):
        raise UsageError("this needs transformers", fix=RUNTIMES["transformers"])
    return report


def loads_whole(report: Mapping[str, Any]) -> bool:
    """Return whether there is a class for the model and every tensor was loaded."""
    return "class" in report and not any(report.get(key) for key in _KEY_SETS)


def check_tokenizer(root: Path, report: Mapping[str, Any], reporter: Reporter | None = None, label: str = "") -> None:
    """Report the warnings on a tokenizer, each after the label.

    Raises CheckFailed for a tokenizer that is wrong, ResourceError for one that needs a library.
    """
    found = report["tokenizer"]
    if "lacks" in found:
        raise ResourceError(
            f"{root}: its tokenizer needs a library that is not installed: {found['lacks']}",
            fix="install it, then run the same command again",
        )
    if "machine" in found:
        raise ResourceError(f"{root}: this machine could not load its tokenizer: {found['machine']}")
    if "why" in found:
        raise CheckFailed(f"{root}: its tokenizer is broken: {found['why']}")
    if reporter is not None:
        for warning in found.get("warnings", ()):
            reporter.warn(f"{label}{warning['message']}", warning["fix"])


def check_generation(root: Path, report: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return what another runtime makes of a model, beside what transformers `generated`.

    Raises CheckFailed if it refuses the model or generates something else, UsageError for a model that generates
    no text.
    """
    ours = report.get("generated")
    if ours is None:
        raise UsageError(
            f"{root}: {report['class']} generates no text from text, so {name} has nothing to compare",
            fix="verify it with transformers alone",
        )
    theirs = run(
        "vllm_probe", name, root, vllm_probe.ENVIRONMENT, folder=os.path.abspath(root), prompt=ours["prompt"],
        dtype=ours["dtype"], tokens=TOKENS, likely=LIKELY, has_tokenizer="tokens" in report["tokenizer"],
    )  # fmt: skip
    if not theirs["ok"]:
        raise CheckFailed(f"{root}: {name} cannot load it: {theirs['why']}")
    found = {"version": theirs["version"], "dtype": ours["dtype"], "prompt": ours["prompt"], "tokens": theirs["tokens"]}
    found |= compare(ours, theirs)
    if "difference" in found:
        where = first_difference(found, name)
        if not found["difference"]["tie"]:
            raise CheckFailed(f"{root}: {name} generates different tokens than transformers: {where}")
        found["notes"] = [
            f"{name} and transformers differ where two tokens are equally likely within rounding: {where}"
        ]
    return found
