"""The report's tables of figures: by module and layer, of updates, gates and rounding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from skillmerge.cli.show import listings
from skillmerge.cli.show.figures import FIGURES, show
from skillmerge.cli.show.report.html import abbreviated, collapsed, escaped, prose, table
from skillmerge.engine.measures.cells import cells, rows_of
from skillmerge.engine.measures.skill_statistics import SkillStatistics
from skillmerge.engine.rounding_statistics import LOSSES, Statistics
from skillmerge.outputs.manifest import ManifestBody
from skillmerge.outputs.output import Outcome
from skillmerge.study.inspect import FIGURES_OF_TWO, Inspection

Row = tuple[Sequence[str], Mapping[str, Any]]


def rounding_table(statistics: Statistics | SkillStatistics) -> str:
    """Return the effect of rounding by module, or what a skill holds; empty where nothing was measured."""
    if isinstance(statistics, SkillStatistics):
        return table(
            ("module", "elements", "changed", "norm", "stored"),
            ((escaped(name), f"{group.elements:,}", *group.shown) for name, group in statistics.rows),
        )
    measured = [(name, group) for name, group in statistics.rows if group.changed is not None and group.merged]
    return table(("module", *LOSSES), ((escaped(name), *group.shown) for name, group in measured))


def rounding_section(manifest: ManifestBody) -> str:
    statistics = manifest.statistics
    shown = rounding_table(statistics)
    if not shown:
        return ""
    if isinstance(statistics, SkillStatistics):
        return f"<section><h2>The skill</h2>{shown}</section>"
    measured = "every element" if statistics.mode == "full" else "a sample of blocks"
    rows = [(cell.label, cell.group) for cell in cells(rows_of(manifest.tensors)) if cell.group.changed is not None]
    layers = table(("layer and module", *LOSSES), ((escaped(label), *group.shown) for label, group in rows))
    return (
        f"<section><h2>Effect of rounding</h2><p>Measured on {measured}.</p>{shown}"
        f"{collapsed(f'By layer ({len(rows)} rows)', layers)}</section>"
    )


def figures_table(first: Sequence[str], rows: Iterable[Row], keys: Sequence[str], caption: str = "") -> str:
    """Return the figures `keys` of rows that have names; figures that no row has are left out."""
    rows = list(rows)
    keys = [key for key in keys if any(row.get(key) is not None for _, row in rows)]
    return table(
        (*first, *(abbreviated(FIGURES[key]) for key in keys)),
        ((*map(escaped, names), *(show(row.get(key), FIGURES[key].unit) for key in keys)) for names, row in rows),
        range(len(first)),
        caption,
    )


def modules_table(inspection: Inspection, keys: Sequence[str] = tuple(FIGURES)) -> str:
    """Return a row for each figure, by kind of module and of all."""
    columns = {"all": inspection.total, **inspection.modules}
    known = [key for key in keys if any(row.get(key) is not None for row in columns.values())]
    rows = (
        (abbreviated(FIGURES[key]), *(show(row.get(key), FIGURES[key].unit) for row in columns.values()))
        for key in known
    )
    return table(("figure", *columns), rows)


def inspection_section(inspection: Inspection) -> str:
    layers = figures_table(("layer",), [([name], row) for name, row in inspection.layers.items()], tuple(FIGURES))
    return (
        f"<section class=broad><h2>By module</h2>{modules_table(inspection)}"
        f"{collapsed(f'By layer ({len(inspection.layers)} rows)', layers)}</section>"
    )


def updates_sections(inspection: Inspection) -> str:
    """Return the figures of each update, and of every pair."""
    if not inspection.updates:
        return ""
    keys = ("changed", "norm", "norm_ratio", "input_rounding", "input_rounding_added")
    each = [([label], row["all"]) for label, row in inspection.updates.items()]
    two = [([pair["first"], pair["second"], "all"], pair["all"]) for pair in inspection.pairs]
    for pair in inspection.pairs:
        two += [([pair["first"], pair["second"], kind], row) for kind, row in pair["modules"].items()]
    return (
        f"<section><h2>Each update</h2>{figures_table(('update',), each, keys)}</section>"
        f'<section class="wide"><h2>Every two updates</h2>'
        f"{figures_table(('update', 'beside', 'module'), two, FIGURES_OF_TWO)}</section>"
    )


def ulps_section(inspection: Inspection) -> str:
    rows = [
        (row.label(" to "), f"{row.share:.1%}", f"{row.count:,}") for row in listings.ulps(inspection.total.get("ulps"))
    ]
    shown = table(("units", "share", "elements"), rows)
    if not shown:
        return ""
    return (
        "<section class=small><h2>Changes in units in the last place</h2>"
        "<p>How many floating-point numbers lie between an element before and after, of those that changed.</p>"
        f"{shown}</section>"
    )


def gates_table(gates: Sequence[Outcome]) -> str:
    """Return the outcome of each gate, failed ones first."""
    rows = []
    for row in sorted(gates, key=lambda row: row.passed):
        measured = f"{row.measured:.4g}" if row.measured is not None else "–"
        result = "passed" if row.passed else "<strong>FAILED</strong>"
        rows.append((prose(row.gate), prose(row.asked), measured, result, prose(row.detail)))
    head = (*listings.GATE_COLUMNS[:-1], "detail")
    return table(head, rows, range(len(head)))


def gates_section(gates: Sequence[Outcome]) -> str:
    failed = sum(not row.passed for row in gates)
    told = f"{failed} of {len(gates)} failed: nothing was published." if failed else f"All {len(gates)} passed."
    return f'<section class="wide"><h2>Gates</h2><p>{told}</p>{gates_table(gates)}</section>' if gates else ""
