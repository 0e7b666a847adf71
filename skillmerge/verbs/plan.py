"""The verb plan: everything that `apply` would do, from headers alone, and the memory and disk it needs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from skillmerge.brief import brief, drawn
from skillmerge.durable import disk_errors, write_whole
from skillmerge.engine.runner import check_words
from skillmerge.errors import RecipeError, UsageError
from skillmerge.plans import opening, saved
from skillmerge.plans.budget import Budget, budget, check_disk, free_disk
from skillmerge.plans.opening import Access, planned
from skillmerge.plans.plan import Plan
from skillmerge.recipes import lock as lockfile
from skillmerge.recipes.source import STANDARD_INPUT, RecipeSource
from skillmerge.remarks import warning
from skillmerge.reporter import Reporter, default_reporter
from skillmerge.study.gate_obstacles import IN_A_BUCKET, obstacles
from skillmerge.verbs.target import is_done, output_folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview(Plan):
    """A plan, the threads and memory that it needs (`needs`), and the bytes free for its output.

    disk_free: None if the recipe names no output. changes: since a saved plan, in words; None without one.
    """

    needs: Budget
    disk_free: int | None
    changes: tuple[str, ...] | None = None
    strict: bool = False

    __repr__ = brief
    _repr_html_ = drawn

    @property
    def ok(self) -> bool:
        """Whether `apply` would accept it; with `strict`, also whether there are no warnings."""
        return not self.problems and not (self.strict and self.warnings)

    @property
    def done(self) -> bool:
        """Whether the output is up to date. Reads every byte of an output that could be."""
        return is_done(self)

    def as_dict(self) -> dict[str, Any]:
        """Return the saved plan, with memory in bytes, threads, free disk in bytes, and changes if requested."""
        changes = {} if self.changes is None else {"changes": list(self.changes)}
        needs = {"memory": self.needs.memory, "threads": self.needs.threads, "disk_free": self.disk_free}
        return {**saved.describe(self), **needs, **changes}

    def as_text(self) -> str:
        """Return the text of the saved plan, as `save` writes it."""
        return json.dumps({"ok": self.ok, **self.as_dict()}, indent=1) + "\n"


def plan(
    recipe: RecipeSource,
    *,
    coefficients: Mapping[str, float] | None = None,
    threads: int | None = None,
    memory_limit: int | None = None,
    strict: bool = False,
    allow_code: bool = False,
    follow_links: bool = False,
    locked: bool = False,
    lock: bool = False,
    save: str | os.PathLike[str] | None = None,
    diff: str | os.PathLike[str] | None = None,
    reporter: Reporter | None = None,
) -> Preview:
    """Plan a merge from headers alone. The plan's `problems` and `warnings` are returned, not raised.

    recipe: a file, or a recipe as a dict. coefficients: numbers that replace the recipe's. strict: warnings also make
    `ok` false. threads, memory_limit: as for `apply`. lock: also write the commits and files of models on the Hub to
    the lock file beside the recipe. save: write the plan as JSON to this file, which `apply` accepts as a recipe.
    diff: a saved plan to compare with.
    Raises UsageError, RecipeError, InputError, StalePlan, TemporaryError; ResourceError if memory or disk are
    too small for it.
    """
    reporter = reporter or default_reporter()
    check_words(threads=threads, memory_limit=memory_limit)
    if diff == STANDARD_INPUT:
        raise UsageError("`--diff` takes a file, not standard input", fix="write the saved plan into a file first")
    before = saved.read(diff) if diff is not None else None
    made = _make(recipe, coefficients, Access(follow_links, locked, relock=lock, allow_code=allow_code), reporter)
    needs = budget(made, threads=threads, memory_limit=memory_limit)
    where = made.recipe.output.path
    if where is not None and not made.problems and not made.makes_skill:
        check_disk(where, made.bytes_written, "the output")
    facts: dict[str, Any] = {field.name: getattr(made, field.name) for field in fields(made)}
    preview = Preview(**facts, strict=strict, needs=needs, disk_free=free_disk(where) if where is not None else None)
    if save is not None:
        _save(preview, Path(save))
    if before is None:
        return preview
    return replace(preview, changes=tuple(before.changes(json.loads(json.dumps(preview.as_dict())))))


def _make(
    recipe: RecipeSource,
    coefficients: Mapping[str, float] | None,
    access: Access,
    reporter: Reporter,
) -> Plan:
    with planned(recipe, coefficients, access, reporter.note) as (made, checkpoints):
        if made.recipe.output.path is not None:
            output_folder(made.recipe, None, checkpoints)
        made = _with_obstacles(made, reporter)
        if access.relock:
            path = lockfile.path_of(Path(made.recipe.document.name))
            with disk_errors(path):
                write_whole(path, opening.to_bytes(made, checkpoints))
            reporter.say(f"wrote {path}")
        return made


def _with_obstacles(made: Plan, reporter: Reporter) -> Plan:
    """Return the plan with warnings about gates that `apply` would refuse. Another machine may have what this lacks."""
    found = list(
        obstacles(made.recipe.gates, "sampled", None if made.recipe.output.bucket is None else IN_A_BUCKET, made)
    )
    for error in found:
        if not isinstance(error, RecipeError):
            reporter.note(f"apply would fail here: {error.message}")
    mistakes = {
        error.message: error for error in found if isinstance(error, RecipeError)
    }  # one text may have two gates
    warnings = (warning(f"apply would fail: {it}", error.fix, of_recipe=True) for it, error in mistakes.items())
    return replace(made, warnings=(*made.warnings, *warnings))


def _save(preview: Preview, path: Path) -> None:
    """Save the plan. Raises UsageError if `path` is anything but a saved plan."""
    if path.exists() and path.stat().st_size and not saved.looks_saved(path):
        raise UsageError(f"{path} already exists and is not a saved plan", fix="choose another file with `--save`")
    with disk_errors(path):
        path.write_text(preview.as_text(), encoding="utf-8")
