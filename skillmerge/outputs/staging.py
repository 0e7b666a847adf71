"""The staging folder beside the output: lock, journal, shard files, publish by rename.

    out.partial/lock, owner     held while a run works on `out`; see `claim`
    out.partial/journal.jsonl   the plan's digest, then one line per finished shard
    out.partial/files/          the output in the making
    out.partial/complete/       the same, finished; then, for an instant, what it replaced
    out.partial/dropped/        what is being removed

The output's own name appears, or changes, in one rename, when everything is written, synced and checked. A
run that dies at any instant leaves a folder from which the same command continues. Knows files and bytes,
nothing about tensors.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
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
from skillmerge.errors import SkillmergeError, UsageError, some
from skillmerge.outputs.journal import Header, Journal, Placing, Sealed
from skillmerge.outputs.shard_file import ShardFile, StreamFile, WriteMode
from skillmerge.reporter import Reporter
from skillmerge.threads import hash_file, in_threads

if TYPE_CHECKING:
    from skillmerge.plans.plan import ShardPlan


MANIFEST_FILE = "skillmerge.manifest.json"

_OURS = (*CLAIM_FILES, "journal.jsonl", "journal.jsonl.new", "files", "complete", "previous", "dropped")


class Staging:
    """The staging folder of one output, locked for this run until `close` or `put_in_place`.

    Whatever writes raises UsageError and ResourceError, as `disk_errors` says, and OutputLocked where another run has
    taken the folder over, which can only be where locks lock nothing.
    """

    def __init__(self, output: Path, reporter: Reporter | None = None) -> None:
        """Create and lock it. Raises OutputLocked if another run holds it."""
        self.output = output
        self.folder = self.folder_of(output)
        self.files = self.folder / "files"
        self.finished: dict[str, ShardRecord] = {}
        self.sealed = False
        """Whether an earlier run had called `seal`."""
        self._complete = self.folder / "complete"
        self._journal = Journal(self.folder / "journal.jsonl")
        with disk_errors(self.folder, "choose another folder with `--output`"):
            self._refuse_strangers()
        self._claim = Claim(self.folder, output, reporter or Reporter())

    def working(self) -> AbstractContextManager[None]:
        """See `Claim.working`."""
        return self._claim.working()

    @staticmethod
    def folder_of(output: Path) -> Path:
        return output.with_name(output.name + ".partial")

    def _refuse_strangers(self) -> None:
        """A folder that only happens to have the staging folder's name is not ours to work in."""
        strangers: list[str] = []
        if self.folder.is_dir():
            with suppress(FileNotFoundError):  # its run has finished meanwhile
                strangers = [path.name for path in self.folder.iterdir() if path.name not in _OURS]
        if self.folder.is_symlink() or strangers:
            what = f"holds {some(strangers)}" if strangers else "is a link"
            raise UsageError(
                f"{self.folder} is where the work would be done, but it {what}: it is not skillmerge's",
                fix="move it away, or choose another folder with `--output`",
            )

    @property
    def unfinished(self) -> bool:
        return self.files.exists()

    @property
    def finished_bytes(self) -> int:
        return sum(done.size for done in self.finished.values())

    def plan_of_unfinished(self, conditions: dict[str, Any]) -> str | None:
        """Return the digest of what an earlier run under these conditions was making, where it has finished a shard."""
        rows = self._journal.read()
        of = rows[0].plan if rows and isinstance(rows[0], Header) and rows[0].conditions == conditions else None
        return of if any(isinstance(row, ShardRecord) for row in rows) else None

    def recover(self, weights_digest: str, conditions: dict[str, Any], replace: bool, plan_digest: str = "") -> bool:
        """Finish a publication that a dead run of the same plan had begun. True where the output is now its.

        What stands at the output's place is only replaced with `replace`; else the finished files stay here.
        Of another plan's publication only that is finished which had already moved the output away. Where it is not
        known to have passed all that is asked now (`plan_digest`), its finished shards are kept for `begin`.
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
        """Load the journal of an earlier run of the same plan under the same conditions, or start afresh.

        An output that was sealed with the same `plan_digest` is complete but for its commit.
        Returns a remark for the user where something of an earlier run was kept or dropped.
        """
        header = Header(weights_digest, conditions)
        self._claim.check()
        rows = self._journal.read()
        remark = None
        with disk_errors(self.folder):
            if rows[:1] == [header]:
                shards = {row.file: row for row in rows if isinstance(row, ShardRecord)}  # the last row of each counts
                for done in shards.values():
                    if done.uploaded:
                        (self.files / done.file).unlink(missing_ok=True)
                intact = in_threads(self._is_intact, shards.values())
                self.finished = {done.file: done for done, good in zip(shards.values(), intact, strict=True) if good}
                damaged = len(shards) - len(self.finished)
                count = f"{len(self.finished)} shard{' is' if len(self.finished) == 1 else 's are'}"
                remark = f"continuing an interrupted run: {count} finished already"
                remark += f"; {damaged} were damaged since and are done again" if damaged else ""
                self.sealed = Sealed(plan_digest) in rows and not damaged and (self.files / MANIFEST_FILE).is_file()
                if self.sealed:
                    return remark
            elif rows or self.files.exists():
                remark = "an unfinished run of another plan was found and dropped"
            self._clear(*(("files", self._journal.path.name) if self.finished else ()))
            self.files.mkdir(exist_ok=True)
            self.drop_strangers(set(self.finished))
            self._journal.start([header, *self.finished.values()])
        return remark

    def _is_intact(self, done: ShardRecord, stop: threading.Event) -> bool:
        path = self.files / done.file
        if done.uploaded:
            return True
        if not path.is_file() or path.stat().st_size != done.size:
            return False
        return hash_file(path, stop) == done.sha256

    @cached_property
    def _write_mode(self) -> WriteMode:
        """Made when the first shard is opened: it measures the pace from then on."""
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
        """Say in the journal that a shard is finished; it must be durable already."""
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
        """The output is complete, but for shards that were uploaded and removed: nothing of it may change."""
        self._claim.check()
        self._journal.append(Sealed(proof))

    def drop_strangers(self, names: set[str]) -> None:
        """Remove what does not belong into the output (an unfinished shard, a stray file)."""
        self._claim.check()
        with disk_errors(self.files):
            for path in sorted(self.files.rglob("*"), reverse=True):
                if path.is_dir() and not path.is_symlink():
                    if not any(path.iterdir()):
                        path.rmdir()
                elif path.relative_to(self.files).as_posix() not in names:
                    path.unlink()

    def put_in_place(self, replace: bool, plan_digest: str = "") -> None:
        """Give the finished files the output's name in one step.

        With `replace` they take the place of what has it; without, only that of nothing or an empty folder:
        raises UsageError where something has come to stand there.
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
                    self._complete.rename(self.files)  # another run's by now
                    self._claim.check()
                _put_in_place(self._complete, self.output, replace)
        except UsageError:
            self._claim.check()  # what another run has moved is missing here
            raise
        self._clear()
        self.close()

    def discard(self) -> None:
        """Give up what was written: no run of this plan can finish it."""
        self.finished.clear()
        self._clear()

    def close(self) -> None:
        """Let go of the lock. What the next run can use is kept; a folder without it is removed."""
        with suppress(OSError):  # of a folder that another run has taken, and removes right now
            if not is_taken(self.files) and not self._complete.exists():
                self._clear()
        self._claim.close()

    def _clear(self, *kept: str) -> None:
        """Remove all but `kept` and the lock; the journal last, so that it is there while anything is.

        A folder loses its name first: another run never finds half of it. What is another run's by now is left alone.
        """
        dropped = self.folder / "dropped"
        with suppress(OSError, SkillmergeError):
            self._claim.check()
            remove_tree(dropped)
            paths = [path for path in self.folder.iterdir() if path.name not in (*CLAIM_FILES, *kept)]
            for path in sorted(paths, key=lambda path: path == self._journal.path):
                if path.is_dir() and not path.is_symlink():
                    path.rename(dropped)
                    remove_tree(dropped)
                else:
                    path.unlink()


def _put_in_place(finished: Path, output: Path, replace: bool) -> None:
    """Make `output` what `finished` is. What was replaced is left in `finished`'s folder."""
    if not (replace and output.exists() and exchange(finished, output)):
        if replace and is_taken(output):
            previous = finished.with_name("previous")
            remove_tree(previous)
            output.rename(previous)
        rename_folder(finished, output)
    sync_folder(output.parent)


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
