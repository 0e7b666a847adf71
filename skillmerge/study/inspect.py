"""The verb inspect: what changed between two models, what a merge puts together, what a stored skill holds.

One streaming pass: every tensor's update is measured by `metrics`, and, where there is a target, a recipe's
rounding is forecast: for some blocks (those that `apply --stats sampled` looks at, or all) the arithmetic of
`apply` is done for every lambda of a grid and three ways to round, and measured as `apply` measures. Nothing is
written. What the figures mean stands in docs/inspect.md.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skillmerge.brief import brief
from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.checkpoints.schemes import is_path
from skillmerge.engine.runner import check_words
from skillmerge.errors import UsageError, some
from skillmerge.methods.terms import Leaf, Sum, expand_skills, model_of, weights
from skillmerge.naming import MODULE_KINDS, layer_label, layer_of, module_kind, summarised
from skillmerge.plans.dtypes.quantised import refuse_quantised
from skillmerge.plans.mapping import find_source
from skillmerge.plans.opening import Access, close_all, planned
from skillmerge.plans.plan import Plan, TensorPlan
from skillmerge.recipes.parse import RECIPE_SUFFIXES
from skillmerge.reporter import Reporter
from skillmerge.study.forecast import Forecaster, plain
from skillmerge.study.subjects import BASE, Subject, open_named, refuse_model, subject_of_recipe
from skillmerge.tensors import DTYPES
from skillmerge.threads import cores

if TYPE_CHECKING:
    pass


_MAX_THREADS = 8


@dataclass(frozen=True, slots=True)
class Inspection:
    """What was found. tensors, groups (`all`, modules, layers, cells): label -> figures, see docs/inspect.md.

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
    """Tensors again, the experts of a layer together under `*`."""
    cells: Mapping[str, Mapping[str, Any]]
    """One layer's tensors of one kind, as `STACK LAYER KIND`."""
    spectra: Mapping[str, Mapping[str, float | None]]
    """Of matrices, where that was asked for: how the update spreads over directions."""
    forecast: Mapping[str, Any] | None
    plan: Plan | None
    left: Mapping[str, str]
    """Tensors that are left out -> why."""

    __repr__ = brief

    @property
    def notes(self) -> list[str]:
        count = f"{len(self.left)} tensor{'s are' if len(self.left) > 1 else ' is'} left out"
        return [f"{count}: {some([f'{name} ({why})' for name, why in self.left.items()])}"] if self.left else []

    def as_dict(self) -> dict[str, Any]:
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
        }


def inspect(
    source: str | os.PathLike[str],
    other: str | os.PathLike[str] | None = None,
    *,
    base: str | None = None,
    coefficients: Mapping[str, float] | None = None,
    stats: str = "sampled",
    spectral: int | None = None,
    threads: int | None = None,
    follow_links: bool = False,
    locked: bool = False,
    hub: str = "stream",
    reporter: Reporter | None = None,
) -> Inspection:
    """Measure what changed from model `source` to model `other`; or, alone, a recipe's updates, or a stored skill.

    base: the model that a recipe's target was trained from: its knowledge update is taken against that, and else
    against what the skill was cut from. stats: how much the forecast computes: full, sampled or off. spectral:
    also how the matrices' updates spread over this many directions (1 to 64), a matrix at a time in memory.
    Raises UsageError, RecipeError, InputError, StalePlan, TemporaryError.
    """
    check_words(threads=threads, stats=stats, spectral=spectral, hub=hub)
    reporter = reporter or Reporter()
    access = Access(follow_links, locked, download=hub == "download")
    alone = other is None and not Path(source).is_dir() and is_path(os.fspath(source))
    if alone and (Path(source).is_file() or Path(source).suffix in RECIPE_SUFFIXES):
        with planned(source, coefficients, access, reporter.note, lenient=True) as (plan, checkpoints):
            for remark in plan.warnings:
                reporter.warn(remark.message, remark.fix)
            plan.refuse_problems()
            return inspect_merge(
                plan, checkpoints, base, access, stats=stats, spectral=spectral, threads=threads, reporter=reporter
            )
    if coefficients:
        raise UsageError("coefficients belong to a recipe", fix="leave --set out, or inspect a recipe")
    if base is not None:
        raise UsageError("a base belongs to a recipe's target", fix="leave --base out, or inspect a recipe")
    subject = _of_models(source, other, access, reporter)
    try:
        return _inspect(subject, stats, spectral, threads, reporter)
    finally:
        close_all(subject.checkpoints)


