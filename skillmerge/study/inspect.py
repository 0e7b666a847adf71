"""The verb inspect: what changed between two models, what a merge puts together, what a stored skill holds.

One streaming pass: every tensor's update is measured by `metrics`, and, where there is a target, a recipe's
rounding is forecast: for some blocks (those that `apply --stats sampled` looks at, or all) the arithmetic of
`apply` is done for every lambda of a grid and three ways to round, and measured as `apply` measures. Nothing is
written. What the figures mean stands in docs/inspect.md.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.errors import SkillmergeError, UsageError, some
from skillmerge.methods.terms import Leaf, Sum, minus_of
from skillmerge.naming import MODULE_KINDS, block_of, module_kind, summarised
from skillmerge.plans.accounting import find_source
from skillmerge.plans.opening import Access, close_all, planned
from skillmerge.plans.plan import Plan, TensorPlan
from skillmerge.plans.planner import refuse_quantised
from skillmerge.reporter import Reporter
from skillmerge.study.forecast import Forecast, Forecaster
from skillmerge.study.spectrum import measure_spectra
from skillmerge.study.subjects import BASE, Subject, open_named, refuse_model, subject_of_recipe
from skillmerge.tensors import CHUNK, DTYPES
from skillmerge.threads import cores

if TYPE_CHECKING:
    from torch import Tensor

    from skillmerge.study.update_metrics import Pair, Update


MAX_RANK = 64
"""Directions that --spectral looks at, at most."""

_TILE, _REMOTE_TILE = 1 << 21, 1 << 23
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
            "forecast": self.forecast,
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
    if stats not in ("full", "sampled", "off"):
        raise UsageError(f"stats {stats!r}: full, sampled or off")
    if spectral is not None and not 1 <= spectral <= MAX_RANK:
        raise UsageError(f"spectral rank {spectral}: 1 to {MAX_RANK}")
    reporter = reporter or Reporter()
    access = Access(follow_links, locked, download=hub == "download")
    if other is None and Path(source).is_file():
        with planned(source, coefficients, False, access, reporter.warn) as (plan, checkpoints):
            plan.refuse_problems()
            return inspect_merge(
                plan, checkpoints, base, access, stats=stats, spectral=spectral, threads=threads, reporter=reporter
            )
    if coefficients:
        raise UsageError("coefficients belong to a recipe", fix="leave --set out, or inspect a recipe")
    if base is not None:
        raise UsageError("a base belongs to a recipe's target", fix="leave --base out, or inspect a recipe")
    if other is not None:
        models = {"before": os.fspath(source), "after": os.fspath(other)}
        checkpoints = open_named(models, access, reporter)
        title = f"from {models['before']} to {models['after']}"
        difference = Sum(Leaf("after"), Leaf("before"), minus=True)
        subject = Subject(
            title, checkpoints, {"after": 1.0, "before": -1.0}, ("after", "before"), "before", "before",
            difference=difference,
        )  # fmt: skip
    else:
        refuse_model(Path(source))
        checkpoints = open_named({"skill": {"skill": os.fspath(source)}}, access, reporter)
        subject = Subject(
            f"skill {os.fspath(source)}", checkpoints, {"skill": 1.0, minus_of("skill"): -1.0}, None, None
        )
    try:
        return _inspect(subject, stats, spectral, threads, reporter)
    finally:
        close_all(checkpoints)


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


# The pass.


@dataclass(frozen=True, slots=True)
class _Found:
    """What one tile gave."""

    update: Update
    pair: Pair | None
    forecast: Forecast


def _inspect(subject: Subject, stats: str, spectral: int | None, threads: int | None, reporter: Reporter) -> Inspection:
    from skillmerge.study.update_metrics import describe_all

    for model, checkpoint in subject.checkpoints.items():
        refuse_quantised(_name_of(model), checkpoint)
    tasks, left = _tasks(subject)
    sizes = {task.name: math.prod(task.shape) for task in tasks}
    forecaster = Forecaster(subject.plan, subject.target, subject.difference, subject.minus, stats, sizes)
    rows = _measured(subject, tasks, forecaster, threads or min(_MAX_THREADS, cores()), reporter)
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


def _measured(
    subject: Subject, tasks: Sequence[TensorPlan], forecaster: Forecaster, threads: int, reporter: Reporter
) -> dict[str, tuple[Update, Pair | None]]:
    """The one pass over the weights: what each tensor's updates look like. The forecaster is told the rest."""
    import torch

    from skillmerge.study.update_metrics import add_up

    remote = any(checkpoint.files.remote for checkpoint in subject.checkpoints.values())
    tile = _REMOTE_TILE if remote else _TILE
    tiles = [
        (task, first, min(first + tile, math.prod(task.shape)))
        for task in tasks
        for first in range(0, math.prod(task.shape), tile)
    ]
    itemsizes = {task.name: DTYPES[task.dtype].itemsize for task in tasks}
    pass_ = _Pass(subject, tile, forecaster)
    rows: dict[str, tuple[Update, Pair | None]] = {}
    parts: list[_Found] = []
    done = 0
    intraop = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(threads)
    try:
        futures = deque(pool.submit(pass_.measure, *item) for item in tiles)
        with reporter.bar(sum(math.prod(task.shape) * itemsizes[task.name] for task in tasks)) as progress:
            for task, first, last in tiles:
                parts.append(futures.popleft().result())
                if last == math.prod(task.shape):
                    pairs = [part.pair for part in parts if part.pair is not None]
                    rows[task.name] = (add_up(part.update for part in parts), add_up(pairs) if pairs else None)
                    forecaster.add(task.name, [part.forecast for part in parts])
                    parts.clear()
                done += (last - first) * itemsizes[task.name]
                progress(done)
        for checkpoint in subject.checkpoints.values():
            checkpoint.check_unchanged()
    except BaseException:
        pass_.stop.set()
        for checkpoint in subject.checkpoints.values():
            checkpoint.files.cancel()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        pass_.close()
        torch.set_num_threads(intraop)
    return rows


