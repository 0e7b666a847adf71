"""A separate process for each load of a model, so that a broken model or library cannot crash skillmerge.

Both ends are here: `run` starts a probe in a new process, `answer` runs there. A probe is a function
`main(**keys)` of a module of this folder that returns plain data. Knows nothing about what probes do.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from skillmerge.durable import scratch_file, scratch_folder
from skillmerge.errors import CheckFailed, ResourceError, is_machine

TIMEOUT = 3600.0
"""Seconds."""

# Not `-m`, which would import modules from the current folder.
_PROGRAM = (
    "import sys; sys.path[:] = [path for path in sys.path if path]; from skillmerge.study.loads.child import answer; "
    "answer()"
)
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DO_NOT_TRACK": "1"}
_SHOWN = 5
_LACKING = "free memory or disk, or install what is missing, then rerun; the model may be valid"
_SLOW = "rerun on an idle or faster machine; the model may be valid"

_MACHINE = re.compile(
    r"MemoryError|bad_alloc|memory allocation (of \d+ bytes )?failed|out of memory"
    r"|not enough memory|can(no|')t allocate memory|failed to map segment"
    r"|can't start new thread|resource temporarily unavailable|too many open files|no usable temporary directory"
    r"|no space left on device|disk quota exceeded|read-only file system|No available memory for the cache blocks"
    r"|less than desired (GPU|CPU) memory utilization|larger than the available KV cache memory"
    r"|no CUDA (GPUs are available|-capable device)|CUDA driver version is insufficient|Failed to infer device type",
    re.IGNORECASE,
)
"""Messages of Python, torch, CUDA and vLLM about faults of the machine, not the model."""
_LAST_WORDS = re.compile(
    r"^(?:\w+(?:\.\w+)*(?:Error|Exception)\b|  what\(\): |Fatal Python error: |memory allocation of ).*", re.MULTILINE
)
"""How Python, C++ and Rust begin the line that says why they exit."""
_CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE, signal.SIGTRAP}
"""Signals of a crash inside a library, which a broken model can cause. Other signals are the kernel's for memory, a
scheduler's, a disk's, or a processor's that lacks an instruction.
"""


def run(probe: str, name: str, what: Path, environment: Mapping[str, str], **keys: Any) -> dict[str, Any]:
    """Run a probe offline on the model `what`, in a process that ends with this call, and return its answer.

    name: of the runtime, in messages. Raises CheckFailed if there is no answer and the model may be why,
    ResourceError where the machine is, or is as likely: a load that takes too long.
    """
    try:
        with scratch_file() as out, scratch_file() as err, scratch_folder() as caches:
            homes = {"XDG_CACHE_HOME": str(caches), "XDG_CONFIG_HOME": str(caches)}
            status = _finish(_start(probe, keys, {**environment, **homes}, (out, err)))
            lines, complained = _text(out).splitlines(), _text(err).strip()
    except subprocess.TimeoutExpired:
        raise _fault(what, name, f"it took longer than {TIMEOUT:g} seconds", fix=_SLOW) from None
    except OSError as error:
        raise _fault(what, name, f"{type(error).__name__}: {error}") from error
    try:
        found = json.loads(lines[-1])
    except (ValueError, IndexError):
        detail = "\n".join(complained.splitlines()[-_SHOWN:])
        how = f"was killed by signal {-status}" if status < 0 else "ended without a message"
        said = _last_words(complained)
        if (status < 0 and -status not in _CRASHES) or is_machine(said) or _MACHINE.search(said):
            raise _fault(what, name, f"the loading process {how}", detail) from None
        raise CheckFailed(f"{what}: {name} could not load it, the loading process {how}\n{detail}") from None
    if "machine" in found:
        raise _fault(what, name, found["machine"])
    return dict(found)


def told(error: BaseException) -> dict[str, Any]:
    """Return an error of a library as an answer: `machine` if the machine is at fault, else `why`."""
    words = f"{type(error).__name__}: {error}"
    of_machine = isinstance(error, ImportError) or is_machine(error) or _MACHINE.search(words)
    return {"ok": False, "machine" if of_machine else "why": words}


def answer() -> None:
    """Run a probe in this process: the arguments are its name and its keys as JSON, the answer is one line."""
    line = os.fdopen(os.dup(1), "w")  # what libraries print goes to stderr
    os.dup2(2, 1)
    try:
        probe = import_module(f"skillmerge.study.loads.{sys.argv[1]}")
        found = probe.main(**json.loads(sys.argv[2]))
    except BaseException as error:  # a Rust panic is not an Exception
        found = told(error)
    print(json.dumps(found), file=line, flush=True)


def _last_words(complained: str) -> str:
    """Return the line in which a process says why it ends: earlier lines may be the model's own text."""
    lines = _LAST_WORDS.findall(complained) or complained.splitlines()
    return str(lines[-1]) if lines else ""


def _fault(what: Path, name: str, why: str, detail: str = "", fix: str = _LACKING) -> ResourceError:
    more = f"\n{detail}" if detail else ""
    return ResourceError(f"{what}: this machine could not load it with {name}: {why}{more}", fix=fix)


def _start(
    probe: str, keys: Mapping[str, Any], environment: Mapping[str, str], files: tuple[IO[bytes], IO[bytes]]
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, probe, json.dumps(keys)],
        stdin=subprocess.DEVNULL, stdout=files[0], stderr=files[1], start_new_session=True,
        env={**os.environ, **_OFFLINE, **environment},
    )  # fmt: skip


def _finish(process: subprocess.Popen[bytes]) -> int:
    try:
        return process.wait(TIMEOUT)
    finally:  # with all processes that it has started
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _text(stream: IO[bytes]) -> str:
    stream.seek(0)
    return stream.read().decode(errors="replace")
