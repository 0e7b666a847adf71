"""`rank_pattern` and `alpha_pattern` of an adapter: numbers by regular expression, matched in bounded time.

PEFT takes the first KEY for which `(.*\\.)?(KEY)$` matches a module's name from its start. Nearly all keys are names,
or ends of names, and are looked up. The others have to be of a kind that backtracks little.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping

from skillmerge.errors import InputError

_PLAIN = re.compile(r"[\w.-]+")
_TOKEN = re.compile(r"\\.|\[\^?\]?[^\]]*\]|\(\?:|.", re.DOTALL)
_LONGEST = 250
"""Characters of a name that an expression is tried on, and of an expression."""
_TRIES, _EACH = 1_000_000, 100
"""Ways to match that an expression may have, and those of one `*` or `+` on a name of usual length."""
_MOST = 1000
"""Expressions of one table."""
_SECONDS = 1.0
"""All that matching one adapter's modules may take."""
_FIX = "write the full names of modules as its keys, as PEFT accepts too"


class Patterns:
    """Numbers by pattern, and the names that they are for."""

    def __init__(self, where: str, numbers: Mapping[str, float]) -> None:
        """where: the table, in messages. Raises InputError for an expression that is none, or could take long."""
        self._where = where
        self._numbers = dict(numbers)
        self._plain = {key: place for place, key in enumerate(numbers) if _PLAIN.fullmatch(key)}
        others = [(place, key) for place, key in enumerate(numbers) if key not in self._plain]
        if len(others) > _MOST:
            raise InputError(f"{where}: has {len(others)} expressions; the most accepted is {_MOST}", fix=_FIX)
        self._expressions = [(place, key, self._compiled(key)) for place, key in others]
        self._left = _SECONDS

    def number(self, name: str) -> float | None:
        """Return the number of the module or parameter `name`, or None. Raises InputError where that takes long."""
        found: tuple[int, str] | None = None
        parts = name.split(".")
        for start in range(len(parts)):
            key = ".".join(parts[start:])
            if key in self._plain and (found is None or self._plain[key] < found[0]):
                found = self._plain[key], key
        for place, key, expression in self._expressions:
            if found is not None and found[0] < place:
                break
            if self._matches(expression, name):
                found = place, key
                break
        return self._numbers[found[1]] if found is not None else None

    def _matches(self, expression: re.Pattern[str], name: str) -> bool:
        if len(name) > _LONGEST:
            raise InputError(f"{self._where}: has expressions, and `{name[:80]}…` is too long to try them on", fix=_FIX)
        start = time.perf_counter()
        matched = expression.match(name) is not None
        self._left -= time.perf_counter() - start
        if self._left < 0:
            raise InputError(f"{self._where}: its expressions take too long to match", fix=_FIX)
        return matched

    def _compiled(self, key: str) -> re.Pattern[str]:
        if len(key) > _LONGEST or _ways(key) > _TRIES:
            raise InputError(f"{self._where}: the expression {key[:60]!r} could take too long to match", fix=_FIX)
        try:
            return re.compile(rf"(.*\.)?({key})$")
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(f"{self._where}: {key[:60]!r} is not a regular expression: {error}", fix=_FIX) from error


def _ways(key: str) -> float:
    """Return a bound of the ways in which an expression can match; without end for repeated groups, references to
    groups and looking around."""
    before = ""
    open_groups = [[0.0, 1.0]]
    """Of each group that is not closed yet: the ways of its earlier alternatives, and of the present one."""
    for token in _TOKEN.findall(key):
        group = open_groups[-1]
        if token in ("(", "(?:"):
            open_groups.append([0.0, 1.0])
        elif token == ")" and len(open_groups) > 1:
            open_groups.pop()
            open_groups[-1][1] *= sum(group)
        elif token == "|":
            open_groups[-1] = [sum(group), 1.0]
        elif token in ("*", "+"):
            group[1] *= _EACH if before != ")" else float("inf")
        elif token == "?" and before in ("*", "+", "?"):
            pass  # a lazy repetition
        elif token == "?":
            group[1] *= 2 if before != "(" else float("inf")
        elif token == "{" or (token[0] == "\\" and token[1:].isdigit()):
            group[1] = float("inf")
        before = token
    return sum(map(sum, open_groups))
