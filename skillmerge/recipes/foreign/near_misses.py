"""Common mistakes in recipes, and the lines that were probably meant.

Knows the text's data and the names of keys; never reads a model.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from skillmerge.recipes.foreign.spellings import kind_meant, numbers_meant

_SELECTORS = ("layers", "experts", "tensors", "modules")
_RULE = (*_SELECTORS, "value", "ramp")
_ENDS = (("start", "end"), ("min", "max"), ("from", "to"), ("first", "last"), ("begin", "end"))
_LAYERS = re.compile(r"\d+(-\d*)?")
_BOUND = re.compile(r"([<>])=? ?([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,2})?)")
_LONGEST = 300
_TEXT_LISTS = ("ignore", "accept", "keep_dtype", "tags", "loads")
_UNDER_OUTPUT = (
    "path", "like", "dtype", "keep_dtype", "rounding", "seed", "shard_size", "license", "card", "push", "kind", "keep",
    "compression",
)  # fmt: skip
_UNDER_GATES = ("finite", "loads", "finite_logits", "changed", "vanished", "realised", "norm_ratio", "perplexity")
_ATLEAST = ("changed", "realised", "realised_lambda")
_ADAPTER = (
    "for a LoRA adapter, write `{adapter: FOLDER}`; with a model of this recipe, `{adapter: FOLDER, onto: MODEL}`"
)
_EXAMPLES = {
    "models": "write `models: {target: ./target, rl: ./rl, sft: hf://org/name}`",
    "merge": "write the arithmetic as text: `merge: target + lam * (rl - sft)`",
    "coefficients": "write `coefficients: {lam: 0.7}`",
    "output": "write `output: {path: ./merged}`",
    "rules": "write a list: `rules: [{layers: 0-3, value: 0.5}]`",
    "ramp": "write its two ends: `ramp: [0.5, 1]`",
    "copy": 'write `copy: [{tensors: "*.norm.*", from: target}]`',
    "ignore": 'write a list: `ignore: ["*.inv_freq"]`',
    "accept": "write a list: `accept: [rope]`",
    "gates": "write a table: `gates: {finite: true, loads: true}`",
    "perplexity": "write `perplexity: {text: FILE, max: 10}`",
    "commands": 'write `commands: [{run: "python score.py {}", min: 0.5}]`',
    "run": 'write `commands: [{run: "python score.py {}", min: 0.5}]`',
    "text": "write `perplexity: {text: FILE, max: 10}`",
    "rename": 'write `rename: [{from: "model.language_model.", to: "model."}]`',
    "tensors": 'write `copy: [{tensors: "*.norm.*", from: target}]`',
    "from": "name the model that they come from",
    "push": "write `push: {repo: org/name}`",
    "repo": "write `repo: org/name`",
    "seed": "write a whole number: `seed: 0`",
    "loads": "write `loads: true`, or a list: `loads: [transformers, vllm]`",
    "finite": "write `finite: true`",
}
"""Keys, and how they are written."""


def unknown_meant(data: Any, path: Sequence[int | str]) -> str | None:
    """Return what to write for the key at `path`, which its table does not have, or None."""
    if not _is_plain(data):
        return None
    table = data
    for part in path[:-1]:
        table = table[part]
    key = str(path[-1])
    if path[0] == "coefficients" and len(path) == 3:
        return _written("write", _schedule(str(path[1]), table))
    if path[0] == "models" and len(path) == 5:
        return _part(table, key)
    if path[0] == "models" and len(path) == 3:
        return _model(str(path[1]), table, key)
    return _top(data, key) if len(path) == 1 else None


def shape_meant(path: Sequence[int | str], value: Any) -> str | None:
    """Return what to write where the value at `path` has the wrong shape, or None."""
    key = str(next((part for part in reversed(path) if isinstance(part, str)), ""))
    if path[:1] == ("models",) and len(path) == 2:
        return f"write where it is: `{key}: ./{key}`, or `{key}: hf://org/name`"
    if path[:1] == ("gates",) and len(path) == 2 and key not in _EXAMPLES:
        return _written("write", _gate(key, value))
    if value in (None, "", [], {}) or not _is_plain(value):
        return _EXAMPLES.get(key)
    if isinstance(value, str) and key in _TEXT_LISTS and path[-1] == key:
        return _written("write a list:", f"{key}: {_flow([value])}")
    if tuple(path) in (("output",), ("output", "push")) and isinstance(value, str):
        return _written("write", f"{key}: {_flow({'path' if key == 'output' else 'repo': value})}")
    if tuple(path) == ("merge",) and isinstance(value, dict) and all(_is_number(it) for it in value.values()):
        return _written("write", "merge: " + " + ".join(f"{_flow(it)} * {name}" for name, it in value.items()))
    if path[0] == "tokens" and len(path) == 2 and isinstance(value, str):
        return _written("write", f"tokens: {_flow({key: {'from': value}})}")
    if key in ("rules", "copy", "stack") and isinstance(value, dict):
        return _written("write a list:", f"{key}: {_flow([value])}")
    if key == "rename" and isinstance(value, dict) and all(isinstance(new, str) for new in value.values()):
        return _written("write a list:", f"rename: {_flow([{'from': old, 'to': new} for old, new in value.items()])}")
    if key == "keep" and _is_number(value) and 1 < value <= 100:
        return f"write a share: `keep: {value / 100:.12g}` for {_flow(value)}%"
    return _EXAMPLES.get(key)


def list_meant(name: str, values: Sequence[Any]) -> str:
    """Return what to write where a list stands in the place of a coefficient."""
    if not _is_plain(values):
        return numbers_meant(name, ())
    if not values or not all(isinstance(item, dict) for item in values):
        return numbers_meant(name, values)
    rules: list[dict[str, Any]] = []
    default = {}
    for item in values:
        rule = {**item}
        if isinstance(rule.get("filter"), str):  # another tool's, where the first that matches wins
            rule = {"tensors": f"*{rule.pop('filter')}*", **rule}
        if set(rule) == {"value"} and _is_number(rule["value"]):
            default = {"default": rule["value"]}
        elif _is_rule(rule):
            rules.append(rule)
        else:
            return numbers_meant(name, values)
    ordered = rules[::-1] if any("filter" in item for item in values) else rules
    meant = _written("write", f"{name}: {_flow({**default, 'rules': ordered})}")
    return meant or numbers_meant(name, values)


def ramp_meant(values: Sequence[Any]) -> str | None:
    """Return what to write where a rule's `value` is a list, or None."""
    return f"for a ramp, write `ramp: {_flow(values)}`" if len(values) > 1 and all(map(_is_number, values)) else None


