"""A checkpoint read in the layout of another one: experts packed or one by one, transposed, interleaved; projections
fused or apart.

What follows each other in both layouts is read straight into the caller's buffer. Rows of the one that are columns of
the other come from `bands`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from skillmerge.checkpoints.checkpoint import Checkpoint, Piece, View
from skillmerge.checkpoints.store import Wait, nothing_to_wait_for
from skillmerge.checkpoints.views.bands import Band, Bands, Pair, Rectangle, by_band, rectangles
from skillmerge.checkpoints.views.relations import EXPERT, Layout, is_packed, layouts
from skillmerge.checkpoints.views.widened import Widened, common_dtype
from skillmerge.naming import module_kind
from skillmerge.tensors import DTYPES, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

_FEW = 4
"""Most parts of a tensor whose costs are added up each time. A view over this one asks once for each of its parts."""


class _Plan:
    """How a tensor is put together: pairs, in groups whose stretches of it do not overlap."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs = sorted(pairs, key=lambda pair: pair.wanted.first)
        self._starts: list[int] = []
        self._groups: list[list[Pair]] = []
        end = 0
        for pair in self.pairs:
            if not self._groups or pair.wanted.first >= end:
                self._starts.append(pair.wanted.first)
                self._groups.append([])
            self._groups[-1].append(pair)
            end = max(end, pair.wanted.last)

    def within(self, first: int, last: int) -> Iterator[tuple[Pair, int, int]]:
        """Yield the pairs that elements first..last are made of, and the run of elements that each is asked for."""
        index = max(bisect_right(self._starts, first) - 1, 0)
        while index < len(self._groups) and self._starts[index] < last:
            for pair in self._groups[index]:
                start, stop = max(first, pair.wanted.first), min(last, pair.wanted.last)
                if start < stop:
                    yield pair, start, stop
            index += 1


class Arranged(View):
    """A checkpoint whose tensors are arranged as another one's are."""

    def __init__(self, checkpoint: Checkpoint, plans: Mapping[str, _Plan], wanted: Mapping[str, TensorSpec]) -> None:
        """plans: by the tensors that are put together."""
        stored = checkpoint.tensors
        used = {pair.stored.tensor for plan in plans.values() for pair in plan.pairs}
        tensors: dict[str, TensorSpec] = {}
        files: dict[str, list[str]] = {file: [] for file in checkpoint.files}
        firsts: dict[str, list[str]] = {}  # a tensor belongs to the file of its first part
        for name, plan in plans.items():
            firsts.setdefault(plan.pairs[0].stored.tensor, []).append(name)
        for file, known in checkpoint.files.items():
            for name in known.tensors:
                if name not in used:
                    tensors[name] = stored[name]
                    files[file].append(name)
                for made in firsts.get(name, ()):
                    tensors[made] = TensorSpec(made, stored[name].dtype, wanted[made].shape, file)
                    files[file].append(made)
        super().__init__(
            checkpoint,
            tensors,
            {file: replace(it, tensors=tuple(files[file])) for file, it in checkpoint.files.items()},
        )
        self.naming = replace(checkpoint.naming, layout=_words(plans))
        self._plans = plans
        self._costs: dict[str, Mapping[str, int]] = {}
        self._bands = Bands(checkpoint)

    def read(self, pieces: Sequence[Piece]) -> Wait:
        straight: list[Piece] = []
        crossed: list[tuple[Piece, Pair, Rectangle]] = []
        for piece in pieces:
            plan = self._plans.get(piece.tensor)
            if plan is None:
                straight.append(piece)
                continue
            itemsize = DTYPES[self.tensors[piece.tensor].dtype].itemsize
            for pair, first, last in plan.within(piece.first, piece.first + piece.count):
                if pair.is_run:
                    at, start = first - pair.wanted.first, piece.start + (first - piece.first) * itemsize
                    straight.append(
                        Piece(pair.stored.tensor, pair.stored.first + at, last - first, piece.buffer, start)
                    )
                else:
                    crossed += [(piece, pair, it) for it in rectangles(pair.wanted, first, last)]
        wait = self._checkpoint.read(straight) if straight else nothing_to_wait_for
        return self._crossed(crossed, wait) if crossed else wait

    def _crossed(self, crossed: Sequence[tuple[Piece, Pair, Rectangle]], wait: Wait) -> Wait:
        cuts = [
            (piece, pair, cut, band)
            for piece, pair, rectangle in crossed
            for cut, band in by_band(pair, rectangle, DTYPES[self.tensors[piece.tensor].dtype].itemsize)
        ]
        bands = self._bands.hold(dict.fromkeys(band for *_, band in cuts))

        def finish() -> None:
            wait()
            for piece, pair, cut, band in cuts:
                self._put(piece, pair, cut, band, bands[band].values())

        return finish

    def _put(self, piece: Piece, pair: Pair, cut: Rectangle, band: Band, values: Tensor) -> None:
        """Copy a rectangle of a part from a band to where a piece goes."""
        import torch

        wanted, stored = pair.wanted, pair.stored
        out = torch.frombuffer(self.view(piece), dtype=values.dtype)
        steps, inner = (wanted.row, wanted.column), (stored.row, stored.column)
        if wanted.row < wanted.column:
            steps, inner = steps[::-1], inner[::-1]
        at = wanted.first + cut.outer * steps[0] + cut.inner * steps[1] - piece.first
        # In the band a row of the stored matrix is as long as the band is wide.
        place = stored.first + cut.outer * inner[0] + cut.inner * inner[1] - band.first
        row, column = divmod(place, band.length)
        from_steps = tuple(band.width if step == band.length else step for step in inner)
        source = values.as_strided(cut.shape, from_steps, row * band.width + column - band.column)
        out.as_strided(cut.shape, steps, at).copy_(source)

    def hint(self, tensor: str, first: int, count: int) -> None:
        plan = self._plans.get(tensor)
        if plan is None:
            return self._checkpoint.hint(tensor, first, count)
        for pair, start, last in plan.within(first, first + count):
            if pair.is_run:
                at = pair.stored.first + start - pair.wanted.first
                self._checkpoint.hint(pair.stored.tensor, at, last - start)

    def cost(self, tensor: str) -> int:
        return sum(self.costs(tensor).values())

    def costs(self, tensor: str) -> Mapping[str, int]:
        plan = self._plans.get(tensor)
        if plan is None:
            return self._checkpoint.costs(tensor)
        if tensor in self._costs:
            return self._costs[tensor]
        found: dict[str, int] = {}
        for pair in plan.pairs:
            whole = self._checkpoint.tensors[pair.stored.tensor].elements
            for file, cost in self._checkpoint.costs(pair.stored.tensor).items():
                found[file] = found.get(file, 0) + cost * pair.stored.elements // max(whole, 1)
        if len(plan.pairs) > _FEW:
            self._costs[tensor] = found
        return found

    def written_dtype(self, tensor: str) -> str:
        plan = self._plans.get(tensor)
        return self._checkpoint.written_dtype(tensor if plan is None else plan.pairs[0].stored.tensor)

    def close(self) -> None:
        self._bands.close()
        super().close()


