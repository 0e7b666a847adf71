"""A fault of the machine is never a fault of the model, and never costs the output."""

from __future__ import annotations

import errno
import json
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest
from conftest import run_cli, write_family

import skillmerge
from skillmerge.durable import scratch_file, scratch_folder
from skillmerge.errors import CheckFailed, ResourceError, is_machine
from skillmerge.study.loads import child, loading
from skillmerge.study.loads.load_probe import main
from skillmerge.study.scoring.scorers import Scorer, run_command

NOWHERE = FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp', '/var/tmp']")


def answer(monkeypatch: pytest.MonkeyPatch, report: dict[str, Any] | None, status: int = 0, stderr: str = "") -> None:
    """Let the loading process have ended so."""

    def start(probe: str, keys: Any, environment: Any, files: Any) -> None:
        files[0].write(json.dumps(report).encode() if report is not None else b"")
        files[1].write(stderr.encode())

    monkeypatch.setattr(child, "_start", start)
    monkeypatch.setattr(child, "_finish", lambda process: status)


@pytest.mark.parametrize(
    ("report", "status", "stderr", "said"),
    [
        (
            {"ok": False, "machine": "OSError: no room"},
            0,
            "",
            "this machine could not load it with transformers: OSErr",
        ),
        (None, -signal.SIGKILL, "", "the loading process was killed by signal 9"),
        (None, -signal.SIGHUP, "", "the loading process was killed by signal 1"),
        (None, -signal.SIGABRT, "terminate called after throwing an instance\n  what():  std::bad_alloc", "bad_alloc"),
        (None, -signal.SIGABRT, "memory allocation of 8589934592 bytes failed", "memory allocation of 8589934592"),
        (None, 1, "Fatal Python error: _PyRuntimeState_Init: memory allocation failed\n\nno thread", "_PyRuntimeState"),
        (None, 1, "ImportError: x.so: failed to map segment\n  from a shared object\n", "failed to map segment"),
        (None, 1, str(NOWHERE), "No usable temporary directory found"),
        (None, 1, "RuntimeError: unable to mmap 80 bytes: No such device (19)", "No such device"),
        (None, 1, "KeyError: 'getpwuid(): uid not found: 1234'", "uid not found"),
    ],
)
def test_load_that_the_machine_has_stopped_is_status_5(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report: dict[str, Any] | None, status: int, stderr: str, said: str
) -> None:
    answer(monkeypatch, report, status, stderr)
    with pytest.raises(ResourceError) as caught:
        loading.load(tmp_path)
    assert said in caught.value.message
    assert "the model may be valid" in str(caught.value.fix)


@pytest.mark.parametrize(
    ("status", "stderr"),
    [
        (-signal.SIGSEGV, ""),
        (-signal.SIGABRT, "out of memory: a token of the model\nterminate called\n  what():  index out of range"),
        (1, "no space left on device.safetensors: odd name\nValueError: broken header\n\nsome more"),
        (1, "the chat template says: out of memory\nended"),
    ],
)
def test_load_that_crashes_is_still_the_models_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, stderr: str
) -> None:
    """What stands in its messages before the last words is the model's own."""
    answer(monkeypatch, None, status, stderr)
    how = "ended without a message" if status > 0 else f"was killed by signal {-status}"
    with pytest.raises(CheckFailed) as caught:
        loading.load(tmp_path)
    assert caught.value.message == f"{tmp_path}: transformers could not load it, the loading process {how}\n{stderr}"


def test_process_that_cannot_be_started_is_status_5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*given: object, **named: object) -> None:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(child.subprocess, "Popen", run)
    with pytest.raises(ResourceError, match="this machine could not load it with transformers: BlockingIOError"):
        loading.load(tmp_path)


def test_load_probe_tells_a_machine_from_a_model(
    tmp_path: Path, transformers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "machine" not in main(str(tmp_path))

    def nowhere(*given: object, **named: object) -> None:
        raise NOWHERE

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", nowhere)
    assert "No usable temporary directory" in main(str(tmp_path))["machine"]


def test_gate_that_the_machine_has_stopped_keeps_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_family(tmp_path)
    recipe.write_text(json.dumps({**json.loads(recipe.read_text()), "gates": {"loads": True}}))
    answer(monkeypatch, {"ok": False, "machine": str(NOWHERE)})
    done = run_cli("apply", recipe)
    assert done.returncode == 5
    files = tmp_path / "merged.partial" / "files"
    before = {path.name: path.stat().st_mtime_ns for path in files.glob("*.safetensors")}
    assert len(before) == 2
    answer(monkeypatch, {"ok": True, "why": "", "class": "Odd", "finite": True, "tokenizer": {"notes": []}})
    skillmerge.apply(recipe)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "merged").glob("*.safetensors")} == before


def no_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> str:
        raise NOWHERE

    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_get_default_tempdir", nowhere)


def test_command_is_scored_without_a_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_temporary_folder(monkeypatch)
    scores = run_command(Scorer("it", command="echo wrong; echo 0.5 #"), tmp_path, 0)
    assert scores["score"].value == 0.5
    with pytest.raises(CheckFailed, match=r"exit status 3: .*\nno\nfix it"):
        run_command(Scorer("it", command="echo no >&2; exit 3 #"), tmp_path, 0)


def test_temporary_folder_that_cannot_be_is_status_5(monkeypatch: pytest.MonkeyPatch) -> None:
    no_temporary_folder(monkeypatch)
    with pytest.raises(ResourceError, match="no temporary file can be made: No usable temporary directory"):
        scratch_folder().__enter__()
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(ResourceError, match="set TMPDIR to a folder that can be written to"):
        scratch_file()


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (OSError(errno.EIO, "Input/output error"), True),
        (NOWHERE, True),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), False),
        (OSError("/x does not appear to have a file named config.json"), False),
        (MemoryError(), True),
        (RuntimeError("unable to mmap 80 bytes from file </x>: Cannot allocate memory (12)"), True),
        (ValueError("Unrecognized model in /x"), False),
    ],
    ids=str,
)
def test_is_machine(error: Exception, is_one: bool) -> None:
    assert is_machine(error) is is_one
