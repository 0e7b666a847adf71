"""Plan + checkpoints + device -> finished shards. The streaming core.

A *span* is a run of an output file, a few megabytes of one or more tiles. A worker takes a free output buffer
and a span, reads its tiles' inputs into buffers it owns, computes, and hands the full buffer to a writer,
which writes it at its final offset and digests whatever is next in its shard's turn. Each worker starts on a
shard of its own and, when none is left, helps with those in flight. torch and the system calls release the
GIL, so that reading, arithmetic, writing and digesting overlap; nobody waits but for a free buffer. On CUDA
the same worker owns a stream and pinned buffers. Nothing here decides anything: the plan did.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
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
from skillmerge.errors import InputError, UsageError
from skillmerge.planning import Plan, ShardPlan, TensorPlan
from skillmerge.resources import OUTPUT_BUFFERS, WRITERS, Budget
from skillmerge.statistics import BlockStatistics, is_sampled, measure, total
from skillmerge.tensors import BLOCK, CHUNK, DTYPES, block_count, tile_ranges
from skillmerge.writer import PAGE, ShardFile, Staging, WriteMode


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


def choose_device(asked: str) -> tuple[torch.device, str]:
    """The device for `auto`, `cpu`, `cuda` or `cuda:N`, and why. Raises UsageError where it is not there."""
    if asked == "cpu":
        return torch.device("cpu"), "as asked"
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked == "auto":
        if found == 0:
            return torch.device("cpu"), "no CUDA device was found"
        return torch.device("cuda", 0), f"{torch.cuda.get_device_name(0)} was found"
    number = int(asked.removeprefix("cuda").removeprefix(":") or 0)
    if number >= found:
        raise UsageError(
            f"--device {asked}: this machine has {found} CUDA devices that torch can use",
            fix="use --device cpu or auto",
        )
    return torch.device("cuda", number), "as asked"


class ShardJob:
    """One shard in flight: hands out its spans, keeps its digest in order, finishes its file."""

    def __init__(self, run: Run, shard: ShardPlan) -> None:
        plan, tile = run.plan, run.settings.budget.tile
        self.shard = shard
        cut = spans(plan, shard, tile)
        self.pending = iter(cut)
        self.left = self.total = len(cut)
        self.file = ShardFile(run.staging.files / shard.file, shard.size, shard.header, run.write_mode)
        self.statistics: dict[str, dict[int, BlockStatistics]] = {
            spec.name: {} for spec in shard.specs if plan.tensors[spec.name].action == "merge"
        }
        self._digest = hashlib.sha256(shard.header)
        self._written: dict[int, tuple[memoryview, Buffer]] = {}
        self._digesting = False
        self._turn = 0
        self._lock = threading.Lock()

    def add(self, span: Span, buffer: Buffer, free: Callable[[Buffer], None]) -> bool:
        """Write a computed span, then digest what has its turn. True where that was the shard's last.

        Whichever writer fills the gap digests everything that was waiting behind it, and frees its buffers.
        """
        data = buffer.view[span.offset % PAGE :][: span.nbytes]
        self.file.write(data, span.offset)
        with self._lock:
            self._written[span.index] = (data, buffer)
            if self._digesting:
                return False
            self._digesting = True
        while True:
            with self._lock:
                waiting = self._written.pop(self._turn, None)
                if waiting is None:
                    self._digesting = False
                    return self._turn == self.total
            self._digest.update(waiting[0])
            free(waiting[1])
            self._turn += 1

    def finish(self) -> dict[str, Any]:
        self.file.finish()
        elements = {spec.name: spec.elements for spec in self.shard.specs}
        return {
            "shard": self.shard.file,
            "size": self.shard.size,
            "sha256": self._digest.hexdigest(),
            "statistics": {
                name: total(blocks.values(), elements[name]) for name, blocks in self.statistics.items() if blocks
            },
        }


class Run:
    """What the threads of one run share: shards to do, buffers to fill, spans to write."""

    def __init__(
        self,
        plan: Plan,
        checkpoints: Mapping[str, Checkpoint],
        staging: Staging,
        settings: Settings,
        shards: Sequence[ShardPlan],
    ) -> None:
        self.plan, self.checkpoints, self.staging, self.settings = plan, checkpoints, staging, settings
        self.unstarted = iter(shards)
        self.jobs: list[ShardJob] = []
        self.lock = threading.Lock()
        self.stop = threading.Event()
        self.failure: BaseException | None = None
        self.write_mode = WriteMode()
        self.moved = 0
        """Bytes of output written, for the progress display."""
        self.full: SimpleQueue[tuple[ShardJob, Span, Buffer] | None] = SimpleQueue()
        self.free: SimpleQueue[Buffer] = SimpleQueue()
        widest = max((DTYPES[tensor.dtype].itemsize for tensor in plan.tensors.values()), default=1)
        count = OUTPUT_BUFFERS * settings.budget.threads
        self.buffers = [Buffer(settings.budget.tile * widest + PAGE, settings.device) for _ in range(count)]
        for buffer in self.buffers:
            self.free.put(buffer)

    def work(self) -> None:
        """A worker's life: a free buffer, a span, its bytes, and on to the writers."""
        worker = Worker(self)
        job: ShardJob | None = None
        try:
            while (buffer := self._free_buffer()) is not None and (taken := self.take(job)) is not None:
                job, span = taken
                if span is None:
                    self.free.put(buffer)
                    self.complete(job)
                    continue
                worker.fill(job, span, buffer)
                self.full.put((job, span, buffer))
        finally:
            worker.close()

    def write(self) -> None:
        """A writer's life: until there is nothing left to write."""
        while (item := self.full.get()) is not None and not self.stop.is_set():
            job, span, buffer = item
            if job.add(span, buffer, self.free.put):
                self.complete(job)
            with self.lock:
                self.moved += span.nbytes

    def _free_buffer(self) -> Buffer | None:
        while not self.stop.is_set():
            try:
                return self.free.get(timeout=0.2)
            except Empty:
                continue
        return None

    def close(self) -> None:
        for job in self.jobs:
            job.file.close()
        for buffer in self.buffers:
            buffer.close()

    def take(self, mine: ShardJob | None) -> tuple[ShardJob, Span | None] | None:
        """The next span: of the worker's own shard, of a new one, or of the one with the most left.

        None when nothing is left; a shard without weights comes without a span.
        """
        with self.lock:
            if self.stop.is_set():
                return None
            job = mine if mine is not None and mine.left else self._next_job()
            if job is None:
                return None
            if not job.left:
                return job, None
            job.left -= 1
            return job, next(job.pending)

    def _next_job(self) -> ShardJob | None:
        shard = next(self.unstarted, None)
        if shard is None:
            return max((job for job in self.jobs if job.left), key=lambda job: job.left, default=None)
        self.jobs.append(ShardJob(self, shard))
        return self.jobs[-1]

    def complete(self, job: ShardJob) -> None:
        """Make a shard durable, then say so in the journal."""
        entry = job.finish()
        for model, files in self._files_read(job.shard).items():
            self.checkpoints[model].check_unchanged(files)
        self.staging.record(entry)
        with self.lock:
            self.staging.finished[job.shard.file] = entry
            self.jobs.remove(job)

    def _files_read(self, shard: ShardPlan) -> dict[str, set[str]]:
        files: dict[str, set[str]] = {}
        for spec in shard.specs:
            for model, source in self.plan.tensors[spec.name].sources:
                files.setdefault(model, set()).add(self.checkpoints[model].tensors[source].file)
        return files


