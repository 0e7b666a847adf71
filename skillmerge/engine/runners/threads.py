"""The runner that computes in threads of this process, on the CPU or one CUDA device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import closing, nullcontext

from skillmerge.checkpoints.views.spooled import spooled
from skillmerge.engine.destination import ShardRecord
from skillmerge.engine.runner import Job, Work
from skillmerge.engine.warm_up import reading_ahead, signals_waiting
from skillmerge.plans.budget import budget
from skillmerge.plans.plan import Plan, ShardPlan
from skillmerge.reporter import Reporter


class Threads:
    """The threads runner; see `engine.runner.Runner` for its interface."""

    def __init__(self, work: Work, reporter: Reporter) -> None:
        self.device = ""
        self._work, self._reporter = work, reporter

    def run(self, job: Job, shards: Sequence[ShardPlan]) -> Generator[ShardRecord, None, None]:
        plan, work = job.plan, self._work
        # torch takes seconds to import, so everything that can fail without it has been tried by now. Meanwhile the
        # disk reads ahead.
        with signals_waiting(), reading_ahead(plan, job.checkpoints, shards):
            from skillmerge.engine.device import choose_device
            from skillmerge.engine.shards import merge_shards
            from skillmerge.engine.skill_shards import cut_shards
            from skillmerge.engine.worker import Settings

        where, why = choose_device("cpu" if plan.makes_skill else work.device)
        why = "skills are extracted on the CPU" if plan.makes_skill else why
        self.device = f"{where}: {why}"
        self._reporter.say(f"computing on {self.device}")
        chosen = budget(plan, threads=work.threads, memory_limit=work.memory_limit, cuda=where.type == "cuda")
        settings = Settings(where, chosen, job.stats, job.allow_nonfinite, self._reporter.warn)
        before = sum(_weights(shard) for shard in plan.shards if shard.file in job.destination.finished)
        checkpoints, spool = spooled(job.checkpoints, _read_again(shards, plan), job.destination.folder)
        with (
            closing(spool) if spool else nullcontext(),
            self._reporter.bar(before + sum(map(_weights, shards))) as progress,
        ):

            def moved(count: int) -> None:
                progress(before + count)

            if plan.makes_skill:
                yield from cut_shards(plan, checkpoints, job.destination, settings, shards, moved, job.room)
            else:
                yield from merge_shards(plan, checkpoints, job.destination, settings, shards, moved, job.room)


def _read_again(shards: Sequence[ShardPlan], plan: Plan) -> dict[str, Counter[str]]:
    """Return the tensors of each model that are read more than once, and for how many tensors of the output."""
    found: dict[str, Counter[str]] = {}
    for tensor in (plan.tensors[spec.name] for shard in shards for spec in shard.specs):
        for model, source in tensor.read_again:
            found.setdefault(model, Counter())[source] += 1
    return found


def _weights(shard: ShardPlan) -> int:
    """Return the bytes of a shard without its header."""
    return sum(spec.nbytes for spec in shard.specs)
