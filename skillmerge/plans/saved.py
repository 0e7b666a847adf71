"""Saved plans: `plan -o` writes them, `apply` accepts them as recipes, and `plan --diff` compares them.

A saved plan holds the recipe's text, all decisions, and what shows whether input files have changed: sizes and times
on this machine, commits on the Hub, digests of headers everywhere.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skillmerge.errors import StalePlan, UsageError
from skillmerge.plans.changes import differences
from skillmerge.plans.plan import PLAN_VERSION, Plan, digests
from skillmerge.recipes.parse import parse_recipe
from skillmerge.recipes.recipe import Recipe
from skillmerge.recipes.source import SAVED_PLAN

_KEYS = ("version", "digest", "recipe", "versions", "inputs", "tensors")
_REMARKS = ("recipe", "problems", "warnings", "notes", "compared", "merged_share")
"""Keys for people. The plan has the digest of the recipe's text."""
_EDITED = "it was edited, or this skillmerge plans differently"
_MAX_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class SavedPlan:
    """A plan as it was made. commits: of the models on the Hub."""

    path: Path
    document: Mapping[str, Any]
    recipe: Recipe
    commits: Mapping[str, str]

    def check(self, plan: Plan) -> None:
        """Raise StalePlan if the same recipe now gives a different plan, or input files have changed.

        The whole plan counts, not only its digest: what was reviewed is what is applied.
        """
        now = json.loads(json.dumps(describe(plan)))
        if all(self.document.get(key) == value for key, value in now.items() if key not in _REMARKS):
            return
        raise self.stale(self.changes(now) or [_EDITED])

    def stale(self, changes: Sequence[str]) -> StalePlan:
        """Return the error for a plan that no longer holds. changes: in words."""
        return StalePlan(
            f"{self.path} is stale: " + "; ".join(changes[:8]),
            fix=f"check the changes and plan again: {self.recipe.command('plan')} -o {shlex.quote(str(self.path))}",
        )

    def digests(self) -> tuple[str, str]:
        """Return the digests of the weights and of the whole plan. Raises StalePlan if it was edited."""
        with damage(self.path):
            found = digests(self.document, self.recipe)
            if found[1] != self.document["digest"]:
                raise self.stale([_EDITED])
        return found

    @property
    def sizes(self) -> dict[str, int]:
        """The output's shards and their sizes, in the plan's order."""
        with damage(self.path):
            return {shard["file"]: int(shard["size"]) for shard in self.document["shards"]}

    def changes(self, now: Mapping[str, Any]) -> list[str]:
        """Return what is different in another plan, in words. Raises UsageError if this one is damaged."""
        with damage(self.path):
            return differences(self.document, now)


def describe(plan: Plan) -> dict[str, Any]:
    """Return the plan as it is saved."""
    document = plan.recipe.document
    return {
        **Plan.as_dict(plan),  # of whatever kind of plan, no more than its decisions
        "recipe": {"text": document.text, "file": os.path.abspath(document.name)},
        "versions": {name: dict(files) for name, files in plan.versions.items()},
    }


def looks_saved(path: str | os.PathLike[str]) -> bool:
    """Return whether the file is a saved plan, by its first bytes."""
    try:
        if not Path(path).is_file():  # Opening a FIFO would block.
            return False
        with open(path, "rb") as stream:
            return stream.read(len(SAVED_PLAN)) == SAVED_PLAN.encode()
    except OSError:
        return False


@contextmanager
def damage(path: Path) -> Iterator[None]:
    """Turn every error of reading a plan into one that says that the file is not a saved plan."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise UsageError(
            f"{path}: is not a saved plan: {error}", fix="create one: skillmerge plan RECIPE -o plan.json"
        ) from error


def read(path: str | os.PathLike[str]) -> SavedPlan:
    """Read a saved plan. Raises UsageError for what is none, RecipeError for a recipe in it that is damaged."""
    path = Path(path)
    with damage(path):
        try:
            if not path.is_file() or path.stat().st_size > _MAX_BYTES:
                raise ValueError("it is not a regular file of at most 1 GiB")
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    return parse(text, path)


def parse(text: str, path: Path) -> SavedPlan:
    """Return the saved plan in a text. path: its name in messages."""
    with damage(path):
        document = json.loads(text)
        if document["version"] != PLAN_VERSION:
            raise UsageError(f"{path}: plan version {document['version']!r} is unknown to this version of skillmerge")
        missing = [key for key in _KEYS if key not in document]
        if missing:
            raise ValueError(f"it lacks {', '.join(missing)}")
        file = Path(document["recipe"]["file"])
        if not file.name:
            raise ValueError("its recipe has no name")
        recipe = parse_recipe(document["recipe"]["text"], str(file), file.parent, document["overrides"])
        unwrapped = {item["name"]: item.get("unwrapped", ()) for item in document["inputs"]}
        recipe = recipe.as_planned(document.get("donor", ""), unwrapped)
        commits = {item["name"]: item["revision"] for item in document["inputs"] if item["revision"]}
        if not all(isinstance(commit, str) for commit in commits.values()):
            raise ValueError("a commit in it is not text")
    return SavedPlan(path, document, recipe, commits)
