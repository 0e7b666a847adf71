"""Results in notebooks: the report's headlines, tables and maps as one small piece of HTML with styles of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from skillmerge.cli.show import sentences
from skillmerge.cli.show.report import tables
from skillmerge.cli.show.report.headlines import cards, title
from skillmerge.cli.show.report.heat_maps import HeatMap, draw, maps_of
from skillmerge.cli.show.report.html import collapsed, escaped, prose, read, table
from skillmerge.cli.show.report.remarks import remarks_list
from skillmerge.cli.show.report.sweeps import candidates
from skillmerge.tensors import format_bytes

if TYPE_CHECKING:
    from skillmerge.plans.plan import Plan
    from skillmerge.study.gates import GateReport
    from skillmerge.study.inspect import Inspection
    from skillmerge.verbs.demo.demo import Demo
    from skillmerge.verbs.result import Result
    from skillmerge.verbs.sweep.sweep import Sweep

_CELLS = 800
"""Cells of all maps together, so that a saved notebook stays small; the report has all."""

_MODULE_FIGURES = ("elements", "changed", "norm", "norm_ratio", "energy", "cosine", "conflict")


def fragment(result: Any) -> str:
    """Return a result of a verb as HTML that stands by itself. Colors follow those of the notebook."""
    draw_one = _DRAWINGS.get(type(result).__name__, _facts)
    return f'<div class="skillmerge"><style>{read("parts.css")}</style>{"".join(draw_one(result))}</div>'


def _plan(plan: Plan) -> Iterator[str]:
    yield _head(title(plan=plan), str(plan.recipe.document.data["merge"]))
    yield cards(sentences.of_plan(plan))
    yield remarks_list(plan)
    yield _maps(maps_of(plan))


def _result(result: Result) -> Iterator[str]:
    manifest = result.manifest
    yield _head(title(plan=result.plan, manifest=manifest), manifest.expression)
    yield cards(sentences.of_merge(manifest))
    yield remarks_list(warned=result.warnings)
    done = "already up to date" if result.already else f"{result.seconds:.1f} s"
    where = f" on {escaped(result.device)}" if result.device else ""
    yield f"<p>{escaped(result.shown)}: {format_bytes(manifest.size)}, {done}{where}</p>"
    yield tables.gates_table(result.gates)
    yield collapsed("Effect of rounding, by module", tables.rounding_table(manifest.statistics))
    yield _maps(maps_of(manifest=manifest))


def _inspection(found: Inspection) -> Iterator[str]:
    yield _head(title(inspection=found), found.update)
    yield cards(sentences.of_inspection(found))
    yield remarks_list(inspection=found)
    yield collapsed("By module", tables.modules_table(found, _MODULE_FIGURES))
    yield _maps(maps_of(inspection=found))


def _sweep(sweep: Sweep) -> Iterator[str]:
    yield _head(title(sweep=sweep), str(sweep.recipe.document.data["merge"]))
    yield cards(sentences.of_sweep(sweep))
    yield candidates(sweep)


def _demo(demo: Demo) -> Iterator[str]:
    rows = ((escaped(row.name), f"{row.greedy:.1%}", f"{row.sampled:.1%}") for row in demo.answers)
    yield table(("model", "greedy", "sampled"), rows, caption="Questions answered correctly")


def _gates(report: GateReport) -> Iterator[str]:
    yield tables.gates_table(report.outcomes)


def _facts(result: Any) -> Iterator[str]:
    """Plain values as they are, and how many items there are of others."""
    yield table(
        (type(result).__name__, ""), ((escaped(key), _value(it)) for key, it in result.as_dict().items()), (0, 1)
    )


_DRAWINGS: dict[str, Callable[[Any], Iterator[str]]] = {
    "Plan": _plan, "Preview": _plan, "Result": _result, "Inspection": _inspection, "Sweep": _sweep,
    "GateReport": _gates, "Demo": _demo,
}  # fmt: skip


def _head(what: str, expression: str) -> str:
    return f"<p><b>{escaped(what)}</b> <code>{escaped(expression)}</code></p>"


def _maps(maps: Sequence[HeatMap]) -> str:
    """As many maps as there is room for."""
    drawn: list[str] = []
    room = _CELLS
    for each in maps:
        room -= len(each.values)
        if room >= 0 or not drawn:
            drawn.append(draw(each))
    return collapsed("By layer and module", f'<div class="maps">{"".join(drawn)}</div>' if drawn else "")


def _value(value: Any) -> str:
    if isinstance(value, Mapping | list | tuple):
        return f"{len(value)} item{'s' if len(value) != 1 else ''}"
    return "–" if value is None else prose(str(value))
