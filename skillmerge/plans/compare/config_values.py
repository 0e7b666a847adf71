"""The effective values of a model's configuration, whatever keys and defaults it uses.

`rope_theta` and `rope_scaling` are `rope_parameters`, `type` is `rope_type`, a window that is off is none. Knows one
configuration; `config` compares several.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from skillmerge.plans.compare.architectures import (
    ACTIVATIONS,
    DEFAULTS,
    ROPE_TYPES,
    SCALING_DEFAULTS,
    TEXT_OF,
    TRAINED_SCALINGS,
    WINDOW_OFF,
    WINDOW_PATTERNS,
    WITHOUT_ROPE_EVERY,
)
from skillmerge.plans.compare.table import ROWS, UNKNOWN

_TEXT = ("text_config", "llm_config", "language_config", "language_model_config", "thinker_config")
_PART = re.compile(r"(^|_)(config|encoder|decoder)$")
_NO_PARTS = ("quantization_config", "compression_config", "generation_config")
_NEAR = ("sliding_attention", "chunked_attention")
ACTIVATION_KEYS = (
    "hidden_act", "activation_function", "activation", "activation_type", "ff_activation", "ffn_act_fn",
    "feed_forward_proj", "dense_act_fn",
)  # fmt: skip
_NO_FACTOR = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_MOST_LAYERS = 100_000


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part that describes the language model, with the keys that the whole sets for all parts."""
    for key in _TEXT:
        inner = config.get(key)
        if isinstance(inner, Mapping) and inner:
            return {**{name: value for name, value in config.items() if name not in _TEXT}, **text_part(inner)}
    return config


def is_part(key: str, value: Any) -> bool:
    """Return whether an entry of a configuration is the configuration of a part."""
    return isinstance(value, Mapping) and _PART.search(key) is not None and key not in _NO_PARTS


