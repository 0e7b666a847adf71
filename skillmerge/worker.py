"""One thread's work: read the tiles of a span into buffers of its own, compute, fill an output buffer.

The same code serves CPU and CUDA; on CUDA a worker owns a stream, and its host buffers are pinned. Knows
nothing about the other workers, about files written, or about the order of things.
"""

from __future__ import annotations

import math
import mmap
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skillmerge.arithmetic import (
    Scratch,
    any_nonfinite,
    canonical_nan,
    evaluate,
    first_nonfinite,
    keep_same_bits,
    round_nearest,
    round_stochastic,
    rounding_key,
    torch_dtype,
)
from skillmerge.checkpoints.folder import Checkpoint
from skillmerge.errors import ResourceError, UnusableWeights
from skillmerge.planning import Plan, ShardPlan, TensorPlan
from skillmerge.resources import Budget
from skillmerge.statistics import BlockStatistics, is_sampled, measure
from skillmerge.tensors import BLOCK, CHUNK, DTYPES, block_count, format_bytes, tile_ranges
from skillmerge.writer import PAGE

Statistics = dict[str, dict[int, BlockStatistics]]
"""What was measured of each merged tensor, by block."""


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
    """Cut a shard into spans of about `tile` elements; small tensors share one."""
    result: list[Span] = []
    tiles: list[Tile] = []
    filled = 0
    for spec in shard.specs:
        itemsize = DTYPES[spec.dtype].itemsize
        for first, last in tile_ranges(spec.elements, tile):
            if tiles and filled + last - first > tile:
                result.append(Span(len(result), tuple(tiles)))
                tiles, filled = [], 0
            tiles.append(Tile(plan.tensors[spec.name], first, last, spec.start + first * itemsize))
            filled += last - first
    if tiles:
        result.append(Span(len(result), tuple(tiles)))
    return result


@dataclass(frozen=True, slots=True)
class Settings:
    """How to run a plan; nothing in here changes a byte of the output."""

    device: torch.device
    budget: Budget
    stats: str = "sampled"
    allow_nonfinite: bool = False
    warn: Callable[[str], None] = lambda message: None


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


