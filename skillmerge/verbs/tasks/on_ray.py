"""The runner of `apply --on`: tasks on a Ray cluster make the shards, and their records say what is done.

Nothing depends on what Ray believes of a node: a task that was thought dead makes the same bytes as its second copy.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from skillmerge.engine.destination import ShardRecord
from skillmerge.engine.runner import Job, Work
from skillmerge.errors import ResourceError, StalePlan, UsageError, machine_errors, some
from skillmerge.outputs.attempts import ATTEMPTS, Records, conditions_of, owner_of, staging_folder
from skillmerge.outputs.journal import Header
from skillmerge.outputs.staging import Staging
from skillmerge.outputs.tasks.news import being_made
from skillmerge.plans import saved as savedplan
from skillmerge.plans.opening import Access
from skillmerge.plans.plan import ShardPlan
from skillmerge.plans.saved import SavedPlan
from skillmerge.plans.tasks.division import divide
from skillmerge.recipes.recipe import Recipe
from skillmerge.reporter import Reporter
from skillmerge.verbs.records import Checks
from skillmerge.verbs.target import output_bucket
from skillmerge.verbs.tasks.cluster import Cluster, this_node
from skillmerge.verbs.tasks.collect import LOOK, PATIENCE, Collector, Waiting
from skillmerge.verbs.tasks.shard import Task

WORK = 8 << 30
"""Bytes that a task writes, at least: some 30 seconds over a network."""
_EVEN = 4
"""Tasks for each place at least, so that all places have work to the end, and a lost one costs little."""
SLOW, SHORT = 3.0, 10.0
"""A shard that takes so many times the median, and so many seconds at least, is made a second time."""
_SHARED = "choose a folder with `--output` that this process and all nodes share, under the same path"


class OnRay(Collector):
    """See `engine.runner.Runner` for the interface."""

    def __init__(
        self,
        on: str,
        source: Recipe | SavedPlan,
        output: str | os.PathLike[str] | None,
        access: Access,
        work: Work,
        reporter: Reporter,
    ) -> None:
        """on: the cluster, as `Cluster` has it. Raises UsageError for an output in a bucket."""
        super().__init__(reporter, Waiting(True), "")
        bucket = output_bucket(source if isinstance(source, Recipe) else source.recipe, output)
        if bucket is not None:
            raise UsageError(f"the output {bucket} is in a bucket, and tasks of `--on` share a folder", fix=_SHARED)
        self._on, self._source, self._access, self._work = on, source, access, work
        self._running: dict[Any, _Copy] = {}
        self._again: set[str] = set()
        """Shards whose tasks have ended without a record, and that a second task has been given."""
        self._changed = time.time()
        """When a task began or ended last."""

    def settle(self, target: Any, checks: Checks) -> Checks:
        return checks  # they are this run's to say

    def begin(self, job: Job, staging: Staging, conditions: dict[str, object]) -> str | None:
        """Take what tasks of this plan have made. What is of another plan is dropped, as by `apply` on one machine."""
        header = self._header = Header(job.plan.weights_digest, conditions)
        owner, dropped = owner_of(staging.folder), None
        if owner is not None and owner != header:
            dropped = staging.begin(header.plan, conditions)
        remark = super().begin(job, staging, conditions)
        there = f"continuing an interrupted run: {len(staging.finished)} finished already"
        return dropped or remark or (there if staging.finished else None)

    def run(self, job: Job, shards: Sequence[ShardPlan]) -> Generator[ShardRecord, None, None]:
        staging = job.destination
        assert isinstance(staging, Staging)
        if not shards:  # earlier tasks have made them all
            yield from super().run(job, shards)
            return
        with closing(Cluster(self._on, self._work.threads, self._work.device)) as self._cluster:
            staging.admit_tasks(self._header)
            try:
                self._start(job, staging, {shard.file: shard.size for shard in shards})
                yield from super().run(job, shards)
            except BaseException:
                staging.dismiss_tasks()
                raise
            finally:
                self._cluster.cancel(self._running, kill=True)

    def _start(self, job: Job, staging: Staging, sizes: Mapping[str, int]) -> None:
        """Give all shards to tasks, the largest first."""
        cluster, source = self._cluster, self._source
        saved = source if isinstance(source, SavedPlan) else _saved(job)
        access = replace(self._access, commits=saved.commits)
        work = replace(self._work, device=cluster.device, threads=cluster.threads)
        task = Task(saved, (), access, work, job.stats, job.allow_nonfinite)
        self._making = cluster.share(Making(task, staging.output))
        places = cluster.find_places(self._reporter)
        parts = divide(sizes, max(_EVEN * places, sum(sizes.values()) // WORK, 1))
        for part in sorted(parts, key=lambda part: -sum(sizes[shard] for shard in part)):
            if part:
                self._submit(part)

    def _submit(self, shards: Sequence[str], avoid: Collection[str] = (), **known: bool) -> None:
        task = self._cluster.submit(self._making, tuple(shards), avoid=avoid)
        self._running[task] = _Copy(tuple(shards), **known)
        self._changed = time.time()

    def pause(self, staging: Staging, missing: Collection[str]) -> None:
        """Wait until a task has ended. Raises what it has raised, unless another task has done its work."""
        records = Records(staging.folder, self._header)
        if not self._running:
            super().pause(staging, missing)
        for task in self._cluster.ended(self._running, LOOK) if self._running else ():
            copy, self._changed = self._running.pop(task), time.time()
            wanted = [shard for shard in copy.shards if shard in missing and not records.read(shard)]
            try:
                for message, fix in self._cluster.result(task):
                    self._reporter.warn(message, fix)
            except ResourceError as error:
                if wanted and copy.moved:
                    raise
                if wanted:
                    self._submit(wanted, avoid={getattr(error, "node", "")} - {""}, moved=True, twice=copy.twice)
            except StalePlan as error:
                if wanted:
                    raise self._in_words(error) from None
            except Exception:  # of any kind, it is no matter where another task has made the same shards
                if wanted:
                    raise
        self._make_up(staging, missing)
        self._help_slow(staging, missing)

    def _in_words(self, error: StalePlan) -> StalePlan:
        """Return the error as the source has it: a recipe is planned again by the next run."""
        if isinstance(self._source, SavedPlan):
            return error
        return StalePlan(error.message.replace("is stale", "was planned from other files"), fix="rerun, to plan again")

    def _make_up(self, staging: Staging, missing: Collection[str]) -> None:
        """Give shards to a task again that none makes any more. Raises UsageError where that was in vain."""
        lost = set(missing) - {shard for copy in self._running.values() for shard in copy.shards}
        if not lost or time.time() - self._changed < PATIENCE:
            return
        if lost & self._again:
            what = f"tasks have ended, but {some(sorted(lost))} cannot be seen in {staging.folder}"
            raise UsageError(what, fix=_SHARED)
        self._again |= lost
        self._submit(sorted(lost))

    def _help_slow(self, staging: Staging, missing: Collection[str]) -> None:
        """Run a second copy of tasks that are far slower than the others, once there are free places for it."""
        if not self.seconds or len(self._running) >= self._cluster.places:
            return
        making, now = being_made(staging.folder / ATTEMPTS), time.time()
        late = max(SLOW * statistics.median(self.seconds), SHORT)
        for copy in [copy for copy in self._running.values() if not copy.twice]:
            left = [shard for shard in copy.shards if shard in missing]
            begun = [making[shard] for shard in left if shard in making]
            since = min((it.since for it in begun), default=self._changed)
            if left and now - since > late:
                copy.twice = True
                hosts = {it.host for it in begun}
                self._submit(left, avoid={node for host in hosts for node in self._cluster.nodes_of(host)}, twice=True)
                self._reporter.say(f"making {some(left)} a second time: {', '.join(sorted(hosts)) or 'a node'} is slow")


@dataclass(slots=True)
class _Copy:
    """A task that runs. moved: it was sent to another node. twice: there is a second one, or this is it."""

    shards: tuple[str, ...]
    moved: bool = False
    twice: bool = False


@dataclass(frozen=True, slots=True)
class Making:
    """What runs on a node: some shards of a plan, in the staging folder that the driver has prepared."""

    task: Task
    target: Path

    def __call__(self, shards: tuple[str, ...]) -> list[tuple[str, str | None]]:
        """Make shards, unless they are recorded. Returns warnings."""
        reporter = _Warnings()
        try:
            with machine_errors():
                self._find_folder()
                replace(self.task, shards=shards).run(self.target, reporter)
        except ResourceError as error:
            error.__dict__["node"] = this_node()
            raise
        return reporter.found

    def _find_folder(self) -> None:
        """Raise UsageError if the driver's folder is not here. A network filesystem may show it late."""
        folder, until = staging_folder(self.target), time.monotonic() + PATIENCE
        while conditions_of(folder) is None:
            if time.monotonic() > until:
                raise UsageError(f"a node of the cluster does not see {folder}", fix=_SHARED)
            time.sleep(LOOK)


class _Warnings(Reporter):
    """Keeps warnings with their advice."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str | None]] = []

    def show_warning(self, message: str, fix: str | None) -> None:
        self.found.append((message, fix))


def _saved(job: Job) -> SavedPlan:
    """Return the plan of a recipe as if it had been saved."""
    text = json.dumps(savedplan.describe(job.plan))
    return savedplan.parse(text, Path(job.plan.recipe.document.name))
