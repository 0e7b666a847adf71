"""The verb inspect: what changed between two models, in a merge, or in a stored skill.

One streaming pass: every tensor's update is measured by `metrics`, and, where there is a target, a recipe's
rounding is forecast: for some blocks (those that `apply --stats sampled` looks at, or all) the arithmetic of
`apply` is done for every lambda of a grid and three ways to round, and measured as `apply` measures. Nothing is
written. docs/metrics.md defines the figures.
"""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skillmerge.brief import brief, drawn
from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.checkpoints.schemes import is_path
from skillmerge.engine.measures.input_rounding import input_warning
from skillmerge.engine.measures.update_size import IN_RECIPE, size_warning, too_large
from skillmerge.engine.runner import check_words
from skillmerge.errors import UsageError, some
from skillmerge.methods.terms import degree
from skillmerge.plans.dtypes.quantised import equal_tensors
from skillmerge.plans.mapping import find_source
from skillmerge.plans.opening import Access, close_all, planned
from skillmerge.plans.plan import Plan, TensorPlan
from skillmerge.recipes.formula.tree import ExpressionError, calls_in, differences_in
from skillmerge.recipes.parse import load
from skillmerge.recipes.recipe import Recipe
from skillmerge.recipes.source import RecipeSource, name_of
from skillmerge.remarks import Remark
from skillmerge.reporter import Reporter, default_reporter
from skillmerge.study.adapters import AdapterRow, adapters_of
from skillmerge.study.forecast import Forecaster, plain
from skillmerge.study.groups import by_expert, expert_groups, groups_of, kinds_of
from skillmerge.study.places import OF_TWO, check_alone, is_adapter, is_recipe, is_skill, refuse_alone
from skillmerge.study.subjects import (
    BASE,
    Subject,
    open_named,
    subject_of_models,
    subject_of_recipe,
    subject_of_skills,
    told_update,
)  # fmt: skip
from skillmerge.tensors import DTYPES
from skillmerge.threads import cores

if TYPE_CHECKING:
    from skillmerge.study.update_metrics import Pair, Update
    from skillmerge.study.update_pass import Row


_MAX_THREADS = 8

FIGURES_OF_TWO = (
    "cosine", "cosine_z", "cosine_z_signs", "conflict", "conflict_z", "overlap", "overlap_chance", "updates_ratio",
)  # fmt: skip
"""Figures of two updates."""


@dataclass(frozen=True, slots=True)
class Inspection:
    """The result of inspect. tensors, groups (`all`, modules, layers, cells): label -> figures, see docs/metrics.md.

    forecast: None, or mode, blocks and curves; see `Forecast`. second: what k is, or None.
    """

    title: str
    update: str
    second: str | None
    tensors: Mapping[str, Mapping[str, Any]]
    total: Mapping[str, Any]
    modules: Mapping[str, Mapping[str, Any]]
    layers: Mapping[str, Mapping[str, Any]]
    summaries: Mapping[str, Mapping[str, Any]]
    """The tensors, with the experts of a layer combined under `*`."""
    cells: Mapping[str, Mapping[str, Any]]
    """One layer's tensors of one kind, as `STACK LAYER KIND`."""
    spectra: Mapping[str, Mapping[str, float | None]]
    """For matrices, if requested: how the update spreads over directions."""
    forecast: Mapping[str, Any] | None
    plan: Plan | None
    left: Mapping[str, str]
    """Tensors that are left out, and why."""
    updates: Mapping[str, Mapping[str, Any]]
    """For an update made of several: the figures of each, as `all` and `modules`."""
    pairs: Sequence[Mapping[str, Any]]
    """Each pair of those: `first`, `second`, and figures as `all` and `modules`."""
    remarks: Sequence[Remark]
    """Warnings about the updates."""
    experts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """One layer's tensors of one expert, as `STACK LAYER EXPERT`, and of all layers, as `layers EXPERT`."""
    adapters: Mapping[str, Sequence[AdapterRow]] = field(default_factory=dict)
    """The adapters that the updates are made of: ranks and scales by kind of module."""

    __repr__ = brief
    _repr_html_ = drawn

    @property
    def notes(self) -> list[str]:
        count = f"{len(self.left)} tensor{'s are' if len(self.left) > 1 else ' is'} left out"
        return [f"{count}: {some([f'{name} ({why})' for name, why in self.left.items()])}"] if self.left else []

    def as_dict(self) -> dict[str, Any]:
        several = {"updates": self.updates, "pairs": list(self.pairs)} if self.updates else {}
        if self.experts:
            several["experts"] = self.experts
        if self.adapters:
            several["adapters"] = {name: [asdict(row) for row in rows] for name, rows in self.adapters.items()}
        return {
            "title": self.title,
            "update": self.update,
            "second": self.second,
            "all": self.total,
            "modules": self.modules,
            "layers": self.layers,
            "cells": self.cells,
            "tensors": self.tensors,
            "spectra": self.spectra,
            "forecast": plain(self.forecast),
            "left": dict(self.left),
            "notes": self.notes,
            **several,
            "warnings": [remark.message for remark in self.remarks],
        }