def in_layout_of(checkpoint: Checkpoint, wanted: Mapping[str, TensorSpec], *, whole: bool = True) -> Checkpoint:
    """Return a checkpoint in the layout of the tensors `wanted`, as far as it holds their parts; itself where nothing
    differs. What is not complete, or has other experts, stays as it is stored.

    whole: whether `wanted` are all tensors of a model, so that nothing of a stored tensor may be left over.
    """
    ours = checkpoint.tensors
    stored, asked = layouts(ours, wanted)
    pairs = {name: found for name in asked.holds if (found := _pairs(wanted[name], stored, asked))}
    pairs = {name: found for name, found in pairs.items() if not _is_misfit(wanted[name], found, ours)}
    if whole:
        other = {at for at, experts in asked.experts.items() if experts != stored.experts.get(at)}
        pairs = {
            name: found
            for name, found in pairs.items()
            if not other or not any((it := EXPERT.fullmatch(part)) and it[1] in other for part in asked.holds[name][:1])
        }
    while whole and (left := _left_over(pairs.values(), ours)):
        pairs = {name: found for name, found in pairs.items() if not any(it.stored.tensor in left for it in found)}
    if not pairs:
        return checkpoint
    plans = {name: _Plan(found) for name, found in pairs.items()}
    return Arranged(_in_one_dtype(checkpoint, pairs), plans, wanted)


def _pairs(wanted: TensorSpec, stored: Layout, asked: Layout) -> list[Pair]:
    """Return what a tensor is put together from; nothing if not all of it is there."""
    parts = asked.holds[wanted.name]
    found = [Pair(stored.parts[it], asked.parts[it]) for it in parts if it in stored.parts]
    fits = all(pair.stored.shape == pair.wanted.shape for pair in found) and len(found) == len(parts)
    return found if fits and sum(pair.wanted.elements for pair in found) == wanted.elements > 0 else []


def _is_misfit(wanted: TensorSpec, pairs: Sequence[Pair], tensors: Mapping[str, TensorSpec]) -> bool:
    """Return whether a tensor has another shape than the one that is stored for it, where neither is packed: a vector
    is no matrix of one column."""
    stored = tensors[pairs[0].stored.tensor]
    if len(pairs) > 1 or pairs[0].stored.elements < stored.elements or is_packed(wanted.name) or is_packed(stored.name):
        return False
    return stored.shape != wanted.shape


def _in_one_dtype(checkpoint: Checkpoint, pairs: Mapping[str, Sequence[Pair]]) -> Checkpoint:
    """Return the checkpoint with the parts of each tensor in one dtype: an adapter may have changed some of them, which
    have more digits then."""
    dtypes: dict[str, str] = {}
    for found in pairs.values():
        stored = {pair.stored.tensor: checkpoint.tensors[pair.stored.tensor].dtype for pair in found}
        if len(held := {*stored.values()}) > 1:
            wide = common_dtype(held)
            dtypes |= {name: wide for name, dtype in stored.items() if dtype != wide}
    return Widened(checkpoint, dtypes) if dtypes else checkpoint


def _left_over(plans: Iterable[Sequence[Pair]], tensors: Mapping[str, TensorSpec]) -> set[str]:
    """Return the stored tensors of which some elements would be used, and others not."""
    used: Counter[str] = Counter()
    for pair in (pair for plan in plans for pair in plan):
        used[pair.stored.tensor] += pair.stored.elements
    return {name for name, count in used.items() if count != tensors[name].elements}


def _words(plans: Mapping[str, _Plan]) -> tuple[str, ...]:
    """Return how the layout differs from the stored one, in words."""
    sharing = Counter(tensor for plan in plans.values() for tensor in {pair.stored.tensor for pair in plan.pairs})
    found: dict[str, None] = {}
    for name, plan in plans.items():
        tensors = {pair.stored.tensor for pair in plan.pairs}
        is_expert = any(module_kind(it) == "expert" for it in (name, *tensors))
        words = []
        if len(tensors) > 1:
            words.append("packed" if is_expert else "fused")
        elif max(sharing[it] for it in tensors) > 1:
            words.append("split")
        if not all(pair.is_run for pair in plan.pairs):
            words.append("transposed")
        what = "experts" if is_expert else "projections"
        found[f"{what} {' and '.join(words)}" if words else "some tensors under other names"] = None
    return tuple(found)