def _schedule(name: str, table: Mapping[str, Any]) -> str | None:
    """Return the schedule that a table with rule keys or unknown keys was probably meant to be."""
    given = {key: value for key, value in table.items() if key not in ("default", "rules")}
    rules = [*table["rules"]] if isinstance(table.get("rules"), list) else []
    ends = next((pair for pair in _ENDS if set(given) == {*pair}), None)
    kinds = {key: kind_meant(key) for key in given}
    if set(given) <= {*_RULE} and set(given) != {"value"}:
        rule = {key: given[key] for key in _RULE if key in given}
        rule = rule if set(rule) & {*_SELECTORS} else {"layers": "0-", **rule}
        rules.append(rule if set(rule) & {"value", "ramp"} else {**rule, "value": 0.5})
    elif ends is not None:
        rules.append({"layers": "0-", "ramp": [given[end] for end in ends]})
    elif given and all(kinds.values()):
        rules += [{"modules": kinds[key], "value": value} for key, value in given.items()]
    elif given and all(_LAYERS.fullmatch(key) for key in given):
        rules += [{"layers": key, "value": value} for key, value in given.items()]
    else:
        return None
    default = {"default": table["default"]} if "default" in table else {}
    return f"{name}: {_flow({**default, 'rules': rules})}"


def _model(name: str, table: Mapping[str, Any], key: str) -> str | None:
    place = table.get("path")
    if key in ("lora", "peft", "base", "base_model"):
        return _ADAPTER
    if key in ("weight", "scale", "density"):
        return f"write its factor into `merge`: {_flow(table[key])} * {name}"
    if key == "revision" and isinstance(place, str) and place.startswith("hf://"):
        return _written("write", f"path: {place}@{table[key]}")
    if key == "subfolder" and isinstance(place, str):
        return _written("write", f"path: {place.rstrip('/')}/{table[key]}")
    return None


