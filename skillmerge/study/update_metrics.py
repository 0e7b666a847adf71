"""Measures of an update, and of two updates together: counts and float64 sums of runs of elements.

v = after - before is the update, k a second update, w the weights that v is compared with; n elements. A run gives
an `Update` (and, with k, a `Pair`); they add up over runs, tensors, layers and modules, and `describe` turns
the sums into figures. docs/metrics.md defines each figure and names its source.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from skillmerge.bits import bit_view
from skillmerge.checkpoints.kinds.sparse import places_of
from skillmerge.engine.measures.input_rounding import InputRounding, floor
from skillmerge.tensors import ULP_EDGES

ABSOLUTE, RELATIVE = 1e-5, 1e-3
"""Below these, |v| and |v| / |w|, the literature counts an element as unchanged."""


@dataclass(slots=True)
class Update:
    """changed: elements whose bits differ (whose v is not 0, where only v is known). above_absolute,
    above_relative: elements with |v| above ABSOLUTE, and above RELATIVE * |w|. ulps: changed elements by how many
    floating-point numbers lie between before and after. squares, weights: lists of sums of v^2 and of w^2.
    largest: the greatest |v|. rounding, rounding_added, precisions: of whole tensors, see `InputRounding`; empty if
    nothing changed. What cannot be known is None."""

    elements: int = 0
    changed: int = 0
    above_absolute: int = 0
    above_relative: int | None = 0
    ulps: list[int] | None = field(default_factory=lambda: [0] * (len(ULP_EDGES) + 1))
    squares: list[float] = field(default_factory=list)
    weights: list[float] | None = field(default_factory=list)
    largest: float = 0.0
    rounding: list[float] | None = None
    rounding_added: list[float] | None = None
    precisions: list[str] | None = None

    @property
    def norm_ratio(self) -> float | None:
        """|v| / |w|; None if w is unknown or 0."""
        weights = math.fsum(self.weights) if self.weights is not None else 0.0
        return math.sqrt(math.fsum(self.squares)) / math.sqrt(weights) if weights else None

    def set_rounding(self, found: InputRounding) -> None:
        """Of a whole tensor: what is known of its models' numbers."""
        moved = self.changed > 0
        self.rounding = [found.of_all] if moved else []
        self.rounding_added = [found.of_added] if moved else []
        self.precisions = list(found.precisions)


@dataclass(slots=True)
class Pair:
    """Two updates: sums of k^2, of v*k and of (v*k)^2; elements that k changes, that both change, and of those the
    ones that they move to opposite sides."""

    squares: list[float] = field(default_factory=list)
    products: list[float] = field(default_factory=list)
    spread: list[float] = field(default_factory=list)
    changed: int = 0
    both: int = 0
    opposite: int = 0


def measure_update(update: Tensor, against: Tensor | None, before: Tensor | None, after: Tensor | None) -> Update:
    """`update` in float64. against: w, in its own dtype. before, after: as they are stored, where v is their
    difference."""
    wide = against.to(torch.float64) if against is not None else None
    if before is not None and after is not None and before.dtype == after.dtype:
        places = places_of(bit_view(before) != bit_view(after))
        ulps: list[int] | None = _ulps(before[places], after[places])
    else:
        places, ulps = places_of(update != 0), None
    moved = update[places].abs_()
    above = None
    if wide is not None:
        above = int(torch.count_nonzero(moved > wide[places].abs_().mul_(RELATIVE)))
    return Update(
        elements=update.numel(),
        changed=len(places),
        above_absolute=int(torch.count_nonzero(moved > ABSOLUTE)),
        above_relative=above,
        ulps=ulps,
        squares=[float(torch.dot(moved, moved))],
        weights=[float(torch.dot(wide, wide))] if wide is not None else None,
        largest=float(moved.max()) if len(places) else 0.0,
    )


def measure_pair(update: Tensor, other: Tensor) -> Pair:
    """Measure two updates of the same elements, in float64."""
    product = update * other
    signs = torch.sign(update).to(torch.int8).mul_(torch.sign(other).to(torch.int8))
    return Pair(
        squares=[float(torch.dot(other, other))],
        products=[float(torch.dot(update, other))],
        spread=[float(torch.dot(product, product))],
        changed=int(torch.count_nonzero(other)),
        both=int(torch.count_nonzero(signs)),
        opposite=int(torch.count_nonzero(signs < 0)),
    )


