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
from skillmerge.engine.runner import Job, Work, check_words, handed
from skillmerge.engine.runners.table import runner_for
from skillmerge.errors import OutputLocked, UsageError, machine_errors
from skillmerge.outputs.attempts import COMPLETE, FILES, Attempt, Recorded, Records, staging_folder
from skillmerge.outputs.journal import Header, Journal
from skillmerge.plans.budget import budget, check_disk
from skillmerge.plans.opening import Access
from skillmerge.plans.saved import SavedPlan
from skillmerge.plans.tasks.division import divide
from skillmerge.plans.tasks.part import part_of, refuse_problems
from skillmerge.recipes.source import RecipeSource
from skillmerge.reporter import Reporter, default_reporter
from skillmerge.verbs.source import read_source, source_name
from skillmerge.verbs.target import finished_output, output_folder
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

    __repr__ = brief

    def as_dict(self) -> dict[str, Any]:
        return {
            "output": str(self.output),
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
    place = place_among(index, of, os.environ)
    saved = read_saved(plan)
    refuse_problems(saved)
    access = Access(follow_links, download=hub == "download", commits=saved.commits)
    task = _Task(
        saved, access, Work(device, threads, memory_limit), (stats, allow_nonfinite), reporter, time.monotonic()
    )
    return task.run(output_folder(saved.recipe, output, {}), *place)


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
class _Task:
    """One task: its plan, how models are reached, how it computes, and what is measured and allowed."""

    saved: SavedPlan
    access: Access
    work: Work
    measured: tuple[str, bool]
    reporter: Reporter
    started: float

    def run(self, target: Path, index: int, of: int) -> Shards:
        sizes = self.saved.sizes
        mine = divide(sizes, of)[index]
        digests = self.saved.digests()
        header = Header(digests[0], conditions(self.saved.document["versions"], *self.measured))
        missing = self._missing(target, header, digests[1], mine)
        device, made = self._make(target, header, digests, missing) if missing else ("", ())
        size = sum(sizes[file] for file in mine)
        seconds = time.monotonic() - self.started
        return Shards(target, index, of, tuple(mine), made, size, seconds, device, digests[1])

    def _missing(self, target: Path, header: Header, digest: str, mine: Sequence[str]) -> list[str]:
        """Return the shards that nobody has recorded."""
        folder = staging_folder(target)
        records = Records(folder, header)
        rows = Journal(folder / "journal.jsonl", "").read()
        journal = {row.file: row for row in rows if isinstance(row, ShardRecord)} if rows[:1] == [header] else {}

        def is_there(file: str) -> bool:
            found: Recorded | None = records.read(file)
            if found is None:
                return file in journal and records.fits(journal[file])
            return any(records.holds(found, place) for place in (FILES, COMPLETE))  # or about to be published

        missing = [file for file in mine if not is_there(file)]
        # Records go when the output is there, not before.
        done = missing and finished_output(target, digest, header.conditions, hash_inputs=False) is not None
        return [] if done else missing

    def _make(
        self, target: Path, header: Header, digests: tuple[str, str], missing: Sequence[str]
    ) -> tuple[str, tuple[str, ...]]:
        """Make shards, unless others do meanwhile. Returns the device, and those that were made."""
        with part_of(self.saved, digests, missing, self.access) as (part, checkpoints):
            output_folder(self.saved.recipe, target, checkpoints)  # which may be none of its models
            self.reporter.event(
                "planned", plan=part.digest, output=str(target), tensors=len(part.tensors), shards=len(part.shards),
                bytes_read=part.bytes_read, bytes_written=part.bytes_written,
            )  # fmt: skip
            budget(part, threads=self.work.threads, memory_limit=self.work.memory_limit)
            stats, allow_nonfinite = self.measured
            try:
                with closing(Attempt(target, header)) as attempt, attempt.working():
                    needed = part.bytes_written // 2 if part.makes_skill else part.bytes_written
                    check_disk(attempt.folder, needed, "this task's share of the output")
                    device = self._compute(Job(part, checkpoints, attempt, stats, allow_nonfinite), attempt)
                    return device, tuple(shard for shard in missing if shard in attempt.finished)
            except OutputLocked:
                # The run that finishes the output waits for no task whose shards others have made.
                if self._missing(target, header, part.digest, missing):
                    raise
                return "", ()

    def _compute(self, job: Job, attempt: Attempt) -> str:
        runner = runner_for(self.work, self.reporter)

        def record(done: ShardRecord) -> None:
            if done.file not in attempt.finished:
                attempt.device = runner.device
                attempt.record(done)

        try:
            with handed(runner.run(job, job.plan.shards), record) as records:
                for done in records:
                    record(done)
                    self.reporter.event(
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
