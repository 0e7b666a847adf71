"""What a formula does with each of its models: the facts that decide which differences between them matter."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from skillmerge.methods.terms import Term, weights

_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|shared|tok_embeddings|embed_in)\.weight$")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$|^((language_)?model\.|transformer\.)*output(_layer)?\.weight$")


@dataclass(frozen=True, slots=True)
class Role:
    """What a formula does with one model.

    added, subtracted: whether its factor in the formula is above and below 0 in some tensor. copied: whether `copy`
    takes tensors from it. A model that is none of these is not compared. tokens: the matrices with a row for each token
    (embedding, head), by the donor's names, in which its factor is not 0.
    """

    added: bool = False
    subtracted: bool = False
    tokens: frozenset[str] = frozenset()
    copied: bool = False

    @property
    def used(self) -> bool:
        return self.added or self.subtracted or self.copied


Roles = Mapping[str, Role]
"""By the names that plans call models by, `minus_of` a stored skill included."""


def roles_of(terms: Mapping[str, Term | None], copied: Collection[str] = ()) -> dict[str, Role]:
    """The roles of the models that are named in `terms`, by the donor's tensors' names; see `terms.weights`.

    copied: the tensors that `copy` takes as they are. They bring no skill, whatever model they are from.
    """
    signs: dict[str, set[bool | None]] = {}
    tokens: dict[str, set[str]] = {}
    known: dict[tuple[int, bool], dict[str, float]] = {}  # by identity: thousands of tensors share a few terms
    for tensor, term in terms.items():
        key = id(term), tensor in copied
        if key not in known:
            known[key] = weights(term)
            for model, factor in known[key].items():
                signs.setdefault(model, set()).update([None if tensor in copied else factor > 0] if factor else [])
        if is_token_matrix(tensor):
            for model, factor in known[key].items():
                tokens.setdefault(model, set()).update([tensor] if factor else [])
    return {
        model: Role(True in found, False in found, frozenset(tokens.get(model, ())), None in found)
        for model, found in signs.items()
    }


def is_token_matrix(tensor: str) -> bool:
    """Whether a tensor has, by its name, a row for each token."""
    return _EMBEDDING.search(tensor) is not None or is_head(tensor)


def is_head(tensor: str) -> bool:
    """Whether a tensor is, by its name, the matrix that gives each token its score."""
    return _HEAD.search(tensor) is not None
