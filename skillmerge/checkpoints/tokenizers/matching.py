"""The tokens of two models side by side: which are the same, have another id, or are in one of them only."""

from __future__ import annotations

from collections.abc import Mapping
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

    def beyond(self, rows: int) -> list[int]:
        """Return the ids for which a matrix with so many rows has none."""
        return sorted(number for number in self.texts if number >= rows)


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


def placed(donor: Tokens, model: Tokens) -> dict[int, int]:
    """Return the donor's ids -> the model's, for tokens that both have, with one id each."""
    if model.texts is donor.texts:
        return {number: number for number in donor.ids.values()}
    found = {number: model.ids[text] for text, number in donor.ids.items() if text in model.ids}
    for pair in SPELLINGS.items():
        here = [donor.ids[text] for text in pair if text in donor.ids]
        there = [model.ids[text] for text in pair if text in model.ids]
        if len(here) == len(there) == 1:
            found[here[0]] = there[0]
    return found


def matched(donor: Tokens, donor_rows: int, model: Tokens, rows: int) -> Matching:
    """Return how the tokens of a model lie beside the donor's. rows: those of their matrices."""
    places = {here: there for here, there in placed(donor, model).items() if here < donor_rows and there < rows}
    moved = sorted((here, there) for here, there in places.items() if here != there)
    here = sorted(number for number in donor.ids.values() if number < donor_rows and number not in places)
    common, named = {*places.values()}, sum(number < rows for number in model.texts)
    there = sorted(number for number in model.ids.values() if number < rows and number not in common)
    return Matching(
        len(places) - len(moved), len(moved), len(here), len(there), rows - named,
        tuple((shown(donor.texts[one]), one, other) for one, other in moved[:SHOWN]),
        tuple(shown(donor.texts[it]) for it in here[:SHOWN]),
        tuple(shown(model.texts[it]) for it in there[:SHOWN]),
        model.twice, {model.texts[it]: it for it in model.beyond(rows)},
    )  # fmt: skip