def inspect(
    source: RecipeSource,
    other: str | os.PathLike[str] | None = None,
    *more: str | os.PathLike[str],
    base: str | None = None,
    coefficients: Mapping[str, float] | None = None,
    stats: str = "sampled",
    spectral: int | None = None,
    vocabulary: str = "by-id",
    threads: int | None = None,
    follow_links: bool = False,
    locked: bool = False,
    hub: str = "stream",
    reporter: Reporter | None = None,
) -> Inspection:
    """Measure what changed from model `source` to model `other`; or, alone, a recipe's updates, or a stored skill.

    Several stored skills, given directly or in a recipe, are measured individually and in pairs. base: the model that
    a recipe's target was trained from, to compute its own update [default: the model that the skill subtracts]. stats:
    how much the forecast computes: full, sampled or off. spectral: also measure how the matrices' updates spread over
    this many directions (1 to 64), one matrix in memory at a time. vocabulary: of two models, `by-token` takes rows of
    tokens from each other, not rows of ids.
    Raises UsageError, RecipeError, InputError, StalePlan, TemporaryError.
    """
    check_words(threads=threads, stats=stats, spectral=spectral, hub=hub, vocabulary=vocabulary)
    reporter = reporter or default_reporter("inspecting")
    access = Access(follow_links, locked, download=hub == "download")
    places = [name_of(source), *(os.fspath(place) for place in (other, *more) if place is not None)]
    if is_recipe(source, alone=len(places) == 1):
        check_alone(places, vocabulary)
        recipe = _measurable(load(source, coefficients))
        with planned(recipe, None, access, reporter.note, lenient=True) as (plan, checkpoints):
            plan.refuse_problems()
            found = inspect_merge(
                plan, checkpoints, base, access, stats=stats, spectral=spectral, threads=threads, reporter=reporter
            )
        return _warned(found, reporter)
    if coefficients:
        raise UsageError("coefficients apply only to a recipe", fix="leave `--set` out, or inspect a recipe")
    if base is not None:
        raise UsageError("a base applies only to a recipe", fix="leave `--base` out, or inspect a recipe")
    subject = _of_models(places, access, reporter, vocabulary)
    try:
        return _warned(_inspect(subject, stats, spectral, threads, reporter), reporter)
    finally:
        close_all(subject.checkpoints)


def _measurable(recipe: Recipe) -> Recipe:
    """Return the recipe with an output whose update can be measured: for an adapter, what it adds to its model."""
    if not recipe.makes_adapter:
        return recipe
    try:
        term = recipe.term({name: schedule.default for name, schedule in recipe.coefficients.items()})
    except ExpressionError as error:
        raise recipe.expression_error(error) from error
    return replace(recipe, output=replace(recipe.output, kind="skill" if degree(term) == 0 else "model"))


def _warned(found: Inspection, reporter: Reporter) -> Inspection:
    """Report an inspection's warnings, and return the inspection."""
    for remark in found.remarks:
        reporter.warn(remark.message, remark.fix)
    return found


def _of_models(places: Sequence[str], access: Access, reporter: Reporter, vocabulary: str) -> Subject:
    """Return the subject for two models, before and after, or for one or several stored skills and adapters."""
    if vocabulary != "by-id" and len(places) != 2:
        raise UsageError(OF_TWO, fix="leave `--vocabulary` out")
    if len(places) == 1:
        refuse_alone(places[0], access)
        return subject_of_skills(places, access, reporter)
    skills = [place for place in places if is_skill(place, access)]
    adapters = [place for place in places if is_adapter(place, access)]
    if len(skills) + len(adapters) == len(places):
        return subject_of_skills(places, access, reporter)
    fix = "pass two models, before and after, or only skills"
    if skills:
        model = next(place for place in places if place not in skills)
        raise UsageError(f"{skills[0]} is a skill, and {model} is not", fix=fix)
    if len(places) > 2:
        raise UsageError(f"{len(places)} models: {some(list(places))}", fix=fix)
    if adapters == [places[0]]:
        raise UsageError(
            f"{places[0]} is an adapter, which changes a model",
            fix=f"pass the model first: `skillmerge inspect {shlex.join(reversed(places))}`",
        )
    return subject_of_models(places[0], places[1], access, reporter, vocabulary)