def _of_models(
    source: str | os.PathLike[str], other: str | os.PathLike[str] | None, access: Access, reporter: Reporter
) -> Subject:
    """Two models, before and after; or a stored skill alone."""
    if other is None:
        refuse_model(Path(source))
        checkpoints = open_named({"skill": {"skill": os.fspath(source)}}, access, reporter)
        update = weights(expand_skills(Leaf("skill"), {"skill"}))
        return Subject(f"skill {os.fspath(source)}", checkpoints, update, None, None)
    models = {"before": os.fspath(source), "after": os.fspath(other)}
    return Subject(
        f"from {models['before']} to {models['after']}",
        open_named(models, access, reporter),
        {"after": 1.0, "before": -1.0},
        ("after", "before"),
        "before",
        "before",
        difference=Sum(Leaf("after"), Leaf("before"), minus=True),
    )


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
    """Measure the updates of a merge whose models are open. base: where what its target was trained from is."""
    reporter = reporter or Reporter()
    extra = open_named({"base": base}, access, reporter) if base is not None else {}
    try:
        subject = subject_of_recipe(plan, {**checkpoints, **({BASE: extra["base"]} if extra else {})})
        return _inspect(subject, stats, spectral, threads, reporter)
    finally:
        close_all(extra)


def _inspect(subject: Subject, stats: str, spectral: int | None, threads: int | None, reporter: Reporter) -> Inspection:
    from skillmerge.study.spectrum import measure_spectra
    from skillmerge.study.update_metrics import describe_all
    from skillmerge.study.update_pass import measure_updates

    for model, checkpoint in subject.checkpoints.items():
        refuse_quantised(_name_of(model), checkpoint)
    tasks, left = _tasks(subject)
    sizes = {task.name: math.prod(task.shape) for task in tasks}
    forecaster = Forecaster(subject.plan, subject.target, subject.difference, subject.minus, stats, sizes)
    rows = measure_updates(subject, tasks, forecaster, threads or min(_MAX_THREADS, cores()), reporter)
    groups = _groups(rows)
    spectra = measure_spectra(subject, tasks, spectral, reporter) if spectral is not None else {}
    return Inspection(
        title=subject.title,
        update=_told(subject),
        second=f"{subject.target} - {subject.reference}".replace(BASE, "base") if subject.reference else None,
        tensors=describe_all(rows, {name: [name] for name in rows}),
        spectra=spectra,
        total=describe_all(rows, {"all": list(rows)}).get("all", {}),
        modules=describe_all(rows, groups["modules"]),
        layers=describe_all(rows, groups["layers"]),
        cells=describe_all(rows, groups["cells"]),
        summaries=describe_all(rows, groups["summaries"]),
        forecast=forecaster.summary(),
        plan=subject.plan,
        left=left,
    )


def _told(subject: Subject) -> str:
    """`rl - sft`, of factors."""
    parts = []
    update = {model: factor for model, factor in subject.update.items() if factor}
    update = {model: factor for model, factor in update.items() if model_of(model) == model}
    for model, factor in sorted(update.items(), key=lambda item: -item[1]):
        size = "" if abs(factor) == 1 else f"{abs(factor):g} * "
        parts.append(f"{'-' if factor < 0 else '+'} {size}{model}")
    told = " ".join(parts).removeprefix("+ ")
    return f"{told}, where no rule says otherwise" if subject.by_tensor else told


def _tasks(subject: Subject) -> tuple[list[TensorPlan], dict[str, str]]:
    """What to read for each tensor that all models have, as floats of one shape; and why others are left out."""
    first, *others = subject.models
    tasks: list[TensorPlan] = []
    left: dict[str, str] = {}
    for name, spec in subject.checkpoints[first].tensors.items():
        sources = []
        for model in subject.models:
            source = find_source(spec, model, subject.checkpoints[model])
            found = subject.checkpoints[model].tensors[source.tensor] if source is not None else None
            if source is None or found is None:
                left[name] = f"not in {_name_of(model)}"
            elif not DTYPES[found.dtype].is_float:
                left[name] = f"{found.dtype} in {_name_of(model)}"
            elif found.shape != spec.shape:
                left[name] = f"{list(spec.shape)} in {_name_of(first)}, {list(found.shape)} in {_name_of(model)}"
            else:
                sources.append(source)
        if not spec.elements:
            left[name] = "has no elements"
        elif len(sources) == len(subject.models):
            tasks.append(TensorPlan(name, spec.dtype, spec.shape, "inspect", tuple(sources)))
    for model in others:
        for name, spec in subject.checkpoints[model].tensors.items():
            if find_source(spec, first, subject.checkpoints[first]) is None:
                left.setdefault(name, f"not in {_name_of(first)}")
    if not tasks:
        raise UsageError(f"{subject.title}: the models share no tensor", fix="are they of one architecture?")
    return tasks, left


def _name_of(model: str) -> str:
    """As the person called it who named it."""
    return "base" if model == BASE else model_of(model)


def _groups(rows: Mapping[str, Any]) -> dict[str, dict[str, list[str]]]:
    modules: dict[str, list[str]] = {kind: [] for kind in (*MODULE_KINDS, "other")}
    layers: dict[str, list[str]] = {}
    cells: dict[str, list[str]] = {}
    summaries: dict[str, list[str]] = {}
    for name in sorted(rows, key=lambda name: layer_of(name) or ("~", 0)):
        label = layer_label(name)
        modules[module_kind(name)].append(name)
        layers.setdefault(label, []).append(name)
        cells.setdefault(f"{label} {module_kind(name)}", []).append(name)
        summaries.setdefault(summarised(name), []).append(name)
    return {"modules": modules, "layers": layers, "cells": cells, "summaries": summaries}
