"""The comparison of a rebuilt output's manifest with the recorded one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from skillmerge.errors import CheckFailed
from skillmerge.outputs.manifest import ManifestBody
from skillmerge.outputs.staging import MANIFEST_FILE

_UNCOMPARED = ("tool", "accepted", "warnings")
"""The version, and words for people, which may change between versions."""


def compare(place: Path, one: ManifestBody, again: ManifestBody) -> None:
    """Raise CheckFailed if `again` lacks or changes anything in `one`, except the version; it may have more."""
    new = ManifestBody.as_dict(again)
    for key, value in ManifestBody.as_dict(one).items():
        if key not in _UNCOMPARED and not _is_said(value, new[key]):
            raise CheckFailed(f"{place / MANIFEST_FILE}: `{key}` differs when rebuilt")


def _is_said(old: Any, new: Any) -> bool:
    if isinstance(old, dict):
        return all(key in new and _is_said(value, new[key]) for key, value in old.items())
    if isinstance(old, list):
        return len(old) == len(new) and all(map(_is_said, old, new))
    return bool(old == new)
