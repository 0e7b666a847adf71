"""One finding of the comparison of models, as plain data: what plans, manifests and `--json` hold of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from skillmerge.errors import one_line

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

    def __post_init__(self) -> None:
        """Make visible what models' files say: a JSON text can be a line's end, or half of a surrogate pair."""
        shown = {one_line(model): one_line(value) for model, value in self.values.items()}
        for field, text in (("key", one_line(self.key)), ("values", shown), ("message", one_line(self.message))):
            object.__setattr__(self, field, text)

    def as_dict(self) -> dict[str, Any]:
        """The finding as plain data, without `help`, which is about the command that was run."""
        return {key: value for key, value in asdict(self).items() if key != "help"}
