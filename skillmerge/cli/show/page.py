"""The report as one HTML file that asks nothing of a network: heat maps, curves, a table to sort, the recipe.

Made from a plan, a manifest, an inspection, or several of them; computes nothing but how to show it. Every
value stands as a number beside its colour. The figures' meanings come from `figures`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from skillmerge.cli.show import tables
from skillmerge.cli.show.charts import chart
from skillmerge.cli.show.figures import FIGURES, FORECAST, SPECTRAL, show
from skillmerge.cli.show.heat_maps import maps_section
from skillmerge.cli.show.html import abbreviated, escaped, prose
from skillmerge.cli.show.page_remarks import remarks_section
from skillmerge.cli.show.page_table import tensor_table
from skillmerge.engine.rounding_statistics import Group, Statistics
from skillmerge.outputs.manifest import ManifestBody
from skillmerge.outputs.output import Outcome
from skillmerge.plans.depth import number
from skillmerge.plans.plan import Plan
from skillmerge.study.inspect import FIGURES_OF_TWO, Inspection
from skillmerge.tensors import format_bytes
from skillmerge.version import __version__

if TYPE_CHECKING:
    from skillmerge.verbs.sweep.journal import Trial
    from skillmerge.verbs.sweep.sweep import Sweep


_LIMITS = """
<p>These figures describe; they do not predict. Sparsity of an update can come from the learning rate and from the
dtype that hides small steps (arXiv 2511.08567). Updates that are nearly orthogonal can still disturb each other:
what lets task vectors be added is disentangled function, not orthogonal weights (arXiv 2305.12827). Measure the
merged model.</p>
"""


def build(
    title: str,
    *,
    plan: Plan | None = None,
    manifest: ManifestBody | None = None,
    inspection: Inspection | None = None,
    sweep: Sweep | None = None,
    gates: Sequence[Outcome] = (),
) -> str:
    """The page. plan: what would be done; manifest: what was done; inspection: what the updates look like; sweep:
    what candidates are worth; gates: what became of each, as `gates.Outcome` has it."""
    sections = [_cards(plan, manifest, inspection), remarks_section(plan, manifest)]
    if gates:
        sections.append(_gates(gates))
    if sweep is not None:
        sections.append(_sweep(sweep))
    sections.append(maps_section(plan, manifest, inspection))
    if inspection is not None:
        sections += [_each(inspection), _depth(inspection), _forecast(inspection), _ulps(inspection)]
    if manifest is not None and isinstance(manifest.statistics, Statistics):
        sections.append(_rounding(manifest.statistics))
    if plan is not None:
        sections.append(_recipe(plan))
    sections.append(tensor_table(plan, manifest, inspection))
    if inspection is not None:
        sections.append(f"<section><h2>What the figures mean</h2>{_LIMITS}{_glossary()}</section>")
    body = "\n".join(filter(None, sections))
    here = files("skillmerge.cli.show")
    style, script = ((here / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escaped(title)}</title><link rel="icon" href="data:,"><style>{style}</style></head>
<body><header><div><h1>{escaped(title)}</h1><div class="soft">skillmerge {__version__}</div></div>
<button class="theme" type="button">Light or dark</button></header>
<main>{body}</main><script>{script}</script></body></html>
"""


# Sections.


