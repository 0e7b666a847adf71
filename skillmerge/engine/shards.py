"""Plan + checkpoints + device -> finished shards. The streaming core.

A *span* is a run of an output file, a few megabytes of one or more tiles. A worker takes a free output buffer
and a span, reads its tiles' inputs into buffers it owns, computes, and hands the full buffer to a writer,
which writes it at its final offset and digests whatever is next in its shard's turn. Each worker starts on a
shard of its own and, when none is left, helps with those in flight. torch and the system calls release the
GIL, so that reading, arithmetic, writing and digesting overlap; nobody waits but for a free buffer. Nothing
here decides anything: the plan did.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue

from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.engine.destination import Destination, ShardRecord, SpanFile
from skillmerge.engine.measures.preparing import Preparations
from skillmerge.engine.rounding_statistics import total_of
from skillmerge.engine.runner import Room
from skillmerge.engine.stream import Stream
from skillmerge.engine.tiles import Buffer, Span, spans
from skillmerge.engine.worker import Settings, Statistics, Worker
from skillmerge.methods.method import Scalars
from skillmerge.plans.budget import OUTPUT_BUFFERS, WRITERS
from skillmerge.plans.plan import Plan, ShardPlan
from skillmerge.tensors import DTYPES, PAGE

READ_AHEAD = 6
"""How many spans ahead inputs are prefetched."""

_WAIT = 0.2
"""Seconds between two looks at whether the run is over, of a thread that waits for something else."""


class _ShardFile:
    """One shard in flight: hands out its spans, keeps its digest in order, finishes its file."""

    def __init__(self, plan: Plan, shard: ShardPlan, tile: int, file: SpanFile) -> None:
        self._plan, self.shard = plan, shard
        self.spans = spans(plan, shard, tile)
        self.taken = 0
        self.file = file
        self.statistics: Statistics = {
            spec.name: {} for spec in shard.specs if plan.tensors[spec.name].action == "merge"
        }
        self._digest = hashlib.sha256(shard.header)
        self._written: dict[int, tuple[memoryview, Buffer]] = {}
        self._digesting = False
        self._turn = 0
        self._lock = threading.Lock()

    @property
    def left(self) -> int:
        return len(self.spans) - self.taken

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
                    return self._turn == len(self.spans)
            self._digest.update(waiting[0])
            free(waiting[1])
            self._turn += 1

    def finish(self, scalars: Mapping[str, Scalars]) -> ShardRecord:
        """Make the file durable. scalars: what methods found of its tensors."""
        self.file.finish()
        return ShardRecord(
            self.shard.file,
            self.shard.size,
            self._digest.hexdigest(),
            {name: total_of(self._plan.tensors[name], blocks) for name, blocks in self.statistics.items() if blocks},
            scalars=scalars,
        )


class _Run:
    """The shared state of one run's threads: shards to do, buffers to fill, spans to write."""

    def __init__(
        self,
        plan: Plan,
        checkpoints: Mapping[str, Checkpoint],
        destination: Destination,
        settings: Settings,
        shards: Sequence[ShardPlan],
        room: Room | None,
        stream: Stream,
    ) -> None:
        self.plan, self.checkpoints, self.destination, self.settings = plan, checkpoints, destination, settings
        self.stream, self.room, self.granted = stream, room, 0
        self.preparations = Preparations(plan, checkpoints, settings.budget.tile)
        self.unstarted = deque(shards)
        self.open: list[_ShardFile] = []
        self.lock = threading.Lock()
        self.moved = 0
        """Bytes of output written, for the progress display."""
        self.full: SimpleQueue[tuple[_ShardFile, Span, Buffer] | None] = SimpleQueue()
        self.free: SimpleQueue[Buffer] = SimpleQueue()
        self.done: SimpleQueue[ShardRecord] = SimpleQueue()
        widest = max((DTYPES[tensor.dtype].itemsize for tensor in plan.tensors.values()), default=1)
        for _ in range(OUTPUT_BUFFERS * settings.budget.threads):
            self.free.put(stream.keep(Buffer(settings.budget.tile * widest + PAGE, settings.device)))

    def start(self) -> None:
        self.stream.start(self.settings.budget.threads, self._work)
        self.stream.start(WRITERS, self._write, self._end)

    def worker(self) -> Worker:
        return Worker(self.plan, self.checkpoints, self.settings, self.stream.stop, self.preparations)

    def _end(self) -> None:
        for _ in range(WRITERS):
            self.full.put(None)

    def _work(self) -> None:
        """A worker's life: a free buffer, a span, its bytes, and on to the writers."""
        worker = self.stream.own(self.worker)
        file: _ShardFile | None = None
        while (buffer := self._free_buffer()) is not None and (taken := self._take(file)) is not None:
            file, span = taken
            if span is None:
                self.free.put(buffer)
                self._complete(file)
                continue
            for coming in file.spans[span.index + READ_AHEAD :][:1]:
                worker.reader.announce(coming)
            worker.fill(span, buffer, file.statistics)
            self.full.put((file, span, buffer))

    def _write(self) -> None:
        """A writer's life: until nothing more is wanted."""
        while (item := self.full.get()) is not None and not self.stream.stop.is_set():
            # A worker that was stopped has handed over half a span, and `stop` was set before that.
            file, span, buffer = item
            with self.lock:
                self.moved += span.nbytes
            if file.add(span, buffer, self.free.put):
                self._complete(file)

    def _free_buffer(self) -> Buffer | None:
        while not self.stream.stop.is_set():
            with suppress(Empty):
                return self.free.get(timeout=_WAIT)
        return None

    def _take(self, mine: _ShardFile | None) -> tuple[_ShardFile, Span | None] | None:
        """Return the next span: of the worker's own shard, of a new one, or of the one with the most left.

        None when nothing is left; a shard without weights comes without a span.
        """
        while not self.stream.stop.is_set():
            with self.lock:
                file = mine if mine is not None and mine.left else self._next_file()
                if file is not None and file.left:
                    file.taken += 1
                    return file, file.spans[file.taken - 1]
                if file is not None or not self.unstarted:
                    return (file, None) if file is not None else None
            if self.room is not None and self.room.acquire(timeout=_WAIT):
                with self.lock:
                    self.granted += 1
        return None

    def _next_file(self) -> _ShardFile | None:
        if not self.unstarted or not self._has_room():
            return max((file for file in self.open if file.left), key=lambda file: file.left, default=None)
        shard = self.unstarted.popleft()
        file = _ShardFile(self.plan, shard, self.settings.budget.tile, self.destination.open_shard(shard))
        self.open.append(file)
        self.stream.keep(file.file)
        return file

    def _has_room(self) -> bool:
        if self.granted:
            self.granted -= 1
            return True
        return self.room is None or self.room.acquire(blocking=False)

    def _complete(self, file: _ShardFile) -> None:
        """Make a shard durable, then hand it over."""
        record = file.finish(self.preparations.done([spec.name for spec in file.shard.specs]))
        for model, files in self._files_read(file.shard).items():
            self.checkpoints[model].check_unchanged(files)
        with self.lock:
            self.open.remove(file)
        self.done.put(record)

    def _files_read(self, shard: ShardPlan) -> dict[str, set[str]]:
        files: dict[str, set[str]] = {}
        for spec in shard.specs:
            for model, source in self.plan.tensors[spec.name].sources:
                files.setdefault(model, set()).update(self.checkpoints[model].costs(source))
        return files


def merge_shards(
    plan: Plan,
    checkpoints: Mapping[str, Checkpoint],
    destination: Destination,
    settings: Settings,
    shards: Sequence[ShardPlan],
    progress: Callable[[int], None],
    room: Room | None = None,
) -> Iterator[ShardRecord]:
    """Write `shards`, and yield the record of each as soon as its file is durable.

    Idempotent per shard: what one call leaves unfinished, another may do. progress: gets the bytes of output written
    so far, a few times a second, in the calling thread. room: taken by each shard that is begun.
    """
    with Stream(checkpoints.values()) as stream:
        run = _Run(plan, checkpoints, destination, settings, shards, room, stream)
        run.preparations.read_model(stream, run.worker, settings.budget.threads)
        run.start()
        yield from stream.take(run.done, len(shards), lambda: progress(run.moved))
