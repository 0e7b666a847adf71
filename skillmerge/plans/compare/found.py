"""A finding of the model comparison, as plans, manifests and `--json` record it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from skillmerge.errors import one_line

Level = Literal["problem", "warning", "note"]


@dataclass(frozen=True, slots=True)
class Compared:
    """A difference between models, or between a model and its own description.

    name: its name in `accept`, or None if it cannot be accepted. key: what differs, as the file calls it. values: the
    value in each model, for people. accepted: whether the recipe accepts it. message: what is wrong. help: what to do
    about it, or None.
    """

    name: str | None
    key: str
    file: str
    level: Level
    values: Mapping[str, str]
    accepted: bool
    message: str
    help: str | None = None

    def __post_init__(self) -> None:
        """Escape text from models' files: JSON strings can hold line breaks and lone surrogates."""
        shown = {one_line(model): one_line(value) for model, value in self.values.items()}
        for field, text in (("key", one_line(self.key)), ("values", shown), ("message", one_line(self.message))):
            object.__setattr__(self, field, text)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data without `help`, which depends on the command."""
        return {key: value for key, value in asdict(self).items() if key != "help"}
