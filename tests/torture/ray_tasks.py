"""Tasks that are cruel as a test orders: they raise, stop for good or slow down, on the node where they are.

The orders are beside the output, in cruelty.json: raises (the name of an error) and times, for the task with the first
shard; or stops_at (before write, mid-write, before rename, before record), for the first task that comes there; or
pace, the seconds that each write takes longer on the first node that writes. What happened is there too, a file each:
the node, and the process.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

from skillmerge import errors
from skillmerge.outputs import attempts
from skillmerge.outputs.shard_file import ShardFile
from skillmerge.reporter import Reporter
from skillmerge.verbs.tasks.cluster import this_node
from skillmerge.verbs.tasks.shard import Task

ORDERS = "cruelty.json"


def order(folder: Path, **orders: Any) -> None:
    (folder / ORDERS).write_text(json.dumps(orders))


def happened(folder: Path) -> list[tuple[str, int]]:
    """Node and process of what has happened, in this order."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("happened-*"))]
    return [(node, pid) for node, pid in found]


def note(folder: Path, times: int) -> bool:
    """Whether this is one of the first so many times; it is written down then, in one step."""
    own = folder / f"note-{uuid.uuid4().hex}"
    own.write_text(json.dumps([this_node(), os.getpid()]))
    try:
        for number in range(times):
            with suppress(FileExistsError):
                os.link(own, folder / f"happened-{number}")
                return True
        return False
    finally:
        own.unlink()


class CruelTask(Task):
    def run(self, target: Path, reporter: Reporter) -> tuple[str, tuple[str, ...]]:
        folder = target.parent
        path = folder / ORDERS
        orders = json.loads(path.read_text()) if path.exists() else {}
        kind = orders.get("raises") if any("-00001-" in shard for shard in self.shards) else None
        if kind and note(folder, orders["times"]):
            raise getattr(errors, kind)(f"a {kind} of a task", fix="so it was ordered")
        with patched(folder, orders.get("stops_at", ""), orders.get("pace", 0)):
            return super().run(target, reporter)


def patched(folder: Path, stops_at: str, pace: float) -> Any:
    write, rename, record = ShardFile.write, attempts._rename, attempts.write_whole

    def stop() -> None:
        if note(folder, 1):
            time.sleep(600)

    def writing(self: ShardFile, data: memoryview, offset: int) -> None:
        if stops_at == "before write":
            stop()
        if stops_at == "mid-write":
            self._write(data[: len(data) // 2], offset)
            stop()
        if pace and (note(folder, 1) or this_node() == happened(folder)[0][0]):
            time.sleep(pace)
        write(self, data, offset)

    def renaming(source: Path, target: Path) -> None:
        if stops_at == "before rename":
            stop()
        rename(source, target)

    def recording(path: Path, content: bytes, beside: Path | None = None) -> None:
        if stops_at == "before record" and path.parent.name == "done":
            stop()
        record(path, content, beside)

    return Patches((ShardFile, "write", writing), (attempts, "_rename", renaming), (attempts, "write_whole", recording))


class Patches:
    def __init__(self, *patches: tuple[Any, str, Callable[..., None]]) -> None:
        self._patches = [patch.object(*one) for one in patches]

    def __enter__(self) -> None:
        for one in self._patches:
            one.start()

    def __exit__(self, *error: object) -> None:
        for one in self._patches:
            one.stop()
