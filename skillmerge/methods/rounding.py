"""Float64 or float32 values -> the output dtype, rounded once: to nearest even, or stochastically."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from skillmerge.bits import bit_view
from skillmerge.methods.evaluate import Scratch, accumulation_dtype
from skillmerge.methods.linear import Program

_GAMMA = 0x9E3779B97F4A7C15
_PIECE = 1 << 15
"""Elements that get their random numbers together: what a core's cache holds. Four times as fast as a whole chunk."""


def keep_same_bits(
    program: Program,
    inputs: Mapping[str, Tensor],
    out: Tensor,
    scratch: Scratch,
    rounding: str = "nearest",
    key: int = 0,
    first: int = 0,
) -> None:
    """Where two models that cancel hold the same bits, put the remaining model's element into `out`.

    rounding, key, first: as for `round_value`, where that element is wider than `out`.
    """
    bits = bit_view(out)
    for a, b, keep in program.same_bits:
        differ = scratch.get("mask", 0, bits.dtype, out.numel())
        if inputs[a].dtype == inputs[b].dtype and inputs[a].element_size() == out.element_size():
            torch.ne(bit_view(inputs[a]), bit_view(inputs[b]), out=differ)
        else:
            wide = accumulation_dtype([inputs[a].dtype, inputs[b].dtype])
            differ.copy_(torch.ne(bit_view(inputs[a].to(wide)), bit_view(inputs[b].to(wide))))
        kept = inputs[keep]
        if kept.dtype != out.dtype:
            kept = round_value(kept, torch.empty_like(out), rounding, key, first)
        # y = k ^ ((y ^ k) * differ): several times faster than a select on the CPU.
        mixed = scratch.get("mask", 1, bits.dtype, out.numel())
        torch.bitwise_xor(bits, bit_view(kept), out=mixed)
        mixed.mul_(differ)
        torch.bitwise_xor(mixed, bit_view(kept), out=bits)


def round_nearest(value: Tensor, out: Tensor) -> Tensor:
    """Round to nearest, ties to even, once. Returns `out`."""
    if value.dtype == torch.float64 and out.element_size() < 4:
        value = _narrowed(value, out.dtype)
    return out.copy_(value)


def _narrowed(value: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 -> float32 such that a second rounding, to 16 bits, gives what one rounding would have given."""
    if dtype != torch.bfloat16:
        return _round_to_odd(value)
    nearest = value.to(torch.float32)
    # Two roundings differ from one only where the first ends halfway between two bfloat16. That is rare, unless the
    # update is half a unit everywhere.
    halfway = ((nearest.view(torch.int32) & 0xFFFF) == 0x8000).nonzero(as_tuple=True)
    if halfway[0].numel() > value.numel() >> 3:
        return _round_to_odd(value)
    nearest[halfway] = _round_to_odd(value[halfway])
    return nearest


def _round_to_odd(value: Tensor) -> Tensor:
    """float64 -> float32 that a second rounding, to 16 bits, rounds right (Boldo and Melquiond, "Emulation of FMA and
    correctly rounded sums", 2008)."""
    nearest = value.to(torch.float32)
    back = nearest.to(torch.float64)
    bits = nearest.view(torch.int32)
    bits = bits - (back.abs() > value.abs()).to(torch.int32)
    inexact = ((back != value) & ~value.isnan()).to(torch.int32)
    return (bits | inexact).view(torch.float32)


def round_stochastic(value: Tensor, out: Tensor, key: int, first: int) -> Tensor:
    """Round up or down with the probability that makes the mean right. Returns `out`.

    The choice is a pure function of `key` (see `rounding_key`) and of the element's index, which starts at
    `first`. A value that `out` can hold is kept as it is.
    """
    nearest = round_nearest(value, torch.empty_like(out))
    exact = value.to(torch.float64).abs()
    bits = bit_view(nearest)
    low_bits = bits - (nearest.to(torch.float64).abs() > exact).to(bits.dtype)
    low = low_bits.view(out.dtype).to(torch.float64).abs()
    high = (low_bits + 1).view(out.dtype).to(torch.float64).abs()
    up = uniform(key, first, value.numel(), value.device) < (exact - low) / (high - low)
    chosen = (low_bits + up.to(bits.dtype)).view(out.dtype)
    # What overflows to nearest is left to be noticed, and a NaN stays what it is.
    return out.copy_(torch.where(nearest.isfinite(), chosen, nearest))


def round_value(value: Tensor, out: Tensor, rounding: str, key: int, first: int) -> Tensor:
    """Round as a recipe's `output.rounding` says. key, first: as for `round_stochastic`. Returns `out`."""
    if rounding == "stochastic" and value.dtype != out.dtype:
        return round_stochastic(value, out, key, first)
    return round_nearest(value, out)


def rounding_key(seed: int, name: str) -> int:
    """64 bits for one tensor: the head of sha256("skillmerge rounding", seed, name)."""
    return _key("rounding", seed, name)


def lots_key(seed: int, name: str, ordinal: int) -> int:
    """64 bits for one random call and one tensor: the head of sha256("skillmerge drop", seed, name, ordinal)."""
    return _key("drop", seed, name, ordinal)


def _key(*parts: str | int) -> int:
    digest = hashlib.sha256(("skillmerge " + "\0".join(map(str, parts))).encode()).digest()
    return int.from_bytes(digest[:8], "little")


def uniform(key: int, first: int, count: int, device: torch.device) -> Tensor:
    """SplitMix64 (Steele, Lea and Flood 2014) as a counter-based generator: float64 in [0, 1)."""
    piece = max(1, count if device.type == "cuda" else min(count, _PIECE))
    steps = torch.arange(piece, dtype=torch.int64, device=device).mul_(_signed(_GAMMA))
    found = torch.empty(count, dtype=torch.float64, device=device)
    for start in range(0, count, piece):
        here = found[start : start + piece]
        z = steps[: here.numel()].add(_signed(key + _GAMMA * (first + 1 + start)))
        z.bitwise_xor_(_shift(z, 30)).mul_(_signed(0xBF58476D1CE4E5B9))
        z.bitwise_xor_(_shift(z, 27)).mul_(_signed(0x94D049BB133111EB))
        z.bitwise_xor_(_shift(z, 31))
        here.copy_(_shift(z, 11)).mul_(2.0**-53)
    return found


def _signed(value: int) -> int:
    """Return the int64 with the lower 64 bits of a number."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift(z: Tensor, by: int) -> Tensor:
    """Logical shift right of int64."""
    return (z >> by).bitwise_and_((1 << (64 - by)) - 1)
