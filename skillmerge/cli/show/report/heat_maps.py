"""The report's maps: a number for each layer and kind of module, beside a color that shows where it is large."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

from skillmerge.cli.show.figures import FIGURES, show
from skillmerge.cli.show.report.html import cell_of, escaped
from skillmerge.engine.measures.cells import DEVIATION, cells, rows_of
from skillmerge.naming import MODULE_KINDS
from skillmerge.outputs.manifest import ManifestBody
from skillmerge.plans.depth import number
from skillmerge.plans.plan import Plan
from skillmerge.study.inspect import Inspection

LEAST_SPAN = 2 * DEVIATION
"""A map around 1 has its full colors at least this far from it, so that small differences look small."""

_KINDS = (*MODULE_KINDS, "other")

Cells = Mapping[tuple[str, str], float]
"""A number for each layer (`model.layers 7`) and kind of module."""


def maps_section(plan: Plan | None, manifest: ManifestBody | None, inspection: Inspection | None) -> str:
    """All maps; nothing where there are none."""
    maps = [*_plan_maps(plan, manifest), *(_inspection_maps(inspection) if inspection is not None else ())]
    return f'<section><h2>By layer and module</h2><div class="maps">{"".join(maps)}</div></section>' if maps else ""


def _plan_maps(plan: Plan | None, manifest: ManifestBody | None) -> list[str]:
    maps = []
    if plan is not None:
        for index, name in enumerate(plan.coefficients):
            values = {
                tensor.name: tensor.coefficients[index]
                for tensor in plan.tensors.values()
                if index < len(tensor.coefficients)
            }
            maps.append(_heat(f"{name}, as asked", "mean over a cell's tensors", _mean_cells(values), "number"))
    if manifest is not None:
        maps += _rounding_maps(manifest)
    return maps


def _rounding_maps(manifest: ManifestBody) -> Iterator[str]:
    found = {cell_of(cell.names[0]): cell for cell in cells(rows_of(manifest.tensors))}
    realised = {place: cell.group.realised for place, cell in found.items() if cell.group.realised is not None}
    if realised:
        off = {place for place, cell in found.items() if cell.is_off}
        yield _diverging("realised, of what was asked", "measured on the output", realised, off)
    vanished = {place: cell.group.vanished for place, cell in found.items() if cell.group.vanished is not None}
    if vanished:
        yield _heat("vanished", "measured on the output", vanished, "share")


def _inspection_maps(inspection: Inspection) -> Iterator[str]:
    for key in ("changed", "norm_ratio", "cosine_z"):
        cells = {}
        for label, row in inspection.cells.items():
            layer, _, kind = label.rpartition(" ")
            if row.get(key) is not None:
                cells[layer, kind] = row[key]
        if cells:
            figure = FIGURES[key]
            yield _heat(figure.label, figure.formula, cells, figure.unit)


def _mean_cells(values: Mapping[str, float]) -> Cells:
    found: dict[tuple[str, str], list[float]] = {}
    for name, value in values.items():
        found.setdefault(cell_of(name), []).append(value)
    return {cell: sum(numbers) / len(numbers) for cell, numbers in found.items()}


def _heat(title: str, what: str, values: Cells, unit: str) -> str:
    """A map whose cells are tinted by their numbers: blue above 0, orange below."""
    most = max((abs(value) for value in values.values()), default=0.0) or 1.0

    def cell(place: tuple[str, str], value: float) -> str:
        return f"<td{_tint(value, most)}>{show(value, unit)}</td>"

    return _map(title, what, values, cell)


def _diverging(title: str, what: str, values: Cells, off: Collection[tuple[str, str]]) -> str:
    """A map that is white at 1, blue above and orange below, with a legend. off: the cells that are set in bold."""
    most = max(LEAST_SPAN, *(abs(value - 1) for value in values.values()))

    def cell(place: tuple[str, str], value: float) -> str:
        shown = show(value, "number")
        return f"<td{_tint(value - 1, most)}>{f'<b>{shown}</b>' if place in off else shown}</td>"

    steps = (-most, -most / 2, 0.0, most / 2, most)
    legend = "".join(f"<i{_tint(step, most)}>{number(1 + step)}</i>" for step in steps)
    bold = f" Bold: more than {DEVIATION:.0%} off." if off else ""
    return _map(title, what, values, cell, f'<span class="legend">{legend}</span>{bold}')


def _tint(value: float, most: float) -> str:
    side = ' class="neg"' if value < 0 else ""
    return f'{side} style="--p:{abs(value) / most * 100:.0f}%"'


def _map(title: str, what: str, values: Cells, cell: Callable[[tuple[str, str], float], str], legend: str = "") -> str:
    """Layers below each other, kinds of module side by side."""
    kinds = [kind for kind in _KINDS if any(kind == found for _, found in values)]
    layers = list(dict.fromkeys(layer for layer, _ in sorted(values, key=lambda place: _layer_order(place[0]))))
    rows = []
    for layer in layers:
        row = ((layer, kind) for kind in kinds)
        found = "".join(cell(place, values[place]) if place in values else "<td></td>" for place in row)
        rows.append(f"<tr><th scope=row>{escaped(layer)}</th>{found}</tr>")
    head = "".join(f"<th scope=col>{kind}</th>" for kind in kinds)
    return (
        '<div class="scroll" tabindex="0"><table class="heat">'
        f"<caption><b>{escaped(title)}</b> · {escaped(what)}{f'<br>{legend}' if legend else ''}</caption>"
        f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _layer_order(layer: str) -> tuple[bool, str, int]:
    stack, _, index = layer.rpartition(" ")
    return (layer == "outside blocks", stack, int(index) if index.isdecimal() else 0)
