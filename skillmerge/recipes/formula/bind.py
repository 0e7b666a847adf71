"""The tree of an expression with numbers for its coefficients: the term of a tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping

from skillmerge.methods.method import Operand
from skillmerge.methods.terms import Call, Leaf, Scaled, Sum, Term, calls, degree, weights
from skillmerge.recipes.formula.arguments import arguments_of, nth
from skillmerge.recipes.formula.tree import CallNode, ExpressionError, Name, Node, Number, Operation, has_model

_LEAVE_OUT = "leave it out, or use another coefficient than 0"


def bind(node: Node, values: Mapping[str, float]) -> Term | None:
    """Return the tree with the coefficients' values in place; None if everything fell away.

    Raises ExpressionError if a scalar divides by zero, a factor is not finite, or a keyword is out of its range.
    """
    if isinstance(node, Name):
        return Leaf(node.name)
    if isinstance(node, Number):
        raise AssertionError("a bare number is never a term")
    if isinstance(node, CallNode):
        return _call(node, values)
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
    elif has_model(node.left):
        term = _scaled(bind(node.left, values), _scalar(node.right, values), node.symbol == "/", node)
    else:
        term = _scaled(bind(node.right, values), _scalar(node.left, values), divide=False)
    if not all(map(math.isfinite, weights(term).values())):
        raise ExpressionError("has a factor that is not finite", node.position)
    return term


def _call(node: CallNode, values: Mapping[str, float]) -> Term | None:
    method = node.method
    scalars = {keyword: [_scalar(value, values) for value in keyword.values if not has_model(value)]
               for keyword in node.keywords}  # fmt: skip
    arguments = arguments_of(node, {keyword.name: found for keyword, found in scalars.items()})
    operands = [bind(operand, values) for operand in node.operands]
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
    for keyword in node.keywords:
        if isinstance(method.keywords[keyword.name], Operand):
            if (other := bind(keyword.values[0], values)) is None:
                what = f"gives `{method}` a `{keyword.name}` that is zero"
                raise ExpressionError(what, keyword.position, len(keyword.name), _LEAVE_OUT)
            chosen.append(other)
    alone = method.alone(len(chosen), **arguments)
    if alone is not None:
        return chosen[alone] if alone >= 0 else None
    return Call(method, tuple(chosen), tuple(arguments.items()), node.ordinal, node.position)


def check_calls(term: Term | None) -> None:
    """Raise ExpressionError for an operand that its method cannot take: a model for a difference, or neither.

    Stored skills have to be differences in `term` already.
    """
    for call in calls(term):
        if call.by_model and any(inner.readings for operand in call.operands for inner in calls(operand)):
            raise ExpressionError(
                f"takes the whole model in `{call.method}`, of what has to be read by itself before",
                call.position, len(call.method.name), "write scope=matrix",
            )  # fmt: skip
        wanted = 0 if call.method.differences else degree(call.operands[0])
        for index, operand in enumerate(call.operands):
            found = degree(operand)
            if found == wanted and found in (0, 1):
                continue
            named = call.method.operand_keywords[index - len(call.operands) :] if index else ()
            which = f"its `{named[0]}`" if named else f"its {nth(index + 1)} operand"
            is_model = "is a model" if found == 1 else f"has {found:g} models' worth of weights"
            if call.method.differences:
                what = f"`{call.method}` combines differences, and {which} {is_model}"
                fix = "write a difference, such as `b - base`"
            else:
                is_what = is_model if found else "is a difference"
                what = f"`{call.method}` combines models or differences, and {which} {is_what}"
                fix = "give it models only, or differences only"
            raise ExpressionError(f"has a call that does not fit: {what}", call.position, len(call.method.name), fix)


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
