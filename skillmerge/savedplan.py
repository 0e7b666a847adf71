"""A plan on disk: what `plan -o` writes, `apply` takes in a recipe's place, and two of which can be compared.

It holds the recipe's text, all that the plan decided, and what tells the input files from changed ones: sizes and
times on this machine, commits on the Hub, digests of headers everywhere.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skillmerge.errors import StalePlan, UsageError, some
from skillmerge.naming import block_of
from skillmerge.planning import PLAN_VERSION, Plan
from skillmerge.recipe import SAVED_PLAN, Recipe, parse_recipe

_KEYS = ("version", "digest", "recipe", "versions", "inputs", "tensors")
_REMARKS = ("recipe", "problems", "notes")
"""What is for people. The recipe's text has its digest in the plan."""
_MAX_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class SavedPlan:
    """A plan as it was made. commits: of the models on the Hub."""

    path: Path
    document: Mapping[str, Any]
    recipe: Recipe
    commits: Mapping[str, str]

    def check(self, plan: Plan) -> None:
        """Raise StalePlan where the same recipe gives another plan now, or an input's files are not those of then.

        All of the plan counts, not its digest alone: what a person has read in it is what is done.
        """
        now = json.loads(json.dumps(describe(plan)))
        if all(self.document.get(key) == value for key, value in now.items() if key not in _REMARKS):
            return
        changes = self.changes(now) or ["it was edited, or this skillmerge plans differently"]
        raise StalePlan(
            f"{self.path} is stale: " + "; ".join(changes[:8]),
            fix=f"look at it and plan again: skillmerge plan {self.recipe.document.name} -o {self.path}",
        )

    def changes(self, now: Mapping[str, Any]) -> list[str]:
        """What is different in another plan, in words. Raises UsageError where this one is damaged."""
        with _damage(self.path):
            return differences(self.document, now)


def describe(plan: Plan) -> dict[str, Any]:
    """The plan as it is saved."""
    document = plan.recipe.document
    return {
        **plan.as_dict(),
        "recipe": {"text": document.text, "file": os.path.abspath(document.name)},
        "versions": {name: dict(files) for name, files in plan.versions.items()},
    }


def looks_saved(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as saved plans do. Recipes may be JSON too, and do not."""
    try:
        if not Path(path).is_file():  # a pipe would wait for somebody
            return False
        with open(path, "rb") as stream:
            return stream.read(len(SAVED_PLAN)) == SAVED_PLAN.encode()
    except OSError:
        return False


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Whatever goes wrong when a document is taken for a plan says that it is none."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise UsageError(
            f"{path}: is not a saved plan: {error}", fix="write one: skillmerge plan RECIPE -o plan.json"
        ) from error


def read(path: str | os.PathLike[str]) -> SavedPlan:
    """Read a saved plan. Raises UsageError for what is none, RecipeError for a recipe in it that is damaged."""
    path = Path(path)
    with _damage(path):
        try:
            if not path.is_file() or path.stat().st_size > _MAX_BYTES:
                raise ValueError("it is no file of sane size")
            document = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
        if document["version"] != PLAN_VERSION:
            raise UsageError(f"{path}: plan version {document['version']!r} is not known to this skillmerge")
        missing = [key for key in _KEYS if key not in document]
        if missing:
            raise ValueError(f"it lacks {', '.join(missing)}")
        file = Path(document["recipe"]["file"])
        if not file.name:
            raise ValueError("its recipe has no name")
        recipe = parse_recipe(document["recipe"]["text"], str(file), file.parent, document["overrides"])
        commits = {item["name"]: item["revision"] for item in document["inputs"] if item["revision"]}
        if not all(isinstance(commit, str) for commit in commits.values()):
            raise ValueError("a commit in it is no text")
    return SavedPlan(path, document, recipe, commits)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed between two plans, in words; nothing where they are the same."""
    changes = [*_inputs(old, new)]
    if old["recipe_sha256"] != new["recipe_sha256"]:
        changes.append("the recipe's text changed")
    for key, before in {**new["output"], **old["output"]}.items():
        after = new["output"].get(key)
        if after != before or key not in old["output"]:
            changes.append(f"output {key}: {old['output'].get(key)} before, {after} now")
    if old["donor"] != new["donor"]:
        changes.append(f"the donor was {old['donor']}, and is {new['donor']} now")
    changes += _tensors(old, new)
    changes += _coefficients(old, new)
    files = [{item["name"]: item for item in plan["side_files"]} for plan in (old, new)]
    other = sorted(name for name in {*files[0], *files[1]} if files[0].get(name) != files[1].get(name))
    if other:
        changes.append(f"other files changed: {some(other)}")
    return changes


def _inputs(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    before, after = ({item["name"]: item for item in plan["inputs"]} for plan in (old, new))
    changes = [f"model {name} is not used any more" for name in before if name not in after]
    for name, item in after.items():
        was = before.get(name)
        if was is None:
            changes.append(f"model {name} is new: {item['uri']}")
            continue
        for key, what in (("uri", "place"), ("revision", "commit")):
            if was[key] != item[key]:
                changes.append(f"model {name}: its {what} was {was[key]}, and is {item[key]} now")
        files = [{file["name"]: file for file in each["files"]} for each in (was, item)]
        kept = [{file: (row["size"], row["header_sha256"]) for file, row in each.items()} for each in files]
        other = sorted(file for file in {*kept[0], *kept[1]} if kept[0].get(file) != kept[1].get(file))
        if other:
            changes.append(f"model {name}: other tensors or sizes in {some(other)}")
        versions = [plan.get("versions", {}).get(name, {}) for plan in (old, new)]
        again = sorted(file for file in versions[1] if versions[0] and versions[0].get(file) != versions[1][file])
        if again and not other:
            changes.append(f"model {name}: written again since: {some(again)}")
    return changes


def _tensors(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    before, after = ({item["name"]: item for item in plan["tensors"]} for plan in (old, new))
    changes = []
    for what, names in (
        ("gone", [name for name in before if name not in after]),
        ("new", [name for name in after if name not in before]),
    ):
        if names:
            changes.append(f"{len(names)} tensors are {what}: {some(names, 3)}")
    for key, what in (("action", "what happens to"), ("dtype", "the dtype of"), ("shape", "the shape of")):
        groups: dict[tuple[str, str], list[str]] = {}
        for name in after:
            if name in before and before[name][key] != after[name][key]:
                groups.setdefault((str(before[name][key]), str(after[name][key])), []).append(name)
        for (was, now), names in groups.items():
            changes.append(f"{what} {len(names)} tensors: {was} before, {now} now: {some(names, 3)}")
    return changes


def _coefficients(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """By value before and after, and the layers that have them."""
    rows = [
        {item["name"]: dict(zip(plan["coefficients"], item["coefficients"], strict=False)) for item in plan["tensors"]}
        for plan in (old, new)
    ]
    groups: dict[tuple[str, Any, Any], dict[str, None]] = {}
    for name in rows[1]:
        if name in rows[0]:
            block = block_of(name)
            place = f"{block[0]} {block[1]}" if block else "outside blocks"
            for coefficient in {**rows[0][name], **rows[1][name]}:
                was, now = rows[0][name].get(coefficient), rows[1][name].get(coefficient)
                if was != now:
                    groups.setdefault((coefficient, was, now), {})[place] = None
    return [f"{name}: {_shown(was)} before, {_shown(now)} now, in {some(list(places), 6)}"
            for (name, was, now), places in groups.items()]  # fmt: skip


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:g}"
