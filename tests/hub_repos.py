"""What the Hub on loopback holds: repositories with commits, branches and pull requests, and their files."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

TOKEN = "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"
LFS_SIZE = 10_000
"""Larger files than this, and weights, are LFS files."""


@dataclass(frozen=True)
class Blob:
    """A file at a commit. LFS files have `sha256`; their bytes are in the store, by that name."""

    size: int
    git_sha1: str
    sha256: str | None = None
    content: bytes = b""

    @property
    def etag(self) -> str:
        return self.sha256 or self.git_sha1


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    parents: dict[str, str | None] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    discussions: list[dict[str, Any]] = field(default_factory=list)
    lfs: set[str] = field(default_factory=set)
    """What was uploaded to it."""
    card: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


@dataclass
class Fault:
    """What to do instead of answering: a status, a reset, a short body, the bytes of another commit…"""

    kind: str
    where: re.Pattern[str]
    times: int
    after: int = 0
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    action: Callable[[], None] | None = None


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    range: str | None
    authorised: bool
    host: str


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
