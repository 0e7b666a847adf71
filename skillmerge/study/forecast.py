"""Forecasts rounding before anything is written: the arithmetic of `apply` on some blocks, for many lambdas.

For every block that `apply --stats sampled` looks at (or for all), the recipe's own program is run, and the
difference added with each lambda of a grid in three ways to round; all of it is measured as `apply` measures. So
the forecast of a recipe equals, to the last bit, what `apply` then puts into the manifest.
"""

from __future__ import annotations

import math
import threading
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from skillmerge.engine.rounding_statistics import (
    SAMPLE_STRIDE,
    BlockStatistics,
    TensorStatistics,
    is_sampled,
    measure,
    summarise,
    total,
    total_of,
)
from skillmerge.methods.linear import Program, compile_term
from skillmerge.methods.terms import Leaf, Scaled, Sum, Term
from skillmerge.naming import MODULE_KINDS, module_kind
from skillmerge.plans.plan import Plan, TensorPlan
from skillmerge.tensors import BLOCK, block_count

if TYPE_CHECKING:
    from torch import Tensor

    from skillmerge.methods.evaluate import Scratch


GRID = tuple(round(0.1 * step, 1) for step in range(1, 21))
"""The lambdas of the rounding forecast."""

MODES = {
    "bfloat16": ("BF16", "nearest"),
    "bfloat16, stochastic": ("BF16", "stochastic"),
    "float32": ("F32", "nearest"),
}


MOST = 4096
"""Approximate blocks for the curves of a sample, which cost sixty times what a merge does."""

_SUMS = ("updated", "vanished", "changed", "uu", "du", "total")


@dataclass(slots=True)
class Forecast:
    """Measurements of a run of elements. blocks: of the recipe as written; curves: of each mode and lambda."""

    blocks: dict[int, BlockStatistics] = field(default_factory=dict)
    curves: dict[tuple[str, float], list[BlockStatistics]] = field(default_factory=dict)


