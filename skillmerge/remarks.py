"""Problems, warnings and notes: what they are, and the names under which a recipe accepts differences.

A problem stops a command until it is settled by name. A warning needs attention: it is printed at once, even with
`-q`, and kept in every record of the run. A note is information. Knows nothing about what finds or shows them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

ACCEPTABLE = {
    "architecture": "another architecture, or another number of layers",
    "adapter-base": "adapters of one formula that were trained on different models",
    "rope": "another base or trained scaling of rotary positions",
    "rope-scaling": "scaling of rotary positions for long inputs in only some models",
    "heads": "other attention heads of the same shapes",
    "activation": "another activation function",
    "scales": "other caps, multipliers or scales of attention, embeddings or logits",
    "experts": "other routing of experts",
    "window": "another sliding window",
    "ties": "a head that is tied to the embedding in only some models",
    "tokenizer": "the same token id means different tokens, or is kept free in some models of a difference",
    "tokenization": "the same ids, but text is split in another way",
    "stop-tokens": "a model stops at a token that the output does not stop at",
    "chat-template": "other chat templates",
    "donor": "a sum of which it is unclear which model is the donor",
    "dtype-config": "weights and configuration of the donor that do not agree",
    "update-size": "an implausibly large update",
    "merged-share": "rules that take much of the model out of the formula",
    "quantised-difference": "a difference of quantized weights",
}
"""Names for `accept` in a recipe, and their meanings."""


@dataclass(frozen=True, slots=True)
class Remark:
    """One warning or note. level: `warning` or `note`. fix: what to do about it.

    name: under which a recipe accepts it, or None if it cannot be accepted. of_recipe: whether the recipe's text is
    at fault rather than a model: under `--strict` it exits with status 2 rather than 4.
    """

    level: str
    message: str
    fix: str | None = None
    name: str | None = None
    of_recipe: bool = False


def warning(message: str, fix: str | None = None, *, name: str | None = None, of_recipe: bool = False) -> Remark:
    """Return a warning."""
    return Remark("warning", message, fix, name, of_recipe)


def count_of(warnings: Iterable[object]) -> str:
    """Return `2 warnings`, or nothing if there are none."""
    count = len(list(warnings))
    return f"{count} warning{'s' if count > 1 else ''}" if count else ""
