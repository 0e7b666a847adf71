"""The pass of `inspect` over the weights: every tensor's update, measured tile by tile."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import torch
from torch import Tensor

from skillmerge.bits import first_nonfinite
from skillmerge.checkpoints.views.relations import experts_in
from skillmerge.engine.measures.input_rounding import Grain, grain_of, input_rounding, joined
from skillmerge.engine.stream import Stream
from skillmerge.engine.tiles import Reader, Tile
from skillmerge.errors import SkillmergeError, UnusableWeights
from skillmerge.methods.evaluate import Scratch
from skillmerge.naming import sliced
from skillmerge.plans.plan import TensorPlan
from skillmerge.reporter import Reporter
from skillmerge.study.forecast import Forecast, Forecaster
from skillmerge.study.subjects import Subject
from skillmerge.study.update_metrics import Pair, Update, add_up, measure_pair, measure_update
from skillmerge.tensors import CHUNK, DTYPES

_TILE, _REMOTE_TILE = 1 << 21, 1 << 23


@dataclass(frozen=True, slots=True)
class _Found:
    """Measurements of one tile."""

    update: Update
    pair: Pair | None
    parts: list[Update]
    beside: list[Pair]
    grains: dict[str, Grain]
    forecast: Forecast
    experts: dict[int, Update] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor. update, pair: of the whole update; parts: each of several updates; beside: each pair of those, in the
    order of `itertools.combinations`. experts: of a packed tensor, the whole update of each expert."""

    update: Update
    pair: Pair | None
    parts: tuple[Update, ...]
    beside: tuple[Pair, ...]
    experts: Mapping[int, Update] = field(default_factory=dict)


def measure_updates(
    subject: Subject, tasks: Sequence[TensorPlan], forecaster: Forecaster, threads: int, reporter: Reporter
) -> dict[str, Row]:
    """Return the measurements of each tensor's update, and feed the forecaster. Raises InputError, StalePlan."""
    remote = any(checkpoint.at.remote for checkpoint in subject.checkpoints.values())
    tile = _REMOTE_TILE if remote else _TILE
    rows: dict[str, Row] = {}
    parts: list[_Found] = []
    done = 0
    with (
        Stream(subject.checkpoints.values()) as stream,
        reporter.bar(sum(math.prod(task.shape) * DTYPES[task.dtype].itemsize for task in tasks)) as progress,
    ):
        measure = _Measure(subject, tile, forecaster, stream)
        tiles = list(_tiles(tasks, tile))
        for one, found in zip(tiles, stream.map(measure, tiles, threads=threads, ahead=4 * threads), strict=True):
            parts.append(found)
            name = one.tensor.name
            if one.last == math.prod(one.tensor.shape):
                rows[name] = _row(subject, name, parts)
                forecaster.add(name, [part.forecast for part in parts])
                parts.clear()
            done += one.nbytes
            progress(done)
        for checkpoint in subject.checkpoints.values():
            checkpoint.check_unchanged()
    return rows


def _row(subject: Subject, name: str, found: Sequence[_Found]) -> Row:
    """Combine the measurements of a tensor's tiles."""
    pairs = [tile.pair for tile in found if tile.pair is not None]
    experts: dict[int, list[Update]] = {}
    for expert, update in (item for tile in found for item in tile.experts.items()):
        experts.setdefault(expert, []).append(update)
    row = Row(
        add_up(tile.update for tile in found),
        add_up(pairs) if pairs else None,
        tuple(add_up(tiles) for tiles in zip(*(tile.parts for tile in found), strict=True)),
        tuple(add_up(tiles) for tiles in zip(*(tile.beside for tile in found), strict=True)),
        {expert: add_up(parts) for expert, parts in experts.items()},
    )
    grains = {model: joined(tile.grains[model] for tile in found) for model in found[0].grains}
    updates = [(row.update, subject.factors(name), subject.pair)]
    updates += [(update, part.update, part.pair) for update, part in zip(row.parts, subject.parts, strict=True)]
    for update, factors, pair in updates:
        by = -1.0 if pair is not None and factors[pair[0]] < 0 else 1.0  # of a skill that is subtracted, the skill
        inside = {model: by * factor for model, factor in factors.items() if factor}
        if inside.keys() <= grains.keys():
            update.set_rounding(input_rounding({model: grains[model] for model in inside}, inside))
    return row


def _tiles(tasks: Iterable[TensorPlan], tile: int) -> Iterator[Tile]:
    for task in tasks:
        elements = math.prod(task.shape)
        for first in range(0, elements, tile):
            yield Tile(task, first, min(first + tile, elements), 0)


def _stretches(tile: Tile) -> Iterator[tuple[int, int, int | None]]:
    """Yield runs of a tile's elements that are measured together, and the expert of each, if the tensor packs some."""
    tensor, first = tile.tensor, tile.first
    each = math.prod(tensor.shape[1:]) if experts_in(tensor.name, tensor.shape) else 0
    while first < tile.last:
        expert = first // each if each else None
        last = min(first + CHUNK, tile.last, (expert + 1) * each if expert is not None else tile.last)
        yield first, last, expert
        first = last


