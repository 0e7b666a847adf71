"""The verb init, and the recipe that it writes: complete, commented, and one edit away from running."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

from skillmerge.durable import disk_errors
from skillmerge.errors import UsageError


def starter() -> str:
    """The text of the recipe to start from."""
    return (files("skillmerge.recipes") / "starter.yaml").read_text(encoding="utf-8")


def init(path: str | os.PathLike[str] = "recipe.yaml") -> Path:
    """Write a commented recipe to start from, and return its path. Raises UsageError where a file is there already."""
    target = Path(path)
    if target.exists():
        raise UsageError(f"{path} exists already", fix="name another file: skillmerge init my-recipe.yaml")
    with disk_errors(target):
        target.write_text(starter(), encoding="utf-8")
    return target
