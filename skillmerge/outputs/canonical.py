"""The canonical form of a manifest, so that no byte of it can change unnoticed, and its digest.

Knows JSON, nothing about manifests.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

_HALVES = "backslashreplace"
"""The encoding of half a surrogate pair, which JSON can express: JSON's own escape."""


def to_bytes(document: Mapping[str, Any]) -> bytes:
    """Return a manifest in its canonical form: one line for each entry of its long lists, readable and easy to
    diff."""
    return lines_of(pieces_of(document))


def pieces_of(document: Mapping[str, Any]) -> dict[str, str | list[str] | None]:
    """Return the JSON of each value, and of each item of the lists."""
    return {
        key: [_dump(item) for item in value] if isinstance(value, list) and value else _dump(value)
        for key, value in document.items()
    }


def lines_of(pieces: Mapping[str, str | list[str] | None]) -> bytes:
    lines = []
    for key, piece in pieces.items():
        if isinstance(piece, list):
            piece = "[\n" + ",\n".join("    " + item for item in piece) + "\n  ]"
        lines.append(f"  {json.dumps(key)}: {piece}")
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode("utf-8", _HALVES)


def digest_of(pieces: Mapping[str, str | list[str] | None]) -> str:
    """Return the digest of the document on one line; `digest` itself is left out, as None."""
    rows = [
        f"{_dump(key)}: " + ("[" + ", ".join(piece) + "]" if isinstance(piece, list) else piece)
        for key, piece in pieces.items()
        if piece is not None
    ]
    return hashlib.sha256(("{" + ", ".join(rows) + "}").encode("utf-8", _HALVES)).hexdigest()


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(", ", ": "))
