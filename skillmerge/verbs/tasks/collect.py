"""The shards that tasks make, as those of a runner that computes nothing: it waits for their records, or names those
that are missing."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from skillmerge.engine.destination import ShardRecord
from skillmerge.engine.runner import Job, Runner
from skillmerge.errors import SkillmergeError, TemporaryError, some
from skillmerge.outputs import manifest
from skillmerge.outputs.attempts import ATTEMPTS, conditions_of, owner_of, staging_folder
from skillmerge.outputs.staging import MANIFEST_FILE, Staging
from skillmerge.outputs.tasks.news import Making, being_made
from skillmerge.plans.budget import budget
from skillmerge.plans.plan import Plan, ShardPlan
from skillmerge.reporter import Reporter
from skillmerge.tensors import format_bytes
from skillmerge.verbs.records import Checks

PATIENCE = 3.0
"""Seconds until a record that is not seen is said to be missing: a network filesystem may show it late."""
LOOK = 0.5
"""Seconds between two looks at the records."""
_SILENCE = 60.0
"""Seconds without news of a shard until its task counts as gone, in what is shown."""


class Waiting:
    """How long tasks are waited for: not at all, until all shards are there, or for `limit` seconds from now on."""

    def __init__(self, wait: bool, limit: float | None = None) -> None:
        self._limit = limit
        self._end = time.monotonic() + (limit if limit is not None else math.inf if wait else -math.inf)

    def __bool__(self) -> bool:
        return time.monotonic() < self._end

    def missing(self, plan: Plan, missing: Collection[str]) -> TemporaryError:
        """Return the error for shards that are not waited for any longer."""
        count, after, option = len(missing), "", "`--wait`"
        if self._limit is not None:
            after, option = f" after {_time(self._limit)}", "a longer `--wait-limit`"
        return TemporaryError(
            f"{count} of {len(plan.shards)} shards {'is' if count == 1 else 'are'} missing{after}: "
            f"{some(list(missing))}",
            fix=f"run their tasks again, then the same command; or pass {option}",
        )


class Tasks(Runner, Protocol):
    """What makes shards elsewhere: the runner of `finish`, whether the output is a folder or in a bucket."""

    def settle(self, target: Any, checks: Checks) -> Checks:
        """Return the checks with what the tasks measure and allow, which is theirs to say. Wait for the first."""

    def begin(self, job: Job, staging: Staging, conditions: dict[str, object]) -> str | None:
        """Take what the tasks have made. Returns a note for the user, if there is one."""


class Collector:
    """The runner of `finish`; see `engine.runner.Runner` for its interface.

    waiting: for the records of all shards. digest: of the plan. reread: believe no record without reading its file.
    overwrite: the output may replace another plan's.
    """

    def __init__(
        self, reporter: Reporter, waiting: Waiting, digest: str, *, reread: bool = False, overwrite: bool = False
    ) -> None:
        self.device = ""
        self.seconds: list[float] = []
        """How long each of the shards took that were found."""
        self._reporter, self._waiting, self._reread = reporter, waiting, reread
        self._digest, self._overwrite = digest, overwrite

    def settle(self, target: Path, checks: Checks) -> Checks:
        """Return the checks with what the tasks measure and allow, which is theirs to say. Wait for the first, unless
        there is an output already."""
        owner = owner_of(staging_folder(target))
        replaced = _version(target) if self._overwrite and not self._made(target) else None
        while owner is None and self._waiting and _version(target) in (None, replaced):
            self._reporter.waiting(f"no task has begun on {target} yet")
            time.sleep(LOOK)
            owner = owner_of(staging_folder(target))
        return as_tasks(checks, owner.conditions if owner is not None else self._made(target))

    def _made(self, target: Path) -> Mapping[str, Any]:
        """Return the conditions under which an output of this plan was made; none if there is no such output."""
        with suppress(SkillmergeError):
            found = manifest.read(target)
            if found.plan_digest == self._digest:
                return found.environment.conditions
        return {}

    def begin(self, job: Job, staging: Staging, conditions: dict[str, object]) -> str | None:
        """Take what the tasks have made. Returns a note for the user, if there is one."""
        return staging.begin_beside_tasks(job.plan.weights_digest, conditions, self._reread)

    def run(self, job: Job, shards: Sequence[ShardPlan]) -> Generator[ShardRecord, None, None]:
        staging, plan = job.destination, job.plan
        assert isinstance(staging, Staging)
        missing, started = {shard.file: shard.size for shard in shards}, time.monotonic()
        progress = _Progress(plan)
        while True:
            for file in list(missing):
                if (found := self._find(staging, file)) is not None:
                    del missing[file]
                    yield found
            if not missing:
                break
            if self._waiting:
                self._reporter.waiting(progress.text(staging, missing))
            elif time.monotonic() - started > PATIENCE or conditions_of(staging.folder) is None:
                raise self._waiting.missing(plan, missing)
            self.pause(staging, missing)
        staging.leave_tasks_out()
        assert staging.tasks is not None
        self.device = ", ".join(sorted({device for device in staging.tasks.devices.values() if device}))
        if plan.makes_skill and any(tensor.action == "same" for tensor in plan.tensors.values()):
            prove_same(job, self._reporter)

    def pause(self, staging: Staging, missing: Collection[str]) -> None:
        """Let some time pass before the records are looked at again."""
        time.sleep(LOOK)

    def _find(self, staging: Staging, shard: str) -> ShardRecord | None:
        """Return a shard's record if its file is what it says. Another file is dropped, to be made again."""
        assert staging.tasks is not None
        found = staging.tasks.read(shard)
        if found is None:
            return None
        believed = not self._reread and staging.tasks.holds(found)
        if believed or staging.is_intact(found.record):
            self.seconds.append(found.seconds)
            return found.record
        self._reporter.note(f"{shard} is damaged, and has to be made again")
        staging.tasks.drop(shard)
        return None


