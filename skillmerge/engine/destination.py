"""The interface of destinations for finished shards: staging folders, comparisons and uploads."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from skillmerge.engine.measures.skill_statistics import SkillInput
from skillmerge.engine.rounding_statistics import TensorStatistics
from skillmerge.methods.method import Scalars
from skillmerge.plans.plan import ShardPlan


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """The record of a finished shard. statistics: of rounding, by tensor; tensors: of a skill's file, the
    rows of `skill.json`; inputs: what is known of the models of a skill's tensors. uploaded: the Hub has it, and
    this disk no longer does. scalars: what methods found of tensors, unit by unit; see `Preparation.found`."""

    file: str
    size: int
    sha256: str
    statistics: Mapping[str, TensorStatistics]
    tensors: Mapping[str, Any] | None = None
    uploaded: bool = False
    inputs: Mapping[str, SkillInput] = field(default_factory=dict)
    scalars: Mapping[str, Scalars] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        statistics = {name: row.as_dict() for name, row in self.statistics.items()}
        row = {"shard": self.file, "size": self.size, "sha256": self.sha256, "statistics": statistics}
        tensors = {"tensors": self.tensors} if self.tensors is not None else {}
        inputs = {"inputs": {name: found.as_dict() for name, found in self.inputs.items()}} if self.inputs else {}
        scalars = {"scalars": {name: dict(found) for name, found in self.scalars.items()}} if self.scalars else {}
        return {**row, **tensors, **inputs, **scalars, **({"uploaded": True} if self.uploaded else {})}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> ShardRecord:
        return cls(
            row["shard"],
            row["size"],
            row["sha256"],
            {name: TensorStatistics(**found) for name, found in row["statistics"].items()},
            row.get("tensors"),
            bool(row.get("uploaded")),
            {name: SkillInput.from_dict(found) for name, found in row.get("inputs", {}).items()},
            row.get("scalars", {}),
        )


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
    """A destination of shards. finished: those that are done, by file. folder: on the disk that has room for them.

    A shard's file is opened once a run, by its size (`open_shard`) or, where that is known only at its end, as a
    stream (`open_stream`). The caller of a runner records what is durable.
    """

    finished: dict[str, ShardRecord]

    @property
    def folder(self) -> Path: ...
    def open_shard(self, shard: ShardPlan) -> SpanFile: ...
    def open_stream(self, shard: ShardPlan, start: int) -> StreamFile: ...
    def record(self, done: ShardRecord) -> None:
        """Record durably that a shard is finished; its file must be durable already."""
