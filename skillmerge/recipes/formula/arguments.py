"""What a call is given against what its method takes: operands, keywords, lists and words, and their values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from skillmerge.errors import did_you_mean, some
from skillmerge.methods.method import Method, Number, Numbers, Operand, Word, shown
from skillmerge.recipes.formula.tree import CallNode, ExpressionError, Keyword, Node, calls_in, names_in
from skillmerge.recipes.formula.tree import Number as NumberNode

_OTHERS = {
    "density": "k p top_k topk keep ratio fraction sparsity drop_rate select_topk",
    "weights": "weight w lambdas", "t": "alpha ratio interpolation", "spread": "epsilon eps", "select": "select_topk",
    "at": "t max limit", "steps": "max_iter iterations", "tolerance": "tol", "boost": "r", "cap": "alpha",
    "linear_above": "threshold dot_threshold", "rescale": "rescaling", "zero": "tie ties", "off": "from onto",
}  # fmt: skip
"""Our keywords -> what others call them."""


def nth(number: int) -> str:
    """Return 1st, 2nd, 3rd, 4th …"""
    last = "th" if 10 < number % 100 < 14 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{last}"


def check_keyword(method: Method, name: str, position: int, given: Sequence[Keyword]) -> None:
    """Raise ExpressionError for a keyword that the method does not have, or has already."""
    if name not in method.keywords:
        others = next((own for own, names in _OTHERS.items() if own in method.keywords and name in names.split()), None)
        near = f"did you mean `{others}=`?" if others else did_you_mean(name, list(method.keywords))
        fix = near or (f"it takes {some(list(method.keywords))}" if method.keywords else "it takes no keywords")
        raise ExpressionError(f"gives `{method}` a keyword it does not have, `{name}`", position, len(name), fix)
    if any(keyword.name == name for keyword in given):
        raise ExpressionError(f"gives `{name}` twice to `{method}`", position, len(name), "leave one of them out")


def word_of(kind: Word, name: str, token: tuple[str, str, int]) -> str:
    """Return the word that is the value of a keyword. Raises ExpressionError."""
    _, text, position = token
    if text in kind.words:
        return text
    fix = did_you_mean(text, list(kind.words)) or f"write {kind}"
    what = f"`{text}`" if text else "nothing"
    raise ExpressionError(f"has {what} for `{name}`", position, max(1, len(text)), fix)


def check_call(node: CallNode) -> None:
    """Raise ExpressionError where operands or keywords are too few or too many."""
    method, count = node.method, len(node.operands)
    if count < method.least or (method.most is not None and count > method.most):
        if method.most is None:
            takes = f"{method.least} or more operands"
        elif method.least == method.most:
            takes = f"{method.least} operand{'s' if method.least > 1 else ''}"
        else:
            takes = f"{method.least} to {method.most} operands"
        raise _at(node, f"gives {count} operand{'s' if count != 1 else ''} to `{method}`, which takes {takes}")
    given = {keyword.name for keyword in node.keywords}
    for name in method.keywords:
        if name not in given and name not in method.defaults:
            raise _at(node, f"calls `{method}` without `{name}`")
    for keyword in node.keywords:
        if keyword.listed and len(keyword.values) != count:
            what = f"has {len(keyword.values)} {keyword.name} for the {count} operands of `{method}`"
            raise ExpressionError(
                what, keyword.position, len(keyword.name), "give one for each operand, in their order"
            )


def _at(node: CallNode, message: str) -> ExpressionError:
    return ExpressionError(message, node.position, len(node.method.name), f"write `{node.method.usage}`")


def arguments_of(node: CallNode, numbers: Mapping[str, Sequence[float]]) -> dict[str, float | tuple[float, ...] | str]:
    """Return the values of all keywords but operands. numbers: those that are written, by keyword.

    Raises ExpressionError for a number outside its range.
    """
    found = dict(node.method.defaults)
    for keyword in node.keywords:
        kind = node.method.keywords[keyword.name]
        if isinstance(kind, Operand):
            continue
        if isinstance(kind, Word):
            found[keyword.name] = keyword.word
            continue
        assert isinstance(kind, Number)
        values = tuple(numbers[keyword.name])
        for value in values:
            if not kind.fits(value):
                what = f"has `{keyword.name}={shown(value)}` in `{node.method}`"
                raise ExpressionError(what, keyword.position, len(keyword.name), f"`{keyword.name}` is {kind}")
        found[keyword.name] = values if keyword.listed else values[0]
    listed = {keyword.name for keyword in node.keywords if keyword.listed}
    for name, kind in node.method.keywords.items():
        if isinstance(kind, Numbers) and name not in listed:
            one = found[name]
            found[name] = (one[0] if isinstance(one, tuple) else one,) * len(node.operands)
    if (wrong := node.method.check(**found)) is not None:
        what, fix = wrong
        raise ExpressionError(f"has a call that does not fit: {what}", node.position, len(node.method.name), fix)
    return found


def name_number(keyword: str, expression: Node) -> str | None:
    """Return how to give a name to what is written as a number for this keyword of a call; None if no call has it."""
    for node in calls_in(expression):
        if not isinstance(node.method.keywords.get(keyword), Number):
            continue
        given = next((it for it in node.keywords if it.name == keyword), None)
        if given is not None and given.listed:
            return f"give a number a name: `coefficients: {{w: 1}}`, and write `w` in the list of `{keyword}`"
        if given is None or not names_in(given.values[0]):
            number = given.values[0] if given is not None else None
            value = (
                f"{number.value:g}" if isinstance(number, NumberNode) else shown(node.method.defaults.get(keyword, 1))
            )
            call = f"`{keyword}={keyword}` in `{node.method}`"
            return f"give the number a name: `coefficients: {{{keyword}: {value}}}`, and write {call}"
    return None
