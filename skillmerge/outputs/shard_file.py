"""A shard's file while it is written: buffered or direct I/O, bytes at their final offsets from any thread."""

from __future__ import annotations

import errno
import os
import threading
import time
from contextlib import ExitStack, suppress
from io import FileIO
from pathlib import Path

from skillmerge.durable import UNSUPPORTED, disk_errors, sync_file, write_all
from skillmerge.errors import OutputLocked
from skillmerge.tensors import PAGE
from skillmerge.threads import hash_file

TRIAL_BYTES = 32 << 20
"""Bytes written in one mode before the other is tried."""


class WriteMode:
    """Buffered or direct I/O, whichever is faster for this run on this storage.

    Direct I/O saves the copy into the page cache and its eviction, but some storage is slower with it. The first
    spans alternate between the modes, and the throughput of the whole pipeline decides. No byte depends on it.
    """

    def __init__(self) -> None:
        self.direct = False
        self._turns = [True]
        self._seconds = {False: 0.0, True: 0.0}
        self._written = 0
        self._since = time.monotonic()
        self._lock = threading.Lock()
        self._open = True

    def note(self, nbytes: int) -> None:
        """Count written bytes. After each turn, switch modes; after the last, choose the faster."""
        if not self._open:
            return
        with self._lock:
            self._written += nbytes
            if self._written < TRIAL_BYTES or not self._open:
                return
            now = time.monotonic()
            self._seconds[self.direct] += now - self._since
            self._written, self._since = 0, now
            if self._turns:
                self.direct = self._turns.pop(0)
            else:
                self.direct = self._seconds[True] < self._seconds[False]
                self._open = False

    def refuse_direct(self) -> None:
        """Switch to buffered I/O for good: this storage rejects direct I/O."""
        with self._lock:
            self.direct = self._open = False


class ShardFile:
    """One shard under construction: bytes go to their final offsets, from any thread, in any order."""

    def __init__(self, path: Path, size: int, header: bytes, mode: WriteMode) -> None:
        """Create the file in its full size and write its header. Raises UsageError, ResourceError, OutputLocked."""
        self.path, self._mode = path, mode
        self._descriptor = self._direct = -1
        try:
            with disk_errors(path):
                self._descriptor = _create(path)
                _allocate(self._descriptor, size)
            self._write(memoryview(header), 0)
        except BaseException:
            self.close()
            raise
        with suppress(AttributeError, OSError):  # not every system and filesystem supports direct I/O
            self._direct = os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)

    def write(self, data: memoryview, offset: int) -> None:
        """Write `data` at `offset`. Raises UsageError, ResourceError.

        Direct I/O takes whole pages and needs `data` aligned in memory as it is in the file.
        """
        if self._mode.direct and self._direct >= 0:
            head = min(-offset % PAGE, len(data))
            body = head + (len(data) - head) // PAGE * PAGE
            done = head + self._write_direct(data[head:body], offset + head)
            self._write(data[:head], offset)
            self._write(data[done:], offset + done)
        else:
            self._write(data, offset)
            # Starts the write-back at once and keeps the merge from evicting everyone else's page cache.
            with suppress(AttributeError, OSError):
                os.posix_fadvise(self._descriptor, offset, len(data), os.POSIX_FADV_DONTNEED)
        self._mode.note(len(data))

    def _write_direct(self, pages: memoryview, offset: int) -> int:
        """Write around the page cache. Returns the bytes written; the rest was rejected and must be buffered."""
        done = 0
        with disk_errors(self.path):
            while done < len(pages) and done % PAGE == 0:
                try:
                    done += _pwrite(self._direct, pages[done:], offset + done)
                except OSError as error:
                    if error.errno not in UNSUPPORTED:
                        raise
                    self._mode.refuse_direct()
                    break
        return done

    def _write(self, data: memoryview, offset: int) -> None:
        with disk_errors(self.path):
            while data:
                count = _pwrite(self._descriptor, data, offset)
                offset += count
                data = data[count:]

    def finish(self) -> None:
        """Make the file durable and close it. Raises UsageError, ResourceError."""
        with disk_errors(self.path):
            sync_file(self._descriptor)
            self._close()

    def close(self) -> None:
        """Close an unfinished file, ignoring errors: it will not be read."""
        with suppress(OSError):
            self._close()

    def _close(self) -> None:
        """Close a file. Raises OSError: quotas and network filesystems may report only here that there was no room."""
        descriptors = [self._direct, self._descriptor]
        self._descriptor = self._direct = -1
        with ExitStack() as stack:  # all of them, even if one fails
            for descriptor in descriptors:
                if descriptor >= 0:
                    stack.callback(os.close, descriptor)


def _create(path: Path) -> int:
    """Return a descriptor of a new file. Raises OSError, and OutputLocked if there is one of that name.

    Without working locks another run may be writing it; neither may write into the other's.
    """
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except FileExistsError as error:
        raise OutputLocked(
            f"another run is writing {path}", fix="let that run finish, or choose another folder with `--output`"
        ) from error


def _allocate(descriptor: int, size: int) -> None:
    """Give a file its size at once, where the filesystem can; else it grows as it is written. Raises OSError."""
    try:
        os.ftruncate(descriptor, size)
    except OSError as error:
        if error.errno not in (*UNSUPPORTED, errno.EPERM):
            raise


def _pwrite(descriptor: int, data: memoryview, offset: int) -> int:
    """Write part of `data`, at least one byte. Raises OSError."""
    if not (count := os.pwrite(descriptor, data, offset)):
        raise OSError(errno.EIO, "nothing was written")
    return count


class StreamFile:
    """One shard under construction whose size is known only at its end: bytes are appended by one thread."""

    def __init__(self, path: Path, start: int) -> None:
        """Create the file; what is appended begins at byte `start`. Raises UsageError, ResourceError, OutputLocked."""
        self.path = path
        with disk_errors(path):
            self._stream = FileIO(_create(path), "r+")
            self._stream.seek(start)

    def append(self, data: memoryview) -> None:
        with disk_errors(self.path):
            write_all(self._stream, data)

    def put(self, data: bytes, offset: int) -> None:
        """Write `data` at `offset`, after everything was appended."""
        with disk_errors(self.path):
            self._stream.seek(offset)
            write_all(self._stream, data)

    def finish(self, stop: threading.Event) -> tuple[int, str]:
        """Make the file durable and close it. Returns its size and sha256, of no use where `stop` was set."""
        with disk_errors(self.path):
            sync_file(self._stream.fileno())
            self._stream.close()
            return self.path.stat().st_size, hash_file(self.path, stop)

    def close(self) -> None:
        """Close an unfinished file."""
        with suppress(OSError):
            self._stream.close()
