"""Files that survive a crash: whole writes, synced files and folders, and what a full, odd or broken disk means."""

from __future__ import annotations

import errno
import hashlib
import os
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import IO

from skillmerge.errors import ResourceError, UsageError

CONTINUE = "free disk space, then run the same command again: it continues where it stopped"
_WRONG_PLACE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.EBUSY,
    errno.ENAMETOOLONG, errno.ELOOP, errno.ENOENT, errno.EXDEV,
)  # fmt: skip
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOTTY)
"""Error numbers of filesystems without a feature (NFS, CIFS, Lustre and FUSE differ)."""

_NO_FOLDER_SYNC = (*UNSUPPORTED, errno.EBADF, errno.EACCES, errno.EPERM, errno.EISDIR)


@contextmanager
def disk_errors(path: Path, elsewhere: str = "choose another folder") -> Iterator[None]:
    """Turn the operating system's write errors into errors with advice.

    elsewhere: how to choose another place in this command. Raises UsageError if the place is wrong,
    ResourceError where the disk is full or fails.
    """
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ResourceError(f"the disk is full: {path} could not be written", fix=CONTINUE) from error
        if error.errno == errno.EDQUOT:
            raise ResourceError(f"the disk quota is used up: {path} could not be written", fix=CONTINUE) from error
        if error.errno == errno.EFBIG:
            raise ResourceError(
                f"{path} could not be written: no file may be that large here",
                fix="write smaller files with `output.shard_size`, or choose another folder for the output",
            ) from error
        if error.errno in _WRONG_PLACE:
            raise UsageError(f"{path} cannot be written: {error.strerror}", fix=elsewhere) from error
        doctor = f"skillmerge doctor {shlex.quote(str(path.parent))}"
        raise ResourceError(
            f"{path} could not be written: {error.strerror}",
            fix=f"check the disk with `{doctor}`, then run the same command again",
        ) from error


def is_taken(path: Path) -> bool:
    """Return whether anything but an empty folder has that name."""
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
        sync_file(stream.fileno())
    beside.replace(path)
    sync_folder(path.parent)


def sync_file(descriptor: int) -> None:
    """Make a file durable, where its filesystem knows how. Raises OSError if that fails."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def sync_folder(folder: Path) -> bool:
    """Make a folder's names durable. False where the filesystem cannot. Raises OSError if that fails."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
        return False
    return True


def rename_folder(folder: Path, target: Path) -> None:
    """Give a folder a name that nothing has, or an empty folder. Raises OSError."""
    if os.path.lexists(target):
        with suppress(OSError):  # not every filesystem renames over an empty folder
            target.rmdir()
    folder.rename(target)


def remove_tree(folder: Path) -> None:
    """Remove a folder with all in it, where it exists. Raises OSError.

    `shutil.rmtree` compares inode numbers, and gives up where those change at every look (some FUSE filesystems).
    """
    for parent, folders, files in os.walk(folder, topdown=False):
        for name in files:
            os.unlink(os.path.join(parent, name))
        for name in folders:
            path = os.path.join(parent, name)
            (os.unlink if os.path.islink(path) else os.rmdir)(path)
    if os.path.lexists(folder):
        os.rmdir(folder)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield a temporary folder, which is removed at the end. Raises ResourceError if there is no place for one."""
    try:
        name = tempfile.mkdtemp(prefix="skillmerge-")
    except OSError as error:
        raise _no_temporary(error) from error
    try:
        yield Path(name)
    finally:
        with suppress(OSError):
            remove_tree(Path(name))


def scratch_file() -> IO[bytes]:
    """Return a temporary file without a name; in memory where no folder takes it. Raises ResourceError."""
    try:
        return tempfile.TemporaryFile()
    except OSError as error:
        if not hasattr(os, "memfd_create"):
            raise _no_temporary(error) from error
        return open(os.memfd_create("skillmerge"), "w+b")


def _no_temporary(error: OSError) -> ResourceError:
    return ResourceError(
        f"no temporary file can be made: {error.strerror}", fix="set TMPDIR to a folder that can be written to"
    )


def digest_or_none(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None