def _cards(plan: Plan | None, manifest: ManifestBody | None, inspection: Inspection | None) -> str:
    cards: list[tuple[str, str]] = []
    if plan is not None:
        cards += [("tensors", f"{len(plan.tensors):,}"), ("reads", format_bytes(plan.bytes_read))]
        cards += [("writes", tables.written(plan))]
        cards += [("merges", merged)] if (merged := tables.merged(plan)) is not None else []
    if manifest is not None:
        total = manifest.statistics.all
        if isinstance(total, Group):
            cards += [("asked lambda", show(total.asked_lambda, "number"))]
            cards += [("realised lambda", show(total.realised_lambda, "number"))]
            cards += [("vanished", show(total.vanished, "share"))]
        cards += [("changed", show(total.changed, "share"))]
    if inspection is not None:
        keys = (
            "elements", "changed", "above_absolute", "above_relative", "norm", "norm_ratio", "input_rounding", "cosine",
            "cosine_z",
        )  # fmt: skip
        for key in keys:
            if inspection.total.get(key) is not None:
                cards.append((abbreviated(FIGURES[key]), show(inspection.total[key], FIGURES[key].unit)))
    items = "".join(f"<li><b>{escaped(value)}</b>{label}</li>" for label, value in cards if value != "–")
    what = ""
    if inspection is not None:
        what = f"<p>The update: <code>{escaped(inspection.update)}</code>"
        what += f"; the second: <code>{escaped(inspection.second)}</code></p>" if inspection.second else "</p>"
        what += "".join(f"<p><b>warning</b> {prose(remark.message)}</p>" for remark in inspection.remarks)
        what += "".join(f"<p>{prose(note)}</p>" for note in inspection.notes)
    return f'<section>{what}<ul class="cards">{items}</ul></section>'


def _each(inspection: Inspection) -> str:
    """Each of several updates by itself, and every two of them."""
    if not inspection.updates:
        return ""
    keys = ("changed", "norm", "norm_ratio", "input_rounding", "input_rounding_added")
    each = [([label], row["all"]) for label, row in inspection.updates.items()]
    two = [([pair["first"], pair["second"], "all"], pair["all"]) for pair in inspection.pairs]
    for pair in inspection.pairs:
        two += [([pair["first"], pair["second"], kind], row) for kind, row in pair["modules"].items()]
    return (
        f"<section><h2>Each update</h2>{_figures_table(('update',), each, keys)}</section>"
        f"<section><h2>Every two updates</h2>"
        f"{_figures_table(('update', 'beside', 'module'), two, FIGURES_OF_TWO)}</section>"
    )


def _figures_table(
    first: Sequence[str], rows: Sequence[tuple[Sequence[str], Mapping[str, Any]]], keys: Sequence[str]
) -> str:
    head = "".join(f"<th class=text>{name}</th>" for name in first)
    head += "".join(f"<th>{abbreviated(FIGURES[key])}</th>" for key in keys)
    body = []
    for names, row in rows:
        cells = "".join(f"<td class=text>{escaped(name)}</td>" for name in names)
        cells += "".join(f"<td>{show(row.get(key), FIGURES[key].unit)}</td>" for key in keys)
        body.append(f"<tr>{cells}</tr>")
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return f'<div class="scroll" tabindex="0">{table}</div>'


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
            parts.append(chart(FIGURES[key].label, "layer", series, FIGURES[key].unit))
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
            parts.append(chart(figure.label, "lambda, as asked", series, unit, figure))
    sampled = "of every element" if inspection.forecast["mode"] == "full" else "of one block of 65,536 elements in 128"
    told = f"Computed {sampled}, with the arithmetic of <code>apply</code>; nothing was written."
    charts = f'<div class="charts">{"".join(parts)}</div>'
    return f"<section><h2>What rounding will do</h2><p>{told}</p>{charts}</section>" if parts else ""


def _ulps(inspection: Inspection) -> str:
    rows = "".join(
        f'<tr><td>{row.label(" to ")}</td><td style="--p:{row.share:.0%}">{row.share:.1%}</td>'
        f"<td>{row.count:,}</td></tr>"
        for row in tables.ulps(inspection.total.get("ulps"))
    )
    if not rows:
        return ""
    return (
        "<section><h2>Changes in units in the last place</h2>"
        "<p>How many floating-point numbers lie between an element before and after, of those that changed.</p>"
        '<div class="scroll" tabindex="0"><table class="heat">'
        "<thead><tr><th>units</th><th>share</th><th>elements</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div></section>"
    )


