"""Tests of a disk and its machine in a folder, for `doctor`: what works, and what that means for a run."""

from __future__ import annotations

import errno
import fcntl
import locale
import mmap
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skillmerge.durable import remove_tree
from skillmerge.errors import SkillmergeError
from skillmerge.outputs.shard_file import ShardFile, WriteMode
from skillmerge.outputs.staging import exchange
from skillmerge.plans.budget import free_disk
from skillmerge.tensors import PAGE, format_bytes

_FEW_INODES = 1000


@dataclass(frozen=True, slots=True)
class Trial:
    """One test. works: None if the system does not say. follows: what that means for a run."""

    what: str
    works: bool | None
    follows: str

    def as_dict(self) -> dict[str, Any]:
        return {"what": self.what, "works": self.works, "follows": self.follows}


def tried(folder: Path) -> list[Trial]:
    """Test in `folder`, which must exist, what a run does there. Leaves nothing behind."""
    found: list[Trial] = []
    try:
        with _scratch(folder) as scratch:
            found.append(Trial("write", True, "outputs can be written here"))
            found += [_try(scratch, *each) for each in _TRIALS]
    except OSError as error:
        found.append(Trial("write", False, f"outputs must go elsewhere: {error.strerror}"))
    return [*found, *_room(folder), _temporary(), _locale()]


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix=".skillmerge-doctor-", dir=folder))
    try:
        yield path
    finally:
        with suppress(OSError):
            remove_tree(path)


def _try(folder: Path, what: str, function: Callable[[Path], bool], good: str, bad: str) -> Trial:
    inside = folder / what.replace(" ", "-").replace("/", "-")
    try:
        inside.mkdir()
        works = function(inside)
    except (OSError, AttributeError) as error:  # not every system has every call
        why = error.strerror if isinstance(error, OSError) else "this system has no such call"
        return Trial(what, False, f"{bad} ({why})")
    except SkillmergeError as error:
        return Trial(what, False, f"{bad} ({error.message})")
    return Trial(what, works, good if works else bad)


def _locks(folder: Path) -> bool:
    """Return whether a lock that is held keeps another one out."""
    with ExitStack() as stack:
        first, second = (stack.enter_context(open(folder / "lock", "ab")) for _ in range(2))
        fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return True
            raise
    return False


def _syncs_files(folder: Path) -> bool:
    with open(folder / "file", "wb") as stream:
        stream.write(b"x")
        stream.flush()
        os.fsync(stream.fileno())
    return True


def _syncs_folders(folder: Path) -> bool:
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return True


def _renames(folder: Path) -> bool:
    (folder / "one").mkdir()
    (folder / "one").rename(folder / "two")
    return (folder / "two").is_dir()


def _exchanges(folder: Path) -> bool:
    for name in ("one", "two"):
        (folder / name).mkdir()
    return exchange(folder / "one", folder / "two")


def _keeps_inodes(folder: Path) -> bool:
    path = folder / "file"
    path.touch()
    return path.stat().st_ino == path.stat().st_ino


def _maps(folder: Path) -> bool:
    path = folder / "file"
    path.write_bytes(bytes(PAGE))
    with open(path, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as pages:
        return pages[0] == 0


def _writes_directly(folder: Path) -> bool:
    with mmap.mmap(-1, PAGE) as page:
        descriptor = os.open(folder / "direct", os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
        try:
            return os.pwrite(descriptor, page, 0) == PAGE
        finally:
            os.close(descriptor)


def _allocates(folder: Path) -> bool:
    with open(folder / "file", "wb") as stream:
        os.ftruncate(stream.fileno(), PAGE)
        return os.fstat(stream.fileno()).st_size == PAGE


def _makes_shards(folder: Path) -> bool:
    """Write a shard as a run does, and return whether that works."""
    shard = ShardFile(folder / "shard", PAGE, b"head", WriteMode())
    try:
        shard.write(memoryview(bytes(PAGE - 4)), 4)
        shard.finish()
    finally:
        shard.close()
    return (folder / "shard").stat().st_size == PAGE


_TRIALS: tuple[tuple[str, Callable[[Path], bool], str, str], ...] = (
    ("lock", _locks, "a second run on the same output exits 6",
     "a second run on the same output stops the first, which exits 6; run one at a time"),
    ("sync files", _syncs_files, "finished shards survive a power failure",
     "after a power failure, finished shards may be recomputed"),
    ("sync folders", _syncs_folders, "a finished output survives a power failure",
     "after a power failure, rerun the same command"),
    ("rename", _renames, "outputs appear in one step", "outputs must go elsewhere"),
    ("exchange names", _exchanges, "--overwrite replaces in one step", "--overwrite replaces in two steps"),
    ("stable inodes", _keeps_inodes, "not needed", "not needed: files are compared by size and time"),
    ("map files", _maps, "transformers and vLLM can load from here",
     "verify works; for --load, copy the output to another disk"),
    ("direct I/O", _writes_directly, "shards are written the faster way",
     "shards are written through the page cache"),
    ("preallocate", _allocates, "shards are allocated in full at the start", "shards grow as they are written"),
    ("write a shard", _makes_shards, "outputs can be written here", "outputs must go elsewhere"),
)  # fmt: skip


def _room(folder: Path) -> Iterator[Trial]:
    free = free_disk(folder)
    if free is None:
        yield Trial("free space", None, "unknown for this disk, which may fill up during a run")
    else:
        yield Trial("free space", free > 0, f"{format_bytes(free)} free")
    with suppress(OSError):
        status = os.statvfs(folder)
        if status.f_files:  # some filesystems have no fixed number
            enough = status.f_favail > _FEW_INODES
            yield Trial("free inodes", enough, f"{status.f_favail} more files" + ("" if enough else ": remove some"))


def _temporary() -> Trial:
    try:
        with tempfile.TemporaryFile() as stream:
            stream.write(b"x")
        return Trial("temporary folder", True, tempfile.gettempdir())
    except OSError as error:
        return Trial("temporary folder", False, f"set TMPDIR: sign and some sweeps need one ({error.strerror})")


def _locale() -> Trial:
    encoding = sys.getfilesystemencoding()
    try:
        os.fsencode("rl-模型")
        return Trial("any file name", True, f"{encoding} can name every file")
    except UnicodeEncodeError:
        name = locale.setlocale(locale.LC_CTYPE)
        return Trial(
            "any file name", False, f"set LC_ALL=C.UTF-8: the locale {name} ({encoding}) cannot name all files"
        )
