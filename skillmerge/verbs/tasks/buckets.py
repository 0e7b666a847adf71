"""Tasks whose output is in a bucket: each sends its shards and records them there, and `finish` takes the records."""

from __future__ import annotations

import socket
import time
import uuid
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from glob import escape
from typing import Any

from skillmerge.checkpoints.place import Bucket
from skillmerge.claim import is_held
from skillmerge.durable import remove_tree
from skillmerge.engine.destination import ShardRecord
from skillmerge.engine.runner import Job, Work, handed
from skillmerge.engine.runners.table import runner_for
from skillmerge.errors import UsageError
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
from skillmerge.verbs.tasks.collect import Waiting, as_tasks, prove_same

_LOOK = 5.0
"""Seconds between two listings of the records."""
_TASK = "task-"
_NEW = 60.0
"""Seconds that a folder is left alone in: its task may be about to lock it."""


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
    try:
        prefix.claim(header, BucketOutput.names(files))
        there = prefix.records(header, shards)
        missing = [file for file in shards if file not in there]
        if not missing:
            return "", ()
        with part_of(saved, digests, missing, access) as (part, checkpoints):
            reporter.event(
                "planned", plan=part.digest, output=str(place), tensors=len(part.tensors), shards=len(part.shards),
                bytes_read=part.bytes_read, bytes_written=part.bytes_written,
            )  # fmt: skip
            budget(part, threads=work.threads, memory_limit=work.memory_limit)
            sender = BucketOutput(part, place, files)
            with _own_folder(place, reporter) as staging:
                staging.begin(header.plan, dict(header.conditions), part.digest)
                check_disk(staging.folder, sender.disk_needed(part.bytes_written), "this task's share of the output")
                sender.attach(staging)
                job = Job(part, checkpoints, staging, given["stats"], given["allow_nonfinite"], sender.room)
                return _send_all(job, sender, work, reporter), tuple(missing)
    except UsageError:
        # Others may have made these shards meanwhile, and published: then there is nothing to work on, or to do.
        if find_output(prefix, digests[1], header.conditions) is None:
            raise
        return "", ()


@contextmanager
def _own_folder(place: Bucket, reporter: Reporter) -> Iterator[Staging]:
    """Yield a staging folder of this task alone: others may run beside it. What killed ones have left here goes: those
    of this machine, because locks of a folder that machines share may be each machine's own."""
    beside, here = work_folder(place).parent, f"@{socket.gethostname()}"
    for left in beside.glob(f"{_TASK}*{escape(here)}.partial"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > _NEW and not is_held(left, unknown=True):
                remove_tree(left)
    with closing(Staging(beside / f"{_TASK}{uuid.uuid4().hex}{here}", reporter)) as staging:
        try:
            yield staging
        finally:
            staging.discard()


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

    waiting: for the records of all shards. digest: of the plan. reread: believe no record without reading its shard.
    """

    def __init__(self, place: Bucket, reporter: Reporter, waiting: Waiting, digest: str, *, reread: bool) -> None:
        self.device = ""
        self._prefix, self._place = Prefix(place), place
        self._reporter, self._waiting, self._digest, self._reread = reporter, waiting, digest, reread

    def settle(self, target: Any, checks: Checks) -> Checks:
        """Return the checks with what the tasks measure and allow, which is theirs to say. Wait for the first."""
        owner = self._prefix.owner()
        while owner is None and self._waiting and not self._prefix.is_output():
            self._reporter.waiting(f"no task has begun on {self._place} yet")
            time.sleep(_LOOK)
            owner = self._prefix.owner()
        if owner is not None:
            return as_tasks(checks, owner.conditions)
        proof = find_output(self._prefix, self._digest, {})
        return as_tasks(checks, proof.environment.conditions if proof is not None else {})

    def begin(self, job: Job, staging: Staging, conditions: dict[str, object]) -> str | None:
        """Begin with nothing: the records are read when the sender is attached. Raises TemporaryError where no task has
        begun: to claim the prefix is for them, with what they are told to measure and allow."""
        if self._prefix.owner() is None:
            raise self._waiting.missing(job.plan, [shard.file for shard in job.plan.shards])
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
            there = self._prefix.records(staging.header, missing)
            for file in [file for file in missing if file in there]:
                missing.remove(file)
                if self._reread:
                    self._prefix.compare(there[file])
                yield there[file]
            if missing and not self._waiting:
                raise self._waiting.missing(plan, missing)
            if missing:
                self._reporter.waiting(_progress(plan, missing))
                time.sleep(_LOOK)
        if plan.makes_skill and any(tensor.action == "same" for tensor in plan.tensors.values()):
            prove_same(job, self._reporter)


def _progress(plan: Plan, missing: Collection[str]) -> str:
    return f"{len(plan.shards) - len(missing)}/{len(plan.shards)} shards"