def _rounding(statistics: Statistics) -> str:
    rows = []
    for name, group in statistics.rows:
        if group.changed is not None:
            asked, realised = group.lambdas or (None, None)
            figures = (
                show(asked, "number"),
                show(realised, "number"),
                show(group.vanished, "share"),
                show(group.changed, "share"),
            )
            rows.append(f"<tr><td>{escaped(name)}</td>{''.join(f'<td>{figure}</td>' for figure in figures)}</tr>")
    if not rows:
        return ""
    head = f"<th>module</th><th>asked lambda</th><th>{abbreviated(FORECAST['realised'])}</th>"
    head += f"<th>{abbreviated(FORECAST['vanished'])}</th><th>changed</th>"
    measured = "every element" if statistics.mode == "full" else "a sample of blocks"
    return (
        f"<section><h2>What rounding did</h2><p>Measured on {measured}.</p>"
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _gates(gates: Sequence[Outcome]) -> str:
    rows = []
    for row in sorted(gates, key=lambda row: row.passed):
        measured = f"{row.measured:.4g}" if row.measured is not None else "–"
        verdict = "passed" if row.passed else "<strong>FAILED</strong>"
        texts = [escaped(row.gate), escaped(row.asked), measured, verdict, escaped(row.detail)]
        rows.append("<tr>" + "".join(f"<td class=text>{text}</td>" for text in texts) + "</tr>")
    failed = sum(not row.passed for row in gates)
    told = f"{failed} of {len(gates)} failed: nothing was published." if failed else f"All {len(gates)} passed."
    head = "".join(f"<th class=text>{column}</th>" for column in tables.GATE_COLUMNS)
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
        lines.append(escaped(line) + told)
    set_ = "".join(
        f"<p>Set from outside: <code>{escaped(k)} = {v:g}</code></p>" for k, v in plan.recipe.overrides.items()
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
            charts.append(chart(name, axis, {name: points}, "number", above=("realised lambda", realised)))
    pareto = sorted(sweep.pareto, key=lambda trial: trial.scores[names[0]].value)
    if len(pareto) > 1:
        points = [(trial.scores[names[0]].value, trial.scores[names[1]].value) for trial in pareto]
        charts.append(
            chart(f"{names[1]}: candidates that no other beats in all", names[0], {names[1]: points}, "number")
        )
    head = "".join(f"<th>{escaped(name)}</th>" for name in (*sweep.axes, *names, "realised lambda", ""))
    rows = []
    for trial in sweep.trials:
        cells = [number(trial.values[axis]) for axis in sweep.axes]
        cells += [tables.scored(trial.scores.get(name)) for name in names]
        cells.append(show(trial.realised, "number"))
        near = "best" if trial is sweep.best else "within noise of it" if sweep.within_noise(trial) else ""
        cells.append(escaped(trial.failed or near))
        rows.append(f"<tr>{''.join(f'<td>{cell}' for cell in cells)}")
    told = ", ".join(f"{name} = {number(value)}" for name, value in sweep.best.values.items())
    return (
        f"<section><h2>The sweep</h2><p>Best: <strong>{escaped(told)}</strong> by <code>{escaped(sweep.by)}</code> of "
        f"<code>{escaped(sweep.score)}</code>.</p>"
        f'<div class="charts">{"".join(charts)}</div><div class="scroll" tabindex="0"><table><thead><tr>{head}</tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _glossary() -> str:
    parts = []
    for figure in (*FIGURES.values(), *SPECTRAL.values(), *FORECAST.values()):
        source = f" <span class=soft>{escaped(figure.source)}</span>" if figure.source else ""
        parts.append(
            f"<dt>{escaped(figure.label)}: <code>{escaped(figure.formula)}</code></dt>"
            f"<dd>{escaped(figure.meaning)}{source}</dd>"
        )
    return f"<dl>{''.join(parts)}</dl>"
