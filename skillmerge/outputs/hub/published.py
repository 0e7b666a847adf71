"""Where on the Hub a model is or goes: the name of a repository, and what was published there."""

from __future__ import annotations

from dataclasses import dataclass
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


def check_repository(name: str) -> None:
    """Raise UsageError for what cannot be a repository's name."""
    try:
        named = parse_location(name)
    except ValueError:
        named = None
    if named != Location(name):
        raise UsageError(f"`{name}` is not a repository name", fix="write org/name")
