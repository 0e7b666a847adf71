"""Methods that combine differences element by element: by sign, by size, by who changed it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from skillmerge.methods.families.sparsify import largest as largest_sizes
from skillmerge.methods.families.sparsify import norms, ratio, scaled, size
from skillmerge.methods.method import (
    OF_MODEL,
    RESCALE,
    SHARE,
    VOTES,
    Number,
    Ranks,
    Ready,
    Steps,
    Sums,
    Unit,
    differences,
    either,
    keep,
    method,
    times,
    words,
)

if TYPE_CHECKING:
    from torch import Tensor

YES_NO = words("yes", "no")
PICK = words("mean", "max")
ZERO = words("plus", "majority")


def weighted(v: Sequence[Tensor], weights: Sequence[float]) -> list[Tensor]:
    return [x if weight == 1 else times(x, weight) for x, weight in zip(v, weights, strict=True)]


def total(v: Sequence[Tensor]) -> Tensor:
    """The sum in the order of the operands."""
    first, *others = v
    result = first.clone()
    for x in others:
        result += x
    return result


def agreeing(
    v: Sequence[Tensor], by: Sequence[float], plus: Callable[[Sequence[Tensor]], Tensor], normalize: bool
) -> Tensor:
    """The sum of what has the elected sign, over the sum of its weights `by`; 0 is of no sign. v: weighted already."""
    chosen = plus(v)
    result = either(chosen, total([x.clamp(min=0) for x in v]), total([x.clamp(max=0) for x in v]))
    if normalize:
        ups = total(weighted([x.clone().gt_(0) for x in v], by))
        downs = total(weighted([x.clone().lt_(0) for x in v], by))
        divisor = either(chosen, ups, downs)
        result /= divisor.add_(divisor.clone().eq_(0))
    return result


def largest(v: Sequence[Tensor], plus: Callable[[Sequence[Tensor]], Tensor]) -> Tensor:
    """Of what has the elected sign, the largest."""
    up, down = v[0].clamp(min=0), v[0].clamp(max=0)
    for x in v[1:]:
        up, down = up.maximum(x), down.minimum(x)
    return either(plus(v), up, down)


def _election(
    weights: Sequence[float], normalize: str, pick: str, zero: str, trimmed: Callable[..., list[Tensor]]
) -> Steps:
    """Elect signs of weighted operands, and combine what agrees."""
    sign = 1.0

    def operands(*v: Tensor) -> list[Tensor]:
        return weighted(trimmed(*v), weights)

    if zero == "majority":
        (balance,) = yield Sums(lambda *v: [total(operands(*v)).sign().double()])
        sign = 1.0 if balance >= 0 else -1.0

    def plus(v: Sequence[Tensor]) -> Tensor:
        return total(v).ge_(0) if sign > 0 else total(v).gt_(0)

    if pick == "max":
        return Ready(lambda *v: largest(operands(*v), plus))
    return Ready(lambda *v: agreeing(operands(*v), weights, plus, normalize == "yes"))


def _sole(
    count: int, *, weights: Sequence[float], normalize: str = "yes", pick: str = "mean", **_: object
) -> int | None:
    """One operand is elected as it is."""
    return 0 if count == 1 and ((normalize == "yes" and pick == "mean" and weights[0] > 0) or weights[0] == 1) else None


@method(
    differences(1, None, absent=True), alone=_sole, readings=lambda zero, **_: int(zero == "majority"),
    weights=VOTES, normalize=YES_NO, pick=PICK, zero=ZERO,
)  # fmt: skip
def elect(
    unit: Unit,
    *,
    weights: Sequence[float] = (1.0,),
    normalize: str = "yes",
    pick: str = "mean",
    zero: str = "plus",
) -> Steps:
    """Elect a sign for each element, and average the differences that have it.

    With `x = weight * v` of each difference, the elected sign is that of the sum of all x. A sum of 0 counts as plus,
    or with `zero=majority` as the sign that the matrix elected most. The result is the sum of the x that have this
    sign, over the sum of their weights. It is the sum alone with `normalize=no`, and the largest of them with
    `pick=max`. A zero has no sign.

    Paper: TIES, arXiv 2306.01708, steps 2 and 3. With `pick=max` the unified vector of EMR-Merging, arXiv 2405.17461.
    Differs: as in mergekit, weights sway the election and the mean. The paper has no weights.
    When: updates of similar size pull elements in different directions. With all elements it is TIES without `trim`.
    Not when: the sizes differ much, as those of RL and SFT do: the larger update elects nearly every sign.
    Example: base + lam * elect(a - base, b - base, weights=[1, 0.5])
    """
    ready = yield from _election(weights, normalize, pick, zero, lambda *v: list(v))
    return ready


@method(
    differences(1, None, absent=True),
    readings=lambda rescale, zero, **_: 2 + (rescale != "none") + (zero == "majority"),
    density=SHARE, rescale=RESCALE, weights=VOTES, normalize=YES_NO, pick=PICK, zero=ZERO,
)  # fmt: skip
def ties(
    unit: Unit,
    *,
    density: float,
    rescale: str = "none",
    weights: Sequence[float] = (1.0,),
    normalize: str = "yes",
    pick: str = "mean",
    zero: str = "plus",
) -> Steps:
    """Trim each difference, elect signs, and average what agrees.

    `elect(trim(v), trim(w), ...)` with the keywords of both, but `scope`. Where that matters, write it so.

    Paper: TIES, arXiv 2306.01708.
    Differs: as `trim` and `elect` do.
    When: several experts of one base were tuned alike, and their plain sum is worse than each of them.
    Not when: the updates differ much in size, as those of RL and SFT do. For one update alone use `trim`.
    Example: base + lam * ties(a - base, b - base, c - base, density=0.3)
    """
    ranks = yield [Ranks(_size_of(index), (unit.count(density),)) for index in range(unit.operands)]
    leasts = [found[0] for found in ranks]
    factors = [1.0] * unit.operands
    if rescale != "none":
        kept = [partial(largest_sizes, least=least) for least in leasts]
        sums = yield [norms(function, rescale, index) for index, function in enumerate(kept)]
        factors = [ratio(found, rescale) for found in sums]

    def trimmed(*v: Tensor) -> list[Tensor]:
        return [scaled(largest_sizes(x, least), by) for x, least, by in zip(v, leasts, factors, strict=True)]

    ready = yield from _election(weights, normalize, pick, zero, trimmed)
    return Ready(ready.function, {f"threshold {index + 1}": least.size for index, least in enumerate(leasts)})


def _size_of(index: int) -> Callable[..., Tensor]:
    return lambda *v: size(v[index])


@method(differences(1, None, absent=True))
def pick(unit: Unit) -> Ready:
    """Take each element from the difference in which it is largest.

    Largest by size. Of elements of one size, that of the first difference.

    Paper: MagMax, arXiv 2407.06322.
    Differs: the authors' code takes the last of elements of one size.
    When: updates of similar size change different elements.
    Not when: one update is much larger than the others: it is picked nearly everywhere.
    Example: base + lam * pick(a - base, b - base)
    """

    def function(*v: Tensor) -> Tensor:
        result = v[0]
        for x in v[1:]:
            result = either(x.abs().gt_(result.abs()), x, result)
        return result

    return Ready(function)


@method(
    differences(1, None, absent=True), readings=lambda boost, **_: int(boost > 0),
    threshold=Number(0), boost=Number(0), cap=Number(0), scope=OF_MODEL,
)  # fmt: skip
def ram(unit: Unit, *, threshold: float = 0.0, boost: float = 0.0, cap: float = 1.0, scope: str = "model") -> Steps:
    """Average what several differences changed, and keep what one changed alone.

    A difference changed an element if `|v| > threshold`. If several did, the result is their mean. If one did, it is
    `v * (1 + boost * min(shared/alone, cap))`. Here shared and alone count the elements of the model that this
    difference changed with others and alone, or with `scope=matrix` those of the matrix. If it changed none alone, the
    ratio is `cap`.

    Paper: RAM and RAM+, arXiv 2601.13572.
    Differs: the authors boost by 0.2. Here the default is no boost. mergekit counts matrix by matrix.
    When: RL experts, whose sparse updates change different elements. An average would dilute these.
    Not when: the updates are dense, as those of SFT are: nearly every element is shared, and the result is the mean.
    Example: base + lam * ram(a - base, b - base, c - base)
    """
    factors = [1.0] * unit.operands
    if boost:
        sums = yield Sums(lambda *v: _counts(v, threshold))
        pairs = zip(sums[0::2], sums[1::2], strict=True)
        factors = [1 + boost * (min(shared / alone, cap) if alone else cap) for shared, alone in pairs]

    def function(*v: Tensor) -> Tensor:
        changed = [x.abs().gt_(threshold) for x in v]
        times = total(changed)
        kept = [keep(x, mask) for x, mask in zip(v, changed, strict=True)]
        mean = total(kept) / times.clamp(min=1)
        return either(times.eq_(1), total(weighted(kept, factors)), mean) if boost else mean

    return Ready(function, {f"factor {index + 1}": factor for index, factor in enumerate(factors)} if boost else {})


def _counts(v: Sequence[Tensor], threshold: float) -> list[Tensor]:
    """For each update, what it changed with others and what it changed alone."""
    changed = [x.abs().gt_(threshold).double() for x in v]
    times = total(changed)
    result = []
    for mask in changed:
        alone = mask * times.clone().eq_(1)
        result += [mask - alone, alone]
    return result