def as_tasks(checks: Checks, conditions: Mapping[str, Any]) -> Checks:
    """Return checks with what tasks with these conditions measure and allow."""
    stats, nonfinite = conditions.get("stats", checks.stats), conditions.get("allow_nonfinite", checks.allow_nonfinite)
    return replace(checks, stats=str(stats), allow_nonfinite=bool(nonfinite))


def _version(output: Path) -> object:
    """Return what tells an output from another one in its place; None if there is none."""
    try:
        status = (output / MANIFEST_FILE).stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def prove_same(job: Job, reporter: Reporter) -> None:
    """Prove what belongs to no shard of a skill, and so to no task: tensors that must be the same in all models."""
    from skillmerge.engine.device import choose_device
    from skillmerge.engine.skill_shards import prove_same
    from skillmerge.engine.worker import Settings

    chosen = budget(job.plan, threads=None, memory_limit=None)
    settings = Settings(choose_device("cpu")[0], chosen, job.stats, job.allow_nonfinite, reporter.warn)
    prove_same(job.plan, job.checkpoints, settings)


class _Progress:
    """How far tasks are, in a line."""

    def __init__(self, plan: Plan) -> None:
        self._sizes = {shard.file: shard.size for shard in plan.shards}
        self._before: int | None = None
        self._since = time.monotonic()
        self._news: dict[str, tuple[object, float]] = {}

    def text(self, staging: Staging, missing: Mapping[str, int]) -> str:
        making = [it for shard, it in being_made(staging.folder / ATTEMPTS).items() if shard in missing]
        living = [it for it in making if self._lives(it)]
        total, now = sum(self._sizes.values()), time.monotonic()
        left = sum(missing.values()) - sum(min(it.written, missing[it.shard]) for it in living)
        if self._before is None:
            self._before = left
        parts = [f"{len(self._sizes) - len(missing)}/{len(self._sizes)} shards", _of(total - left, total)]
        if (speed := int((self._before - left) / max(1e-3, now - self._since))) > 0:
            parts.append(f"{format_bytes(speed)}/s")
        if tasks := len({it.attempt for it in living}):
            parts.append(f"{tasks} task{'' if tasks == 1 else 's'}")
        if making:
            slowest = min(making, key=lambda it: it.since)
            shard = slowest.shard.removesuffix(".safetensors")
            parts.append(f"slowest {shard} ({slowest.host}, {_time(time.time() - slowest.since)})")
        return ", ".join(parts)

    def _lives(self, it: Making) -> bool:
        """Return whether a task has given news lately, by the clock of this machine."""
        news, now = (it.since, it.written), time.monotonic()
        if self._news.get(it.shard, (None,))[0] != news:
            self._news[it.shard] = (news, now)
        return now - self._news[it.shard][1] < _SILENCE


def _of(part: int, total: int) -> str:
    """Return `1.2 of 2.0 TB`; with both units where they differ."""
    first, last = format_bytes(part), format_bytes(total)
    unit = last.rpartition(" ")[2]
    return f"{first.removesuffix(f' {unit}')} of {last}"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{max(0, seconds):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{round(seconds / 3600, 1):g} h"
