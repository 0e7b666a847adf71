"""The arithmetic of a recipe: text -> tree -> the term of one tensor. Closed, safe, typed by degree.

Grammar (parsed here, never evaluated as Python):

    sum     = product { ("+" | "-") product }
    product = factor { ("*" | "/") factor }
    factor  = { "+" | "-" } ( number | name | "(" sum ")" )

A scalar is a number or a coefficient; everything else is an affine combination of models. Its *degree* is
what it is: 1 a model, 0 a difference. Knows nothing about tensors' values; `methods.linear` makes steps of a term.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction

from skillmerge.errors import NEAR, did_you_mean, some
from skillmerge.methods.terms import Leaf, Scaled, Sum, Term, weights
from skillmerge.recipes.foreign.spellings import call_meant, sign_meant

MAX_LENGTH = 10_000
MAX_DEPTH = 50
MAX_OPERATIONS = 150
"""Bounds the depth of the tree too, so that every walk over it stays within Python's own limit."""
_TOKEN = re.compile(r"\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|(?P<name>[^\W\d]\w*)|(?P<op>[-+*/(),]))")
_DECIMAL_COMMA = re.compile(r"\b\d+,\d+\b")
_CALL = re.compile(r"[^\W\d]\w*\s*\(")
_UNGROUPED = re.compile(r"(?P<factor>[\w.]+)\s*\*\s*(?P<first>[^\W\d]\w*)\s*[-−]\s*(?P<second>[^\W\d]\w*)")


class ExpressionError(ValueError):
    """A mistake in an expression, at `position` (0-based) and `width` characters wide in its text."""

    def __init__(self, message: str, position: int, width: int = 1, fix: str | None = None) -> None:
        super().__init__(message)
        self.position, self.width, self.fix = position, width, fix


@dataclass(frozen=True, slots=True)
class Number:
    value: float
    position: int


@dataclass(frozen=True, slots=True)
class Name:
    name: str
    position: int
    is_model: bool


@dataclass(frozen=True, slots=True)
class Operation:
    """`left symbol right` with symbol one of + - * / (a unary minus is -1 * operand). grouped: in parentheses."""

    symbol: str
    left: Node
    right: Node
    position: int
    grouped: bool = field(default=False, compare=False)


Node = Number | Name | Operation


def normalise_name(name: str) -> str:
    """Return the normalized name, so that names that look alike are equal: µ (the micro sign) is μ (the letter)."""
    return unicodedata.normalize("NFKC", name)


def parse(text: str, models: list[str], coefficients: list[str]) -> Node:
    """Return the tree of `text`. Raises ExpressionError for whatever the grammar or the names do not allow."""
    if len(text) > MAX_LENGTH:
        raise ExpressionError(f"is longer than {MAX_LENGTH} characters", 0)
    if (comma := _DECIMAL_COMMA.search(text)) is not None and not _CALL.search(text):
        fix = f"write {comma[0].replace(',', '.')}"
        raise ExpressionError("has a decimal comma", comma.start(), len(comma[0]), fix)
    node = _Parser(text, models, coefficients).whole()
    if not _has_model(node):
        raise ExpressionError("has no model in it", 0, len(text))
    return node


def grouped(text: str, models: Collection[str]) -> str | None:
    """Return the expression with the difference that a factor was probably meant for in parentheses:
    `lam * rl - sft` -> lam * (rl - sft)."""
    match = _UNGROUPED.search(text)
    if match is None or not {match["first"], match["second"]} <= {*models} or match["factor"] in models:
        return None
    difference = f"{match['factor']} * ({match['first']} - {match['second']})"
    meant = text[: match.start("factor")] + difference + text[match.end("second") :]
    return f"did you mean `{' '.join(meant.split())}`?"


