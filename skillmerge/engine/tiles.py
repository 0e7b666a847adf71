"""Tiles of tensors -> their values in memory, read in as few and as large pieces as there can be.

A *tile* is a run of one tensor's elements, a *span* a few of them that are read together. Knows checkpoints and
buffers, nothing about what is done with the values.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skillmerge.bits import torch_dtype
from skillmerge.checkpoints.checkpoint import Checkpoint, Piece
from skillmerge.errors import ResourceError
from skillmerge.plans.plan import Plan, ShardPlan, TensorPlan
from skillmerge.tensors import BLOCK, DTYPES, PAGE, format_bytes


@dataclass(frozen=True, slots=True)
class Tile:
    """Elements first..last of a tensor, and where their bytes stand in the shard."""

    tensor: TensorPlan
    first: int
    last: int
    offset: int

    @property
    def nbytes(self) -> int:
        return (self.last - self.first) * DTYPES[self.tensor.dtype].itemsize


@dataclass(frozen=True, slots=True)
class Span:
    index: int
    tiles: tuple[Tile, ...]

    @property
    def offset(self) -> int:
        return self.tiles[0].offset

    @property
    def nbytes(self) -> int:
        return self.tiles[-1].offset + self.tiles[-1].nbytes - self.offset

    def place(self, tile: Tile) -> int:
        """Return where a tile begins in a buffer that holds the span, aligned in memory as it is in the file."""
        return self.offset % PAGE + tile.offset - self.offset


def spans(plan: Plan, shard: ShardPlan, tile: int) -> list[Span]:
    """Cut a shard into spans of at most `tile` elements, and of little less: only the last one is short.

    Tensors are cut at block boundaries, and where experts with other coefficients begin. `tile` is a multiple of 8 and
    at least a block.
    """
    result: list[Span] = []
    tiles: list[Tile] = []
    room = tile
    for spec in shard.specs:
        itemsize = DTYPES[spec.dtype].itemsize
        for piece in plan.tensors[spec.name].pieces:
            first, last = piece.span
            while first < last:
                left = last - first
                count = left if left <= room else (first + room) // BLOCK * BLOCK - first
                if count <= 0:
                    result.append(Span(len(result), tuple(tiles)))
                    tiles, room = [], tile
                    continue
                tiles.append(Tile(piece, first, first + count, spec.start + first * itemsize))
                first += count
                room -= count + -count % 8  # with room to align what is read
    if tiles:
        result.append(Span(len(result), tuple(tiles)))
    return result


class Buffer:
    """Page-aligned host memory that both the system calls and torch see; pinned for a CUDA device."""

    def __init__(self, size: int, device: torch.device) -> None:
        try:
            self._memory = mmap.mmap(-1, max(size, mmap.PAGESIZE))
        except OSError as error:
            raise ResourceError(
                f"{format_bytes(size)} of memory for a buffer are not available: {error.strerror}",
                fix="use fewer threads",
            ) from error
        self.view = memoryview(self._memory)
        self.tensor = torch.frombuffer(self._memory, dtype=torch.uint8)
        self._device = device
        self._pinned = device.type == "cuda" and self._pin()

    def typed(self, dtype: torch.dtype, start: int, count: int) -> Tensor:
        return self.tensor[start : start + count * dtype.itemsize].view(dtype)

    def close(self) -> None:
        if self._pinned:
            with torch.cuda.device(self._device):
                _cudart().cudaHostUnregister(self.tensor.data_ptr())
            self._pinned = False

    def _pin(self) -> bool:
        """Copies are faster from pinned memory, but not all of them need it: a limit may refuse it."""
        with torch.cuda.device(self._device):
            if int(_cudart().cudaHostRegister(self.tensor.data_ptr(), len(self._memory), 0)) == 0:
                return True
            with suppress(RuntimeError):  # the refusal would else be reported by whatever runs next
                torch.zeros(1, device=self._device)
        return False


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


class Reader:
    """Buffers for the inputs of one thread, and how they are filled."""

    def __init__(
        self, checkpoints: Mapping[str, Checkpoint], itemsizes: Sequence[int], tile: int, device: torch.device
    ) -> None:
        """itemsizes: the widest element of each of a tensor's sources. tile: elements of a span at most."""
        self.checkpoints = checkpoints
        self.inputs = [Buffer(tile * size, device) for size in itemsizes]

    def close(self) -> None:
        for buffer in self.inputs:
            buffer.close()

    def announce(self, span: Span) -> None:
        """Have the inputs of a coming span read ahead."""
        for tile in span.tiles:
            for source in tile.tensor.sources:
                for run in source.runs(tile.first, tile.last):
                    self.checkpoints[run.model].hint(run.tensor, run.first, run.last - run.first)

    def read_tile(self, tile: Tile) -> dict[str, Tensor]:
        """Return the tile's values by model, which are good until the next call."""
        (values,) = self.read(Span(0, (tile,)))
        return {source.model: piece for source, piece in zip(tile.tensor.sources, values, strict=True)}

    def read(self, span: Span, output: Buffer | None = None) -> list[list[Tensor]]:
        """Read all that a span needs, of each checkpoint together. Returns each tile's values, source by source, which
        are good until the next call.

        What is copied is read to its place in `output`, where there is one; all else into buffers of its own, one
        behind the other, so that neighbors in a file are neighbors there.
        """
        pieces: dict[str, list[Piece]] = {}
        ends = [0] * len(self.inputs)
        values: list[list[Tensor]] = []
        for tile in span.tiles:
            values.append([])
            for index, source in enumerate(tile.tensor.sources):
                dtype = torch_dtype(self.checkpoints[source.model].tensors[source.tensor].dtype)
                count = tile.last - tile.first
                if output is not None and index == 0 and tile.tensor.program is None:
                    buffer, start = output, span.place(tile)
                else:
                    buffer, start = self.inputs[index], -(-ends[index] // dtype.itemsize) * dtype.itemsize
                    ends[index] = start + count * dtype.itemsize
                values[-1].append(buffer.typed(dtype, start, count))
                for run in source.runs(tile.first, tile.last):
                    piece = Piece(run.tensor, run.first, run.last - run.first, buffer.view, start)
                    pieces.setdefault(run.model, []).append(piece)
                    start += piece.count * dtype.itemsize
        for wait in [self.checkpoints[model].read(wanted) for model, wanted in pieces.items()]:
            wait()
        return values
