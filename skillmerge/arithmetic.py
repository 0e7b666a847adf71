"""Programs run on tiles: widen, evaluate as written, round once. The only numerics in the house.

Every operation here is a separate elementwise kernel of IEEE 754 arithmetic (no fused multiply-add, no
reductions but to a yes or no, or in a fixed order), so that CPU and CUDA and any cutting into tiles give the
same bytes. Knows nothing about files, models or threads.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from skillmerge.program import Program
from skillmerge.tensors import DTYPES

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype that holds plain numbers."""
    dtype = getattr(torch, DTYPES[name].torch_name or "")
    assert isinstance(dtype, torch.dtype)
    return dtype


def accumulation_dtype(dtypes: list[torch.dtype]) -> torch.dtype:
    """float32 where every input has 16 bits or fewer, float64 otherwise."""
    return torch.float32 if all(dtype.itemsize <= 2 for dtype in dtypes) else torch.float64


class Scratch:
    """The registers and temporaries of one worker on one device, made once and used for every tile.

    Register i holds up to `elements` numbers in the accumulation dtype; temporaries are per item size.
    """

    def __init__(self, device: torch.device, elements: int) -> None:
        self.device, self.elements = device, elements
        self._made: dict[tuple[str, int, torch.dtype], Tensor] = {}

    def get(self, purpose: str, index: int, dtype: torch.dtype, count: int) -> Tensor:
        key = (purpose, index, dtype)
        if key not in self._made:
            self._made[key] = torch.empty(self.elements, dtype=dtype, device=self.device)
        return self._made[key][:count]

    def clear(self) -> None:
        self._made.clear()


def evaluate(program: Program, inputs: Mapping[str, Tensor], scratch: Scratch) -> tuple[Tensor, Tensor | None]:
    """Run the program's steps on tiles of equal length.

    Returns the unrounded value and, where the program has one, what was subtracted from its base; both live
    in `scratch` until the next call. A program that only loads gives the input itself.
    """
    if len(program.steps) == 1:
        return inputs[program.steps[0].model], None
    count = next(iter(inputs.values())).numel()
    dtype = accumulation_dtype([tensor.dtype for tensor in inputs.values()])
    registers = [scratch.get("register", index, dtype, count) for index in range(program.registers)]
    for step in program.steps:
        register = registers[step.register]
        if step.op == "load":
            register.copy_(inputs[step.model])
        elif step.op == "add":
            register.add_(registers[step.other])
        elif step.op == "subtract":
            register.sub_(registers[step.other])
        elif step.op == "multiply":
            register.mul_(step.factor)
        else:
            # A tensor, not a number: CUDA would multiply by the reciprocal of a number.
            register.div_(torch.full((1,), step.factor, dtype=dtype, device=register.device))
    return registers[program.result], registers[program.update] if program.update >= 0 else None


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
        value = _round_to_odd(value)
    return out.copy_(value)


def _round_to_odd(value: Tensor) -> Tensor:
    """float64 -> float32 such that a second rounding to 16 bits gives what one rounding would have given
    (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008)."""
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
    up = _uniform(key, first, value.numel(), value.device) < (exact - low) / (high - low)
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
    digest = hashlib.sha256(f"skillmerge rounding\0{seed}\0{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def _uniform(key: int, first: int, count: int, device: torch.device) -> Tensor:
    """SplitMix64 (Steele, Lea and Flood 2014) as a counter-based generator: float64 in [0, 1)."""
    z = torch.arange(first + 1, first + 1 + count, dtype=torch.int64, device=device)
    z = z * _signed(0x9E3779B97F4A7C15) + _signed(key)
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    z = z ^ _shift(z, 31)
    return _shift(z, 11).to(torch.float64) * 2.0**-53


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift(z: Tensor, by: int) -> Tensor:
    """Logical shift right of int64."""
    return (z >> by) & ((1 << (64 - by)) - 1)


def any_nonfinite(values: Tensor) -> bool:
    """Whether a float tile holds NaN or Inf. A sum shows it, many times faster than isfinite on the CPU; a sum
    that overflowed by itself is looked into."""
    return not math.isfinite(values.sum().item()) and not bool(values.isfinite().all())


def first_nonfinite(values: Tensor) -> int | None:
    """The index of the first NaN or Inf, or None."""
    found = (~values.isfinite()).nonzero()
    return int(found[0].item()) if found.numel() else None


def canonical_nan(values: Tensor) -> None:
    """Give every NaN the same bits: devices differ in the payloads that they produce."""
    values.masked_fill_(values.isnan(), float("nan"))


def fold_sum(values: Tensor) -> float:
    """Sum of float64 values, overwriting them: halves are added to halves, in the same order on every device."""
    length = values.numel()
    while length > 1:
        half = length // 2
        values[:half].add_(values[length - half : length])
        length -= half
    return float(values[0].item())


def memory_of(values: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, which must live as long (torch itself shows them to numpy only)."""
    return memoryview((ctypes.c_char * (values.numel() * values.element_size())).from_address(values.data_ptr()))


def bit_view(values: Tensor) -> Tensor:
    """The same memory as integers of the same size."""
    return values.view(_INTEGERS[values.element_size()])
