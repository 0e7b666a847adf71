"""The verb plan: all that `apply` would do, from the headers alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from skillmerge.durable import disk_errors, write_whole
from skillmerge.errors import UsageError
from skillmerge.plans import opening
from skillmerge.plans.opening import Access, planned
from skillmerge.plans.plan import Plan
from skillmerge.recipes import lock as lockfile
from skillmerge.reporter import Reporter
from skillmerge.study.gates import prepare
from skillmerge.verbs.target import output_folder


def make_plan(
    recipe: str | os.PathLike[str],
    *,
    coefficients: Mapping[str, float] | None = None,
    allow_code: bool = False,
    follow_links: bool = False,
    locked: bool = False,
    lock: bool = False,
    reporter: Reporter | None = None,
) -> Plan:
    """All that `apply` would do, from headers alone. The plan's `problems` are not raised.

    lock: also write the commits and files of models on the Hub into the lock file beside the recipe.
    """
    reporter = reporter or Reporter()
    access = Access(follow_links, locked, relock=lock)
    with planned(recipe, coefficients, allow_code, access, reporter.warn) as (plan, checkpoints):
        if plan.recipe.output.path is not None:
            output_folder(plan.recipe, None, checkpoints)
        try:
            prepare(plan.recipe.gates, "sampled", False, plan)
        except UsageError as error:
            reporter.warn(f"apply would stop at once: {error.message}")
        if lock:
            path = lockfile.path_of(Path(recipe))
            with disk_errors(path):
                write_whole(path, opening.to_bytes(plan, checkpoints))
            reporter.say(f"wrote {path}")
        return plan