def merge_shards(
    plan: Plan,
    checkpoints: Mapping[str, Checkpoint],
    staging: Staging,
    settings: Settings,
    *,
    shards: Sequence[ShardPlan] | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Write the shards that `staging` has not finished yet (all of the plan's, or those given).

    Idempotent per shard: what one call leaves unfinished, another may do. `progress` gets the bytes of output
    finished so far, a few times a second, in the calling thread.
    """
    wanted = [shard for shard in (shards or plan.shards) if shard.file not in staging.finished]
    finished = sum(shard.size for shard in plan.shards if shard.file in staging.finished)
    run = Run(plan, checkpoints, staging, settings, wanted)
    intraop = torch.get_num_threads()
    torch.set_num_threads(1)
    workers = [
        threading.Thread(target=_guard, args=(run, run.work), daemon=True) for _ in range(settings.budget.threads)
    ]
    writers = [threading.Thread(target=_guard, args=(run, run.write), daemon=True) for _ in range(WRITERS)]
    try:
        for thread in (*workers, *writers):
            thread.start()
        for thread in workers:
            while thread.is_alive():
                thread.join(0.25)
                progress(finished + run.moved)
        for _ in writers:
            run.full.put(None)
        for thread in writers:
            while thread.is_alive():
                thread.join(0.25)
        progress(finished + run.moved)
    finally:
        run.stop.set()
        for _ in writers:
            run.full.put(None)
        for thread in (*workers, *writers):
            thread.join()
        run.close()
        torch.set_num_threads(intraop)
    if run.failure is not None:
        raise run.failure


def _guard(run: Run, body: Callable[[], None]) -> None:
    """Run a thread's body; the first failure stops all of them."""
    try:
        with torch.inference_mode():
            body()
    except BaseException as error:
        with run.lock:
            run.failure = run.failure or error
        run.stop.set()


class Buffer:
    """Page-aligned host memory that both the system calls and torch see; pinned for a CUDA device."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._memory = mmap.mmap(-1, max(size, mmap.PAGESIZE))
        self.view = memoryview(self._memory)
        self.tensor = torch.frombuffer(self._memory, dtype=torch.uint8)
        self._pinned = False
        if device.type == "cuda":
            with torch.cuda.device(device):
                status = _cudart().cudaHostRegister(self.tensor.data_ptr(), len(self._memory), 0)
            self._pinned = int(status) == 0

    def typed(self, dtype: torch.dtype, start: int, count: int) -> Tensor:
        return self.tensor[start : start + count * dtype.itemsize].view(dtype)

    def close(self) -> None:
        if self._pinned:
            _cudart().cudaHostUnregister(self.tensor.data_ptr())
            self._pinned = False


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


class Worker:
    """One thread's input buffers and arithmetic.

    `chunk` elements are computed at once: what fits the caches on a CPU, a whole tile on CUDA.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.plan, self.settings = run, run.plan, run.settings
        tile = self.settings.budget.tile
        self.inputs = [Buffer(tile * size, self.settings.device) for size in self.plan.input_itemsizes]
        self.host_scratch = Scratch(torch.device("cpu"), CHUNK)
        self._use(self.settings.device, tile)

    def _use(self, device: torch.device, tile: int) -> None:
        self.device = device
        self.chunk = tile if device.type == "cuda" else CHUNK
        self.scratch = Scratch(device, self.chunk) if device.type == "cuda" else self.host_scratch
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def fill(self, job: ShardJob, span: Span, buffer: Buffer) -> None:
        """Put a span's bytes into `buffer`, aligned in memory as they are in the file (direct I/O asks for it)."""
        for tile in span.tiles:
            if self.run.stop.is_set():
                return
            self._fill(job, tile, buffer, span.offset % PAGE + tile.offset - span.offset)

    def close(self) -> None:
        for buffer in self.inputs:
            buffer.close()

    def _fill(self, job: ShardJob, tile: Tile, output: Buffer, start: int) -> None:
        tensor = tile.tensor
        if tensor.action in ("copy", "same"):
            self._read(tensor.sources[0], tile, output.view[start : start + tile.nbytes])
            if tensor.action == "same":
                self._compare(tile, output.tensor[start : start + tile.nbytes])
            elif not self.settings.allow_nonfinite and DTYPES[tensor.dtype].is_float:
                out = output.typed(torch_dtype(tensor.dtype), start, tile.last - tile.first)
                for first in range(0, out.numel(), BLOCK):
                    if any_nonfinite(out[first : first + BLOCK], self.host_scratch):
                        raise self._nonfinite(tile, {tensor.sources[0][0]: out}, out)
            return
        values = {}
        for buffer, source in zip(self.inputs, tensor.sources, strict=False):
            dtype = torch_dtype(self.run.checkpoints[source[0]].tensors[source[1]].dtype)
            values[source[0]] = buffer.typed(dtype, 0, tile.last - tile.first)
            self._read(source, tile, buffer.view[: values[source[0]].nbytes])
        out = output.typed(torch_dtype(tensor.dtype), start, tile.last - tile.first)
        while True:
            try:
                return self._compute(job, tile, values, out)
            except torch.cuda.OutOfMemoryError:
                self._shrink()

    def _read(self, source: tuple[str, str], tile: Tile, into: memoryview) -> None:
        checkpoint = self.run.checkpoints[source[0]]
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
                raise InputError(
                    f"tensor `{name}` holds {tile.tensor.dtype} and differs between models `{first[0]}` and "
                    f"`{other[0]}`: it cannot be merged",
                    fix=f'say which one to take:\ncopy:\n  - {{tensors: "{name}", from: {first[0]}}}',
                )

    def _compute(self, job: ShardJob, tile: Tile, values: Mapping[str, Tensor], out: Tensor) -> None:
        if self.stream is None:
            return self._compute_chunks(job, tile, values, out)
        with torch.cuda.stream(self.stream):
            self._compute_chunks(job, tile, values, out)
            self.stream.synchronize()

    def _compute_chunks(self, job: ShardJob, tile: Tile, values: Mapping[str, Tensor], out: Tensor) -> None:
        for start in range(0, out.numel(), self.chunk):
            stop = min(start + self.chunk, out.numel())
            pieces = {
                model: self._on_device(index, tensor[start:stop])
                for index, (model, tensor) in enumerate(values.items())
            }
            here = out[start:stop]
            result = here if self.stream is None else self.scratch.get("out", 0, out.dtype, stop - start)
            self._compute_piece(job, tile, tile.first + start, pieces, result)
            if self.stream is not None:
                here.copy_(result, non_blocking=True)

    def _on_device(self, index: int, piece: Tensor) -> Tensor:
        if self.stream is None:
            return piece
        return self.scratch.get("input", index, piece.dtype, piece.numel()).copy_(piece, non_blocking=True)

    def _compute_piece(self, job: ShardJob, tile: Tile, first: int, inputs: Mapping[str, Tensor], out: Tensor) -> None:
        """The arithmetic of one run of elements, `first` being its index in the tensor."""
        tensor, output = tile.tensor, self.plan.recipe.output
        assert tensor.program is not None
        value, subtracted = evaluate(tensor.program, inputs, self.scratch)
        if output.rounding == "stochastic" and value.dtype != out.dtype:
            round_stochastic(value, out, rounding_key(output.seed, tensor.name), first)
        else:
            round_nearest(value, out)
        if tensor.program.same_bits:
            keep_same_bits(tensor.program, inputs, out, self.scratch)
        if self.settings.allow_nonfinite:
            canonical_nan(out)
        elif any_nonfinite(out, self.scratch):
            raise self._nonfinite(tile, inputs, out, first)
        if tensor.action == "merge":
            self._measure(job, tensor, first, inputs, out, value, subtracted)

    def _measure(
        self,
        job: ShardJob,
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
            job.statistics[tensor.name][block] = measure(base[piece], out[piece], update, self.scratch)

    def _nonfinite(self, tile: Tile, inputs: Mapping[str, Tensor], out: Tensor, first: int | None = None) -> InputError:
        """Say which input holds it; where none does, the output's dtype is too narrow."""
        offset = tile.first if first is None else first
        names = dict(tile.tensor.sources)
        for model, values in inputs.items():
            index = first_nonfinite(values)
            if index is not None:
                file = self.run.checkpoints[model].tensors[names[model]].file
                return InputError(
                    f"model `{model}` holds {values[index].item()} in tensor `{names[model]}` at element "
                    f"{offset + index} ({file})",
                    fix="that checkpoint is damaged; --allow-nonfinite merges it all the same",
                )
        index = first_nonfinite(out) or 0
        return InputError(
            f"tensor `{tile.tensor.name}` overflows {tile.tensor.dtype} at element {offset + index}",
            fix="choose a wider output.dtype (bfloat16 or float32), or a smaller coefficient",
        )

    def _shrink(self) -> None:
        """The GPU is full: smaller pieces, and when those do not fit either, the CPU."""
        self.scratch.clear()
        torch.cuda.empty_cache()
        if self.chunk > BLOCK:
            self.chunk = max(BLOCK, self.chunk // 2)
            self.scratch = Scratch(self.device, self.chunk)
            self.settings.warn(f"the GPU is out of memory: going on with pieces of {self.chunk} elements")
        else:
            self._use(torch.device("cpu"), self.settings.budget.tile)
            self.settings.warn("the GPU is out of memory: going on with the CPU")