class _Parser:
    """Recursive descent over the tokens; `depth` bounds the nesting."""

    def __init__(self, text: str, models: list[str], coefficients: list[str]) -> None:
        self.text, self.models, self.coefficients = text, models, coefficients
        self.tokens = list(self._tokenise())
        self.index = 0
        self.depth = self.operations = 0

    def _tokenise(self) -> list[tuple[str, str, int]]:
        tokens = []
        position = 0
        end = len(self.text.rstrip())
        while position < end:
            match = _TOKEN.match(self.text, position)
            if match is None or match.lastgroup is None:
                at = position + len(self.text[position:]) - len(self.text[position:].lstrip())
                fix = sign_meant(self.text[at])
                raise ExpressionError(f"has an unexpected character {self.text[at]!r}", at, fix=fix)
            tokens.append((match.lastgroup, match.group(match.lastgroup), match.start(match.lastgroup)))
            position = match.end()
        return [*tokens, ("end", "", end)]

    def take(self) -> tuple[str, str, int]:
        token = self.tokens[self.index]
        self.index += 1
        return token

    def whole(self) -> Node:
        node = self.sum()
        kind, text, position = self.tokens[self.index]
        if kind != "end":
            fix = "remove it, or open it with `(`" if text == ")" else None
            raise ExpressionError(f"has `{text}` where an operator or the end is expected", position, len(text), fix)
        return node

    def sum(self) -> Node:
        node = self.product()
        while self.tokens[self.index][1] in ("+", "-"):
            _, symbol, position = self.take()
            right = self.product()
            for operand, other in ((node, right), (right, node)):
                if not _has_model(operand) and _has_model(other):
                    raise ExpressionError(
                        "adds a number to a model's weights",
                        position,
                        fix="numbers can only scale: 0.5 * model",
                    )
            node = self._operation(symbol, node, right, position)
        return node

    def product(self) -> Node:
        node = self.factor()
        while self.tokens[self.index][1] in ("*", "/"):
            _, symbol, position = self.take()
            right = self.factor()
            if symbol == "/" and _has_model(right):
                raise ExpressionError("divides by a model", position, fix="only numbers and coefficients divide")
            if symbol == "*" and _has_model(node) and _has_model(right):
                raise ExpressionError("multiplies two models", position, fix="only numbers and coefficients scale")
            node = self._operation(symbol, node, right, position)
        kind, text, position = self.tokens[self.index]
        if kind in ("name", "number") or text == "(":
            raise ExpressionError(f"lacks an operator before `{text}`", position, len(text), fix="did you mean `*`?")
        return node

    def factor(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ExpressionError(f"is nested deeper than {MAX_DEPTH} levels", self.tokens[self.index][2])
        kind, text, position = self.take()
        node: Node
        if text == "(":
            node = self.sum()
            _, closing, at = self.take()
            if closing != ")":
                self.index -= 1
                where = position if closing == "" else at
                raise ExpressionError("has a `(` that is never closed", where, fix="close it with `)`")
            node = replace(node, grouped=True) if isinstance(node, Operation) else node
        elif text == "-":
            node = self._operation("*", Number(-1.0, position), self.factor(), position)
        elif text == "+":
            node = self.factor()
        elif kind == "number":
            node = Number(float(text), position)
            if not math.isfinite(node.value):
                raise ExpressionError("has a number that is not finite", position, len(text))
        elif kind == "name":
            node = self._name(text, position)
        else:
            if text == "*" and self.tokens[self.index - 2][1] == "*":
                raise ExpressionError("has `**`", position - 1, 2, fix="there are no powers: write lam * lam")
            what = f"`{text}`" if text else "nothing"
            fix = f"write one, or leave `{text or self.tokens[self.index - 2][1]}` out"
            raise ExpressionError(f"has {what} where a model, a number or `(` is expected", position, fix=fix)
        self.depth -= 1
        return node

    def _name(self, text: str, position: int) -> Node:
        name = normalise_name(text)
        if self.tokens[self.index][1] == "(" and name not in self.models + self.coefficients:
            raise ExpressionError(
                f"calls `{text}`, which is no method of this version",
                position,
                len(text),
                fix=call_meant(text),
            )
        if name not in self.models and name not in self.coefficients:
            near = did_you_mean(name, self.models + self.coefficients)
            known = f"add `coefficients: {{{text}: 1}}`, or use: {some(self.models + self.coefficients, NEAR)}"
            raise ExpressionError(
                f"names `{text}`, which is neither a model nor a coefficient",
                position,
                len(text),
                near or known,
            )
        return Name(name, position, is_model=name in self.models)

    def _operation(self, symbol: str, left: Node, right: Node, position: int) -> Operation:
        self.operations += 1
        if self.operations > MAX_OPERATIONS:
            raise ExpressionError(f"has too many terms: more than {MAX_OPERATIONS} operations", position)
        return Operation(symbol, left, right, position)


def _has_model(node: Node) -> bool:
    if isinstance(node, Operation):
        return _has_model(node.left) or _has_model(node.right)
    return isinstance(node, Name) and node.is_model


def names_in(node: Node) -> list[Name]:
    """Return every name, in the order of the text."""
    if isinstance(node, Operation):
        return names_in(node.left) + names_in(node.right)
    return [node] if isinstance(node, Name) else []


def bind(node: Node, values: Mapping[str, float]) -> Term | None:
    """Return the tree with the coefficients' values in place; None if everything fell away.

    Raises ExpressionError if a scalar divides by zero, or a factor is not finite.
    """
    if isinstance(node, Name):
        return Leaf(node.name)
    if isinstance(node, Number):
        raise AssertionError("a bare number is never a term")
    term: Term | None
    if node.symbol in "+-":
        left, right = bind(node.left, values), bind(node.right, values)
        minus = node.symbol == "-"
        if right is None:
            term = left
        elif left is None:
            term = _scaled(right, -1.0, divide=False) if minus else right
        else:
            term = Sum(left, right, minus)
    elif _has_model(node.left):
        term = _scaled(bind(node.left, values), _scalar(node.right, values), node.symbol == "/", node)
    else:
        term = _scaled(bind(node.right, values), _scalar(node.left, values), divide=False)
    if not all(map(math.isfinite, weights(term).values())):
        raise ExpressionError("has a factor that is not finite", node.position)
    return term


def _scaled(inner: Term | None, factor: float, divide: bool, node: Operation | None = None) -> Term | None:
    if divide and factor == 0:
        raise ExpressionError("divides by zero", node.position if node else 0)
    if inner is None or factor == 0:
        return None
    return inner if factor == 1 else Scaled(inner, factor, divide)


def _scalar(node: Node, values: Mapping[str, float]) -> float:
    if isinstance(node, Number):
        return node.value
    if isinstance(node, Name):
        return values[node.name]
    left, right = _scalar(node.left, values), _scalar(node.right, values)
    try:
        value = {"+": left + right, "-": left - right, "*": left * right}.get(node.symbol)
        value = left / right if value is None else value
    except ZeroDivisionError:
        raise ExpressionError("divides by zero", node.position) from None
    if not math.isfinite(value):
        raise ExpressionError("has a coefficient that is not finite", node.position)
    return value


@dataclass(frozen=True, slots=True)
class Addend:
    """One model where an expression names it.

    sign: of its factor, as far as the text decides it; 0 where the text multiplies it by zero. plain: no coefficient
    scales it. inside: it is a part of a difference in parentheses, or a stored skill.
    """

    model: str
    sign: int
    plain: bool
    inside: bool


def addends(node: Node, skills: Collection[str] = ()) -> Iterator[Addend]:
    """Yield every model in the order of the text. Depends on no coefficient's value."""
    yield from _addends(node, skills, 1, True, False)


def donor_of(node: Node, skills: Collection[str] = ()) -> str | None:
    """Return the model that the output is like, by the text alone; None if everything is multiplied by zero.

    The first that is added without a coefficient, differences in parentheses and skills left out; else the first that
    is added. One that is only subtracted is taken only where nothing is added, which no model and no skill can be.
    """
    found = [each for each in addends(node, skills) if each.sign]
    added = [each for each in found if each.sign > 0]
    outside = [each for each in added if not each.inside]
    chosen = [each for each in outside if each.plain] or outside or added or found
    return chosen[0].model if chosen else None


def is_donor_unclear(node: Node, skills: Collection[str] = ()) -> bool:
    """Return whether a sum without parentheses subtracts a model and adds two of them without a coefficient, so that
    its text alone does not show which of these the others change."""
    outside = [each for each in addends(node, skills) if not each.inside]
    plain = {each.model for each in outside if each.plain and each.sign > 0}
    return len(plain) > 1 and any(each.sign < 0 for each in outside)


def _addends(node: Node, skills: Collection[str], sign: int, plain: bool, inside: bool) -> Iterator[Addend]:
    if isinstance(node, Name):
        yield Addend(node.name, sign, plain, inside or node.name in skills)
    if not isinstance(node, Operation):
        return
    inside = inside or (node.grouped and _is_difference(node, skills))
    if node.symbol in "+-":
        yield from _addends(node.left, skills, sign, plain, inside)
        yield from _addends(node.right, skills, -sign if node.symbol == "-" else sign, plain, inside)
        return
    inner, factor = (node.left, node.right) if _has_model(node.left) else (node.right, node.left)
    yield from _addends(inner, skills, sign * _sign(factor), plain and not names_in(factor), inside)


def _sign(scalar: Node) -> int:
    """Return the sign of a scalar. A coefficient counts as positive; a sum with one is negative only if all of it
    is."""
    if not names_in(scalar):
        try:
            value = _exact(scalar, {})
        except ZeroDivisionError:  # `bind` refuses it
            return 0
        return (value > 0) - (value < 0)
    if not isinstance(scalar, Operation):
        return 1
    left, right = _sign(scalar.left), _sign(scalar.right)
    if scalar.symbol in "*/":
        return left * right
    return -1 if left < 0 and (right > 0 if scalar.symbol == "-" else right < 0) else 1


def _is_difference(node: Node, skills: Collection[str]) -> bool:
    """Return whether the factors add up to 0, whatever the coefficients are: tried with numbers that nobody writes."""
    names = dict.fromkeys(name.name for name in names_in(node))
    values = {name: Fraction(10**9 + 7 + 1009 * index) for index, name in enumerate(names)}
    values |= {name.name: Fraction(name.name not in skills) for name in names_in(node) if name.is_model}
    try:
        return _exact(node, values) == 0
    except ZeroDivisionError:
        return False


def _exact(node: Node, values: Mapping[str, Fraction]) -> Fraction:
    """Return the tree with numbers for all names, in exact arithmetic: 0.1 is a tenth. Raises ZeroDivisionError."""
    if isinstance(node, Number):
        return Fraction(repr(node.value))
    if isinstance(node, Name):
        return values[node.name]
    left, right = _exact(node.left, values), _exact(node.right, values)
    if node.symbol in "+-":
        return left - right if node.symbol == "-" else left + right
    return left / right if node.symbol == "/" else left * right
