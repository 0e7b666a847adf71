"""Candidates of a sweep that a command scores: each is merged into a folder, scored there, and removed."""

from __future__ import annotations

import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from skillmerge.durable import remove_tree
from skillmerge.engine.rounding_statistics import Statistics
from skillmerge.engine.runner import Work
from skillmerge.errors import machine_errors
from skillmerge.outputs.attempts import staging_folder
from skillmerge.plans.opening import Access
from skillmerge.recipes.recipe import Recipe
from skillmerge.reporter import Reporter
from skillmerge.study.scoring.scorers import Scorer, run_command
from skillmerge.study.scoring.scores import NotFinite, together
from skillmerge.verbs.apply import merge
from skillmerge.verbs.records import Checks, Publish
from skillmerge.verbs.sweep.candidates import Values
from skillmerge.verbs.sweep.journal import Trial

Warnings = list[tuple[str, str | None]]
"""Messages, and what to do."""


@dataclass(frozen=True, slots=True)
class InFolder:
    """What scores candidates, as plain data: a node of a cluster can do it too.

    scorer: a command. seeds: one for each time that a candidate is scored. scratch: the folder of the models. where:
    the folder that the command runs in, where there is one of that name.
    """

    scorer: Scorer
    access: Access
    work: Work
    seeds: tuple[int, ...]
    scratch: Path
    where: Path

    def __call__(self, values: Values, recipe: Recipe, beside: bool = False) -> tuple[Trial, Warnings]:
        """Merge a candidate and score it. beside: others are scored at the same time, and maybe this one too, by a node
        that is thought dead. Raises what `merge` and `run_command` raise."""
        started, out = time.monotonic(), self.scratch / (f"model-{uuid.uuid4().hex}" if beside else "model")
        where = self.where if self.where.is_dir() else None
        try:
            with machine_errors():
                made = merge(recipe, out, self.access, self.work, Checks(), Publish(), Reporter())
                assert isinstance(made.manifest.statistics, Statistics)  # a sweep makes models only
                failed = ""
                try:
                    scores = together([run_command(self.scorer, out, seed, where=where) for seed in self.seeds])
                except NotFinite as error:
                    scores, failed = {}, str(error)
        finally:
            # Beside others no later try continues it: what was unfinished would stay until the sweep ends.
            for folder in (out, staging_folder(out)) if beside else (out,):
                with suppress(OSError):
                    remove_tree(folder)
        warnings = [(remark.message, remark.fix) for remark in (made.plan.warnings if made.plan is not None else ())]
        realised = made.manifest.statistics.all.realised_lambda
        return Trial(values, scores, realised, time.monotonic() - started, failed), warnings
