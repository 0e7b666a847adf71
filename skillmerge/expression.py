"""The arithmetic of a recipe: text -> tree -> the steps for one tensor. Closed, safe, typed by degree.

Grammar (parsed here, never evaluated as Python):

    sum     = product { ("+" | "-") product }
    product = factor { ("*" | "/") factor }
    factor  = { "+" | "-" } ( number | name | "(" sum ")" )

A scalar is a number or a coefficient; everything else is an affine combination of models. Its *degree* is
what it is: 1 a model, 0 a difference. Knows nothing about tensors' values; `arithmetic` runs the steps.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass

from skillmerge.errors import did_you_mean

MAX_LENGTH = 10_000
MAX_DEPTH = 50
_DEGREE_TOLERANCE = 1e-9
_TOKEN = re.compile(r"\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|(?P<name>[^\W\d]\w*)|(?P<op>[-+*/(),]))")


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
    """`left symbol right` with symbol one of + - * / (a unary minus is -1 * operand)."""

    symbol: str
    left: Node
    right: Node
    position: int


Node = Number | Name | Operation


def normalise_name(name: str) -> str:
    """Names that look alike are alike: µ (the micro sign) is μ (the letter)."""
    return unicodedata.normalize("NFKC", name)


def parse(text: str, models: list[str], coefficients: list[str]) -> Node:
    """The tree of `text`. Raises ExpressionError for whatever the grammar or the names do not allow."""
    if len(text) > MAX_LENGTH:
        raise ExpressionError(f"is longer than {MAX_LENGTH} characters", 0)
    node = _Parser(text, models, coefficients).whole()
    if not _has_model(node):
        raise ExpressionError("has no model in it", 0, len(text))
    return node


class _Parser:
    """Recursive descent over the tokens; `depth` bounds the nesting."""

    def __init__(self, text: str, models: list[str], coefficients: list[str]) -> None:
        self.text, self.models, self.coefficients = text, models, coefficients
        self.tokens = list(self._tokenise())
        self.index = 0
        self.depth = 0

    def _tokenise(self) -> list[tuple[str, str, int]]:
        tokens = []
        position = 0
        end = len(self.text.rstrip())
        while position < end:
            match = _TOKEN.match(self.text, position)
            if match is None or match.lastgroup is None:
                at = position + len(self.text[position:]) - len(self.text[position:].lstrip())
                raise ExpressionError(f"has an unexpected character {self.text[at]!r}", at)
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
            raise ExpressionError(f"has `{text}` where an operator or the end is expected", position, len(text))
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
                raise ExpressionError("has a `(` that is never closed", position if closing == "" else at)
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
            what = f"`{text}`" if text else "nothing"
            raise ExpressionError(f"has {what} where a model, a number or `(` is expected", position)
        self.depth -= 1
        return node

    def _name(self, text: str, position: int) -> Node:
        name = normalise_name(text)
        if self.tokens[self.index][1] == "(" and name not in self.models + self.coefficients:
            raise ExpressionError(
                f"calls `{text}`, which is no method of this version",
                position,
                len(text),
                fix="use + - * / with models and coefficients",
            )
        if name not in self.models and name not in self.coefficients:
            near = did_you_mean(name, self.models + self.coefficients)
            known = "known names: " + ", ".join(self.models + self.coefficients)
            raise ExpressionError(
                f"names `{text}`, which is neither a model nor a coefficient",
                position,
                len(text),
                near or known,
            )
        return Name(name, position, is_model=name in self.models)

    def _operation(self, symbol: str, left: Node, right: Node, position: int) -> Operation:
        # A long chain of + nests on the left; bounding it keeps every later walk within Python's own limit.
        if _depth(left) > 4 * MAX_DEPTH:
            raise ExpressionError("has too many terms", position)
        return Operation(symbol, left, right, position)


def _depth(node: Node) -> int:
    depth = 0
    while isinstance(node, Operation):
        node, depth = node.left, depth + 1
    return depth


def _has_model(node: Node) -> bool:
    if isinstance(node, Operation):
        return _has_model(node.left) or _has_model(node.right)
    return isinstance(node, Name) and node.is_model


def names_in(node: Node) -> list[Name]:
    """Every name, in the order of the text."""
    if isinstance(node, Operation):
        return names_in(node.left) + names_in(node.right)
    return [node] if isinstance(node, Name) else []


# The tree of one tensor: coefficients are numbers, terms that are exactly zero are gone.


@dataclass(frozen=True, slots=True)
class Leaf:
    model: str


@dataclass(frozen=True, slots=True)
class Scaled:
    """inner * factor, or inner / factor."""

    inner: Term
    factor: float
    divide: bool


@dataclass(frozen=True, slots=True)
class Sum:
    """left + right, or left - right."""

    left: Term
    right: Term
    minus: bool


Term = Leaf | Scaled | Sum


def bind(node: Node, values: Mapping[str, float]) -> Term | None:
    """The tree with the coefficients' values in place; None where everything fell away.

    Raises ExpressionError where a scalar divides by zero or is not finite.
    """
    if isinstance(node, Name):
        return Leaf(node.name)
    if isinstance(node, Number):
        raise AssertionError("a bare number is never a term")
    if node.symbol in "+-":
        left, right = bind(node.left, values), bind(node.right, values)
        minus = node.symbol == "-"
        if right is None:
            return left
        if left is None:
            return _scaled(right, -1.0, divide=False) if minus else right
        return Sum(left, right, minus)
    if _has_model(node.left):
        return _scaled(bind(node.left, values), _scalar(node.right, values), node.symbol == "/", node)
    return _scaled(bind(node.right, values), _scalar(node.left, values), divide=False)


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


def weights(term: Term | None, by: float = 1.0) -> dict[str, float]:
    """The factor that each model ends up with: lam * (rl - sft) + t -> {rl: lam, sft: -lam, t: 1}."""
    if term is None:
        return {}
    if isinstance(term, Leaf):
        return {term.model: by}
    if isinstance(term, Scaled):
        return weights(term.inner, by / term.factor if term.divide else by * term.factor)
    total = weights(term.left, by)
    for model, factor in weights(term.right, -by if term.minus else by).items():
        total[model] = total.get(model, 0.0) + factor
    return total


def sole_model(term: Term) -> str | None:
    """The model that is all of the term, with factor 1, once what cancels is gone."""
    left = {model: factor for model, factor in weights(term).items() if factor != 0}
    return next(iter(left)) if list(left.values()) == [1.0] else None


def degree(term: Term | None) -> float:
    """1 for a model, 0 for a difference; near misses of rounding (0.1 + 0.2 + 0.7) are taken as meant."""
    exact = math.fsum(weights(term).values())
    return round(exact) if abs(exact - round(exact)) <= _DEGREE_TOLERANCE else exact


def donor_of(term: Term) -> str:
    """The first model of degree 1: where a sum has a part of degree 1, the first such part decides."""
    if isinstance(term, Leaf):
        return term.model
    if isinstance(term, Scaled):
        return donor_of(term.inner)
    parts = (term.left, term.right)
    return donor_of(next((part for part in parts if degree(part) == 1), next(iter(_nonzero(parts)), term.left)))


def _nonzero(parts: tuple[Term, Term]) -> list[Term]:
    return [part for part in parts if degree(part) != 0]


# The steps of one tensor. Registers hold tiles in the accumulation dtype; two to four of them are enough
# for any recipe that people write.


@dataclass(frozen=True, slots=True)
class Step:
    """One operation on registers: load (register <- model), add, subtract, multiply, divide (in place)."""

    op: str
    register: int
    other: int = -1
    model: str = ""
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class Program:
    """How to compute one tensor.

    result: the register that holds the value.
    base, update, asked: where the expression is one model plus a difference, that model, the register that
    holds what was subtracted from it (`-lambda * v`), and lambda; else "", -1 and 1.
    same_bits: triples (a, b, keep): where models a and b hold the same bits, the element is that of model
    keep. Together with the turning of signs they make the laws hold bit for bit, signs of zeros included.
    """

    models: tuple[str, ...]
    steps: tuple[Step, ...]
    registers: int
    result: int
    base: str
    update: int
    asked: float
    same_bits: tuple[tuple[str, str, str], ...]


def compile_term(term: Term) -> Program:
    """The steps that evaluate `term` as it is written.

    Signs are the one freedom taken. A difference that is added is computed the other way round and
    subtracted: t + lam * (rl - sft) becomes t - lam * (sft - rl), which rounds alike everywhere, and where
    rl = sft it is t - (+0), which keeps the sign of a zero in t; t + (+0) would not.
    """
    compiler = _Compiler()
    result = compiler.run(term, negate=False)
    total = weights(term)
    return Program(
        models=tuple(dict.fromkeys(step.model for step in compiler.steps if step.op == "load")),
        steps=tuple(compiler.steps),
        registers=compiler.most,
        result=result,
        base=compiler.base,
        update=compiler.update,
        asked=compiler.asked,
        same_bits=tuple(_cancelling(total, compiler.free_pairs)),
    )


class _Compiler:
    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.free: list[int] = []
        self.most = 0
        self.base, self.update, self.asked = "", -1, 1.0
        self.free_pairs: set[frozenset[str]] = set()

    def run(self, term: Term, negate: bool, inside: bool = False) -> int:
        """Emit the steps for `term` (or for its negative); the register that will hold it."""
        if isinstance(term, Leaf):
            register = self._register()
            self.steps.append(Step("load", register, model=term.model))
            if negate:
                self.steps.append(Step("multiply", register, factor=-1.0))
            return register
        if isinstance(term, Scaled):
            factor = -term.factor if negate else term.factor
            # A negative factor of a difference turns the difference round instead: zeros stay +0.
            turn = factor < 0 and degree(term.inner) == 0
            register = self.run(term.inner, negate=turn, inside=True)
            factor = -factor if turn else factor
            if factor != 1:
                op = "divide" if term.divide else "multiply"
                self.steps.append(Step(op, register, factor=factor))
            return register
        return self._sum(term, negate, inside)

    def _sum(self, term: Sum, negate: bool, inside: bool) -> int:
        left, right, minus = term.left, term.right, term.minus
        if not minus and degree(left) == 0 and degree(right) != 0:
            left, right = right, left
        if negate and minus:
            return self._subtract(right, left, False, inside)
        if not negate and not minus and degree(right) == 0 and degree(left) != 0:
            return self._subtract(left, right, True, inside)
        if minus:
            return self._subtract(left, right, False, inside)
        first, second = self._both((left, negate), (right, negate))
        self.steps.append(Step("add", first, second))
        self.free.append(second)
        return first

    def _subtract(self, left: Term, right: Term, negate_right: bool, inside: bool) -> int:
        first, second = self._both((left, False), (right, negate_right))
        self.steps.append(Step("subtract", first, second))
        if isinstance(left, Leaf) and isinstance(right, Leaf):
            self.free_pairs.add(frozenset((left.model, right.model)))
        if not inside and isinstance(left, Leaf) and degree(right) == 0:
            self.base, self.update = left.model, second
            self.asked = _factor(right) if negate_right else -_factor(right)
        else:
            self.free.append(second)
        return first

    def _both(self, left: tuple[Term, bool], right: tuple[Term, bool]) -> tuple[int, int]:
        """Evaluate the side that needs more registers first (Sethi and Ullman 1970)."""
        if _need(right[0]) > _need(left[0]):
            second = self.run(*right, inside=True)
            return self.run(*left, inside=True), second
        first = self.run(*left, inside=True)
        return first, self.run(*right, inside=True)

    def _register(self) -> int:
        if self.free:
            return self.free.pop()
        self.most += 1
        return self.most - 1


def _factor(term: Term) -> float:
    if not isinstance(term, Scaled):
        return 1.0
    return 1.0 / term.factor if term.divide else term.factor


def _need(term: Term) -> int:
    if isinstance(term, Leaf):
        return 1
    if isinstance(term, Scaled):
        return _need(term.inner)
    left, right = _need(term.left), _need(term.right)
    return max(left, right) if left != right else left + 1


def _cancelling(total: Mapping[str, float], free_pairs: set[frozenset[str]]) -> list[tuple[str, str, str]]:
    """Pairs of models whose equal bits cancel and leave one model with factor 1, but for those that the
    arithmetic itself already gets right."""
    names = list(total)
    rules = []
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            rest = {name: factor for name, factor in total.items() if name not in (a, b) and factor != 0}
            cancels = total[a] == -total[b] != 0
            if cancels and list(rest.values()) == [1.0] and frozenset((a, b)) not in free_pairs:
                rules.append((a, b, next(iter(rest))))
    return rules
