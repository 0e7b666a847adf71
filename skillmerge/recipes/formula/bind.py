"""The tree of an expression with numbers for its coefficients: the term of a tensor."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from skillmerge.methods.method import Operand
from skillmerge.methods.terms import Call, Leaf, Scaled, Sum, Term, calls, degree, expand_skills, weights
from skillmerge.recipes.formula.arguments import arguments_of, nth
from skillmerge.recipes.formula.tree import CallNode, ExpressionError, Name, Node, Number, Operation, has_model

_LEAVE_OUT = "leave it out, or use another coefficient than 0"


def bind(node: Node, values: Mapping[str, float], skills: Collection[str] = ()) -> Term | None:
    """Return the tree with the coefficients' values in place; None if everything fell away. skills: the names that are
    stored skills, and so differences.

    Raises ExpressionError if a scalar divides by zero, a factor is not finite, a keyword is out of its range, or a call
    has operands that its method cannot take, even one that falls away.
    """
    if isinstance(node, Name):
        return Leaf(node.name)
    if isinstance(node, Number):
        raise AssertionError("a bare number is never a term")
    if isinstance(node, CallNode):
        return _call(node, values, skills)
    term: Term | None
    if node.symbol in "+-":
        left, right = bind(node.left, values, skills), bind(node.right, values, skills)
        minus = node.symbol == "-"
        if right is None:
            term = left
        elif left is None:
            term = _scaled(right, -1.0, divide=False) if minus else right
        else:
            term = Sum(left, right, minus)
    elif has_model(node.left):
        term = _scaled(bind(node.left, values, skills), _scalar(node.right, values), node.symbol == "/", node)
    else:
        term = _scaled(bind(node.right, values, skills), _scalar(node.left, values), divide=False)
    if not all(map(math.isfinite, weights(term).values())):
        raise ExpressionError("has a factor that is not finite", node.position)
    return term


def _call(node: CallNode, values: Mapping[str, float], skills: Collection[str]) -> Term | None:
    method = node.method
    scalars = {keyword: [_scalar(value, values) for value in keyword.values if not has_model(value)]
               for keyword in node.keywords}  # fmt: skip
    arguments = arguments_of(node, {keyword.name: found for keyword, found in scalars.items()})
    operands = [bind(operand, values, skills) for operand in node.operands]
    left = [index for index, operand in enumerate(operands) if operand is not None]
    if len(left) < len(operands) and not method.absent and len(operands) > 1:
        index = next(index for index, operand in enumerate(operands) if operand is None)
        at = node.operands[index]
        what = f"gives `{method}` a {nth(index + 1)} operand that is zero"
        raise ExpressionError(what, at.position, fix=_LEAVE_OUT)
    if not left:
        return None
    if len(left) < len(operands):
        arguments = {
            name: tuple(value[index] for index in left) if isinstance(value, tuple) else value
            for name, value in arguments.items()
        }
    chosen = [operand for operand in operands if operand is not None]
    for keyword in sorted(node.keywords, key=lambda keyword: [*method.keywords].index(keyword.name)):
        if isinstance(method.keywords[keyword.name], Operand):
            if (other := bind(keyword.values[0], values, skills)) is None:
                what = f"gives `{method}` a `{keyword.name}` that is zero"
                raise ExpressionError(what, keyword.position, len(keyword.name), _LEAVE_OUT)
            chosen.append(other)
    call = Call(method, tuple(chosen), tuple(arguments.items()), node.ordinal, node.position, tuple(left))
    _check_operands(call, [degree(expand_skills(operand, skills)) for operand in chosen])
    alone = method.alone(len(chosen), **arguments)
    if alone is not None:
        return chosen[alone] if alone >= 0 else None
    if call.by_model and any(inner.readings for operand in chosen for inner in calls(operand)):
        what = f"takes the whole model in `{method}`, of what has to be read by itself before"
        raise ExpressionError(what, call.position, len(method.name), "write scope=matrix")
    return call


def _check_operands(call: Call, degrees: Sequence[float]) -> None:
    """Raise ExpressionError for an operand that the method cannot take: a model for a difference, or neither."""
    method = call.method
    wanted = 0 if method.differences else degrees[0]
    places = [f"its {nth(index + 1)} operand" for index in call.left]
    places += [f"its `{name}`" for name in method.operand_keywords]
    for which, found in zip(places, degrees, strict=True):
        if found == wanted and found in (0, 1):
            continue
        is_model = "is a model" if found == 1 else f"has {found:g} models' worth of weights"
        if method.differences:
            what = f"`{method}` combines differences, and {which} {is_model}"
            fix = "write a difference, such as `b - base`"
        else:
            is_what = is_model if found else "is a difference"
            what = f"`{method}` combines models or differences, and {which} {is_what}"
            fix = "give it models only, or differences only"
        raise ExpressionError(f"has a call that does not fit: {what}", call.position, len(method.name), fix)


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
    assert not isinstance(node, CallNode), "a call is never a scalar"
    left, right = _scalar(node.left, values), _scalar(node.right, values)
    try:
        value = {"+": left + right, "-": left - right, "*": left * right}.get(node.symbol)
        value = left / right if value is None else value
    except ZeroDivisionError:
        raise ExpressionError("divides by zero", node.position) from None
    if not math.isfinite(value):
        raise ExpressionError("has a coefficient that is not finite", node.position)
    return value
