"""Where a model is: a folder, or hf://org/name[@revision][/subfolder]. Text only, no requests."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Protocol
from urllib.parse import unquote

_HUB = "hf://"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_LOCATION = re.compile(
    r"(?P<repository>[^/@]+/[^/@]+)"
    r"(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?"
    r"(?:/(?P<subfolder>.+?))?/?"
)


class ModelPlace(Protocol):
    """Where a model is. scheme: how its URI begins, "" for a path. name: what people call it. versioned: whether it
    has commits, so that what it names may change; revision: which of them, "" for the latest."""

    @property
    def scheme(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def versioned(self) -> bool: ...
    @property
    def revision(self) -> str: ...
    @property
    def pinned(self) -> bool:
        """Whether the revision is a commit, which never means anything else."""

    def at(self, commit: str) -> ModelPlace:
        """The same place at a commit."""


@dataclass(frozen=True, slots=True)
class Local:
    """A folder on this machine."""

    path: Path
    scheme: ClassVar[str] = ""
    versioned: ClassVar[bool] = False
    revision: ClassVar[str] = ""
    pinned: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return str(self.path)

    def at(self, commit: str) -> Local:
        return self

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True, slots=True)
class Location:
    """A model on the Hub. revision: a branch, tag, `refs/pr/N` or commit; "" for the default branch.
    subfolder: "" for the repository's top."""

    repository: str
    revision: str = ""
    subfolder: str = ""
    scheme: ClassVar[str] = "hf"
    versioned: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return self.repository

    @property
    def pinned(self) -> bool:
        """Whether the revision is a commit, which never means anything else."""
        return _COMMIT.fullmatch(self.revision) is not None

    def at(self, commit: str) -> Location:
        return replace(self, revision=commit)

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{_HUB}{self.repository}{revision}{'/' + self.subfolder if self.subfolder else ''}"


def parse_location(uri: str) -> Location:
    """Raises ValueError. A revision with a slash in it (but for refs/pr/N) is written with %2F."""
    match = _LOCATION.fullmatch(uri.removeprefix(_HUB))
    if match is None or not _REPOSITORY.fullmatch(match["repository"]) or uri.endswith("@"):
        raise ValueError(f"`{uri}` is not a model on the Hub; write hf://org/name, hf://org/name@revision/subfolder")
    subfolder = match["subfolder"] or ""
    revision = unquote(match["revision"] or "")
    if any(part in ("", ".", "..") for part in subfolder.split("/") if subfolder) or re.search(
        r"[\s\\]|\.\.", revision
    ):
        raise ValueError(f"`{uri}` has a revision or subfolder that cannot be")
    return Location(match["repository"], revision, subfolder)


def on_hub(uri: str) -> Location | None:
    """The model on the Hub that a URI names, or None for one elsewhere. Raises ValueError as `parse_location`."""
    return parse_location(uri) if uri.startswith(_HUB) else None
