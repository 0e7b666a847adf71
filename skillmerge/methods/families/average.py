"""Methods that average: by the angles between updates, by their variances, by the middle value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from skillmerge.methods.families.elect import agreeing, total, weighted
from skillmerge.methods.families.spherical import (
    NOTHING,
    Gram,
    cosine,
    dot_products,
    for_rows,
    gram_of,
    grams_of_rows,
    of_matrices,
    of_rows,
)
from skillmerge.methods.method import (
    OF_ROWS,
    SHARE,
    Number,
    Rank,
    Ranks,
    Ready,
    Steps,
    Sums,
    Unit,
    alike,
    differences,
    keep,
    method,
    times,
    words,
)

if TYPE_CHECKING:
    from torch import Tensor


@method(differences(2, None), rows=of_rows, readings=of_matrices, negative=words("zero", "keep"), scope=OF_ROWS)
def model_stock(unit: Unit, *, negative: str = "zero", scope: str = "matrix") -> Steps:
    """Average differences, and shorten the result the more they disagree.

    c is the mean cosine of all pairs of the N differences, at least 0 and at most 1. With `negative=keep` it may be
    below 0. The result is t times their mean, with `t = N * c/(1 + (N - 1) * c)`. With `scope=row` each row has its
    own t.

    Paper: Model Stock, arXiv 2403.19522.
    Differs: mergekit extrapolates where the cosine is negative. It also takes a product of norms below 1e-6 as 1e-6,
    which is wrong for small updates.
    When: one base was tuned several times on the same task, with other seeds or data.
    Not when: the tasks differ. Nearly orthogonal updates give a t near 0, and the result is nearly the base.
    Example: base + model_stock(a - base, b - base, c - base)
    """
    count = unit.operands

    def shortened(gram: Gram) -> tuple[float, float]:
        """c and t."""
        pairs = [cosine(gram[i][j], gram[i][i], gram[j][j]) for i in range(count) for j in range(i)]
        c = min(1.0, math.fsum(pairs) / len(pairs))
        c = max(0.0, c) if negative == "zero" else c
        below = 1 + (count - 1) * c
        return c, count * c / below if below > NOTHING else 0.0

    def rows(*v: Tensor) -> Tensor:
        factors = [shortened(gram)[1] / count for gram in grams_of_rows(unit, v)]
        by = for_rows(unit, v[0], factors)
        return total(v).mul_(by).add_(0.0)

    if scope == "row":
        return Ready(rows)
    c, t = shortened(gram_of((yield Sums(dot_products)), count))
    return Ready(lambda *v: times(total(v), t / count), {"cosine": c, "t": t})


@method(
    differences(2, None), readings=lambda select, **_: 1 if select == 1 else 4, select=SHARE, floor=Number(0)
)  # fmt: skip
def sce(unit: Unit, *, select: float = 1.0, floor: float = 0.0) -> Steps:
    """Average differences by their energy, where they vary most and agree in sign.

    With `select=1` every position is kept. Otherwise, of those where the variance over the differences is not 0, the
    share `select` with the largest variance is kept, and so is every position of the same variance as the last. Each
    difference weighs as much as the mean square of what is kept of it. All weigh alike if these add up to 0, or to less
    than `floor`. The plain sum elects the signs, and the result is the weighted mean of what agrees.

    Paper: SCE, arXiv 2408.07990 (FuseChat-3.0).
    Differs: mergekit weighs all alike where the mean squares add up to less than 1e-6 (`floor=1e-6` here). Most updates
    of RL are below that.
    When: experts of different skills have updates of similar size, and you do not want to choose weights by hand.
    Not when: the sizes differ much. Weights go with the square, so an update 30 times larger weighs 900 times more.
    Example: base + sce(a - base, b - base, select=0.5)
    """
    count, least = unit.operands, Rank(0.0, unit.elements)
    if select < 1:
        (varied,) = yield Sums(lambda *v: [variance(v).gt_(0).double()])
        (least,) = yield Ranks(lambda *v: variance(v), (math.floor(select * varied),))

    def kept(*v: Tensor) -> list[Tensor]:
        if select == 1:
            return list(v)
        spread = variance(v)
        # A variance that is 0 in float32 alone is still one: what does not vary must not tie with it.
        mask = spread.float().ge_(least.size) if least.size else spread.gt_(0)
        mask = mask.to(v[0].dtype)
        return [keep(x, mask) for x in v]

    energies = yield Sums(lambda *v: [x.double() * x.double() for x in kept(*v)])
    whole = math.fsum(energies)
    equal = whole == 0 or whole / unit.elements < floor
    weights = [1 / count if equal else energy / whole for energy in energies]

    def function(*v: Tensor) -> Tensor:
        selected = kept(*v)
        plus = total(selected).ge_(0)
        return agreeing(weighted(selected, weights), weights, lambda _: plus, normalize=True)

    return Ready(function, {f"weight {index + 1}": weight for index, weight in enumerate(weights)})


def variance(v: Sequence[Tensor]) -> Tensor:
    """The mean square of the distances to the mean, element by element, in float64: what ties should tie in any order.
    Exactly 0 where all are equal."""
    first = v[0].double()
    apart = [x.double() - first for x in v]
    mean = total(apart) / len(v)
    return total([(x - mean) * (x - mean) for x in apart]) / len(v)


@method(alike(1, None), alone=lambda count, **_: 0 if count == 1 else None)
def median(unit: Unit) -> Ready:
    """Take the middle value of each element.

    For an even number of operands it is the mean of the middle two.

    When: there are three or more models of one base, one of which may be far off.
    Not when: there are two: it is their average.
    Example: median(a, b, c)
    """
    from skillmerge.bits import any_nonfinite, from_ordered_bits, ordered_bits  # which loads torch

    count = unit.operands

    def function(*v: Tensor) -> Tensor:
        order = [ordered_bits(x) for x in v]
        for end in range(count - 1, 0, -1):  # a network of exchanges: elementwise, and so the same everywhere
            for index in range(end):
                low, high = order[index].minimum(order[index + 1]), order[index].maximum(order[index + 1])
                order[index], order[index + 1] = low, high
        middle = from_ordered_bits(order[count // 2], v[0].dtype)
        result = middle if count % 2 else (from_ordered_bits(order[count // 2 - 1], v[0].dtype) + middle) / 2
        for x in v:
            if any_nonfinite(x):  # a NaN has no place in the order, and its sign differs from device to device
                result = result.masked_fill(x.isnan(), math.nan)
        return result

    return Ready(function)
