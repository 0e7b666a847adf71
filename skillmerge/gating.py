"""The verb gate: hold a finished output against gates, those of a file or those of its own recipe."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from skillmerge import manifest
from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.errors import UsageError
from skillmerge.gates import Outcome, Subject, check
from skillmerge.planning import Plan
from skillmerge.recipe import load_gates
from skillmerge.reporter import Reporter
from skillmerge.sources import Access, planned
from skillmerge.verification import check_structure


def gate(
    folder: str | os.PathLike[str],
    gates: str | os.PathLike[str] | None = None,
    *,
    base: str | os.PathLike[str] | None = None,
    follow_links: bool = False,
    reporter: Reporter | None = None,
) -> list[Outcome]:
    """Measure every gate of the file `gates` (or of the recipe in the manifest) on the output in `folder`.

    Commands are only run from a file that the caller names: a manifest comes with a model, from anywhere.
    base: the folder that the recipe's relative paths start from, where gates read the models that went in and these
    have moved. Raises UsageError, RecipeError, CheckFailed where it is no sound output; a gate that does not hold
    is in what is returned, not raised.
    """
    reporter = reporter or Reporter()
    root = Path(folder)
    if not root.is_dir():
        raise UsageError(f"{root} is not a folder", fix="name an output of `skillmerge apply`")
    proof = manifest.read(root)
    check_structure(root, proof)
    recipe, commits = manifest.recorded_recipe(proof, root, Path(base) if base is not None else None)
    asked = load_gates(gates) if gates is not None else recipe.gates
    if not asked:
        raise UsageError(
            f"{gates or 'the recipe in the manifest'} has no gates",
            fix="name a file that has: skillmerge gate DIR --gates FILE",
        )
    if gates is None and any(item.kind == "command" for item in asked):
        raise UsageError(
            f"the recipe in the manifest of {root} has gates that run commands, and whoever made it wrote them",
            fix="read them, and name a file that you trust: skillmerge gate DIR --gates FILE",
        )
    access = Access(follow_links, commits=commits)

    @contextmanager
    def opened() -> Iterator[tuple[Plan, Mapping[str, Checkpoint]]]:
        with planned(recipe, None, True, access, reporter.warn) as (plan, checkpoints):
            yield plan, checkpoints

    def tell(outcome: Outcome) -> None:
        reporter.event("gate", **outcome.as_dict())

    return check(asked, Subject(root, proof, opened, access, reporter.warn), tell)
