"""Which of how many tasks a process is: options, and what schedulers put into the environment."""

from __future__ import annotations

import pytest

from skillmerge.errors import UsageError
from skillmerge.verbs.tasks.index import place_among


def slurm(task: int, least: int, most: int, count: int, step: int | None = 1) -> dict[str, str]:
    given = {"ID": task, "MIN": least, "MAX": most, "COUNT": count, "STEP": step}
    return {f"SLURM_ARRAY_TASK_{key}": str(value) for key, value in given.items() if value is not None}


AWS = {"AWS_BATCH_JOB_ARRAY_INDEX": "2", "AWS_BATCH_JOB_ARRAY_SIZE": "9"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4"}


@pytest.mark.parametrize(
    ("index", "of", "environment", "wanted"),
    [
        (1, 4, {}, (1, 4)),
        (1, 4, slurm(7, 0, 8, 9), (1, 4)),
        (None, None, slurm(0, 0, 3, 4), (0, 4)),
        (None, None, slurm(3, 1, 4, 4), (2, 4)),
        (None, None, slurm(7, 1, 7, 4, step=2), (3, 4)),
        (None, None, slurm(9, 9, 9, 1, step=None), (0, 1)),
        (None, 4, slurm(1, 0, 3, 4), (1, 4)),
        (None, None, {**slurm(1, 0, 3, 4), **AWS, **TORCHRUN, "JOB_COMPLETION_INDEX": "5"}, (1, 4)),
        (None, None, {**AWS, **TORCHRUN, "JOB_COMPLETION_INDEX": "5"}, (2, 9)),
        (None, 6, {**TORCHRUN, "JOB_COMPLETION_INDEX": "5"}, (5, 6)),
        (None, None, {"JOB_COMPLETION_INDEX": "5", "SKILLMERGE_OF": "6"}, (5, 6)),
        (None, None, TORCHRUN, (3, 4)),
        (0, None, {"SKILLMERGE_OF": "2"}, (0, 2)),
    ],
)
def test_the_place_is_found(
    index: int | None, of: int | None, environment: dict[str, str], wanted: tuple[int, int]
) -> None:
    assert place_among(index, of, environment) == wanted


@pytest.mark.parametrize(
    ("index", "of", "environment", "message"),
    [
        (None, None, {}, "which task"),
        (None, 4, {}, "which task"),
        (None, None, {"RANK": "0", "WORLD_SIZE": "1"}, "which task"),
        (0, None, {}, "of how many"),
        (None, None, {"JOB_COMPLETION_INDEX": "5"}, "of how many"),
        (4, 4, {}, "no task 4 of 4"),
        (-1, 4, {}, "no task -1 of 4"),
        (None, None, slurm(3, 0, 7, 2), "holes"),
        (None, None, slurm(9, 1, 9, 3), "holes"),
        (None, None, slurm(20, 1, 20, 5, step=2), "holes"),
        (None, 64, slurm(3, 0, 3, 4), "4 tasks"),
        (None, None, {**slurm(3, 0, 3, 4), "SLURM_ARRAY_TASK_COUNT": "four"}, "not a number"),
        (None, None, {"JOB_COMPLETION_INDEX": "1", "SKILLMERGE_OF": "-2"}, "not a number"),
        (None, None, {"JOB_COMPLETION_INDEX": "1", "SKILLMERGE_OF": "0"}, "the number of tasks is 0"),
        (None, None, {**AWS, "AWS_BATCH_JOB_ARRAY_SIZE": "9" * 5000}, "not a number"),
        (None, None, {"JOB_COMPLETION_INDEX": "", "SKILLMERGE_OF": "2"}, "JOB_COMPLETION_INDEX is ''"),
    ],
)
def test_a_place_that_is_not_clear_is_refused(
    index: int | None, of: int | None, environment: dict[str, str], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        place_among(index, of, environment)
    assert caught.value.fix
