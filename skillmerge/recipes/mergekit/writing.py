"""The text of a translated recipe: names, places, coefficients with where they come from, the expression."""

from __future__ import annotations

import json
import os
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from skillmerge.methods.table import METHODS
from skillmerge.recipes.mergekit.settings import Points, Rule, Varying
from skillmerge.recipes.mergekit.translation import written
from skillmerge.recipes.yamltext import Path
from skillmerge.remarks import Remark

_WIDTH = 110
_LONGEST_NAME = 24
_WORDS = {"true", "false", "null", "yes", "no", "on", "off", "y", "n", "nan", "inf"}
"""Words that some version of YAML does not read as text."""
_SIZE = re.compile(r"\d+(\.\d+)?[bBmM]|fp16|bf16|[hH][fF]")
_VERSION = re.compile(r"[vV]\d+(\.\d+)*")
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*|(?:hf://)?[A-Za-z0-9_./][A-Za-z0-9_.-]*/[A-Za-z0-9_./@-]*")


@dataclass(frozen=True, slots=True)
class Draft:
    """What a recipe is written from. models: name -> place. output: its keys. adapters: name -> place, and the model
    that it is put onto. stacks: name -> models, with the first and the last of their layers. copied: tensors, and the
    model that they are of. tokens: those whose rows are a model's, where rows are matched by token."""

    title: str
    models: Mapping[str, str]
    coefficients: Mapping[str, Varying]
    merge: str
    output: Mapping[str, str]
    remarks: Sequence[Remark]
    adapters: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    stacks: Mapping[str, Sequence[tuple[str, int, int]]] = field(default_factory=dict)
    copied: tuple[Sequence[str], str] | None = None
    tokens: Mapping[str, str] | None = None


def names_of(places: Iterable[str]) -> dict[str, str]:
    """Return a name for each place, from its last part: without sizes and versions where others do not need them."""
    unique = [*dict.fromkeys(places)]
    short = [_name(place, short=True) for place in unique]
    names: dict[str, str] = {}
    taken = {*METHODS}
    for place, name in zip(unique, short, strict=True):
        name = name if short.count(name) == 1 else _name(place, short=False)
        while name in taken:
            name += "_2"
        taken.add(name)
        names[place] = name
    return names


def _name(place: str, short: bool) -> str:
    place = place.rpartition("+")[2]  # of a model with an adapter on it the adapter
    last = re.split(r"[/\\]", place.split("@")[0].rstrip("/\\"))[-1]
    words = [word for word in re.split(r"[^A-Za-z0-9.]+", last) if word.strip(".")] or ["model"]
    if short:
        words = [words[0], *(word for word in words[1:] if not _SIZE.fullmatch(word))]
        while len(words) > 1 and (_VERSION.fullmatch(words[-1]) or len("_".join(words)) > _LONGEST_NAME):
            words.pop()
    name = re.sub(r"[^A-Za-z0-9]+", "_", "_".join(words)).strip("_")[:60]
    return f"m{name}" if not name or name[0].isdigit() or name.lower() in _WORDS else name


def moved(place: str, start: str) -> str:
    """Return a place for a recipe from whose folder `start` leads to the document's."""
    if start == "." or "://" in place or place.startswith(("/", "~")) or re.match(r"[A-Za-z]:[\\/]", place):
        return place
    return os.path.normpath(os.path.join(start, place))


def text_of(draft: Draft) -> str:
    """Return the recipe."""
    lines = [f"# {_plain(draft.title)}"]
    for remark in draft.remarks:
        lines += textwrap.wrap(
            _plain(f"{remark.level}: {remark.message}"), _WIDTH, initial_indent="# ", subsequent_indent="#   ",
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip
    lines += ["skillmerge: 1", "models:"]
    lines += [f"  {name}: {quoted(place)}" for name, place in draft.models.items()]
    for name, (place, base) in draft.adapters.items():
        lines.append(f"  {name}: {{adapter: {quoted(place)}, onto: {base}}}")
    for name, parts in draft.stacks.items():
        lines += [f"  {name}:", "    stack:"]
        lines += [f"      - {{from: {model}, layers: {_layers(first, last)}}}" for model, first, last in parts]
    if draft.coefficients:
        lines.append("coefficients:")
        for name, coefficient in draft.coefficients.items():
            lines += _coefficient(name, coefficient)
    lines += _merge(draft.merge)
    if draft.copied is not None:
        tensors, model = draft.copied
        lines += ["copy:", f"  - {{tensors: [{', '.join(map(quoted, tensors))}], from: {model}}}"]
    if draft.tokens is not None:
        lines.append("vocabulary: by-token")
        rows = [f"  {quoted(token)}: {{from: {name}}}" for token, name in draft.tokens.items()]
        lines += ["tokens:", *rows] if rows else []
    output = ", ".join(f"{key}: {quoted(value)}" for key, value in draft.output.items())
    lines.append(f"output: {{{output}}}")
    return "\n".join(lines) + "\n"


def _layers(first: int, last: int) -> str:
    return f"{first}-{last}" if last > first else f"{first}"


def quoted(text: str) -> str:
    """Return text as YAML that reads back unchanged."""
    if _PLAIN.fullmatch(text) and text.lower() not in _WORDS:
        return text
    text = json.dumps(text, ensure_ascii=False)
    return "".join(character if character.isprintable() else f"\\U{ord(character):08x}" for character in text)


def _coefficient(name: str, coefficient: Varying) -> list[str]:
    source = f"  # {_key(coefficient.path)}" if coefficient.path else ""
    if not coefficient.rules:
        return [f"  {name}: {written(coefficient.default)}{source}"]
    lines = [f"  {name}:{source}", f"    default: {written(coefficient.default)}", "    rules:"]
    return lines + [f"      - {{{_rule(rule)}}}" for rule in coefficient.rules]


def _rule(rule: Rule) -> str:
    parts = [f"layers: {rule.layers}"] if rule.layers else []
    parts += [f"modules: {rule.modules}"] if rule.modules else []
    parts += [f"tensors: {quoted(rule.tensors)}"] if rule.tensors else []
    return ", ".join([*parts, _points(rule.points)])


def _points(points: Points) -> str:
    return f"value: {written(points[0])}" if len(points) == 1 else f"ramp: [{', '.join(map(written, points))}]"


def _key(path: Path) -> str:
    """Return a path as people write it: models[1].parameters.weight."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
    return _plain(text)


def _plain(text: str) -> str:
    """Return text for a comment, which it cannot end."""
    return "".join(sign if sign.isprintable() else " " for sign in text)


def _merge(text: str) -> list[str]:
    """Return the expression on one line; a longer one with each addend, or what is in its parentheses, on its own."""
    if len(text) + len("merge: ") <= _WIDTH:
        return [f"merge: {text}"]
    addends = _split(text, " + ", " - ")
    if len(addends) > 2 or "(" not in text:
        return ["merge: >-", *(f"  {addend}" for addend in addends)]
    first = text.index("(") + 1
    inner = _split(text[first:], ")")[0]
    parts = _split(inner, ", ")
    parts = parts if len(parts) > 1 else _split(inner, " + ", " - ")
    *lines, last = (f"    {part}" for part in parts)
    return ["merge: >-", f"  {text[:first]}", *lines, last + text[first + len(inner) :]]


def _split(text: str, *at: str) -> list[str]:
    """Cut a text outside of parentheses: behind a comma, before other signs."""
    parts, start, depth = [], 0, 0
    for index, sign in enumerate(text):
        if depth == 0 and (found := next((each for each in at if text.startswith(each, index)), None)):
            end = index + (found == ", ")
            parts.append(text[start:end])
            start = end + (found != ")")
        depth += (sign in "([") - (sign in ")]")
    return [*parts, text[start:]]
