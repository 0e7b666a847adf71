"""What `config.json` says of a stack of layers: their number, and everything that it says layer by layer.

A configuration says of layers what they are by lists with an entry for each, lists of numbers, and rules about numbers
(the first three, one in six). What each layer was in its own model it has to be in the stack; where no configuration
can say that, the stack is refused. Knows keys that configurations share, and no architecture beyond
`compare.architectures`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

from skillmerge.checkpoints.model_config import BLOCK_KEYS, layers_in
from skillmerge.naming import part_of
from skillmerge.plans.compare.architectures import NUMBERED, WINDOW_PATTERNS, WITHOUT_ROPE_EVERY
from skillmerge.plans.compare.config_values import text_kind
from skillmerge.plans.stacks.keys import (
    ALWAYS,
    BY_NUMBER,
    EVERY,
    FIRST,
    LAST,
    LISTED,
    LISTS,
    NO_LISTS,
    NUMBERS,
    QUANTISED,
    REPEATED,
    TABLES,
    UNKNOWN_NUMBERS,
    WHOLE,
)
from skillmerge.plans.stacks.order import Layer, Order, Unsayable, said_of, text_sections


def stacked_config(order: Order) -> tuple[dict[str, Any], tuple[tuple[str, Any, Any], ...]]:
    """Return the configuration of a stack, and what is edited in the first model's: key, old and new value.

    Raises Unsayable.
    """
    config = copy.deepcopy(dict(order.configs[order.first]))
    edits = []
    for where, section in text_sections(config):
        for key, value in list(section.items()):
            new = _edited(key, value, order)
            if new != value:
                section[key] = new  # type: ignore[index]
                edits.append((f"{where}.{key}".lstrip("."), value, new))
    _check_others(order)
    _check_unsaid(order)
    return config, tuple(edits)


def check_depth(order: Order) -> None:
    """Raise Unsayable where a stack has another depth than its first model, whose configuration says none."""
    count = order.counts[order.first]
    if order.configs[order.first] and layers_in(order.configs[order.first]) is None and len(order.layers) != count:
        raise Unsayable(
            f"config.json of `{order.first}` does not say how many layers there are, and the stack has "
            f"{len(order.layers)} in place of {count}",
            0,
            "add `num_hidden_layers` to it, with the other settings of the language model",
        )


def leveled(config: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's configuration with what another one says of layers: what still differs is not their places."""
    level, said = copy.deepcopy(dict(config)), said_of(like)
    depth, other = layers_in(config) or 0, layers_in(like) or 0
    for _, section in text_sections(level):
        assert isinstance(section, dict)
        for key in [key for key in section if key in BLOCK_KEYS or _is_about_layers(key, section[key], depth)]:
            section[key] = said.get(key)
    return {**{key: value for key, value in said.items() if _is_about_layers(key, value, other)}, **level}


def kind_of(order: Order, model: str, number: int) -> tuple[object, ...]:
    """Return all that a model's configuration says of one of its layers."""
    return tuple(_said_of_layer(key, value, number, model, order) for key, value in order.everything(model).items())


def _said_of_layer(key: str, value: Any, number: int, model: str, order: Order) -> object:
    count = order.counts[model]
    if key in NUMBERS and isinstance(value, list) and not (key == "moe_layers" and _is_flags(value)):
        return number + NUMBERS[key] in order.numbers(model, key)
    if key in TABLES:
        return repr(order.table(model, key).get(f"{number}"))
    if _by_layer(key, value, count):
        return repr(value[number])
    if key in FIRST and type(value) is int:
        return number < value + FIRST[key]
    if key in LAST and type(value) is int:
        return number < count - value
    if (key in EVERY and type(value) in (int, str)) or (key in REPEATED and isinstance(value, list)):
        return repr(_kind(key, value, number, model, order))
    return None


def _is_about_layers(key: str, value: Any, count: int) -> bool:
    rule = (key in FIRST or key in LAST or key in EVERY or key in EVERY.values()) and type(value) in (int, str)
    return rule or key in NUMBERS or key in TABLES or key == "attention_types" or _by_layer(key, value, count)


def _by_layer(key: str, value: Any, count: int) -> bool:
    """Return whether a list or a text has an entry for each of so many layers."""
    return (
        isinstance(value, list | str)
        and len(value) == count > 0
        and LISTS.search(key) is not None
        and (isinstance(value, list) or "pattern" in key)
        and NO_LISTS.search(key) is None
    )


