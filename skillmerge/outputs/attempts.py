"""The work of tasks on one output, beside each other and without a lock.

    out.partial/skillmerge.tasks.json       the plan and conditions of the tasks, in the journal's words
    out.partial/attempts/<uuid>/<shard>     a shard in the making, private to one run of a task
    out.partial/attempts/<uuid>/task.json   where that task runs, since when it makes which shard, and how far it is
    out.partial/files/<shard>               a finished shard, put here by rename
    out.partial/done/<shard>.json           its record, written whole and put here by rename
    out.partial/headers/                    see `tasks.headers`

Two tasks that make the same shard make the same bytes, so whichever renames last does no harm: nothing depends on
knowing whether another task is alive. A run that takes the folder over removes `attempts` first, so that what a task
of another plan still makes has no way into `files`. Knows files and records, nothing about tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skillmerge.claim import CLAIM_FILES, LOCK_FILE, is_held
from skillmerge.durable import disk_errors, remove_tree, sync_folder, write_whole
from skillmerge.engine.destination import ShardRecord
from skillmerge.errors import OutputLocked, SkillmergeError, TemporaryError, UsageError, some
from skillmerge.outputs.journal import NEW_JOURNAL, Header, Journal
from skillmerge.outputs.shard_file import ShardFile, StreamFile, WriteMode
from skillmerge.outputs.tasks import news
from skillmerge.outputs.tasks.headers import HEADERS
from skillmerge.outputs.tasks.news import TASK_FILE, TORN, CountedShard, CountedStream

if TYPE_CHECKING:
    from skillmerge.plans.plan import ShardPlan

TASKS_FILE, ATTEMPTS, DONE, FILES, COMPLETE = "skillmerge.tasks.json", "attempts", "done", "files", "complete"
_OURS = (
    *CLAIM_FILES, "journal.jsonl", FILES, COMPLETE, "previous", "dropped", TASKS_FILE, ATTEMPTS, DONE, HEADERS
)  # fmt: skip
_TRIES = 100
"""How often the folder may vanish while a task joins: another run may be removing its own."""
_PATIENCE = 3.0
"""Seconds that a task waits for a run that holds the folder alone: who only asks what is missing is soon gone."""


def staging_folder(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def refuse_strangers(folder: Path) -> None:
    """Raise UsageError if the folder with the staging folder's name is not one."""
    strangers: list[str] = []
    if folder.is_dir():
        with suppress(FileNotFoundError):  # its run has finished in the meantime
            names = [path.name for path in folder.iterdir()]
            strangers = [name for name in names if name not in _OURS and not NEW_JOURNAL.fullmatch(name)]
            strangers = [name for name in strangers if not name.startswith(f"{TASKS_FILE}.")]
    if folder.is_symlink() or strangers:
        what = f"holds {some(strangers)}" if strangers else "is a link"
        raise UsageError(
            f"{folder} is needed as the staging folder, but it {what}",
            fix="move it away, or choose another folder with `--output`",
        )


def conditions_of(folder: Path) -> Header | None:
    """Return the plan and conditions of the tasks that work in a staging folder; None if there are none."""
    with suppress(*TORN):
        return Header.from_json(json.loads((folder / TASKS_FILE).read_bytes()))
    return None


def owner_of(folder: Path) -> Header | None:
    """Return the plan and conditions of those who work in a staging folder: tasks, or an interrupted run."""
    found = conditions_of(folder)
    rows = Journal(folder / "journal.jsonl", "").read() if found is None else []
    return found or next((row for row in rows if isinstance(row, Header)), None)


def refuse_others(folder: Path, header: Header) -> None:
    """Raise UsageError if a staging folder belongs to another plan, or to the same with other options."""
    owner = owner_of(folder)
    if owner is None or owner == header:
        return
    same = owner.plan == header.plan
    what = "of this plan with other options or inputs" if same else "of another plan"
    theirs, ours = (it.conditions.get("only_on") for it in (owner, header))
    if same and theirs != ours:
        what += f", which sends shards to {theirs} alone" if theirs else ", which keeps its shards here"
    raise UsageError(
        f"{folder} holds an unfinished run {what}",
        fix="finish that run, or remove the folder; or choose another folder with `--output`",
    )


@dataclass(frozen=True, slots=True)
class Recorded:
    """A shard's record, the time of its file, and by what, where and how long it was made."""

    record: ShardRecord
    mtime_ns: int
    device: str = ""
    host: str = ""
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        made = {"mtime_ns": self.mtime_ns, "device": self.device, "host": self.host, "seconds": self.seconds}
        return {**made, **self.record.to_json()}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Recorded:
        return cls(
            ShardRecord.from_json(row),
            int(row["mtime_ns"]),
            str(row["device"]),
            str(row["host"]),
            float(row["seconds"]),
        )


class Overtaken(TemporaryError):
    """Raised where another task has recorded a shard that this one was making: what is left can be begun again."""