def _beside(folder: Path, base: str, access: Access) -> Access:
    """Return access settings with advice for a base that exists beside the recipe only."""
    near = folder / base
    if not is_path(base) or Path(base).is_dir() or not near.is_dir():
        return access
    where = "`--base` starts at the working folder, paths in a recipe start at the recipe's"
    return replace(access, moved=f"did you mean `{os.path.relpath(near)}`? {where}")


def inspect_merge(
    plan: Plan,
    checkpoints: Mapping[str, Checkpoint],
    base: str | None,
    access: Access,
    *,
    stats: str = "off",
    spectral: int | None = None,
    threads: int | None = None,
    reporter: Reporter | None = None,
) -> Inspection:
    """Measure the updates of a merge whose models are open. base: the place of the model that its target comes from."""
    reporter = reporter or default_reporter("inspecting")
    beside = access if base is None else _beside(plan.recipe.folder, base, access)
    extra = open_named({"base": base}, beside, reporter) if base is not None else {}
    try:
        _refuse_calls(plan.recipe)
        subject = subject_of_recipe(plan, {**checkpoints, **({BASE: extra["base"]} if extra else {})})
        subject = replace(subject, doubts=plan.warnings)
        return _inspect(subject, stats, spectral, threads, reporter)
    finally:
        close_all(extra)


def _inspect(subject: Subject, stats: str, spectral: int | None, threads: int | None, reporter: Reporter) -> Inspection:
    from skillmerge.study.spectrum import measure_spectra
    from skillmerge.study.update_metrics import describe_all
    from skillmerge.study.update_pass import measure_updates

    tasks, left = _tasks(subject)
    sizes = {task.name: math.prod(task.shape) for task in tasks}
    forecaster = Forecaster(subject.plan, subject.target, subject.difference, subject.minus, stats, sizes)
    measured = measure_updates(subject, tasks, forecaster, threads or min(_MAX_THREADS, cores()), reporter)
    rows = {name: (row.update, row.pair) for name, row in measured.items()}
    experts = by_expert({name: row.experts for name, row in measured.items()}, rows)
    groups = groups_of(rows)
    updates, pairs = _each(subject, measured, groups["modules"])
    spectra = measure_spectra(subject, tasks, spectral, reporter) if spectral is not None else {}
    return Inspection(
        title=subject.title,
        update=(subject.told or told_update(subject.update))
        + (", unless a rule says otherwise" if subject.by_tensor else ""),
        second=f"{subject.target} - {subject.reference}".replace(BASE, "base") if subject.reference else None,
        tensors=describe_all(rows, {name: [name] for name in rows}),
        spectra=spectra,
        total=describe_all(rows, {"all": list(rows)}).get("all", {}),
        modules=describe_all(rows, groups["modules"]),
        layers=describe_all(rows, groups["layers"]),
        cells=describe_all(rows, groups["cells"]),
        summaries=describe_all(rows, groups["summaries"]),
        experts=describe_all(experts, expert_groups(experts)),
        forecast=forecaster.summary(),
        plan=subject.plan,
        left=left,
        updates=updates,
        pairs=pairs,
        remarks=(*subject.doubts, *_remarks(subject, measured, tasks)),
        adapters={subject.name_of(name): found for name, found in adapters_of(subject.checkpoints).items()},
    )