def _part(table: Mapping[str, Any], key: str) -> str | None:
    """Return what was meant by a key of a part of a stack, by another tool's words."""
    value = table[key]
    if key == "model" and isinstance(value, str):
        return _written("write", f"from: {value}")
    ends = isinstance(value, list) and [type(end) for end in value] == [int, int]
    if key == "layer_range" and ends and 0 <= value[0] < value[1]:
        return f"write `layers: {value[0]}-{value[1] - 1}`: both ends count"
    return None


def _top(data: Mapping[str, Any], key: str) -> str | None:
    """Return what was meant by a key of the whole recipe."""
    value = data[key]
    for section, keys in (("output", _UNDER_OUTPUT), ("gates", _UNDER_GATES)):
        there = data.get(section, {})
        if key in keys and isinstance(there, dict):
            return _written(f"it is a key of `{section}`: write", f"{section}: {_flow({**there, key: value})}")
    if key in ("tokenizer_source", "tokenizer", "base_model", "base") and isinstance(data.get("output", {}), dict):
        models = data.get("models")
        like = value if isinstance(value, str) and isinstance(models, dict) and value in models else "MODEL"
        said = "the output takes tokenizer and config from its donor: write"
        return _written(said, f"output: {_flow({**data.get('output', {}), 'like': like})}")
    if key in ("merge_method", "method"):
        return "name no method, " + _EXAMPLES["merge"]
    if _is_number(value) and re.search(rf"\b{re.escape(key)}\b", str(data.get("merge", ""))):
        return _written("write", f"coefficients: {_flow({key: value})}")
    return None


def _gate(key: str, value: Any) -> str | None:
    bound = _BOUND.fullmatch(value) if isinstance(value, str) else None
    if bound is not None:
        return f"{key}: {{{'max' if bound[1] == '<' else 'min'}: {bound[2]}}}"
    number = _flow(value) if _is_number(value) else "0.3"
    return f"{key}: {{{'min' if key in _ATLEAST else 'max'}: {number}}}"


def _written(said: str, text: str | None) -> str | None:
    """Advice that quotes the text, unless it is too long to be read."""
    if text is None or len(text) > _LONGEST:
        return None
    return f"{said} `{text}`"


def _flow(value: Any) -> str:
    """Plain data on one line of YAML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_flow, value))}]"
    if isinstance(value, str):
        return value if re.fullmatch(r"[\w./-]*[A-Za-z/-][\w./-]*", value) else json.dumps(value, ensure_ascii=False)
    return repr(value) if _is_number(value) else json.dumps(value)


def _is_plain(value: Any) -> bool:
    """Return whether data can be written again: texts, truth values, finite numbers, lists and tables of them."""
    if isinstance(value, dict):
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | bool) or _is_number(value)


def _is_rule(rule: Mapping[str, Any]) -> bool:
    """Return whether a table is a rule: what it selects, and a number or the points of a ramp."""
    ramp = rule.get("ramp")
    ends = isinstance(ramp, list) and len(ramp) > 1 and all(map(_is_number, ramp))
    return set(rule) <= {*_RULE} and not {*_SELECTORS}.isdisjoint(rule) and (_is_number(rule.get("value")) or ends)


def _is_number(value: Any) -> bool:
    """Return whether data is a number that can be written again."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