class _Own:
    """One thread's buffers."""

    def __init__(self, subject: Subject, tile: int) -> None:
        device = torch.device("cpu")
        models = [subject.checkpoints[model] for model in subject.models]
        widest = [max(DTYPES[spec.dtype].itemsize for spec in model.tensors.values()) for model in models]
        self.reader = Reader(subject.checkpoints, widest, tile, device)
        self.scratch = Scratch(device, CHUNK)

    def close(self) -> None:
        self.reader.close()


class _Measure:
    """Read a tile of all models, and measure it."""

    def __init__(self, subject: Subject, tile: int, forecaster: Forecaster, stream: Stream) -> None:
        self.subject, self.forecaster, self.stream = subject, forecaster, stream
        self._make = lambda: _Own(subject, tile)

    def __call__(self, tile: Tile) -> _Found:
        own = self.stream.own(self._make)
        inputs = own.reader.read_tile(tile)
        chunks: list[_Found] = []
        experts: dict[int, list[Update]] = {}
        for first, last, expert in _stretches(tile):
            if self.stream.stop.is_set():
                return _Found(Update(), None, [], [], {}, Forecast())
            pieces = {model: piece[first - tile.first : last - tile.first] for model, piece in inputs.items()}
            name = tile.tensor.name if expert is None else sliced(tile.tensor.name, expert)
            chunks.append(self._measure_chunk(tile, first, pieces, self.subject.factors(name)))
            if expert is not None:
                experts.setdefault(expert, []).append(chunks[-1].update)
        forecast = self.forecaster.measure(tile.tensor, tile.first, inputs, own.scratch, self.stream.stop)
        pairs = [chunk.pair for chunk in chunks if chunk.pair is not None]
        return _Found(
            add_up(chunk.update for chunk in chunks),
            add_up(pairs) if pairs else None,
            [add_up(found) for found in zip(*(chunk.parts for chunk in chunks), strict=True)],
            [add_up(found) for found in zip(*(chunk.beside for chunk in chunks), strict=True)],
            {model: joined(chunk.grains[model] for chunk in chunks) for model in chunks[0].grains},
            forecast,
            {expert: add_up(parts) for expert, parts in experts.items()},
        )

    def _measure_chunk(
        self, tile: Tile, first: int, pieces: Mapping[str, Tensor], factors: Mapping[str, float]
    ) -> _Found:
        subject = self.subject
        update = _combined(factors, pieces)
        measured = _measured(update, pieces, subject.against, subject.pair)
        if not math.isfinite(measured.squares[0] + sum(measured.weights or [])):
            raise _nonfinite(tile.tensor, pieces, first)
        pair = None
        if subject.target and subject.reference:
            other = pieces[subject.target].to(torch.float64) - pieces[subject.reference].to(torch.float64)
            pair = measure_pair(update, other)
            if not math.isfinite(pair.squares[0] + pair.products[0]):
                raise _nonfinite(tile.tensor, pieces, first)
        single = [_combined(part.update, pieces) for part in subject.parts]
        return _Found(
            measured,
            pair,
            [_measured(one, pieces, part.against, part.pair) for one, part in zip(single, subject.parts, strict=True)],
            [measure_pair(one, other) for one, other in combinations(single, 2)],
            {model: it for model in subject.numbers_of if (it := grain_of(pieces[model])) is not None},
            Forecast(),
        )


def _measured(
    update: Tensor, pieces: Mapping[str, Tensor], against: str | None, pair: tuple[str, str] | None
) -> Update:
    after, before = (pieces[model] for model in pair) if pair else (None, None)
    return measure_update(update, pieces[against] if against else None, before, after)


def _combined(factors: Mapping[str, float], pieces: Mapping[str, Tensor]) -> Tensor:
    """v in float64: exact for a difference of two models."""
    result: Tensor | None = None
    for model, factor in factors.items():
        value = pieces[model].to(torch.float64, copy=True)
        if result is None:
            result = value.mul_(factor)
        else:
            result = result.sub_(value) if factor == -1 else result.add_(value.mul_(factor))
    assert result is not None
    return result


def _nonfinite(task: TensorPlan, pieces: Mapping[str, Tensor], first: int) -> SkillmergeError:
    for model, piece in pieces.items():
        index = first_nonfinite(piece)
        if index is not None:
            return UnusableWeights(
                f"model `{model}` holds {piece[index].item()} in tensor `{task.name}` at element {first + index}",
                fix="the checkpoint is damaged; download or export it again",
            )
    return UnusableWeights(
        f"the update of tensor `{task.name}` is too large for float64",
        fix="check whether the checkpoint is damaged; download or export it again",
    )
