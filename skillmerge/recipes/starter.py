"""The verb init: a recipe to start from, the commented starter or one of the gallery, with completion for editors."""

from __future__ import annotations

import os
import shlex
from importlib.resources import files
from pathlib import Path

from skillmerge.durable import disk_errors
from skillmerge.errors import NEAR, UsageError, did_you_mean, some
from skillmerge.recipes.mergekit.importing import translated
from skillmerge.recipes.schema import schema_text
from skillmerge.recipes.source import RECIPE_SUFFIXES, STANDARD_INPUT

SCHEMA_FILE = "skillmerge.schema.json"
_EDITOR_LINE = f"# yaml-language-server: $schema={SCHEMA_FILE}\n"
"""What editors with the YAML language server look for; a relative path starts at the recipe's folder."""


def gallery() -> dict[str, str]:
    """Return the recipes that `source` can name, and what each of them does, in one line."""
    found = (path for path in (files("skillmerge.recipes") / "gallery").iterdir() if path.name.endswith(".yaml"))
    texts = {path.name.removesuffix(".yaml"): path.read_text(encoding="utf-8") for path in found}
    return {name: text.split("\n", 1)[0].removeprefix("# ") for name, text in sorted(texts.items())}


def recipe_text(source: str | None = None, folder: str | os.PathLike[str] | None = None) -> str:
    """Return the text of a gallery recipe or of the translation of a mergekit file; without `source`, the starter.

    folder: where the recipe will be, if that is known: relative paths of a translation start there.
    Raises UsageError for a name that is not in the gallery, RecipeError for a file that cannot be translated.
    """
    home = files("skillmerge.recipes")
    if source is not None and is_file_name(source):
        return translated(source, None if folder is None else Path(folder) / "recipe.yaml").text
    if source is None:
        return (home / "starter.yaml").read_text(encoding="utf-8")
    names = list(gallery())
    if source not in names:
        near = _mergekit_file(Path(source)) or did_you_mean(source, names)
        raise UsageError(
            f"no recipe is called `{source}`",
            fix=near or f"choose one of: {some(names, NEAR)}; `skillmerge init --list` shows all",
        )
    return (home / "gallery" / f"{source}.yaml").read_text(encoding="utf-8")


def _mergekit_file(path: Path) -> str | None:
    """Return what to name in place of a path that cannot be translated."""
    beside = path / "mergekit_config.yml"  # mergekit writes it into every output
    if beside.is_file():
        return f"did you mean `{beside}`?"
    return f"to translate a file, its name must end in {some(list(RECIPE_SUFFIXES))}" if path.is_file() else None


def is_file_name(source: str) -> bool:
    """Return whether a source of `init` is a file to translate, not a name of the gallery."""
    return source == STANDARD_INPUT or source.endswith(RECIPE_SUFFIXES)


def init(path: str | os.PathLike[str] = "recipe.yaml", source: str | None = None) -> Path:
    """Write a recipe to start from, and return its path.

    source: the name of a recipe of the gallery, such as `past-ramp`, or a mergekit file to translate (`-` for standard
    input); by default a commented starter. The JSON Schema that the recipe's first line names is written beside it, so
    that editors complete keys; an existing one is kept.
    Raises UsageError where `path` exists, and for a name that is not in the gallery; RecipeError for a file that has no
    translation.
    """
    target = Path(path)
    text = recipe_text(source, target.parent)
    if target.exists():
        same = f" --from {shlex.quote(source)}" if source is not None else ""
        raise UsageError(f"`{path}` already exists", fix=f"choose another file: `skillmerge init my-recipe.yaml{same}`")
    with disk_errors(target):
        target.write_text(_EDITOR_LINE + text, encoding="utf-8")
    beside = target.parent / SCHEMA_FILE
    if not beside.exists():
        with disk_errors(beside):
            beside.write_text(schema_text(), encoding="utf-8")
    return target
