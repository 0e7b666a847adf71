"""One finding of the comparison of models, as plain data: what plans, manifests and `--json` hold of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Level = Literal["problem", "warning", "note"]


@dataclass(frozen=True, slots=True)
class Compared:
    """A difference between models, or between a model and what it says of itself.

    name: what `accept` calls it, or None where it cannot be accepted. key: what differs, in the words of the file
    that says it. values: of each model that was looked at, for people. accepted: whether the recipe settles it.
    message: what it is. help: what to do about it, or None.
    """

    name: str | None
    key: str
    file: str
    level: Level
    values: Mapping[str, str]
    accepted: bool
    message: str
    help: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The finding as plain data, without `help`, which is about the command that was run."""
        return {key: value for key, value in asdict(self).items() if key != "help"}
