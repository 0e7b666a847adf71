"""Tiles of tensors -> their values in memory, read in as few and as large pieces as there can be.

A *tile* is a run of one tensor's elements, a *span* a few of them that are read together. Knows checkpoints and
buffers, nothing about what is done with the values.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skillmerge.bits import torch_dtype
from skillmerge.checkpoints.checkpoint import Checkpoint
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


def spans(plan: Plan, shard: ShardPlan, tile: int) -> list[Span]:
    """Cut a shard into spans of at most `tile` elements, and of little less: only the last one is short.

    Tensors are cut at block boundaries. `tile` is a multiple of 8 and at least a block.
    """
    result: list[Span] = []
    tiles: list[Tile] = []
    room = tile
    for spec in shard.specs:
        itemsize, first = DTYPES[spec.dtype].itemsize, 0
        while first < spec.elements:
            left = spec.elements - first
            count = left if left <= room else room // BLOCK * BLOCK
            if count == 0:
                result.append(Span(len(result), tuple(tiles)))
                tiles, room = [], tile
                continue
            tiles.append(Tile(plan.tensors[spec.name], first, first + count, spec.start + first * itemsize))
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
                f"{format_bytes(size)} of memory for a buffer are not to be had: {error.strerror}",
                fix="use fewer --threads, or a --memory-limit",
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


@dataclass(slots=True)
class _Read:
    """A stretch of one file that is read in one go into a stretch of one buffer."""

    checkpoint: Checkpoint
    file: str
    position: int
    buffer: Buffer
    start: int
    nbytes: int = 0

    def begin(self) -> Callable[[], None]:
        view = self.buffer.view[self.start : self.start + self.nbytes]
        return self.checkpoint.files.begin(self.file, self.position, view)


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
            for model, source in tile.tensor.sources:
                spec = self.checkpoints[model].tensors[source]
                size = DTYPES[spec.dtype].itemsize
                nbytes = (tile.last - tile.first) * size
                self.checkpoints[model].files.announce(spec.file, spec.start + tile.first * size, nbytes)

    def read(self, span: Span, output: Buffer | None = None) -> list[list[Tensor]]:
        """Read all that a span needs, neighbours in one go. Returns each tile's values, source by source, which
        are good until the next call.

        What is copied is read to its place in `output`, where there is one; all else into buffers of its own.
        """
        reads: list[_Read] = []
        latest: dict[int, _Read] = {}
        values: list[list[Tensor]] = []
        for tile in span.tiles:
            values.append([])
            for index, (model, source) in enumerate(tile.tensor.sources):
                checkpoint = self.checkpoints[model]
                spec = checkpoint.tensors[source]
                dtype, count = torch_dtype(spec.dtype), tile.last - tile.first
                position = spec.start + tile.first * dtype.itemsize
                in_place = output is not None and index == 0 and tile.tensor.program is None
                buffer = output if output is not None and in_place else self.inputs[index]
                read = latest.get(-1 if in_place else index)
                end = read.start + read.nbytes if read else 0
                start = span.offset % PAGE + tile.offset - span.offset if in_place else end
                if (
                    read is None
                    or (read.checkpoint, read.file, read.position + read.nbytes) != (checkpoint, spec.file, position)
                    or start != end
                    or start % dtype.itemsize
                ):
                    start = start if in_place else -(-start // 8) * 8
                    read = latest[-1 if in_place else index] = _Read(checkpoint, spec.file, position, buffer, start)
                    reads.append(read)
                read.nbytes += count * dtype.itemsize
                values[-1].append(buffer.typed(dtype, start, count))
        for wait in [read.begin() for read in reads]:
            wait()
        return values
