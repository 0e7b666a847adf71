"""What makes the shards of a plan: the promise that every runner keeps, and what it is given."""

from __future__ import annotations

import threading
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.engine.destination import Destination, ShardRecord
from skillmerge.plans.plan import Plan, ShardPlan


@dataclass(frozen=True, slots=True)
class Work:
    """Where and how wide to compute; nothing in here changes a byte of the output.

    device: auto, cpu, cuda or cuda:N. threads: workers, None for one per core. memory_limit: bytes, None for no limit.
    runner: a name in the table of runners.
    """

    device: str = "auto"
    threads: int | None = None
    memory_limit: int | None = None
    runner: str = "threads"


@dataclass(frozen=True, slots=True)
class Job:
    """A plan, the open models that it reads, and where its shards go.

    stats: how much of the rounding is measured: full, sampled or off. room: limits the shards that are on the disk at
    once: acquired for each that is begun, released by whoever takes a finished one away; None for no limit.
    """

    plan: Plan
    checkpoints: Mapping[str, Checkpoint]
    destination: Destination
    stats: str = "sampled"
    allow_nonfinite: bool = False
    room: threading.Semaphore | None = None


class Runner(Protocol):
    """Makes shards. `device` says where it computes and why, once a run has begun."""

    @property
    def device(self) -> str: ...

    def run(self, job: Job, shards: Sequence[ShardPlan]) -> Generator[ShardRecord, None, None]:
        """Write `shards`, in any order, and yield the record of each when it is durable.

        The caller alone records. Closing the generator ends the work; what is unfinished another run does again.
        Raises UnusableWeights, InputError, StalePlan, TemporaryError, ResourceError, UsageError.
        """
