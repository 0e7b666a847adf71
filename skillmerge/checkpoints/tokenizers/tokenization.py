"""How a tokenizer splits text, in one normal form for what libraries save in several ways.

Knows the parts of the `tokenizers` library's JSON (normalizer, pre-tokenizer, merges, scores) and their defaults;
fields that change offsets alone are left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "ByteLevel": {"add_prefix_space": True, "use_regex": True},
    "Metaspace": {"replacement": "▁", "prepend_scheme": "always", "split": True},
    "BertNormalizer": {"clean_text": True, "handle_chinese_chars": True, "lowercase": True},
    "Split": {"behavior": "isolated", "invert": False},
    "Punctuation": {"behavior": "isolated"},
    "Digits": {"individual_digits": False},
    "Strip": {"strip_left": True, "strip_right": True},
}
_IDLE = {"trim_offsets", "str_rep"}
_WORDS = {"behavior", "prepend_scheme"}
_SPACE = {"String": " "}
_SPACE_RUNS = (
    {"type": "Strip", "strip_left": False, "strip_right": True},
    {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"},
)


def tokenization(document: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Return the parts of a `tokenizer.json` that decide how text is cut -> their steps, merges or scores, a text
    each."""
    normalizer = _steps(document.get("normalizer"), "normalizers")
    pre_tokenizer = _steps(document.get("pre_tokenizer"), "pretokenizers")
    # Libraries mark spaces in one place or the other: "a b" becomes "▁a▁b" either way.
    if [(step["type"], step.get("split")) for step in pre_tokenizer] == [("Metaspace", False)]:
        mark = pre_tokenizer.pop()
        if mark["prepend_scheme"] != "never":
            normalizer.append({"type": "Prepend", "prepend": mark["replacement"]})
        normalizer.append({"type": "Replace", "pattern": _SPACE, "content": mark["replacement"]})
    if normalizer and (normalizer[-1]["type"], normalizer[-1].get("pattern")) == ("Replace", _SPACE):
        pre_tokenizer = [step for step in pre_tokenizer if step.get("pattern") != _SPACE]  # no spaces are left
    # Runs of spaces become one where a model of sentencepiece was converted: before the cut, or by cutting at each.
    normalizer = [step for step in normalizer if step not in _SPACE_RUNS]
    if [step["type"] for step in pre_tokenizer] == ["WhitespaceSplit", "Metaspace"]:
        del pre_tokenizer[0]
    parts = {"normalizer": _texts(normalizer), "pre-tokenizer": _texts(pre_tokenizer)}
    model = document.get("model")
    if isinstance(model, dict):
        parts["vocabulary lookup"] = _texts([_lookup(model)])
    if isinstance(model, dict) and isinstance(model.get("merges"), list):
        parts["merges"] = in_order(_joined(model["merges"]))
    if isinstance(model, dict) and isinstance(model.get("vocab"), list):
        parts["scores"] = tuple(_score(piece) for piece in model["vocab"])
    return parts


def _lookup(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a vocabulary that do something: words that are tokens are not cut, and unknown characters
    are bytes, where there are tokens for these."""
    vocabulary = model.get("vocab")
    has_bytes = "<0x00>" in vocabulary if isinstance(vocabulary, dict) else True
    options = {"ignore_merges": model.get("ignore_merges"), "byte_fallback": has_bytes and model.get("byte_fallback")}
    return {"type": "lookup", **{key: True for key, value in options.items() if value}}


def in_order(merges: Iterable[str]) -> tuple[str, ...]:
    """Merges, each as `left right`, in their order; that of neighbors that give one token is free, and sorted here."""
    lines = list(merges)
    given = [line.replace(" ", "") for line in lines]
    end = 0
    for start in [place for place, (one, next_one) in enumerate(pairwise(given)) if one == next_one]:
        if start < end:
            continue  # inside the run before
        end = next((place for place in range(start, len(given)) if given[place] != given[start]), len(given))
        lines[start:end] = sorted(lines[start:end])
    return tuple(lines)


def described(part: str, said: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return a part in which models differ, for people, by model: its kinds of steps, or else the first difference."""
    longest = max(map(len, said.values()))
    place = next((at for at in range(longest) if len({texts[at : at + 1] for texts in said.values()}) > 1), longest)
    if part in ("merges", "scores"):
        return {
            name: f"{len(texts):,} {part}" + "".join(f", number {place + 1:,} is {text}" for text in texts[place:][:1])
            for name, texts in said.items()
        }
    steps = {name: [json.loads(text) for text in texts] for name, texts in said.items()}
    kinds = {name: [str(step["type"]) for step in it] for name, it in steps.items()}
    if any(one != other for one, other in pairwise(kinds.values())):
        return {name: " + ".join(it) or "none" for name, it in kinds.items()}
    differing = {name: it[place] for name, it in steps.items()}
    keys = sorted({key for step in differing.values() for key in step})
    values = {
        key: {name: json.dumps(step.get(key), ensure_ascii=False) for name, step in differing.items()} for key in keys
    }
    key = next((key for key in keys if len(set(values[key].values())) > 1), "type")
    return {name: f"{differing[name]['type']}, {key}: {value}" for name, value in values[key].items()}


def _joined(merges: Sequence[Any]) -> Sequence[str]:
    """Merges as `left right`, which they are, or lists of both."""
    kinds = set(map(type, merges))
    if kinds <= {str}:
        return merges
    if kinds == {list} and set(map(len, merges)) == {2}:
        with suppress(TypeError):
            return list(map(" ".join, merges))
    raise ValueError("a merge is neither two tokens nor a text of both")


def _score(piece: Any) -> str:
    if not isinstance(piece, list) or len(piece) != 2 or type(piece[1]) not in (int, float):
        raise ValueError("`model.vocab` has an entry that is not a piece and its score")
    try:
        return f"{piece[1]:.4g}"
    except OverflowError as error:
        raise ValueError("`model.vocab` has a score that is out of range") from error


def _steps(part: Any, key: str) -> list[dict[str, Any]]:
    """Return a normalizer or pre-tokenizer as a flat list of its steps, each with its defaults."""
    if part is None:
        return []
    if not isinstance(part, dict):
        raise ValueError("a normalizer or pre-tokenizer is not a table")
    if isinstance(part.get(key), Sequence):
        return [step for inner in part[key] for step in _steps(inner, key)]
    step = {**_DEFAULTS.get(str(part.get("type")), {}), "type": None}
    if "add_prefix_space" in part and step.get("prepend_scheme") is not None:  # Metaspace before tokenizers 0.16
        step["prepend_scheme"] = "always" if part["add_prefix_space"] else "never"
    metaspace = part.get("type") == "Metaspace"
    for name, value in part.items():
        # Libraries write an option that is not set as null, or leave it out.
        if value is not None and name not in _IDLE and not (metaspace and name == "add_prefix_space"):
            step[name] = value.lower() if name in _WORDS and isinstance(value, str) else value
    return [step]


def _texts(steps: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    return tuple(json.dumps(step, sort_keys=True) for step in steps)
