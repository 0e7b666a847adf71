"""Which model the output is like, by the text of the expression alone."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction

from skillmerge.recipes.formula.tree import CallNode, Name, Node, Number, Operation, has_model, names_in


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
    if isinstance(node, CallNode):
        for operand in node.operands:
            yield from _addends(operand, skills, sign, plain, inside or _is_difference(operand, skills))
    if not isinstance(node, Operation):
        return
    inside = inside or (node.grouped and _is_difference(node, skills))
    if node.symbol in "+-":
        yield from _addends(node.left, skills, sign, plain, inside)
        yield from _addends(node.right, skills, -sign if node.symbol == "-" else sign, plain, inside)
        return
    inner, factor = (node.left, node.right) if has_model(node.left) else (node.right, node.left)
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
    if isinstance(node, CallNode):
        return Fraction(0) if node.method.differences else _exact(node.operands[0], values)
    left, right = _exact(node.left, values), _exact(node.right, values)
    if node.symbol in "+-":
        return left - right if node.symbol == "-" else left + right
    return left / right if node.symbol == "/" else left * right
