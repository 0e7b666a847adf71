"""Shards of a running merge that leave this disk: sent as they are finished, recorded, removed, with room for two.

A subclass says where to: the Hub (`hub.push`) or a bucket (`buckets.sending`).
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skillmerge.checkpoints.place import Bucket
from skillmerge.checkpoints.safetensors import read_header
from skillmerge.engine.destination import ShardRecord
from skillmerge.outputs.manifest import Manifest
from skillmerge.outputs.output import Output
from skillmerge.outputs.staging import Staging
from skillmerge.outputs.verify import check_shard
from skillmerge.plans.plan import Plan
from skillmerge.threads import Crew

if TYPE_CHECKING:
    from skillmerge.outputs.hub.published import Published

_SHARDS_ON_DISK = 2
"""Most shards that a merge keeps whose output is elsewhere: one is computed while another is sent."""


class _Room:
    """Room for a number of shards, until sending one fails; see `engine.runner.Room`."""

    def __init__(self, shards: int) -> None:
        self.failure: BaseException | None = None
        self._free = threading.Semaphore(shards)

    def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        if self.failure is not None:
            raise self.failure  # its shards stay on the disk, so there will be no more room
        return self._free.acquire(blocking, timeout)

    def release(self) -> None:
        self._free.release()


class Sender(ABC):
    """What sends the shards of a running merge: checked before the work, sending during it, publishing after it.

    With `remove`, each shard is deleted once it is sent, and `room` limits the disk to two shards.
    """

    place: Bucket | None = None
    """The bucket that has the output, if one has."""
    proof: Manifest | None = None
    """The manifest that was published, if it is another than the one that was to be."""

    def __init__(self, plan: Plan, remove: bool) -> None:
        self._plan, self._remove = plan, remove
        self._crew = Crew(_SHARDS_ON_DISK)
        self._sent: list[Future[None]] = []
        self._leaving = threading.Lock()
        self._failed = False
        self.room = _Room(_SHARDS_ON_DISK) if remove else None
        self._staging: Staging | None = None

    @property
    @abstractmethod
    def destination(self) -> str:
        """What the conditions of a run call the place that alone keeps the output."""

    @abstractmethod
    def find(self, conditions: Mapping[str, Any]) -> tuple[Published | None, Manifest] | None:
        """Return this plan's output and its manifest, if the destination has it. conditions: those of the run."""

    @abstractmethod
    def _begin(self, staging: Staging) -> None:
        """Prepare for sending; may add what an earlier run has sent to the finished shards."""

    @abstractmethod
    def _deliver(self, path: Path, done: ShardRecord) -> None:
        """Send a shard; do nothing for one that is there. What is removed afterwards is checked first: `_check`."""

    @abstractmethod
    def publish(self, output: Output, *, verified: bool) -> Published | None:
        """Make all that was sent visible as one output."""

    def disk_needed(self, output: int) -> int:
        """Return the disk space that this needs, in bytes; the whole output needs `output`."""
        if not self._remove:
            return output
        sides = sum(file.size for file in self._plan.side_files)
        return min(output, sides + _SHARDS_ON_DISK * max((shard.size for shard in self._plan.shards), default=0))

    def attach(self, staging: Staging) -> None:
        """Start with the shards of an earlier run, sent or not."""
        self._staging = staging
        self._begin(staging)
        for done in list(staging.finished.values()):
            if self._remove:
                self._take(done)
            else:
                self._sent.append(self._crew.submit(partial(self._take, done)))

    def send(self, done: ShardRecord) -> None:
        """Send a finished shard while others are computed. Raises the error of an earlier one."""
        if self._remove:
            for future in [future for future in self._sent if future.done()]:
                future.result()
                self._sent.remove(future)
        self._sent.append(self._crew.submit(partial(self._send, done)))

    def _send(self, done: ShardRecord) -> None:
        try:
            self._take(done)
        except BaseException as error:
            if self.room is not None:
                self.room.failure = error
            raise
        if self.room is not None:
            self.room.release()

    def _take(self, done: ShardRecord) -> None:
        assert self._staging is not None
        path = self._staging.files / done.file
        self._deliver(path, done)
        with self._leaving:
            if self._remove and not done.uploaded and not self._failed:
                self._staging.record(replace(done, uploaded=True))  # or unnecessary: it is there
                path.unlink()

    def _check(self, path: Path) -> None:
        """Check a shard's header with the safetensors library before it is sent. Raises CheckFailed."""
        shard = next(shard for shard in self._plan.shards if shard.file == path.name)
        check_shard(path, read_header(str(path), path.name).tensors if self._plan.makes_skill else shard.specs)

    def settle(self, *, failed: bool) -> None:
        """Wait for what is being sent, unless the merge failed; `publish` sends what did not get there."""
        with self._leaving:  # what still runs must not touch a folder that another run may hold by then
            self._failed = failed
        self._crew.end(wait=not failed, cancel=failed)
        if self._remove and not failed:
            for future in self._sent:
                future.result()
