"""What matching rows by token comes to, for people: how the models' tokens lie beside the donor's, and what each matrix
takes from where."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from skillmerge.checkpoints.tokenizers.matching import SHOWN, Matching, shown
from skillmerge.plans.compare.found import Compared

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Rows:
    """One matrix of the output. merged: how many of its rows follow the formula; the others are the donor's, but for
    those of `taken`, which are another model's: tokens by model."""

    rows: int
    merged: int
    taken: Mapping[str, Sequence[str]]

    @property
    def of_donor(self) -> int:
        return self.rows - self.merged - sum(map(len, self.taken.values()))

    def as_dict(self) -> dict[str, Any]:
        taken = {"taken": {model: list(tokens) for model, tokens in self.taken.items()}} if self.taken else {}
        return {"rows": self.rows, "merged": self.merged, "donor": self.of_donor, **taken}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The rows of a recipe with `vocabulary: by-token`. models: how each lies beside the donor, itself first.
    matrices: by the donor's names, those that read other models."""

    donor: str
    models: Mapping[str, Matching]
    matrices: Mapping[str, Rows]

    def as_dict(self) -> dict[str, Any]:
        """Return what `plan --json`, saved plans and manifests have of it."""
        return {
            "rows": "by-token",
            "models": {name: it.as_dict() for name, it in self.models.items()},
            "matrices": {name: it.as_dict() for name, it in self.matrices.items()},
        }

    def problems(self, file: str) -> Iterator[Compared]:
        """Yield the tokens for which a model has more than one row, or none. file: the donor's vocabulary."""
        for name, it in self.models.items():
            if it.twice:
                named = [f"`{shown(text)}` is {' and '.join(map(str, ids[:2]))}" for text, ids in _first(it.twice)]
                yield _problem(name, file, f"{_count(it.twice)} of `{name}` {_have(it.twice)} more than one id", named)
            if it.beyond:
                named = [f"`{shown(text)}` is {number}" for text, number in _first(it.beyond)]
                yield _problem(name, file, f"{_count(it.beyond)} of `{name}` {_have(it.beyond)} no row", named)


def _problem(name: str, file: str, message: str, named: Sequence[str]) -> Compared:
    said = "; ".join(named[:SHOWN]) + ("; …" if len(named) > SHOWN else "")
    help = (
        f"check that the tokenizer of `{name}` belongs to its weights; to leave the rows of such tokens as they are in "
        "the donor, write `accept: [tokenizer]`"
    )
    return Compared("tokenizer", "tokens", file, "problem", {name: said}, False, f"{message}: {said}", help)


def _first(found: Mapping[str, T]) -> list[tuple[str, T]]:
    return list(islice(found.items(), SHOWN + 1))


def _count(found: Mapping[str, Any]) -> str:
    return f"{len(found):,} tokens" if len(found) > 1 else "a token"


def _have(found: Mapping[str, Any]) -> str:
    return "have" if len(found) > 1 else "has"
