"""Eight runs that want the same output at once: one has it, the others are told, and a reader sees nothing of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from observing import MergeServer, Reader, assert_finished, discard, put_previous, reference

pytestmark = pytest.mark.timeout(1800)
RUNS = 8


@pytest.mark.parametrize("overwrite", [False, True], ids=["fresh", "overwrite"])
def test_race_of_eight_is_won_by_one(
    server: MergeServer, small: Path, overwrite: bool, request: pytest.FixtureRequest, tally: Callable[..., None]
) -> None:
    """Each write is slow enough that none is finished before the last has begun."""
    output, wanted = small.parent / "merged", reference(server, small)
    races = 50 if request.config.getoption("--long") else 3
    looks = 0
    for _ in range(races):
        previous = put_previous(output) if overwrite else None
        with Reader(output, [previous, wanted]) as reader:
            answers = server.run_all(*[{"recipe": small, "overwrite": overwrite, "pace": 0.5, "threads": 1}] * RUNS)
        assert sorted(answer["status"] for answer in answers) == [0] + [6] * (RUNS - 1), answers
        assert reader.wrong == []
        looks += reader.looks
        assert_finished(output, wanted)
        discard(output)
    tally(races=races, winners=races, refused=races * (RUNS - 1), looks_by_a_reader=looks)
    assert looks > races
