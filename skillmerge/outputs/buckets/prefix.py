"""An output in the making under a bucket's prefix: whose it is, what is finished, and what makes it an output.

    PREFIX/.skillmerge/plan.json           the plan and conditions, created once: whose the prefix is
    PREFIX/.skillmerge/done/<shard>.json   the record of a shard that is there
    PREFIX/<shard>, and other files        at their final names
    PREFIX/skillmerge.manifest.json        created last and once: from then on it is an output

Nothing is renamed and nothing is replaced. Two runs of a plan send the same bytes, so it does no harm that both do.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import closing, suppress
from pathlib import Path

from skillmerge.checkpoints.place import Bucket
from skillmerge.checkpoints.stores.object_client import cloud, connect, tried
from skillmerge.checkpoints.stores.objects import RECORDS, Objects, stat_of
from skillmerge.checkpoints.stores.retries import Passing, stopped
from skillmerge.engine.destination import ShardRecord
from skillmerge.errors import CheckFailed, StalePlan, TemporaryError, UsageError, some
from skillmerge.outputs.journal import Header
from skillmerge.outputs.staging import MANIFEST_FILE
from skillmerge.threads import in_threads

CLAIM = f"{RECORDS}plan.json"
DONE = f"{RECORDS}done/"

_PART = 16 << 20
"""Bytes of one part of an upload at least; there are 10,000 at most."""
_PARTS_AT_ONCE = 4
_WHOLE = 2 * _PART
"""Files up to this many bytes are sent in one request, which can be told to create and never to replace."""
_PIECE = 1 << 20
_COMPARED = 32 << 20
"""Bytes that are read of an object at the same time."""


class Prefix:
    """What an output in a bucket is made of, as objects.

    Every method may raise InputError (not allowed), TemporaryError, and StalePlan.
    """

    def __init__(self, place: Bucket) -> None:
        self.place = place
        self._client = connect(place)

    def listed(self) -> dict[str, int]:
        """Return the size of every object under the prefix, by name."""
        import obstore

        def attempt() -> dict[str, int]:
            return {
                str(row["path"]): row["size"] for batch in obstore.list(self._client) for row in batch if row["path"]
            }

        return tried(self.place, attempt)

    def read(self, name: str) -> bytes | None:
        """Return a small object, or None if there is none."""
        import obstore

        with suppress(FileNotFoundError):
            return tried(self.place, lambda: bytes(obstore.get(self._client, name).bytes()))
        return None

    def create(self, name: str, content: bytes) -> bool:
        """Create a small object. Returns False if there is one already, whatever it holds."""
        import obstore

        try:
            tried(self.place, lambda: obstore.put(self._client, name, content, mode="create"))
        except FileExistsError:
            return False
        return True

    def keep(self, name: str, content: bytes) -> None:
        """Create a small object, unless it is there. Raises CheckFailed if another one is."""
        if not self.create(name, content) and self.read(name) != content:
            raise self._another(name)

    def owner(self) -> Header | None:
        """Return the plan and conditions of those who work under the prefix, or None if nobody does."""
        with suppress(ValueError, TypeError, KeyError, AttributeError):
            return Header.from_json(json.loads(self.read(CLAIM) or b""))
        return None

    def is_output(self) -> bool:
        return self._size(MANIFEST_FILE) is not None

    def claim(self, header: Header, files: set[str]) -> None:
        """Make the prefix this plan's own. files: that it may hold. Raises UsageError if it is another's."""
        text = (json.dumps(header.to_json()) + "\n").encode()
        names = self.listed().keys()
        claimed, owner = CLAIM in names, self.owner() if CLAIM in names else None
        strangers = [name for name in names if not name.startswith(RECORDS) and (name not in files or not claimed)]
        if strangers:
            raise UsageError(
                f"{self.place} is not empty: it holds {some(sorted(strangers), 4)}",
                fix="choose another prefix with `--output`; an output in a bucket replaces nothing",
            )
        if not claimed and not self.create(CLAIM, text):
            claimed, owner = True, self.owner()
        if claimed and owner != header:
            raise UsageError(
                f"{self.place} holds an unfinished run of another plan, or with other options or inputs",
                fix="finish that run, or remove what is there; or choose another prefix with `--output`",
            )

    def records(self, header: Header, wanted: Collection[str] | None = None) -> dict[str, ShardRecord]:
        """Return the records of shards that are there in the size that was recorded. wanted: of which shards, if not of
        all."""
        sizes = self.listed()

        def read(name: str, stop: threading.Event) -> ShardRecord | None:
            with suppress(ValueError, TypeError, KeyError, AttributeError):
                row = json.loads(self.read(name) or b"")
                return ShardRecord.from_json(row) if row.pop("of") == header.plan else None
            return None

        names = [name for name in sizes if name.startswith(DONE)]
        if wanted is not None:
            names = [name for name in names if name.removeprefix(DONE).removesuffix(".json") in wanted]
        found = in_threads(read, names)
        return {done.file: done for done in found if done is not None and sizes.get(done.file) == done.size}

    def record(self, header: Header, done: ShardRecord) -> None:
        """Record a shard that is there."""
        import obstore

        row = {**done.to_json(), "uploaded": True, "of": header.plan}
        text = (json.dumps(row) + "\n").encode()
        tried(self.place, lambda: obstore.put(self._client, f"{DONE}{done.file}.json", text))

    def send(self, path: Path, done: ShardRecord, wanted: Callable[[], bool]) -> None:
        """Send a shard, unless it is there: with parts in a large one, of which nobody sees any before all are there.

        wanted: whether to go on. Raises CheckFailed if other bytes are there.
        """
        import obstore

        if self._size(done.file) is not None:
            return self.compare(done)

        def pieces() -> Iterator[bytes]:
            with open(path, "rb") as stream:
                while piece := stream.read(_PIECE):
                    if not wanted():
                        raise stopped(str(self.place), cloud(self.place))  # which has the parts that were sent dropped
                    yield piece

        def attempt() -> None:
            if done.size <= _WHOLE:
                obstore.put(self._client, done.file, path.read_bytes(), mode="create")
            else:
                part = max(_PART, -(-done.size // 9_000))
                obstore.put(
                    self._client, done.file, pieces(), use_multipart=True, chunk_size=part,
                    max_concurrency=_PARTS_AT_ONCE,
                )  # fmt: skip
            if self._size(done.file) != done.size:
                raise Passing(f"{done.file} did not arrive whole")

        try:
            tried(self.place, attempt)
        except FileExistsError:
            self.compare(done)

    def _size(self, name: str) -> int | None:
        import obstore

        with suppress(FileNotFoundError):
            return tried(self.place, lambda: int(obstore.head(self._client, name)["size"]))
        return None

    def compare(self, done: ShardRecord) -> None:
        """Raise CheckFailed if an object is not the shard: another run may have sent it and not recorded it.
        TemporaryError if it is sent again meanwhile, which gives it another ETag in some stores."""
        import obstore

        digest = hashlib.sha256()
        try:
            stat = stat_of(tried(self.place, lambda: obstore.head(self._client, done.file)))
            if stat.size == done.size:
                # In ranges: one request would have to bring all of it before it times out.
                with closing(Objects(self.place, known={done.file: stat})) as store:
                    for start in range(0, stat.size, _COMPARED):
                        digest.update(store.peek(done.file, start, _COMPARED))
                if digest.hexdigest() == done.sha256:
                    return
        except FileNotFoundError:
            pass
        except StalePlan as error:
            raise TemporaryError(
                f"{self.place}/{done.file} changed while it was compared: another run may have sent it again",
                fix="run the same command again",
            ) from error
        raise self._another(done.file)

    def _another(self, name: str) -> CheckFailed:
        return CheckFailed(
            f"{self.place}/{name} is there with other content than this run made",
            fix="remove what is there, or choose another prefix with `--output`",
        )

    def drop_records(self) -> None:
        """Remove the records of a finished output, as far as that is allowed: nothing depends on it."""
        import obstore

        with suppress(Exception):
            names = [name for name in self.listed() if name.startswith(RECORDS)]
            # The claim goes last: until then the rest is known to be this output's.
            for name in sorted(names, key=lambda name: name == CLAIM):
                obstore.delete(self._client, name)
