"""The staging folder beside the output: lock, journal, shard files, publish by rename.

    out.partial/lock            held while a run works on `out`
    out.partial/journal.jsonl   the plan's digest, then one line per finished shard
    out.partial/files/          the output in the making
    out.partial/complete/       the same, finished; then, for an instant, what it replaced

The output's own name appears, or changes, in one rename, when everything is written, synced and checked. A
run that dies at any instant leaves a folder from which the same command continues. Knows files and bytes,
nothing about tensors.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skillmerge.errors import OutputLocked, ResourceError, UsageError, some
from skillmerge.parallel import hash_file, in_threads

if TYPE_CHECKING:
    from skillmerge.planning import ShardPlan

MANIFEST_FILE = "skillmerge.manifest.json"
JOURNAL_VERSION = 2
PAGE = 4096
"""Alignment, in bytes, that direct I/O asks for."""
TRIAL_BYTES = 32 << 20
"""How much is written in one mode before the other has its turn."""

_OURS = ("lock", "journal.jsonl", "journal.jsonl.new", "files", "complete", "previous")
_CONTINUE = "make room, then run the same command again: it continues where it stopped"
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
            raise ResourceError(f"the disk is full: {path} could not be written", fix=_CONTINUE) from error
        if error.errno in _WRONG_PLACE:
            raise UsageError(
                f"{path} cannot be written: {error.strerror}", fix="choose another place with --output"
            ) from error
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
                _sync_folder(folder)
                folder.rename(target)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            _sync_folder(target.parent)
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


class Staging:
    """The staging folder of one output, locked for this run until `close` or `publish`.

    Whatever writes raises UsageError and ResourceError, as `disk_errors` says.
    """

    def __init__(self, output: Path) -> None:
        """Create and lock it. Raises OutputLocked where another run holds it."""
        self.output = output
        self.folder = self.folder_of(output)
        self.files = self.folder / "files"
        self.finished: dict[str, dict[str, Any]] = {}
        self.sealed = False
        """Whether an earlier run had called `seal`."""
        self._complete = self.folder / "complete"
        self._journal = self.folder / "journal.jsonl"
        self._append_lock = threading.Lock()
        with disk_errors(self.folder):
            self._refuse_strangers()
            self._lock = self._acquire()

    @staticmethod
    def folder_of(output: Path) -> Path:
        return output.with_name(output.name + ".partial")

    def _refuse_strangers(self) -> None:
        """A folder that only happens to have the staging folder's name is not ours to work in."""
        strangers = [] if not self.folder.is_dir() else [p.name for p in self.folder.iterdir() if p.name not in _OURS]
        if self.folder.is_symlink() or strangers:
            what = f"holds {some(strangers)}" if strangers else "is a link"
            raise UsageError(
                f"{self.folder} is where the work would be done, but it {what}: it is not skillmerge's",
                fix="move it away, or choose another --output",
            )

    def _acquire(self) -> int:
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except FileNotFoundError:
                continue  # another run has just published and removed the folder
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = os.fstat(descriptor)
                named = (self.folder / "lock").stat()
            except BlockingIOError as error:
                os.close(descriptor)
                raise OutputLocked(
                    f"another run is writing {self.output}", fix="wait for it, or choose another --output"
                ) from error
            except FileNotFoundError:
                os.close(descriptor)
                continue
            if (held.st_dev, held.st_ino) == (named.st_dev, named.st_ino):
                return descriptor
            os.close(descriptor)

    @property
    def unfinished(self) -> bool:
        return self.files.exists()

    @property
    def finished_bytes(self) -> int:
        return sum(entry["size"] for entry in self.finished.values())

    def recover(self, plan_digest: str, conditions: dict[str, Any], replace: bool) -> bool:
        """Finish a publication that a dead run of the same plan had begun. True where the output is now its.

        What stands at the output's place is only replaced with `replace`; else the finished files stay here.
        Of another plan's publication only that is finished which had already moved the output away.
        """
        entries = _read_lines(self._journal)
        moved_away = (self.folder / "previous").exists() and not _is_taken(self.output)
        if not moved_away and entries[:1] != [_journal_header(plan_digest, conditions)]:
            return False
        digest = next((entry["manifest_sha256"] for entry in entries if "manifest_sha256" in entry), None)
        if digest is None:
            return False
        with disk_errors(self.output):
            # `complete` is the finished output before the rename, and what it replaced after it.
            if _digest(self.output / MANIFEST_FILE) != digest:
                if _digest(self._complete / MANIFEST_FILE) != digest:
                    return False
                if not replace and _is_taken(self.output):
                    return False
                _put_in_place(self._complete, self.output, replace)
        self._clear()
        return True

    def begin(self, plan_digest: str, conditions: dict[str, Any], proof: str = "") -> str | None:
        """Load the journal of an earlier run of the same plan under the same conditions, or start afresh.

        proof: what an output would have been sealed with that this run need not make anew.
        Returns a remark for the user where something of an earlier run was kept or dropped.
        """
        header = _journal_header(plan_digest, conditions)
        entries = _read_lines(self._journal)
        remark = None
        with disk_errors(self.folder):
            if entries and entries[0] == header:
                shards = [entry for entry in entries[1:] if "shard" in entry]
                intact = in_threads(self._is_intact, shards)
                self.finished = {entry["shard"]: entry for entry, good in zip(shards, intact, strict=True) if good}
                damaged = len({entry["shard"] for entry in shards}) - len(self.finished)
                count = f"{len(self.finished)} shard{' is' if len(self.finished) == 1 else 's are'}"
                remark = f"continuing an interrupted run: {count} finished already"
                remark += f"; {damaged} were damaged since and are done again" if damaged else ""
                self.sealed = {"sealed": proof} in entries and not damaged and (self.files / MANIFEST_FILE).is_file()
                if self.sealed:
                    return remark
            elif entries or self.files.exists():
                remark = "an unfinished run of another plan was found and dropped"
            self._clear(*(("files", self._journal.name) if self.finished else ()))
            self.files.mkdir(exist_ok=True)
            self.drop_strangers(set(self.finished))
            lines = "".join(json.dumps(entry) + "\n" for entry in [header, *self.finished.values()])
            write_whole(self._journal, lines.encode(), self.folder / "journal.jsonl.new")
        return remark

    def _is_intact(self, entry: dict[str, Any], stop: threading.Event) -> bool:
        path = self.files / entry["shard"]
        if entry.get("uploaded"):
            path.unlink(missing_ok=True)
            return True
        if not path.is_file() or path.stat().st_size != entry["size"]:
            return False
        return hash_file(path, stop) == str(entry["sha256"])

    def open_shard(self, shard: ShardPlan, mode: WriteMode) -> ShardFile:
        """The shard's file, new, in its full size. Raises UsageError, ResourceError."""
        return ShardFile(self.files / shard.file, shard.size, shard.header, mode)

    def record(self, entry: dict[str, Any]) -> None:
        """Add a line to the journal and make it durable; what it speaks of must be durable already."""
        with (
            self._append_lock,
            disk_errors(self._journal),
            open(self._journal, "a", encoding="utf-8") as journal,
        ):
            journal.write(json.dumps(entry) + "\n")
            journal.flush()
            os.fsync(journal.fileno())

    def write_file(self, name: str, content: bytes) -> None:
        """Write a small file of the output durably."""
        path = self.files / name
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())

    def seal(self, proof: str) -> None:
        """The output is complete, but for shards that were uploaded and removed: nothing of it may change."""
        self.record({"sealed": proof})

    def drop_strangers(self, names: set[str]) -> None:
        """Remove what does not belong into the output (an unfinished shard, a stray file)."""
        with disk_errors(self.files):
            for path in sorted(self.files.rglob("*"), reverse=True):
                if path.is_dir() and not path.is_symlink():
                    if not any(path.iterdir()):
                        path.rmdir()
                elif path.relative_to(self.files).as_posix() not in names:
                    path.unlink()

    def publish(self, replace: bool) -> None:
        """Give the finished files the output's name in one step.

        With `replace` they take the place of what has it; without, only that of nothing or an empty folder:
        raises UsageError where something has come to stand there.
        """
        with disk_errors(self.output):
            for folder in {path.parent for path in self.files.rglob("*")} | {self.files}:
                _sync_folder(folder)
            self.record({"manifest_sha256": _digest(self.files / MANIFEST_FILE)})
            self.files.rename(self._complete)
            _sync_folder(self.folder)
            _put_in_place(self._complete, self.output, replace)
        self._clear()
        self.close()

    def discard(self) -> None:
        """Give up what was written: no run of this plan can finish it."""
        self.finished.clear()
        self._clear()

    def close(self) -> None:
        """Let go of the lock. What the next run can use is kept; a folder without it is removed."""
        if self._lock < 0:
            return
        if not _is_taken(self.files) and not self._complete.exists():
            self._clear()
            with suppress(OSError):  # another run may be waiting in it already
                (self.folder / "lock").unlink()
                self.folder.rmdir()
        os.close(self._lock)
        self._lock = -1

    def _clear(self, *kept: str) -> None:
        """Remove all but `kept` and the lock; the journal last, so that it is there while anything is."""
        with suppress(OSError):
            paths = [path for path in self.folder.iterdir() if path.name not in ("lock", *kept)]
            for path in sorted(paths, key=lambda path: path == self._journal):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()


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


