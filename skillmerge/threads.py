"""Map a function over items in a few threads, which stop together when one fails; and hash files."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")
Found = TypeVar("Found")


def cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def in_threads(
    function: Callable[[Item, threading.Event], Found],
    items: Iterable[Item],
    begin: Callable[[], object] | None = None,
) -> Iterator[Found]:
    """`function(item, stop)` for every item, in order. A long function looks at `stop` now and then.

    begin: called first in every thread; `bits.settle_thread` where the function computes.
    """
    stop = threading.Event()
    pool = ThreadPoolExecutor(min(4, cores()), initializer=begin)
    patient = True
    try:
        yield from pool.map(lambda item: function(item, stop), items)
    except KeyboardInterrupt:
        patient = False  # a function may wait for a network, and a person does not
        raise
    finally:
        stop.set()
        pool.shutdown(wait=patient, cancel_futures=True)


def hash_file(path: Path, stop: threading.Event | None = None) -> str:
    """sha256 of a file, read in pieces; of no use where `stop` was set meanwhile. Raises OSError."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as stream:
        while not (stop is not None and stop.is_set()) and (piece := stream.read(1 << 20)):
            digest.update(piece)
    return digest.hexdigest()
