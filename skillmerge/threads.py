"""Map a function over items in a few threads, which stop together when one fails; and hash files."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

Item = TypeVar("Item")
Found = TypeVar("Found")


def cores() -> int:
    """Return the cores that this process may use: those it is bound to, at most as many as Slurm gave its task, and as
    the time that its control groups grant amounts to."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    given = os.environ.get("SLURM_CPUS_PER_TASK", "")
    limits = [int(given)] if given.isascii() and given.isdecimal() else []
    return max(1, min([bound, *limits, *quotas()]))


def quotas(system: Path = Path("/")) -> list[int]:
    """Return the limits on processor time of this process's control groups, in cores, rounded up: a container's limit
    binds no core, so that all of the machine's are seen. system: the root of the file system."""
    groups = system / "sys/fs/cgroup"
    try:
        rows = [row.split(":", 2) for row in (system / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return []
    found = []
    for _, controllers, name in (row for row in rows if len(row) == 3):
        mounted = groups if not controllers else groups / controllers
        own = mounted / name.lstrip("/")
        # In a container the name may be one that only the host's tree has: its own group is at the root.
        above = [folder for folder in own.parents if folder.is_relative_to(mounted)]
        shares = (_share(folder, controllers) for folder in (own, *above))
        found += [share for share in shares if share is not None]
    return found


def _share(folder: Path, controllers: str) -> int | None:
    """Return the limit of one control group, of version 2 or 1."""
    try:
        if not controllers:
            quota, period = (folder / "cpu.max").read_text().split()
        elif "cpu" in controllers.split(","):
            quota, period = ((folder / f"cpu.cfs_{key}_us").read_text() for key in ("quota", "period"))
        else:
            return None
        return max(1, -(-int(quota) // int(period))) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # no limit is `max`, or -1
        return None


class Crew:
    """A few threads that do what they are given, and that neither the end of Python nor a signal waits for.

    Those of `ThreadPoolExecutor` keep an interrupted script alive until their last upload is sent. Signals are left to
    the main thread, which may have them wait.
    """

    def __init__(self, threads: int, begin: Callable[[], None] = lambda: None) -> None:
        """begin: called first in every thread."""
        self._begin = begin
        self._tasks: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(threads)]
        self._given: list[Future[Any]] = []

    def submit(self, function: Callable[[], Found]) -> Future[Found]:
        future: Future[Found] = Future()
        self._given.append(future)
        self._tasks.put((future, function))
        for thread in self._threads:
            if thread.ident is None:
                thread.start()
        return future

    def _work(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        begun = False
        while (task := self._tasks.get()) is not None:
            future, function = task
            if future.set_running_or_notify_cancel():
                try:
                    if not begun:
                        self._begin()
                        begun = True
                    future.set_result(function())
                except BaseException as error:
                    future.set_exception(error)

    def end(self, *, wait: bool, cancel: bool) -> None:
        """cancel: what is not begun. wait: until the rest is done."""
        if cancel:
            for future in self._given:
                future.cancel()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            if wait and thread.ident is not None:
                thread.join()


def in_threads(
    function: Callable[[Item, threading.Event], Found],
    items: Iterable[Item],
    begin: Callable[[], None] = lambda: None,
) -> Iterator[Found]:
    """`function(item, stop)` for every item, in order. A long function looks at `stop` now and then.

    begin: called first in every thread; `bits.settle_thread` where the function computes.
    """
    stop = threading.Event()
    crew = Crew(min(4, cores()), begin)
    patient = True
    try:
        for future in [crew.submit(partial(function, item, stop)) for item in items]:
            yield future.result()
    except KeyboardInterrupt:
        patient = False  # a function may wait for a network, and a person does not
        raise
    finally:
        stop.set()
        crew.end(wait=patient, cancel=True)


def hash_file(path: Path, stop: threading.Event | None = None) -> str:
    """sha256 of a file, read in pieces; of no use where `stop` was set meanwhile. Raises OSError."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as stream:
        while not (stop is not None and stop.is_set()) and (piece := stream.read(1 << 20)):
            digest.update(piece)
    return digest.hexdigest()
