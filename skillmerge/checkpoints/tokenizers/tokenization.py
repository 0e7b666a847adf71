"""How a tokenizer cuts text, in one form: what libraries save in several ways is the same here.

Knows the parts of the `tokenizers` library's JSON (normalizer, pre-tokenizer, merges, scores) and their defaults;
fields that change offsets alone are left out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, pairwise
from typing import Any

_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "ByteLevel": {"add_prefix_space": True, "use_regex": True},
    "Metaspace": {"replacement": "▁", "prepend_scheme": "always", "split": True},
    "BertNormalizer": {"clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True},
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


def tokenization(document: Mapping[str, Any]) -> dict[str, str]:
    """The parts of a `tokenizer.json` that decide how text is cut -> their digests."""
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
    parts = {"normalizer": _digest(normalizer), "pre-tokenizer": _digest(pre_tokenizer)}
    model = document.get("model")
    if isinstance(model, dict) and isinstance(model.get("merges"), list):
        parts["merges"] = merges_digest(_joined(model["merges"]))
    if isinstance(model, dict) and isinstance(model.get("vocab"), list):
        parts["scores"] = text_digest(_score(piece) for piece in model["vocab"])
    return parts


def merges_digest(merges: Iterable[str]) -> str:
    """The digest of merges in their order, each as `left right`; of neighbors that give one token the order is free."""
    lines = list(merges)
    given = [line.replace(" ", "") for line in lines]
    end = 0
    for start in [place for place, (one, next_one) in enumerate(pairwise(given)) if one == next_one]:
        if start < end:
            continue  # inside the run before
        end = next((place for place in range(start, len(given)) if given[place] != given[start]), len(given))
        lines[start:end] = sorted(lines[start:end])
    return text_digest(lines)


def text_digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()


def _joined(merges: Sequence[Any]) -> Sequence[str]:
    """Merges as `left right`, which they are, or lists of both."""
    kinds = set(map(type, merges))
    if kinds <= {str}:
        return merges
    if kinds == {list} and set(map(len, merges)) == {2} and set(map(type, chain.from_iterable(merges))) == {str}:
        return [f"{left} {right}" for left, right in merges]
    raise ValueError("a merge is neither two tokens nor a text of both")


def _score(piece: Any) -> str:
    if not isinstance(piece, list) or len(piece) != 2 or type(piece[1]) not in (int, float):
        raise ValueError("`model.vocab` has an entry that is not a piece and its score")
    try:
        return f"{piece[1]:.4g}"
    except OverflowError as error:
        raise ValueError("`model.vocab` has a score that is out of range") from error


def _steps(part: Any, key: str) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as a flat list of its steps, each with its defaults."""
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
        if name not in _IDLE and not (metaspace and name == "add_prefix_space"):
            step[name] = value.lower() if name in _WORDS and isinstance(value, str) else value
    return [step]


def _digest(steps: Sequence[Mapping[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(steps, sort_keys=True).encode()).hexdigest()
