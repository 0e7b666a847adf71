"""The files of a checkpoint in an object store: what lies in a bucket below a prefix, read where it lies.

One listing names every object with its size and ETag; every range that is read asks for the object with that ETag, so
that one that changes is noticed at once. Weights are read in several pieces side by side, and all stores of a process
share one budget of bytes in flight. Nothing is stored.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from skillmerge.checkpoints.place import Bucket
from skillmerge.checkpoints.store import Stat, Wait, Where, all_of, license_in, nothing_to_wait_for
from skillmerge.checkpoints.stores.object_client import IN_FLIGHT, cloud, connect, tried
from skillmerge.checkpoints.stores.retries import Passing, stopped
from skillmerge.durable import disk_errors
from skillmerge.errors import InputError, StalePlan
from skillmerge.threads import in_threads

RECORDS = ".skillmerge/"
"""Where an output in the making keeps its records, which are no part of it."""

_PIECE = 8 << 20
"""Bytes of one request at most; the services suggest 8 to 16 MiB."""
_CHUNK = 1 << 20
_SAVED = 4 * _PIECE
_CARD = 1 << 16
_MOST_OBJECTS = 100_000


class _Flight:
    """A budget of bytes that are asked for and have not arrived."""

    def __init__(self, nbytes: int) -> None:
        self._free = nbytes
        self._changed = threading.Condition()

    @contextmanager
    def of(self, nbytes: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._free >= nbytes)
            self._free -= nbytes
        try:
            yield
        finally:
            with self._changed:
                self._free += nbytes
                self._changed.notify_all()


_FLIGHT = _Flight(IN_FLIGHT)
"""The process's own: several models are read at once, over one network."""


class _Read:
    """A piece that is being read, until it is there or nobody wants it any more."""

    def __init__(self, into: memoryview) -> None:
        self.done, self.size = 0, len(into)
        self.ended: Future[None] = Future()
        self._into: memoryview | None = into
        self._lock = threading.Lock()

    def put(self, data: Any) -> None:
        view = memoryview(data)
        with self._lock:
            if self._into is None:
                raise Passing("stopped")
            if len(view) > self.size - self.done:
                raise Passing("more came than was requested")
            self._into[self.done : self.done + len(view)] = view
            self.done += len(view)

    def end(self, error: BaseException | None = None) -> None:
        """Wake who waits, and let go of the memory, which may be gone soon. What happens later does not count."""
        with self._lock:
            if not self.ended.done():
                self._into = None
                self.ended.set_result(None) if error is None else self.ended.set_exception(error)


