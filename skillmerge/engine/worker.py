"""One thread's work: read the tiles of a span into buffers of its own, compute, fill an output buffer.

The same code serves CPU and CUDA; on CUDA a worker owns a stream, and its host buffers are pinned. Knows
nothing about the other workers, about files written, or about the order of things.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from skillmerge.bits import any_nonfinite, canonical_nan, first_nonfinite, torch_dtype
from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.engine.measures.preparing import Preparations
from skillmerge.engine.rounding_statistics import BlockStatistics, is_sampled, measure
from skillmerge.engine.tiles import Buffer, Reader, Span, Tile
from skillmerge.errors import UnusableWeights
from skillmerge.methods.evaluate import Scratch, accumulation_dtype, evaluate
from skillmerge.methods.preparation import Partials, Preparation, Stretch
from skillmerge.methods.rounding import keep_same_bits, round_value, rounding_key
from skillmerge.plans.budget import Budget
from skillmerge.plans.plan import Plan, TensorPlan
from skillmerge.tensors import BLOCK, CHUNK, DTYPES, block_count, overlaps

Statistics = dict[str, dict[int, BlockStatistics]]
"""Statistics of each merged tensor, by the first element of each block, or of a part of one."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How to run a plan; nothing in here changes a byte of the output."""

    device: torch.device
    budget: Budget
    stats: str = "sampled"
    allow_nonfinite: bool = False
    warn: Callable[[str], None] = lambda message: None


