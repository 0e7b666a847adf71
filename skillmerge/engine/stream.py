"""The one loop over weights: threads that work side by side, stop together, and leave nothing behind.

`apply`, `extract`, `inspect` and the merge in memory run on it, each with its own work. Knows threads, failures and
interrupts; nothing about what the work is.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import ExitStack, closing, suppress
from queue import Empty, SimpleQueue
from typing import Protocol, TypeVar

import torch

from skillmerge.bits import settle_thread
from skillmerge.checkpoints.checkpoint import Checkpoint

_PATIENCE = 5.0
"""Seconds that an interrupted pass waits for its threads."""

_GLANCE = 0.25
"""Seconds between two looks at whether a thread has failed."""


class Closable(Protocol):
    def close(self) -> None: ...


Item = TypeVar("Item")
Found = TypeVar("Found")
Resource = TypeVar("Resource", bound=Closable)


class _Stopped(Exception):
    """Ends a thread that waits for another one when nothing more is wanted."""


class Stream:
    """The threads of one pass over checkpoints. Leaving its context ends all of them.

    The first failure of a thread stops the others, ends reads that wait for a network, and is raised in the calling
    thread. `stop` is set as soon as nothing more is wanted: long work looks at it now and then. `hurry` is set where a
    person waits for the end of an interrupted pass: then what is nearly done is left too. Torch computes with one
    thread in each of them, and the settings of the caller's threads are neither used nor changed.
    """

    def __init__(self, checkpoints: Iterable[Checkpoint]) -> None:
        self.stop = threading.Event()
        self.hurry = threading.Event()
        self._checkpoints = tuple(checkpoints)
        self._threads: list[threading.Thread] = []
        self._endings: list[Callable[[], None]] = []
        self._resources = ExitStack()
        self._own = threading.local()
        self._lock = threading.Lock()
        self._failure: BaseException | None = None
        self._deadline: float | None = None
        self._settled = threading.Semaphore(0)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._join(error)
        if not any(thread.is_alive() for thread in self._threads):
            self._resources.close()  # else one of them waits for a network, and works with what this would close
        if error is None:
            self.check()

    def _join(self, error: BaseException | None) -> None:
        """End all threads and wait for them; after an interrupt for a few seconds only."""
        if error is not None:
            self.cancel()
        self.stop.set()
        if isinstance(error, KeyboardInterrupt):
            self.hurry.set()
            self._deadline = self._deadline or time.monotonic() + _PATIENCE
        for end in self._endings:
            end()
        for thread in self._threads:
            if thread.ident is not None:  # else the system had no more threads
                thread.join(max(0.0, self._deadline - time.monotonic()) if self._deadline is not None else None)

    def start(self, count: int, body: Callable[[], None], end: Callable[[], None] = lambda: None) -> None:
        """Run `body` in `count` more threads; `end` wakes those that wait when nothing more is wanted."""
        self._endings.append(end)
        threads = [threading.Thread(target=self._guard, args=(body,), daemon=True) for _ in range(count)]
        self._threads += threads
        for thread in threads:
            thread.start()
        for _ in threads:
            self._settled.acquire()

    def own(self, make: Callable[[], Resource]) -> Resource:
        """Return what the calling thread works with: made when it first asks, closed when the pass is over."""
        if not hasattr(self._own, "resource"):
            self._own.resource = self.keep(make())
        resource: Resource = self._own.resource
        return resource

    def keep(self, resource: Resource) -> Resource:
        """Close `resource` when no thread uses it any more."""
        with self._lock:
            return self._resources.enter_context(closing(resource))

    def map(
        self, function: Callable[[Item], Found], items: Iterable[Item], *, threads: int, ahead: int
    ) -> Iterator[Found]:
        """`function(item)` in threads of its own; the results in the order of the items.

        ahead: how many items are begun before the first of their results is taken.
        """
        tasks: SimpleQueue[tuple[Future[Found], Item] | None] = SimpleQueue()

        def work() -> None:
            while (task := tasks.get()) is not None and not self.stop.is_set():
                future, item = task
                try:
                    future.set_result(function(item))
                except BaseException as error:
                    future.set_exception(error)
                    raise

        def end() -> None:
            for _ in range(threads):
                tasks.put(None)

        def in_order() -> Iterator[Found]:
            waiting: deque[Future[Found]] = deque()
            for item in items:
                waiting.append(Future())
                tasks.put((waiting[-1], item))
                if len(waiting) == ahead:
                    yield self._result(waiting.popleft())
            while waiting:
                yield self._result(waiting.popleft())

        self.start(threads, work, end)
        return in_order()

    def take(self, queue: SimpleQueue[Found], count: int, tick: Callable[[], None]) -> Iterator[Found]:
        """`count` things that threads put into `queue`, each as soon as it is there; `tick` is called meanwhile.

        Whatever ends a pass early (a thread's failure, an interrupt, an error that is thrown in where something was
        handed over) is raised once the threads have ended and all that they had put there was handed over. What was
        handed over when the error was thrown in comes again: who threw it may not have got round to it.
        """
        found: list[Found] = []
        try:
            while count:
                tick()
                try:
                    found.append(queue.get(timeout=_GLANCE))
                except Empty:
                    self.check()
                    continue
                yield found[0]
                found.clear()
                count -= 1
            tick()
        except GeneratorExit:
            raise
        except BaseException as error:
            self._join(error)
            with suppress(Empty):
                while True:
                    found.append(queue.get_nowait())
            yield from found
            raise

    def _result(self, future: Future[Found]) -> Found:
        while not wait([future], _GLANCE).done:
            self.check()
            if self.stop.is_set():  # no thread will do it: only a thread of this pass can be here then
                raise _Stopped
        self.check()  # what was done while another thread failed may be half of what it should be
        return future.result()

    def check(self) -> None:
        """Raise what a thread has failed with."""
        if self._failure is not None:
            raise self._failure

    def cancel(self) -> None:
        """Stop every thread, also those that wait for a network."""
        self.stop.set()
        for checkpoint in self._checkpoints:
            checkpoint.cancel()

    def _guard(self, body: Callable[[], None]) -> None:
        try:
            try:
                settle_thread()
            finally:
                self._settled.release()
            with torch.inference_mode():
                body()
        except _Stopped:
            pass
        except BaseException as error:
            with self._lock:
                self._failure = self._failure or error
            self.cancel()
