"""What rounding will do, before anything is written: `apply`'s own arithmetic on some blocks, for many lambdas.

For every block that `apply --stats sampled` looks at (or for all), the recipe's own program is run, and the
difference added with each lambda of a grid in three ways to round; all of it is measured as `apply` measures. So
the forecast of a recipe equals, to the last bit, what `apply` then puts into the manifest.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from skillmerge.expression import Leaf, Scaled, Sum, Term
from skillmerge.naming import MODULE_KINDS, module_kind
from skillmerge.planning import Plan, TensorPlan
from skillmerge.program import Program, compile_term
from skillmerge.statistics import BlockStatistics, is_sampled, measure, summarise, total
from skillmerge.tensors import BLOCK, block_count

if TYPE_CHECKING:
    from torch import Tensor

    from skillmerge.arithmetic import Scratch

GRID = tuple(round(0.1 * step, 1) for step in range(1, 21))
"""The lambdas of the rounding forecast."""

MODES = {
    "bfloat16": ("BF16", "nearest"),
    "bfloat16, stochastic": ("BF16", "stochastic"),
    "float32": ("F32", "nearest"),
}


@dataclass(slots=True)
class Forecast:
    """What was measured of a run of elements. blocks: of the recipe as it is; curves: of each mode and lambda."""

    blocks: dict[int, BlockStatistics] = field(default_factory=dict)
    curves: dict[tuple[str, float], list[BlockStatistics]] = field(default_factory=dict)


class Forecaster:
    """Knows what to try: a plan, or none; a difference that is added to `target` (or subtracted), or none."""

    def __init__(self, plan: Plan | None, target: str | None, difference: Term | None, minus: bool, stats: str) -> None:
        self._plan, self._target, self.stats = plan, target, stats
        self._programs: dict[float, Program] = {}
        if target is not None and difference is not None:
            for lam in GRID:
                scaled = Scaled(difference, lam, divide=False) if lam != 1 else difference
                self._programs[lam] = compile_term(Sum(Leaf(target), scaled, minus))

    def measure(
        self, task: TensorPlan, first: int, inputs: Mapping[str, Tensor], scratch: Scratch, stop: threading.Event
    ) -> Forecast:
        """Of a tensor's elements from `first` on (a block's first), as each model of `inputs` has them."""
        found = Forecast()
        blocks = block_count(math.prod(task.shape))
        planned = self._plan.tensors.get(task.name) if self._plan is not None else None
        for start in range(0, next(iter(inputs.values())).numel(), BLOCK):
            block = (first + start) // BLOCK
            if self.stats == "off" or not is_sampled(task.name, block, blocks, self.stats):
                continue
            pieces = {model: piece[start : start + BLOCK] for model, piece in inputs.items()}
            place = (task.name, first + start)
            if self._plan is not None and planned is not None and planned.action == "merge" and planned.program:
                output = self._plan.recipe.output
                how = (planned.dtype, output.rounding, output.seed)
                measured = _try(planned.program, pieces, self._plan.donor, how, place, scratch)
                if measured is not None:
                    found.blocks[block] = measured
            for lam, program in self._programs.items():
                if stop.is_set():
                    return found
                for mode, (dtype, rounding) in MODES.items():
                    measured = _try(program, pieces, self._target or "", (dtype, rounding, 0), place, scratch)
                    if measured is not None:
                        found.curves.setdefault((mode, lam), []).append(measured)
        return found

    def summary(self, sizes: Mapping[str, int], found: Mapping[str, Sequence[Forecast]]) -> dict[str, Any] | None:
        """`as_planned` (keys as in a manifest's statistics), and `curves`: by mode and module kind, lambda, realised,
        vanished and changed. sizes: elements of each tensor. None where nothing was to be forecast."""
        if self.stats == "off" or (not self._programs and self._plan is None):
            return None
        result: dict[str, Any] = {"mode": self.stats, "grid": list(GRID), "curves": {}, "as_planned": None}
        if self._plan is not None:
            measured = {
                name: total((block for part in parts for block in part.blocks.values()), sizes[name])
                for name, parts in found.items()
                if any(part.blocks for part in parts)
            }
            result["as_planned"] = {"mode": self.stats, **summarise(self._plan, measured)}
        if not self._programs:
            return result
        kinds = {"all": list(found), **{kind: [n for n in found if module_kind(n) == kind] for kind in MODULE_KINDS}}
        for mode in MODES:
            result["curves"][mode] = {
                kind: [_point(mode, lam, names, found, sizes) for lam in GRID] for kind, names in kinds.items() if names
            }
        return result


def _try(
    program: Program,
    pieces: Mapping[str, Tensor],
    donor: str,
    how: tuple[str, str, int],
    place: tuple[str, int],
    scratch: Scratch,
) -> BlockStatistics | None:
    """What `apply` would measure of one block: the same steps in the same order.

    how: dtype, rounding and seed of the output; place: tensor and first element.
    """
    import torch

    from skillmerge.arithmetic import evaluate, keep_same_bits, round_value, rounding_key, torch_dtype

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


def _point(
    mode: str, lam: float, names: Sequence[str], found: Mapping[str, Sequence[Forecast]], sizes: Mapping[str, int]
) -> dict[str, float | None]:
    """One lambda; a sampled tensor stands for all of its elements."""
    rows = []
    for name in names:
        blocks = [block for part in found[name] for block in part.curves.get((mode, lam), [])]
        if blocks:
            row = total(blocks, sizes[name])
            rows.append((row, row["total"] / row["elements"]))

    def scaled(key: str) -> float:
        try:
            return math.fsum((row[key] or 0.0) * by for row, by in rows)
        except OverflowError:
            return math.inf

    updated, energy, elements = scaled("updated"), scaled("uu"), sum(row["total"] for row, _ in rows)
    return {
        "lambda": lam,
        "realised": lam * scaled("du") / energy if energy and math.isfinite(energy) else None,
        "vanished": scaled("vanished") / updated if updated else None,
        "changed": scaled("changed") / elements if elements else None,
    }
