"""Plan + checkpoints -> the files of a skill: differences of models, which are mostly zeros.

A worker takes a unit (up to UNIT elements of one tensor), reads it of every model, takes the
difference and encodes it; the units' parts are appended in the plan's order, and the header, for which room was
left, is written last. Where a difference is kept exactly, and as what, is said in `checkpoints/kinds/skill.py`. All of
this is on the CPU: it is reading and counting, and there is no arithmetic for a GPU to speed up.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from queue import SimpleQueue

import torch
from torch import Tensor

from skillmerge.bits import any_nonfinite, fold_sum, memory_of, torch_dtype
from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.checkpoints.kinds.sparse import Encoder, differing, places_of, within
from skillmerge.engine.destination import Destination, ShardRecord
from skillmerge.engine.measures.input_rounding import Grain, grain_of, joined
from skillmerge.engine.measures.preparing import Preparations
from skillmerge.engine.runner import Room
from skillmerge.engine.skill_file import Cut, Kept, SkillFile, Unit, compressed
from skillmerge.engine.stream import Stream
from skillmerge.engine.tiles import Tile
from skillmerge.engine.worker import Settings, Worker
from skillmerge.methods.rounding import round_nearest
from skillmerge.methods.terms import model_of, weights
from skillmerge.plans.plan import Plan, ShardPlan, TensorPlan
from skillmerge.tensors import BLOCK, CHUNK, DTYPES, UNIT

_WAIT = 0.2
"""Seconds between two looks at whether the run has failed, while there is no room on the disk."""


def cut_shards(
    plan: Plan,
    checkpoints: Mapping[str, Checkpoint],
    destination: Destination,
    settings: Settings,
    shards: Sequence[ShardPlan],
    progress: Callable[[int], None],
    room: Room | None = None,
) -> Iterator[ShardRecord]:
    """Write files of a skill, and yield the record of each as soon as it is durable; see `shards.merge_shards`."""
    threads = settings.budget.threads
    with Stream(checkpoints.values()) as stream:
        cutter = _Cutter(plan, checkpoints, settings, stream)
        cutter.compare_all()
        cutter.preparations.read_model(stream, cutter.new_worker, threads)
        if plan.recipe.output.keep is not None:
            chosen = [tensor for tensor in plan.tensors.values() if tensor.action == "compute"]
            select = partial(cutter.select, share=plan.recipe.output.keep)
            kept = stream.map(select, chosen, threads=threads, ahead=threads + 1)
            cutter.kept = dict(zip((tensor.name for tensor in chosen), kept, strict=True))
        units = [unit for shard in shards for unit in _units(plan, shard)]
        cuts = stream.map(cutter.cut, cutter.announced(units), threads=threads, ahead=threads + 1)

        maker = _Maker(cutter, cuts, room)
        stream.start(1, lambda: maker.make(shards, destination))
        stream.start(1, maker.complete)
        yield from stream.take(maker.done, len(shards), lambda: progress(maker.moved))


def prove_same(plan: Plan, checkpoints: Mapping[str, Checkpoint], settings: Settings) -> None:
    """Prove that tensors which have no difference are the same everywhere, as `cut_shards` does first. Raises
    UnusableWeights."""
    with Stream(checkpoints.values()) as stream:
        _Cutter(plan, checkpoints, settings, stream).compare_all()


class _Maker:
    """Files in the making: one thread puts cuts together, another makes files durable and digests them meanwhile."""

    def __init__(self, cutter: _Cutter, cuts: Iterator[Cut], room: Room | None) -> None:
        self._cutter, self._cuts, self._room = cutter, cuts, room
        self.made: SimpleQueue[SkillFile | None] = SimpleQueue()
        self.done: SimpleQueue[ShardRecord] = SimpleQueue()
        self.moved = 0

    def make(self, shards: Sequence[ShardPlan], destination: Destination) -> None:
        try:
            for shard in shards:
                if not self._has_room():
                    return
                file = self._put_together(shard, destination)
                if self._cutter.stream.stop.is_set():
                    return  # units that were cut since are empty
                self.made.put(file)
        finally:
            self.made.put(None)

    def _has_room(self) -> bool:
        """Return whether there is room for one more file, once there is; False where nothing more is wanted."""
        while self._room is not None and not self._room.acquire(timeout=_WAIT):
            if self._cutter.stream.stop.is_set():
                return False
        return True

    def _put_together(self, shard: ShardPlan, destination: Destination) -> SkillFile:
        cutter = self._cutter
        file = cutter.stream.keep(SkillFile(destination, shard, cutter.plan, cutter.checkpoints, cutter.kept))
        for unit in _units(cutter.plan, shard):
            file.add(unit, next(self._cuts))
            self.moved += unit.length * DTYPES[unit.spec.dtype].itemsize
        return file

    def complete(self) -> None:
        """Also of a run that has failed: a file that is put together is not to be made again."""
        hurry = self._cutter.stream.hurry
        while (file := self.made.get()) is not None:
            record = file.finish(hurry)
            if hurry.is_set():
                return  # its digest may be cut short
            self._cutter.preparations.done([spec.name for spec in file.shard.specs])  # a skill has no room for scalars
            for checkpoint in self._cutter.checkpoints.values():
                checkpoint.check_unchanged()
            self.done.put(record)


def _units(plan: Plan, shard: ShardPlan) -> Iterator[Unit]:
    for spec in shard.specs:
        for number in range(-(-spec.elements // UNIT)):
            yield Unit(plan.tensors[spec.name], number, spec)


_BINS = 1 << 16
"""Sizes are compared by the upper 16 bits of a float32 without its sign, which is one part in 256."""


class _Cutter:
    """Encodes units of a skill; each thread has its own worker."""

    def __init__(self, plan: Plan, checkpoints: Mapping[str, Checkpoint], settings: Settings, stream: Stream) -> None:
        self.plan, self.checkpoints, self._settings, self.stream = plan, checkpoints, settings, stream
        self.preparations = Preparations(plan, checkpoints, settings.budget.tile)
        self.kept: dict[str, Kept] = {}
        # A skill that is read says of what it was made itself, and of an adapter the other plane is nothing.
        entries = {name: plan.recipe.entries[model_of(name)] for name in checkpoints}
        self._digested = {name for name, it in entries.items() if it.kind != "skill" and name == model_of(name)}
        self._pair = () if any(entry.is_difference for entry in entries.values()) else _pair_of(plan)

    def _is_stored(self, model: str, tensor: str) -> bool:
        """Return whether a tensor is read as it is stored, so that its digest tells a parent."""
        return tensor not in self.checkpoints[model].rearranged

    @property
    def _worker(self) -> Worker:
        return self.stream.own(self.new_worker)

    def new_worker(self) -> Worker:
        return Worker(self.plan, self.checkpoints, self._settings, self.stream.stop, self.preparations)

    def announced(self, units: Sequence[Unit]) -> Iterator[Unit]:
        """Yield the units in their order; what the next one reads is read ahead."""
        for index, unit in enumerate(units):
            for coming in units[index + 1 : index + 2]:
                for model, source in coming.tensor.sources:
                    self.checkpoints[model].hint(source, coming.number * UNIT, coming.length)
            yield unit

    def compare_all(self) -> None:
        """Prove that tensors which have no difference are the same everywhere. Raises UnusableWeights."""
        for tensor in self.plan.tensors.values():
            elements = math.prod(tensor.shape) if tensor.action == "same" else 0
            for first in range(0, elements, UNIT):
                tile = Tile(tensor, first, min(first + UNIT, elements), 0)
                self._worker.compare(tile, list(self._worker.reader.read_tile(tile).values()))

    def select(self, tensor: TensorPlan, share: float) -> Kept:
        """Return which elements of a tensor are its largest, so great a share of them or a little less: a pass of its
        own."""
        worker, elements = self._worker, math.prod(tensor.shape)
        worker.prepare(tensor)
        if self.stream.stop.is_set():
            return Kept()
        counts, energies = torch.zeros(_BINS, dtype=torch.int64), torch.zeros(_BINS, dtype=torch.float64)
        for first in range(0, elements, UNIT):
            tile = Tile(tensor, first, min(first + UNIT, elements), 0)
            for start, pieces in self._chunks(worker, tile, worker.reader.read_tile(tile), {}):
                value, _ = worker.evaluate(tensor, first + start, pieces)
                bins = _bins_of(value)
                counts += torch.bincount(bins, minlength=_BINS)
                squares = value.to(torch.float64)
                energies += torch.bincount(bins, weights=squares.mul_(squares), minlength=_BINS)
            if self.stream.stop.is_set():
                return Kept()
        above, energy = counts.flip(0).cumsum(0), energies.flip(0).cumsum(0)
        width = int((above <= max(1, math.floor(share * elements))).sum())
        # The largest stay, however many have their size.
        width = max(width, int((above == 0).sum()) + 1)
        if width >= _BINS or not float(energy[-1]):
            return Kept()
        least = torch.tensor((_BINS - width) << 15, dtype=torch.int32).view(torch.float32)
        factor = math.sqrt(float(energy[-1]) / float(energy[width - 1])) if float(energy[width - 1]) else 1.0
        return Kept(float(least), factor, int(above[width - 1]) / elements)

    def cut(self, unit: Unit) -> Cut:
        """Read a unit of every model and encode the difference. Raises UnusableWeights."""
        worker = self._worker
        if unit.tensor.action == "zero" or self.stream.stop.is_set():
            return Cut({})
        worker.prepare(unit.tensor)
        if self.stream.stop.is_set():
            return Cut({})
        first = unit.number * UNIT
        tile = Tile(unit.tensor, first, first + unit.length, 0)
        inputs = worker.reader.read_tile(tile)
        sources = dict(unit.tensor.sources)
        digests = {it: hashlib.sha256() for it in inputs if it in self._digested and self._is_stored(it, sources[it])}
        grains: dict[str, list[Grain]] = {model: [] for model in self._pair if model in inputs}
        weights: list[float] = []
        chunks = self._seen(self._chunks(worker, tile, inputs, digests), grains, weights)
        cut = self._keep(chunks) if unit.tensor.action == "cut" else self._compute(worker, tile, chunks)
        cut.digests = {model: digest.hexdigest() for model, digest in digests.items()}
        cut.weights, cut.grains = weights, {model: joined(found) for model, found in grains.items() if found}
        if self.plan.recipe.output.compression == "zstd":
            cut.planes = {plane: compressed(encoded) for plane, encoded in cut.planes.items()}
        return cut

    @staticmethod
    def _chunks(
        worker: Worker, tile: Tile, inputs: Mapping[str, Tensor], digests: Mapping[str, hashlib._Hash]
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Yield a tile's values, checked and digested, in pieces that stay in the cache. Raises UnusableWeights."""
        for start in range(0, tile.last - tile.first, CHUNK):
            pieces = {model: values[start : start + CHUNK] for model, values in inputs.items()}
            for model, piece in pieces.items():
                if any(any_nonfinite(piece[at : at + BLOCK]) for at in range(0, piece.numel(), BLOCK)):
                    raise worker.nonfinite(tile, inputs, inputs[model])
                if model in digests:
                    digests[model].update(memory_of(piece))
            yield start, pieces

    def _seen(
        self,
        chunks: Iterable[tuple[int, dict[str, Tensor]]],
        grains: Mapping[str, list[Grain]],
        weights: list[float],
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Yield the same pieces, once it is known how coarse the numbers of both models are and how large the
        subtracted ones."""
        for start, pieces in chunks:
            for model, found in grains.items():
                if (grain := grain_of(pieces[model])) is not None:
                    found.append(grain)
            if self._pair:
                subtracted = pieces[self._pair[1]]
                wide = subtracted.to(torch.promote_types(subtracted.dtype, torch.float32), copy=True)
                weights.append(fold_sum(wide.mul_(wide)))
            yield start, pieces

    def _keep(self, chunks: Iterable[tuple[int, Mapping[str, Tensor]]]) -> Cut:
        """Return the exact difference of two models, as pairs."""
        cut = Cut({})
        planes: tuple[Encoder, Encoder] | None = None
        for _, pieces in chunks:
            a, b = pieces.values()
            plus, minus = planes = planes or (Encoder(a.dtype), Encoder(b.dtype))
            alike = a.dtype == b.dtype
            mask = differing(a, b) if alike else differing(a.to(torch.float64), b.to(torch.float64))
            places = places_of(mask)
            a, b = a.index_select(0, places), b.index_select(0, places)
            value = a - b if alike else (a.to(torch.float64) - b.to(torch.float64)).to(a.dtype)
            pairs = places_of(~_fits(a, b, value))
            update = value.to(torch.float64, copy=True)
            if len(pairs):
                update[pairs] = a[pairs].to(torch.float64) - b[pairs].to(torch.float64)
                value[pairs] = a[pairs]
            plus.add(mask, places, value)
            apart = places[pairs]
            minus.add(torch.zeros_like(mask).index_fill_(0, apart, True), apart, b[pairs])
            cut.changed += len(places)
            cut.pairs += len(pairs)
            if len(places):
                cut.squares.append(fold_sum(update.mul_(update)))
        if planes is not None:
            cut.planes = {"plus": planes[0].finish(), "minus": planes[1].finish()}
        return cut

    def _compute(self, worker: Worker, tile: Tile, chunks: Iterable[tuple[int, Mapping[str, Tensor]]]) -> Cut:
        """Return the value of the formula, rounded once."""
        dtype, kept = torch_dtype(tile.tensor.dtype), self.kept.get(tile.tensor.name)
        plus = Encoder(dtype)
        cut = Cut({})
        for start, pieces in chunks:
            value, _ = worker.evaluate(tile.tensor, tile.first + start, pieces)
            stays = value
            if kept is not None:
                stays = torch.where(value.abs().to(torch.float32) >= kept.least, value * kept.factor, 0.0)
            rounded = round_nearest(stays, torch.empty(value.numel(), dtype=dtype))
            calls = any(piece.program is not None and piece.program.calls for piece in tile.tensor.pieces)
            shows = [rounded, *pieces.values()] if calls else [rounded]
            if any(map(any_nonfinite, shows)):
                raise worker.nonfinite(tile, pieces, rounded, tile.first + start)
            mask = rounded != 0
            places = places_of(mask)
            plus.add(mask, places, rounded[places])
            cut.changed += len(places)
            update = value.to(torch.float64)
            error = update - rounded.to(torch.float64)
            cut.lost.append(fold_sum(error.mul_(error)))
            cut.squares.append(fold_sum(update * update))
        cut.planes = {"plus": plus.finish()}
        return cut


def _pair_of(plan: Plan) -> tuple[str, ...]:
    """Return the added and the subtracted model of a skill that is their plain difference; of any other nothing."""
    factors = weights(plan.recipe.term({})) if not plan.coefficients else {}
    pair = tuple(sorted(factors, key=lambda model: -factors[model]))
    return pair if [factors[model] for model in pair] == [1.0, -1.0] else ()


def _bins_of(values: Tensor) -> Tensor:
    """Return the upper bits of values' sizes as float32, as int64."""
    return (values.to(torch.float32).view(torch.int32).bitwise_and(0x7FFFFFFF) >> 15).to(torch.int64)


def _fits(a: Tensor, b: Tensor, value: Tensor) -> Tensor:
    """Return where `value`, the rounded difference of elements that differ, is exact, and gives `a` when added to `b`
    and `b` when taken from `a`."""
    fits = torch.zeros(len(a), dtype=torch.bool)
    if a.dtype == b.dtype:
        # Numbers of one sign and within a binade of each other (Sterbenz 1974), but for what is near -0, which no
        # sum gives.
        units = round(1 / torch.finfo(a.dtype).eps) - 1
        fits = within(a, b, units) & ~within(a, torch.zeros(1, dtype=a.dtype).neg_(), units)
    rest = places_of(~fits)
    if len(rest):
        a, b, value = (each[rest].to(torch.float64) for each in (a, b, value))
        exact = (a - b == value) & (b + value == a) & (a - value == b)
        # Zeros of two signs, and -0 itself, are not what a sum gives back.
        fits[rest] = exact & (a != b) & ~((a == 0) & a.signbit()) & ~((b == 0) & b.signbit())
    return fits
