"""Methods that average: by the angles between updates, by their variances, by the middle value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from skillmerge.methods.elect import agreeing, total, weighted
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
from skillmerge.methods.spherical import (
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

if TYPE_CHECKING:
    from torch import Tensor


@method(differences(2, None), rows=of_rows, readings=of_matrices, negative=words("zero", "keep"), scope=OF_ROWS)
def model_stock(unit: Unit, *, negative: str = "zero", scope: str = "matrix") -> Steps:
    """Average updates, shortened by how much they disagree.

    c is the mean cosine of all pairs of N updates, at least 0 (negative=keep: as it is), and at most 1. The result is
    t times their mean, with t = N c/(1 + (N - 1) c). With scope=row each row has its own t.

    Paper: Model Stock, arXiv 2403.19522.
    Differs: mergekit extrapolates where the cosine is negative, and floors the product of norms at 1e-6, which is wrong
    for small updates.
    Use: fine-tunings of one base on the same task with other seeds or data.
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
    """Select where updates vary most, weigh them by their energy, and erase what has the minority's sign.

    Of the positions whose variance over the updates is not 0, the share `select` of largest variance is kept, and
    whatever ties. Each update weighs as much as its mean square of what is kept (all alike if these add up to 0, or to
    less than `floor`). Signs are elected by the plain sum; the weighted mean of what agrees is the result.

    Paper: SCE, arXiv 2408.07990 (FuseChat 3).
    Differs: mergekit weighs all alike below a sum of 1e-6 (floor=1e-6), which most RL updates are below.
    Use: experts of different skills, in place of weights by hand.
    """
    count, least = unit.operands, Rank(0.0, unit.elements)
    if select < 1:
        (varied,) = yield Sums(lambda *v: [variance(v).gt_(0).double()])
        (least,) = yield Ranks(lambda *v: variance(v), (math.floor(select * varied),))

    def kept(*v: Tensor) -> list[Tensor]:
        if select == 1:
            return list(v)
        mask = variance(v).float().ge_(least.size).to(v[0].dtype)
        return [keep(x, mask) for x in v]

    energies = yield Sums(lambda *v: [x.double() * x.double() for x in kept(*v)])
    whole = math.fsum(energies)
    alike = whole == 0 or whole / unit.elements < floor
    weights = [1 / count if alike else energy / whole for energy in energies]

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
    """Take the middle value of each element; of an even number of models the mean of the middle two.

    Use: several models of one base, one of which may be far off.
    """
    count = unit.operands

    def function(*v: Tensor) -> Tensor:
        sizes = list(v)
        for end in range(count - 1, 0, -1):  # a network of exchanges: elementwise, and so the same everywhere
            for index in range(end):
                low, high = sizes[index].minimum(sizes[index + 1]), sizes[index].maximum(sizes[index + 1])
                sizes[index], sizes[index + 1] = low, high
        middle = sizes[count // 2]
        return middle if count % 2 else (sizes[count // 2 - 1] + middle) / 2

    return Ready(function)
