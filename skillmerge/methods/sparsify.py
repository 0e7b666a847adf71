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
    """Keep the largest elements, by size.

    k = max(1, floor(density * n)) of a matrix's n elements are kept, and whatever ties with the k-th. `rescale`
    multiplies them by ||v||/||kept|| (l1 or l2). With scope=model the elements of all tensors are ranked together.

    Paper: TIES, arXiv 2306.01708, step 1; DoTS, arXiv 2605.00610, with rescale=l2.
    Differs: the authors rank over the whole model (scope=model) and keep one element more. mergekit keeps exactly k, an
    arbitrary choice among ties, of which bf16 updates are full.
    Use: against interference when several updates are added. Updates of RL are sparse already: sweep the density.
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
    """Keep each element with probability `density`, by lot, and divide it by that.

    The lot of an element depends on the seed (`output.seed` if none is given), on the tensor's name, on which `drop` of
    the expression it is and on the element's index, and on nothing else. `rescale` none, l1 or l2 as for `trim`.

    With `spread` e the probability rises with the size in the row: density - e for the smallest of a row to density + e
    for the largest, linearly by rank; sizes that tie share the mean of their ranks. density - e has to be above 0 and
    density + e below 1.

    Paper: DARE, arXiv 2311.03099; with spread, DELLA, arXiv 2406.11617.
    Differs: mergekit multiplies by the ratio of 1-norms (rescale=l1 here), draws lots of torch, and ranks ties at will.
    Use: for many small fine-tuning updates; what survives is larger by 1/density, so keep density above 0.1.
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
    """Keep elements of middle size: without the largest, and without the smallest.

    Of a matrix's n elements, stay = max(1, floor(density * n)) are kept, below = max(0, n - stay - floor(gamma * n))
    are smaller: sizes from the (below + 1)-th smallest to the (below + stay)-th, and whatever ties with these.
    `rescale` as for `trim`.

    Paper: Model Breadcrumbs, arXiv 2312.06795.
    Differs: ties stay.
    Use: when a few outliers of an update do damage.
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
    """Limit every element to the size `at`: sign(v) * min(|v|, at).

    Use: `a + clip(b - a, at=t)` is mergekit's nearswap, which moves only what is near; also against outliers.
    """
    return Ready(lambda v: v.clamp(-at, at))


@method(differences(1), readings=lambda **_: 1, to=Operand(), scope=OF_MODEL)
def match(unit: Unit, *, scope: str = "matrix") -> Steps:
    """Give a difference the 2-norm of another: v * ||u||/||v||, matrix by matrix or for the model; 0 stays 0.

    Use: `match(v, to=u)` when two updates have the right directions and unequal sizes.
    """
    own, other = yield Sums(lambda v, u: [_power(v), _power(u)])
    factor = math.sqrt(other / own) if own else 1.0
    return Ready(lambda v, u: v * factor, {"factor": factor})


@method(differences(1), readings=lambda: 1, off=Operand())
def project(unit: Unit) -> Steps:
    """Take the part along another difference away: v - (<v, u>/<u, u>) u, matrix by matrix; v where u is 0.

    Use: `project(v, off=u)` for a skill without what it shares with another update.
    """
    along, other = yield Sums(lambda v, u: [v.double() * u.double(), _power(u)])
    part = along / other if other else 0.0
    return Ready(lambda v, u: v - u * part, {"part": part})