class Records:
    """The records of a plan's tasks in a staging folder. Those of other plans and conditions do not count."""

    def __init__(self, folder: Path, header: Header) -> None:
        self.folder = folder
        self.devices: dict[str, str] = {}
        """Where the shards that were read were computed."""
        self._of = hashlib.sha256(json.dumps(header.to_json(), sort_keys=True).encode())

    def text(self, done: Recorded) -> bytes:
        row = done.to_json()
        return (json.dumps({"digest": self._digest(row), **row}) + "\n").encode()

    def _digest(self, row: Mapping[str, Any]) -> str:
        """Return the digest of a record, with the plan and conditions that it is of: its file is not read again."""
        digest = self._of.copy()
        digest.update(json.dumps(row, sort_keys=True).encode())
        return digest.hexdigest()

    def path(self, shard: str) -> Path:
        return self.folder / DONE / f"{shard}.json"

    def listed(self) -> list[str]:
        """Return the shards that have a record, as far as the filesystem knows."""
        with suppress(OSError):
            return sorted(path.name.removesuffix(".json") for path in (self.folder / DONE).iterdir())
        return []

    def read(self, shard: str) -> Recorded | None:
        """Return a shard's record: by its name, because listings of a network filesystem may be old."""
        with suppress(*TORN):
            row = json.loads(self.path(shard).read_bytes())
            if row.pop("digest") == self._digest(row) and row["shard"] == shard:
                found = Recorded.from_json(row)
                self.devices[shard] = found.device
                return found
        return None

    def has(self, shard: str) -> bool:
        """Return whether a shard is recorded, and its file is there."""
        return (found := self.read(shard)) is not None and self.holds(found)

    def holds(self, done: Recorded, place: str = FILES) -> bool:
        """Return whether the file of a record is the one that was recorded, by its size and time, or on the Hub."""
        if done.record.uploaded:
            return True
        try:
            status = (self.folder / place / done.record.file).stat()
        except OSError:
            return False
        return (status.st_size, status.st_mtime_ns) == (done.record.size, done.mtime_ns)

    def fits(self, done: ShardRecord, place: str = FILES) -> bool:
        """Return whether there is a file of the size that a run's journal has, or it is on the Hub."""
        if done.uploaded:
            return True
        try:
            return (self.folder / place / done.file).stat().st_size == done.size
        except OSError:
            return False

    def drop(self, shard: str) -> None:
        """Forget a shard whose file is damaged, so that a task makes it again. Only who finishes may do so."""
        for path in (self.path(shard), self.folder / FILES / shard):
            path.unlink(missing_ok=True)


