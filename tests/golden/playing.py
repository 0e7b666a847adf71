"""Play a scenario: make its models and files in a fresh folder, run its commands, and keep all that they leave behind.

The result of a step is what a user can see of it: exit status, stdout, stderr, and every file that is new, changed or
gone since the step before. Weights are kept as digests, text as normalised text.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from families import MTIME_NS, write_families
from normal import normalised

HERE = Path(__file__).parent
ARTEFACTS = HERE / "artefacts.tar.gz"
TEXT = {".json", ".jsonl", ".html", ".md", ".xml", ".yaml", ".sarif", ".lock"}

Runner = Callable[[tuple[str, ...], Path, Mapping[str, str]], dict[str, Any]]
"""Runs a command line in a folder, with this environment: status, stdout and stderr."""


@dataclass(frozen=True)
class Step:
    """One command. before: edits of files, each of them (what, path, text), as `edit` knows them. digits: see
    `normal.normalised`; of weights out of a matrix library only names, shapes and rough norms are kept then."""

    argv: tuple[str, ...]
    columns: int = 120
    digits: int | None = None
    before: tuple[tuple[str, str, str], ...] = ()

    @property
    def name(self) -> str:
        return shlex.join(self.argv) + (f" [{self.columns} columns]" if self.columns != 120 else "")


@dataclass(frozen=True)
class Scenario:
    """models: folder -> "family/role". files: path -> text. artefact: the folder of the archive to begin with."""

    steps: tuple[Step, ...]
    models: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    artefact: str = ""


def command(line: str, **options: Any) -> Step:
    """A step from a command line as it is typed, without the program's name."""
    return Step(tuple(shlex.split(line)), **options)


def play(scenario: Scenario, run: Runner) -> list[dict[str, Any]]:
    """Run all steps of a scenario in a new folder; what became of each."""
    # In /tmp whatever TMPDIR says: the path must have the same length everywhere, because output is wrapped.
    with tempfile.TemporaryDirectory(prefix="golden-", dir="/tmp") as name:
        work = Path(name).resolve()
        prepare(scenario, work)
        results, known = [], snapshot(work)
        for step in scenario.steps:
            for change in step.before:
                edit(work, *change)
            known = snapshot(work) if step.before else known
            environment = {"COLUMNS": str(step.columns), "NO_COLOR": "1"}
            answer = run(step.argv, work, environment)
            after = snapshot(work)
            files = {
                path: described(work, path, step.digits) for path in sorted(after) if after[path] != known.get(path)
            }
            files |= {path: "removed" for path in sorted(known) if path not in after}
            texts = {key: normalised(answer[key], work, step.digits) for key in ("stdout", "stderr")}
            results.append({"step": step.name, "status": answer["status"], **texts, "files": files})
            known = settle(work, {path for path in after if after[path] != known.get(path)})
    return results


def settle(work: Path, names: set[str]) -> dict[str, tuple[int, int, int]]:
    """Give new files the time of all inputs, because manifests and plans hold the times of what they read."""
    for name in names:
        os.utime(work / name, ns=(MTIME_NS, MTIME_NS))
    return snapshot(work)


def prepare(scenario: Scenario, work: Path) -> None:
    """Put the scenario's models, files and artefact into the folder."""
    write_families(work, scenario.models)
    for name, text in scenario.files.items():
        path = work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        os.utime(path, ns=(MTIME_NS, MTIME_NS))
    if scenario.artefact:
        unpack(scenario.artefact, work)


def unpack(artefact: str, work: Path) -> None:
    """Put one folder of the archive into the work folder; saved plans hold the path of their recipe."""
    with tarfile.open(ARTEFACTS) as archive:
        for member in archive.getmembers():
            folder, _, name = member.name.partition("/")
            if folder != artefact or not member.isfile():
                continue
            source = archive.extractfile(member)
            assert source is not None
            path = work / name
            path.parent.mkdir(parents=True, exist_ok=True)
            data = source.read()
            path.write_bytes(data.replace(b"<work>", str(work).encode()) if path.name == "plan.json" else data)
            os.utime(path, ns=(MTIME_NS, MTIME_NS))


def edit(work: Path, what: str, name: str, text: str) -> None:
    """Change a file between two steps: write (text), replace (old=>new), flip (a byte of its middle), cut (its second
    half), touch (its time), remove (it, or its folder)."""
    path = work / name
    if what == "write":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    elif what == "replace":
        old, new = text.split("=>")
        content = path.read_text(encoding="utf-8")
        assert old in content, (name, old)
        path.write_text(content.replace(old, new), encoding="utf-8")
    elif what == "touch":
        os.utime(path, ns=(MTIME_NS + 1, MTIME_NS + 1))
    elif what == "remove":
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data if what == "flip" else data[: len(data) // 2])


def snapshot(work: Path) -> dict[str, tuple[int, int, int]]:
    """What tells each file from one that was written again. Links are followed."""
    found = {}
    for path in work.rglob("*"):
        if path.is_file():
            status = path.stat()
            found[path.relative_to(work).as_posix()] = (status.st_ino, status.st_mtime_ns, status.st_size)
    return found


def described(work: Path, name: str, digits: int | None) -> str:
    """A file for the recording: normalised text, or a digest."""
    data = (work / name).read_bytes()
    if digits is not None and name.endswith("adapter_model.safetensors"):
        return rough(data)
    if Path(name).suffix in TEXT:
        return normalised(data.decode(), work, digits)
    return "sha256:" + hashlib.sha256(data).hexdigest()


def rough(data: bytes) -> str:
    """Names, shapes and norms of float32 tensors: all of an SVD that does not depend on who computed it."""
    import numpy as np

    start = 8 + int.from_bytes(data[:8], "little")
    rows = []
    for name, entry in sorted(json.loads(data[8:start]).items()):
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            norm = float(np.linalg.norm(np.frombuffer(data[start + first : start + last], "<f4").astype(np.float64)))
            rows.append(f"{name} {entry['dtype']} {entry['shape']} norm {norm:.4g}")
    return "\n".join(rows)


def by_command(words: list[str]) -> Runner:
    """A runner that starts the command anew for each step, as a user does."""

    def run(argv: tuple[str, ...], cwd: Path, environment: Mapping[str, str]) -> dict[str, Any]:
        done = subprocess.run(
            [*words, *argv],
            cwd=cwd,
            env={**clean_environment(), **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
        texts = {key: getattr(done, key).decode(errors="backslashreplace") for key in ("stdout", "stderr")}
        return {"status": done.returncode, **texts}

    return run


class Server:
    """The process of `server.py`, which runs the current code; a runner. One command at a time."""

    def __init__(self) -> None:
        script = str(HERE / "server.py")
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen([sys.executable, script], env=clean_environment(), **pipes)

    def __call__(self, argv: tuple[str, ...], cwd: Path, environment: Mapping[str, str]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"argv": argv, "cwd": str(cwd), "env": dict(environment)}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return dict(json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.communicate()


def clean_environment() -> dict[str, str]:
    """This process's environment without what would change a command: our own options, the Hub's, a terminal's."""
    dropped = ("SKILLMERGE_", "HF_", "FORCE_COLOR", "TERM", "COLUMNS", "LINES", "PYTHONWARNINGS")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
    return {**kept, "PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1"}
