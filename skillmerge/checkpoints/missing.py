"""A missing path: names near it, and what was probably meant."""

from __future__ import annotations

import os
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

from skillmerge.checkpoints.place import instead_on_hub, looks_like_repository
from skillmerge.errors import NEAR, some

_MOST = 10_000
"""Names of a folder that are looked at."""
_ENDS = (".yaml", ".yml", ".json")
_A_MODEL = "a model is a folder with *.safetensors and config.json"


def missing(path: Path, written: str) -> tuple[str, str] | None:
    """Return what is wrong with the folder that was `written`, and what to do; None if a folder is there.

    Only what exists is looked at, never what is in it.
    """
    if os.path.isdir(path):
        return None
    if os.path.exists(path):
        parent = os.path.dirname(written) or "."
        inside = written.endswith((".safetensors", ".json", ".bin", ".gguf", ".pt"))
        return f"`{written}` is a file, not a folder", f"name its folder: `{parent}`" if inside else _A_MODEL
    if os.path.islink(path):
        return f"`{written}` is a link to `{os.readlink(path)}`, which does not exist", "fix the link"
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        where = f"`{written}` (`{path}`)" if written.startswith("~") else f"`{written}`"
        return f"folder {where} does not exist", meant(path, written) or _there(path, written) or _A_MODEL
    except (OSError, ValueError):
        pass
    return None  # opening it reports why it fails


def meant(path: Path, written: str) -> str | None:
    """Return what was probably meant by the path of a folder that does not exist; None if nothing is near."""
    model, plus, adapter = written.partition("+")
    if plus and (os.path.isdir(path.parent) or "/" in adapter):
        return f"to put an adapter on `{model}`, name both: `{{adapter: {adapter}, onto: NAME}}`, NAME being that model"
    near = instead_on_hub(written) or near_path(path, written, Path.is_dir)
    if near is not None:
        return near
    if looks_like_repository(written) and not path.parent.is_dir():
        return f"to read it from the Hub, write `hf://{written}`"
    return None


def _there(path: Path, written: str) -> str | None:
    """Return what is beside the place, where that is a folder."""
    try:
        names = sorted(entry.name for entry in path.parent.iterdir() if entry.is_dir() and entry.name[0] != ".")
    except OSError:
        return None
    return f"`{os.path.dirname(written) or '.'}` holds {some([f'`{name}`' for name in names], NEAR)}" if names else None


def near_path(path: Path, written: str, wanted: Callable[[Path], bool] = Path.exists) -> str | None:
    """Return `did you mean …?` for a path that does not exist, spelled as `written` is; None if nothing is near.

    wanted: what a neighbor has to be to be meant. The nearest folder that exists is looked into; of what is below a
    name that is misspelled, the rest is kept.
    """
    parts = path.parts
    for length in range(len(parts), 0, -1):
        folder, name, rest = Path(*parts[: length - 1] or ["."]), parts[length - 1], parts[length:]
        if not folder.is_dir():
            continue
        names = [other for other in _names(folder) if wanted(Path(folder, other, *rest))]
        folded = {other.casefold(): other for other in names}
        near = folded.get(name.casefold()) or _nearest(name, names)
        if near is None or len(rest) >= len(written.rstrip("/").split("/")):
            return None  # nothing is near, or the misspelled name is not in what was written
        return f"did you mean `{_respelled(written, name, near, len(rest))}`?"
    return None


def _respelled(written: str, name: str, near: str, below: int) -> str:
    """Return what was written, with one name in it replaced: the one that has so many below it."""
    parts = written.rstrip("/").split("/")
    index = len(parts) - 1 - below
    return (
        "/".join([*parts[:index], near, *parts[index + 1 :]]) if parts[index] == name else written.replace(name, near)
    )


def _nearest(name: str, names: list[str]) -> str | None:
    """Return the name nearest to one, by what stands before the ends of files' names: those are alike anyway."""
    stems = {os.path.splitext(other)[0] if other.endswith(_ENDS) else other: other for other in names}
    near = get_close_matches(os.path.splitext(name)[0] if name.endswith(_ENDS) else name, stems, n=1, cutoff=0.7)
    return stems[near[0]] if near else None


def _names(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry, _ in zip(entries, range(_MOST), strict=False))
    except OSError:
        return []
