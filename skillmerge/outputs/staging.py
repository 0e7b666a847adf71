"""The staging folder beside the output: lock, journal, shard files, publish by rename.

    out.partial/lock, owner     held while a run works on `out`; see `claim`
    out.partial/journal.jsonl   the plan's digest, then one line per finished shard
    out.partial/files/          the output while it is written
    out.partial/complete/       the finished output; then, for an instant, the one that it replaced
    out.partial/dropped/        files that are being removed

Tasks of a cluster leave shards and records there too; see `attempts`.

One rename puts the output in place, when everything is written, synced and checked. A run that is killed at any
instant leaves a folder from which the same command resumes. Knows files and bytes,
nothing about tensors.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skillmerge.claim import CLAIM_FILES, Claim
from skillmerge.durable import (
    digest_or_none,
    disk_errors,
    is_taken,
    remove_tree,
    rename_folder,
    sync_file,
    sync_folder,
)
from skillmerge.engine.destination import ShardRecord
from skillmerge.errors import SkillmergeError, UsageError
from skillmerge.outputs.attempts import (
    ATTEMPTS,
    TASKS_FILE,
    Recorded,
    Records,
    conditions_of,
    refuse_strangers,
    staging_folder,
)
from skillmerge.outputs.journal import Header, Journal, Placing, Row, Sealed
from skillmerge.outputs.shard_file import ShardFile, StreamFile, WriteMode
from skillmerge.reporter import Reporter
from skillmerge.threads import hash_file, in_threads

if TYPE_CHECKING:
    from skillmerge.plans.plan import ShardPlan


MANIFEST_FILE = "skillmerge.manifest.json"


class Staging:
    """The staging folder of one output, locked for this run until `close` or `put_in_place`.

    Writing raises UsageError and ResourceError, as `disk_errors` says, and OutputLocked if another run has taken over
    the folder, which is possible only without working locks.
    """

    def __init__(self, output: Path, reporter: Reporter | None = None) -> None:
        """Create and lock it. Raises OutputLocked if another run holds it."""
        self.output = output
        self.folder = self.folder_of(output)
        self.files = self.folder / "files"
        self.finished: dict[str, ShardRecord] = {}
        self.sealed = False
        """Whether an earlier run called `seal`."""
        self.tasks: Records | None = None
        """The records of the plan's tasks, if this run goes on beside them."""
        self._complete = self.folder / "complete"
        with disk_errors(self.folder, "choose another folder with `--output`"):
            refuse_strangers(self.folder)
        self._claim = Claim(self.folder, output, reporter or Reporter())
        self._journal = Journal(self.folder / "journal.jsonl", self._claim.token)

    def working(self) -> AbstractContextManager[None]:
        """See `Claim.working`."""
        return self._claim.working()

    @staticmethod
    def folder_of(output: Path) -> Path:
        return staging_folder(output)

    @property
    def unfinished(self) -> bool:
        return self.files.exists()

    @property
    def finished_bytes(self) -> int:
        return sum(done.size for done in self.finished.values())

    def recover(self, weights_digest: str, conditions: dict[str, Any], replace: bool, plan_digest: str = "") -> bool:
        """Finish a publication that a killed run of the same plan had started. Returns whether the output is now its.

        An existing output is only replaced with `replace`; otherwise the finished files stay here. A publication of
        another plan is finished only if it had already moved the output away. If it is not known to have passed the
        current checks (`plan_digest`), its finished shards are kept for `begin`.
        """
        rows = self._journal.read()
        previous = self.folder / "previous"
        moved_away = previous.exists() and not is_taken(self.output)
        ours = rows[:1] == [Header(weights_digest, conditions)]
        placing = next((row for row in rows if isinstance(row, Placing)), None)
        if placing is None or placing.manifest_sha256 is None or not (ours or moved_away):
            return False
        digest = placing.manifest_sha256
        with disk_errors(self.output):
            # `complete` is the finished output before the rename, and what it replaced after it.
            if digest_or_none(self.output / MANIFEST_FILE) != digest:
                if digest_or_none(self._complete / MANIFEST_FILE) != digest:
                    return False
                self._claim.check()
                if ours and placing.plan != plan_digest:
                    if moved_away:
                        rename_folder(previous, self.output)
                    self._complete.rename(self.files)
                    return False
                if not replace and is_taken(self.output):
                    return False
                _put_in_place(self._complete, self.output, replace)
        self._clear()
        return True

    def begin(self, weights_digest: str, conditions: dict[str, Any], plan_digest: str = "") -> str | None:
        """Load the journal of an earlier run of the same plan under the same conditions, or start from scratch.

        An output that was sealed with the same `plan_digest` is complete except for its commit. Returns a note for
        the user if something of an earlier run was kept or dropped.
        """
        header = Header(weights_digest, conditions)
        self._claim.check()
        rows = self._journal.read()
        remark = None
        with disk_errors(self.folder):
            recorded = self._recorded_by_tasks(header)
            if rows[:1] == [header] or recorded:
                damaged = len(self._load(header, rows, recorded))
                count = f"{len(self.finished)} shard{' is' if len(self.finished) == 1 else 's are'}"
                remark = f"continuing an interrupted run: {count} finished already"
                remark += f"; {damaged} were damaged since and are redone" if damaged else ""
                self.sealed = Sealed(plan_digest) in rows and not damaged and (self.files / MANIFEST_FILE).is_file()
                if self.sealed:
                    return remark
                if recorded:  # before the tasks' records go
                    self._journal.start([header, *self.finished.values()])
            elif rows or self.files.exists():
                same = any(isinstance(row, Header) and row.plan == weights_digest for row in rows[:1])
                remark = "dropped an unfinished run "
                remark += "of this plan with other options or inputs" if same else "of another plan"
            self._clear(*(("files", self._journal.path.name) if self.finished else ()))
            self.files.mkdir(exist_ok=True)
            self.drop_strangers(set(self.finished))
            self._journal.start([header, *self.finished.values()])
        return remark

    def begin_beside_tasks(self, weights_digest: str, conditions: dict[str, Any], reread: bool) -> str | None:
        """Take what tasks of the plan have made so far, and leave them at their work.

        reread: believe no record without reading its file. Where no tasks of the plan are at work this is `begin`.
        """
        header = Header(weights_digest, conditions)
        self.tasks = Records(self.folder, header)
        if conditions_of(self.folder) != header:
            return self.begin(weights_digest, conditions)
        self._claim.check()
        with disk_errors(self.folder):
            recorded = self._recorded_by_tasks(header)
            self._load(header, self._journal.read(), recorded, {} if reread else recorded)
            self.files.mkdir(exist_ok=True)
            self._journal.start([header, *self.finished.values()])
        return None

    def leave_tasks_out(self) -> None:
        """Remove what tasks still make, so that no file changes any more."""
        self._claim.check()
        with disk_errors(self.folder):
            self._remove(self.folder / ATTEMPTS)

    def _remove(self, path: Path) -> None:
        """Remove a file or a folder: that is renamed first, so that another run never finds half of it."""
        dropped = self.folder / "dropped"
        if path.is_dir() and not path.is_symlink():
            remove_tree(dropped)
            path.rename(dropped)
            remove_tree(dropped)
        else:
            path.unlink(missing_ok=True)

    def _recorded_by_tasks(self, header: Header) -> dict[str, Recorded]:
        """Return the tasks' records of this plan, by shard."""
        records = Records(self.folder, header)
        return {found.record.file: found for shard in records.listed() if (found := records.read(shard)) is not None}

    def _load(
        self,
        header: Header,
        rows: Sequence[Row],
        recorded: Mapping[str, Recorded],
        believed: Mapping[str, Recorded] | None = None,
    ) -> list[str]:
        """Take the finished shards of a journal and of tasks. Returns those that are damaged.

        believed: those that need not be read again where size and time of the file are those of the record.
        """
        known = [row for row in rows if isinstance(row, ShardRecord)] if rows[:1] == [header] else []
        shards = {row.file: row for row in known}  # the last row of each counts
        shards |= {file: found.record for file, found in recorded.items()}
        for done in shards.values():
            if done.uploaded:
                (self.files / done.file).unlink(missing_ok=True)
        trusted = {file for file, found in (believed or {}).items() if Records(self.folder, header).holds(found)}

        def is_intact(done: ShardRecord, stop: threading.Event) -> bool:
            return done.file in trusted or self.is_intact(done, stop)

        intact = in_threads(is_intact, shards.values())
        self.finished = {done.file: done for done, good in zip(shards.values(), intact, strict=True) if good}
        return [file for file in shards if file not in self.finished]

    def is_intact(self, done: ShardRecord, stop: threading.Event | None = None) -> bool:
        """Return whether a shard's file is the one that was recorded. Reads it."""
        path = self.files / done.file
        if done.uploaded:
            return True
        if not path.is_file() or path.stat().st_size != done.size:
            return False
        return hash_file(path, stop) == done.sha256

    @cached_property
    def _write_mode(self) -> WriteMode:
        """Created when the first shard is opened, because it measures the throughput from then on."""
        return WriteMode()

    def open_shard(self, shard: ShardPlan) -> ShardFile:
        """Return the shard's file, new, in its full size. Raises UsageError, ResourceError, OutputLocked."""
        self._claim.check()
        return ShardFile(self.files / shard.file, shard.size, shard.header, self._write_mode)

    def open_stream(self, shard: ShardPlan, start: int) -> StreamFile:
        """Return the shard's file, new, to be appended to from byte `start` on. Raises as `open_shard` does."""
        self._claim.check()
        return StreamFile(self.files / shard.file, start)

    def record(self, done: ShardRecord) -> None:
        """Record in the journal that a shard is finished; it must be durable already."""
        self._claim.check()
        self._journal.append(done)
        self.finished[done.file] = done

    def write_file(self, name: str, content: bytes) -> None:
        """Write a small file of the output durably."""
        path = self.files / name
        self._claim.check()
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as stream:
                stream.write(content)
                stream.flush()
                sync_file(stream.fileno())

    def seal(self, proof: str) -> None:
        """Record that the output is complete, except for shards that were uploaded and removed."""
        self._claim.check()
        self._journal.append(Sealed(proof))

    def drop_strangers(self, names: set[str]) -> None:
        """Remove files that do not belong to the output (an unfinished shard, a stray file)."""
        self._claim.check()
        with disk_errors(self.files):
            for path in sorted(self.files.rglob("*"), reverse=True):
                if path.is_dir() and not path.is_symlink():
                    if not any(path.iterdir()):
                        path.rmdir()
                elif path.relative_to(self.files).as_posix() not in names:
                    path.unlink()

    def put_in_place(self, replace: bool, plan_digest: str = "") -> None:
        """Move the finished files to the output's name in one step.

        With `replace` they replace an existing output; without, only an empty folder: raises UsageError if something
        has appeared there.
        """
        digest = digest_or_none(self.files / MANIFEST_FILE)
        self._claim.check()
        try:
            with disk_errors(self.output):
                for folder in {path.parent for path in self.files.rglob("*")} | {self.files}:
                    sync_folder(folder)
                self._journal.append(Placing(digest, plan_digest))
                self.files.rename(self._complete)
                sync_folder(self.folder)
                if not self._claim.is_mine():
                    self._complete.rename(self.files)  # now another run's
                    self._claim.check()
                _put_in_place(self._complete, self.output, replace)
        except UsageError:
            self._claim.check()  # another run has moved the files
            raise
        self._clear()
        self.close()

    def discard(self) -> None:
        """Discard what was written: no run of this plan can finish it."""
        self.finished.clear()
        self._clear()

    def close(self) -> None:
        """Release the lock. Keep what the next run can use; remove a folder without that."""
        with suppress(OSError):  # the folder is another run's, which may be removing it
            in_use = is_taken(self.files) or self._complete.exists() or (self.folder / TASKS_FILE).exists()
            if not in_use:
                self._clear()
        self._claim.close()

    def _clear(self, *kept: str) -> None:
        """Remove all but `kept` and the lock; the journal last, so that it exists as long as anything else, and first
        what tasks still make, so that it has no way into `files`. What another run owns is left alone.
        """
        with suppress(OSError, SkillmergeError):
            self._claim.check()
            remove_tree(self.folder / "dropped")
            paths = [path for path in self.folder.iterdir() if path.name not in (*CLAIM_FILES, *kept)]
            for path in sorted(paths, key=lambda path: (path == self._journal.path, path.name != ATTEMPTS)):
                self._remove(path)


def _put_in_place(finished: Path, output: Path, replace: bool) -> None:
    """Move `finished` to `output`. The replaced output is left in `finished`'s folder."""
    if not (replace and output.exists() and exchange(finished, output)):
        if replace and is_taken(output):
            previous = finished.with_name("previous")
            remove_tree(previous)
            output.rename(previous)
        rename_folder(finished, output)
    sync_folder(output.parent)


def exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step (Linux renameat2, macOS renamex_np). Returns False if that is unsupported."""
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