def _ulps(before: Tensor, after: Tensor) -> list[int]:
    distance = (_ordered(after) - _ordered(before)).abs_()
    distance[distance < 0] = torch.iinfo(torch.int64).max  # of float64, half of all numbers apart
    classes = torch.bucketize(distance, torch.tensor(ULP_EDGES))
    return [int(count) for count in torch.bincount(classes, minlength=len(ULP_EDGES) + 1)]


def _ordered(values: Tensor) -> Tensor:
    """Integers (int64) in the order of the numbers, neighbors one apart, both zeros at 0."""
    bits = bit_view(values)
    negative = torch.iinfo(bits.dtype).min - bits.to(torch.int64)
    return torch.where(bits < 0, negative, bits.to(torch.int64))


def add_up(parts: Iterable[Update | Pair]) -> Any:
    """Return the sum of updates, or of pairs. A figure that one of them lacks is missing in the sum."""
    parts = list(parts)
    total = type(parts[0])()
    for item in fields(total):
        values = [getattr(part, item.name) for part in parts]
        if any(value is None for value in values):
            result: Any = None
        elif item.name == "largest":
            result = max(values)
        elif item.name == "ulps":
            result = [sum(column) for column in zip(*values, strict=True)]
        elif isinstance(values[0], list):
            result = [sum_ for value in values for sum_ in value]
        else:
            result = sum(values)
        setattr(total, item.name, result)
    return total


def describe(update: Update, pair: Pair | None, whole: float) -> dict[str, Any]:
    """Return the figures of a tensor or a group. whole: the sum of v^2 over the whole model. Keys as in
    docs/metrics.md."""
    count, squares = update.elements, math.fsum(update.squares)
    figures: dict[str, Any] = {
        "elements": count,
        "changed": _share(update.changed, count),
        "above_absolute": _share(update.above_absolute, count),
        "above_relative": _share(update.above_relative, count),
        "ulps": update.ulps,
        "norm": math.sqrt(squares),
        "largest": update.largest,
        "norm_ratio": update.norm_ratio,
        "energy": _share(squares, whole),
        "input_rounding": _floor(update.rounding, squares),
        "input_rounding_added": _floor(update.rounding_added, squares),
        "input_precisions": sorted(set(update.precisions)) if update.precisions is not None else None,
    }
    if pair is None:
        return figures
    others, product = math.fsum(pair.squares), math.fsum(pair.products)
    norms = math.sqrt(squares) * math.sqrt(others)
    cosine = product / norms if norms else None
    conflict = _share(pair.opposite, pair.both)
    spread = math.fsum(pair.spread)
    return {
        **figures,
        "other_norm": math.sqrt(others),
        "updates_ratio": _share(math.sqrt(squares), math.sqrt(others)),
        "cosine": cosine,
        "cosine_z": cosine * math.sqrt(count) if cosine is not None else None,
        "cosine_z_signs": product / math.sqrt(spread) if spread and math.isfinite(spread) else None,
        "conflict": conflict,
        "conflict_z": (conflict - 0.5) * 2 * math.sqrt(pair.both) if conflict is not None else None,
        "overlap": _share(pair.both, update.changed),
        "overlap_chance": _share(pair.changed, count),
    }


def _floor(errors: Sequence[float] | None, squares: float) -> float | None:
    return floor(errors, math.sqrt(squares)) if errors is not None else None


def _share(part: float | None, whole: float) -> float | None:
    return part / whole if whole and part is not None else None


def describe_all(rows: Mapping[str, tuple[Update, Pair | None]], groups: Mapping[str, list[str]]) -> dict[str, Any]:
    """Return the figures of every group of tensors; `groups` maps a label to tensor names."""
    whole = math.fsum(square for update, _ in rows.values() for square in update.squares)
    figures = {}
    for label, names in groups.items():
        found = [rows[name] for name in names if name in rows]
        if found:
            pairs = [pair for _, pair in found if pair is not None]
            update = add_up(update for update, _ in found)
            figures[label] = {"tensors": len(found), **describe(update, add_up(pairs) if pairs else None, whole)}
    return figures
