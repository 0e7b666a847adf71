"""A score with its uncertainty, and how scores of items and repeats are combined."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from skillmerge.errors import CheckFailed

CONFIDENCE = 1.959964
"""Standard errors on each side of a 95 % interval."""


class NotFinite(ValueError):
    """A score that is not a number, which a broken merge gets."""


@dataclass(frozen=True, slots=True)
class Score:
    """A number, and its standard error where that is known. Raises NotFinite for what is not a number."""

    value: float
    error: float | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.value) or not math.isfinite(self.error or 0.0):
            raise NotFinite(f"a score of {self.value} (error {self.error})")

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval, if errors are normal."""
        if self.error is None:
            return None
        return self.value - CONFIDENCE * self.error, self.value + CONFIDENCE * self.error


Scores = Mapping[str, Score]


def as_scores(found: Any) -> dict[str, Score]:
    """Return a number, items (of which the mean counts), or a table of them. Raises TypeError, ValueError, KeyError."""
    if isinstance(found, Mapping) and set(found) != {"value", "error"}:
        names = [str(name) for name in found]
        if not names or any(not name or len(name) > 100 or not name.isprintable() for name in names):
            raise ValueError(f"scores need plain names, not {names!r:.200}")
        return {str(name): _as_score(value) for name, value in found.items()}
    return {"score": _as_score(found)}


def _as_score(value: Any) -> Score:
    if isinstance(value, Score):
        return value
    if isinstance(value, Mapping):
        return Score(float(value["value"]), float(value["error"]))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return of_items([float(item) for item in value])
    if isinstance(value, str | bool) or value is None:
        raise TypeError(f"{value!r} is no score")
    return Score(float(value))


def of_items(values: Sequence[float]) -> Score:
    """Return the mean of independent items, and its standard error.

    Of items that are right or wrong the error is Agresti and Coull's (1998), which does not vanish where all agree.
    """
    count, mean = len(values), sum(values) / len(values)
    if set(values) <= {0.0, 1.0}:
        share = (sum(values) + 2) / (count + 4)
        return Score(mean, math.sqrt(share * (1 - share) / (count + 4)))
    if not math.isfinite(mean):
        return Score(mean)
    return Score(mean, statistics.stdev(values) / math.sqrt(count) if count > 1 else None)


def together(repeats: Sequence[Scores]) -> dict[str, Score]:
    """Scores of several runs: their means. The error is the greater of what the runs show and what each says of
    itself, since the runs may all have the same questions."""
    if len(repeats) == 1:
        return dict(repeats[0])
    if any(list(scores) != list(repeats[0]) for scores in repeats):
        raise CheckFailed("the repeats of one candidate have scores of different names")
    result = {}
    for name in repeats[0]:
        values = [scores[name].value for scores in repeats]
        own = statistics.fmean(scores[name].error or 0.0 for scores in repeats)
        between = statistics.stdev(values) / math.sqrt(len(values))
        result[name] = Score(statistics.fmean(values), max(own, between))
    return result
