"""What a formula does with each of its models, which decides which differences between them matter."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from skillmerge.checkpoints.model_config import sections
from skillmerge.methods.terms import Term, spread
from skillmerge.naming import layer_of, module_kind
from skillmerge.tensors import TensorSpec

_EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings|shared|tok_embeddings|embed_in|additional_embedding)\.weight$"
    r"|^transformer\.w\.weight$"
)
_HEAD = re.compile(
    r"(^|\.)(lm_head|embed_out|unembed|pred_layer\.proj|shared_head\.head|additional_fc)\.weight$"
    r"|^((language_)?model\.|transformer\.)*(output(_layer)?|ff_out)\.weight$|\.decoder\.output_projection\.weight$"
)
_NAMED = {
    "embed_tokens", "wte", "word_embeddings", "shared", "tok_embeddings", "embed_in", "w", "lm_head", "embed_out",
    "unembed", "proj", "head", "output", "output_layer", "additional_embedding", "additional_fc", "ff_out",
    "output_projection",
}  # fmt: skip
"""The modules in these patterns. A lookup is faster than two searches."""
ADDED = ("additional_embedding.weight", "additional_fc.weight")
"""Rows of added tokens, which Idefics stores in the modules of embedding and head."""
_NO_TOKENS = re.compile(r"pos|wpe|type|segment|patch|visual|vision|image|audio|entity|hash|\.dense\.", re.IGNORECASE)
"""Embeddings of something other than tokens, and what is in heads before them."""


@dataclass(frozen=True, slots=True)
class Role:
    """What a formula does with one model.

    added, subtracted: whether its factor is positive or negative in some tensor. copied: whether `copy` takes tensors
    from it. A model that is none of these is not compared. tokens: donor's names of the token matrices (embedding,
    head) in which its factor is not 0.
    """

    added: bool = False
    subtracted: bool = False
    tokens: frozenset[str] = frozenset()
    copied: bool = False

    @property
    def used(self) -> bool:
        return self.added or self.subtracted or self.copied


Roles = Mapping[str, Role]
"""By the names of models in plans, including `minus_of` a stored skill."""


def roles_of(
    terms: Mapping[str, Term | None], copied: Collection[str] = (), matrices: Collection[str] = ()
) -> dict[str, Role]:
    """Return the role of each model in `terms` (by the donor's tensor names); see `terms.spread`.

    copied: tensors that `copy` takes unchanged. They add no update, whichever model they come from. matrices: those
    with a row for each token, from `token_matrices`.
    """
    signs: dict[str, set[bool | None]] = {}
    tokens: dict[str, set[str]] = {}
    known: dict[tuple[int, bool], dict[str, float]] = {}  # by identity: thousands of tensors share a few terms
    for tensor, term in terms.items():
        key = id(term), tensor in copied
        if key not in known:
            known[key] = spread(term)
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

    By rows: an embedding, a head or a single module outside all layers, with at least as many rows as the largest
    vocabulary in `config`.
    """
    return frozenset(heads_and_embeddings(tensors, config))


def row_count(name: str, tensors: Mapping[str, TensorSpec]) -> int:
    """Return for how many tokens a matrix has rows, together with what is stored beside it for added tokens."""
    for added in ADDED:
        name = name.removesuffix(added) + "weight" if name.endswith(f".{added}") else name
    beside = (tensors.get(name.removesuffix("weight") + added) for added in ADDED)
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
