"""The output of a running merge in a bucket: its shards are sent as they are finished, its manifest last."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Collection, Mapping
from concurrent.futures import wait
from hashlib import sha256
from pathlib import Path
from typing import Any

from skillmerge.checkpoints.checkpoint import INDEX_FILE
from skillmerge.checkpoints.kinds.skill import SKILL_FILE
from skillmerge.checkpoints.place import Bucket
from skillmerge.checkpoints.tokenizers.vocabulary import SKILL_TOKENS
from skillmerge.durable import disk_errors
from skillmerge.engine.destination import ShardRecord
from skillmerge.errors import TemporaryError, UsageError, some
from skillmerge.outputs import manifest
from skillmerge.outputs.attempts import Attempt
from skillmerge.outputs.buckets.prefix import Prefix
from skillmerge.outputs.manifest import RUN_LOG_FILE, Manifest
from skillmerge.outputs.output import Output
from skillmerge.outputs.sending import Sender
from skillmerge.outputs.staging import MANIFEST_FILE, Staging
from skillmerge.plans.plan import Plan

_LAST = ("config.json", INDEX_FILE)
"""What makes runtimes take a place for a model."""


_PATIENCE = 5.0
"""Seconds that a run which fails gives its uploads to drop what they have sent."""


class BucketOutput(Sender):
    """The output of a running merge under a prefix of a bucket; see `Prefix` for what is there when."""

    def __init__(self, plan: Plan, place: Bucket, files: Collection[str] | None = None) -> None:
        """files: shards and side files of the whole output, if the plan is a part of its."""
        super().__init__(plan, remove=True)
        self.place = place
        of_plan = [*(shard.file for shard in plan.shards), *(file.name for file in plan.side_files)]
        self._names = self.names(of_plan if files is None else files)
        self._prefix = Prefix(place)

    @staticmethod
    def names(files: Collection[str]) -> set[str]:
        """Return the names that an output of these shards and side files may have."""
        return {*files, *_LAST, SKILL_FILE, SKILL_TOKENS, RUN_LOG_FILE, MANIFEST_FILE}

    @property
    def destination(self) -> str:
        return str(self.place)

    def find(self, conditions: Mapping[str, Any]) -> tuple[None, Manifest] | None:
        """Return this plan's output, if it is finished. Raises UsageError for another one."""
        found = find_output(self._prefix, self._plan.digest, conditions)
        return (None, found) if found is not None else None

    def _begin(self, staging: Staging | Attempt) -> None:
        assert isinstance(staging, Staging), "tasks of a bucket have staging folders of their own"
        assert staging.header is not None, "it has begun"
        plan = self._plan
        self._prefix.claim(staging.header, self._names)
        there = self._prefix.records(staging.header)
        lost = [file for file, done in staging.finished.items() if done.uploaded and file not in there]
        if lost and staging.sealed:
            raise self._forgotten(lost)
        for file in lost:
            del staging.finished[file]
        for file, done in there.items():
            if file in {shard.file for shard in plan.shards}:
                staging.record(done)
                (staging.files / file).unlink(missing_ok=True)

    def _deliver(self, path: Path, done: ShardRecord) -> None:
        if done.uploaded:
            return
        assert isinstance(self._staging, Staging)
        assert self._staging.header is not None
        self._check(path)
        self._prefix.send(path, done, lambda: not self._failed)
        self._prefix.record(self._staging.header, done)

    def settle(self, *, failed: bool) -> None:
        super().settle(failed=failed)
        if failed:  # parts of an upload that stays unfinished cost money until somebody finds them
            wait(self._sent, timeout=_PATIENCE)

    def publish(self, output: Output, *, verified: bool) -> None:
        """Send what is left, and the manifest last: that is the commit. It may have become another one, `proof`."""
        proof, sizes = output.manifest, self._prefix.listed()
        shards = {shard.file for shard in self._plan.shards}
        if lost := [file.name for file in proof.files if file.name in shards and sizes.get(file.name) != file.size]:
            raise self._forgotten(lost)
        small = proof.file_names - shards - {MANIFEST_FILE, RUN_LOG_FILE}
        for name in sorted(small, key=lambda name: (name in _LAST, name)):
            self._prefix.keep(name, (output.folder / name).read_bytes())
        log = (output.folder / RUN_LOG_FILE).read_bytes()
        if not self._prefix.create(RUN_LOG_FILE, log):
            # A run of this plan that was killed, or that is as far as this one, has left its own, and it stays.
            proof = manifest.resealed(proof, self._prefix.read(RUN_LOG_FILE) or log)
        if not self._prefix.create(MANIFEST_FILE, proof.to_bytes()):
            found = self.find(proof.environment.conditions)
            assert found is not None, "it is there"
            proof = found[1]
        self.proof = proof
        self._prefix.drop_records()

    def _forgotten(self, lost: list[str]) -> TemporaryError:
        if isinstance(self._staging, Staging):
            self._staging.discard()
        return TemporaryError(
            f"{self.place}: shards that were sent are not there any more: {some(sorted(lost))}",
            fix="run the same command again; if tasks have made them, run those first",
        )


def find_output(prefix: Prefix, plan_digest: str, conditions: Mapping[str, Any]) -> Manifest | None:
    """Return the manifest of the finished output under a prefix, or None. Raises UsageError for one of another plan."""
    content = prefix.read(MANIFEST_FILE)
    if content is None:
        return None
    proof = manifest.parse(content, f"{prefix.place}/{MANIFEST_FILE}")
    known = proof.environment.conditions
    if proof.plan_digest != plan_digest or any(known.get(key) != conditions[key] for key in conditions):
        raise UsageError(
            f"{prefix.place} holds a finished output of another plan, or of other inputs or options",
            fix="choose another prefix with `--output`; an output in a bucket is not replaced",
        )
    prefix.drop_records()  # of a run that was killed before it did
    return proof


def work_folder(place: Bucket) -> Path:
    """Return where an output in a bucket is made: below the folder for temporary files, the same for every run, so that
    a run knows what another one left. Raises UsageError if somebody else has that folder."""
    folder = Path(tempfile.gettempdir(), f"skillmerge-{os.getuid()}")
    with disk_errors(folder, "set TMPDIR to another folder"):
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    if status.st_uid != os.getuid() or not stat.S_ISDIR(status.st_mode):
        raise UsageError(f"{folder} is not this user's folder", fix="set TMPDIR to another folder")
    return folder / sha256(str(place).encode()).hexdigest()[:16]
