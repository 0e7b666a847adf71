"""How a page begins: what it is of, where the models come from, and the headlines."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import PurePath

from skillmerge.cli.show.report.html import escaped, prose
from skillmerge.cli.show.sentences import Headline, of_inspection, of_merge, of_plan, of_sweep
from skillmerge.outputs.manifest import Manifest, ManifestBody
from skillmerge.plans.plan import Plan
from skillmerge.recipes.recipe import Recipe
from skillmerge.study.inspect import Inspection
from skillmerge.verbs.sweep.sweep import Sweep
from skillmerge.version import __version__

_COMMIT = 12
"""Digits of a commit that are shown."""


def headlines(
    plan: Plan | None, manifest: ManifestBody | None, inspection: Inspection | None, sweep: Sweep | None
) -> str:
    """Return the headlines of what was found; of a plan alone those of the plan."""
    if sweep is not None:
        return cards(of_sweep(sweep))
    if inspection is not None:
        return cards(of_inspection(inspection))
    if manifest is not None:
        return cards(of_merge(manifest))
    return cards(of_plan(plan)) if plan is not None else ""


def cards(found: Iterable[Headline]) -> str:
    items = "".join(
        f"<li><b>{escaped(one.figure)}</b> <span>{escaped(one.label)}</span><p>{prose(one.sentence)}</p>"
        for one in found
    )
    return f'<ul class="cards">{items}</ul>'


def title(
    plan: Plan | None = None,
    manifest: ManifestBody | None = None,
    inspection: Inspection | None = None,
    sweep: Sweep | None = None,
    refused: bool = False,
) -> str:
    """Return what the page is of, as text."""
    if sweep is not None:
        return f"Sweep of {_name(sweep.recipe)}"
    if inspection is not None:
        if inspection.plan is not None:
            return f"Inspection of {_name(inspection.plan.recipe)}"
        return f"Inspection {'' if inspection.title.startswith('from ') else 'of '}{inspection.title}"
    if plan is None:
        return "Merge"
    made = {"model": "Merge", "skill": "Skill", "adapter": "Adapter"}[plan.recipe.output.kind]
    kind = "Plan" if manifest is None else "Refused merge" if refused else made
    return f"{kind} of {_name(plan.recipe)}"


def _name(recipe: Recipe) -> str:
    """The recipe's file; of the words of a command its expression."""
    return str(recipe.document.data["merge"]) if recipe.of_command else PurePath(recipe.document.name).name


def provenance(
    plan: Plan | None, manifest: ManifestBody | None, inspection: Inspection | None, sweep: Sweep | None, when: datetime
) -> str:
    """Return the expression, the models with their commits, date, device, digests and version, as a list."""
    facts = [*_formula(plan, manifest, inspection, sweep), *_models(plan, manifest, sweep)]
    facts.append(("date", when.strftime("%Y-%m-%d %H:%M %Z").strip()))
    if isinstance(manifest, Manifest):
        facts.append(("device", escaped(manifest.environment.device)))
        facts.append(("manifest sha256", f"<code>{hashlib.sha256(manifest.to_bytes()).hexdigest()}</code>"))
    elif plan is not None and plan.digest:
        facts.append(("plan digest", f"<code>{escaped(plan.digest)}</code>"))
    facts.append(("skillmerge", __version__))
    return '<dl class="facts">' + "".join(f"<div><dt>{name}<dd>{value}</div>" for name, value in facts) + "</dl>"


def _formula(
    plan: Plan | None, manifest: ManifestBody | None, inspection: Inspection | None, sweep: Sweep | None
) -> Iterator[tuple[str, str]]:
    recipe = sweep.recipe if sweep is not None else plan.recipe if plan is not None else None
    if recipe is not None:
        yield "expression", f"<code>{escaped(recipe.document.data['merge'])}</code>"
    elif manifest is not None:
        yield "expression", f"<code>{escaped(manifest.expression)}</code>"
    if inspection is not None:
        yield "update", f"<code>{escaped(inspection.update)}</code>"
        if inspection.second is not None:
            yield "second update", f"<code>{escaped(inspection.second)}</code>"


def _models(plan: Plan | None, manifest: ManifestBody | None, sweep: Sweep | None) -> Iterator[tuple[str, str]]:
    """Each model's place and commit; a sweep's as the recipe writes them."""
    source = plan or manifest
    if source is not None:
        for item in source.inputs:
            role = " (donor)" if item.name == source.donor else ""
            commit = f" at <code>{escaped(item.revision[:_COMMIT])}</code>" if item.revision else ""
            yield f"{escaped(item.name)}{role}", _place(item.uri) + commit
    elif sweep is not None:
        for name, uri in sweep.recipe.models.items():
            yield escaped(name), _place(uri)


def _place(uri: str) -> str:
    """A model on the Hub as it is called; of a folder the last part."""
    return escaped(uri if "://" in uri and not uri.startswith("file:") else PurePath(uri).name or uri)
