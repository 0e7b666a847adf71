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
import zlib
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skillmerge.accounting import find_source
from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.checkpoints.skill import SKILL_FILE
from skillmerge.errors import SkillmergeError, UsageError, some
from skillmerge.expression import (
    Leaf,
    Sum,
    Term,
    base_and_difference,
    bind,
    expand_skills,
    minus_of,
    weights,
)
from skillmerge.forecasting import Forecast, Forecaster
from skillmerge.naming import MODULE_KINDS, block_of, module_kind, summarised
from skillmerge.parallel import cores
from skillmerge.planning import Plan, TensorPlan, refuse_quantised
from skillmerge.recipe import Recipe, recipe_of
from skillmerge.reporter import Reporter
from skillmerge.sources import Access, close_all, open_models, planned
from skillmerge.tensors import CHUNK, DTYPES

if TYPE_CHECKING:
    from torch import Tensor

    from skillmerge.metrics import Pair, Update

_BASE = "--base"
"""What the model of that option is called beside the models of a recipe, none of which can have this name."""

MAX_RANK = 64
"""Directions that --spectral looks at, at most."""

_TILE, _REMOTE_TILE = 1 << 21, 1 << 23
_MAX_THREADS = 8


@dataclass(frozen=True, slots=True)
class Subject:
    """What is inspected. update: v, as factors of models. pair: (after, before), where v is their difference.
    against: the model whose weights v is compared with. target, reference: k is their difference.
    difference: v as a term that is added to `target` (or subtracted), for the forecast."""

    title: str
    checkpoints: Mapping[str, Checkpoint]
    update: Mapping[str, float]
    pair: tuple[str, str] | None
    against: str | None
    target: str | None = None
    reference: str | None = None
    difference: Term | None = None
    minus: bool = False
    plan: Plan | None = None
    by_tensor: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """The update's factors of tensors, where coefficients make them differ."""

    def factors(self, tensor: str) -> Mapping[str, float]:
        return self.by_tensor.get(tensor, self.update)

    @property
    def models(self) -> list[str]:
        others = [self.against, self.target, self.reference]
        return list(dict.fromkeys([*self.update, *(name for name in others if name)]))


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
        checkpoints = _open(models, access, reporter)
        title = f"from {models['before']} to {models['after']}"
        difference = Sum(Leaf("after"), Leaf("before"), minus=True)
        subject = Subject(
            title, checkpoints, {"after": 1.0, "before": -1.0}, ("after", "before"), "before", "before",
            difference=difference,
        )  # fmt: skip
    else:
        _refuse_model(Path(source))
        checkpoints = _open({"skill": {"skill": os.fspath(source)}}, access, reporter)
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
    extra = _open({"base": base}, access, reporter) if base is not None else {}
    try:
        subject = _of_recipe(plan, {**checkpoints, **({_BASE: extra["base"]} if extra else {})})
        return _inspect(subject, stats, spectral, threads, reporter)
    finally:
        close_all(extra)


def _refuse_model(path: Path) -> None:
    if path.is_dir() and not (path / SKILL_FILE).exists():
        raise UsageError(
            f"{path} is a folder, and not of a skill", fix="name two models, before and after; or a recipe; or a skill"
        )


def _open(models: Mapping[str, Any], access: Access, reporter: Reporter) -> dict[str, Checkpoint]:
    recipe = recipe_of(models, " + ".join(models), {"path": "nowhere"}, "skillmerge inspect")
    return open_models(recipe, access, reporter.warn)


def _of_recipe(plan: Plan, checkpoints: Mapping[str, Checkpoint]) -> Subject:
    """The updates of a merge. A single coefficient before the whole difference is left out, as its norms say
    nothing of the skill; any other coefficients are part of what the update is."""
    recipe = plan.recipe
    title = f"{recipe.document.name}: {recipe.document.data['merge']}"
    plain = _bound(recipe, dict.fromkeys(recipe.coefficients, 1.0))
    target, difference, minus = _split(plain, plan)
    by_tensor: dict[str, Mapping[str, float]] = {}
    alike = True
    if _is_scaled(recipe, target):
        update = weights(difference, -1.0 if minus else 1.0) if difference is not None else _update(plain, target)
    else:
        term = _bound(recipe, {name: schedule.default for name, schedule in recipe.coefficients.items()})
        target, difference, minus = _split(term, plan)
        for name, row in plan.tensors.items():
            if row.coefficients:
                values = dict(zip(plan.coefficients, row.coefficients, strict=True))
                by_tensor[name] = _update(_bound(recipe, values), target)
        alike = len({tuple(factors.items()) for factors in by_tensor.values()}) <= 1
        update = dict(next(iter(by_tensor.values()), {})) if alike else _update(term, target)
        if not alike:  # every model that any tensor needs is read
            update = {**{model: 0.0 for factors in by_tensor.values() for model in factors}, **update}
            difference = None
        else:
            by_tensor = {}
    if alike:
        update = {model: factor for model, factor in update.items() if factor}
    if not update:
        what = f"is `{target}` itself" if target else "comes to nothing"
        raise recipe.error(("merge",), f"the expression {what}: there is no update to inspect")
    pair = _pair(update, recipe)
    before = _real(pair, recipe, 1)
    if target is None:
        return Subject(title, checkpoints, update, pair, before, by_tensor=by_tensor)
    reference = _BASE if _BASE in checkpoints else before if before != target else None
    return Subject(
        title, checkpoints, update, pair if before else None, before or target, target, reference,
        difference, minus, plan, by_tensor,
    )  # fmt: skip


