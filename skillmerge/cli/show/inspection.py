"""Terminal tables of what `inspect` measured."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from skillmerge.cli.console import Text
from skillmerge.cli.show import listings
from skillmerge.cli.show.figures import FIGURES, SPECTRAL, show
from skillmerge.cli.show.merging import statistics_table
from skillmerge.cli.show.sentences import sentences
from skillmerge.cli.show.table import Table
from skillmerge.naming import MODULE_KINDS, module_kind
from skillmerge.plans.depth import a_mark, bars, number
from skillmerge.study.groups import ALL_LAYERS
from skillmerge.study.inspect import FIGURES_OF_TWO
from skillmerge.tensors import percent

if TYPE_CHECKING:
    from skillmerge.study.adapters import AdapterRow
    from skillmerge.study.inspect import Inspection


_ONE_UPDATE = ("elements", "changed", "above_absolute", "above_relative", "norm", "norm_ratio", "energy")
_ROUNDING = ("input_rounding", "input_rounding_added")
_BRIEF = ("elements", "changed", "norm", "norm_ratio", "energy")
_LEAST = ("tensors", "elements", "matrices", "above 1e-5")
"""Columns that a narrow terminal drops first."""
_EACH = ("changed", "norm", "norm_ratio", *_ROUNDING)
_PAIR = ("cosine", "cosine_z_signs", "conflict", "overlap", "overlap_chance", "updates_ratio")
_CHANCE = """\
z counts standard deviations from chance. Two unrelated updates have a cosine of 0 (give or take 1/sqrt(n)) and \
opposite signs in 50% of the elements, so a cosine near 0 alone shows little."""


def show_inspection(found: Inspection, out: Console, details: bool = False) -> None:
    """Show what changed, in sentences and by module, and the effect of rounding. details: every figure."""
    out.print(Text(found.title, style="bold"), soft_wrap=True)
    for sentence in sentences(found):
        out.print(Text(sentence))
    out.print()
    rows = {**found.modules, "all": found.total}
    out.print(_figures(f"Update, {found.update}", rows, _ONE_UPDATE if details else _BRIEF))
    for name, adapter in found.adapters.items():
        out.print(_adapter_table(name, adapter))
    if found.updates:
        _show_each(found, out)
    if details:
        _show_details(found, rows, out)
    if found.spectra:
        out.print(_spectra_table(found.spectra))
    if found.forecast is not None:
        _show_forecast(found.forecast, out, details)
    for note in found.notes:
        out.print(Text(f"note: {note}"), soft_wrap=True)


def _adapter_table(name: str, rows: Sequence[AdapterRow]) -> Table:
    """Return the ranks and scales of an adapter by kind of module."""
    table = Table(("module", "matrices", "rank", "scale", "share changed"), f"Adapter {name}", text=("module",))
    for row in rows:
        ends = (dict.fromkeys(f"{value:g}" for value in pair) for pair in (row.ranks, row.scales))
        ranks, scales = map(" to ".join, ends)
        table.add_row(row.module, str(row.matrices), ranks, scales, percent(row.share))
    return table


def _show_details(found: Inspection, rows: Mapping[str, Mapping[str, Any]], out: Console) -> None:
    """Show how the models were rounded, how far elements moved, the second update, and maps over depth."""
    if not found.updates and found.total.get("input_rounding") is not None:
        precisions = " and ".join(found.total["input_precisions"])
        out.print(_figures(f"Rounding of the inputs ({precisions})", rows, _ROUNDING))
    if ulps := listings.ulps(found.total["ulps"]):
        shares = ", ".join(f"{row.label('-')}: {row.share:.1%}" for row in ulps if row.count)
        out.print(Text(f"\nchanged by units in the last place: {shares}\n"))
    if found.second is not None:
        out.print(_figures(f"Beside the target's own update, {found.second}", rows, FIGURES_OF_TWO))
        out.print(Text(f"\n{_CHANCE}"))
    for key in ("changed", "norm_ratio", "cosine_z"):
        _show_map(found, key, out)
    for key in ("changed", "norm_ratio"):
        _show_experts(found, key, out)


def _show_each(found: Inspection, out: Console) -> None:
    """Show each of several updates and every pair; for a single pair, its modules too."""
    each = {label: row["all"] for label, row in found.updates.items()}
    out.print(_figures("Each update", each, _EACH, first="update"))
    for pair in found.pairs if len(found.pairs) == 1 else ():
        rows = {**pair["modules"], "all": pair["all"]}
        out.print(_figures(f"{pair['first']} beside {pair['second']}", rows, _PAIR))
    if len(found.pairs) > 1:
        two = {f"{pair['first']} | {pair['second']}": pair["all"] for pair in found.pairs}
        out.print(_figures("Every pair of updates", two, _PAIR, first="pair"))
    out.print(Text(_CHANCE))


def _spectra_table(spectra: Mapping[str, Mapping[str, float | None]]) -> Table:
    """Return medians over the matrices of each kind."""
    kinds: dict[str, list[Mapping[str, float | None]]] = {}
    for name, row in spectra.items():
        kinds.setdefault(module_kind(name), []).append(row)
    rows = {}
    for kind, found in kinds.items():
        rows[kind] = {"matrices": len(found), **{key: _median([row[key] for row in found]) for key in SPECTRAL}}

    return _figures("Directions (medians over matrices)", rows, tuple(SPECTRAL), "matrices")


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _show_forecast(forecast: Mapping[str, Any], out: Console, details: bool) -> None:
    if forecast["curves"] and (details or forecast["as_planned"] is None):
        title = "Effect of rounding" + (" (sampled)" if forecast["mode"] == "sampled" else "")
        heads = [f"{mode}: {what}" for mode in forecast["curves"] for what in ("effective λ", "lost")]
        table = Table(("λ", *heads), title, text=())
        points = {
            mode: {point["lambda"]: point for point in kinds["all"]} for mode, kinds in forecast["curves"].items()
        }
        for lam in forecast["grid"][1::2]:
            cells = [cell for mode in points for cell in (show(points[mode][lam]["realised"], "number"),
                                                          show(points[mode][lam]["vanished"], "share"))]  # fmt: skip
            table.add_row(number(lam), *cells)
        out.print(table)
    if forecast["as_planned"] is not None and forecast["as_planned"].all.changed is not None:
        out.print(statistics_table(forecast["as_planned"], "Effect of rounding in this recipe"))


def _figures(
    title: str,
    rows: Mapping[str, Mapping[str, Any]],
    keys: Sequence[str],
    counted: str = "tensors",
    first: str = "module",
) -> Table:
    """Return a row for each module, or whatever `first` calls them; `counted` is the key of how many there are."""
    known = {**FIGURES, **SPECTRAL}
    table = Table((first, counted, *(known[key].label for key in keys)), title, text=(first,), drop=_LEAST)
    for label, row in rows.items():
        table.add_row(Text(label), str(row[counted]), *(show(row[key], known[key].unit) for key in keys))
    return table


def _show_experts(found: Inspection, key: str, out: Console) -> None:
    """Show a figure over the experts of a layer, all layers together, and where it is largest."""
    over: dict[int, float] = {}
    for label, figures in found.experts.items():
        place, _, expert = label.rpartition(" ")
        if place == ALL_LAYERS and figures.get(key) is not None:
            over[int(expert)] = figures[key]
    if not over:
        return
    figure, values = FIGURES[key], list(over.values())
    cells = {it: row[key] for it, row in found.experts.items() if row.get(key) is not None}
    place, _, expert = max(
        (it for it in cells if not it.startswith(f"{ALL_LAYERS} ")), key=cells.__getitem__
    ).rpartition(" ")
    scale = f"{show(min(values), figure.unit)} to {show(max(values), figure.unit)}{a_mark(len(values), 'experts')}"
    out.print(Text(f"\n{figure.label} over experts {min(over)} to {max(over)}, all layers: {scale}"))
    out.print(Text(bars(values, min(0.0, *values), max(0.0, *values))))
    most = show(cells[f"{place} {expert}"], figure.unit)
    out.print(Text(f"largest: {most} in expert {expert} of {place}"))


def _show_map(found: Inspection, key: str, out: Console) -> None:
    """Show a small heat map of each stack, on one scale: kinds of module as rows, layers as columns."""
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
        unit = FIGURES[key].unit
        scale = f"{show(min(values), unit)} to {show(max(values), unit)}{a_mark(len(layers))}"
        out.print(Text(f"\n{FIGURES[key].label} over {stack} {layers[0]} to {layers[-1]}: {scale}"))
        for kind in (kind for kind in (*MODULE_KINDS, "other", "all") if kind in kinds):
            out.print(Text(f"{kind:10} {bars([kinds[kind].get(layer) for layer in layers], low, high)}"))
