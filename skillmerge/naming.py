"""Tensor names: the layer, its stack, and the kind of module.

Knows naming habits, never architectures: everything is read from the dotted name alone, so that new
architectures are handled like the rest. Names that say nothing are of kind `other`, outside all layers.
"""

from __future__ import annotations

import re
from functools import lru_cache

MODULE_KINDS = ("attention", "mlp", "norm", "embedding", "head", "router", "expert")
"""The kinds a recipe may select with `modules`, in the order in which people read a model."""

_LAYER = re.compile(r"(?:^|.*?\.)(?:(?:\w*_)?(?:layers?|h)|\w*blocks?)\.(?=\d+\.)")

_EXPERT = re.compile(r"(experts?)\.\d+\.")
_NUMBER = re.compile(r"(?:^|\.)experts?\.(\d{1,9})\.|\[(\d{1,9})\]$")
_SLICE = re.compile(r"\[\d+\]$")

PARTS = {
    "vision": re.compile(r"vision|visual|image|(^|[._])vit([._]|$)|siglip|clip"),
    "audio": re.compile(r"audio|speech|whisper"),
}
"""Parts of a model beside its language model, by the names of their tensors or their configuration."""

# The first pattern that matches decides: a norm inside an attention module is a norm.
_KIND_PATTERNS = tuple(
    (kind, re.compile(pattern, re.IGNORECASE))
    for kind, pattern in (
        ("router", r"(^|\.)(router|gate|\w*expert_gate)(\.|$)"),
        ("expert", r"(^|\.)(\w*_)?experts?(\.|$)"),
        ("norm", r"norm|(^|\.)ln(_\w+)?(\.|$)"),
        ("head", r"(^|\.)(lm_head|embed_out|proj_out|score|classifier|cls|pooler)(\.|$)"),
        ("attention", r"attn|attention"),
        ("mlp", r"mlp|ffn|feed_?forward|dense|(^|\.)(fc_?\d|w[123]|wi|wo|c_fc)(\.|$)"),
        ("embedding", r"embed|(^|\.)(wte|wpe|shared)(\.|$)"),
    )
)


@lru_cache(maxsize=1 << 17)
def layer_of(name: str) -> tuple[str, int] | None:
    """(stack, index) of the outermost layer: `model.layers.7.mlp.up_proj.weight` -> ("model.layers", 7)."""
    match = _LAYER.match(name)
    if match is None:
        return None
    stack = match.group()[:-1]
    return stack, int(name[match.end() :].split(".", 1)[0])


def layer_label(name: str) -> str:
    """Return the layer for people: `model.layers 7`, or `outside blocks`."""
    layer = layer_of(name)
    return f"{layer[0]} {layer[1]}" if layer is not None else "outside blocks"


def part_of(name: str) -> str:
    """Return `vision` or `audio`, or `text` for the language model."""
    return next((part for part, pattern in PARTS.items() if pattern.search(name)), "text")


@lru_cache(maxsize=1 << 17)
def module_kind(name: str) -> str:
    """Return one of MODULE_KINDS, or `other`."""
    return next((kind for kind, pattern in _KIND_PATTERNS if pattern.search(name)), "other")


def expert_of(name: str) -> int | None:
    """Return the number of the expert that a tensor belongs to, or a slice of one; None of any other."""
    match = _NUMBER.search(name)
    return int(match[1] or match[2]) if match is not None else None


def sliced(name: str, expert: int) -> str:
    """Return what one expert's slice of a packed tensor is called: `mlp.experts.down_proj[7]`."""
    return f"{name}[{expert}]"


def unsliced(name: str) -> str:
    """Return the tensor that a slice is of; of a tensor itself."""
    return _SLICE.sub("", name)


def summarised(name: str) -> str:
    """Return a tensor's name with the numbers of experts taken out: `mlp.experts.7.up_proj` ->
    `mlp.experts.*.up_proj`."""
    return _EXPERT.sub(r"\1.*.", name)