def _split(term: Term | None, plan: Plan) -> tuple[str | None, Term | None, bool]:
    """The model that an update is added to (None for a skill), the update as a term where it stands as one, and
    whether it is subtracted."""
    if plan.makes_skill:
        return None, None, False
    found = base_and_difference(term) if term is not None else None
    return found if found is not None else (plan.donor, None, False)


def _bound(recipe: Recipe, values: Mapping[str, float]) -> Term | None:
    return expand_skills(bind(recipe.expression, values), recipe.skills)


def _update(term: Term | None, target: str | None) -> dict[str, float]:
    """What a term adds to `target`, as factors of models."""
    factors = weights(term)
    if target is not None:
        factors = {**factors, target: factors.get(target, 0.0) - 1}
    return {model: factor for model, factor in factors.items() if factor}


def _is_scaled(recipe: Recipe, target: str | None) -> bool:
    """Whether coefficients only scale the update as a whole: it keeps its direction whatever they are."""
    plain = _update(_bound(recipe, dict.fromkeys(recipe.coefficients, 1.0)), target)
    values = {name: 2.0 + 0.37 * index for index, name in enumerate(recipe.coefficients)}
    other = _update(_bound(recipe, values), target)
    if not plain or plain.keys() != other.keys():
        return False
    by = {other[model] / factor for model, factor in plain.items()}
    return max(by) - min(by) <= 1e-12 * max(map(abs, by))


def _pair(update: Mapping[str, float], recipe: Recipe) -> tuple[str, str] | None:
    """(after, before), where the update is the plain difference of two models."""
    ordered = sorted(update.items(), key=lambda item: -item[1])
    return (ordered[0][0], ordered[1][0]) if [factor for _, factor in ordered] == [1.0, -1.0] else None


def _real(pair: tuple[str, str] | None, recipe: Recipe, index: int) -> str | None:
    """A model of the pair, where it is one and not a plane of a skill."""
    return pair[index] if pair is not None and pair[index] in recipe.models else None


# The pass.


@dataclass(frozen=True, slots=True)
class _Found:
    """What one tile gave."""

    update: Update
    pair: Pair | None
    forecast: Forecast


def _inspect(subject: Subject, stats: str, spectral: int | None, threads: int | None, reporter: Reporter) -> Inspection:
    from skillmerge.metrics import describe_all

    for model, checkpoint in subject.checkpoints.items():
        refuse_quantised(_name_of(model), checkpoint)
    tasks, left = _tasks(subject)
    sizes = {task.name: math.prod(task.shape) for task in tasks}
    forecaster = Forecaster(subject.plan, subject.target, subject.difference, subject.minus, stats, sizes)
    rows = _measured(subject, tasks, forecaster, threads or min(_MAX_THREADS, cores()), reporter)
    groups = _groups(rows)
    spectra = _spectra(subject, tasks, spectral, reporter) if spectral is not None else {}
    return Inspection(
        title=subject.title,
        update=_told(subject),
        second=f"{subject.target} - {subject.reference}".replace(_BASE, "base") if subject.reference else None,
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

    from skillmerge.metrics import add_up

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
    return "base" if model == _BASE else model.removesuffix(minus_of(""))


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

        from skillmerge.arithmetic import Scratch
        from skillmerge.metrics import Update, add_up, measure_pair, measure_update
        from skillmerge.reading import Reader, Span, Tile

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
        from skillmerge.arithmetic import first_nonfinite
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


def _spectra(
    subject: Subject, tasks: Sequence[TensorPlan], rank: int, reporter: Reporter
) -> dict[str, dict[str, float | None]]:
    """Of every matrix, one at a time: in float32, or float64 where a model has it."""
    import torch

    from skillmerge.arithmetic import torch_dtype
    from skillmerge.spectrum import describe_spectrum

    def read(model: str, source: str, wide: torch.dtype) -> Tensor:
        spec = subject.checkpoints[model].tensors[source]
        content = bytearray(spec.nbytes)
        subject.checkpoints[model].read_into(spec, 0, memoryview(content))
        return torch.frombuffer(content, dtype=torch_dtype(spec.dtype)).view(spec.shape).to(wide)

    matrices = [task for task in tasks if len(task.shape) == 2 and min(task.shape) > 1]
    spectra = {}
    with reporter.bar(sum(math.prod(task.shape) for task in matrices)) as progress:
        done = 0
        for task in matrices:
            sources = dict(task.sources)
            dtypes = {subject.checkpoints[model].tensors[source].dtype for model, source in task.sources}
            wide = torch.float64 if "F64" in dtypes else torch.float32
            update = torch.zeros(task.shape, dtype=wide)
            for model, factor in subject.factors(task.name).items():
                update.add_(read(model, sources[model], wide), alpha=factor)
            against = read(subject.against, sources[subject.against], wide) if subject.against else None
            if not all(bool(matrix.isfinite().all()) for matrix in (update, against) if matrix is not None):
                raise UsageError(
                    f"--spectral: tensor `{task.name}` is too large for {str(wide).removeprefix('torch.')}",
                    fix="leave --spectral out",
                )
            spectra[task.name] = describe_spectrum(update, against, rank, zlib.crc32(task.name.encode()))
            done += math.prod(task.shape)
            progress(done)
    return spectra
