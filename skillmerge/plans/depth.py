"""Coefficients over a model's depth: by layer and kind of module, and as a picture of one line.

Works on names, shapes and numbers, so that a plan and a manifest are shown alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from skillmerge.naming import MODULE_KINDS, expert_of, layer_of, module_kind

_BARS = "▁▂▃▄▅▆▇█"
_MARKS = 48
"""Most marks of a picture, so that it fits beside its name in a terminal of 60 columns."""

_WRAPPED = "base_model.model."
"""How the names of an adapter's tensors begin, before those of the model."""


@dataclass(frozen=True, slots=True)
class Depth:
    """One coefficient. kinds: the columns; rows: (label, cells by kind); pictures: (stack, picture), the last one over
    the experts of a layer, where they differ."""

    kinds: tuple[str, ...]
    rows: tuple[tuple[str, Mapping[str, str]], ...]
    pictures: tuple[tuple[str, str], ...]


def over_depth(values: Iterable[tuple[str, Sequence[int], float]]) -> Depth:
    """`values`: name, shape and coefficient of every tensor that has one, or of every expert in it. Equal neighboring
    layers share a row."""
    cells: dict[tuple[str, int], dict[str, set[float]]] = {}
    means: dict[str, dict[int, list[tuple[float, int]]]] = {}
    outside: dict[str, set[float]] = {}
    experts: dict[int, list[tuple[float, int]]] = {}
    for name, shape, value in values:
        if (expert := expert_of(name)) is not None:
            experts.setdefault(expert, []).append((value, math.prod(shape)))
        layer, kind = layer_of(name.removeprefix(_WRAPPED)), module_kind(name)
        row = cells.setdefault(layer, {}) if layer else outside
        row.setdefault(kind, set()).add(value)
        if layer:
            means.setdefault(layer[0], {}).setdefault(layer[1], []).append((value, math.prod(shape)))
    kinds = tuple(kind for kind in (*MODULE_KINDS, "other") if any(kind in row for row in (*cells.values(), outside)))
    rows, pictures = [], []
    for stack, layers in means.items():
        found = {layer: cells[stack, layer] for layer in sorted(layers)}
        pictures.append((stack, picture({layer: _mean(layers[layer]) for layer in found})))
        for row, group in groupby(found, key=found.__getitem__):
            first, *others = group
            label = f"{stack} {first}-{others[-1]}" if others else f"{stack} {first}"
            rows.append((label, {kind: _range(row.get(kind)) for kind in kinds}))
    if outside:
        rows.append(("outside blocks", {kind: _range(outside.get(kind)) for kind in kinds}))
    over_experts = {expert: _mean(experts[expert]) for expert in sorted(experts)}
    if len({*over_experts.values()}) > 1:
        pictures.append(("experts", picture(over_experts, "experts")))
    return Depth(kinds, tuple(rows), tuple(pictures))


def number(value: float) -> str:
    """Return a coefficient for people."""
    return f"{value:.3g}"


def _mean(values: list[tuple[float, int]]) -> float:
    """Return the mean over a layer's elements, in which a small norm counts little."""
    return sum(value * count for value, count in values) / max(1, sum(count for _, count in values))


def picture(means: Mapping[int, float], what: str = "layers") -> str:
    """Return numbers over layers, or `what` else, drawn between the smallest (or 0) and the largest (or 0)."""
    low, high = min(0.0, *means.values()), max(0.0, *means.values())
    drawn = f"{min(means)} {bars(list(means.values()), low, high)} {max(means)}"
    scale = f"{number(min(means.values()))} to {number(max(means.values()))}"
    return f"{drawn}  ({scale}{a_mark(len(means), what)})"


def bars(values: Sequence[float | None], low: float, high: float) -> str:
    """Return one mark for each value, between low and high; a dot where there is none.

    Of more values than there is room for, neighbors share a mark: their mean.
    """
    span, each = high - low or 1.0, _each(len(values))
    means = []
    for first in range(0, len(values), each):
        known = [value for value in values[first : first + each] if value is not None]
        means.append(sum(known) / len(known) if known else None)
    return "".join("·" if mean is None else _BARS[round((mean - low) / span * (len(_BARS) - 1))] for mean in means)


def a_mark(count: int, what: str = "layers") -> str:
    """Return `, 3 layers a mark` where layers share marks, otherwise nothing."""
    return f", {_each(count)} {what} a mark" if count > _MARKS else ""


def _each(values: int) -> int:
    return max(1, math.ceil(values / _MARKS))


def _range(found: set[float] | None) -> str:
    if not found:
        return "-"
    return number(min(found)) if len(found) == 1 else f"{number(min(found))} … {number(max(found))}"
