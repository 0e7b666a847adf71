"""The report as one HTML file that asks nothing of a network: heat maps, curves, a table to sort, the recipe.

Made from a plan, a manifest, an inspection, or several of them; computes nothing but how to show it. Every
value stands as a number beside its colour. The figures' meanings come from `figures`.
"""

from __future__ import annotations

import html
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from skillmerge import __version__
from skillmerge.depth import number
from skillmerge.figures import FIGURES, FORECAST, SPECTRAL, Figure, show
from skillmerge.inspection import Inspection
from skillmerge.naming import MODULE_KINDS, block_of, module_kind, summarised
from skillmerge.planning import Plan, TensorPlan
from skillmerge.tensors import ULP_EDGES, format_bytes

if TYPE_CHECKING:
    from skillmerge.sweep import Sweep, Trial

_KINDS = (*MODULE_KINDS, "other")
_LIMITS = """
<p>These figures describe; they do not predict. Sparsity of an update can come from the learning rate and from the
dtype that hides small steps (arXiv 2511.08567). Updates that are nearly orthogonal can still disturb each other:
what lets task vectors be added is disentangled function, not orthogonal weights (arXiv 2305.12827). Measure the
merged model.</p>
"""

Cells = Mapping[tuple[str, str], float]
"""A number for each layer (`model.layers 7`) and kind of module."""


