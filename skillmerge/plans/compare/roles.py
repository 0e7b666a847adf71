"""What a formula does with each of its models: the facts that decide which differences between them matter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from skillmerge.methods.terms import Term, weights

_TOKEN_MATRIX = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings|shared|tok_embeddings|lm_head|embed_out|embed_in)\.weight$"
)


@dataclass(frozen=True, slots=True)
class Role:
    """What a formula does with one model.

    added, subtracted: whether its factor is above and below 0 in some tensor; neither where it is 0 everywhere, and
    such a model is not compared. tokens: the matrices with a row for each token (embedding, head), by the donor's
    names, in which its factor is not 0.
    """

    added: bool = False
    subtracted: bool = False
    tokens: frozenset[str] = frozenset()

    @property
    def used(self) -> bool:
        return self.added or self.subtracted


Roles = Mapping[str, Role]
"""By the names that plans call models by, `minus_of` a stored skill included."""


def roles_of(terms: Mapping[str, Term | None]) -> dict[str, Role]:
    """The roles of the models that are named in `terms`, by the donor's tensors' names; see `terms.weights`."""
    signs: dict[str, set[bool]] = {}
    tokens: dict[str, set[str]] = {}
    known: dict[int, dict[str, float]] = {}  # by the term's identity: thousands of tensors share a few terms
    for tensor, term in terms.items():
        if id(term) not in known:
            known[id(term)] = weights(term)
            for model, factor in known[id(term)].items():
                signs.setdefault(model, set()).update([factor > 0] if factor else [])
        if is_token_matrix(tensor):
            for model, factor in known[id(term)].items():
                tokens.setdefault(model, set()).update([tensor] if factor else [])
    return {
        model: Role(True in found, False in found, frozenset(tokens.get(model, ()))) for model, found in signs.items()
    }


def is_token_matrix(tensor: str) -> bool:
    """Whether a tensor has, by its name, a row for each token."""
    return _TOKEN_MATRIX.search(tensor) is not None