class Attempt:
    """One run of a task: the destination of the shards that it makes.

    Writing raises UsageError and ResourceError, as `disk_errors` says, and OutputLocked if another run has taken over
    the folder.
    """

    def __init__(self, output: Path, header: Header) -> None:
        """Join the tasks of a plan on an output. Raises UsageError where the folder belongs to another plan."""
        self.output = output
        self.folder = staging_folder(output)
        self.finished: dict[str, ShardRecord] = {}
        self.device = ""
        self._header = header
        self._own = self.folder / ATTEMPTS / uuid.uuid4().hex
        self._since: dict[str, float] = {}
        self._written: dict[str, int] = {}
        self._noted, self._lock = time.monotonic(), threading.Lock()
        self._host = socket.gethostname().partition(".")[0]
        self.records = Records(self.folder, header)
        with disk_errors(self.folder, "choose another folder with `--output`"):
            refuse_strangers(self.folder)
            self._join()

    def _join(self) -> None:
        text = (json.dumps(self._header.to_json()) + "\n").encode()
        for left in reversed(range(_TRIES)):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                refuse_others(self.folder, self._header)
                if conditions_of(self.folder) is None:
                    self._wait_for_its_owner()
                    write_whole(self.folder / TASKS_FILE, text, self.folder / f"{TASKS_FILE}.{self._own.name}.new")
                for folder in (self.folder / FILES, self.folder / DONE, self._own):
                    folder.mkdir(parents=folder == self._own, exist_ok=True)
                return self._note()
            except FileNotFoundError:
                if not left:
                    raise

    def _wait_for_its_owner(self) -> None:
        """Raise OutputLocked if a run without tasks, which writes into `files` itself, keeps holding the folder."""
        end = time.monotonic() + _PATIENCE
        while owner_of(self.folder) is not None and is_held(self.folder):
            if time.monotonic() > end:
                raise OutputLocked(
                    f"another run is writing {self.output} by itself",
                    fix="wait for it, or choose another folder with `--output`",
                )
            time.sleep(_PATIENCE / 30)

    def _note(self) -> None:
        """Write down where this task runs, what it makes and how far it is, for those who wait. Nothing depends on
        it."""
        self._noted = time.monotonic()
        row = {"host": self._host, "pid": os.getpid(), "shards": self._since, "written": self._written}
        new = self._own / f"{TASK_FILE}.new"
        new.write_text(json.dumps(row) + "\n", encoding="utf-8")
        new.replace(self._own / TASK_FILE)

    def _moved(self, shard: str, count: int) -> None:
        with self._lock:
            if shard in self._written:
                self._written[shard] += count
            if time.monotonic() - self._noted >= news.EVERY:
                with suppress(OSError):
                    self._note()

    @cached_property
    def _write_mode(self) -> WriteMode:
        return WriteMode()

    @property
    def files(self) -> Path:
        """Where this task's shards are until they are recorded."""
        return self._own

    def _begin(self, shard: str) -> Path:
        self.check()
        with self._lock, disk_errors(self._own):
            self._since[shard], self._written[shard] = time.time(), 0
            self._note()
        return self._own / shard

    def open_shard(self, shard: ShardPlan) -> ShardFile:
        """Return the shard's file, new, in its full size. Raises UsageError, ResourceError, OutputLocked."""
        file = CountedShard(self._begin(shard.file), shard.size, shard.header, self._write_mode)
        file.moved = partial(self._moved, shard.file)
        return file

    def open_stream(self, shard: ShardPlan, start: int) -> StreamFile:
        """Return the shard's file, new, to be appended to from byte `start` on. Raises as `open_shard` does."""
        stream = CountedStream(self._begin(shard.file), start)
        stream.moved = partial(self._moved, shard.file)
        return stream

    def record(self, done: ShardRecord) -> None:
        """Put a shard, which must be durable already, among the finished ones, and then its record. Where another task
        was faster, its shard stays: it may be in use already. One that was uploaded has only a record."""
        self.check()
        own, target = self._own / done.file, self.folder / FILES / done.file
        with disk_errors(target):
            if self.records.has(done.file):
                return own.unlink(missing_ok=True)
            try:
                changed = 0 if done.uploaded else own.stat().st_mtime_ns
                if not done.uploaded:
                    _rename(own, target)
                    sync_folder(target.parent)
            except FileNotFoundError:
                if self.records.read(done.file) is None:
                    raise
                return  # others were faster just now, and have removed this one: see `_remove_others`
            with self._lock:
                self._written.pop(done.file, None)
                seconds = round(time.time() - self._since.pop(done.file, time.time()), 3)
            recorded = Recorded(done, changed, self.device.split(": ")[0], self._host, seconds)
            record = self.records.path(done.file)
            write_whole(record, self.records.text(recorded), self._own / record.name)
            with self._lock:
                self._note()
            self._remove_others(done.file)
        self.finished[done.file] = done

    def _remove_others(self, shard: str) -> None:
        """Remove what other attempts have of a recorded shard: of killed tasks, whose files would fill the disk, and of
        slower ones, which write on into a file without a name, and find the record or are `Overtaken`."""
        with suppress(OSError):
            for attempt in self._own.parent.iterdir():
                if attempt != self._own:
                    (attempt / shard).unlink(missing_ok=True)

    def check(self) -> None:
        """Raise OutputLocked if another run has taken the folder meanwhile."""
        if conditions_of(self.folder) != self._header or not self._own.is_dir():
            raise OutputLocked(
                f"another run has taken over {self.output}; this one has stopped and left it alone",
                fix="let that run finish, or choose another folder with `--output`",
            )

    @contextmanager
    def working(self) -> Iterator[None]:
        """Turn any error in a folder that another run has taken over or published into OutputLocked, and any because
        other tasks were faster into Overtaken."""
        try:
            yield
        except (SkillmergeError, OSError) as error:
            if not isinstance(error, OutputLocked):
                try:
                    self.check()
                except OutputLocked as taken:
                    raise taken from error
                gone = [shard for shard in list(self._since) if not (self._own / shard).exists()]
                if lost := [shard for shard in gone if self.records.has(shard)]:
                    raise Overtaken(f"other tasks have made {some(lost)}", fix="run this task again") from error
            raise

    def withdraw(self) -> None:
        """Remove the folder, if this task has made it again: to be called only where the output is published."""
        self.close()
        if not (self.folder / LOCK_FILE).exists():
            for folder in (FILES, DONE):
                with suppress(OSError):
                    (self.folder / folder).rmdir()
            with suppress(OSError):  # another late task is there, and does the same
                (self.folder / ATTEMPTS).rmdir()
                (self.folder / TASKS_FILE).unlink()
                self.folder.rmdir()

    def close(self) -> None:
        """Remove what was not finished. What a killed task leaves is removed when the shard is recorded, or the output
        is published."""
        with suppress(OSError):
            remove_tree(self._own)


def _rename(source: Path, target: Path) -> None:
    """Rename a file. On NFS the call may be sent twice: the second finds no source, and the target done."""
    before = source.stat()
    try:
        source.replace(target)
    except FileNotFoundError:
        try:
            after = target.stat()
        except OSError:
            after = None
        if after is None or (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise
