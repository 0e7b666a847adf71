"""Where finished shards go: the promise that staging folders, comparisons and uploads keep."""

from __future__ import annotations

import threading
from typing import Any, Protocol

from skillmerge.plans.plan import ShardPlan


class SpanFile(Protocol):
    """One shard's file: spans come from any thread, in any order."""

    def write(self, data: memoryview, offset: int) -> None: ...
    def finish(self) -> None: ...
    def close(self) -> None: ...


class StreamFile(Protocol):
    """One shard's file whose size is not known before: it grows by `append`; `put` fills what was left out."""

    def append(self, data: memoryview) -> None: ...
    def put(self, data: bytes, offset: int) -> None: ...
    def finish(self, stop: threading.Event) -> tuple[int, str]: ...
    def close(self) -> None: ...


class Destination(Protocol):
    """Where shards go. finished: the journal's entries of those that are done, by file."""

    finished: dict[str, dict[str, Any]]

    def open_shard(self, shard: ShardPlan) -> SpanFile: ...
    def record(self, entry: dict[str, Any]) -> None: ...


class StreamDestination(Protocol):
    """Where the files of a skill go, whose sizes are known only when they are finished."""

    finished: dict[str, dict[str, Any]]

    def open_stream(self, shard: ShardPlan, start: int) -> StreamFile: ...
    def record(self, entry: dict[str, Any]) -> None: ...
