"""Where on the Hub a model is or goes: the name of a repository, and what was published there."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skillmerge.brief import drawn
from skillmerge.checkpoints.place import Location, parse_location
from skillmerge.errors import UsageError


@dataclass(frozen=True, slots=True)
class Published:
    """A published model. pull_request: its address, or None. already: it was published before. branch: the one that
    was requested, or None."""

    repository: str
    commit: str
    url: str
    pull_request: str | None
    already: bool
    branch: str | None = None

    _repr_html_ = drawn

    def as_dict(self) -> dict[str, Any]:
        return {
            "repository": self.repository,
            "commit": self.commit,
            "url": self.url,
            "pull_request": self.pull_request,
            "already": self.already,
        }


def check_repository(name: str, folder: str | os.PathLike[str] = "") -> None:
    """Raise UsageError for what cannot be a repository's name. folder: the output that goes there, if it is known."""
    try:
        named = parse_location(name)
    except ValueError:
        named = None
    if named == Location(name):
        return
    bare = name.removeprefix("hf://")
    fix = "write org/name"
    if bare != name and named == Location(bare):
        fix = f"write `{bare}`"
    elif folder and Path(name).is_dir():
        fix = f"the folder comes first: `skillmerge push {shlex.quote(name)} {shlex.quote(os.fspath(folder))}`"
    raise UsageError(f"`{name}` is not a repository name", fix=fix)
