"""The settings of a sweep, checked before anything is merged."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from skillmerge.checkpoints.schemes import output_place
from skillmerge.errors import UsageError
from skillmerge.plans.opening import Access
from skillmerge.recipes.parse import load
from skillmerge.recipes.recipe import Recipe
from skillmerge.recipes.source import STANDARD_INPUT, RecipeSource
from skillmerge.study.scoring.scorers import Scorer, find_scorer
from skillmerge.verbs.sweep.candidates import Axis, Values, grid, parse_axis, path_of, with_values
from skillmerge.verbs.sweep.journal import identity
from skillmerge.verbs.sweep.search import SEARCHES
from skillmerge.verbs.target import refuse_bucket

FOUND = "# Found by `skillmerge sweep`"
"""How a best recipe begins; a sweep replaces only such a file."""


@dataclass(frozen=True, slots=True)
class Asked:
    """The arguments of `sweep`, beside the recipe and its axes."""

    search: str | None
    trials: int
    repeats: int
    seed: int
    by: str | None
    minimise: bool | None


@dataclass(frozen=True, slots=True)
class Setting:
    """A sweep that can start: its recipe, its axes, its scorer, and where the results go."""

    recipe: Recipe
    first: Recipe
    axes: tuple[Axis, ...]
    score: str
    scorer: Scorer
    less: bool
    """Whether a smaller score is the better one."""
    asked: Asked
    access: Access
    device: str
    on: str | None
    """The cluster that candidates are scored on."""
    folder: Path
    best: Path
    identity: Mapping[str, Any]

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds with which each candidate is scored."""
        return tuple(self.asked.seed + number for number in range(self.asked.repeats))


def prepare(
    source: RecipeSource,
    axes: Sequence[str],
    score: str,
    output: str | os.PathLike[str] | None,
    asked: Asked,
    how: tuple[Access, str, str | None],
) -> Setting:
    """Check all that can be checked before anything is scored. Raises UsageError, RecipeError."""
    recipe = load(source)
    path = Path("recipe" if source == STANDARD_INPUT else recipe.document.name)
    chosen, scorer = _axes(recipe, axes), find_scorer(score)
    if asked.search is not None and asked.search not in SEARCHES:
        raise UsageError(f"search {asked.search!r}: {', '.join(SEARCHES)}")
    _check_packages(scorer, asked.search)
    if how[2] is not None and (scorer.command is None or asked.search is not None):
        raise UsageError("`--on` needs a score by a command, and a grid", fix="leave `--on` out")
    if recipe.output.kind != "model":
        of = {"skill": "a skill", "adapter": "an adapter"}[recipe.output.kind]
        raise UsageError(f"{of} cannot be scored", fix="sweep a recipe that makes a model")
    refuse_bucket(output_place(output or ""))
    folder = Path(output) if output is not None else path.with_suffix(".sweep")
    best = _place_of_best(path, folder)
    less = scorer.minimise if asked.minimise is None else asked.minimise
    same: dict[str, Any] = {
        "score": score, "score_sha256": scorer.digest, "repeats": asked.repeats, "seed": asked.seed,
        "axes": [axis.name for axis in chosen],
    }  # fmt: skip
    if asked.search is not None:  # the proposals depend on all of these
        same |= {"axes": list(axes), "search": asked.search, "by": asked.by, "minimise": less}
    first = with_values(recipe, _first(chosen, asked.search))
    for axis in chosen:
        with_values(recipe, {axis.name: axis.low})
    access, device, on = how
    known = identity(first, recipe, access, same)
    return Setting(recipe, first, tuple(chosen), score, scorer, less, asked, access, device, on, folder, best, known)


def _check_packages(scorer: Scorer, search: str | None) -> None:
    """Raise UsageError for a package that is not installed, before the sweep's folder is made."""
    for name in SEARCHES[search] if search is not None else ():
        if find_spec(name) is None:
            raise UsageError(
                f"`--search {search}` needs the package {name}",
                fix="pip install 'skillmerge[sweep]', or leave `--search` out",
            )
    if scorer.function is not None and find_spec("transformers") is None:
        raise UsageError(
            "this score needs transformers", fix="pip install 'skillmerge[transformers]', or score with a command"
        )


def _place_of_best(recipe: Path, folder: Path) -> Path:
    """Return the path of the best recipe, beside the recipe so that relative paths hold.

    Raises UsageError, before any work, where it cannot be written.
    """
    best = recipe.with_name(f"{folder.stem}.best.yaml")
    try:
        if best.exists() and not (best.is_file() and best.read_bytes().startswith(FOUND.encode())):
            raise UsageError(
                f"{best} already exists and was not written by a sweep",
                fix="move it away; the best recipe is written there",
            )
        tempfile.TemporaryFile(dir=best.parent).close()
    except OSError as error:
        raise UsageError(
            f"{best} cannot be written: {error.strerror}",
            fix="the best recipe is written beside the recipe; copy the recipe to a writable folder",
        ) from error
    return best


def _axes(recipe: Recipe, texts: Sequence[str]) -> list[Axis]:
    try:
        axes = [parse_axis(text) for text in texts]
    except ValueError as error:
        raise UsageError(f"`--set`: {error}", fix="write it like `--set lam=0:2:0.25` or `--set lam=0.5,1`") from error
    if not axes:
        raise UsageError("nothing to try", fix="pass a number of the recipe, such as `--set lam=0:2:0.25`")
    places = [path_of(recipe, axis.name) for axis in axes]
    if len(set(places)) < len(places):
        raise UsageError("`--set` names one number twice")
    return axes


def _first(axes: Sequence[Axis], search: str | None) -> Values:
    if search is None:
        return next(grid(axes))
    return {axis.name: axis.low for axis in axes}
