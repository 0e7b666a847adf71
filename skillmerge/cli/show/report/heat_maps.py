"""The report's maps: a number for each layer and kind of module, on a color that shows where it is large."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from skillmerge.cli.show.figures import FIGURES, FORECAST, show
from skillmerge.cli.show.report.html import cell_of, escaped, scrolling
from skillmerge.engine.measures.cells import DEVIATION, cells, rows_of
from skillmerge.naming import MODULE_KINDS, expert_of, layer_label
from skillmerge.outputs.manifest import ManifestBody
from skillmerge.plans.plan import Plan
from skillmerge.study.groups import ALL_LAYERS
from skillmerge.study.inspect import Inspection

LEAST_SPAN = 2 * DEVIATION
"""A map around 1 has its full colors at least this far from it, so that small differences look small."""

STEPS = 10
"""Depths of a color; `parts.css` has one class for each."""

_COLUMNS = 32
"""Most columns of a map over experts."""

_KINDS = (*MODULE_KINDS, "other")
_OUTSIDE = "outside blocks"

Cells = Mapping[tuple[str, str], float]
"""A number for each layer (`model.layers 7`) and kind of module."""


@dataclass(frozen=True, slots=True)
class HeatMap:
    """One map. center: the number without a color, blue above and orange below. off: the cells set in bold. columns:
    those of a map that is not over kinds of module."""

    title: str
    what: str
    values: Cells
    unit: str = "number"
    center: float = 0.0
    off: Collection[tuple[str, str]] = ()
    columns: Sequence[str] = ()

    @property
    def most(self) -> float:
        """How far from the center the color is full."""
        least = LEAST_SPAN if self.center else 0.0
        return max([least, *(abs(value - self.center) for value in self.values.values())]) or 1.0


def maps_section(plan: Plan | None, manifest: ManifestBody | None, inspection: Inspection | None) -> str:
    """Return all maps as HTML; nothing where there are none."""
    maps = maps_of(plan, manifest, inspection)
    if not maps:
        return ""
    width = ' class="wide"' if len(maps) > 1 else ""
    inner = "".join(map(draw, maps))
    return f'<section{width}><h2>By layer and module</h2><div class="maps">{inner}</div></section>'


def maps_of(
    plan: Plan | None = None, manifest: ManifestBody | None = None, inspection: Inspection | None = None
) -> list[HeatMap]:
    """Return the maps of what was measured, before those of what was requested."""
    found = [*(_of_manifest(manifest) if manifest is not None else ())]
    found += _of_inspection(inspection) if inspection is not None else ()
    return [*found, *(_of_plan(plan) if plan is not None else ())]


def _of_plan(plan: Plan) -> Iterator[HeatMap]:
    for index, name in enumerate(plan.coefficients):
        found: dict[tuple[str, str], list[float]] = {}
        for tensor, _, values in (row for planned in plan.tensors.values() for row in planned.rows):
            if index < len(values):
                found.setdefault(cell_of(tensor), []).append(values[index])
        means = {cell: sum(values) / len(values) for cell, values in found.items()}
        yield HeatMap(f"{name}, as requested", "mean over the tensors of a cell", means)
        rows = [row for planned in plan.tensors.values() for row in planned.rows if index < len(row[2])]
        experts = {
            (layer_label(it), expert): row[index] for it, _, row in rows if (expert := expert_of(it)) is not None
        }
        if len({*experts.values()}) > 1:
            yield _over_experts(f"{name} by expert, as requested", "mean over the experts of a cell", experts)


def _of_manifest(manifest: ManifestBody) -> Iterator[HeatMap]:
    found = {cell_of(cell.names[0]): cell for cell in cells(rows_of(manifest.tensors))}
    effective = {place: cell.group.realised for place, cell in found.items() if cell.group.realised is not None}
    if effective:
        off = {place for place, cell in found.items() if cell.is_off}
        yield HeatMap("effective λ / requested λ", "1 is what the recipe requests", effective, center=1.0, off=off)
    lost = {place: cell.group.vanished for place, cell in found.items() if cell.group.vanished is not None}
    if lost:
        yield HeatMap("lost", FORECAST["vanished"].formula, lost, "share")


def _of_inspection(inspection: Inspection) -> Iterator[HeatMap]:
    for key in ("changed", "norm_ratio", "cosine_z"):
        found = {}
        for label, row in inspection.cells.items():
            layer, _, kind = label.rpartition(" ")
            if row.get(key) is not None:
                found[layer, kind] = row[key]
        if found:
            figure = FIGURES[key]
            yield HeatMap(figure.label, figure.formula, found, figure.unit)
    for key in ("changed", "norm_ratio"):
        experts = {}
        for label, row in inspection.experts.items():
            layer, _, expert = label.rpartition(" ")
            if layer != ALL_LAYERS and row.get(key) is not None:
                experts[layer, int(expert)] = row[key]
        if experts:
            figure = FIGURES[key]
            yield _over_experts(f"{figure.label} by expert", figure.formula, experts, figure.unit)


def _over_experts(title: str, what: str, values: Mapping[tuple[str, int], float], unit: str = "number") -> HeatMap:
    """Return a map of layers and experts. Of more experts than there is room for, neighbors share a column: their
    mean."""
    count = 1 + max(expert for _, expert in values)
    each = -(-count // _COLUMNS)
    found: dict[tuple[str, str], list[float]] = {}
    for (layer, expert), value in sorted(values.items(), key=lambda item: item[0][1]):
        first = expert // each * each
        last = min(first + each, count) - 1
        found.setdefault((layer, f"{first}–{last}" if last > first else str(first)), []).append(value)
    columns = tuple(dict.fromkeys(column for _, column in found))
    means = {cell: sum(numbers) / len(numbers) for cell, numbers in found.items()}
    return HeatMap(title, what, means, unit, columns=columns)


# Drawing.


def draw(drawn: HeatMap) -> str:
    """Return a map as HTML: layers below each other, kinds of module side by side. Equal layers share a row."""
    kinds = list(drawn.columns) or [kind for kind in _KINDS if any(kind == found for _, found in drawn.values)]
    places = sorted({layer for layer, _ in drawn.values}, key=_order)
    stacks = {_split(layer)[0] for layer in places} - {_OUTSIDE}
    body = []
    for stack, layers in groupby(places, key=lambda layer: _split(layer)[0]):
        if len(stacks) > 1 and stack != _OUTSIDE:
            body.append(f"<tr><th class=stack scope=rowgroup colspan={len(kinds) + 1}>{escaped(stack)}")
        body += _rows(drawn, list(layers), kinds)
    corner = "layer" if len(stacks) > 1 or not stacks else f'<abbr title="{escaped(*stacks)}">layer</abbr>'
    head = "".join(f"<th scope=col>{kind}" for kind in kinds)
    told = f"<b>{escaped(drawn.title)}</b> <span class=soft>{escaped(drawn.what)}</span><br>{_legend(drawn)}"
    return scrolling(
        f"<table class=heat><caption>{told}</caption>"
        f"<thead><tr><th scope=col>{corner}{head}<tbody>{''.join(body)}</table>",
        " tall",
    )


def _rows(drawn: HeatMap, layers: list[str], kinds: list[str]) -> Iterator[str]:
    cells = {layer: "".join(_cell(drawn, (layer, kind)) for kind in kinds) for layer in layers}
    for row, group in groupby(layers, key=cells.__getitem__):
        first, *others = (_split(layer)[1] for layer in group)
        yield f"<tr><th scope=row>{first}{f'–{others[-1]}' if others else ''}{row}"


def _cell(drawn: HeatMap, place: tuple[str, str]) -> str:
    if place not in drawn.values:
        return "<td>"
    value = drawn.values[place]
    shown = show(value, drawn.unit)
    return f"<td{_tint(drawn, value)}>{f'<b>{shown}</b>' if place in drawn.off else shown}"


def _legend(drawn: HeatMap) -> str:
    least = min(drawn.values.values())
    steps = (-1.0, -0.5, 0.0, 0.5, 1.0) if drawn.center or least < 0 else (0.0, 0.5, 1.0)
    values = [drawn.center + step * drawn.most for step in steps]
    marks = "".join(f"<i{_tint(drawn, value)}>{show(value, drawn.unit)}</i>" for value in values)
    bold = f" bold: more than {DEVIATION:.0%} off" if drawn.off else ""
    return f"<span class=legend>{marks}</span>{bold}"


def _tint(drawn: HeatMap, value: float) -> str:
    """The class of a color: `p4` above the center, `n4` below."""
    step = round((value - drawn.center) / drawn.most * STEPS)
    return f" class={'p' if step > 0 else 'n'}{abs(step)}" if step else ""


def _split(layer: str) -> tuple[str, str]:
    """Return the stack and the number of `model.layers 7`. What is outside of layers counts as a stack."""
    if layer == _OUTSIDE:
        return _OUTSIDE, "outside"
    stack, _, index = layer.rpartition(" ")
    return stack, index


def _order(layer: str) -> tuple[bool, str, int]:
    stack, index = _split(layer)
    return (stack == _OUTSIDE, stack, int(index) if index.isdecimal() else 0)