def other_parts(text: Mapping[str, Any], inside: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the parts beside the language model and in it, each by its keys. text: as of `text_part`."""
    for key, part in text.items():
        if is_part(key, part) and part:
            yield inside + key, part
            yield from other_parts(part, f"{inside}{key}.")


def text_kind(config: Mapping[str, Any]) -> str | None:
    """Return the name of the language model's architecture, whose defaults apply to this configuration."""
    kind = text_part(config).get("model_type")
    return kind.removesuffix("_text") if isinstance(kind, str) else None


def architecture(config: Mapping[str, Any]) -> str | None:
    """Return the language model's architecture: the same in a text model and in a multimodal model that contains it."""
    kind = text_kind(config)
    return TEXT_OF.get(kind, kind) if kind is not None else None


def layers(part: Mapping[str, Any]) -> int | None:
    """Return the number of layers that a part states, if it is plausible."""
    found = _first(part, _LAYERS)
    return found if type(found) is int and 0 <= found <= _MOST_LAYERS else None


def effective(part: Mapping[str, Any], kind: str | None) -> dict[str, Any]:
    """Return the effective value of each table row that this part of a configuration sets.

    kind: the architecture, whose defaults apply to missing keys. Rows without a value and without a default, and
    missing keys of an unknown architecture, are left out.
    """
    kind = kind if isinstance(kind, str) else None  # files may say anything
    defaults = DEFAULTS.get(kind or "", {})
    found = dict(_worked_out(part, kind, defaults))
    for row in ROWS:
        if row.keys:
            value = _first(part, row.keys)
            if value is None and any(key in part for key in row.keys):
                value = row.default  # null is explicit, so the architecture's default does not apply
            elif value is None:
                absent = row.default if kind in DEFAULTS else UNKNOWN
                value = next((defaults[key] for key in (row.what, *row.keys) if key in defaults), absent)
            if row.default is False and isinstance(value, int | None):
                value = bool(value)  # 4 means on, like true
            if value is not UNKNOWN:
                found[row.what] = _activation(value) if row.name == "activation" else _plain(value)
    return found


def _worked_out(part: Mapping[str, Any], kind: str | None, defaults: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from _rope(part, defaults, kind in DEFAULTS)
    heads, hidden = _first(part, ("num_attention_heads", "n_head", "n_heads")), _first(part, ("hidden_size", "n_embd"))
    kv_heads = _first(part, ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num"))
    if kv_heads is None:
        assumed = heads if kind in DEFAULTS else None
        kv_heads = heads if "num_key_value_heads" in part else defaults.get("kv_heads", assumed)
    if kv_heads is not None:
        yield "key and value heads", kv_heads
    size = _first(part, ("head_dim", "kv_channels"))
    if size is None and "head_dim" not in part:
        size = defaults.get("head_dim")
    equal = kind in DEFAULTS or "head_dim" in part
    if size is None and equal and type(heads) is int and type(hidden) is int and heads > 0:
        size = hidden // heads
    if size is not None and not part.get("qk_rope_head_dim"):  # latent attention has other sizes
        yield "head size", size
    activation = _first(part, ("hidden_activation",)) or _first(part, ACTIVATION_KEYS)
    if kind == "gemma" and _first(part, ("hidden_activation",)) is None:
        activation = None  # `gelu` there has always been computed as its tanh approximation
    activation = activation or defaults.get("activation")
    if activation is not None:
        yield "activation", _activation(activation)
    if kind in DEFAULTS or "sliding_window" in part:
        yield "sliding window", _window(part, kind, defaults)
    if kind in WITHOUT_ROPE_EVERY:
        every, listed = part.get("no_rope_layer_interval"), part.get("no_rope_layers")
        every = every if type(every) is int and every else WITHOUT_ROPE_EVERY[kind]
        usual = [int((index + 1) % every != 0) for index in range(layers(part) or 0)]
        yield "layers without positions", _plain(listed if isinstance(listed, list) and listed else usual)


def _activation(value: Any) -> Any:
    """Return one name for each function. T5 also says whether it is gated, which the shapes show: `gated-gelu`."""
    if not isinstance(value, str):
        return _plain(value)
    function = "gelu_new" if value == "gated-gelu" else value.removeprefix("gated-")
    return ACTIVATIONS.get(function, function)


def _rope(part: Mapping[str, Any], defaults: Mapping[str, Any], known: bool) -> Iterator[tuple[str, Any]]:
    given = _table(part.get("rope_parameters"))
    nested = any(isinstance(value, Mapping) for value in given.values())
    main = _table(given.get("full_attention") or next(iter(given.values()), None)) if nested else given
    local = _table(given.get("sliding_attention")) if nested else {}
    old = _table(part.get("rope_scaling"))
    base = _first(main, ("rope_theta",)) or _first(part, ("rope_theta", "rotary_emb_base")) or old.get("rope_theta")
    base = base or defaults.get("rope base")
    if base is not None:
        yield "rope base", base
        near = local.get("rope_theta") or part.get("rope_local_base_freq") or defaults.get("rope local base")
        yield "rope local base", near if near != base else None
    turned = _first(main, ("partial_rotary_factor",)) or _first(part, ("partial_rotary_factor", "rotary_pct"))
    turned = turned or defaults.get("rope partial", 1.0 if known else None)
    if turned is not None:
        yield "rope partial", turned
    sections = _first(main, ("mrope_section",)) or _first(old, ("mrope_section",))
    if isinstance(sections, list):  # a text model has none, which means the same
        yield "rope sections", tuple(sections)
    if not known and not part.keys() & {"rope_scaling", "rope_parameters"}:
        return
    scaling = old or main  # transformers prefers the older key if it was added by hand
    kind = _first(scaling, ("rope_type", "type"))
    kind = ROPE_TYPES.get(kind, kind) if isinstance(kind, str | None) else str(kind)
    factors = {
        key: _plain(value)
        for key, value in scaling.items()
        if value is not None and key not in _NO_FACTOR and SCALING_DEFAULTS.get(key) != value
    }
    length = "original_max_position_embeddings"
    if kind in ("linear", "dynamic"):
        factors.pop(length, None)
    elif (stated_length := part.get(length, part.get("max_position_embeddings"))) is not None:
        factors.setdefault(length, stated_length)
    stated = (kind, *sorted(factors.items())) if kind != "default" else None
    yield "rope trained scaling", stated if kind in TRAINED_SCALINGS else None
    yield "rope scaling", stated if kind not in TRAINED_SCALINGS else None


def _window(
    part: Mapping[str, Any], kind: str | None, defaults: Mapping[str, Any]
) -> tuple[int, tuple[int, ...]] | None:
    """Return the window and the layers that have it, or None if none applies."""
    size = part.get("sliding_window", defaults.get("sliding_window"))
    on = part.get("use_sliding_window")
    longest = _first(part, ("max_position_embeddings", "n_positions"))
    if type(size) is not int or size <= 0 or on is False or (on is None and kind in WINDOW_OFF):
        return None
    count = layers(part) or 0
    kinds, pattern = part.get("layer_types"), part.get("sliding_window_pattern") or WINDOW_PATTERNS.get(kind or "")
    if isinstance(kinds, list):
        where = tuple(index for index, each in enumerate(kinds) if each in _NEAR)
    elif type(pattern) is int and pattern > 0:
        where = tuple(index for index in range(count) if (index + 1) % pattern)
    else:
        first = part.get("max_window_layers") if kind in WINDOW_OFF else 0
        where = tuple(range(max(0, first) if type(first) is int else 0, count))
    if not where or (type(longest) is int and size >= longest):
        return None
    return size, where


def _first(table: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    return next((table[key] for key in keys if table.get(key) is not None), None)


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _plain(value: Any) -> Any:
    """Return a value that can be compared and hashed: lists and tables become tuples."""
    if isinstance(value, list):
        return tuple(_plain(item) for item in value)
    if isinstance(value, Mapping):
        return tuple(sorted((str(key), _plain(item)) for key, item in value.items()))
    return value
