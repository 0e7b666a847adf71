"""How much of an update may be rounding of its inputs, estimated from the numbers themselves.

A number that was rounded to nearest is off by up to half a unit in the last place (ulp), evenly spread: in the mean of
squares by ulp^2 / 12. Of an update v = r - s whose two models were both rounded, the error therefore has the norm

    floor = sqrt(sum (ulp(r)^2 + ulp(s)^2) / 12) / |v|        as a share of the update's norm

summed over the elements of all tensors that have an update. With r alone it is the floor of a rounded r and an exact
s, as where RL began from the rounded s itself. Above 1 the two errors are no longer independent, as most
elements of r and s are rounded to the same number: then what is left of v says where steps were rounded up.

The precision is that of the numbers, not of the file: float32 whose lower 16 bits are all 0 were bfloat16 before. It is
read tensor by tensor from the mantissa bits that are in use; a tensor that uses fewer than bfloat16 has (all ones, say)
shows nothing of what it was, and counts in the precision in which it is stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from skillmerge.remarks import Remark, warning

if TYPE_CHECKING:
    from torch import Tensor

LARGE = math.sqrt(0.5)
"""A floor from which on rounding is as large as what is left of the update: |v|^2 holds the squares of both."""

_MANTISSAS = {"bfloat16": 7, "float16": 10, "float32": 23, "float64": 52}


@dataclass(frozen=True, slots=True)
class Grain:
    """The precision that a run of one model's elements shows. dtype: as stored; used: mantissa bits that
    any element has; powers: the sum of 4^exponent. Runs of a tensor add up."""

    dtype: str
    used: int = 0
    powers: tuple[float, ...] = ()


def grain_of(values: Tensor) -> Grain | None:
    """Look at elements as they are stored; None if they are no plain floating-point numbers."""
    import torch

    from skillmerge.bits import bit_view, fold_sum
    from skillmerge.checkpoints.kinds.sparse import bits_in_use

    name = str(values.dtype).removeprefix("torch.")
    if name not in _MANTISSAS:
        return None
    mantissa = (1 << _MANTISSAS[name]) - 1
    bits = bit_view(values)
    exponents = bits & (torch.iinfo(bits.dtype).max & ~mantissa)
    if values.dtype == torch.float16:  # many are subnormal, whose bits are one place or more off
        bits = bits.where(exponents != 0, 0)
    used = bits_in_use(bits) & mantissa
    # The exponent's bits alone are a power of two; 0 and subnormal numbers have the ulp of the least normal one.
    power = exponents.view(values.dtype).to(torch.promote_types(values.dtype, torch.float32))
    power.clamp_(min=torch.finfo(values.dtype).tiny)
    return Grain(name, used, (fold_sum(power.mul_(power)),) if bits.numel() else ())


def joined(grains: Iterable[Grain]) -> Grain:
    """Return the runs of one tensor together."""
    grains, used = list(grains), 0
    for grain in grains:
        used |= grain.used
    return Grain(grains[0].dtype, used, tuple(power for grain in grains for power in grain.powers))


def precision_of(grain: Grain) -> str:
    """Return the narrowest dtype that a tensor's numbers have come through, as its mantissa bits show."""
    stored = _MANTISSAS[grain.dtype]
    bits = stored - (grain.used & -grain.used).bit_length() + 1 if grain.used else 0
    if bits < _MANTISSAS["bfloat16"]:
        return grain.dtype
    return next(name for name, width in _MANTISSAS.items() if bits <= width)


def told_precision(grain: Grain) -> str:
    """Describe a precision for people: `bfloat16`, or `bfloat16 in float32`."""
    precision = precision_of(grain)
    return precision if precision == grain.dtype else f"{precision} in {grain.dtype}"


def squared_error(grain: Grain) -> float:
    """Return the expected sum of squares of what rounding to a tensor's precision took from its elements."""
    return math.fsum(grain.powers) * 4.0 ** -_MANTISSAS[precision_of(grain)] / 12


@dataclass(frozen=True, slots=True)
class InputRounding:
    """Expected sums of squares of what rounding took from one tensor of an update: of all models, and of those alone
    that are added. precisions: of its models, for people."""

    of_all: float
    of_added: float
    precisions: tuple[str, ...]


def input_rounding(grains: Mapping[str, Grain], factors: Mapping[str, float]) -> InputRounding:
    """Compute the rounding of one tensor's update, the sum of each model's elements times its factor."""
    errors = {model: factors[model] ** 2 * squared_error(grain) for model, grain in grains.items()}
    return InputRounding(
        math.fsum(errors.values()),
        math.fsum(error for model, error in errors.items() if factors[model] > 0),
        tuple(sorted({told_precision(grain) for grain in grains.values()})),
    )


def floor(squares: Iterable[float], norm: float) -> float | None:
    """Rounding's share of an update of this norm; None of one that is 0 or has no finite norm."""
    whole = math.fsum(squares)
    return math.sqrt(whole) / norm if norm and math.isfinite(whole) and math.isfinite(norm) else None


def input_warning(
    share: float | None,
    added: float | None,
    precisions: Sequence[str],
    kinds: Mapping[str, tuple[float, float | None]],
) -> Iterator[Remark]:
    """Yield the warning that a floor calls for from LARGE on.

    added: the floor of the added models alone. kinds: norm and floor of the update in each kind of module. The kind
    with most of the update, norms apart, has to have such a floor too: norms are few, coarse numbers near 1.
    """
    matrices = [row for kind, row in kinds.items() if kind != "norm"] or list(kinds.values())
    _, most = max(matrices, key=lambda row: row[0], default=(0.0, None))
    if share is None or added is None or most is None or min(share, most) < LARGE:
        return
    yield warning(
        f"most of this update may be rounding of its models: {share:.2f} of its norm is expected from "
        f"{' and '.join(precisions)} ({added:.2f} of the added model alone)",
        "if the models were cast, use their float32 originals; models that were trained in this precision are exact",
    )
