"""The source of a recipe's text: a file, standard input, or a dict. Knows nothing about its content."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeAlias

from skillmerge.checkpoints.missing import near_path
from skillmerge.errors import InputError, RecipeError, UsageError
from skillmerge.recipes import yamltext

RECIPE_SUFFIXES = (".yaml", ".yml", ".json")
SAVED_PLAN = '{\n "ok":'
"""How saved plans begin, and no recipe."""


RecipeSource: TypeAlias = str | os.PathLike[str] | Mapping[str, Any]
"""A recipe's file, `-` for standard input, or what the file would hold as a dict."""
STANDARD_INPUT = "-"
_NO_FILE = "recipe"
"""The name of a recipe that is a dict."""


def name_of(source: RecipeSource) -> str:
    """Return what messages call a recipe."""
    return _NO_FILE if isinstance(source, Mapping) else os.fspath(source)


def text_of(source: RecipeSource, help: str = "`skillmerge init` writes a recipe to start from") -> str:
    """Return the text of a recipe; of a dict, as YAML. help: what to do if there is no such file, and none near it.

    Raises UsageError if there is none, RecipeError for text that is invalid or too large, InputError.
    """
    if isinstance(source, Mapping):
        try:
            return yamltext.dump(_plain(source, _NO_FILE))
        except RecursionError as error:
            raise UsageError("the recipe is nested too deeply", fix="check whether a dict contains itself") from error
    return standard_input() if source == STANDARD_INPUT else _of_file(Path(source), help)


def standard_input() -> str:
    """Return all of standard input: a recipe, or a saved plan. Raises UsageError if it is not text."""
    if sys.stdin is None:
        raise UsageError("standard input is closed", fix="name a recipe file")
    try:
        data = getattr(sys.stdin, "buffer", sys.stdin).read()
        text: str = data if isinstance(data, str) else data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"standard input cannot be read: {error}", fix="name a recipe file") from error
    if not text.strip():
        raise UsageError("standard input is empty", fix="check whether the command before the pipe failed")
    return text


def _of_file(path: Path, help: str) -> str:
    """Return the text of a file that is not too large."""
    try:
        if path.is_dir():
            inside = [file.name for file in sorted(path.iterdir()) if file.suffix in (".yaml", ".yml")]
            fix = f"did you mean `{path / inside[0]}`?" if inside else "name a recipe file, such as `recipe.yaml`"
            raise UsageError(f"{path} is a folder, not a recipe", fix=fix)
        if path.exists() and not path.is_file():
            raise UsageError(f"{path} is not a file", fix="save the recipe as a file and pass that")
        if path.stat().st_size > yamltext.MAX_BYTES:
            raise RecipeError(f"{path}: is larger than {yamltext.MAX_BYTES // 1024} KiB, which no recipe needs")
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        near = near_path(path, str(path), lambda other: other.suffix in RECIPE_SUFFIXES and other.is_file())
        raise UsageError(f"{path} does not exist", fix=near or help) from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def _plain(value: Any, where: str) -> Any:
    """Return a value as plain YAML data. Raises UsageError for anything but dicts, lists, text, numbers and paths."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):  # of an enumeration too, whose own text is its name
        return str.__str__(value)
    if isinstance(value, Integral):  # of numpy too
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise UsageError(f"{where}: {type(value).__name__} cannot be in a recipe", fix="use text, numbers, lists and dicts")
