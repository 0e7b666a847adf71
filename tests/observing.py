"""What can be seen of a merge from outside, without skillmerge's own code: its output, what it left, how it ended.

`content` and `visible` are what a reader of the output sees, `finished_shards` what a dead run has kept, and
`MergeServer` starts runs that are killed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

SHARDS = 8
"""Of the wide family."""

Content: TypeAlias = dict[str, str]
"""What a folder holds: names of files and digests of all in them that may not differ between two runs."""


class MergeServer:
    """The process of `merge_server.py`, which runs merges in forks and kills them as it is told."""

    def __init__(self, **environment: str) -> None:
        command = [sys.executable, str(Path(__file__).with_name("merge_server.py"))]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
        )

    def run_all(self, *requests: dict[str, Any]) -> list[dict[str, Any]]:
        """Merges that run at the same time; how each of them ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(requests, default=str) + "\n")
        self.process.stdin.flush()
        return list(json.loads(self.process.stdout.readline()))

    def run(self, recipe: Path | None, **request: Any) -> dict[str, Any]:
        return self.run_all({**({} if recipe is None else {"recipe": recipe}), **request})[0]

    def close(self) -> None:
        with self.process:
            assert self.process.stdin is not None
            self.process.stdin.close()


def wide_shapes(tensors: int, elements: int = 256 * 256) -> dict[str, tuple[int, ...]]:
    return {f"model.layers.{number}.mlp.up_proj.weight": (elements // 256, 256) for number in range(tensors)}


def content(folder: Path | int) -> Content:
    """The content of an output, but for what is said to depend on the time: run log, environment, digest."""
    here = folder if isinstance(folder, int) else os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    found = {}
    try:
        for name in sorted(os.listdir(here)):
            with open(os.open(name, os.O_RDONLY, dir_fd=here), "rb") as stream:
                data = stream.read()
            if name == "skillmerge.manifest.json":
                document = json.loads(data)
                del document["environment"], document["digest"]
                data = json.dumps(document).encode()
            found[name] = "" if name == "skillmerge.run.json" else hashlib.sha256(data).hexdigest()
    finally:
        if not isinstance(folder, int):
            os.close(here)
    return found


def visible(output: Path) -> Content | None:
    """What a reader who comes along sees under the output's name, all of it of one instant."""
    while True:
        try:
            here = os.open(output, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            return None
        try:
            found = content(here)
        except FileNotFoundError:
            found = {"a file that vanished while it was read": ""}
        try:
            if os.path.samestat(os.fstat(here), output.stat()):
                return found
        except FileNotFoundError:
            pass  # replaced meanwhile: what was read was the old one, on its way out
        finally:
            os.close(here)


class Reader(threading.Thread):
    """Looks at the output all the time and keeps whatever should not have been there to see."""

    def __init__(self, output: Path, allowed: list[Content | None]) -> None:
        super().__init__()
        self.output, self.allowed = output, allowed
        self.looks = 0
        self.wrong: list[Content | None] = []
        self._stop_now = threading.Event()

    def run(self) -> None:
        while not self._stop_now.wait(0.002):
            self.looks += 1
            if (seen := visible(self.output)) not in self.allowed:
                self.wrong.append(seen)

    def __enter__(self) -> Reader:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop_now.set()
        self.join()


def staging_of(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def journaled(output: Path) -> list[str]:
    """The shards that the journal of a dead run calls finished; read without skillmerge's own code."""
    try:
        lines = (staging_of(output) / "journal.jsonl").read_text().split("\n")[:-1]
    except FileNotFoundError:
        return []
    return [entry["shard"] for entry in map(json.loads, lines) if "shard" in entry]


def identities(folder: Path) -> dict[str, tuple[int, int]]:
    """What tells a file from one that was written again."""
    if not folder.is_dir():
        return {}
    status = {path.name: path.stat() for path in folder.iterdir()}
    return {name: (item.st_ino, item.st_mtime_ns) for name, item in status.items()}


def finished_shards(output: Path) -> dict[str, tuple[int, int]]:
    """The journaled shards of a dead run, wherever its crash left them."""
    found: dict[str, tuple[int, int]] = {}
    names = journaled(output)
    for folder in (output, staging_of(output) / "complete", staging_of(output) / "files"):
        here = identities(folder)
        if names and names[0] in here:
            found = {name: here[name] for name in names}
    return found


def reference(server: MergeServer, recipe: Path, **request: Any) -> Content:
    """The content of the recipe's output when nothing happens; the output is removed again."""
    output = recipe.parent / "undisturbed"
    answer = server.run(recipe, output=output, **request)
    assert answer["status"] == 0, answer
    result = content(output)
    discard(output)
    return result


def put_previous(output: Path) -> Content:
    """An output of earlier days."""
    output.mkdir()
    (output / "model.safetensors").write_bytes(b"weights of before" * 1000)
    (output / "config.json").write_text("{}")
    return content(output)


def discard(output: Path) -> None:
    """Remove an output at once, so that no reader sees it half gone."""
    gone = output.with_name("gone")
    output.rename(gone)
    shutil.rmtree(gone)


def assert_finished(output: Path, wanted: Content) -> None:
    assert content(output) == wanted
    assert not staging_of(output).exists()


def fill(disk: Path) -> None:
    """A file that takes all the room there is."""
    with open(disk / "filler", "ab", buffering=0) as stream, suppress(OSError):
        while stream.write(bytes(1 << 16)):
            pass
    assert shutil.disk_usage(disk).free == 0


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.005)
