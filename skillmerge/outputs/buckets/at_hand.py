"""A finished output in a bucket as a folder: whole, or as far as its structure goes, with weights that stay there.

In a stand-in, every weight file has its header, its size, and no content: what reads only structure takes it for the
output. What reads weights is given another way to open them.
"""

from __future__ import annotations

import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Protocol

from skillmerge.checkpoints.place import Bucket
from skillmerge.checkpoints.safetensors import MAX_HEADER_BYTES
from skillmerge.checkpoints.schemes import bucket_of, is_path
from skillmerge.checkpoints.store import Wait
from skillmerge.checkpoints.stores.objects import Objects, save
from skillmerge.durable import disk_errors
from skillmerge.errors import SkillmergeError, UsageError
from skillmerge.plans.budget import check_disk
from skillmerge.reporter import Reporter
from skillmerge.tensors import format_bytes

PIECE = 8 << 20
"""How much of a file is read at once."""
_AHEAD = 4
_MOST_WHOLE = 64 << 20
"""Files up to this many bytes are whole in a stand-in too, if they are no weights."""


class Content(Protocol):
    """A file that is read from its beginning to its end."""

    def readinto(self, buffer: memoryview, /) -> int | None: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class AtHand:
    """A folder, how to open a file of it to read all of it, and what to call it, if that is not the folder's name."""

    folder: Path
    open: Callable[[Path], Content]
    place: str = ""


def plainly(path: Path) -> Content:
    return FileIO(path)


@contextmanager
def at_hand(folder: str | os.PathLike[str], *, whole: bool, reporter: Reporter) -> Iterator[AtHand]:
    """Yield an output as a folder: the given one, or a temporary one with the files of a bucket.

    whole: with all content, which is said. Raises InputError, StalePlan, TemporaryError, ResourceError.
    """
    bucket = bucket_of(folder)
    if bucket is None:
        refuse_hub(folder)
        yield AtHand(Path(folder), plainly)
        return
    with closing(Objects(bucket)) as store, tempfile.TemporaryDirectory(prefix="skillmerge-") as temporary:
        root = Path(temporary, bucket.prefix.rpartition("/")[2] or bucket.bucket)
        root.mkdir()
        with _named(root, bucket):
            yield AtHand(root, _fetch(store, root, reporter) if whole else _stand_in(store, root), str(bucket))


def refuse_hub(folder: str | os.PathLike[str]) -> None:
    """Raise UsageError for a place on the Hub, where an output is wanted on this disk."""
    if not is_path(os.fspath(folder)):
        repository = os.fspath(folder).partition("://")[2].split("@")[0]
        fix = f"fetch it first: `hf download {repository} --local-dir FOLDER`"
        raise UsageError(f"{os.fspath(folder)} is on the Hub, not a folder", fix=fix)


def _fetch(store: Objects, root: Path, reporter: Reporter) -> Callable[[Path], Content]:
    size = sum(stat.size for stat in store.list().values())
    check_disk(root, size, f"a copy of {store.place}")
    reporter.note(f"fetching {store.place} ({format_bytes(size)}) into a temporary folder, which this needs")
    save(store, store.list(), root)
    return plainly


def _stand_in(store: Objects, root: Path) -> Callable[[Path], Content]:
    files = store.list()
    hollow = {
        name for name, stat in files.items() if name.endswith(".safetensors") or stat.size > _MOST_WHOLE
    }  # fmt: skip
    save(store, [name for name in files if name not in hollow], root)
    for name in hollow:
        path = root / name
        head = store.peek(name, 0, 8)
        length = int.from_bytes(head, "little") if name.endswith(".safetensors") else 0
        head += store.peek(name, 8, length) if length <= MAX_HEADER_BYTES else b""
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as stream:
                stream.write(head)
                stream.truncate(files[name].size)

    def opened(path: Path) -> Content:
        name = path.relative_to(root).as_posix()
        return _Remote(store, name) if name in hollow else plainly(path)

    return opened


class _Remote:
    """A file of a store, read from its beginning on, some pieces ahead."""

    def __init__(self, store: Objects, name: str) -> None:
        self._store, self._name, self._asked = store, name, 0
        self._size = store.list()[name].size
        self._ahead: deque[tuple[memoryview, Wait]] = deque()
        self._piece = memoryview(b"")

    def readinto(self, buffer: memoryview) -> int:
        while len(self._ahead) < _AHEAD and self._asked < self._size:
            piece = memoryview(bytearray(min(PIECE, self._size - self._asked)))
            self._ahead.append((piece, self._store.read(self._name, self._asked, piece)))
            self._asked += len(piece)
        if not self._piece and self._ahead:
            self._piece, wait = self._ahead.popleft()
            wait()
        count = min(len(buffer), len(self._piece))
        buffer[:count], self._piece = self._piece[:count], self._piece[count:]
        return count

    def close(self) -> None:
        """What is still under way ends with the store."""


@contextmanager
def _named(root: Path, bucket: Bucket) -> Iterator[None]:
    """Name the bucket in errors about the temporary folder."""
    try:
        yield
    except SkillmergeError as error:
        error.message = error.message.replace(str(root), str(bucket))
        error.fix = error.fix.replace(str(root), str(bucket)) if error.fix else error.fix
        raise
