"""Methods that combine whole matrices by the angles between them. All are sums of the operands, with factors that come
from their dot products alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from skillmerge.errors import UnusableWeights
from skillmerge.methods.method import (
    OF_ROWS,
    SHARE,
    WEIGHTS,
    Number,
    Ready,
    Steps,
    Sums,
    Unit,
    alike,
    method,
    times,
)

if TYPE_CHECKING:
    from torch import Tensor

NOTHING = 1e-7
"""What rounding may leave of the length of a vector that is 0, where others are of length 1."""

Gram = list[list[float]]
"""The dot products of all pairs of operands."""


def dot_products(*v: Tensor) -> Iterator[Tensor]:
    """Of each operand with itself and those behind it, element by element; one at a time, as they are many."""
    wide = [x.double() for x in v]
    for i in range(len(wide)):
        for j in range(i, len(wide)):
            yield wide[i] * wide[j]


def gram_of(sums: Sequence[float], count: int) -> Gram:
    products = iter(sums)
    gram = [[0.0] * count for _ in range(count)]
    for i in range(count):
        for j in range(i, count):
            gram[i][j] = gram[j][i] = next(products)
    return gram


def combined(factors: Sequence[float]) -> Ready:
    """The sum of factor * operand, in their order."""

    def function(*v: Tensor) -> Tensor:
        first, *others = zip(v, factors, strict=True)
        result = times(*first)
        for x, factor in others:
            result += x * factor
        return result

    return Ready(function, {f"factor {index + 1}": factor for index, factor in enumerate(factors)})


def cosine(dot: float, one: float, other: float) -> float:
    """From a dot product and two squared norms; 0 where one of these is 0."""
    return max(-1.0, min(1.0, dot / math.sqrt(one) / math.sqrt(other))) if one and other else 0.0


def _end(count: int, *, t: float, **_: Any) -> int | None:
    return 0 if t == 0 else 1 if t == 1 else None


def of_rows(scope: str, **_: Any) -> bool:
    return scope == "row"


def of_matrices(scope: str = "matrix", **_: Any) -> int:
    """One reading for the dot products of whole matrices."""
    return int(scope == "matrix")


def grams_of_rows(unit: Unit, v: Sequence[Tensor]) -> list[Gram]:
    """The Gram matrix of each row of a run of whole rows."""
    from skillmerge.bits import fold_rows  # which loads torch

    sums = [fold_rows(product.view(-1, unit.columns)).tolist() for product in dot_products(*v)]
    return [gram_of(row, len(v)) for row in zip(*sums, strict=True)]


def for_rows(unit: Unit, like: Tensor, numbers: Sequence[float]) -> Tensor:
    """One number for each row, at each of its elements."""
    return like.new_tensor(numbers).repeat_interleave(unit.columns)


@method(
    alike(2), alone=_end, rows=of_rows, readings=of_matrices, t=Number(-1000, 1000), linear_above=SHARE, scope=OF_ROWS
)
def slerp(unit: Unit, *, t: float, linear_above: float = 0.9995, scope: str = "matrix") -> Steps:
    """Go from one model to another along the arc between them.

    t = 0 is the first, t = 1 the second. With theta the angle between two matrices:
    `sin((1 - t) * theta)/sin(theta) * a + sin(t * theta)/sin(theta) * b`. Where the size of the cosine is above
    `linear_above`, or a matrix is 0, it is the straight line `a - t * (a - b)`. With `scope=row` each row has its own
    angle.

    Paper: Shoemake, "Animating rotation with quaternion curves", 1985.
    Differs: mergekit takes two zero vectors as orthogonal.
    When: two models of one base differ so much that their average loses length.
    Not when: the models are close, as those of one base often are: it is the straight line. Their differences have
    larger angles: `base + slerp(a - base, b - base, t=0.5)`.
    Example: slerp(a, b, t=0.5)
    """

    def arc(gram: Gram) -> list[float] | None:
        """The factors of both, or None for the straight line."""
        c = cosine(gram[0][1], gram[0][0], gram[1][1])
        if not gram[0][0] or not gram[1][1] or abs(c) > min(linear_above, 1 - 1e-12):  # opposite: no arc is shortest
            return None
        theta = math.acos(c)
        return [math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)]

    def line(a: Tensor, b: Tensor) -> Tensor:
        return a - (a - b) * t if t > 0 else a - (b - a) * -t  # where a is b, a zero keeps its sign

    def rows(a: Tensor, b: Tensor) -> Tensor:
        arcs = [arc(gram) for gram in grams_of_rows(unit, (a, b))]
        if not any(arcs):
            return line(a, b)
        straight = for_rows(unit, a, [float(found is None) for found in arcs])
        one, other = (for_rows(unit, a, [found[index] if found else 0.0 for found in arcs]) for index in (0, 1))
        return line(a, b).where(straight > 0, (a * one).add_(b * other).add_(0.0))

    if scope == "row":
        return Ready(rows)
    gram = gram_of((yield Sums(dot_products)), 2)
    c, factors = cosine(gram[0][1], gram[0][0], gram[1][1]), arc(gram)
    ready = combined(factors) if factors else Ready(line)
    return Ready(ready.function, {"cosine": c, **ready.found})


def _sum_of_weights(*, weights: Sequence[float]) -> tuple[str, str] | None:
    total = sum(weights)
    if 1e-9 < abs(total) < math.inf:
        return None
    return f"the weights of `multislerp` add up to {total:g}", "give weights with another sum"


@method(alike(2, None), readings=of_matrices, check=_sum_of_weights, weights=WEIGHTS)
def multislerp(unit: Unit, *, weights: Sequence[float] = (1.0,)) -> Steps:
    """Average directions on the sphere with weights, and average the norms.

    The weights w are scaled to add up to 1. m is the direction of the weighted sum of the unit vectors u. The result is
    `m * sum(w * ||x||)`.

    Paper: none. It is mergekit's multislerp.
    Differs: mergekit then moves m by `tau = sum(w * (u - <u, m> * m))`. That is 0 but for rounding, as m has the
    direction of `sum(w * u)`.
    When: three or more models of one base, with weights.
    Not when: there are two. Use `slerp`.
    Example: multislerp(a, b, c, weights=[2, 1, 1])
    """
    count = unit.operands
    gram = gram_of((yield Sums(dot_products)), count)
    total = sum(weights)
    w = [weight / total for weight in weights]
    norms = [math.sqrt(gram[i][i]) for i in range(count)]
    units = [_unit(count, i, norms[i]) for i in range(count)]
    mean = _sum(count, zip(w, units, strict=True))
    length = _norm(gram, mean)
    size = sum(weight * norm for weight, norm in zip(w, norms, strict=True))
    if not any(norms):
        return combined([0.0] * count)
    if length < NOTHING:
        if count == 2:
            return combined(w)
        raise UnusableWeights(
            "`multislerp` has no direction for matrices that cancel", fix="use `karcher`, or leave one of them out"
        )
    m = [x / length for x in mean]
    # Only rounding is left of it; without it the last bits of factors, and so of older outputs, would change.
    tangent = _sum(count, zip(w, (_off(gram, u, m) for u in units), strict=True))
    return combined([size * x for x in _step(gram, m, tangent)])


@method(
    alike(1, None), alone=lambda count, **_: 0 if count == 1 else None, readings=of_matrices,
    steps=Number(1, 1000, whole=True), tolerance=Number(0),
)  # fmt: skip
def karcher(unit: Unit, *, steps: float = 10, tolerance: float = 1e-5) -> Steps:
    """Average directions on the sphere, and average the norms.

    The result has the direction with the least sum of squared angles to all operands. It takes at most `steps` steps,
    and stops after one shorter than `tolerance`. A matrix that is 0 counts for the norm alone.

    Paper: Karcher, "Riemannian center of mass and mollifier smoothing", 1977.
    Differs: mergekit counts its `base_model` as one more operand.
    When: three or more models of one base, without weights.
    Not when: the models are close: it is nearly their plain average.
    Example: karcher(a, b, c)
    """
    count = unit.operands
    gram = gram_of((yield Sums(dot_products)), count)
    norms = [math.sqrt(gram[i][i]) for i in range(count)]
    units = [_unit(count, i, norms[i]) for i in range(count) if norms[i]]
    if not units:
        return combined([0.0] * count)
    mean = _sum(count, [(1 / len(units), u) for u in units])
    length = _norm(gram, mean)
    m = [x / length for x in mean] if length > NOTHING else units[0]
    for _ in range(int(steps)):
        tangent = _sum(count, [(1 / len(units), _towards(gram, u, m)) for u in units])
        if _norm(gram, tangent) < tolerance:
            break
        m = _step(gram, m, tangent)
    size = math.fsum(norms) / count
    return combined([size * x for x in m])


# Vectors are written as factors of the operands; the Gram matrix has all that is asked about them.


def _unit(count: int, index: int, norm: float) -> list[float]:
    return [1 / norm if i == index and norm else 0.0 for i in range(count)]


def _sum(count: int, parts: Any) -> list[float]:
    total = [0.0] * count
    for weight, vector in parts:
        total = [x + weight * y for x, y in zip(total, vector, strict=True)]
    return total


def _dot(gram: Gram, a: Sequence[float], b: Sequence[float]) -> float:
    return math.fsum(x * row[j] * y for x, row in zip(a, gram, strict=True) for j, y in enumerate(b))


def _norm(gram: Gram, vector: Sequence[float]) -> float:
    return math.sqrt(max(0.0, _dot(gram, vector, vector)))


def _off(gram: Gram, u: Sequence[float], m: Sequence[float]) -> list[float]:
    """What of u is not along the unit vector m."""
    along = _dot(gram, u, m)
    return [x - along * y for x, y in zip(u, m, strict=True)]


def _towards(gram: Gram, u: Sequence[float], m: Sequence[float]) -> list[float]:
    """The tangent at m that leads to u, as long as the angle between them."""
    angle = math.acos(max(-1.0, min(1.0, _dot(gram, u, m))))
    across = _off(gram, u, m)
    length = _norm(gram, across)
    return [x * angle / length for x in across] if length > NOTHING else [0.0] * len(across)


def _step(gram: Gram, m: Sequence[float], tangent: Sequence[float]) -> list[float]:
    """Where a walk from m along a tangent ends, after its length."""
    length = _norm(gram, tangent)
    if length == 0:
        return list(m)
    return [x * math.cos(length) + y * math.sin(length) / length for x, y in zip(m, tangent, strict=True)]
