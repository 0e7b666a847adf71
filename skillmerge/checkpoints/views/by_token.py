"""A checkpoint whose token matrices have the rows of another model, the donor: as many, in its order, each the row of
the donor's token.

    donor   0 a   1 b   2 <tool>    3 -
    model   0 a   1 b   2 <think>   3 <tool>   4 -
    read    0     1     3           the donor's

What follows each other in the model is read in one go: a vocabulary with a few added tokens is a handful of runs.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, NamedTuple

from skillmerge.checkpoints.checkpoint import Checkpoint, Piece, View
from skillmerge.checkpoints.store import Wait, all_of
from skillmerge.tensors import DTYPES, TensorSpec

if TYPE_CHECKING:
    from skillmerge.checkpoints.tokenizers.small_files import SmallFiles

OWN, ZERO = 0, -1
"""The model's own matrix among a matrix's sources; and no source at all, for a row of zeros."""


class Part(NamedTuple):
    """Elements of a matrix that follow each other in one source: `many` from `first` on there, at `place` here."""

    source: int
    first: int
    place: int
    many: int


class RowMap:
    """The source of each row of a matrix, as runs of rows that follow each other there."""

    def __init__(self, rows: Iterable[tuple[int, int]]) -> None:
        """rows: source and row there, of each row in turn."""
        self._firsts, self._sources, self._starts = array("q"), array("q"), array("q")
        source, expected, self.rows = ZERO - 1, -1, 0
        for here, there in rows:
            if here != source or (there != expected and here != ZERO):
                self._firsts.append(self.rows)
                self._sources.append(here)
                self._starts.append(there)
            source, expected = here, there + 1
            self.rows += 1

    def __len__(self) -> int:
        return len(self._firsts)

    @property
    def is_identity(self) -> bool:
        return len(self) == 1 and self._sources[0] == OWN and self._starts[0] == 0

    @property
    def sources(self) -> set[int]:
        return set(self._sources)

    def count_of(self, source: int) -> int:
        """Return how many rows come from a source."""
        ends = [*self._firsts[1:], self.rows]
        return sum(
            end - first for first, end, it in zip(self._firsts, ends, self._sources, strict=True) if it == source
        )

    def runs(self, first: int, last: int) -> Iterator[Part]:
        """Yield the runs of rows first..last."""
        index = bisect_right(self._firsts, first) - 1
        while first < last:
            end = self._firsts[index + 1] if index + 1 < len(self) else self.rows
            stop = min(end, last)
            yield Part(self._sources[index], self._starts[index] + first - self._firsts[index], first, stop - first)
            first, index = stop, index + 1

    def digest(self) -> bytes:
        """Return what tells it from another one."""
        parts = (self._firsts, self._sources, self._starts)
        return hashlib.sha256(repr([self.rows, *map(list, parts)]).encode()).digest()


@dataclass(frozen=True)
class Matrix:
    """A matrix in the donor's rows. spec: as it is read. sources: checkpoints and their tensors, its own first; names
    that a plan knows them by are in `names`."""

    spec: TensorSpec
    rows: RowMap
    sources: tuple[tuple[Checkpoint, str], ...]
    names: tuple[str, ...]

    @cached_property
    def width(self) -> int:
        return math.prod(self.spec.shape[1:])

    def dtype(self, source: int) -> str:
        checkpoint, tensor = self.sources[source]
        return checkpoint.tensors[tensor].dtype

    def parts(self, first: int, count: int) -> Iterator[Part]:
        """Yield what elements from `first` on are made of, in their order."""
        width, last = self.width, first + count
        for run in self.rows.runs(first // width, -(-last // width)) if count else ():
            low, high = max(first, run.place * width), min(last, (run.place + run.many) * width)
            yield Part(run.source, run.first * width + low - run.place * width, low, high - low)

    @property
    def described(self) -> bytes:
        named = [(name, tensor) for name, (_, tensor) in zip(self.names, self.sources, strict=True)]
        return repr((self.spec.name, self.spec.dtype, self.spec.shape, named)).encode() + self.rows.digest()


class ByToken(View):
    """A checkpoint with some matrices in the donor's rows. One that stands for two, as the embedding does for a tied
    head, is two here."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        matrices: Mapping[str, Matrix],
        fixed: Mapping[str, Sequence[tuple[int, int]]],
        read: SmallFiles,
    ) -> None:
        """matrices: those whose rows are not its own. fixed: see `Checkpoint`. read: what is known of small files."""
        tensors = {**checkpoint.tensors, **{name: it.spec for name, it in matrices.items()}}
        files = dict(checkpoint.files)
        for name in sorted(matrices):
            # What the plan keeps of a header stands for all that says what the tensors are.
            file = matrices[name].spec.file
            described = hashlib.sha256(files[file].described + matrices[name].described).digest()
            files[file] = replace(files[file], described=described)
        super().__init__(checkpoint, tensors, files)
        self.fixed, self.rearranged = fixed, checkpoint.rearranged | matrices.keys()
        self.small_files = read
        self._matrices = matrices

    def read(self, pieces: Sequence[Piece]) -> Wait:
        wanted: dict[int, tuple[Checkpoint, list[Piece]]] = {}
        later: list[Callable[[], None]] = []

        def ask(checkpoint: Checkpoint, piece: Piece) -> None:
            wanted.setdefault(id(checkpoint), (checkpoint, []))[1].append(piece)

        for piece in pieces:
            matrix = self._matrices.get(piece.tensor)
            if matrix is None:
                ask(self._checkpoint, piece)
                continue
            itemsize = DTYPES[matrix.spec.dtype].itemsize
            for part in matrix.parts(piece.first, piece.count):
                start = piece.start + (part.place - piece.first) * itemsize
                if part.source == ZERO:
                    piece.buffer[start : start + part.many * itemsize] = bytes(part.many * itemsize)
                    continue
                checkpoint, tensor = matrix.sources[part.source]
                stored = matrix.dtype(part.source)
                if stored == matrix.spec.dtype:
                    ask(checkpoint, Piece(tensor, part.first, part.many, piece.buffer, start))
                    continue
                narrow = memoryview(bytearray(part.many * DTYPES[stored].itemsize))
                ask(checkpoint, Piece(tensor, part.first, part.many, narrow))
                wide = piece.buffer[start : start + part.many * itemsize]
                later.append(partial(_widen, narrow, stored, wide, matrix.spec.dtype))
        wait = all_of([checkpoint.read(asked) for checkpoint, asked in wanted.values()])
        if not later:
            return wait

        def finish() -> None:
            wait()
            for step in later:
                step()

        return finish

    def hint(self, tensor: str, first: int, count: int) -> None:
        matrix = self._matrices.get(tensor)
        if matrix is None:
            return self._checkpoint.hint(tensor, first, count)
        for part in matrix.parts(first, count):
            if part.source != ZERO:
                checkpoint, stored = matrix.sources[part.source]
                checkpoint.hint(stored, part.first, part.many)

    def cost(self, tensor: str) -> int:
        return sum(self.costs(tensor).values())

    def costs(self, tensor: str) -> Mapping[str, int]:
        """Of its own rows: those of others are in their files."""
        matrix = self._matrices.get(tensor)
        if matrix is None:
            return self._checkpoint.costs(tensor)
        checkpoint, stored = matrix.sources[OWN]
        own, rows = matrix.rows.count_of(OWN), max(1, checkpoint.tensors[stored].shape[0])
        return {file: nbytes * own // rows for file, nbytes in checkpoint.costs(stored).items()}


def _widen(narrow: memoryview, stored: str, wide: memoryview, dtype: str) -> None:
    """Put numbers into memory as another dtype, which holds them exactly."""
    import torch

    from skillmerge.bits import torch_dtype

    values = torch.frombuffer(narrow, dtype=torch.uint8).view(torch_dtype(stored))
    torch.frombuffer(wide, dtype=torch.uint8).view(torch_dtype(dtype)).copy_(values)
