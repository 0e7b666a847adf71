"""Files that survive a crash: whole writes, fsynced folders, locks, and what a full or broken disk means."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from skillmerge.errors import OutputLocked, ResourceError, UsageError

CONTINUE = "make room, then run the same command again: it continues where it stopped"
_WRONG_PLACE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.EBUSY,
    errno.ENAMETOOLONG, errno.ELOOP, errno.ENOENT,
)  # fmt: skip


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write into errors that say what to do.

    Raises UsageError where the place is wrong, ResourceError where the disk is full or fails.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(f"the disk is full: {path} could not be written", fix=CONTINUE) from error
        if error.errno in _WRONG_PLACE:
            raise UsageError(f"{path} cannot be written: {error.strerror}", fix="choose another place") from error
        raise ResourceError(
            f"{path} could not be written: {error.strerror}",
            fix="check the disk, then run the same command again",
        ) from error


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which is called `target` when all is done and does not exist otherwise.

    For outputs that are small beside a merge: nothing is kept of a failed try, and what a killed one left is
    removed by the next. Raises UsageError where there is something at `target` already; OutputLocked where
    another run fills it; ResourceError.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target} exists already", fix="choose another --output, or remove it yourself")
    folder = target.with_name(f".{target.name}.writing")
    with disk_errors(target):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _lock(descriptor, folder, target)
            try:
                for path in folder.iterdir():
                    path.unlink()
                yield folder
                for path in folder.iterdir():
                    with open(path, "rb") as stream:
                        os.fsync(stream.fileno())
                sync_folder(folder)
                folder.rename(target)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            sync_folder(target.parent)
        finally:
            os.close(descriptor)


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold a folder for this run alone. Raises OutputLocked where another run does."""
    with disk_errors(folder):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _lock(descriptor, folder, folder)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path, target: Path) -> None:
    """Hold a folder for this run alone, as long as the descriptor is open. Raises OutputLocked."""
    taken = OutputLocked(f"another run is writing {target}", fix="wait for it, or choose another --output")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mine, there = os.fstat(descriptor), folder.stat()
    except (BlockingIOError, FileNotFoundError) as error:
        raise taken from error
    if (mine.st_dev, mine.st_ino) != (there.st_dev, there.st_ino):  # renamed since it was opened
        raise taken


def is_taken(path: Path) -> bool:
    """Whether anything but an empty folder has that name."""
    return os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir()))


def write_all(stream: FileIO, content: bytes | memoryview) -> None:
    """Write all of it to an unbuffered file: one call of the system may take less."""
    left = memoryview(content)
    while left:
        left = left[stream.write(left) :]


def write_whole(path: Path, content: bytes, beside: Path | None = None) -> None:
    """Replace a file in one step, durably. beside: what it is called until then; by default nobody else's name."""
    beside = beside or path.with_name(f".{path.name}.{os.getpid()}.new")
    with open(beside, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    beside.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest_or_none(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None