def _journal_header(plan_digest: str, conditions: dict[str, Any]) -> dict[str, Any]:
    return {"version": JOURNAL_VERSION, "plan": plan_digest, **conditions}


def _put_in_place(finished: Path, output: Path, replace: bool) -> None:
    """Make `output` what `finished` is. What was replaced is left in `finished`'s folder."""
    if not (replace and output.exists() and exchange(finished, output)):
        if replace and _is_taken(output):
            previous = finished.with_name("previous")
            shutil.rmtree(previous, ignore_errors=True)
            output.rename(previous)
        finished.rename(output)
    _sync_folder(output.parent)


def exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step (Linux renameat2, macOS renamex_np). False where that cannot be had."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            status = libc.renamex_np(os.fsencode(first), os.fsencode(second), 2)
        else:
            here = -100
            status = libc.renameat2(here, os.fsencode(first), here, os.fsencode(second), 2)
    except (AttributeError, OSError):
        return False
    return bool(status == 0)


def _is_taken(path: Path) -> bool:
    """Whether anything but an empty folder has that name."""
    return os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir()))


def _read_lines(journal: Path) -> list[dict[str, Any]]:
    """The journal's whole lines; what a crash cut short is left out."""
    try:
        content = journal.read_bytes()
    except OSError:
        return []
    entries = []
    for line in content.splitlines(keepends=True):
        try:
            entry = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            entry = None
        if not isinstance(entry, dict):
            break
        entries.append(entry)
    return entries


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
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None
