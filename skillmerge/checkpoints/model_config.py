"""Facts in `config.json` about the weights beside it, as far as architectures share keys.

Vocabulary, number of blocks, tied embeddings, quantization. Knows the keys that many configs share, never
an architecture: where a config is silent, nothing is concluded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from skillmerge.errors import one_line
from skillmerge.naming import layer_of, module_kind, part_of
from skillmerge.tensors import DTYPES, TensorSpec

BLOCK_KEYS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "num_decoder_layers",
    "encoder_layers",
    "decoder_layers",
    "depth",
)
_TOKEN_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|shared|tok_embeddings)\.weight$")
_QUANTISED_NAMES = re.compile(
    r"(_scale_inv|\.weight_scale(_2)?|\.input_scale|\.weight_global_scale|\.weight_zero_point|\.qweight|\.qzeros|\.weight_packed|\.absmax|\.quant_map|\.SCB"
    r"|\.quant_state\.\w+|_blocks|_scales)$"
)
_PLAIN = (".weight", ".bias")
"""How nearly all names end, which spares them the search: no quantized layout has such a name."""
_MODULE = re.compile(r"\.(weight|qweight|qzeros|SCB|absmax|weight_\w+)(\.[^.]+)*$")
"""Suffixes of a module's name in the names of its quantized tensors."""


def sections(config: Mapping[str, Any]) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """Yield the config itself and every table nested in it (`text_config`, `vision_config`), with its name."""
    yield "", config
    for key, value in config.items():
        if key.endswith("config") and isinstance(value, dict) and key != "quantization_config":
            for name, section in sections(value):
                yield f"{key}.{name}".rstrip("."), section


def layers_in(config: Mapping[str, Any]) -> int | None:
    """Return how many layers a config says that the model has, the language model if it has several parts."""
    for where, section in sorted(sections(config), key=lambda named: (named[0] != "", "text" not in named[0])):
        if part_of(where) != "text":
            continue  # of a tower of images or sounds, which says nothing of the language model
        count = next((section[key] for key in BLOCK_KEYS if type(section.get(key)) is int), None)
        if count is not None:
            return int(count)
    return None


def ties_embeddings(config: Mapping[str, Any]) -> bool:
    """Return whether the config says that the output head is the input embedding."""
    return any(section.get("tie_word_embeddings") is True for _, section in sections(config))


def tied_source(
    name: str, shape: tuple[int, ...], config: Mapping[str, Any], tensors: Mapping[str, TensorSpec]
) -> str | None:
    """Return the stored tensor that stands for `name` where the config ties them, or None."""
    if name in tensors or not ties_embeddings(config) or module_kind(name) not in ("head", "embedding"):
        return None
    candidates = [
        other
        for other, spec in tensors.items()
        if spec.shape == shape and (_TOKEN_EMBEDDING.search(other) or other == "lm_head.weight")
    ]
    return candidates[0] if len(candidates) == 1 else None


def quantised(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Return the tensors that are no plain numbers, or belong to such, and why.

    Where only the config says that a model is quantized, all of its matrices may be.
    """
    said = _said_quantised(config)
    marked: dict[str, str] = {}
    modules: dict[str, str] = {}
    for name, spec in tensors.items():
        packed = None if name.endswith(_PLAIN) else _QUANTISED_NAMES.search(name)
        if DTYPES[spec.dtype].kind == "quantised":
            marked[name] = f"tensor `{name}` holds {spec.dtype}, which means nothing without its scales"
        elif packed is not None and packed[0] in ("_blocks", "_scales"):
            if {_QUANTISED_NAMES.sub("", name) + part for part in ("_blocks", "_scales")} <= tensors.keys():
                marked[name] = f"tensor `{name}` belongs to packed blocks (MXFP4)"
        elif packed is not None:
            marked[name] = f"tensor `{name}` belongs to a quantized layout"
            modules.setdefault(_MODULE.sub("", name) + ".", marked[name])
    for name in tensors if modules else ():
        parts = name.split(".")
        prefixes = (".".join(parts[:count]) + "." for count in range(1, len(parts)))
        module = next((prefix for prefix in prefixes if prefix in modules), None)
        if module is not None and name not in marked and not name.endswith(".bias"):
            marked[name] = modules[module]
    if said is not None and not marked:
        marked = {name: said for name, spec in tensors.items() if len(spec.shape) > 1 and DTYPES[spec.dtype].is_float}
    return dict.fromkeys(marked, said) if said is not None else marked


def _said_quantised(config: Mapping[str, Any]) -> str | None:
    """Return what the config says of quantization, or None."""
    for where, section in sections(config):
        for key in ("quantization_config", "compression_config", "quantization"):
            details = section.get(key)
            if isinstance(details, dict) and details:
                method = details.get("quant_method") or ("MLX" if key == "quantization" else "unnamed method")
                return f"{where + ': ' if where else ''}config.json says it is quantized ({one_line(str(method))})"
    return None


def contradictions(config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return contradictions between config and shapes that keep every runtime from loading the model."""
    return [*_vocabulary(config, tensors), *_blocks(config, tensors)]


def _vocabulary(config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]) -> list[str]:
    sizes = {
        section["vocab_size"]: f"{where + '.' if where else ''}vocab_size"
        for where, section in sections(config)
        if type(section.get("vocab_size")) is int
    }
    embeddings = {
        name: shape[0] for name, shape in tensors.items() if len(shape) == 2 and _TOKEN_EMBEDDING.search(name)
    }
    if not sizes or not embeddings:
        return []
    return [
        f"config.json says {', '.join(f'{key} = {size}' for size, key in sizes.items())}, but `{name}` has {rows} rows"
        for name, rows in embeddings.items()
        if rows not in sizes and not any(rows >= size for size in sizes)
    ]


def _blocks(config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]) -> list[str]:
    stacks: dict[str, int] = {}
    for name in tensors:
        layer = layer_of(name)
        if layer is not None:
            stacks[layer[0]] = max(stacks.get(layer[0], 0), layer[1] + 1)
    counts = {
        section[key]: f"{where + '.' if where else ''}{key}"
        for where, section in sections(config)
        for key in BLOCK_KEYS
        if type(section.get(key)) is int
    }
    # With several stacks it is unclear which count is whose; extra blocks can be heads for speculative decoding.
    if len(stacks) != 1 or not counts:
        return []
    (stack, found) = next(iter(stacks.items()))
    if any(found >= count for count in counts):
        return []
    said = ", ".join(f"{key} = {count}" for count, key in counts.items())
    return [f"config.json says {said}, but the weights hold {found} layers (`{stack}.0` to `{stack}.{found - 1}`)"]
