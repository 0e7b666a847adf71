"""`recipe.lock` beside a recipe: the commits of its revisions, and the files that were used.

Only models on the Hub are locked. A lock speaks of a recipe's model as long as the recipe names it by the same
URI; it is never changed but by `plan --lock`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.checkpoints.place import Location
from skillmerge.errors import StalePlan, UsageError

LOCK_VERSION = 1
_MAX_BYTES = 32_000_000


@dataclass(frozen=True, slots=True)
class LockedModel:
    """A model's commit, and what stood there: file -> size and digest (`sha256` or `git_sha1`, hex digits)."""

    uri: str
    commit: str
    files: Mapping[str, tuple[int, tuple[str, str]]]

    def compare(self, path: Path, name: str, checkpoint: Checkpoint) -> None:
        """Raise StalePlan if the checkpoint's files are not the locked ones."""
        for file, stated in self.files.items():
            if file not in checkpoint.store.list() or checkpoint.stated(file) not in (None, stated):
                raise StalePlan(
                    f"{path}: {file} of model `{name}` is not the file that was locked ({checkpoint.place})",
                    fix="check why a commit changed; to lock the current files, run `skillmerge plan --lock`",
                )


def path_of(recipe: Path) -> Path:
    return recipe.with_suffix(".lock")


def read(path: Path) -> dict[str, LockedModel] | None:
    """Return the locked models by name, or None if there is no lock. Raises UsageError for one that is damaged."""
    try:
        content = path.read_bytes()[: _MAX_BYTES + 1]
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        document = json.loads(content)
        if document["lock_version"] != LOCK_VERSION:
            raise UsageError(
                f"{path}: lock version {document['lock_version']!r} is unknown to this version of skillmerge"
            )
        return {name: _parse(entry) for name, entry in document["models"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{path}: is not a lock file", fix="recreate it: `skillmerge plan RECIPE --lock`") from error


def _parse(entry: Any) -> LockedModel:
    files = {}
    for file in entry["files"]:
        kind = "sha256" if "sha256" in file else "git_sha1"
        files[str(file["name"])] = (int(file["size"]), (kind, str(file[kind])))
    commit = str(entry["commit"])
    if not Location("a/b", commit).pinned:
        raise ValueError(commit)
    return LockedModel(str(entry["uri"]), commit, files)
