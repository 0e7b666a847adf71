"""Work during the import of torch: weights are read ahead, and signals wait."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from threading import Event, Thread

from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.errors import SkillmergeError
from skillmerge.plans.plan import Plan, ShardPlan
from skillmerge.tensors import UNIT


@contextmanager
def reading_ahead(plan: Plan, checkpoints: Mapping[str, Checkpoint], shards: Sequence[ShardPlan]) -> Iterator[None]:
    """During the body, have the first weights that are wanted read into the page cache."""
    sources = (source for shard in shards for spec in shard.specs for source in plan.tensors[spec.name].sources)
    stop = Event()

    def announce() -> None:
        for model, name in sources:
            checkpoint = checkpoints[model]
            elements = checkpoint.tensors[name].elements if not checkpoint.at.remote else 0
            for first in range(0, elements, UNIT):
                if stop.is_set():
                    return
                with suppress(SkillmergeError, OSError):  # the actual read reports errors
                    checkpoint.hint(name, first, min(UNIT, elements - first))

    thread = Thread(target=announce)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextmanager
def signals_waiting() -> Iterator[None]:
    """Deliver SIGINT and SIGTERM after the body: importing torch swallows what their handlers raise."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