class Worker:
    """One thread's input buffers and arithmetic.

    `chunk` elements are computed at once: what fits the caches on a CPU, a whole tile on CUDA.
    """

    def __init__(
        self, plan: Plan, checkpoints: Mapping[str, Checkpoint], settings: Settings, stop: threading.Event
    ) -> None:
        self.plan, self.checkpoints, self.settings, self.stop = plan, checkpoints, settings, stop
        tile = self.settings.budget.tile
        self.inputs = [Buffer(tile * size, self.settings.device) for size in self.plan.input_itemsizes]
        self.stream: torch.cuda.Stream | None = None
        self._use(self.settings.device, tile)

    def _use(self, device: torch.device, tile: int) -> None:
        if self.stream is not None:
            self.stream.synchronize()  # results may still be on their way back
        self.device = device
        self.chunk = tile if device.type == "cuda" else CHUNK
        self.scratch = Scratch(device, self.chunk)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def announce(self, span: Span) -> None:
        """Have the inputs of a coming span read ahead."""
        for tile in span.tiles:
            for model, source in tile.tensor.sources:
                spec = self.checkpoints[model].tensors[source]
                size = DTYPES[spec.dtype].itemsize
                self.checkpoints[model].announce(spec, tile.first * size, (tile.last - tile.first) * size)

    def fill(self, span: Span, buffer: Buffer, statistics: Statistics) -> None:
        """Put a span's bytes into `buffer`, aligned in memory as they are in the file (direct I/O asks for it)."""
        for tile in span.tiles:
            if self.stop.is_set():
                return
            self._fill(statistics, tile, buffer, span.offset % PAGE + tile.offset - span.offset)

    def close(self) -> None:
        if self.stream is not None:
            self.stream.synchronize()
        for buffer in self.inputs:
            buffer.close()

    def _fill(self, statistics: Statistics, tile: Tile, output: Buffer, start: int) -> None:
        tensor = tile.tensor
        if tensor.action in ("copy", "same"):
            self._read(tensor.sources[0], tile, output.view[start : start + tile.nbytes])
            if tensor.action == "same":
                self._compare(tile, output.tensor[start : start + tile.nbytes])
            elif not self.settings.allow_nonfinite and DTYPES[tensor.dtype].is_float:
                out = output.typed(torch_dtype(tensor.dtype), start, tile.last - tile.first)
                for first in range(0, out.numel(), BLOCK):
                    if any_nonfinite(out[first : first + BLOCK]):
                        raise self._nonfinite(tile, {tensor.sources[0][0]: out}, out)
            return
        values = {}
        for buffer, source in zip(self.inputs, tensor.sources, strict=False):
            dtype = torch_dtype(self.checkpoints[source[0]].tensors[source[1]].dtype)
            values[source[0]] = buffer.typed(dtype, 0, tile.last - tile.first)
            self._read(source, tile, buffer.view[: values[source[0]].nbytes])
        out = output.typed(torch_dtype(tensor.dtype), start, tile.last - tile.first)
        while True:
            try:
                return self._compute(statistics, tile, values, out)
            except RuntimeError as error:
                if self.stream is None or "out of memory" not in str(error).lower():
                    raise
                self._shrink()

    def _read(self, source: tuple[str, str], tile: Tile, into: memoryview) -> None:
        checkpoint = self.checkpoints[source[0]]
        spec = checkpoint.tensors[source[1]]
        checkpoint.read_into(spec, tile.first * DTYPES[spec.dtype].itemsize, into)

    def _compare(self, tile: Tile, expected: Tensor) -> None:
        """Prove that a tensor which no arithmetic is meant for is the same everywhere."""
        first, *others = tile.tensor.sources
        for other in others:
            buffer = self.inputs[0]
            self._read(other, tile, buffer.view[: tile.nbytes])
            if not torch.equal(buffer.tensor[: tile.nbytes], expected):
                name = tile.tensor.name
                raise UnusableWeights(
                    f"tensor `{name}` holds {tile.tensor.dtype} and differs between models `{first[0]}` and "
                    f"`{other[0]}`: it cannot be merged",
                    fix=f'say which one to take:\ncopy:\n  - {{tensors: "{name}", from: {first[0]}}}',
                )

    def _compute(self, statistics: Statistics, tile: Tile, values: Mapping[str, Tensor], out: Tensor) -> None:
        if self.stream is None:
            return self._compute_chunks(statistics, tile, values, out)
        with torch.cuda.stream(self.stream):
            self._compute_chunks(statistics, tile, values, out)
            self.stream.synchronize()

    def _compute_chunks(self, statistics: Statistics, tile: Tile, values: Mapping[str, Tensor], out: Tensor) -> None:
        for start in range(0, out.numel(), self.chunk):
            stop = min(start + self.chunk, out.numel())
            pieces = {
                model: self._on_device(index, tensor[start:stop])
                for index, (model, tensor) in enumerate(values.items())
            }
            here = out[start:stop]
            result = here if self.stream is None else self.scratch.get("out", 0, out.dtype, stop - start)
            self._compute_piece(statistics, tile, tile.first + start, pieces, result)
            if self.stream is not None:
                here.copy_(result, non_blocking=True)

    def _on_device(self, index: int, piece: Tensor) -> Tensor:
        if self.stream is None:
            return piece
        return self.scratch.get("input", index, piece.dtype, piece.numel()).copy_(piece, non_blocking=True)

    def _compute_piece(
        self, statistics: Statistics, tile: Tile, first: int, inputs: Mapping[str, Tensor], out: Tensor
    ) -> None:
        """The arithmetic of one run of elements, `first` being its index in the tensor."""
        tensor, output = tile.tensor, self.plan.recipe.output
        assert tensor.program is not None
        value, subtracted = evaluate(tensor.program, inputs, self.scratch)
        if output.rounding == "stochastic" and value.dtype != out.dtype:
            round_stochastic(value, out, rounding_key(output.seed, tensor.name), first)
        else:
            round_nearest(value, out)
        # Before equal bits are put back: whatever is not finite in an input shows in the result until then.
        if not self.settings.allow_nonfinite and any_nonfinite(out):
            raise self._nonfinite(tile, inputs, out, first)
        if tensor.program.same_bits:
            keep_same_bits(tensor.program, inputs, out, self.scratch)
        if self.settings.allow_nonfinite:
            canonical_nan(out)
        if tensor.action == "merge":
            self._measure(statistics, tensor, first, inputs, out, value, subtracted)

    def _measure(
        self,
        statistics: Statistics,
        tensor: TensorPlan,
        first: int,
        inputs: Mapping[str, Tensor],
        out: Tensor,
        value: Tensor,
        subtracted: Tensor | None,
    ) -> None:
        assert tensor.program is not None
        base = inputs.get(tensor.program.base or self.plan.donor)
        if base is None or self.settings.stats == "off":
            return
        blocks = block_count(math.prod(tensor.shape))
        for start in range(0, out.numel(), BLOCK):
            block = (first + start) // BLOCK
            if not is_sampled(tensor.name, block, blocks, self.settings.stats):
                continue
            piece = slice(start, min(start + BLOCK, out.numel()))
            update = (
                subtracted[piece]
                if subtracted is not None
                else base[piece].to(torch.float64) - value[piece].to(torch.float64)
            )
            statistics[tensor.name][block] = measure(base[piece], out[piece], update, self.scratch)

    def _nonfinite(
        self, tile: Tile, inputs: Mapping[str, Tensor], out: Tensor, first: int | None = None
    ) -> UnusableWeights:
        """Say which input holds it; where none does, the output's dtype is too narrow."""
        offset = tile.first if first is None else first
        names = dict(tile.tensor.sources)
        for model, values in inputs.items():
            index = first_nonfinite(values)
            if index is not None:
                file = self.checkpoints[model].tensors[names[model]].file
                return UnusableWeights(
                    f"model `{model}` holds {values[index].item()} in tensor `{names[model]}` at element "
                    f"{offset + index} ({file})",
                    fix="that checkpoint is damaged; --allow-nonfinite merges it all the same",
                )
        index = first_nonfinite(out) or 0
        return UnusableWeights(
            f"tensor `{tile.tensor.name}` overflows {tile.tensor.dtype} at element {offset + index}",
            fix="choose a wider output.dtype (bfloat16 or float32), or a smaller coefficient",
        )

    def _shrink(self) -> None:
        """The GPU is full: smaller pieces, and when those do not fit either, the CPU."""
        assert self.stream is not None
        self.stream.synchronize()
        self.scratch.clear()
        torch.cuda.empty_cache()
        if self.chunk > BLOCK:
            self.chunk = max(BLOCK, self.chunk // 2)
            self.scratch = Scratch(self.device, self.chunk)
            self.settings.warn(f"the GPU is out of memory: going on with pieces of {self.chunk} elements")
        else:
            self._use(torch.device("cpu"), self.settings.budget.tile)
            self.settings.warn("the GPU is out of memory: going on with the CPU")