def _edited(key: str, value: Any, order: Order) -> Any:
    """Return what a key of the first model's configuration says of the stack."""
    count, layers = order.counts[order.first], order.layers
    if key in WHOLE and value:
        raise Unsayable(f"model `{order.first}` cannot be stacked: {WHOLE[key]} (`{key}`)", 0)
    if key in BLOCK_KEYS and type(value) is int:
        return len(layers) if value == layers_in(order.configs[order.first]) else value
    if key == "attention_types":
        return _attention_types(value, order)
    if key in TABLES and isinstance(value, dict):
        said = {model: order.table(model, key) for model in order.counts}
        rows = ((f"{place}", said[layer.model].get(f"{layer.number}")) for place, layer in enumerate(layers))
        return {place: row for place, row in rows if row is not None}
    if key in NUMBERS and isinstance(value, list) and not (key == "moe_layers" and _is_flags(value)):
        shift = NUMBERS[key]
        return [
            place + shift
            for place, layer in enumerate(layers)
            if layer.number + shift in order.numbers(layer.model, key)
        ]
    if key in ALWAYS and isinstance(value, list) and len(value) not in (0, count):
        raise Unsayable(f"config.json of `{order.first}` has {len(value)} `{key}` for {count} layers", 0)
    if _by_layer(key, value, count):
        found = [_entry(key, value, layer, order) for layer in layers]
        return "".join(found) if isinstance(value, str) else found
    if key in FIRST and type(value) is int and value >= 0:
        return _first_of(key, value, order)
    if key in LAST and type(value) is int and value > 0:
        return _last_of(key, value, order)
    if (key in EVERY and type(value) in (int, str)) or (key in REPEATED and isinstance(value, list)):
        _check_every(key, value, order)
    elif UNKNOWN_NUMBERS.search(key) and part_of(key) == "text" and _is_numbers(value, count):
        _check_in_place(key, value, order)
    return value


def _entry(key: str, value: Any, layer: Layer, order: Order) -> Any:
    """Return what a list of a model says of one of its layers. value: the first model's."""
    found = order.said(layer.model, key)
    if type(found) is not type(value) or len(found) != order.counts[layer.model]:
        has = "has no" if found is None else "has another kind of"
        raise Unsayable(
            f"config.json of `{layer.model}` {has} `{key}`, by which that of `{order.first}` says what each layer is",
            layer.entry,
            "save both models with the same version of transformers",
        )
    return found[layer.number]


def _attention_types(value: Any, order: Order) -> Any:
    """Return GPT-Neo's kinds of attention, [[[kind, …], how often], …], for each layer."""
    kinds = {}
    for model, count in order.counts.items():
        try:
            kinds[model] = [
                kind for part, often in order.said(model, "attention_types") for kind in part * min(often, count + 1)
            ]
        except (TypeError, ValueError):
            kinds[model] = []
        if len(kinds[model]) != count:
            raise Unsayable(f"config.json of `{model}` has other `attention_types` than layers", order.entry(model))
    found = [kinds[layer.model][layer.number] for layer in order.layers]
    return value if found == kinds[order.first] else [[found, 1]]


def _first_of(key: str, value: int, order: Order) -> int:
    """Return how many of the first layers are of a kind in the stack."""
    shift = FIRST[key]
    if key == "max_window_layers" and not order.said(order.first, "use_sliding_window"):
        return value
    flags = []
    for layer in order.layers:
        said = _number_said(key, layer, order)
        flags.append(layer.number < said + shift)
    if flags == [place < value + shift for place in range(len(flags))]:
        return value
    count = flags.index(False) if False in flags else len(flags)
    if True in flags[count:] and not order.listed(key):
        place = flags.index(True, count)
        layer = order.layers[place]
        raise Unsayable(
            f"layer {place} of the stack, layer {layer.number} of `{layer.model}`, is of a kind that config.json can "
            f"give to the first layers only (`{key}`)",
            layer.entry,
            "leave that layer out, or begin with it",
        )
    return count - shift


def _last_of(key: str, value: int, order: Order) -> int:
    flags = []
    for layer in order.layers:
        flags.append(layer.number >= order.counts[layer.model] - _number_said(key, layer, order))
    count = flags[::-1].index(False) if False in flags else len(flags)
    if True in flags[: len(flags) - count] and not order.listed(key):
        layer = order.layers[flags.index(True)]
        raise Unsayable(
            f"layer {layer.number} of `{layer.model}` is of a kind that config.json can give to the last layers only "
            f"(`{key}`)",
            layer.entry,
            "leave that layer out, or end with it",
        )
    return count


def _number_said(key: str, layer: Layer, order: Order) -> int:
    found = order.said(layer.model, key)
    if type(found) is not int:
        raise Unsayable(
            f"config.json of `{layer.model}` does not say `{key}`, and that of `{order.first}` does", layer.entry
        )
    return found


