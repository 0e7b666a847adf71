"""The file of a shard in the making: buffered or direct I/O, bytes at their final offsets from any thread."""

from __future__ import annotations

import errno
import os
import threading
import time
from contextlib import suppress
from pathlib import Path

from skillmerge.durable import disk_errors, write_all
from skillmerge.tensors import PAGE
from skillmerge.threads import hash_file

TRIAL_BYTES = 32 << 20
"""How much is written in one mode before the other has its turn."""


class WriteMode:
    """Buffered or direct I/O, whichever this run does faster on this storage.

    Direct I/O saves the copy into the page cache and its eviction, but some storage is slower with it. So the
    first spans are written in turns, and the pace of the whole pipeline decides. No byte depends on it.
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
        """Count what was written; at the end of a turn take the next, after the last the winner."""
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
        """This storage asks for more than direct I/O gives it: buffered from now on."""
        with self._lock:
            self.direct = self._open = False


class ShardFile:
    """One shard under construction: bytes go to their final offsets, from any thread, in any order."""

    def __init__(self, path: Path, size: int, header: bytes, mode: WriteMode) -> None:
        """Create the file in its full size and write its header. Raises UsageError, ResourceError."""
        self.path, self._mode = path, mode
        self._descriptor = self._direct = -1
        try:
            with disk_errors(path):
                self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
                os.ftruncate(self._descriptor, size)
            self._write(memoryview(header), 0)
        except BaseException:
            self.close()
            raise
        with suppress(AttributeError, OSError):  # not every system and filesystem has direct I/O
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
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._descriptor, offset, len(data), os.POSIX_FADV_DONTNEED)
        self._mode.note(len(data))

    def _write_direct(self, pages: memoryview, offset: int) -> int:
        """Write past the page cache. Returns the bytes written; the rest was refused and must be buffered."""
        done = 0
        with disk_errors(self.path):
            while done < len(pages) and done % PAGE == 0:
                try:
                    done += os.pwrite(self._direct, pages[done:], offset + done)
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
                    self._mode.refuse_direct()
                    break
        return done

    def _write(self, data: memoryview, offset: int) -> None:
        with disk_errors(self.path):
            while data:
                count = os.pwrite(self._descriptor, data, offset)
                offset += count
                data = data[count:]

    def finish(self) -> None:
        """Make the file durable and close it. Raises UsageError, ResourceError."""
        with disk_errors(self.path):
            os.fsync(self._descriptor)
        self.close()

    def close(self) -> None:
        for descriptor in (self._descriptor, self._direct):
            if descriptor >= 0:
                os.close(descriptor)
        self._descriptor = self._direct = -1


class StreamFile:
    """One shard under construction whose size is known only at its end: bytes are appended by one thread."""

    def __init__(self, path: Path, start: int) -> None:
        """Create the file; what is appended begins at byte `start`. Raises UsageError, ResourceError."""
        self.path = path
        with disk_errors(path):
            self._stream = open(path, "wb", buffering=0)  # noqa: SIM115 - closed by finish and close
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
            os.fsync(self._stream.fileno())
            self._stream.close()
            return self.path.stat().st_size, hash_file(self.path, stop)

    def close(self) -> None:
        self._stream.close()