def build(
    title: str,
    *,
    plan: Plan | None = None,
    manifest: Mapping[str, Any] | None = None,
    inspection: Inspection | None = None,
    sweep: Sweep | None = None,
    gates: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The page. plan: what would be done; manifest: what was done; inspection: what the updates look like; sweep:
    what candidates are worth; gates: what became of each, as `gates.Outcome` has it."""
    sections = [_cards(plan, manifest, inspection)]
    if gates:
        sections.append(_gates(gates))
    if sweep is not None:
        sections.append(_sweep(sweep))
    maps = [*_plan_maps(plan, manifest), *_inspection_maps(inspection)]
    if maps:
        sections.append(f'<section><h2>By layer and module</h2><div class="maps">{"".join(maps)}</div></section>')
    if inspection is not None:
        sections += [_depth(inspection), _forecast(inspection), _ulps(inspection)]
    if manifest is not None and manifest["output"].get("kind") != "skill":
        sections.append(_rounding(manifest))
    if plan is not None:
        sections.append(_recipe(plan))
    sections.append(_table(plan, manifest, inspection))
    if inspection is not None:
        sections.append(f"<section><h2>What the figures mean</h2>{_LIMITS}{_glossary()}</section>")
    body = "\n".join(filter(None, sections))
    style, script = ((files("skillmerge") / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(title)}</title><link rel="icon" href="data:,"><style>{style}</style></head>
<body><header><div><h1>{_text(title)}</h1><div class="soft">skillmerge {__version__}</div></div>
<button class="theme" type="button">Light or dark</button></header>
<main>{body}</main><script>{script}</script></body></html>
"""


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _named(figure: Figure) -> str:
    told = f"{figure.formula}\n{figure.meaning}" + (f"\n{figure.source}" if figure.source else "")
    return f'<abbr title="{_text(told)}">{_text(figure.label)}</abbr>'


# Sections.


def _cards(plan: Plan | None, manifest: Mapping[str, Any] | None, inspection: Inspection | None) -> str:
    cards: list[tuple[str, str]] = []
    if plan is not None:
        cards += [("tensors", f"{len(plan.tensors):,}"), ("reads", format_bytes(plan.bytes_read))]
        cards += [("writes", ("at most " if plan.makes_skill else "") + format_bytes(plan.bytes_written))]
    if manifest is not None:
        total = manifest["statistics"]["all"]
        cards += [("asked lambda", show(total.get("asked_lambda"), "number"))]
        cards += [("realised lambda", show(total.get("realised_lambda"), "number"))]
        cards += [("vanished", show(total.get("vanished"), "share")), ("changed", show(total.get("changed"), "share"))]
    if inspection is not None:
        keys = ("elements", "changed", "above_absolute", "above_relative", "norm", "norm_ratio", "cosine", "cosine_z")
        for key in keys:
            if inspection.total.get(key) is not None:
                cards.append((_named(FIGURES[key]), show(inspection.total[key], FIGURES[key].unit)))
    items = "".join(f"<li><b>{_text(value)}</b>{label}</li>" for label, value in cards if value != "–")
    what = ""
    if inspection is not None:
        what = f"<p>The update: <code>{_text(inspection.update)}</code>"
        what += f"; the second: <code>{_text(inspection.second)}</code></p>" if inspection.second else "</p>"
        what += "".join(f"<p>{_text(note)}</p>" for note in inspection.notes)
    return f'<section>{what}<ul class="cards">{items}</ul></section>'


def _plan_maps(plan: Plan | None, manifest: Mapping[str, Any] | None) -> list[str]:
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
        for title, part, whole, unit in (
            ("realised, of what was asked", "du", "uu", "number"),
            ("vanished", "vanished", "updated", "share"),
        ):
            sums: dict[tuple[str, str], list[float]] = {}
            for tensor in manifest["tensors"]:
                row = tensor.get("statistics")
                if row and row["uu"] is not None and row["du"] is not None:
                    cell = sums.setdefault(_cell(tensor["name"]), [0.0, 0.0])
                    scale = row["total"] / row["elements"]
                    cell[0] += row[part] * scale
                    cell[1] += row[whole] * scale
            cells = {cell: top / bottom for cell, (top, bottom) in sums.items() if bottom}
            if cells:
                maps.append(_heat(title, "measured on the output", cells, unit))
    return maps


def _inspection_maps(inspection: Inspection | None) -> list[str]:
    if inspection is None:
        return []
    maps = []
    for key in ("changed", "norm_ratio", "cosine_z"):
        cells = {}
        for label, row in inspection.cells.items():
            layer, _, kind = label.rpartition(" ")
            if row.get(key) is not None:
                cells[layer, kind] = row[key]
        if cells:
            figure = FIGURES[key]
            maps.append(_heat(figure.label, figure.formula, cells, figure.unit))
    return maps


def _cell(name: str) -> tuple[str, str]:
    block = block_of(name)
    return (f"{block[0]} {block[1]}" if block else "outside blocks"), module_kind(name)


def _mean_cells(values: Mapping[str, float]) -> Cells:
    found: dict[tuple[str, str], list[float]] = {}
    for name, value in values.items():
        found.setdefault(_cell(name), []).append(value)
    return {cell: sum(numbers) / len(numbers) for cell, numbers in found.items()}


def _heat(title: str, what: str, cells: Cells, unit: str) -> str:
    """A table whose cells are tinted by their numbers: blue above 0, orange below."""
    kinds = [kind for kind in _KINDS if any(kind == found for _, found in cells)]
    layers = list(dict.fromkeys(layer for layer, _ in sorted(cells, key=lambda cell: _layer_order(cell[0]))))
    most = max((abs(value) for value in cells.values()), default=0.0) or 1.0
    rows = []
    for layer in layers:
        row = []
        for kind in kinds:
            value = cells.get((layer, kind))
            if value is None:
                row.append("<td></td>")
                continue
            side = ' class="neg"' if value < 0 else ""
            row.append(f'<td{side} style="--p:{abs(value) / most * 100:.0f}%">{show(value, unit)}</td>')
        rows.append(f"<tr><th scope=row>{_text(layer)}</th>{''.join(row)}</tr>")
    head = "".join(f"<th scope=col>{kind}</th>" for kind in kinds)
    return (
        f'<div class="scroll" tabindex="0"><table class="heat"><caption><b>{_text(title)}</b> · {_text(what)}</caption>'
        f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _layer_order(layer: str) -> tuple[bool, str, int]:
    stack, _, index = layer.rpartition(" ")
    return (layer == "outside blocks", stack, int(index) if index.isdecimal() else 0)


def _depth(inspection: Inspection) -> str:
    parts = []
    for key in ("changed", "norm_ratio", "energy", "cosine_z"):
        series: dict[str, list[tuple[float, float]]] = {}
        for label, row in inspection.layers.items():
            stack, _, layer = label.rpartition(" ")
            if layer.isdecimal() and row.get(key) is not None:
                series.setdefault(stack, []).append((int(layer), row[key]))
        series = {stack: sorted(points) for stack, points in series.items() if len(points) > 1}
        if series:
            parts.append(_chart(FIGURES[key].label, "layer", series, FIGURES[key].unit))
    return f'<section><h2>Over depth</h2><div class="charts">{"".join(parts)}</div></section>' if parts else ""


def _forecast(inspection: Inspection) -> str:
    if inspection.forecast is None or not inspection.forecast["curves"]:
        return ""
    parts = []
    for key, figure in FORECAST.items():
        series = {
            mode: [(point["lambda"], point[key]) for point in kinds["all"] if point[key] is not None]
            for mode, kinds in inspection.forecast["curves"].items()
        }
        series = {mode: points for mode, points in series.items() if points}
        if series:
            unit = "share" if key == "vanished" else "number"
            parts.append(_chart(figure.label, "lambda, as asked", series, unit, figure))
    sampled = "of every element" if inspection.forecast["mode"] == "full" else "of one block of 65,536 elements in 128"
    told = f"Computed {sampled}, with the arithmetic of <code>apply</code>; nothing was written."
    charts = f'<div class="charts">{"".join(parts)}</div>'
    return f"<section><h2>What rounding will do</h2><p>{told}</p>{charts}</section>" if parts else ""


def _ulps(inspection: Inspection) -> str:
    counts = inspection.total.get("ulps")
    if not counts or not sum(counts):
        return ""
    classes = zip((0, *ULP_EDGES[:-1]), ULP_EDGES, strict=True)
    labels = [f"{low + 1} to {high}" if high - low > 1 else str(high) for low, high in classes]
    whole = sum(counts)
    rows = "".join(
        f'<tr><td>{label}</td><td style="--p:{count / whole:.0%}">{count / whole:.1%}</td><td>{count:,}</td></tr>'
        for label, count in zip([*labels, "more"], counts, strict=True)
    )
    return (
        "<section><h2>Changes in units in the last place</h2>"
        "<p>How many floating-point numbers lie between an element before and after, of those that changed.</p>"
        '<div class="scroll" tabindex="0"><table class="heat">'
        "<thead><tr><th>units</th><th>share</th><th>elements</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div></section>"
    )


def _rounding(manifest: Mapping[str, Any]) -> str:
    statistics = manifest["statistics"]
    rows = []
    for name, group in (*statistics["modules"].items(), ("all", statistics["all"])):
        if "changed" in group:
            figures = (
                show(group.get("asked_lambda"), "number"),
                show(group.get("realised_lambda"), "number"),
                show(group["vanished"], "share"),
                show(group["changed"], "share"),
            )
            rows.append(f"<tr><td>{_text(name)}</td>{''.join(f'<td>{figure}</td>' for figure in figures)}</tr>")
    if not rows:
        return ""
    head = f"<th>module</th><th>asked lambda</th><th>{_named(FORECAST['realised'])}</th>"
    head += f"<th>{_named(FORECAST['vanished'])}</th><th>changed</th>"
    measured = "every element" if statistics["mode"] == "full" else "a sample of blocks"
    return (
        f"<section><h2>What rounding did</h2><p>Measured on {measured}.</p>"
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _gates(gates: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for row in sorted(gates, key=lambda row: bool(row["passed"])):
        measured = f"{row['measured']:.4g}" if row["measured"] is not None else "–"
        verdict = "passed" if row["passed"] else "<strong>FAILED</strong>"
        texts = [_text(row["gate"]), _text(row["asked"]), measured, verdict, _text(row["detail"])]
        rows.append("<tr>" + "".join(f"<td class=text>{text}</td>" for text in texts) + "</tr>")
    failed = sum(not row["passed"] for row in gates)
    told = f"{failed} of {len(gates)} failed: nothing was published." if failed else f"All {len(gates)} passed."
    head = "".join(f"<th class=text>{column}</th>" for column in ("gate", "asked", "measured", "verdict", ""))
    return (
        f'<section><h2>Gates</h2><p>{told}</p><div class="scroll" tabindex="0"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _recipe(plan: Plan) -> str:
    """The text, and behind each line of a rule how many tensors it selects."""
    document, names = plan.recipe.document, list(plan.tensors)
    touched: dict[int, str] = {}
    for name, schedule in plan.recipe.coefficients.items():
        for index, rule in enumerate(schedule.rules):
            place = document.place(("coefficients", name, "rules", index))
            if place is not None:
                count = len(rule.select(names))
                told = f"{count} tensor{'s' if count != 1 else ''}"
                touched[place.line] = f"{touched[place.line]}, {told}" if place.line in touched else told
    lines = []
    for index, line in enumerate(document.text.splitlines()):
        told = f'  <span class="count">← {touched[index]}</span>' if index in touched else ""
        lines.append(_text(line) + told)
    set_ = "".join(
        f"<p>Set from outside: <code>{_text(k)} = {v:g}</code></p>" for k, v in plan.recipe.overrides.items()
    )
    return f'<section><h2>The recipe</h2>{set_}<pre tabindex="0">{chr(10).join(lines)}</pre></section>'


def _sweep(sweep: Sweep) -> str:
    """Scores over each number, with the lambda that rounding left; two scores against each other; the table."""
    names = list(sweep.best.scores)
    charts = []
    for axis in sweep.axes if len(sweep.scored) > 1 else ():
        best: dict[float, Trial] = {}  # of several numbers, the best of the others at each value of this one
        sign = 1 if sweep.minimise else -1
        for trial in sorted(sweep.scored, key=lambda trial: -sign * trial.scores[sweep.by].value):
            best[trial.values[axis]] = trial
        realised = {value: trial.realised for value, trial in best.items() if trial.realised is not None}
        for name in names:
            points = [(value, best[value].scores[name].value) for value in sorted(best)]
            charts.append(_chart(name, axis, {name: points}, "number", above=("realised lambda", realised)))
    pareto = sorted(sweep.pareto, key=lambda trial: trial.scores[names[0]].value)
    if len(pareto) > 1:
        points = [(trial.scores[names[0]].value, trial.scores[names[1]].value) for trial in pareto]
        charts.append(
            _chart(f"{names[1]}: candidates that no other beats in all", names[0], {names[1]: points}, "number")
        )
    head = "".join(f"<th>{_text(name)}</th>" for name in (*sweep.axes, *names, "realised lambda", ""))
    rows = []
    for trial in sweep.trials:
        cells = [number(trial.values[axis]) for axis in sweep.axes]
        for name in names:
            score = trial.scores.get(name)
            error = f" ± {1.96 * score.error:.2g}" if score is not None and score.error is not None else ""
            cells.append("–" if score is None else f"{score.value:.4g}{error}")
        cells.append(show(trial.realised, "number"))
        near = "best" if trial is sweep.best else "within noise of it" if sweep.within_noise(trial) else ""
        cells.append(_text(trial.failed or near))
        rows.append(f"<tr>{''.join(f'<td>{cell}' for cell in cells)}")
    told = ", ".join(f"{name} = {number(value)}" for name, value in sweep.best.values.items())
    return (
        f"<section><h2>The sweep</h2><p>Best: <strong>{_text(told)}</strong> by <code>{_text(sweep.by)}</code> of "
        f"<code>{_text(sweep.score)}</code>.</p>"
        f'<div class="charts">{"".join(charts)}</div><div class="scroll" tabindex="0"><table><thead><tr>{head}</tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table></div></section>"
    )


# The table.


@dataclass(frozen=True, slots=True)
class _Column:
    """Of a row's name: what is shown, and for numbers what it is sorted by."""

    head: str
    cell: Callable[[str], tuple[str, float | None]]
    text: bool = False


def _table(plan: Plan | None, manifest: Mapping[str, Any] | None, inspection: Inspection | None) -> str:
    """Of every tensor what happens to it, what rounding did, and what was found; experts of a layer share a row."""
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys((*(plan.tensors if plan else ()), *(inspection.tensors if inspection else ()))):
        groups.setdefault(summarised(name), []).append(name)
    if not groups:
        return ""
    columns = [
        _Column("layer", lambda name: (_cell(name)[0], None), text=True),
        _Column("kind", lambda name: (module_kind(name), None), text=True),
        *(_plan_columns(plan, groups) if plan is not None else ()),
        *(_rounding_columns(manifest) if manifest is not None else ()),
        *(_inspection_columns(inspection, groups) if inspection is not None else ()),
    ]
    head = "".join(
        f'<th scope=col{" class=text" if column.text else ""}><button type="button">{column.head}</button></th>'
        for column in (_Column("tensor", lambda name: (name, None), text=True), *columns)
    )
    # Every byte counts here, of hundred thousand cells: what HTML lets be left out is left out.
    body = []
    for name in groups:
        cells = [f"<td>{_text(name)}"]
        for column in columns:
            shown, value = column.cell(name)
            key = "" if value is None else f"={value:.4g}"
            cells.append(f"<td class=text>{_text(shown)}" if column.text else f"<td data-v{key}>{shown}")
        body.append(f"<tr>{''.join(cells)}")
    tools = (
        '<div class="tools"><label>Filter <input type="search" placeholder="mlp 12"></label>'
        f"<output>{len(body)} of {len(body)} rows</output>"
        '<button type="button" class="csv">Download as CSV</button></div>'
    )
    return (
        "<section><h2>Every tensor</h2>"
        f"<p>Experts of one layer share a row, <code>*</code> standing for their numbers.</p>{tools}"
        '<p class="paper">On paper only the first columns are shown.</p>'
        '<div class="scroll tall" tabindex="0"><table class="sortable">'
        f"<thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div></section>"
    )


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
            rows = [plan.tensors[member].coefficients for member in groups[name] if member in plan.tensors]
            values = [row[index] for row in rows if index < len(row)]
            if not values:
                return "–", None
            low, high = min(values), max(values)
            return number(low) if low == high else f"{number(low)} to {number(high)}", high

        yield _Column(_text(coefficient), asked)


def _rounding_columns(manifest: Mapping[str, Any]) -> Iterator[_Column]:
    rounding = _rounding_rows(manifest)
    for key in ("realised", "vanished", "changed") if rounding else ():

        def did(name: str, key: str = key) -> tuple[str, float | None]:
            value = rounding.get(name, {}).get(key)
            return show(value, "number" if key == "realised" else "share"), value

        yield _Column("realised, of asked" if key == "realised" else key, did)


def _inspection_columns(inspection: Inspection, groups: Mapping[str, Sequence[str]]) -> Iterator[_Column]:
    """What was found; of experts the figures of all together, and the mean of what is known of each matrix alone."""
    rows = inspection.summaries
    for key, figure in FIGURES.items():
        if any(row.get(key) is not None for row in rows.values()):

            def measured(name: str, key: str = key, unit: str = figure.unit) -> tuple[str, float | None]:
                value = rows.get(name, {}).get(key)
                return show(value, unit), value

            yield _Column(_named(figure), measured)
    for key, figure in SPECTRAL.items() if inspection.spectra else ():

        def spread(name: str, key: str = key, unit: str = figure.unit) -> tuple[str, float | None]:
            found = [inspection.spectra.get(member, {}).get(key) for member in groups[name]]
            known = [value for value in found if value is not None]
            value = math.fsum(known) / len(known) if known else None
            return show(value, unit), value

        yield _Column(_named(figure), spread)


def _rounding_rows(manifest: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """What rounding did to each tensor; the experts of a layer are added up."""
    sums: dict[str, dict[str, float]] = {}
    for tensor in manifest["tensors"]:
        row = tensor.get("statistics")
        if row and row["uu"] is not None and row["du"] is not None:
            total = sums.setdefault(summarised(tensor["name"]), {})
            scale = row["total"] / row["elements"]
            for key in ("uu", "du", "updated", "vanished", "changed", "elements"):
                total[key] = total.get(key, 0.0) + row[key] * scale
    parts = {"realised": ("du", "uu"), "vanished": ("vanished", "updated"), "changed": ("changed", "elements")}
    return {
        name: {key: row[top] / row[bottom] if row[bottom] else None for key, (top, bottom) in parts.items()}
        for name, row in sums.items()
    }


def _sources(sources: Sequence[tuple[str, str]]) -> str:
    return ", ".join(dict.fromkeys(model for model, _ in sources))


def _glossary() -> str:
    parts = []
    for figure in (*FIGURES.values(), *SPECTRAL.values(), *FORECAST.values()):
        source = f" <span class=soft>{_text(figure.source)}</span>" if figure.source else ""
        parts.append(
            f"<dt>{_text(figure.label)}: <code>{_text(figure.formula)}</code></dt>"
            f"<dd>{_text(figure.meaning)}{source}</dd>"
        )
    return f"<dl>{''.join(parts)}</dl>"


# Curves.

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 640, 270, 62, 14, 26, 40
_MARKS = 3
_APART = 44


def _chart(
    title: str,
    along: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    unit: str,
    figure: Figure | None = None,
    above: tuple[str, Mapping[float, float]] = ("", {}),
) -> str:
    """Lines that are told apart by their dashes too, with a legend in words. above: a second axis' numbers."""
    points = [point for line in series.values() for point in line]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x0, x1 = min(xs), max(xs)
    ticks = _ticks(min(0.0, *ys), max(0.0, *ys))
    y0, y1 = ticks[0], ticks[-1]

    def place(x: float, y: float) -> str:
        across = _LEFT + (x - x0) / ((x1 - x0) or 1) * (_WIDTH - _LEFT - _RIGHT)
        up = _HEIGHT - _BOTTOM - (y - y0) / ((y1 - y0) or 1) * (_HEIGHT - _TOP - _BOTTOM)
        return f"{across:.1f},{up:.1f}"

    parts = []
    for tick in ticks:
        _, up = place(x0, tick).split(",")
        parts.append(f'<path class="grid" style="stroke-width:1" d="M{_LEFT},{up}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{float(up) + 4:.1f}" text-anchor="end">{show(tick, unit)}</text>')
    for tick in _ticks(x0, x1) if x1 - x0 > 1 and along != "layer" else _layers(x0, x1):
        if x0 <= tick <= x1:
            across, _ = place(tick, y0).split(",")
            parts.append(f'<text x="{across}" y="{_HEIGHT - 22}" text-anchor="middle">{number(tick)}</text>')
    parts.append(f'<text x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 5}" text-anchor="middle">{_text(along)}</text>')
    free = -math.inf
    for x in sorted(above[1]):
        at = float(place(x, y0).split(",")[0])
        if at >= free:
            parts.append(f'<text x="{at}" y="12" text-anchor="middle">{number(above[1][x])}</text>')
            free = at + _APART
    legend = [f"above: {_text(above[0])}"] if above[1] else []
    for index, (label, line) in enumerate(series.items()):
        dash = index % _MARKS
        parts.append(f'<path class="s{dash}" d="M{" ".join(place(x, y) for x, y in line)}"/>')
        sample = f'<svg class="sample" viewBox="0 0 30 8"><path class="s{dash}" d="M0,4H30"/></svg>'
        legend.append(f"{sample} {_text(label)}")
    head = _named(figure) if figure is not None else _text(title)
    told = f"{title} over {along}: " + "; ".join(
        f"{label} from {show(line[0][1], unit)} to {show(line[-1][1], unit)}" for label, line in series.items()
    )
    return (
        f'<figure><h3>{head}</h3><div class="scroll" tabindex="0"><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{_text(told)}">{"".join(parts)}</svg></div><figcaption>{" · ".join(legend)}</figcaption></figure>'
    )


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers that hold low and high between them."""
    if high <= low:
        high = low + 1
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(step * by for by in (1, 2, 2.5, 5, 10) if (high - low) / (step * by) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def _layers(low: float, high: float) -> list[float]:
    step = max(1, round((high - low) / 10))
    return [float(layer) for layer in range(int(low), int(high) + 1, step)]
