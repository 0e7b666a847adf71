"""The tokens of two models side by side: which are the same, have another id, or are in one of them only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from skillmerge.errors import one_line

SPELLINGS = {"<0x09>": "\t"}
"""A token that Gemma's two tokenizers spell differently."""

SHOWN = 8
"""How many tokens of a kind are given as examples."""

_LONGEST = 24
"""Characters of a token that are shown."""


def shown(token: str) -> str:
    """Return a token as text that fits on one line of a terminal."""
    text = one_line(token[: 2 * _LONGEST])
    return text if len(text) <= _LONGEST and len(token) <= _LONGEST else text[: _LONGEST - 1] + "…"


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of one model. texts: id -> text. ids: text -> id, for texts that have one id. twice: the others, with
    all of their ids."""

    texts: Mapping[int, str]
    ids: Mapping[str, int]
    twice: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, texts: Mapping[int, str]) -> Tokens:
        ids = {text: number for number, text in texts.items()}
        if len(ids) == len(texts):
            return cls(texts, ids)
        every: dict[str, list[int]] = {}
        for number, text in texts.items():
            every.setdefault(text, []).append(number)
        twice = {text: tuple(sorted(numbers)) for text, numbers in every.items() if len(numbers) > 1}
        return cls(texts, {text: number for text, number in ids.items() if text not in twice}, twice)

    def row(self, text: str, rows: int) -> int | None:
        """Return the row of a token in a matrix with so many; None if it has none, or more than one."""
        number = self.ids.get(text)
        if number is None and text not in self.twice:
            number = next((self.ids[it] for it in _spellings(text) if it in self.ids), None)
        return number if number is not None and number < rows else None

    def beyond(self, rows: int) -> list[int]:
        """Return the ids for which a matrix with so many rows has none."""
        return sorted(number for number in self.texts if number >= rows)


def _spellings(text: str) -> list[str]:
    return [other for pair in SPELLINGS.items() if text in pair for other in pair if other != text]


@dataclass(frozen=True, slots=True)
class Matching:
    """A model's tokens beside the donor's: how many have the same id, another one, are the donor's only, the model's
    only; and how many of the model's rows no token has. moved, here, there: the first of these as `shown`, with the
    ids in donor and model of what has moved. twice, beyond: tokens with several ids, and ids without a row."""

    same: int
    moved_count: int
    here_count: int
    there_count: int
    padding: int
    moved: tuple[tuple[str, int, int], ...] = ()
    here: tuple[str, ...] = ()
    there: tuple[str, ...] = ()
    twice: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    beyond: Mapping[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "same": self.same,
            "moved": self.moved_count,
            "only_donor": self.here_count,
            "only_model": self.there_count,
            "padding": self.padding,
            "examples": {
                "moved": [{"token": text, "donor": here, "model": there} for text, here, there in self.moved],
                "only_donor": list(self.here),
                "only_model": list(self.there),
            },
        }


def matched(donor: Tokens, donor_rows: int, model: Tokens, rows: int) -> Matching:
    """Return how the tokens of a model lie beside the donor's. rows: those of their matrices."""
    same, moved, here = 0, [], []
    for number, text in sorted(donor.texts.items()):
        if number >= donor_rows or text in donor.twice:
            continue
        row = model.row(text, rows)
        if row is None:
            here.append(text)
        elif row == number:
            same += 1
        else:
            moved.append((text, number, row))
    there = [
        text
        for number, text in sorted(model.texts.items())
        if number < rows and text not in model.twice and donor.row(text, donor_rows) is None
    ]
    return Matching(
        same, len(moved), len(here), len(there), rows - _below(model.texts, rows),
        tuple((shown(text), number, row) for text, number, row in moved[:SHOWN]),
        tuple(map(shown, here[:SHOWN])), tuple(map(shown, there[:SHOWN])),
        model.twice, {model.texts[it]: it for it in model.beyond(rows)},
    )  # fmt: skip


def _below(numbers: Iterable[int], rows: int) -> int:
    return sum(number < rows for number in numbers)
