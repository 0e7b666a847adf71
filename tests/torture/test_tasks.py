"""Tasks that are killed, at every step and at random instants, with all shards in each of four: one output."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from clusters import save
from observing import MergeServer, assert_finished, content, discard, reference, staging_of

import skillmerge
from skillmerge.errors import TemporaryError
from skillmerge.verbs.tasks import collect

pytestmark = pytest.mark.timeout(3600)
PROCESSES = 4
PACE = 0.02
"""Seconds that each write takes longer, so that most kills meet a task in its work."""


def task(plan: Path, **request: Any) -> dict[str, Any]:
    return {"verb": "shard", "given": [str(plan)], "index": 0, "of": 1, **request}


def assert_whole(output: Path, wanted: dict[str, str]) -> int:
    """Each record that is there is whole, and so is its file; how many there are."""
    records = sorted((staging_of(output) / "done").glob("*.json"))
    for path in records:
        row = json.loads(path.read_bytes())
        assert content(staging_of(output) / "files")[row["shard"]] == row["sha256"] == wanted[row["shard"]]
    return len(records)


def test_kill_at_every_step_loses_nothing(server: MergeServer, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the next task makes what has no record, no more."""
    monkeypatch.setattr(collect, "PATIENCE", 0.0)
    output, wanted, plan = small.parent / "merged", reference(server, small), save(small)
    for step in range(1, 1000):
        first = server.run_all(task(plan, kill_at=step))[0]
        kept = assert_whole(output, wanted)
        assert not output.exists()
        if kept < 3 and step % 4 == 0:
            with pytest.raises(TemporaryError):
                skillmerge.finish(plan)
        done = skillmerge.shard(plan, index=0, of=1)
        assert len(done.made) == 3 - kept, step
        skillmerge.finish(plan)
        assert_finished(output, wanted)
        discard(output)
        if first["status"] == 0:
            break
        assert first["status"] == -signal.SIGKILL, first
    assert step > 20, "the steps of a task were not seen"


@pytest.mark.parametrize("verb", ["finish", "apply"])
def test_kill_of_the_end_at_every_step_loses_nothing(server: MergeServer, small: Path, verb: str) -> None:
    """`apply` takes over what tasks have recorded, before their records go."""
    output, wanted, plan = small.parent / "merged", reference(server, small), save(small)
    for step in range(1, 1000):
        skillmerge.shard(plan, index=0, of=1)
        ended = server.run_all({"verb": verb, "given": [str(plan)], "kill_at": step})[0]
        if ended["status"] != 0:
            assert ended["status"] == -signal.SIGKILL, ended
            assert skillmerge.shard(plan, index=0, of=1).made == () or not staging_of(output).exists()
        skillmerge.finish(plan)
        assert_finished(output, wanted)
        discard(output)
        if ended["status"] == 0:
            break
    assert step > 20, "the steps were not seen"


def test_four_with_all_shards_and_kills_make_one_output(
    server: MergeServer, wide: Path, request: pytest.FixtureRequest, tally: Callable[..., None]
) -> None:
    """Without a lock: same bytes, private attempts and renames are enough. One of the next four always lives."""
    output, wanted, plan = wide.parent / "merged", reference(server, wide), save(wide)
    rounds, dice = 50 if request.config.getoption("--long") else 4, random.Random(4)
    killed = kept = 0
    for _ in range(rounds):
        for lives in (0, dice.randrange(1, PROCESSES)):
            requests = [task(plan, pace=PACE, kill_after=dice.uniform(0.01, 0.25)) for _ in range(PROCESSES)]
            for one in requests[:lives]:
                del one["kill_after"]
            answers = server.run_all(*requests)
            assert {answer["status"] for answer in answers} <= {0, -signal.SIGKILL}, answers
            killed += sum(answer["status"] < 0 for answer in answers)
            kept += assert_whole(output, wanted)
        skillmerge.finish(plan)
        assert_finished(output, wanted)
        discard(output)
    tally(rounds=rounds, kills=killed, records_seen=kept)
    assert killed >= rounds


def test_finish_beside_tasks_that_are_killed(server: MergeServer, wide: Path) -> None:
    """It waits, takes what comes, and publishes while others still write what they need not."""
    output, wanted, plan = wide.parent / "merged", reference(server, wide), save(wide)
    dice = random.Random(5)
    for _ in range(3):
        finish = {"verb": "finish", "given": [str(plan)], "wait": True}
        dying = [task(plan, pace=PACE, kill_after=dice.uniform(0.01, 0.2)) for _ in range(2)]
        answers = server.run_all(finish, *dying, task(plan, pace=PACE), task(plan, pace=2 * PACE))
        assert answers[0]["status"] == 0, answers
        assert [answer["status"] for answer in answers[3:]] == [0, 0], answers
        assert_finished(output, wanted)
        discard(output)