def _each(
    subject: Subject, rows: Mapping[str, Row], modules: Mapping[str, list[str]]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return, for an update that is made of several, the figures of each and of every pair."""
    from skillmerge.study.update_metrics import describe_all

    def described(found: Mapping[str, tuple[Update, Pair | None]]) -> dict[str, Any]:
        whole = describe_all(found, {"all": list(found)}).get("all", {})
        return {"all": whole, "modules": describe_all(found, modules)}

    updates = {
        part.label: described({name: (row.parts[index], None) for name, row in rows.items()})
        for index, part in enumerate(subject.parts)
    }
    pairs = []
    for index, (one, other) in enumerate(combinations(range(len(subject.parts)), 2)):
        found = described({name: (row.parts[one], row.beside[index]) for name, row in rows.items()})
        labels = {"first": subject.parts[one].label, "second": subject.parts[other].label}
        modules_of = {kind: _of_two(row) for kind, row in found["modules"].items()}
        pairs.append({**labels, "all": _of_two(found["all"]), "modules": modules_of})
    return updates, pairs


def _of_two(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {key: figures[key] for key in ("tensors", *FIGURES_OF_TWO) if key in figures}


def _remarks(subject: Subject, rows: Mapping[str, Row], tasks: Sequence[TensorPlan]) -> Iterator[Remark]:
    """Yield warnings about updates that may be rounding, and about implausibly large ones."""
    from skillmerge.study.update_metrics import describe_all

    accept = subject.plan.recipe.accept if subject.plan is not None else frozenset()
    labels = [f"{part.label}: " for part in subject.parts] or [""]
    for index, label in enumerate(labels):
        found = {name: row.parts[index] if row.parts else row.update for name, row in rows.items()}
        groups = describe_all({name: (update, None) for name, update in found.items()}, kinds_of(found))
        whole = groups.pop("all")
        kinds = {kind: (row["norm"], row["input_rounding"]) for kind, row in groups.items()}
        ratios = ((task.name, task.shape, found[task.name].norm_ratio) for task in tasks)
        remarks = [
            *input_warning(
                whole["input_rounding"], whole["input_rounding_added"], whole["input_precisions"] or (), kinds
            ),
            *size_warning(too_large(ratios), IN_RECIPE if subject.plan is not None else None),
        ]
        yield from (replace(it, message=label + it.message) for it in remarks if it.name not in accept)


def _tasks(subject: Subject) -> tuple[list[TensorPlan], dict[str, str]]:
    """Return what to read for each tensor that all models have, as floats of one shape; and why others are left out."""
    first, *others = subject.models
    tasks: list[TensorPlan] = []
    left = equal_tensors(subject.models, subject.checkpoints, _only_copied(subject))
    for name, spec in subject.checkpoints[first].tensors.items():
        if name in left:
            continue
        sources = []
        for model in subject.models:
            source = find_source(spec, model, subject.checkpoints[model])
            found = subject.checkpoints[model].tensors[source.tensor] if source is not None else None
            if source is None or found is None:
                left[name] = f"not in {subject.name_of(model)}"
            elif not DTYPES[found.dtype].is_float:
                left[name] = f"{found.dtype} in {subject.name_of(model)}"
            elif found.shape != spec.shape:
                left[name] = (
                    f"{list(spec.shape)} in {subject.name_of(first)}, {list(found.shape)} in {subject.name_of(model)}"
                )
            else:
                sources.append(source)
        if not spec.elements:
            left[name] = "has no elements"
        elif len(sources) == len(subject.models):
            tasks.append(TensorPlan(name, spec.dtype, spec.shape, "inspect", tuple(sources)))
    for model in others:
        for name, spec in subject.checkpoints[model].tensors.items():
            if find_source(spec, first, subject.checkpoints[first]) is None:
                left.setdefault(name, f"not in {subject.name_of(first)}")
    if not tasks:
        raise UsageError(
            f"{subject.title}: the models share no tensor", fix="check that they have the same architecture"
        )
    return tasks, left


def _only_copied(subject: Subject) -> set[str]:
    """Return the tensors that a recipe takes from one model, or from none."""
    if subject.plan is None:
        return set()
    computed = {name for name, it in subject.plan.tensors.items() if it.action not in ("copy", "cast", "zero")}
    return {name for model in subject.models for name in subject.checkpoints[model].tensors} - computed


def _refuse_calls(recipe: Recipe) -> None:
    """Raise RecipeError if the updates of a recipe are no differences of models, which is all that is read here."""
    if called := next(calls_in(recipe.expression), None):
        pair = next(differences_in(recipe.expression), None)
        stored = pair is not None and {*pair} <= {*recipe.stored_models()}
        places = [str(recipe.model_place(name)) for name in reversed(pair)] if pair and stored else ["SFT", "RL"]
        raise recipe.error(
            ("merge",),
            f"`inspect` reads differences of models, and this recipe changes them with `{called.method}`",
            f"inspect the difference itself: `skillmerge inspect {shlex.join(places)}`",
        )
