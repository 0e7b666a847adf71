"""The journal of a staging folder: its plan, its durable shards, and the progress of the output's rename.

One JSON line a row, each durable before the next step. Knows its own file and rows, nothing about the output's files.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skillmerge.durable import disk_errors, sync_file, write_whole
from skillmerge.engine.destination import ShardRecord

JOURNAL_VERSION = 2
NEW_JOURNAL = re.compile(r"journal\.jsonl(\.[0-9a-f]+)?\.new")
"""What a journal is called until it is whole."""


@dataclass(frozen=True, slots=True)
class Header:
    """The first row: the plan that the shards belong to, and the conditions of the run."""

    plan: str
    conditions: Mapping[str, Any]
    version: int = JOURNAL_VERSION

    def to_json(self) -> dict[str, Any]:
        return {"version": self.version, "plan": self.plan, **self.conditions}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Header:
        conditions = {key: value for key, value in row.items() if key not in ("version", "plan")}
        return cls(row["plan"], conditions, row["version"])


@dataclass(frozen=True, slots=True)
class Sealed:
    """The output of this plan is complete, except for shards that were uploaded and removed."""

    plan: str

    def to_json(self) -> dict[str, Any]:
        return {"sealed": self.plan}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Sealed:
        return cls(row["sealed"])


@dataclass(frozen=True, slots=True)
class Placing:
    """The output with this manifest is complete, and is about to be renamed.

    plan: the checks that it has passed: the digest of the whole plan with its gates (the header's digest excludes
    them), and whether warnings were problems; "" in journals before 0.2.
    """

    manifest_sha256: str | None
    plan: str = ""

    def to_json(self) -> dict[str, Any]:
        return {"manifest_sha256": self.manifest_sha256, **({"of": self.plan} if self.plan else {})}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Placing:
        return cls(row["manifest_sha256"], row.get("of", ""))


Row = Header | ShardRecord | Sealed | Placing

_KINDS: dict[str, type[Header] | type[ShardRecord] | type[Sealed] | type[Placing]] = {
    "plan": Header, "shard": ShardRecord, "sealed": Sealed, "manifest_sha256": Placing,
}  # fmt: skip
"""Kinds of rows, by a key that only they have."""


class Journal:
    """A journal's file, which need not exist. Writing raises UsageError and ResourceError."""

    def __init__(self, path: Path, token: str) -> None:
        """token: this run's own, for the name of what is not the journal yet."""
        self.path = path
        self._new = path.with_name(f"{path.name}.{token}.new")
        self._lock = threading.Lock()

    def read(self) -> list[Row]:
        """Return the complete rows, up to the first that a crash cut short."""
        try:
            content = self.path.read_bytes()
        except OSError:
            return []
        rows: list[Row] = []
        for line in content.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            try:
                row: Any = json.loads(line)
                kind = next((kind for key, kind in _KINDS.items() if key in row), None)
                if kind is not None:
                    rows.append(kind.from_json(row))
            except (ValueError, TypeError, KeyError, AttributeError):
                break
        return rows

    def start(self, rows: Sequence[Row]) -> None:
        """Replace the journal by these rows."""
        lines = "".join(json.dumps(row.to_json()) + "\n" for row in rows)
        write_whole(self.path, lines.encode(), self._new)

    def append(self, row: Row) -> None:
        """Add a row and make it durable; the files that it names must be durable already."""
        with self._lock, disk_errors(self.path), open(self.path, "a", encoding="utf-8") as journal:
            journal.write(json.dumps(row.to_json()) + "\n")
            journal.flush()
            sync_file(journal.fileno())