def _told(subject: Subject) -> str:
    """`rl - sft`, of factors."""
    parts = []
    update = {model: factor for model, factor in subject.update.items() if factor}
    skills = {model for model in update if minus_of(model) in update}
    update = {model: factor for model, factor in update.items() if model not in map(minus_of, skills)}
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
            source = find_source(spec, subject.checkpoints[model])
            found = subject.checkpoints[model].tensors[source] if source is not None else None
            if source is None or found is None:
                left[name] = f"not in {_name_of(model)}"
            elif not DTYPES[found.dtype].is_float:
                left[name] = f"{found.dtype} in {_name_of(model)}"
            elif found.shape != spec.shape:
                left[name] = f"{list(spec.shape)} in {_name_of(first)}, {list(found.shape)} in {_name_of(model)}"
            else:
                sources.append((model, source))
        if not spec.elements:
            left[name] = "has no elements"
        elif len(sources) == len(subject.models):
            tasks.append(TensorPlan(name, spec.dtype, spec.shape, "inspect", tuple(sources)))
    for model in others:
        for name, spec in subject.checkpoints[model].tensors.items():
            if find_source(spec, subject.checkpoints[first]) is None:
                left.setdefault(name, f"not in {_name_of(first)}")
    if not tasks:
        raise UsageError(f"{subject.title}: the models share no tensor", fix="are they of one architecture?")
    return tasks, left


def _name_of(model: str) -> str:
    """As the person called it who named it."""
    return "base" if model == BASE else model.removesuffix(minus_of(""))


def _groups(rows: Mapping[str, Any]) -> dict[str, dict[str, list[str]]]:
    modules: dict[str, list[str]] = {kind: [] for kind in (*MODULE_KINDS, "other")}
    layers: dict[str, list[str]] = {}
    cells: dict[str, list[str]] = {}
    summaries: dict[str, list[str]] = {}
    for name in sorted(rows, key=lambda name: block_of(name) or ("~", 0)):
        block = block_of(name)
        label = f"{block[0]} {block[1]}" if block else "outside blocks"
        modules[module_kind(name)].append(name)
        layers.setdefault(label, []).append(name)
        cells.setdefault(f"{label} {module_kind(name)}", []).append(name)
        summaries.setdefault(summarised(name), []).append(name)
    return {"modules": modules, "layers": layers, "cells": cells, "summaries": summaries}


