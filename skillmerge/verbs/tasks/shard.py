"""The verb shard: one task's share of a saved plan, made beside others without a lock."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skillmerge.brief import brief
from skillmerge.durable import is_taken
from skillmerge.engine.destination import ShardRecord
from skillmerge.engine.runner import Job, Runner, Work, check_words, handed
from skillmerge.engine.runners.table import runner_for
from skillmerge.errors import OutputLocked, UsageError, machine_errors
from skillmerge.outputs.attempts import COMPLETE, FILES, Attempt, Overtaken, Records, staging_folder
from skillmerge.outputs.buckets.sending import work_folder
from skillmerge.outputs.journal import Header, Journal
from skillmerge.outputs.tasks.headers import keep
from skillmerge.plans.budget import budget, check_disk
from skillmerge.plans.opening import Access
from skillmerge.plans.plan import Plan
from skillmerge.plans.saved import SavedPlan
from skillmerge.plans.tasks.division import share_of
from skillmerge.plans.tasks.part import part_of, refuse_problems
from skillmerge.recipes.source import RecipeSource
from skillmerge.reporter import Reporter, default_reporter
from skillmerge.study.gate_obstacles import IN_A_BUCKET, NO_LOCAL, refuse_options
from skillmerge.verbs.elsewhere import into_a_bucket
from skillmerge.verbs.records import Checks, Publish
from skillmerge.verbs.source import read_source, source_name
from skillmerge.verbs.target import finished_output, output_bucket, output_folder, refuse_existing
from skillmerge.verbs.tasks.buckets import make_in_bucket
from skillmerge.verbs.tasks.index import place_among
from skillmerge.version import __version__

if TYPE_CHECKING:
    from skillmerge.outputs.hub.push import MergePush


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
    push: str | None = None,
    no_local: bool = False,
    private: bool | None = None,
    revision: str | None = None,
    reporter: Reporter | None = None,
) -> Shards:
    """Make one task's shards of a saved plan in the staging folder of an output, which `finish` completes.

    plan: path of a saved plan. output: the output folder; replaces `output.path`. index, of: which of how many tasks
    this is, counted from 0; without them what Slurm, AWS Batch, Kubernetes or torchrun say in the environment. Shards
    that are recorded already, by whomever, are left alone. Any number of processes may make the same shards at once.
    no_local: upload each shard to the repository `push`, which `finish` commits, and keep only its record. The other
    arguments are those of `apply`. Raises a subclass of SkillmergeError; see `skillmerge.errors`.
    """
    reporter = reporter or default_reporter()
    reporter.event("started", skillmerge=__version__, recipe=source_name(plan))
    check_words(index=index, of=of, device=device, threads=threads, memory_limit=memory_limit, stats=stats, hub=hub)
    started = time.monotonic()
    index, of = place_among(index, of, os.environ)
    saved = read_saved(plan)
    refuse_problems(saved)
    publish = _publish_of(saved, Publish(False, push, no_local, private, revision))
    bucket, sizes = output_bucket(saved.recipe, output), saved.sizes
    if bucket is not None:
        into_a_bucket(saved, publish, Checks())
    refuse_options(saved.recipe.gates, stats, IN_A_BUCKET if bucket is not None else NO_LOCAL if no_local else None)
    access = Access(follow_links, download=hub == "download", commits=saved.commits)
    mine = share_of(sizes, index, of)
    task = Task(saved, mine, access, Work(device, threads, memory_limit), stats, allow_nonfinite, publish)
    target = output_folder(saved.recipe, output, {}) if bucket is None else work_folder(bucket)
    if bucket is None:
        device, made = task.run(target, reporter)
    else:
        device, made = make_in_bucket(saved, mine, access, task.work, task.conditions, bucket, reporter)
    size, seconds = sum(sizes[file] for file in mine), time.monotonic() - started
    return Shards(target, index, of, mine, made, size, seconds, device, saved.document["digest"], str(bucket or ""))


def read_saved(plan: RecipeSource) -> SavedPlan:
    """Return a saved plan. Raises UsageError for anything else, which tasks could not agree on."""
    source = read_source(plan, None)
    if isinstance(source, SavedPlan):
        return source
    raise UsageError(
        f"{source_name(plan)} is a recipe, but tasks need a saved plan",
        fix=f"save it first: {source.command('plan')} -o plan.json",
    )


def _publish_of(saved: SavedPlan, publish: Publish) -> Publish:
    """Return where shards go, if not into the staging folder. Raises UsageError."""
    if not publish.no_local:
        if publish.repository is not None:
            raise UsageError(
                "a task publishes nothing: `--push` is where `--no-local` uploads shards",
                fix="pass `--no-local` too, or pass `--push` to `skillmerge finish` alone",
            )
        return Publish()
    asked = saved.recipe.output.push
    repository = publish.repository or (asked.repository if asked is not None else None)
    if repository is None:
        raise UsageError("`--no-local` without a push would leave no output", fix="pass `--push org/name`")
    return replace(publish, repository=repository)


@dataclass(frozen=True, slots=True)
class Task:
    """The unit of work, as plain data: some shards of a saved plan, how models are reached, how to compute, and what is
    measured and allowed and where shards are uploaded, which is the same for all tasks of an output."""

    saved: SavedPlan
    shards: tuple[str, ...]
    access: Access
    work: Work
    stats: str
    allow_nonfinite: bool
    publish: Publish = field(default_factory=Publish)

    @property
    def conditions(self) -> dict[str, Any]:
        only_on = self.publish.repository if self.publish.no_local else None
        return conditions(self.saved.document["versions"], self.stats, self.allow_nonfinite, only_on)

    def run(self, target: Path, reporter: Reporter) -> tuple[str, tuple[str, ...]]:
        """Make what is not recorded yet of the shards. Returns the device, and the shards that were made here."""
        digests = self.saved.digests()
        header = Header(digests[0], self.conditions)
        device, made = "", set[str]()
        while missing := self._missing(target, header, self.shards):
            try:
                device = self._make(target, header, missing, reporter, made)
                break
            except Overtaken:
                continue  # with what the others have left
        return device, tuple(shard for shard in self.shards if shard in made)

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
        return missing if missing and not self._is_published(target, header) else []

    def _is_published(self, target: Path, header: Header) -> bool:
        digest = self.saved.document["digest"]
        return finished_output(target, digest, header.conditions, hash_inputs=False) is not None

    def _make(self, target: Path, header: Header, missing: Sequence[str], reporter: Reporter, made: set[str]) -> str:
        """Make shards, unless others do meanwhile, and add them to `made`. Returns the device."""
        digests = (header.plan, self.saved.document["digest"])
        with part_of(self.saved, digests, missing, self.access) as (part, checkpoints):
            output_folder(self.saved.recipe, target, checkpoints)  # which may be none of its models
            reporter.event(
                "planned", plan=part.digest, output=str(target), tensors=len(part.tensors), shards=len(part.shards),
                bytes_read=part.bytes_read, bytes_written=part.bytes_written,
            )  # fmt: skip
            budget(part, threads=self.work.threads, memory_limit=self.work.memory_limit)
            push = self._push_of(part)
            if push is None:
                _look_at_existing(target, reporter)
            elif push.find(header.conditions) is not None:
                return ""
            try:
                with closing(Attempt(target, header)) as attempt, attempt.working():
                    if push is None and self._is_published(target, header):
                        attempt.withdraw()
                        return ""
                    keep(attempt.folder, attempt.files, checkpoints.values())
                    needed = part.bytes_written // 2 if part.makes_skill else part.bytes_written
                    needed = push.disk_needed(needed) if push is not None else needed
                    check_disk(attempt.folder, needed, "this task's share of the output")
                    room = push.room if push is not None else None
                    job = Job(part, checkpoints, attempt, self.stats, self.allow_nonfinite, room)
                    try:
                        return _compute(job, attempt, runner_for(self.work, reporter), reporter, push)
                    finally:
                        made.update(attempt.finished)
            except OutputLocked:
                # The run that finishes the output waits for no task whose shards others have made. By then a file may
                # be another task's than its record says: their bytes are the same.
                records = Records(staging_folder(target), header)
                unknown = any(records.read(file) is None for file in missing)
                if unknown and self._missing(target, header, missing):
                    raise
                return ""

    def _push_of(self, part: Plan) -> MergePush | None:
        if not self.publish.no_local:
            return None
        from skillmerge.outputs.hub.push import MergePush

        options = {name: getattr(self.publish, name) for name in ("private", "revision", "pull_request", "message")}
        return MergePush(part, self.publish.repository, True, options, commits=False)


def _look_at_existing(target: Path, reporter: Reporter) -> None:
    """Warn of an output that `finish` would have to replace. Raises UsageError for what it never replaces."""
    refuse_existing(target, overwrite=True)
    if is_taken(target):
        reporter.warn(
            f"output `{target}` already exists", "pass `--overwrite` to `skillmerge finish`, which will replace it"
        )


def _compute(job: Job, attempt: Attempt, runner: Runner, reporter: Reporter, push: MergePush | None) -> str:
    """Make the shards of a job, each recorded when it is durable, or uploaded. Returns the device."""

    def record(done: ShardRecord) -> None:
        attempt.device = runner.device
        if push is None and done.file not in attempt.finished:
            attempt.record(done)

    try:
        if push is not None:
            push.attach(attempt)
        with handed(runner.run(job, job.plan.shards), record) as records:
            for done in records:
                record(done)
                if push is not None:
                    push.send(done)
                reporter.event(
                    "shard_finished", file=done.file, size=done.size, sha256=done.sha256,
                    finished=len(attempt.finished), shards=len(job.plan.shards),
                )  # fmt: skip
        if push is not None:
            push.settle(failed=False)
    except BaseException as error:
        if push is not None:
            push.settle(failed=True)
        if isinstance(error, KeyboardInterrupt):
            error.args = ("finished shards",) * bool(attempt.finished)
        raise
    return runner.device


def conditions(versions: Any, stats: str, allow_nonfinite: bool, only_on: str | None = None) -> dict[str, Any]:
    """Return the conditions under which shards belong together, as `apply` has them."""
    found = {"inputs": versions, "stats": stats, "allow_nonfinite": allow_nonfinite}
    return {**found, "only_on": only_on} if only_on is not None else found
