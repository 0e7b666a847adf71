"""What a formula does with each of its models: the facts that decide which differences between them matter."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from skillmerge.checkpoints.model_config import sections
from skillmerge.methods.terms import Term, weights
from skillmerge.naming import layer_of, module_kind
from skillmerge.tensors import TensorSpec

_EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings|shared|tok_embeddings|embed_in|additional_embedding)\.weight$"
    r"|^transformer\.w\.weight$"
)
_HEAD = re.compile(
    r"(^|\.)(lm_head|embed_out|unembed|pred_layer\.proj|shared_head\.head|additional_fc)\.weight$"
    r"|^((language_)?model\.|transformer\.)*output(_layer)?\.weight$"
)
_NAMED = {
    "embed_tokens", "wte", "word_embeddings", "shared", "tok_embeddings", "embed_in", "w", "lm_head", "embed_out",
    "unembed", "proj", "head", "output", "output_layer", "additional_embedding", "additional_fc",
}  # fmt: skip
"""The modules that these patterns name: looking one up costs less than two searches."""
_ADDED = ("additional_embedding.weight", "additional_fc.weight")
"""What Idefics keeps beside an embedding and a head, in their modules: the rows of the tokens that it adds."""
_NO_TOKENS = re.compile(r"pos|wpe|type|segment|patch|visual|vision|image|audio", re.IGNORECASE)
"""Embeddings of something else."""


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


def roles_of(
    terms: Mapping[str, Term | None], copied: Collection[str] = (), matrices: Collection[str] = ()
) -> dict[str, Role]:
    """The roles of the models that are named in `terms`, by the donor's tensors' names; see `terms.weights`.

    copied: the tensors that `copy` takes as they are. They bring no skill, whatever model they are from. matrices:
    those with a row for each token, as of `token_matrices`.
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
        if tensor in matrices:
            for model, factor in known[key].items():
                tokens.setdefault(model, set()).update([tensor] if factor else [])
    return {
        model: Role(True in found, False in found, frozenset(tokens.get(model, ())), None in found)
        for model, found in signs.items()
    }


def token_matrices(tensors: Iterable[TensorSpec], config: Mapping[str, Any]) -> frozenset[str]:
    """Return the names of the matrices with a row for each token, by their names or by their rows.

    By rows: outside all layers, an embedding, a head, or a module of its own, with as many rows as the largest
    vocabulary of `config` or more.
    """
    return frozenset(heads_and_embeddings(tensors, config))


def row_count(name: str, tensors: Mapping[str, TensorSpec]) -> int:
    """Return for how many tokens a matrix has rows, together with what is stored beside it for added tokens."""
    for added in _ADDED:
        name = name.removesuffix(added) + "weight" if name.endswith(f".{added}") else name
    beside = (tensors.get(name.removesuffix("weight") + added) for added in _ADDED)
    return sum(spec.shape[0] for spec in (tensors.get(name), *beside) if spec is not None and spec.shape)


def heads(tensors: Iterable[TensorSpec], config: Mapping[str, Any]) -> frozenset[str]:
    """Return the names of the matrices that give each token its score."""
    return frozenset(name for name, head in heads_and_embeddings(tensors, config).items() if head)


def heads_and_embeddings(tensors: Iterable[TensorSpec], config: Mapping[str, Any]) -> dict[str, bool]:
    """Return the matrices with a row for each token -> whether each is a head."""
    sizes = [size for _, section in sections(config) if type(size := section.get("vocab_size")) is int and size > 0]
    rows, found = max(sizes, default=None), {}
    for spec in tensors:
        name = spec.name
        if _own_module(name) in _NAMED and (_HEAD.search(name) or _EMBEDDING.search(name)):
            found[name] = _HEAD.search(name) is not None
        elif rows is not None and len(spec.shape) == 2 and spec.shape[0] >= rows:  # few are as large
            kind = module_kind(name)
            alone = kind == "other" and name.count(".") == 1  # `head.weight`, `lm_loss.weight`
            if (kind in ("embedding", "head") or alone) and layer_of(name) is None and not _NO_TOKENS.search(name):
                found[name] = kind != "embedding"
    return found


def _own_module(name: str) -> str:
    """Return the module that a weight is of: `lm_head` of `model.lm_head.weight`."""
    return name.removesuffix(".weight").rpartition(".")[2]