class Forecaster:
    """Forecasts a plan, if there is one, and a difference that is added to `target` (or subtracted), if there is one.

    `measure` is for any thread; `add`, tensor by tensor, and `summary` for one.
    """

    def __init__(
        self,
        plan: Plan | None,
        target: str | None,
        difference: Term | None,
        minus: bool,
        stats: str,
        sizes: Mapping[str, int],
    ) -> None:
        """sizes: elements of each tensor."""
        self._plan, self._target, self.stats, self._sizes = plan, target, stats, sizes
        self._programs: dict[float, Program] = {}
        if target is not None and difference is not None:
            for lam in GRID:
                scaled = Scaled(difference, lam, divide=False) if lam != 1 else difference
                self._programs[lam] = compile_term(Sum(Leaf(target), scaled, minus))
        sampled = sum(max(1, block_count(size) // SAMPLE_STRIDE) for size in sizes.values())
        self._every = -(-sampled // MOST) if stats == "sampled" else 1
        self._planned: dict[str, TensorStatistics] = {}
        self._curves: dict[tuple[str, str, float], dict[str, float]] = {}

    def measure(
        self, task: TensorPlan, first: int, inputs: Mapping[str, Tensor], scratch: Scratch, stop: threading.Event
    ) -> Forecast:
        """Measure a tensor's elements from `first` (the first of a block), given each model's values in `inputs`."""
        found = Forecast()
        blocks = block_count(math.prod(task.shape))
        planned = self._plan.tensors.get(task.name) if self._plan is not None else None
        for start in range(0, next(iter(inputs.values())).numel(), BLOCK):
            block = (first + start) // BLOCK
            if self.stats == "off" or not is_sampled(task.name, block, blocks, self.stats):
                continue
            pieces = {model: piece[start : start + BLOCK] for model, piece in inputs.items()}
            place = (task.name, first + start)
            if self._plan is not None and planned is not None:
                found.blocks |= _as_planned(self._plan, planned, pieces, first + start, scratch)
            if zlib.crc32(f"{task.name} {block}".encode()) % self._every:
                continue
            for lam, program in self._programs.items():
                if stop.is_set():
                    return found
                for mode, (dtype, rounding) in MODES.items():
                    measured = _try(program, pieces, self._target or "", (dtype, rounding, 0), place, scratch)
                    if measured is not None:
                        found.curves.setdefault((mode, lam), []).append(measured)
        return found

    def add(self, name: str, found: Sequence[Forecast]) -> None:
        """Add all that `measure` returned for a tensor."""
        size = self._sizes[name]
        if self._plan is not None and (blocks := {at: it for part in found for at, it in part.blocks.items()}):
            self._planned[name] = total_of(self._plan.tensors[name], blocks)
        for mode, lam in {key: None for part in found for key in part.curves}:
            row = total((block for part in found for block in part.curves.get((mode, lam), ())), size)
            figures, by = row.as_dict(), row.total / row.elements  # a sample represents the whole tensor
            for kind in ("all", module_kind(name)):
                sums = self._curves.setdefault((mode, kind, lam), dict.fromkeys(_SUMS, 0.0))
                for key in _SUMS:
                    value = math.nan if figures[key] is None else figures[key]
                    sums[key] += value if key == "total" else value * by

    def summary(self) -> dict[str, Any] | None:
        """`as_planned` (as a manifest's statistics), and `curves`: by mode and module kind, lambda, realised,
        vanished and changed. None if there is nothing to forecast."""
        if self.stats == "off" or (not self._programs and self._plan is None):
            return None
        result: dict[str, Any] = {"mode": self.stats, "grid": list(GRID), "curves": {}, "as_planned": None}
        if self._plan is not None:
            result["as_planned"] = summarise(self._plan, self._planned, self.stats)
        kinds = {kind for _, kind, _ in self._curves}
        for mode in MODES if self._programs else ():
            result["curves"][mode] = {
                kind: [_point(lam, self._curves.get((mode, kind, lam))) for lam in GRID]
                for kind in ("all", *MODULE_KINDS)
                if kind in kinds
            }
        return result


def plain(summary: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the result of `Forecaster.summary` as JSON data."""
    if summary is None:
        return None
    planned = summary["as_planned"]
    return {**summary, "as_planned": planned.as_dict() if planned is not None else None}


def _as_planned(
    plan: Plan, planned: TensorPlan, pieces: Mapping[str, Tensor], first: int, scratch: Scratch
) -> dict[int, BlockStatistics]:
    """Return the effect of rounding on elements from `first` on, of a block; of each expert's where these have
    coefficients of their own."""
    output, found = plan.recipe.output, {}
    how = (planned.dtype, output.rounding, output.seed)
    for piece, start, last in planned.within(first, first + next(iter(pieces.values())).numel()):
        if piece.action == "merge" and piece.program:
            inside = {model: values[start - first : last - first] for model, values in pieces.items()}
            measured = _try(piece.program, inside, plan.donor, how, (planned.name, start), scratch)
            if measured is not None:
                found[start] = measured
    return found


def _try(
    program: Program,
    pieces: Mapping[str, Tensor],
    donor: str,
    how: tuple[str, str, int],
    place: tuple[str, int],
    scratch: Scratch,
) -> BlockStatistics | None:
    """Return what `apply` would measure of one block: the same steps in the same order.

    how: dtype, rounding and seed of the output; place: tensor and first element.
    """
    import torch

    from skillmerge.bits import torch_dtype
    from skillmerge.methods.evaluate import evaluate
    from skillmerge.methods.rounding import keep_same_bits, round_value, rounding_key

    base = pieces.get(program.base or donor)
    if base is None or any(model not in pieces for model in program.models):
        return None
    (dtype, rounding, seed), (name, first) = how, place
    inputs = {model: pieces[model] for model in program.models}
    value, subtracted = evaluate(program, inputs, scratch)
    rounded = (rounding, rounding_key(seed, name), first)
    out = round_value(value, torch.empty(value.numel(), dtype=torch_dtype(dtype)), *rounded)
    if program.same_bits:
        keep_same_bits(program, inputs, out, scratch, *rounded)
    update = subtracted if subtracted is not None else base.to(torch.float64) - value.to(torch.float64)
    return measure(base, out, update, scratch)


def _point(lam: float, sums: Mapping[str, float] | None) -> dict[str, float | None]:
    """Return the figures at one lambda; None if unknown."""

    def share(top: str, bottom: str, by: float = 1.0) -> float | None:
        if sums is None or not sums[bottom]:
            return None
        value = by * sums[top] / sums[bottom]
        return value if math.isfinite(value) and math.isfinite(sums[bottom]) else None

    return {
        "lambda": lam,
        "realised": share("du", "uu", lam),
        "vanished": share("vanished", "updated"),
        "changed": share("changed", "total"),
    }
