"""The interface of runners, which compute the shards of a plan, and their inputs."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol

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


def _whole(least: int, most: float = math.inf) -> Callable[[Any], bool]:
    """Return whether something is a whole number of a range; numpy's are too, True is not."""

    def fits(value: Any) -> bool:
        try:
            return not isinstance(value, bool) and least <= operator.index(value) <= most
        except TypeError:
            return False

    return fits


def _choice(pattern: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value, re.ASCII) is not None


def _is_time(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) < math.inf


def _is_share(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) <= 1


_WORDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "device": (_choice(r"auto|cpu|cuda(:\d+)?"), "auto, cpu, cuda or cuda:N"),
    "stats": (_choice("full|sampled|off"), "full, sampled or off"),
    "vocabulary": (_choice("by-id|by-token"), "by-id or by-token"),
    "hub": (_choice("stream|download"), "stream or download"),
    "threads": (_whole(1, 256), "a number from 1 to 256"),
    "index": (_whole(0), "a number from 0"),
    "of": (_whole(1), "a number from 1"),
    "wait_limit": (_is_time, "seconds, more than 0"),
    "memory_limit": (_whole(1), "bytes, more than 0"),
    "seed": (_whole(0), "a number from 0"),
    "spectral": (_whole(1, 64), "a number from 1 to 64"),
    "lora_rank": (_whole(1, 4096), "a number from 1 to 4096"),
    "trials": (_whole(1), "a number from 1"),
    "repeats": (_whole(1), "a number from 1"),
    "sample": (_is_share, "a share above 0, at most 1"),
    "keep": (_is_share, "a share above 0, at most 1"),
}
"""Allowed values of arguments that several functions share, or that the command line also checks."""

_OPTIONAL = ("threads", "memory_limit", "spectral", "keep", "index", "of", "wait_limit")
"""May be None."""


def check_words(**given: object) -> None:
    """Check arguments by name, before any work. Raises UsageError."""
    for name, value in given.items():
        fits, what = _WORDS[name]
        if not (fits(value) or (value is None and name in _OPTIONAL)):
            raise UsageError(f"{name} {value!r}: {what}")


class Room(Protocol):
    """Room on the disk, taken by each shard that is begun. Released by the consumer of a finished shard."""

    def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        """Return whether there was room. Raises what keeps finished shards from leaving."""


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
    """Computes shards. `device` says where and why, once a run has started."""

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
