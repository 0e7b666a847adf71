"""The pass of `inspect` over the weights: every tensor's update, measured tile by tile."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skillmerge.bits import first_nonfinite
from skillmerge.engine.stream import Stream
from skillmerge.engine.tiles import Reader, Tile
from skillmerge.errors import SkillmergeError, UnusableWeights
from skillmerge.methods.evaluate import Scratch
from skillmerge.plans.plan import TensorPlan
from skillmerge.reporter import Reporter
from skillmerge.study.forecast import Forecast, Forecaster
from skillmerge.study.subjects import Subject
from skillmerge.study.update_metrics import Pair, Update, add_up, measure_pair, measure_update
from skillmerge.tensors import CHUNK, DTYPES

_TILE, _REMOTE_TILE = 1 << 21, 1 << 23


@dataclass(frozen=True, slots=True)
class _Found:
    """What one tile gave."""

    update: Update
    pair: Pair | None
    forecast: Forecast


def measure_updates(
    subject: Subject, tasks: Sequence[TensorPlan], forecaster: Forecaster, threads: int, reporter: Reporter
) -> dict[str, tuple[Update, Pair | None]]:
    """What each tensor's update looks like; the forecaster learns the rest. Raises InputError, StalePlan."""
    remote = any(checkpoint.at.remote for checkpoint in subject.checkpoints.values())
    tile = _REMOTE_TILE if remote else _TILE
    rows: dict[str, tuple[Update, Pair | None]] = {}
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
                pairs = [part.pair for part in parts if part.pair is not None]
                rows[name] = (add_up(part.update for part in parts), add_up(pairs) if pairs else None)
                forecaster.add(name, [part.forecast for part in parts])
                parts.clear()
            done += one.nbytes
            progress(done)
        for checkpoint in subject.checkpoints.values():
            checkpoint.check_unchanged()
    return rows


def _tiles(tasks: Iterable[TensorPlan], tile: int) -> Iterator[Tile]:
    for task in tasks:
        elements = math.prod(task.shape)
        for first in range(0, elements, tile):
            yield Tile(task, first, min(first + tile, elements), 0)


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
        updates: list[Update] = []
        pairs: list[Pair] = []
        for start in range(0, tile.last - tile.first, CHUNK):
            if self.stream.stop.is_set():
                return _Found(Update(), None, Forecast())
            pieces = {model: piece[start : start + CHUNK] for model, piece in inputs.items()}
            self._measure_chunk(tile, tile.first + start, pieces, updates, pairs)
        forecast = self.forecaster.measure(tile.tensor, tile.first, inputs, own.scratch, self.stream.stop)
        return _Found(add_up(updates), add_up(pairs) if pairs else None, forecast)

    def _measure_chunk(
        self, tile: Tile, first: int, pieces: Mapping[str, Tensor], updates: list[Update], pairs: list[Pair]
    ) -> None:
        subject = self.subject
        update = self._combined(tile.tensor.name, pieces)
        after, before = (pieces[model] for model in subject.pair) if subject.pair else (None, None)
        against = pieces[subject.against] if subject.against else None
        updates.append(measure_update(update, against, before, after))
        if not math.isfinite(updates[-1].squares[0] + sum(updates[-1].weights or [])):
            raise _nonfinite(tile.tensor, pieces, first)
        if subject.target and subject.reference:
            other = pieces[subject.target].to(torch.float64) - pieces[subject.reference].to(torch.float64)
            pairs.append(measure_pair(update, other))
            if not math.isfinite(pairs[-1].squares[0] + pairs[-1].products[0]):
                raise _nonfinite(tile.tensor, pieces, first)

    def _combined(self, tensor: str, pieces: Mapping[str, Tensor]) -> Tensor:
        """v in float64: exact for a difference of two models."""
        result: Tensor | None = None
        for model, factor in self.subject.factors(tensor).items():
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
                fix="that checkpoint is damaged",
            )
    return UnusableWeights(
        f"the update of tensor `{task.name}` is too large for float64", fix="is that checkpoint damaged?"
    )
