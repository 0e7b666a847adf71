"""Methods that make a difference sparser, smaller, or free of another one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from skillmerge.methods.method import (
    OF_MODEL,
    RESCALE,
    SHARE,
    Number,
    Operand,
    Rank,
    Ranks,
    Ready,
    Steps,
    Sums,
    Unit,
    differences,
    keep,
    method,
    words,
)

if TYPE_CHECKING:
    from torch import Tensor


def _share(count: int, *, density: float, **_: Any) -> int | None:
    """With density 1 the result is the operand, with density 0 nothing."""
    return 0 if density == 1 else -1 if density == 0 else None


def size(v: Tensor) -> Tensor:
    """The sizes that ranks compare: |v|, rounded to float32."""
    return v.abs().float()


def norms(kept: Callable[..., Tensor], rescale: str, index: int = 0) -> Sums:
    """Ask for the norms of an operand and of what is kept of it, as `rescale` has them: l1, or l2 squared."""
    return Sums(lambda *v, **where: [_power(v[index], rescale), _power(kept(v[index], **where), rescale)])


def ratio(sums: Sequence[float], rescale: str) -> float:
    """Return ||v||/||kept|| of `norms`; 1 where either is 0."""
    whole, left = sums
    if not whole or not left:
        return 1.0
    return whole / left if rescale == "l1" else math.sqrt(whole / left)


def _ranked(rescale: str, **_: Any) -> int:
    return 2 + (rescale != "none")


def scaled(v: Tensor, factor: float) -> Tensor:
    return v if factor == 1 else v * factor


def largest(v: Tensor, least: Rank) -> Tensor:
    """What is at least as large as that rank; the rest is 0."""
    return keep(v, size(v).ge_(least.size))


def _power(v: Tensor, rescale: str = "l2") -> Tensor:
    wide = v.double()
    return wide.abs() if rescale == "l1" else wide * wide


@method(differences(1), alone=_share, readings=_ranked, density=SHARE, rescale=RESCALE, scope=OF_MODEL)
def trim(unit: Unit, *, density: float, rescale: str = "none", scope: str = "matrix") -> Steps:
    """Keep the largest elements of a difference.

    Of the n elements of a matrix, the `k = max(1, floor(density * n))` largest by size are kept, and so is every
    element as large as the k-th. `rescale` multiplies them by `||v||/||kept||`, in the 1-norm (`l1`) or the 2-norm
    (`l2`). With `scope=model` the elements of all tensors are ranked together.

    Paper: TIES, arXiv 2306.01708, step 1. With `rescale=l2` DoTS, arXiv 2605.00610.
    Differs: the authors rank over the whole model (`scope=model`), and keep one element more. mergekit keeps exactly k,
    an arbitrary choice among elements of one size, of which bfloat16 updates are full.
    When: several updates are added and disturb one another, or you want to know how few elements hold a skill.
    Not when: you have not measured the whole update yet. Updates of RL are sparse already, so sweep the density.
    Example: target + lam * trim(rl - sft, density=0.3)
    """
    (least,) = yield Ranks(size, (unit.count(density),))
    factor = 1.0
    if rescale != "none":
        factor = ratio((yield norms(lambda v: largest(v, least), rescale)), rescale)
    found = {"threshold": least.size, "kept": least.count / unit.elements, "factor": factor}
    return Ready(lambda v: scaled(largest(v, least), factor), found)


def _chances(*, density: float, spread: float | None, **_: Any) -> tuple[str, str] | None:
    if spread is None or density in (0, 1) or (density - spread > 0 and density + spread < 1):
        return None
    return f"with density {density:g} and spread {spread:g} `drop` keeps by chances outside 0 to 1", "lower `spread`"


@method(
    differences(1), alone=_share, indexed=True, rows=lambda spread, **_: spread is not None, check=_chances,
    readings=lambda rescale, **_: int(rescale in ("l1", "l2")),
    density=SHARE, rescale=words("probability", "none", "l1", "l2"), spread=Number(0, 1, below=True),
    seed=Number(0, 2**53, whole=True),
)  # fmt: skip
def drop(
    unit: Unit,
    *,
    density: float,
    rescale: str = "probability",
    spread: float | None = None,
    seed: int | None = None,
) -> Steps:
    """Keep elements of a difference by lot.

    Each element is kept with probability `density`, and divided by it. The lot of an element depends on four things
    alone: the seed (`output.seed` if `seed` is not given), the tensor's name, the element's index, and which `drop` of
    the expression it is. `rescale` none, l1 or l2 is that of `trim`, in place of the division.

    With `spread` the probability rises with the size of the element in its row. It is `density - spread` for the
    smallest and `density + spread` for the largest, linear in the rank between them. Elements of one size share the
    mean of their ranks. Both ends must be between 0 and 1.

    Paper: DARE, arXiv 2311.03099. With `spread` DELLA, arXiv 2406.11617.
    Differs: mergekit multiplies by the ratio of 1-norms (`rescale=l1` here), takes other lots, and ranks elements of
    one size arbitrarily.
    When: many updates of fine-tuning are added, whose elements are small and redundant.
    Not when: the updates are large, as after further pretraining: the authors report that it fails there. With a
    density below 0.1, what is kept grows more than tenfold.
    Example: base + drop(a - base, density=0.5) + drop(b - base, density=0.5)
    """
    lots = unit.lots(seed)

    def kept(v: Tensor, first: int) -> Tensor:
        return keep(v, lots(first, v).lt_(density if spread is None else chances(v)).to(v.dtype))

    def chances(v: Tensor) -> Tensor:
        if unit.columns == 1 or spread is None:
            return v.double().clone().fill_(density)
        ranks = ranks_by_row(v.view(-1, unit.columns)).flatten()
        return ranks.mul_(2 * spread / (unit.columns - 1)).add_(density - spread)

    if rescale == "probability":
        if spread is None:
            return Ready(lambda v, first: divided(kept(v, first), density))
        return Ready(lambda v, first: kept(v, first) / chances(v).to(v.dtype))
    if rescale == "none":
        return Ready(kept)
    factor = ratio((yield norms(kept, rescale)), rescale)
    return Ready(lambda v, first: scaled(kept(v, first), factor), {"factor": factor})


def ranks_by_row(v: Tensor) -> Tensor:
    """The rank of each size in its row, 0 the smallest, as float64; sizes that tie share the mean of their ranks."""
    sizes, places = v.abs().sort(dim=1, stable=True)
    last = sizes.shape[1] - 1
    counted = sizes.new_ones(sizes.shape).double().cumsum(1).sub_(1)
    # The first and the last place of each run of equal sizes.
    begins = sizes.ne(sizes.roll(1, 1))
    begins[:, 0] = True
    ends = begins.roll(-1, 1)
    lows = counted.mul(begins).cummax(1).values
    highs = counted.sub(last).mul(ends).flip(1).cummin(1).values.flip(1).add_(last)
    shared = lows.add_(highs).div_(2)
    return shared.new_empty(shared.shape).scatter_(1, places, shared)


def divided(v: Tensor, by: float) -> Tensor:
    """v / by. A tensor, not a number: CUDA would multiply by the reciprocal of a number."""
    return v / v.new_full((1,), by)


@method(differences(1), alone=_share, readings=_ranked, density=SHARE, gamma=SHARE, rescale=RESCALE)
def band(unit: Unit, *, density: float, gamma: float = 0.01, rescale: str = "none") -> Steps:
    """Keep the elements of middle size of a difference.

    Of the n elements of a matrix, `stay = max(1, floor(density * n))` are kept. Above them, `floor(gamma * n)` are
    dropped, and below them the rest, `below = max(0, n - stay - floor(gamma * n))`. So sizes stay from the
    (below + 1)-th smallest to the (below + stay)-th, and every element of one of these two sizes. `rescale` is that of
    `trim`.

    Paper: Model Breadcrumbs, arXiv 2312.06795.
    Differs: elements of one size stay together.
    When: a few outliers of an update do damage.
    Not when: you have not compared it with `trim`, which keeps the outliers.
    Example: target + lam * band(rl - sft, density=0.9, gamma=0.01)
    """
    n, stay = unit.elements, unit.count(density)
    below = max(0, n - stay - math.floor(gamma * n))
    least, most = yield Ranks(size, (n - below, n - below - stay + 1))

    def kept(v: Tensor) -> Tensor:
        sizes = size(v)
        return keep(v, sizes.le(most.size).to(sizes.dtype).mul_(sizes.ge_(least.size)))

    factor = ratio((yield norms(kept, rescale)), rescale) if rescale != "none" else 1.0
    found = {"smallest": least.size, "largest": most.size, "factor": factor}
    return Ready(lambda v: scaled(kept(v), factor), found)


@method(differences(1), at=Number(0))
def clip(unit: Unit, *, at: float) -> Ready:
    """Limit the size of every element of a difference.

    `sign(v) * min(|v|, at)`, with `at` in units of weights.

    When: a few outliers of an update do damage, or one model shall move towards another by a small step at most. The
    example is mergekit's nearswap.
    Not when: the size of weights varies much between layers, unless `at` has a schedule.
    Example: a + clip(b - a, at=0.001)
    """

    def function(v: Tensor) -> Tensor:
        from torch import finfo

        limit = min(at, finfo(v.dtype).max)  # torch refuses a limit that the dtype cannot hold
        return v.clamp(-limit, limit)

    return Ready(function)


@method(differences(1), readings=lambda **_: 1, to=Operand(), scope=OF_MODEL)
def match(unit: Unit, *, scope: str = "matrix") -> Steps:
    """Give a difference the norm of another one.

    `v * ||u||/||v||`, in the 2-norm of each matrix, or with `scope=model` in that of all tensors together. What is 0
    stays 0.

    When: two updates have good directions and unequal sizes.
    Not when: an update of RL would be matched to one of SFT, unless its factor is below 1. RL updates are much shorter,
    so that it grows many times over.
    Example: target + lam * match(rl - sft, to=target - base)
    """
    own, other = yield Sums(lambda v, u: [_power(v), _power(u)])
    factor = math.sqrt(other / own) if own else 1.0
    return Ready(lambda v, u: v * factor, {"factor": factor})


@method(differences(1), readings=lambda: 1, off=Operand())
def project(unit: Unit) -> Steps:
    """Remove from a difference what it shares with another one.

    `v - (<v, u>/<u, u>) * u`, matrix by matrix. Where u is 0 it is v.

    When: you want a skill without the part along another update.
    Not when: the updates are nearly orthogonal, as those of RL and SFT often are: next to nothing changes.
    `skillmerge inspect` shows their cosine.
    Example: target + lam * project(rl - sft, off=target - base)
    """
    along, other = yield Sums(lambda v, u: [v.double() * u.double(), _power(u)])
    part = along / other if other else 0.0
    return Ready(lambda v, u: v - u * part, {"part": part})
