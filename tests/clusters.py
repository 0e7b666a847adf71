"""What tests of tasks share: a saved plan, its tasks, and what they have left."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from conftest import write_family, write_recipe
from observing import Content, content, staging_of

import skillmerge

SHARDS = 4


def save(recipe: Path) -> Path:
    """The saved plan of a recipe, beside it."""
    path = recipe.with_name("plan.json")
    skillmerge.plan(recipe, save=path)
    return path


def save_family(folder: Path, **keys: Any) -> Path:
    """The saved plan of a family in SHARDS files."""
    write_family(folder, shards=SHARDS)
    return save(write_recipe(folder, **keys))


def alone(plan: Path, **options: Any) -> Content:
    """What `apply` makes of a plan."""
    return content(skillmerge.apply(plan, plan.parent / "alone", **options).output)


def run_tasks(plan: Path, output: Path, tasks: int = SHARDS, **options: Any) -> list[str]:
    """Every task, one after the other; the shards that they made."""
    made = [skillmerge.shard(plan, output, index=index, of=tasks, **options).made for index in range(tasks)]
    return [shard for part in made for shard in part]


def record_of(output: Path, shard: str) -> Path:
    return staging_of(output) / "done" / f"{shard}.json"


def rewrite(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def set_time(path: Path, nanoseconds: int) -> None:
    os.utime(path, ns=(nanoseconds, nanoseconds))