class _Pass:
    """The threads' common ground: a reader for each, and what is done with a tile."""

    def __init__(self, subject: Subject, tile: int, forecaster: Forecaster) -> None:
        self.subject, self.tile, self.forecaster = subject, tile, forecaster
        self.stop = threading.Event()
        self._mine = threading.local()
        self._readers: list[Any] = []

    def close(self) -> None:
        for reader in self._readers:
            reader.close()

    def measure(self, task: TensorPlan, first: int, last: int) -> _Found:
        """Read elements first..last of a tensor of all models, and measure them. Raises InputError, StalePlan."""
        import torch

        from skillmerge.engine.tiles import Reader, Span, Tile
        from skillmerge.methods.evaluate import Scratch
        from skillmerge.study.update_metrics import Update, add_up, measure_pair, measure_update

        if self.stop.is_set():
            return _Found(Update(), None, Forecast())
        if not hasattr(self._mine, "reader"):
            widest = [max(DTYPES[spec.dtype].itemsize for spec in checkpoint.tensors.values())
                      for checkpoint in (self.subject.checkpoints[model] for model in self.subject.models)]  # fmt: skip
            device = torch.device("cpu")
            self._mine.reader = Reader(self.subject.checkpoints, widest, self.tile, device)
            self._mine.scratch = Scratch(device, CHUNK)
            self._readers.append(self._mine.reader)
        with torch.inference_mode():
            (values,) = self._mine.reader.read(Span(0, (Tile(task, first, last, 0),)))
            inputs = dict(zip((model for model, _ in task.sources), values, strict=True))
            updates: list[Update] = []
            pairs: list[Pair] = []
            for start in range(0, last - first, CHUNK):
                pieces = {model: piece[start : start + CHUNK] for model, piece in inputs.items()}
                update = self._combined(task.name, pieces)
                subject = self.subject
                after, before = (pieces[model] for model in subject.pair) if subject.pair else (None, None)
                against = pieces[subject.against] if subject.against else None
                updates.append(measure_update(update, against, before, after))
                if not math.isfinite(updates[-1].squares[0] + sum(updates[-1].weights or [])):
                    raise self._nonfinite(task, pieces, first + start)
                if subject.target and subject.reference:
                    other = pieces[subject.target].to(torch.float64) - pieces[subject.reference].to(torch.float64)
                    pairs.append(measure_pair(update, other))
                    if not math.isfinite(pairs[-1].squares[0] + pairs[-1].products[0]):
                        raise self._nonfinite(task, pieces, first + start)
                if self.stop.is_set():
                    return _Found(Update(), None, Forecast())
            forecast = self.forecaster.measure(task, first, inputs, self._mine.scratch, self.stop)
            return _Found(add_up(updates), add_up(pairs) if pairs else None, forecast)

    def _combined(self, tensor: str, pieces: Mapping[str, Tensor]) -> Tensor:
        """v in float64: exact for a difference of two models."""
        import torch

        result: Tensor | None = None
        for model, factor in self.subject.factors(tensor).items():
            value = pieces[model].to(torch.float64, copy=True)
            if result is None:
                result = value.mul_(factor)
            else:
                result = result.sub_(value) if factor == -1 else result.add_(value.mul_(factor))
        assert result is not None
        return result

    def _nonfinite(self, task: TensorPlan, pieces: Mapping[str, Tensor], first: int) -> SkillmergeError:
        from skillmerge.bits import first_nonfinite
        from skillmerge.errors import UnusableWeights

        for model, piece in pieces.items():
            index = first_nonfinite(piece)
            if index is not None:
                return UnusableWeights(
                    f"model `{model}` holds {piece[index].item()} in tensor `{task.name}` at element {first + index}",
                    fix="that checkpoint is damaged",
                )
        return UnusableWeights(
            f"the update of tensor `{task.name}` is too large for float64", fix="is that checkpoint damaged?"
        )
