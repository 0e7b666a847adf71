"""The verb shard: one task's share of a saved plan, made beside others without a lock."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skillmerge.brief import brief
from skillmerge.engine.destination import ShardRecord
from skillmerge.engine.runner import Job, Runner, Work, check_words, handed
from skillmerge.engine.runners.table import runner_for
from skillmerge.errors import OutputLocked, UsageError, machine_errors
from skillmerge.outputs.attempts import COMPLETE, FILES, Attempt, Records, staging_folder
from skillmerge.outputs.buckets.sending import work_folder
from skillmerge.outputs.journal import Header, Journal
from skillmerge.plans.budget import budget, check_disk
from skillmerge.plans.opening import Access
from skillmerge.plans.saved import SavedPlan
from skillmerge.plans.tasks.division import divide
from skillmerge.plans.tasks.part import part_of, refuse_problems
from skillmerge.recipes.source import RecipeSource
from skillmerge.reporter import Reporter, default_reporter
from skillmerge.verbs.source import read_source, source_name
from skillmerge.verbs.target import finished_output, output_bucket, output_folder
from skillmerge.verbs.tasks.buckets import make_in_bucket
from skillmerge.verbs.tasks.index import place_among
from skillmerge.version import __version__


@dataclass(frozen=True, slots=True)
class Shards:
    """The result of a task: its shards, all of which are recorded.

    index, of: which of how many tasks it was. made: the shards that this run made; the others were there, by whomever
    they were made. size: bytes of all its shards, as planned. device: where they were computed, "" if none was made.
    """

    output: Path
    index: int
    of: int
    shards: tuple[str, ...]
    made: tuple[str, ...]
    size: int
    seconds: float
    device: str = ""
    plan_digest: str = ""
    place: str = ""

    __repr__ = brief

    def as_dict(self) -> dict[str, Any]:
        return {
            "output": self.place or str(self.output),
            "index": self.index,
            "of": self.of,
            "shards": list(self.shards),
            "made": list(self.made),
            "bytes": self.size,
            "seconds": round(self.seconds, 3),
            "device": self.device.split(": ")[0],
            "plan_digest": self.plan_digest,
        }


@machine_errors()
def shard(
    plan: RecipeSource,
    output: str | os.PathLike[str] | None = None,
    *,
    index: int | None = None,
    of: int | None = None,
    device: str = "auto",
    threads: int | None = None,
    memory_limit: int | None = None,
    stats: str = "sampled",
    allow_nonfinite: bool = False,
    follow_links: bool = False,
    hub: str = "stream",
    reporter: Reporter | None = None,
) -> Shards:
    """Make one task's shards of a saved plan in the staging folder of an output, which `finish` completes.

    plan: path of a saved plan. output: the output folder; replaces `output.path`. index, of: which of how many tasks
    this is, counted from 0; without them what Slurm, AWS Batch, Kubernetes or torchrun say in the environment. Shards
    that are recorded already, by whomever, are left alone. Any number of processes may make the same shards at once.
    The other arguments are those of `apply`. Raises a subclass of SkillmergeError; see `skillmerge.errors`.
    """
    reporter = reporter or default_reporter()
    reporter.event("started", skillmerge=__version__, recipe=source_name(plan))
    check_words(device=device, threads=threads, memory_limit=memory_limit, stats=stats, hub=hub)
    started = time.monotonic()
    index, of = place_among(index, of, os.environ)
    saved = read_saved(plan)
    refuse_problems(saved)
    access = Access(follow_links, download=hub == "download", commits=saved.commits)
    bucket, sizes = output_bucket(saved.recipe, output), saved.sizes
    mine = tuple(divide(sizes, of)[index])
    task = Task(saved, mine, access, Work(device, threads, memory_limit), stats, allow_nonfinite)
    if bucket is not None:
        target = work_folder(bucket)
        device, made = make_in_bucket(saved, mine, access, task.work, task.conditions, bucket, reporter)
    else:
        target = output_folder(saved.recipe, output, {})
        device, made = task.run(target, reporter)
    size, seconds = sum(sizes[file] for file in mine), time.monotonic() - started
    place = str(bucket or "")
    return Shards(target, index, of, mine, made, size, seconds, device, saved.document["digest"], place)


def read_saved(plan: RecipeSource) -> SavedPlan:
    """Return a saved plan. Raises UsageError for anything else, which tasks could not agree on."""
    source = read_source(plan, None)
    if isinstance(source, SavedPlan):
        return source
    raise UsageError(
        f"{source_name(plan)} is a recipe, but tasks need a saved plan",
        fix=f"save it first: {source.command('plan')} -o plan.json",
    )


@dataclass(frozen=True, slots=True)
class Task:
    """The unit of work, as plain data: some shards of a saved plan, how models are reached, how to compute, and what is
    measured and allowed, which is the same for all tasks of an output."""

    saved: SavedPlan
    shards: tuple[str, ...]
    access: Access
    work: Work
    stats: str
    allow_nonfinite: bool

    @property
    def conditions(self) -> dict[str, Any]:
        return conditions(self.saved.document["versions"], self.stats, self.allow_nonfinite)

    def run(self, target: Path, reporter: Reporter) -> tuple[str, tuple[str, ...]]:
        """Make what is not recorded yet of the shards. Returns the device, and the shards that were made here."""
        digests = self.saved.digests()
        header = Header(digests[0], self.conditions)
        missing = self._missing(target, header, self.shards)
        return self._make(target, header, missing, reporter) if missing else ("", ())

    def _missing(self, target: Path, header: Header, shards: Sequence[str]) -> list[str]:
        """Return the shards that nobody has recorded."""
        folder = staging_folder(target)
        records = Records(folder, header)
        rows = Journal(folder / "journal.jsonl", "").read()
        journal = {row.file: row for row in rows if isinstance(row, ShardRecord)} if rows[:1] == [header] else {}

        def is_there(file: str) -> bool:
            found, places = records.read(file), (FILES, COMPLETE)  # or about to be published
            if found is None:
                return file in journal and any(records.fits(journal[file], place) for place in places)
            return any(records.holds(found, place) for place in places)

        missing = [file for file in shards if not is_there(file)]
        # Records go when the output is there, not before.
        done = (
            missing
            and finished_output(target, self.saved.document["digest"], header.conditions, hash_inputs=False) is not None
        )
        return [] if done else missing

    def _make(
        self, target: Path, header: Header, missing: Sequence[str], reporter: Reporter
    ) -> tuple[str, tuple[str, ...]]:
        """Make shards, unless others do meanwhile. Returns the device, and those that were made."""
        digests = (header.plan, self.saved.document["digest"])
        with part_of(self.saved, digests, missing, self.access) as (part, checkpoints):
            output_folder(self.saved.recipe, target, checkpoints)  # which may be none of its models
            reporter.event(
                "planned", plan=part.digest, output=str(target), tensors=len(part.tensors), shards=len(part.shards),
                bytes_read=part.bytes_read, bytes_written=part.bytes_written,
            )  # fmt: skip
            budget(part, threads=self.work.threads, memory_limit=self.work.memory_limit)
            try:
                with closing(Attempt(target, header)) as attempt, attempt.working():
                    needed = part.bytes_written // 2 if part.makes_skill else part.bytes_written
                    check_disk(attempt.folder, needed, "this task's share of the output")
                    job = Job(part, checkpoints, attempt, self.stats, self.allow_nonfinite)
                    device = _compute(job, attempt, runner_for(self.work, reporter), reporter)
                    return device, tuple(shard for shard in missing if shard in attempt.finished)
            except OutputLocked:
                # The run that finishes the output waits for no task whose shards others have made.
                if self._missing(target, header, missing):
                    raise
                return "", ()


def _compute(job: Job, attempt: Attempt, runner: Runner, reporter: Reporter) -> str:
    """Make the shards of a job, each recorded when it is durable. Returns the device."""

    def record(done: ShardRecord) -> None:
        if done.file not in attempt.finished:
            attempt.device = runner.device
            attempt.record(done)

    try:
        with handed(runner.run(job, job.plan.shards), record) as records:
            for done in records:
                record(done)
                reporter.event(
                    "shard_finished", file=done.file, size=done.size, sha256=done.sha256,
                    finished=len(attempt.finished), shards=len(job.plan.shards),
                )  # fmt: skip
    except KeyboardInterrupt as error:
        error.args = ("finished shards",) * bool(attempt.finished)
        raise
    return runner.device


def conditions(versions: Any, stats: str, allow_nonfinite: bool) -> dict[str, Any]:
    """Return the conditions under which shards belong together, as `apply` has them."""
    return {"inputs": versions, "stats": stats, "allow_nonfinite": allow_nonfinite}
