"""A model loaded with transformers, in a process of its own: what `load_probe` reports of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from skillmerge.errors import CheckFailed, ResourceError, UsageError, is_machine

_LOAD_TIMEOUT = 3600
_MACHINE = "see what `skillmerge doctor` says; a temporary folder is named by TMPDIR"


# Not `-m`: that would import modules from the folder that somebody happens to stand in.
_LOADER = (
    "import sys; sys.path[:] = [path for path in sys.path if path]; from skillmerge.study.load_probe import run; run()"
)


def check_load(root: Path) -> dict[str, Any]:
    """Load the model with transformers, offline, in a separate process. Raises as `load` does, and CheckFailed."""
    report = load(root)
    if not report["ok"]:
        raise CheckFailed(f"{root}: transformers could not load it cleanly: {report['why']}")
    return report


def load(root: Path, text: Path | None = None) -> dict[str, Any]:
    """What `loading` reports of a model, and of the perplexity that `text` has. Raises CheckFailed where it cannot
    report at all, ResourceError where the machine is at fault, UsageError where transformers is not installed."""
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    try:
        process = subprocess.run(
            [sys.executable, "-c", _LOADER, os.path.abspath(root), *([os.path.abspath(text)] if text else [])],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="backslashreplace",
            env={**os.environ, **offline},
            timeout=_LOAD_TIMEOUT,
            check=False,
        )
        report = json.loads(process.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        raise CheckFailed(f"{root}: transformers had not loaded it after {_LOAD_TIMEOUT} seconds") from None
    except (ValueError, IndexError):
        detail = "\n".join(process.stderr.strip().splitlines()[-5:])
        if process.returncode == -signal.SIGKILL or is_machine(process.stderr):
            why = "the loading process was killed: out of memory?" if process.returncode < 0 else detail
            raise ResourceError(f"{root} could not be loaded on this machine: {why}", fix=_MACHINE) from None
        how = f"was killed by signal {-process.returncode}" if process.returncode < 0 else "ended without a word"
        raise CheckFailed(f"{root}: transformers could not load it, the loading process {how}\n{detail}") from None
    except OSError as error:
        raise ResourceError(f"no process could be started to load {root}: {error}", fix=_MACHINE) from error
    if report.get("machine"):
        raise ResourceError(f"{root} could not be loaded on this machine: {report['why']}", fix=_MACHINE)
    if report.get("absent"):
        raise UsageError("this needs transformers", fix="pip install 'skillmerge[transformers]'")
    return dict(report)
