"""The report as one HTML file that needs no network: headlines, maps, curves, tables, the recipe.

Made from a plan, a manifest, an inspection, or several of them; it computes no figures of its own. Every
value is shown as a number beside its color. The figures' meanings come from `figures`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from skillmerge.checkpoints.kinds.lora.parts import weight_of
from skillmerge.cli.show.figures import FIGURES, FORECAST, SPECTRAL
from skillmerge.cli.show.report import headlines
from skillmerge.cli.show.report.charts import chart
from skillmerge.cli.show.report.heat_maps import maps_section
from skillmerge.cli.show.report.html import collapsed, escaped, read
from skillmerge.cli.show.report.remarks import remarks_section
from skillmerge.cli.show.report.sweeps import sweep_section
from skillmerge.cli.show.report.tables import (
    gates_section,
    inspection_section,
    rounding_section,
    ulps_section,
    updates_sections,
)
from skillmerge.cli.show.report.tensor_table import tensor_table
from skillmerge.outputs.manifest import ManifestBody
from skillmerge.outputs.output import Outcome
from skillmerge.plans.plan import Plan
from skillmerge.recipes.recipe import Recipe
from skillmerge.study.inspect import Inspection

if TYPE_CHECKING:
    from skillmerge.verbs.sweep.sweep import Sweep


_LIMITS = """
<p>These figures describe; they do not predict. Sparsity of an update can come from the learning rate and from the
dtype that hides small steps (arXiv 2511.08567). Updates that are nearly orthogonal can still disturb each other:
what lets task vectors be added is disentangled function, not orthogonal weights (arXiv 2305.12827). Measure the
merged model.</p>
"""


def build(
    *,
    plan: Plan | None = None,
    manifest: ManifestBody | None = None,
    inspection: Inspection | None = None,
    sweep: Sweep | None = None,
    gates: Sequence[Outcome] = (),
    when: datetime | None = None,
) -> str:
    """Return the page. plan: the planned merge; manifest: the finished one; inspection: measured updates; sweep: scored
    candidates; gates: their outcomes; when: the date to show [default: now]."""
    title = headlines.title(plan, manifest, inspection, sweep, not all(gate.passed for gate in gates))
    when = when or datetime.now(timezone.utc)
    sections = [
        headlines.headlines(plan, manifest, inspection, sweep),
        remarks_section(plan, manifest, inspection),
        gates_section(gates),
        sweep_section(sweep) if sweep is not None else "",
        maps_section(plan, manifest, inspection),
        *(_inspected(inspection) if inspection is not None else ()),
        rounding_section(manifest) if manifest is not None else "",
        _recipe(plan.recipe, _selectable(plan)) if plan is not None else "",
        _recipe(sweep.recipe, ()) if sweep is not None else "",
        tensor_table(plan, manifest, inspection),
        _meanings() if inspection is not None else "",
    ]
    body = "\n".join(filter(None, sections))
    facts = headlines.provenance(plan, manifest, inspection, sweep, when)
    style = read("parts.css") + read("page.css")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escaped(title)} · skillmerge</title><link rel="icon" href="data:,"><style>{style}</style></head>
<body class="skillmerge"><header><div><h1>{escaped(title)}</h1>{facts}</div>
<button class="theme" type="button">Light or dark</button></header>
<main>{body}</main><script>{read("page.js")}</script></body></html>
"""


def _inspected(inspection: Inspection) -> list[str]:
    parts = (updates_sections, _forecast, ulps_section, _depth, inspection_section)
    return [part(inspection) for part in parts]


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
    return (
        f'<section class="wide"><h2>Over depth</h2><div class="charts">{"".join(parts)}</div></section>'
        if parts
        else ""
    )


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
            parts.append(chart(figure.label, "requested λ", series, unit, figure))
    sampled = (
        "on every element"
        if inspection.forecast["mode"] == "full"
        else "on a sample: one block of 65,536 elements in 128"
    )
    told = f"Computed {sampled}, with the arithmetic of <code>apply</code>; nothing was written."
    charts = f'<div class="charts">{"".join(parts)}</div>'
    return f'<section class="broad"><h2>Forecast of rounding</h2><p>{told}</p>{charts}</section>' if parts else ""


def _recipe(recipe: Recipe, tensors: Iterable[str]) -> str:
    """Return the recipe's text, and after each rule's line how many tensors it selects."""
    document, names = recipe.document, list(tensors)
    touched: dict[int, str] = {}
    for name, schedule in recipe.coefficients.items() if names else ():
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
    set_ = "".join(f"<p>Set from outside: <code>{escaped(k)} = {v:g}</code></p>" for k, v in recipe.overrides.items())
    return f'<section><h2>The recipe</h2>{set_}<pre tabindex="0">{chr(10).join(lines)}</pre></section>'


def _selectable(plan: Plan) -> Iterable[str]:
    """Return the names that rules select by: those of the model's tensors, which an adapter has in parts."""
    names = [row[0] for it in plan.tensors.values() for row in it.rows]
    return dict.fromkeys(map(weight_of, names)) if plan.recipe.makes_adapter else names


def _meanings() -> str:
    inner = collapsed("Name, formula, meaning and source of each", f"{_LIMITS}{_glossary()}")
    return f'<section class="wide"><h2>What the figures mean</h2>{inner}</section>'


def _glossary() -> str:
    parts = []
    for figure in (*FIGURES.values(), *SPECTRAL.values(), *FORECAST.values()):
        source = f" <span class=soft>{escaped(figure.source)}</span>" if figure.source else ""
        parts.append(
            f"<dt>{escaped(figure.label)}: <code>{escaped(figure.formula)}</code></dt>"
            f"<dd>{escaped(figure.meaning)}{source}</dd>"
        )
    return f"<dl>{''.join(parts)}</dl>"
