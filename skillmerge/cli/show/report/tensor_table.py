"""The report's table of all tensors, one row for the experts of a layer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from skillmerge.cli.show.figures import FIGURES, SPECTRAL, show
from skillmerge.cli.show.report.html import abbreviated, cell_of, collapsed, escaped
from skillmerge.naming import module_kind, summarised
from skillmerge.outputs.manifest import ManifestBody
from skillmerge.plans.depth import number
from skillmerge.plans.plan import Plan, TensorPlan
from skillmerge.study.inspect import Inspection

# The table.


@dataclass(frozen=True, slots=True)
class _Column:
    """Of a row's name: what is shown, and for numbers what it is sorted by."""

    head: str
    cell: Callable[[str], tuple[str, float | None]]
    text: bool = False


def tensor_table(plan: Plan | None, manifest: ManifestBody | None, inspection: Inspection | None) -> str:
    """Of every tensor what happens to it, what rounding did, and what was found; experts of a layer share a row."""
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys((*(plan.tensors if plan else ()), *(inspection.tensors if inspection else ()))):
        groups.setdefault(summarised(name), []).append(name)
    if not groups:
        return ""
    columns = [
        _Column("layer", lambda name: (cell_of(name)[0], None), text=True),
        _Column("kind", lambda name: (module_kind(name), None), text=True),
        *(_plan_columns(plan, groups) if plan is not None else ()),
        *(_rounding_columns(manifest) if manifest is not None else ()),
        *(_inspection_columns(inspection, groups) if inspection is not None else ()),
    ]
    head = "".join(
        f'<th scope=col{" class=text" if column.text else ""}><button type="button">{column.head}</button></th>'
        for column in (_Column("tensor", lambda name: (name, None), text=True), *columns)
    )
    # There can be a hundred thousand cells, so optional HTML is left out.
    body = []
    for name in groups:
        cells = [f"<th scope=row>{escaped(name)}"]
        for column in columns:
            shown, value = column.cell(name)
            key = "" if value is None else f"={value:.4g}"
            cells.append(f"<td class=text>{escaped(shown)}" if column.text else f"<td data-v{key}>{shown}")
        body.append(f"<tr>{''.join(cells)}")
    tools = (
        '<div class="tools"><label>Filter <input type="search" placeholder="mlp 12"></label>'
        f"<output>{len(body)} of {len(body)} rows</output>"
        '<button type="button" class="csv">Download as CSV</button></div>'
    )
    inner = (
        f"<p>Experts of one layer share a row, with <code>*</code> for their numbers.</p>{tools}"
        '<p class="paper">On paper only the first columns are shown.</p>'
        f'<div class="scroll tall" tabindex="0"><table class="sortable"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )
    shown = collapsed(f"{len(body)} row{'s' if len(body) != 1 else ''}, to sort, filter and download", inner)
    return f'<section class="wide"><h2>Every tensor</h2>{shown}</section>'


def _plan_columns(plan: Plan, groups: Mapping[str, Sequence[str]]) -> Iterator[_Column]:
    """What is planned; where the experts of a row differ, each way and how many of them."""

    def planned(name: str, of: Callable[[TensorPlan], str]) -> tuple[str, float | None]:
        counts = Counter(of(plan.tensors[member]) for member in groups[name] if member in plan.tensors)
        return ", ".join(f"{what} ×{count}" if len(counts) > 1 else what for what, count in counts.items()), None

    yield _Column("what happens", lambda name: planned(name, lambda tensor: tensor.action), text=True)
    yield _Column("dtype", lambda name: planned(name, lambda tensor: tensor.dtype), text=True)
    yield _Column("from", lambda name: planned(name, lambda tensor: _sources(tensor.sources)), text=True)
    for index, coefficient in enumerate(plan.coefficients):

        def asked(name: str, index: int = index) -> tuple[str, float | None]:
            rows = (row for member in groups[name] if member in plan.tensors for row in plan.tensors[member].rows)
            values = [row[index] for _, _, row in rows if index < len(row)]
            if not values:
                return "–", None
            low, high = min(values), max(values)
            return number(low) if low == high else f"{number(low)} to {number(high)}", high

        yield _Column(escaped(coefficient), asked)


_LABELS = {"realised": "effective / requested λ", "vanished": "lost", "changed": "changed"}


def _rounding_columns(manifest: ManifestBody) -> Iterator[_Column]:
    rounding = _rounding_rows(manifest)
    for key in ("realised", "vanished", "changed") if rounding else ():

        def did(name: str, key: str = key) -> tuple[str, float | None]:
            value = rounding.get(name, {}).get(key)
            return show(value, "number" if key == "realised" else "share"), value

        yield _Column(_LABELS[key], did)


def _inspection_columns(inspection: Inspection, groups: Mapping[str, Sequence[str]]) -> Iterator[_Column]:
    """What was found; of experts the figures of all together, and the mean of what is known of each matrix alone."""
    rows = inspection.summaries
    for key, figure in FIGURES.items():
        if any(row.get(key) is not None for row in rows.values()):

            def measured(name: str, key: str = key, unit: str = figure.unit) -> tuple[str, float | None]:
                value = rows.get(name, {}).get(key)
                return show(value, unit), value

            yield _Column(abbreviated(figure), measured)
    for key, figure in SPECTRAL.items() if inspection.spectra else ():

        def spread(name: str, key: str = key, unit: str = figure.unit) -> tuple[str, float | None]:
            found = [inspection.spectra.get(member, {}).get(key) for member in groups[name]]
            known = [value for value in found if value is not None]
            value = math.fsum(known) / len(known) if known else None
            return show(value, unit), value

        yield _Column(abbreviated(figure), spread)


def _rounding_rows(manifest: ManifestBody) -> dict[str, dict[str, float | None]]:
    """What rounding did to each tensor; the experts of a layer are added up."""
    sums: dict[str, dict[str, float]] = {}
    for tensor in manifest.tensors:
        row = tensor.statistics.whole if tensor.statistics is not None else None
        if row is not None:
            total = sums.setdefault(summarised(tensor.name), {})
            for key, value in row.items():
                total[key] = total.get(key, 0.0) + value
    parts = {"realised": ("du", "uu"), "vanished": ("vanished", "updated"), "changed": ("changed", "elements")}
    return {
        name: {key: row[top] / row[bottom] if row[bottom] else None for key, (top, bottom) in parts.items()}
        for name, row in sums.items()
    }


def _sources(sources: Sequence[tuple[str, str]]) -> str:
    return ", ".join(dict.fromkeys(model for model, _ in sources))
