"""Tasks whose output is in a bucket: each sends its shards and records them there, and `finish` takes the records."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from skillmerge.checkpoints.place import Bucket
from skillmerge.engine.destination import ShardRecord
from skillmerge.engine.runner import Job, Work, handed
from skillmerge.engine.runners.table import runner_for
from skillmerge.outputs.buckets.prefix import Prefix
from skillmerge.outputs.buckets.sending import BucketOutput, find_output, work_folder
from skillmerge.outputs.journal import Header
from skillmerge.outputs.staging import Staging
from skillmerge.plans.budget import budget, check_disk
from skillmerge.plans.opening import Access
from skillmerge.plans.plan import Plan, ShardPlan
from skillmerge.plans.saved import SavedPlan
from skillmerge.plans.tasks.part import part_of
from skillmerge.reporter import Reporter
from skillmerge.verbs.records import Checks
from skillmerge.verbs.tasks.collect import missing_shards, prove_same

_LOOK = 5.0
"""Seconds between two listings of the records."""


def make_in_bucket(
    saved: SavedPlan,
    shards: Sequence[str],
    access: Access,
    work: Work,
    given: Mapping[str, Any],
    place: Bucket,
    reporter: Reporter,
) -> tuple[str, tuple[str, ...]]:
    """Make what is not recorded yet of some shards. given: the conditions of the task. Returns the device, and the
    shards that were made here."""
    digests = saved.digests()
    header = Header(digests[0], {**given, "only_on": str(place)})
    files = {*saved.sizes, *(row["name"] for row in saved.document["side_files"])}
    prefix = Prefix(place)
    if find_output(prefix, digests[1], header.conditions) is not None:
        return "", ()
    prefix.claim(header, BucketOutput.names(files))
    there = prefix.records(header)
    missing = [file for file in shards if file not in there]
    if not missing:
        return "", ()
    with part_of(saved, digests, missing, access) as (part, checkpoints):
        reporter.event(
            "planned", plan=part.digest, output=str(place), tensors=len(part.tensors), shards=len(part.shards),
            bytes_read=part.bytes_read, bytes_written=part.bytes_written,
        )  # fmt: skip
        budget(part, threads=work.threads, memory_limit=work.memory_limit)
        # Its own, because tasks may run beside each other.
        with tempfile.TemporaryDirectory(dir=work_folder(place).parent) as folder:
            sender = BucketOutput(part, place, files)
            with closing(Staging(Path(folder, "task"), reporter)) as staging:
                staging.begin(header.plan, dict(header.conditions), part.digest)
                check_disk(staging.folder, sender.disk_needed(part.bytes_written), "this task's share of the output")
                sender.attach(staging)
                job = Job(part, checkpoints, staging, given["stats"], given["allow_nonfinite"], sender.room)
                device = _send_all(job, sender, work, reporter)
                staging.discard()
    return device, tuple(missing)


def _send_all(job: Job, sender: BucketOutput, work: Work, reporter: Reporter) -> str:
    runner, staging = runner_for(work, reporter), job.destination
    missing = [shard for shard in job.plan.shards if shard.file not in staging.finished]
    try:
        with handed(runner.run(job, missing), staging.record) as records:
            for done in records:
                staging.record(done)
                reporter.event(
                    "shard_finished", file=done.file, size=done.size, sha256=done.sha256,
                    finished=len(staging.finished), shards=len(job.plan.shards),
                )  # fmt: skip
                sender.send(done)
        sender.settle(failed=False)
    except BaseException:
        sender.settle(failed=True)
        raise
    return runner.device


class BucketCollector:
    """The runner of `finish` for an output in a bucket; see `Collector`, and `engine.runner.Runner`.

    reread: believe no record without reading its shard.
    """

    def __init__(self, place: Bucket, reporter: Reporter, *, wait: bool, reread: bool) -> None:
        self.device = ""
        self._prefix, self._place = Prefix(place), place
        self._reporter, self._wait, self._reread = reporter, wait, reread

    def settle(self, target: Any, checks: Checks) -> Checks:
        """Return the checks with what the tasks measure and allow, which is theirs to say. Wait for the first."""
        owner = self._prefix.owner()
        while owner is None and self._wait and not self._prefix.is_output():
            self._reporter.waiting(f"no task has begun on {self._place} yet")
            time.sleep(_LOOK)
            owner = self._prefix.owner()
        if owner is None:
            return checks
        stats, nonfinite = owner.conditions.get("stats"), owner.conditions.get("allow_nonfinite")
        return replace(checks, stats=str(stats or checks.stats), allow_nonfinite=bool(nonfinite))

    def begin(self, job: Job, staging: Staging, conditions: dict[str, object]) -> str | None:
        """Begin with nothing: the records are read when the sender is attached."""
        return staging.begin(job.plan.weights_digest, conditions, job.plan.digest)

    def run(self, job: Job, shards: Sequence[ShardPlan]) -> Generator[ShardRecord, None, None]:
        staging, plan = job.destination, job.plan
        assert isinstance(staging, Staging)
        assert staging.header is not None
        if self._reread:
            for done in staging.finished.values():
                self._prefix.compare(done)
        missing = [shard.file for shard in shards]
        while missing:
            there = self._prefix.records(staging.header)
            for file in [file for file in missing if file in there]:
                missing.remove(file)
                if self._reread:
                    self._prefix.compare(there[file])
                yield there[file]
            if missing and not self._wait:
                raise missing_shards(plan, missing)
            if missing:
                self._reporter.waiting(_progress(plan, missing))
                time.sleep(_LOOK)
        if plan.makes_skill and any(tensor.action == "same" for tensor in plan.tensors.values()):
            prove_same(job, self._reporter)


def _progress(plan: Plan, missing: Collection[str]) -> str:
    return f"{len(plan.shards) - len(missing)}/{len(plan.shards)} shards"