class Objects:
    """A model in a bucket. See `Store` for what its methods promise."""

    def __init__(self, place: Bucket, *, known: Mapping[str, Stat] | None = None) -> None:
        """Find its files: a request for every thousand, or none where they are `known`."""
        self.place = place
        self.client = connect(place)
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(IN_FLIGHT // _PIECE)
        self._reading: set[_Read] = set()
        self._lock = threading.Lock()
        self.at = Where(str(place), remote=True)
        if known is not None:
            self._listed = {file: replace(stat, digest=None) for file, stat in known.items()}
            return
        self._listed = self._list()
        if not self._listed:
            raise InputError(
                f"{place} does not exist: no object's name begins so",
                fix="check the bucket's name and the prefix, under which a model has *.safetensors and config.json",
            )
        self.at = replace(self.at, license=self._license())

    def _list(self) -> dict[str, Stat]:
        import obstore

        def attempt() -> dict[str, Stat]:
            found: dict[str, Stat] = {}
            for batch in obstore.list(self.client, chunk_size=1000):
                for row in batch:
                    name = str(row["path"])
                    if name and not name.startswith(RECORDS):
                        found[name] = stat_of(row)
                if len(found) > _MOST_OBJECTS:
                    raise InputError(
                        f"{self.place} holds too many objects to be a model", fix="name the model's own prefix"
                    )
            return dict(sorted(found.items()))

        return tried(self.place, attempt, stop=self._stop)

    def _license(self) -> str | None:
        card = self._listed.get("README.md")
        if card is None or not card.size:
            return None
        return license_in(self.peek("README.md", 0, _CARD).decode("utf-8", "replace"))

    def list(self) -> Mapping[str, Stat]:
        return self._listed

    def read_small(self, file: str, limit: int) -> bytes:
        size = self._stat(file).size
        if size > limit:
            raise InputError(f"{self.at.path(file)}: is not a regular file of acceptable size")
        return self.peek(file, 0, size)

    def peek(self, file: str, start: int, count: int) -> bytes:
        content = bytearray(max(0, min(count, self._stat(file).size - start)))
        self.read(file, start, memoryview(content))()
        return bytes(content)

    def read(self, file: str, start: int, into: memoryview) -> Wait:
        self._stat(file)
        if not into:
            return nothing_to_wait_for
        count = -(-len(into) // _PIECE)
        size = -(-len(into) // count)
        return all_of([self._begin(file, start + at, into[at : at + size]) for at in range(0, len(into), size)])

    def _begin(self, file: str, start: int, into: memoryview) -> Wait:
        read = _Read(into)

        def work() -> None:
            try:
                self._fetch(file, start, read)
                read.end()
            except BaseException as error:
                read.end(error)

        def wait() -> None:
            try:
                read.ended.result()
            finally:
                with self._lock:
                    self._reading.discard(read)

        with self._lock:
            if self._stop.is_set():
                raise stopped(str(self.place), cloud(self.place))
            self._reading.add(read)
            self._pool.submit(work)
        return wait

    def _fetch(self, file: str, start: int, read: _Read) -> None:
        """Read a piece, going on behind what has arrived where a connection breaks. Raises InputError, StalePlan,
        TemporaryError."""
        import obstore

        stat = self._listed[file]
        etag = str(stat.version[1])

        def attempt() -> None:
            options: Any = {"range": (start + read.done, start + read.size), "if_match": f'"{etag}"' if etag else None}
            with _FLIGHT.of(read.size - read.done):
                answer = obstore.get(self.client, file, options=options)
                if answer.meta["size"] != stat.size or _etag(answer.meta) != etag:
                    raise self._changed(file)
                for chunk in answer.stream(min_chunk_size=_CHUNK):
                    read.put(chunk)
            if read.done < read.size:
                raise Passing(f"the connection ended {read.size - read.done} bytes early")

        try:
            tried(self.place, attempt, progress=lambda: read.done, stop=self._stop)
        except (FileNotFoundError, StalePlan):
            raise self._changed(file) from None

    def hint(self, file: str, start: int, nbytes: int) -> None:
        """What a network sends ahead would have to be kept somewhere."""

    def check_unchanged(self, files: Collection[str]) -> None:
        now = self._list()
        for file in files:
            if now.get(file) != self._listed[file]:
                raise self._changed(file)

    def cancel(self) -> None:
        with self._lock:
            self._stop.set()
            reading, self._reading = self._reading, set()
        for read in reading:  # a client that waits cannot be told: who waits for it can
            read.end(stopped(str(self.place), cloud(self.place)))

    def close(self) -> None:
        self.cancel()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _stat(self, file: str) -> Stat:
        if file not in self._listed:
            raise InputError(f"{self.at.path(file)}: is missing", fix="the checkpoint is incomplete: copy it again")
        return self._listed[file]

    def _changed(self, file: str) -> StalePlan:
        return StalePlan(
            f"{self.at.path(file)} changed while it was in use",
            fix="stop everything that writes to the inputs, then rerun",
        )


def stat_of(row: Any) -> Stat:
    """Return what a listing or a HEAD request says of an object."""
    return Stat(row["size"], (row["size"], _etag(row), row["version"] or ""))


def _etag(row: Any) -> str:
    """Return an object's ETag without quotes, which Azure's listings lack."""
    return str(row["e_tag"] or "").removeprefix("W/").strip('"')


@contextmanager
def fetched(place: Bucket) -> Iterator[Path]:
    """Yield a temporary folder with all files of a place. Raises ResourceError too."""
    with tempfile.TemporaryDirectory(prefix="skillmerge-") as folder, closing(Objects(place)) as store:
        save(store, store.list(), Path(folder))
        yield Path(folder)


def save(store: Objects, files: Collection[str], folder: Path) -> None:
    """Write files of a store into a folder."""

    def one(file: str, stop: threading.Event) -> None:
        path, size = folder / file, store.list()[file].size
        if any(part in ("", ".", "..") for part in file.split("/")):
            raise InputError(f"{store.at.path(file)}: is not a name that a file can have")
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as stream:
                for start in range(0, size, _SAVED):
                    if stop.is_set():
                        return
                    stream.write(store.peek(file, start, _SAVED))

    for _ in in_threads(one, files):
        pass