class Worker:
    """One thread's input buffers and arithmetic.

    `chunk` elements are computed at once: what fits the caches on a CPU, a whole tile on CUDA.
    """

    def __init__(
        self,
        plan: Plan,
        checkpoints: Mapping[str, Checkpoint],
        settings: Settings,
        stop: threading.Event,
        preparations: Preparations | None = None,
    ) -> None:
        """preparations: those of all workers of a run."""
        self.plan, self.checkpoints, self.settings, self.stop = plan, checkpoints, settings, stop
        tile = self.settings.budget.tile
        self.preparations = preparations or Preparations(plan, checkpoints, tile)
        self.reader = Reader(checkpoints, plan.input_itemsizes, tile, settings.device)
        self.stream: torch.cuda.Stream | None = None
        self._use(self.settings.device, tile)

    def _use(self, device: torch.device, tile: int) -> None:
        if self.stream is not None:
            self.stream.synchronize()  # results may still be on their way back
        self.device = device
        self.chunk = tile if device.type == "cuda" else CHUNK
        self.scratch = Scratch(device, self.chunk)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def fill(self, span: Span, output: Buffer, statistics: Statistics) -> None:
        """Put a span's bytes into `output`, aligned in memory as they are in the file (direct I/O asks for it)."""
        for tile in span.tiles:
            self.prepare(tile.tensor)  # before the values are read, into the same buffers
        inputs = self.reader.read(span, output)
        for tile, values in zip(span.tiles, inputs, strict=True):
            if self.stop.is_set():
                return
            out = output.typed(torch_dtype(tile.tensor.dtype), span.place(tile), tile.last - tile.first)
            self._fill(statistics, tile, values, out)

    def prepare(self, tensor: TensorPlan) -> None:
        """Find out what the calls of a tensor's programs have to know of all of it, unless `stop` is set meanwhile."""
        for piece in tensor.pieces:
            if piece.program is not None and piece.program.calls:
                self.preparations.of(piece, partial(self.read_stretch, piece), self.stop)

    def evaluate(self, tensor: TensorPlan, first: int, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Run the program of a tensor that is prepared on elements from `first` on; see `methods.evaluate`."""
        if tensor.slices:
            return self._evaluate_slices(tensor, first, inputs), None
        assert tensor.program is not None
        if not tensor.program.calls:
            return self._fixed(tensor, first, inputs, *evaluate(tensor.program, inputs, self.scratch))
        preparation = self.preparations.of(tensor, partial(self.read_stretch, tensor), self.stop)
        start, needed, scratch, inside = self._needed(tensor, preparation, first, inputs)
        value, subtracted = evaluate(tensor.program, needed, scratch, preparation.runner(start))
        subtracted = subtracted[inside] if subtracted is not None else None
        return self._fixed(tensor, first, inputs, value[inside], subtracted)

    def _fixed(
        self, tensor: TensorPlan, first: int, inputs: Mapping[str, Tensor], value: Tensor, subtracted: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Put elements that do not follow the formula as they are: of a difference, nothing."""
        for model, source in tensor.sources:
            if (runs := self.checkpoints[model].fixed.get(source)) is None:
                continue
            for start, stop in overlaps(runs, first, first + value.numel()):
                part = slice(start - first, stop - first)
                value[part] = 0 if self.plan.makes_skill else inputs[model][part]
                if subtracted is not None:
                    subtracted[part] = 0
            break
        return value, subtracted

    def _evaluate_slices(self, tensor: TensorPlan, first: int, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the values of elements from `first` on, of experts with coefficients of their own."""
        count = next(iter(inputs.values())).numel()
        values = torch.zeros(count, dtype=accumulation_dtype([it.dtype for it in inputs.values()]), device=self.device)
        for piece, start, last in tensor.within(first, first + count):
            if piece.program is not None:
                here = slice(start - first, last - first)
                value, _ = self.evaluate(piece, start, {model: it[here] for model, it in inputs.items()})
                values[here] = value
        return values

    def _needed(
        self, tensor: TensorPlan, preparation: Preparation, first: int, inputs: Mapping[str, Tensor]
    ) -> tuple[int, Mapping[str, Tensor], Scratch, slice]:
        """Return what is needed to compute elements from `first` on, which may be their whole rows: its first element,
        its inputs, room for it, and where the elements are in it."""
        last = first + next(iter(inputs.values())).numel()
        start, stop = preparation.needed(first, last)
        inside = slice(first - start, last - start)
        if (start, stop) == (first, last):
            return start, inputs, self.scratch, inside
        reader = Reader(self.checkpoints, self.plan.input_itemsizes, stop - start, torch.device("cpu"))
        rows = reader.read_tile(Tile(tensor, start, stop, 0))
        scratch = Scratch(self.device, stop - start)
        return start, {model: values.to(self.device) for model, values in rows.items()}, scratch, inside

    def read_stretch(self, tensor: TensorPlan, preparation: Preparation, stretch: Stretch) -> Partials:
        """Read a stretch of a tensor, and return what it adds to what methods asked for."""
        tile = Tile(tensor, stretch.first, stretch.last, 0)
        values = self.reader.read_tile(tile)
        partials: Partials = []

        def collect(first: int, inputs: Mapping[str, Tensor]) -> None:
            start, inputs, scratch, run = self._needed(tensor, preparation, first, inputs)
            evaluate(preparation.program, inputs, scratch, preparation.collector(stretch, start, run, partials))

        def read() -> None:
            partials.clear()
            self._in_chunks(tile, values, collect, stretch.first)

        self._sized_to_fit(read)
        return partials

    def close(self) -> None:
        if self.stream is not None:
            self.stream.synchronize()
        self.reader.close()

    def _fill(self, statistics: Statistics, tile: Tile, values: list[Tensor], out: Tensor) -> None:
        tensor = tile.tensor
        if tensor.action == "same":
            self.compare(tile, values)
        elif tensor.program is None:
            if not self.settings.allow_nonfinite and DTYPES[tensor.dtype].is_float:
                for first in range(0, out.numel(), BLOCK):
                    if any_nonfinite(out[first : first + BLOCK]):
                        raise self.nonfinite(tile, {tensor.sources[0][0]: out}, out)
        else:
            inputs = {model: piece for (model, _), piece in zip(tensor.sources, values, strict=True)}
            self._sized_to_fit(lambda: self._compute(statistics, tile, inputs, out))

    def _sized_to_fit(self, work: Callable[[], None]) -> None:
        """Do work on the device, in smaller pieces where it is out of memory, and in the end on the CPU."""
        while True:
            try:
                return self._on_stream(work)
            except RuntimeError as error:
                if self.stream is None or "out of memory" not in str(error).lower():
                    raise
            self._shrink()  # out here: the error's frames held the tensors of the failed attempt

    def compare(self, tile: Tile, values: list[Tensor]) -> None:
        """Check that a tensor without arithmetic is the same in every model."""
        first, *others = tile.tensor.sources
        for other, piece in zip(others, values[1:], strict=True):
            if not torch.equal(piece.view(torch.uint8), values[0].view(torch.uint8)):
                name = tile.tensor.name
                raise UnusableWeights(
                    f"tensor `{name}` holds {tile.tensor.dtype} and differs between models `{first[0]}` and "
                    f"`{other[0]}`, so it cannot be merged",
                    fix=f'leave it out of the skill:\nignore:\n  - "{name}"'
                    if self.plan.makes_skill
                    else f'choose one in the recipe:\ncopy:\n  - {{tensors: "{name}", from: {first[0]}}}',
                )

    def _compute(self, statistics: Statistics, tile: Tile, values: Mapping[str, Tensor], out: Tensor) -> None:
        def piece(first: int, inputs: Mapping[str, Tensor]) -> None:
            start = first - tile.first
            here = out[start : start + next(iter(inputs.values())).numel()]
            result = here if self.stream is None else self.scratch.get("out", 0, out.dtype, here.numel())
            self._compute_piece(statistics, tile, first, inputs, result)
            if self.stream is not None:
                here.copy_(result, non_blocking=True)

        self._in_chunks(tile, values, piece)

    def _in_chunks(
        self,
        tile: Tile,
        values: Mapping[str, Tensor],
        work: Callable[[int, Mapping[str, Tensor]], None],
        origin: int = 0,
    ) -> None:
        """Call `work` for each chunk of a tile, with the index of its first element and its inputs on the device.

        origin: the element that blocks are counted from.
        """
        start, count = 0, tile.last - tile.first
        while start < count:
            # Of experts with coefficients of their own a tile may begin inside a block.
            inside = (tile.first + start - origin) % BLOCK if tile.tensor.experts is not None else 0
            stop = min(start + self.chunk - inside, count)
            pieces = enumerate(values.items())
            work(tile.first + start, {model: self._on_device(i, tensor[start:stop]) for i, (model, tensor) in pieces})
            start = stop

    def _on_stream(self, work: Callable[[], None]) -> None:
        if self.stream is None:
            return work()
        with torch.cuda.stream(self.stream):
            work()
            self.stream.synchronize()

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
        value, subtracted = self.evaluate(tensor, first, inputs)
        how = (output.rounding, rounding_key(output.seed, tensor.name), first)
        round_value(value, out, *how)
        # Before equal bits are put back: whatever is not finite in an input shows in the result until then, unless a
        # method left it out.
        shows = [out, *inputs.values()] if tensor.program.calls else [out]
        if not self.settings.allow_nonfinite and any(map(any_nonfinite, shows)):
            raise self.nonfinite(tile, inputs, out, first)
        if tensor.program.same_bits:
            keep_same_bits(tensor.program, inputs, out, self.scratch, *how)
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
        for begin in range(first // BLOCK * BLOCK, first + out.numel(), BLOCK):
            start = max(begin - first, 0)
            if not is_sampled(tensor.name, begin // BLOCK, blocks, self.settings.stats):
                continue
            piece = slice(start, min(begin + BLOCK - first, out.numel()))
            update = (
                subtracted[piece]
                if subtracted is not None
                else base[piece].to(torch.float64) - value[piece].to(torch.float64)
            )
            statistics[tensor.name][first + start] = measure(base[piece], out[piece], update, self.scratch)

    def nonfinite(
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
                    fix="the checkpoint is damaged; download or export it again"
                    + ("" if self.plan.makes_skill else "; pass `--allow-nonfinite` to merge it anyway"),
                )
        index = first_nonfinite(out) or 0
        wider = "set a wider `output.dtype` (bfloat16 or float32), or " if tile.tensor.dtype == "F16" else "use "
        return UnusableWeights(
            f"tensor `{tile.tensor.name}` overflows {tile.tensor.dtype} at element {offset + index}",
            fix=f"{wider}a smaller coefficient",
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
            self.settings.warn(f"the GPU is out of memory; continuing with pieces of {self.chunk} elements")
        else:
            self._use(torch.device("cpu"), self.settings.budget.tile)
            self.settings.warn("the GPU is out of memory; continuing on the CPU")
