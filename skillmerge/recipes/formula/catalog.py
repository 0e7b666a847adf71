"""The verb methods: the merge methods that expressions can call, explained by their docstrings alone.

A docstring has a line that says what the method does, its rule, and paragraphs that begin with a word of `PARTS`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from skillmerge.brief import brief
from skillmerge.errors import UsageError
from skillmerge.methods.method import Method, Operand, shown
from skillmerge.methods.table import METHODS
from skillmerge.recipes.foreign.spellings import call_meant

PARTS = ("Paper", "Differs", "When", "Not when", "Example")
"""The paragraphs of a docstring, in their order. The last three are in each; the last is an expression."""
_PART = re.compile(rf"^({'|'.join(PARTS)}): ", re.M)
NAMES = "target rl sft base a b c"
"""The models that examples name. Their coefficients are `lam`."""


@dataclass(frozen=True, slots=True)
class Keyword:
    """A keyword of a method. kind: what its value is. default: as a recipe writes it; None where it must be given or
    is nothing by default, which `required` tells apart."""

    name: str
    kind: str
    required: bool
    default: str | None

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, "kind": self.kind, "required": self.required, "default": self.default}


@dataclass(frozen=True, slots=True)
class Explained:
    """A method for people. usage: the form of a call. operands: what it takes. rule: paragraphs, with formulas in
    backticks. parts: what the docstring says under each of `PARTS`."""

    name: str
    summary: str
    usage: str
    operands: str
    rule: tuple[str, ...]
    keywords: tuple[Keyword, ...]
    parts: Mapping[str, str]

    __repr__ = brief

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "summary": self.summary,
            "usage": self.usage,
            "operands": self.operands,
            "rule": list(self.rule),
            "keywords": [keyword.as_dict() for keyword in self.keywords],
            **{part.lower().replace(" ", "_"): self.parts.get(part) for part in PARTS},
        }


@dataclass(frozen=True, slots=True)
class Catalog:
    """Methods by their names."""

    methods: Mapping[str, Explained]

    __repr__ = brief

    def as_dict(self) -> dict[str, Any]:
        return {"methods": [method.as_dict() for method in self.methods.values()]}


def list_methods(name: str | None = None) -> Catalog:
    """Return the merge methods that a recipe can call, or only the one of that name.

    Raises UsageError for a name that is not a method; for one of another tool, with what to write instead.
    """
    if name is None:
        return Catalog({name: explained(method) for name, method in METHODS.items()})
    if name not in METHODS:
        raise UsageError(f"no method is called `{name}`", fix=call_meant(name, list(METHODS)))
    return Catalog({name: explained(METHODS[name])})


def explained(method: Method) -> Explained:
    """Read a method's docstring."""
    rule, *parts = _PART.split(method.text.partition("\n")[2].strip())
    return Explained(
        name=method.name,
        summary=method.summary,
        usage=method.usage,
        operands=_operands(method),
        rule=tuple(" ".join(paragraph.split()) for paragraph in rule.split("\n\n") if paragraph.strip()),
        keywords=tuple(_keyword(method, name) for name in method.keywords),
        parts={part: " ".join(text.split()) for part, text in zip(parts[::2], parts[1::2], strict=True)},
    )


def _operands(method: Method) -> str:
    """Return what a method takes: `2 or more differences`."""
    count = f"{method.least}"
    if method.most is None:
        count += " or more"
    elif method.most > method.least:
        count += f" to {method.most}"
    one = method.most == 1
    if method.differences:
        return f"{count} difference{'' if one else 's'}"
    return f"{count} model{'' if one else 's'}, or as many differences"


def _keyword(method: Method, name: str) -> Keyword:
    kind = method.keywords[name]
    required = isinstance(kind, Operand) or name not in method.defaults
    return Keyword(name, str(kind), required, None if required else shown(method.defaults[name]) or None)
