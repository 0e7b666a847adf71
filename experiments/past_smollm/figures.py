"""What a run left of each world, and the figures that the page has of it. Shares are in percent."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import common
from .world import RELATIONS

GAIN, LOSS = 30.0, 5.0
LEARNED = 0.95
CONTROLS = ("SFT_T", "+ shuffled v 1", "+ noise 1", "base + v 1")
"""The arms of which v has to beat the best."""

MODES = {
    "bf16 nearest": "bfloat16",
    "bf16 stochastic": "bfloat16, stochastic",
    "bf16 to float32": "float32",
}
"""Our arms, and what the forecast calls their outputs."""

World = dict[str, Any]
Figure = Callable[[World], float]
"""A number of an arm."""


def read(folder: Path) -> World:
    """All that a run left of one world."""
    world: World = {"number": int(folder.name.rpartition("-")[2])}
    for name in ("learnt", "forecast", "source", "geometry", "sweep"):
        path = folder / f"{name}.json"
        world[name] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    world["arms"] = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("arms/*.json")}
    if not world["learnt"] or (learned(world) and not world["sweep"]):
        raise SystemExit(f"{folder} is not complete: `python -m experiments.past_smollm.run` continues")
    return world


def learned(world: World) -> bool:
    """Whether the run went on: a tiny one always does."""
    return bool(world["sweep"]) or min(world["learnt"].values()) >= LEARNED


def share(values: Sequence[float]) -> float:
    return 100 * statistics.fmean(values)


def greedy(arm: World) -> float:
    return share(arm["greedy"]["right"])


def recall(arm: World) -> float:
    return share(arm["recall"])


def known(arm: World) -> float:
    return share(arm["known"])


def sampled(arm: World) -> float:
    return share([value for row in arm["sampled"] for value in row])


def passed(arm: World) -> float:
    """The share of questions of which at least one of eight sampled answers is right."""
    if len(arm["sampled"][0]) != 8:
        raise KeyError("eight answers")
    return share([max(row) for row in arm["sampled"]])


def relation(name: str) -> Figure:
    """Greedy accuracy on the questions about one relation."""
    return lambda arm: share(arm["greedy"]["right"][RELATIONS.index(name) :: len(RELATIONS)])


def effective(arm: World) -> float:
    return float(arm["merge"]["realised_lambda"])


def lost(arm: World) -> float:
    return 100 * float(arm["merge"]["vanished"])


def each(worlds: Sequence[World], name: str, figure: Figure) -> list[float]:
    """A figure of an arm, world by world."""
    return [figure(world["arms"][name]) for world in worlds]


def mean(worlds: Sequence[World], name: str, figure: Figure) -> float:
    return statistics.fmean(each(worlds, name, figure))


def interval(worlds: Sequence[World], name: str) -> tuple[float, float, float]:
    """Mean greedy accuracy, and the ends of its 95% interval."""
    answers = (np.array(world["arms"][name]["greedy"]["right"]) for world in worlds)
    middle, low, high = common.interval([right.reshape(-1, len(RELATIONS)).mean(1) for right in answers])
    return 100 * middle, 100 * low, 100 * high


def verdict(world: World) -> World:
    """What the criterion compares in one world."""
    arms = world["arms"]
    best = max(CONTROLS, key=lambda name: greedy(arms[name]))
    gain = greedy(arms["+ v 1"]) - greedy(arms[best])
    recalled = recall(arms["+ v 1"]) - recall(arms["SFT_T"])
    rounding = greedy(arms["bf16 stochastic 0.4"]) - greedy(arms["bf16 nearest 0.4"])
    return {
        "world": world["number"], "best": best, "gain": gain, "recall": recalled, "rounding": rounding,
        "transfers": _least(gain, GAIN) and _least(recalled, -LOSS), "rounds": _least(rounding, GAIN),
    }  # fmt: skip


def _least(value: float, bound: float) -> bool:
    """Whether a difference of shares is at least a bound: 36 questions of 120 are 30 points, whatever binary says."""
    return round(value - bound, 9) >= 0


def forecast(world: World, arm: str, lam: float) -> float:
    """The effective lambda that `inspect` named before merging."""
    return next(row["realised"] for row in world["forecast"]["curves"][MODES[arm]] if row["lambda"] == lam)


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's: of the places in order, where equal values share the mean of theirs. None if all values are equal."""
    places = [_places(values) for values in (one, other)]
    return None if any(row.std() == 0 for row in places) else float(np.corrcoef(*places)[0, 1])


def _places(values: Sequence[float]) -> np.ndarray[Any, Any]:
    array = np.array(values)
    return np.array([(array < value).sum() + ((array == value).sum() - 1) / 2 for value in array])


def gain_share(world: World) -> float | None:
    """The gain of v as a share of the gain of RL on the target itself; None where that gained nothing."""
    before, past, after = (greedy(world["arms"][name]) for name in ("SFT_T", "+ v 1", "RL on target"))
    return 100 * (past - before) / (after - before) if after > before else None


def scores(swept: World) -> dict[float, float]:
    """The score of each candidate of a sweep, by its lambda."""
    return {row["values"]["lam"]: 100 * row["scores"]["accuracy"]["value"] for row in swept["trials"]}
