"""How far tasks are: what each notes of its shards every few seconds, for those who wait. Nothing depends on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from skillmerge.outputs.shard_file import ShardFile, StreamFile

TASK_FILE = "task.json"
EVERY = 5.0
"""Seconds between two notes."""
TORN = (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError)
"""What reading a damaged JSON file raises."""


@dataclass(frozen=True, slots=True)
class Making:
    """A shard that a task is making: in which attempt, on which host, since when, and how many bytes so far."""

    shard: str
    attempt: str
    host: str
    since: float
    written: int


def being_made(attempts: Path) -> dict[str, Making]:
    """Return the shards that tasks are making or were making when they died, each by the latest task. attempts: the
    folder with a folder for each run of a task."""
    found: dict[str, Making] = {}
    with suppress(OSError):
        for path in attempts.iterdir():
            with suppress(*TORN):
                row = json.loads((path / TASK_FILE).read_bytes())
                for shard, since in row["shards"].items():
                    if shard not in found or found[shard].since < since:
                        written = int(row.get("written", {}).get(shard, 0))
                        found[shard] = Making(shard, path.name, str(row["host"]), float(since), written)
    return found


class CountedShard(ShardFile):
    """A shard's file that says how much is written to it."""

    moved: Callable[[int], None]

    def write(self, data: memoryview, offset: int) -> None:
        super().write(data, offset)
        self.moved(len(data))


class CountedStream(StreamFile):
    """A shard's stream that says how much is written to it."""

    moved: Callable[[int], None]

    def append(self, data: memoryview) -> None:
        super().append(data)
        self.moved(len(data))
