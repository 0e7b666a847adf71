"""Text -> the tree of an expression. Closed and safe: parsed here, never evaluated as Python.

    sum     = product { ("+" | "-") product }
    product = factor { ("*" | "/") factor }
    factor  = { "+" | "-" } ( number | name | "(" sum ")" | method "(" argument { "," argument } ")" )
    argument = sum | name "=" ( sum | word | "[" sum { "," sum } "]" )

A scalar is a number or a coefficient; everything else is made of models.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import replace

from skillmerge.errors import NEAR, did_you_mean, some
from skillmerge.methods.method import Kind, Numbers, Operand, Word
from skillmerge.methods.table import METHODS
from skillmerge.recipes.foreign.spellings import call_meant, sign_meant
from skillmerge.recipes.formula.arguments import check_call, check_keyword, word_of
from skillmerge.recipes.formula.tree import (
    CallNode,
    ExpressionError,
    Keyword,
    Name,
    Node,
    Number,
    Operation,
    has_model,
    normalise_name,
)

MAX_LENGTH = 10_000
MAX_DEPTH = 50
MAX_OPERATIONS = 150
"""Bounds the depth of the tree too, so that every walk over it stays within Python's own limit."""
_NUMBER_OR_NAME = r"\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|(?P<name>[^\W\d]\w*)"
_TOKEN = re.compile(_NUMBER_OR_NAME + r"|(?P<op>[-+*/(),]))")
_TOKEN_BESIDE_CALLS = re.compile(_NUMBER_OR_NAME + r"|(?P<op>[-+*/(),=\[\]]))")
_DECIMAL_COMMA = re.compile(r"(?<![\w.])\d+,\d+\b")
_CALL = re.compile(r"[^\W\d]\w*\s*\(")
_UNGROUPED = re.compile(r"(?P<factor>[\w.]+)\s*\*\s*(?P<first>[^\W\d]\w*)\s*[-−]\s*(?P<second>[^\W\d]\w*)")


def parse(text: str, models: list[str], coefficients: list[str]) -> Node:
    """Return the tree of `text`. Raises ExpressionError for whatever the grammar or the names do not allow."""
    if len(text) > MAX_LENGTH:
        raise ExpressionError(f"is longer than {MAX_LENGTH} characters", 0)
    comma = _DECIMAL_COMMA.search(text)
    if comma is not None and not _CALL.search(text):
        raise _decimal_comma(comma)
    try:
        node = _Parser(text, models, coefficients).whole()
    except ExpressionError as error:
        for comma in _DECIMAL_COMMA.finditer(text):  # between the operands of a call it may be meant
            if error.position < comma.end() and not text[error.position : comma.start()].strip(" +-*/("):
                raise _decimal_comma(comma) from error
        raise
    if not has_model(node):
        raise ExpressionError("has no model in it", 0, len(text))
    return node


def _decimal_comma(found: re.Match[str]) -> ExpressionError:
    fix = f"write {found[0].replace(',', '.')}"
    return ExpressionError("has a decimal comma", found.start(), len(found[0]), fix)


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
        self.depth = self.operations = self.random_calls = 0

    def _tokenise(self) -> list[tuple[str, str, int]]:
        tokens = []
        position = 0
        called = (found[0].rstrip("( \t\n") for found in _CALL.finditer(self.text))
        known = {*self.models, *self.coefficients}
        token = _TOKEN_BESIDE_CALLS if any(normalise_name(name) not in known for name in called) else _TOKEN
        end = len(self.text.rstrip())
        while position < end:
            match = token.match(self.text, position)
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
                if not has_model(operand) and has_model(other):
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
            if symbol == "/" and has_model(right):
                raise ExpressionError("divides by a model", position, fix="only numbers and coefficients divide")
            if symbol == "*" and has_model(node) and has_model(right):
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
            if name in METHODS:
                return self._call(name, position)
            fix = call_meant(text, list(METHODS))
            raise ExpressionError(f"calls `{text}`, which is no method of this version", position, len(text), fix)
        if name not in self.models and name not in self.coefficients:
            call = f"`{METHODS[name].usage}` is a method: call it" if name in METHODS else None
            near = call or did_you_mean(name, self.models + self.coefficients)
            known = f"add `coefficients: {{{text}: 1}}`, or use: {some(self.models + self.coefficients, NEAR)}"
            raise ExpressionError(
                f"names `{text}`, which is neither a model nor a coefficient",
                position,
                len(text),
                near or known,
            )
        return Name(name, position, is_model=name in self.models)

    def _call(self, name: str, position: int) -> CallNode:
        method = METHODS[name]
        ordinal = self.random_calls
        self.random_calls += method.indexed
        self._count(position)
        self.take()
        operands: list[Node] = []
        keywords: list[Keyword] = []
        while self.tokens[self.index][1] != ")":
            kind, text, at = self.tokens[self.index]
            if kind == "name" and self.tokens[self.index + 1][1] == "=":
                check_keyword(method, text, at, keywords)
                keywords.append(self._keyword(method.keywords[text], text, at))
            elif keywords:
                fix = f"write operands first: `{method.usage}`"
                raise ExpressionError(f"has an operand of `{name}` behind its keywords", at, max(1, len(text)), fix)
            else:
                if operands:
                    self._count(at)
                operands.append(self.sum())
                if not has_model(operands[-1]):
                    raise ExpressionError(
                        f"gives a number to `{name}` as an operand", at, len(text), f"name it: `{method.usage}`"
                    )
            if self.tokens[self.index][1] not in (",", ")"):
                break
            if self.tokens[self.index][1] == ",":
                self.take()
        _, closing, at = self.tokens[self.index]
        if closing != ")":
            where, fix = (position, "close it with `)`") if closing == "" else (at, "write `,` between arguments")
            raise ExpressionError(f"has a call of `{name}` that does not end well", where, max(1, len(closing)), fix)
        self.take()
        node = CallNode(method, tuple(operands), tuple(keywords), position, ordinal)
        check_call(node)
        return node

    def _keyword(self, kind: Kind, name: str, position: int) -> Keyword:
        self.take()
        self.take()
        if isinstance(kind, Word):
            return Keyword(name, (), position, word_of(kind, name, self.take()))
        _, text, at = self.tokens[self.index]
        if text != "[":
            value = self.sum()
            if has_model(value) != isinstance(kind, Operand):
                what = f"`{name}` is {kind}, and this is {'made of models' if has_model(value) else 'a number'}"
                fix = "write a difference, such as `b - base`" if isinstance(kind, Operand) else "write a number"
                raise ExpressionError(f"has a value that does not fit: {what}", at, max(1, len(text)), fix)
            return Keyword(name, (value,), position)
        if not isinstance(kind, Numbers):
            raise ExpressionError(f"has a list for `{name}`, which is {kind}", at, fix="leave the `[` and `]` out")
        self.take()
        values = []
        while self.tokens[self.index][1] not in ("]", ""):
            values.append(self.sum())
            if has_model(values[-1]):
                raise ExpressionError(f"has a model in the list of `{name}`", at, fix="write numbers")
            if self.tokens[self.index][1] == ",":
                self.take()
        if self.take()[1] != "]":
            raise ExpressionError("has a `[` that is never closed", at, fix="close it with `]`")
        return Keyword(name, tuple(values), position, listed=True)

    def _count(self, position: int) -> None:
        self.operations += 1
        if self.operations > MAX_OPERATIONS:
            raise ExpressionError(f"has too many terms: more than {MAX_OPERATIONS} operations", position)

    def _operation(self, symbol: str, left: Node, right: Node, position: int) -> Operation:
        self._count(position)
        return Operation(symbol, left, right, position)