def _check_every(key: str, value: Any, order: Order) -> None:
    """Check that each layer is of the kind that its number gives it, by a rule of one layer in so many."""
    if order.listed(key):
        return
    for place, layer in enumerate(order.layers):
        theirs = order.said(layer.model, key)
        if type(theirs) is not type(value) or _kind(key, theirs, layer.number, layer.model, order) != _kind(
            key, value, place, order.first, order
        ):
            raise _moved(f"`{key}: {value}`", key, place, layer)


def _kind(key: str, value: Any, number: int, model: str, order: Order) -> Any:
    if isinstance(value, str | list):
        return value[number % len(value)] if value else None
    if value < 1:
        return None
    lacks = EVERY[key]
    if isinstance(lacks, str):
        beyond = order.said(model, lacks)
        lacks = -beyond if type(beyond) is int else 0
    return (number + lacks) % value == 0


def _moved(rule: str, key: str, place: int, layer: Layer) -> Unsayable:
    listed = f", or list `{LISTED[key]}` in its config.json" if key in LISTED else ""
    return Unsayable(
        f"config.json of `{layer.model}` says by a layer's number what it is ({rule}), and its layer {layer.number} "
        f"would be layer {place}, of another kind",
        layer.entry,
        f"move layers to places of the same kind{listed}",
    )


def _check_in_place(key: str, value: Any, order: Order) -> None:
    """Refuse a list of layers that nobody here knows, unless each layer keeps its number."""
    other = next((model for model in order.counts if order.said(model, key) != value), None)
    moved = order.moved()
    if moved is not None or other is not None or len(order.layers) < order.counts[order.first]:
        raise Unsayable(
            f"config.json of `{order.first}` has `{key}`, which may be a list of layers that skillmerge does not know",
            moved.entry if moved is not None else order.entry(other or order.first),
            "remove it there if it is none",
        )


def _check_others(order: Order) -> None:
    """Refuse what another model's configuration says of its layers and the first one's does not."""
    known = said_of(order.configs[order.first])
    for model, count in order.counts.items():
        for key, value in said_of(order.configs[model]).items():
            idle = not value or (key == "max_window_layers" and not order.said(model, "use_sliding_window"))
            if key not in known and not idle and not order.listed(key) and _is_about_layers(key, value, count):
                raise Unsayable(
                    f"config.json of `{model}` says by `{key}` what its layers are, that of `{order.first}` does not",
                    order.entry(model),
                    "save both models with the same version of transformers",
                )


def _check_unsaid(order: Order) -> None:
    """Check the rules of architectures that a configuration need not say, and names of layers in other places."""
    config = order.configs[order.first]
    kind = text_kind(config) or ""
    for key, table, lists in (
        (
            "sliding_window_pattern",
            WINDOW_PATTERNS,
            ("sliding_window_pattern", "_sliding_window_pattern", "layer_types"),
        ),
        ("no_rope_layer_interval", WITHOUT_ROPE_EVERY, ("no_rope_layer_interval", "no_rope_layers")),
    ):
        if kind not in table or any(order.said(order.first, each) for each in lists):
            continue
        for place, layer in enumerate(order.layers):
            if ((layer.number + 1) % table[kind] == 0) != ((place + 1) % table[kind] == 0):
                raise _moved(f"one in {table[kind]}, as `{kind}` models do", key, place, layer)
    _check_quantised(order)
    numbered = next((f"`{key}`" for key in BY_NUMBER if order.said(order.first, key)), None)
    moved = order.moved()
    if moved is not None and (numbered is not None or kind in NUMBERED):
        raise Unsayable(
            f"layers of `{order.first}` compute with their numbers ({numbered or f'as `{kind}` models do'}), and layer "
            f"{moved.number} of `{moved.model}` gets another one",
            moved.entry,
            "leave the layers in their places",
        )


def _check_quantised(order: Order) -> None:
    """Refuse models that are quantized in different ways, and names of layers that move."""
    said = {model: [config.get(key) for key in QUANTISED] for model, config in order.configs.items()}
    if any(said[model] != said[order.first] for model in order.counts):
        raise Unsayable("the models of this stack are not quantized alike (`quantization_config`)", 0)
    named = re.search(r"(layers?|blocks?|\bh)[\\.(\[]+\d", str(said[order.first]))
    moved = order.moved()
    if named is not None and moved is not None:
        raise Unsayable(
            f"`quantization_config` of `{order.first}` names layers by their numbers, and layer {moved.number} moves",
            moved.entry,
            "stack the models before they are quantized",
        )


def _is_flags(value: Sequence[Any]) -> bool:
    return len(value) > 2 and set(map(repr, value)) <= {"0", "1", "True", "False"}


def _is_numbers(value: Any, count: int) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(type(item) is int and 0 <= item <= count for item in value)
        and len(set(value)) == len(value)
    )
