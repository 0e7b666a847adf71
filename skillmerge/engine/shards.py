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
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from queue import Empty, SimpleQueue

import torch

from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.engine.destination import Destination, ShardRecord
from skillmerge.engine.rounding_statistics import total
from skillmerge.engine.tiles import Buffer, Span, spans
from skillmerge.engine.worker import Settings, Statistics, Worker
from skillmerge.plans.budget import OUTPUT_BUFFERS, WRITERS
from skillmerge.plans.plan import Plan, ShardPlan
from skillmerge.tensors import DTYPES, PAGE

_PATIENCE = 5.0
"""Seconds that an interrupted run waits for its threads."""

READ_AHEAD = 6
"""How many spans before its turn the system is told that a span's inputs will be read."""


class ShardJob:
    """One shard in flight: hands out its spans, keeps its digest in order, finishes its file."""

    def __init__(self, run: Run, shard: ShardPlan) -> None:
        plan, tile = run.plan, run.settings.budget.tile
        self.shard = shard
        self.spans = spans(plan, shard, tile)
        self.taken = 0
        self.file = run.destination.open_shard(shard)
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

    def finish(self) -> ShardRecord:
        self.file.finish()
        elements = {spec.name: spec.elements for spec in self.shard.specs}
        return ShardRecord(
            self.shard.file,
            self.shard.size,
            self._digest.hexdigest(),
            {name: total(blocks.values(), elements[name]) for name, blocks in self.statistics.items() if blocks},
        )


class Run:
    """What the threads of one run share: shards to do, buffers to fill, spans to write."""

    def __init__(
        self,
        plan: Plan,
        checkpoints: Mapping[str, Checkpoint],
        destination: Destination,
        settings: Settings,
        shards: Sequence[ShardPlan],
        in_flight: int | None,
        finished: Callable[[ShardRecord], None],
    ) -> None:
        self.in_flight, self.finished = in_flight, finished
        self.plan, self.checkpoints, self.destination, self.settings = plan, checkpoints, destination, settings
        self.unstarted = deque(shards)
        self.jobs: list[ShardJob] = []
        self.lock = threading.Condition()
        self.stop = threading.Event()
        self.failure: BaseException | None = None
        self.moved = 0
        """Bytes of output written, for the progress display."""
        self.full: SimpleQueue[tuple[ShardJob, Span, Buffer] | None] = SimpleQueue()
        self.free: SimpleQueue[Buffer] = SimpleQueue()
        widest = max((DTYPES[tensor.dtype].itemsize for tensor in plan.tensors.values()), default=1)
        count = OUTPUT_BUFFERS * settings.budget.threads
        self.buffers = [Buffer(settings.budget.tile * widest + PAGE, settings.device) for _ in range(count)]
        for buffer in self.buffers:
            self.free.put(buffer)

    def cancel(self) -> None:
        """Stop every thread, those too that wait for a network."""
        self.stop.set()
        for checkpoint in self.checkpoints.values():
            checkpoint.files.cancel()

    def work(self) -> None:
        """A worker's life: a free buffer, a span, its bytes, and on to the writers."""
        worker = Worker(self.plan, self.checkpoints, self.settings, self.stop)
        job: ShardJob | None = None
        try:
            while (buffer := self._free_buffer()) is not None and (taken := self.take(job)) is not None:
                job, span = taken
                if span is None:
                    self.free.put(buffer)
                    self.complete(job)
                    continue
                for coming in job.spans[span.index + READ_AHEAD :][:1]:
                    worker.reader.announce(coming)
                worker.fill(span, buffer, job.statistics)
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
            while not self.stop.is_set():
                job = mine if mine is not None and mine.left else self._next_job()
                if job is not None and job.left:
                    job.taken += 1
                    return job, job.spans[job.taken - 1]
                if job is not None or not self.unstarted:
                    return (job, None) if job is not None else None
                self.lock.wait(0.2)  # as many shards are in flight as may be
            return None

    def _next_job(self) -> ShardJob | None:
        if not self.unstarted or (self.in_flight is not None and len(self.jobs) >= self.in_flight):
            return max((job for job in self.jobs if job.left), key=lambda job: job.left, default=None)
        self.jobs.append(ShardJob(self, self.unstarted.popleft()))
        return self.jobs[-1]

    def complete(self, job: ShardJob) -> None:
        """Make a shard durable, then say so in the journal."""
        done = job.finish()
        for model, files in self._files_read(job.shard).items():
            self.checkpoints[model].check_unchanged(files)
        self.destination.record(done)
        self.finished(done)
        with self.lock:
            self.destination.finished.setdefault(job.shard.file, done)
            self.jobs.remove(job)
            self.lock.notify_all()

    def _files_read(self, shard: ShardPlan) -> dict[str, set[str]]:
        files: dict[str, set[str]] = {}
        for spec in shard.specs:
            for model, source in self.plan.tensors[spec.name].sources:
                files.setdefault(model, set()).add(self.checkpoints[model].tensors[source].file)
        return files


def merge_shards(
    plan: Plan,
    checkpoints: Mapping[str, Checkpoint],
    destination: Destination,
    settings: Settings,
    *,
    shards: Sequence[ShardPlan] | None = None,
    progress: Callable[[int], None] = lambda done: None,
    in_flight: int | None = None,
    finished: Callable[[ShardRecord], None] = lambda done: None,
) -> None:
    """Write the shards that `destination` has not finished yet (all of the plan's, or those given).

    Idempotent per shard: what one call leaves unfinished, another may do. `progress` gets the bytes of output
    finished so far, a few times a second, in the calling thread. `finished` gets the record of each shard
    when that is durable, in a thread of the run; no more than `in_flight` shards are begun and not yet
    handed to it.
    """
    wanted = [shard for shard in (shards or plan.shards) if shard.file not in destination.finished]
    before = sum(shard.size for shard in plan.shards if shard.file in destination.finished)
    run = Run(plan, checkpoints, destination, settings, wanted, in_flight, finished)
    intraop = torch.get_num_threads()
    torch.set_num_threads(1)
    workers = [
        threading.Thread(target=_guard, args=(run, run.work), daemon=True) for _ in range(settings.budget.threads)
    ]
    writers = [
        threading.Thread(target=_guard, args=(run, run.write), daemon=True) for _ in range(WRITERS + (in_flight or 0))
    ]
    interrupted = False
    try:
        for thread in (*workers, *writers):
            thread.start()
        for thread in workers:
            while thread.is_alive():
                thread.join(0.25)
                progress(before + run.moved)
        for _ in writers:
            run.full.put(None)
        for thread in writers:
            while thread.is_alive():
                thread.join(0.25)
        progress(before + run.moved)
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        run.cancel()
        raise
    finally:
        run.stop.set()
        for _ in writers:
            run.full.put(None)
        deadline = time.monotonic() + _PATIENCE
        for thread in (*workers, *writers):
            if thread.ident is not None:  # else the system had none to give
                thread.join(max(0.0, deadline - time.monotonic()) if interrupted else None)
        if not any(thread.is_alive() for thread in (*workers, *writers)):
            run.close()  # else one of them waits for a network, and works with what this would close
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
        run.cancel()
