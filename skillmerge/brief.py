"""How results show themselves: a short repr on one line, and HTML in notebooks. Knows nothing of what is in them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence, Set
from dataclasses import fields
from pathlib import PurePath
from typing import Any

_WIDTH = 70
"""Characters of one value, so that a result with twenty fields still fits on a screen."""


def brief(result: Any) -> str:
    """Return the class and the fields of a dataclass: plain values as they are, collections as a count.

    Use it as `__repr__ = brief`: the repr that dataclasses have would print a whole plan or manifest.
    """
    values = (f"{field.name}={_value(getattr(result, field.name))}" for field in fields(result))
    return f"{type(result).__name__}({', '.join(values)})"


def drawn(result: Any) -> str:
    """Return a result as a small piece of HTML. Use it as `_repr_html_ = drawn`, which notebooks call.

    What draws is above all results, and is imported by name when a notebook asks.
    """
    html: str = importlib.import_module("skillmerge.cli.show.report.notebook").fragment(result)
    return html


def _value(value: Any) -> str:
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    if isinstance(value, str | PurePath):
        text = repr(str(value))
        return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 2]}…{text[-1]}"
    if isinstance(value, Mapping):
        return f"{{{_count(value)}}}"
    if isinstance(value, Sequence | Set):
        return f"[{_count(value)}]"
    # Of other objects only those that have this repr are known to be short.
    return repr(value) if getattr(type(value), "__repr__", None) is brief else f"{type(value).__name__}(…)"


def _count(items: Mapping[Any, Any] | Sequence[Any] | Set[Any]) -> str:
    return f"{len(items)} item{'s' if len(items) != 1 else ''}"
