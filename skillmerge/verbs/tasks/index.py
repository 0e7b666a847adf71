"""Which of how many tasks this process is: from its options, else from what its scheduler put into the environment.

Knows the variables of schedulers, nothing about plans.
"""

from __future__ import annotations

from collections.abc import Mapping

from skillmerge.errors import UsageError

OF = "SKILLMERGE_OF"
_BY_HAND = "pass `--index I --of N`; the index counts from 0"
_DIGITS = 18
"""Most digits of a number that is meant: no scheduler counts further."""


def place_among(index: int | None, of: int | None, environment: Mapping[str, str]) -> tuple[int, int]:
    """Return this task's index, counted from 0, and how many tasks there are.

    Without an index the scheduler's variables say it: those of Slurm, AWS Batch, an Indexed Job of Kubernetes, and
    torchrun. `SKILLMERGE_OF` is how many, where neither `of` nor the scheduler says. Raises UsageError where that is
    unknown or contradictory.
    """
    if of is None and environment.get(OF):
        of = _number(environment, OF)
    count, source = None, "`--index`"
    if index is None:
        (index, count), source = _of_scheduler(environment)
    if index is None:
        what = "it is not known which task this is: neither `--index` nor a scheduler says so"
        raise UsageError(what, fix=_BY_HAND)
    if of is not None and count is not None and of != count:
        raise UsageError(
            f"`--of` (or {OF}) is {of}, but {source} has {count} tasks", fix=f"leave `--of` out, or {_BY_HAND}"
        )
    of = of if of is not None else count
    if of is None:
        raise UsageError(
            f"{source} says which task this is, but not of how many",
            fix=f"pass `--of N`, or set {OF}=N, with the number of tasks",
        )
    if of < 1:
        raise UsageError(f"the number of tasks is {of}: there is at least one", fix=_BY_HAND)
    if not 0 <= index < of:
        raise UsageError(f"there is no task {index} of {of}: the index counts from 0", fix=f"use 0 to {of - 1}")
    return index, of


def _of_scheduler(environment: Mapping[str, str]) -> tuple[tuple[int | None, int | None], str]:
    """Return index and count as far as a scheduler says so, and what it calls them."""
    if "SLURM_ARRAY_TASK_ID" in environment:
        return _of_slurm(environment), "the Slurm array"
    if "AWS_BATCH_JOB_ARRAY_INDEX" in environment:
        index = _number(environment, "AWS_BATCH_JOB_ARRAY_INDEX")
        size = "AWS_BATCH_JOB_ARRAY_SIZE"
        return (index, _number(environment, size) if size in environment else None), "the AWS Batch array"
    if "JOB_COMPLETION_INDEX" in environment:
        return (_number(environment, "JOB_COMPLETION_INDEX"), None), "JOB_COMPLETION_INDEX"
    if "RANK" in environment and "WORLD_SIZE" in environment and (world := _number(environment, "WORLD_SIZE")) > 1:
        return (_number(environment, "RANK"), world), "WORLD_SIZE"
    return (None, None), ""


def _of_slurm(environment: Mapping[str, str]) -> tuple[int, int | None]:
    """Return index and count of a Slurm array. Raises UsageError for an array with holes, whose tasks do not know
    their places."""
    task, least, most, count = (
        _number(environment, f"SLURM_ARRAY_TASK_{key}") for key in ("ID", "MIN", "MAX", "COUNT")
    )
    step = _number(environment, "SLURM_ARRAY_TASK_STEP") if environment.get("SLURM_ARRAY_TASK_STEP") else 1
    step = max(1, step)
    if (task - least) % step or (most - least) // step + 1 != count:
        raise UsageError(
            f"the Slurm array has holes: {count} tasks from {least} to {most}",
            fix="submit a whole array, whose finished tasks end at once; or pass "
            "`--index $SLURM_ARRAY_TASK_ID --of N`, with the N of the first array",
        )
    return (task - least) // step, count


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if not (text.isascii() and text.isdecimal() and len(text) <= _DIGITS):
        raise UsageError(f"{name} is {text[:40]!r}, not a number from 0", fix=_BY_HAND)
    return int(text)
