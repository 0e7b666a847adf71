"""The tree of an expression, as it is written: numbers, names, operations and calls, and where each stands."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field

from skillmerge.methods.method import Method


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


@dataclass(frozen=True, slots=True)
class Keyword:
    """`name=value` in a call. A list has several values. word: the value if it is a word of the method."""

    name: str
    values: tuple[Node, ...]
    position: int
    word: str = ""
    listed: bool = False


@dataclass(frozen=True, slots=True)
class CallNode:
    """A method's name with its operands and keywords. ordinal: which call with random numbers it is, from 0."""

    method: Method
    operands: tuple[Node, ...]
    keywords: tuple[Keyword, ...]
    position: int
    ordinal: int = 0


Node = Number | Name | Operation | CallNode


def normalise_name(name: str) -> str:
    """Return the normalized name, so that names that look alike are equal: µ (the micro sign) is μ (the letter)."""
    return unicodedata.normalize("NFKC", name)


def has_model(node: Node) -> bool:
    if isinstance(node, Operation):
        return has_model(node.left) or has_model(node.right)
    return isinstance(node, CallNode) or (isinstance(node, Name) and node.is_model)


def names_in(node: Node) -> list[Name]:
    """Return every name, in the order of the text."""
    if isinstance(node, Name):
        return [node]
    return [name for inner in parts_of(node) for name in names_in(inner)]


def calls_in(node: Node) -> Iterator[CallNode]:
    """Yield every call, outer ones first."""
    if isinstance(node, CallNode):
        yield node
    for inner in parts_of(node):
        yield from calls_in(inner)


def differences_in(node: Node) -> Iterator[tuple[str, str]]:
    """Yield every difference of two models that are named, in the order of the text."""
    if isinstance(node, Operation) and node.symbol == "-" and has_model(node):
        left, right = node.left, node.right
        yield from [(left.name, right.name)] if isinstance(left, Name) and isinstance(right, Name) else []
    for inner in parts_of(node):
        yield from differences_in(inner)


def parts_of(node: Node) -> tuple[Node, ...]:
    """Return what a node is made of, in the order of the text."""
    if isinstance(node, Operation):
        return node.left, node.right
    if isinstance(node, CallNode):
        return (*node.operands, *(value for keyword in node.keywords for value in keyword.values))
    return ()
