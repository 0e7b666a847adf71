"""The same merge from two checkpoints and from the skill that is stored of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conftest import write_recipe

import skillmerge

WITH_SKILL = {"target": "target", "math": {"skill": "math"}}


def both(folder: Path, direct: str, stored: str, **keys: Any) -> tuple[Path, Path]:
    """The same formula with the two checkpoints and with the skill cut from them."""
    if not (folder / "math").exists():
        skillmerge.extract(str(folder / "rl"), str(folder / "sft"), folder / "math")
    first = skillmerge.apply(write_recipe(folder, direct, **keys), folder / "direct", overwrite=True).output
    recipe = write_recipe(folder, stored, models=WITH_SKILL, **keys)
    return first, skillmerge.apply(recipe, folder / "stored", overwrite=True).output
