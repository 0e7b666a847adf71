"""What makes the shards of a plan: the promise that every runner keeps, and what it is given."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.engine.destination import Destination, ShardRecord
from skillmerge.errors import UsageError
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


def check_words(device: str, threads: int | None, memory_limit: int | None, stats: str, hub: str) -> None:
    """Check what the command line checks by itself. Raises UsageError."""
    for wrong, what in (
        (re.fullmatch(r"auto|cpu|cuda(:\d+)?", str(device)) is None, f"device {device!r}: auto, cpu, cuda or cuda:N"),
        (threads is not None and (type(threads) is not int or threads < 1), f"threads {threads!r}: a number from 1"),
        (memory_limit is not None and type(memory_limit) is not int, f"memory_limit {memory_limit!r}: bytes"),
        (stats not in ("full", "sampled", "off"), f"stats {stats!r}: full, sampled or off"),
        (hub not in ("stream", "download"), f"hub {hub!r}: stream or download"),
    ):
        if wrong:
            raise UsageError(what)


class Room(Protocol):
    """Room on the disk, taken by each shard that is begun. Whoever takes a finished one away gives it back."""

    def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        """Whether there was room. Raises what keeps finished shards from leaving."""


@dataclass(frozen=True, slots=True)
class Job:
    """A plan, the open models that it reads, and where its shards go.

    stats: how much of the rounding is measured: full, sampled or off. room: limits the shards that are on the disk at
    once; None for no limit.
    """

    plan: Plan
    checkpoints: Mapping[str, Checkpoint]
    destination: Destination
    stats: str = "sampled"
    allow_nonfinite: bool = False
    room: Room | None = None


class Runner(Protocol):
    """Makes shards. `device` says where it computes and why, once a run has begun."""

    @property
    def device(self) -> str: ...

    def run(self, job: Job, shards: Sequence[ShardPlan]) -> Generator[ShardRecord, None, None]:
        """Write `shards`, in any order, and yield the record of each when it is durable.

        The caller alone records. What is finished when the work fails, or when `handed` throws its caller's error in,
        is yielded before that is raised. Closing the generator ends the work. Another run does what is unfinished.
        Raises UnusableWeights, InputError, StalePlan, TemporaryError, ResourceError, UsageError.
        """


@contextmanager
def handed(
    records: Generator[ShardRecord, None, None], record: Callable[[ShardRecord], None]
) -> Iterator[Generator[ShardRecord, None, None]]:
    """End a run with its caller's own error: an interrupt waits a few seconds for threads, anything else for all.

    record: gets what is finished by then and was not handed over, and the one that was in the caller's hands.
    """
    try:
        yield records
    except BaseException as error:
        with suppress(Exception):  # the caller's own error is the one to raise
            record(records.throw(error))
            for done in records:
                record(done)
        raise
    finally:
        records.close()
