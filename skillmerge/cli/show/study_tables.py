"""Terminal tables of what `inspect` measured."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from skillmerge.cli.console import Text
from skillmerge.cli.show import tables
from skillmerge.cli.show.figures import FIGURES, SPECTRAL, show
from skillmerge.cli.show.terminal import new_table, statistics_table
from skillmerge.naming import MODULE_KINDS, module_kind
from skillmerge.plans.depth import bars, number
from skillmerge.study.inspect import FIGURES_OF_TWO

if TYPE_CHECKING:
    from skillmerge.study.inspect import Inspection


_ONE_UPDATE = ("elements", "changed", "above_absolute", "above_relative", "norm", "norm_ratio", "energy")
_ROUNDING = ("input_rounding", "input_rounding_added")
_EACH = ("changed", "norm", "norm_ratio", *_ROUNDING)
_PAIR = ("cosine", "cosine_z_signs", "conflict", "overlap", "overlap_chance", "updates_ratio")
_CHANCE = """\
z counts standard deviations from chance, which is a cosine of 0 give or take 1/sqrt(n), and opposite signs
in 50%. A cosine near 0 is what any two unrelated updates have: it alone shows little."""


def show_inspection(found: Inspection, out: Console) -> None:
    """What changed, by module and over depth; how two updates lie to each other; what rounding will do."""
    out.print(Text(found.title, style="bold"), soft_wrap=True)
    rows = {**found.modules, "all": found.total}
    out.print(_figures(f"the update, {found.update}", rows, _ONE_UPDATE))
    if found.updates:
        _show_each(found, out)
    elif found.total.get("input_rounding") is not None:
        title = f"rounding of the models ({' and '.join(found.total['input_precisions'])})"
        out.print(_figures(title, rows, _ROUNDING))
    if ulps := tables.ulps(found.total["ulps"]):
        told = ", ".join(f"{row.label('-')}: {row.share:.1%}" for row in ulps if row.count)
        out.print(Text(f"changed by units in the last place: {told}"), soft_wrap=True)
    if found.second is not None:
        out.print(_figures(f"beside the target's own update, {found.second}", rows, FIGURES_OF_TWO))
        out.print(Text(_CHANCE))
    for key, what in (("changed", "changed"), ("norm_ratio", "of weights' norm"), ("cosine_z", "cosine's z")):
        _show_map(found, key, what, out)
    if found.spectra:
        out.print(_spectra_table(found.spectra))
    if found.forecast is not None:
        _show_forecast(found.forecast, out)
    for note in found.notes:
        out.print(Text(f"note: {note}", style="yellow"), soft_wrap=True)


def _show_each(found: Inspection, out: Console) -> None:
    """Each of several updates, and every two of them; of a single pair its modules too."""
    each = {label: row["all"] for label, row in found.updates.items()}
    out.print(_figures("each update by itself", each, _EACH, first="update"))
    for pair in found.pairs if len(found.pairs) == 1 else ():
        rows = {**pair["modules"], "all": pair["all"]}
        out.print(_figures(f"{pair['first']} beside {pair['second']}", rows, _PAIR))
    if len(found.pairs) > 1:
        two = {f"{pair['first']} | {pair['second']}": pair["all"] for pair in found.pairs}
        out.print(_figures("every two updates", two, _PAIR, first="pair"))
    out.print(Text(_CHANCE))


def _spectra_table(spectra: Mapping[str, Mapping[str, float | None]]) -> Table:
    """Medians over the matrices of a kind."""
    kinds: dict[str, list[Mapping[str, float | None]]] = {}
    for name, row in spectra.items():
        kinds.setdefault(module_kind(name), []).append(row)
    rows = {}
    for kind, found in kinds.items():
        rows[kind] = {"matrices": len(found), **{key: _median([row[key] for row in found]) for key in SPECTRAL}}

    return _figures("directions (medians over matrices)", rows, tuple(SPECTRAL), "matrices")


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _show_forecast(forecast: Mapping[str, Any], out: Console) -> None:
    if forecast["curves"]:
        title = "what rounding would do" + (" (sampled)" if forecast["mode"] == "sampled" else "")
        heads = [head for mode in forecast["curves"] for head in (f"{mode}: realised", "vanished")]
        table = new_table(("lambda", *heads), title, left=())
        points = {
            mode: {point["lambda"]: point for point in kinds["all"]} for mode, kinds in forecast["curves"].items()
        }
        for lam in forecast["grid"][1::2]:
            cells = [cell for mode in points for cell in (show(points[mode][lam]["realised"], "number"),
                                                          show(points[mode][lam]["vanished"], "share"))]  # fmt: skip
            table.add_row(number(lam), *cells)
        out.print(table)
    if forecast["as_planned"] is not None and forecast["as_planned"].all.changed is not None:
        out.print(statistics_table(forecast["as_planned"], "what rounding will do, as the recipe is"))


def _figures(
    title: str,
    rows: Mapping[str, Mapping[str, Any]],
    keys: Sequence[str],
    counted: str = "tensors",
    first: str = "module",
) -> Table:
    """A row for each module, or whatever `first` calls them; `counted` is the key of how many there are."""
    known = {**FIGURES, **SPECTRAL}
    table = new_table((first, counted, *(known[key].label for key in keys)), title, left=(first,))
    table.columns[0].no_wrap = first == "module"
    for label, row in rows.items():
        table.add_row(Text(label), str(row[counted]), *(show(row[key], known[key].unit) for key in keys))
    return table


def _show_map(found: Inspection, key: str, what: str, out: Console) -> None:
    """A small heat map of each stack: kinds of module below each other, layers side by side, on one scale."""
    stacks: dict[str, dict[str, dict[int, float]]] = {}
    for groups in (found.cells, {f"{label} all": row for label, row in found.layers.items()}):
        for label, figures in groups.items():
            place, _, kind = label.rpartition(" ")
            stack, _, layer = place.rpartition(" ")
            if layer.isdecimal() and figures.get(key) is not None:
                stacks.setdefault(stack, {}).setdefault(kind, {})[int(layer)] = figures[key]
    for stack, kinds in stacks.items():
        values = [value for row in kinds.values() for value in row.values()]
        layers = sorted({layer for row in kinds.values() for layer in row})
        low, high = min(0.0, *values), max(0.0, *values)
        told = f"{what} over {stack} {layers[0]} to {layers[-1]}: {number(min(values))} to {number(max(values))}"
        out.print(Text(told))
        for kind in (kind for kind in (*MODULE_KINDS, "other", "all") if kind in kinds):
            out.print(Text(f"  {kind:10} {bars([kinds[kind].get(layer) for layer in layers], low, high)}"))
