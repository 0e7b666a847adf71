"""`kill -9` at random instants: the same command again ends in the same bytes, and redoes only what was in flight."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from observing import (
    SHARDS,
    MergeServer,
    Reader,
    assert_finished,
    discard,
    finished_shards,
    identities,
    reference,
    visible,
)

import skillmerge
from skillmerge.plans.budget import OUTPUT_BUFFERS, WRITERS

pytestmark = pytest.mark.timeout(3600)

PACE = 0.004
"""Seconds that each write takes longer, so that most kills meet a run in its work."""


@pytest.fixture
def kills(request: pytest.FixtureRequest) -> int:
    """Of each quarter."""
    return 500 if request.config.getoption("--long") else 16


@pytest.mark.parametrize("quarter", range(4))
def test_kill_at_random_instants_loses_nothing(
    server: MergeServer, wide: Path, quarter: int, kills: int, tally: Callable[..., None]
) -> None:
    """In quarters, which can run side by side; with one thread and with two."""
    output, wanted, dice = wide.parent / "merged", reference(server, wide), random.Random(quarter)
    threads = 1 + quarter % 2
    started = time.monotonic()
    assert server.run(wide, threads=threads, pace=PACE)["status"] == 0
    length = time.monotonic() - started
    discard(output)
    killed, kept, phases = 0, 0, set()
    with Reader(output, [None, wanted]) as reader:
        for _ in range(3 * kills):
            if killed == kills:
                break
            ended = server.run(wide, threads=threads, pace=PACE, kill_after=dice.uniform(0.01, length))
            # Kills are spread over a run's length, which other work on the machine changes.
            died = ended["status"] == -signal.SIGKILL
            killed += died
            length *= 1.02 if died else 0.9
            before = finished_shards(output)
            phases.add(len(before))
            started_on = len(list(output.parent.glob("merged.partial/files/*.safetensors")))
            assert started_on - len(before) <= OUTPUT_BUFFERS * threads + WRITERS
            assert visible(output) in (None, wanted)
            skillmerge.apply(wide, threads=threads)
            assert_finished(output, wanted)
            assert {name: identities(output)[name] for name in before} == before, "a finished shard was redone"
            kept += len(before)
            discard(output)
    tally(kills=killed, shards_kept=kept, looks_by_a_reader=reader.looks)
    assert reader.wrong == []
    assert killed == kills
    # Where the kills all fell into one place, nothing was shown.
    assert len(phases) >= SHARDS / 2
    assert kept > kills
    assert reader.looks > kills
