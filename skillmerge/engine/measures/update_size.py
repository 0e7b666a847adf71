"""Updates that are too large for training: usually one of the models is the wrong one.

Fine-tuning moves a matrix by some thousandths or hundredths of its norm; two unrelated matrices of one size differ by
1.4 of it. Not all tensors are judged: norms and biases are few numbers that may move far, a matrix of zeros has no
norm to compare with, and embedding and head may hold rows of tokens that were added.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from skillmerge.naming import module_kind
from skillmerge.remarks import Remark, warning

LARGE = 0.3
"""An update's norm, of the norm of what it is added to, from which on it is implausible."""

_NOT_JUDGED = ("norm", "embedding", "head")
NAME = "update-size"
"""The warning's name for `accept` in a recipe."""


def too_large(ratios: Iterable[tuple[str, Sequence[int], float | None]]) -> dict[str, float]:
    """Return the matrices among these tensors (name, shape, norm ratio or None) whose ratio is above LARGE."""
    return {
        name: ratio
        for name, shape, ratio in ratios
        if ratio is not None and ratio > LARGE and len(shape) > 1 and not _is_left_out(name)
    }


def _is_left_out(name: str) -> bool:
    return module_kind(name) in _NOT_JUDGED or name.endswith("bias")


IN_RECIPE = f"add to the recipe: `accept: [{NAME}]`"
IN_EXTRACT = f"pass `--accept {NAME}`, or add to a recipe: `accept: [{NAME}]`"


def size_warning(ratios: Mapping[str, float], acceptance: str | None = IN_RECIPE) -> Iterator[Remark]:
    """Yield the warning that such matrices call for, where there are any; it names the largest.

    acceptance: how it can be accepted, if it can.
    """
    if not ratios:
        return
    name = max(ratios, key=lambda name: ratios[name])
    count = f"; {len(ratios)} matrices change by more than {LARGE}" if len(ratios) > 1 else ""
    yield warning(
        f"`{name}` changes by {ratios[name]:.2f} of its norm, which is implausibly large{count}",
        "check that the models belong together" + (f"; to accept it, {acceptance}" if acceptance else ""),
        name=NAME,
    )
