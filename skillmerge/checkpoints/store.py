"""The bytes of a checkpoint: a folder, a repository, memory. Knows files, nothing about tensors.

`Store` is all that a new kind of storage has to be; what can be made of its methods is made here, once for all.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from skillmerge.checkpoints.foreign import disguised
from skillmerge.checkpoints.safetensors import Header, fetch_header, header_of, refuse_bulk, unique_keys
from skillmerge.errors import InputError

MAX_JSON_BYTES = 32_000_000
"""Room for an index of 300,000 tensors."""

_MAX_JSON_NESTING = 50
_HEADERS_AT_ONCE = 16

Wait = Callable[[], None]
"""Call it to wait for a read that has begun. May raise InputError, StalePlan, TemporaryError."""


@dataclass(frozen=True, slots=True)
class Where:
    """Which place a store is.

    place: what to call it in messages. root: the local folder, or None. revision: the commit, or None if there
    are no versions. license: what the model card says it is. remote: whether reading goes over a network.
    doubt: why this may be another place than was named, or "".
    """

    place: str
    root: Path | None = None
    revision: str | None = None
    license: str | None = None
    remote: bool = False
    doubt: str = ""

    def path(self, file: str) -> str:
        """Return what to call one file in messages."""
        return str(self.root / file) if self.root is not None else f"{self.place}/{file}"


@dataclass(frozen=True, slots=True)
class Stat:
    """Facts about a file that has not been read.

    version: what tells it from another version of it. digest: `sha256` or `git_sha1` and hex digits, as the store
    states them, or None if it has to be read.
    """

    size: int
    version: tuple[int | str, ...]
    digest: tuple[str, str] | None = None


class Store(Protocol):
    """The files of one checkpoint, by name; a name has `/` in it where the file lies in a subfolder.

    A file is the one that it was when it was first looked at, listing included: what has changed since then is
    StalePlan, not other bytes. What is not there, leads out of the place or is no plain file raises InputError from
    whatever reads it. All methods may be called from any thread.
    """

    @property
    def at(self) -> Where: ...

    def list(self) -> Mapping[str, Stat]:
        """Return every file, sorted by name. Raises InputError if there is no such place."""

    def read_small(self, file: str, limit: int) -> bytes:
        """Return a file, whole, and compared with its digest where one is stated. Raises InputError if larger than
        `limit`."""

    def peek(self, file: str, start: int, count: int) -> bytes:
        """Return a few bytes of a weight file, fewer only at its end or that of its header: nothing is kept open or
        fetched for more of them."""

    def read(self, file: str, start: int, into: memoryview) -> Wait:
        """Begin to fill `into` with a weight file's bytes from `start` on. May raise what the Wait may."""

    def hint(self, file: str, start: int, nbytes: int) -> None:
        """Bytes of a weight file that will be read soon. Where a store has no use for that it does nothing."""

    def check_unchanged(self, files: Collection[str]) -> None:
        """Raise StalePlan if a file is no longer the one that was first looked at."""

    def cancel(self) -> None:
        """Give up waiting: what is being read is no longer wanted, and reads that wait for a network fail soon."""

    def close(self) -> None:
        """Cancel, and give back what is held. May be called again."""


def nothing_to_wait_for() -> None:
    """The Wait of a read that is done."""


def all_of(waits: Sequence[Wait]) -> Wait:
    """Return one Wait for several."""
    pending = [wait for wait in waits if wait is not nothing_to_wait_for]
    if not pending:
        return nothing_to_wait_for

    def wait_for_all() -> None:
        for wait in pending:
            wait()

    return wait_for_all


def read_headers(store: Store, files: Sequence[str], sizes: Mapping[str, int]) -> dict[str, Header]:
    """Return the headers of weight files, checked; `sizes` is how many bytes each is likely to have at most.

    Raises InputError if one is missing, unsafe or damaged; StalePlan, TemporaryError.
    """
    listed = store.list()
    for file in files:
        if file not in listed:
            store.peek(file, 0, 8)  # which says what is wrong with it
            raise InputError(f"{store.at.path(file)}: is missing", fix="the checkpoint is incomplete: fetch it again")

    def one(file: str) -> Header:
        path, size = store.at.path(file), listed[file].size
        head = store.peek(file, 0, sizes[file])

        def read(start: int, count: int) -> bytes:
            nonlocal head
            if start + count > len(head):
                head += store.peek(file, len(head), start + count - len(head))
            return head[start : start + count]

        return header_of(fetch_header(read, size, path), size, path, file)

    with ThreadPoolExecutor(max(1, min(_HEADERS_AT_ONCE, len(files)))) as pool:
        return dict(zip(files, pool.map(one, files), strict=True))


def read_json_object(store: Store, file: str, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Return a JSON object from a file of a checkpoint, read strictly. Raises InputError."""
    content, path = store.read_small(file, limit), store.at.path(file)
    if (known := disguised(content[:32])) is not None:
        raise InputError(f"{path}: {known[0]}", fix=known[1])
    try:
        refuse_bulk(content, limit)
        document = json.loads(content.decode("utf-8"), object_pairs_hook=unique_keys)
    except RecursionError as error:
        raise InputError(f"{path}: is nested too deeply") from error
    except ValueError as error:
        raise InputError(f"{path}: is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise InputError(f"{path}: is not a JSON object")
    if _nests_deeper(document, _MAX_JSON_NESTING):
        raise InputError(f"{path}: is nested too deeply")
    return document


def digest_of(kind: str, content: bytes | bytearray) -> tuple[str, str]:
    """Return the digest of a file's content. git_sha1 is the name that git gives to a file with that content."""
    if kind == "git_sha1":
        return kind, hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    return kind, hashlib.sha256(content).hexdigest()


def license_in(card: str) -> str | None:
    """Return the license from the metadata of a model card, or of its beginning."""
    metadata = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
    found = re.search(r"^license: *['\"]?([\w.-]+)", metadata[1], re.MULTILINE) if metadata else None
    return found[1] if found else None


def _nests_deeper(document: Any, limit: int) -> bool:
    level = [document]
    for _ in range(limit):
        level = [
            inner
            for item in level
            if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
    return bool(level)
