"""Torch tensors as bits and bytes: dtypes, views, finiteness, sums in a fixed order; and how our threads compute."""

from __future__ import annotations

import ctypes
import math
import threading

import torch
from torch import Tensor

from skillmerge.tensors import DTYPES

_SETTLING = threading.Lock()
_KEPT = 30 << 20
"""Bytes of a block whose release has glibc keep twice as much freed memory, instead of giving each temporary tensor
back to the kernel and asking for new pages. It saves a quarter of the time of merge methods. The most that it heeds is
32 MiB (mallopt(3), M_MMAP_THRESHOLD)."""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of a safetensors dtype that holds plain numbers."""
    dtype = getattr(torch, DTYPES[name].torch_name or "")
    assert isinstance(dtype, torch.dtype)
    return dtype


def any_nonfinite(values: Tensor) -> bool:
    """Return whether a float tile holds NaN or Inf. A sum shows it, many times faster than isfinite on the CPU; a sum
    that overflowed by itself is looked into."""
    return not math.isfinite(values.sum().item()) and not bool(values.isfinite().all())


def first_nonfinite(values: Tensor) -> int | None:
    """Return the index of the first NaN or Inf, or None."""
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


def fold_rows(values: Tensor) -> Tensor:
    """Sum of each row of float64 values, overwriting them: each in the order of `fold_sum`."""
    length = values.shape[1]
    while length > 1:
        half = length // 2
        values[:, :half].add_(values[:, length - half : length])
        length -= half
    return values[:, 0]


def memory_of(values: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on the CPU, which must live as long (torch itself shows them to numpy
    only)."""
    return memoryview((ctypes.c_char * (values.numel() * values.element_size())).from_address(values.data_ptr()))


def bit_view(values: Tensor) -> Tensor:
    """Return a view of the same memory as integers of the same size."""
    return values.view(_INTEGERS[values.element_size()])


def ordered_bits(values: Tensor) -> Tensor:
    """Integers in the order of float32 or float64 values, with -0 below +0: as floats, which of them is smaller depends
    on the instructions that compare them."""
    return _turned(bit_view(values))


def from_ordered_bits(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the values that `ordered_bits` gave these integers."""
    return _turned(bits).view(dtype)


def _turned(bits: Tensor) -> Tensor:
    """Turn the order of integers below 0 around."""
    last = torch.iinfo(bits.dtype).bits - 1
    return bits ^ ((bits >> last) & torch.iinfo(bits.dtype).max)


def settle_thread() -> None:
    """Let the calling thread, a new one of ours, compute as all of ours do, whatever its caller has set.

    Subnormal numbers are kept (a thread inherits the mode that flushes them), and torch takes one thread for it.
    """
    torch.set_flush_denormal(False)
    torch.empty(_KEPT, dtype=torch.uint8)  # and freed again
    with _SETTLING:
        # Torch keeps the number for each thread, and the last one that was set for all threads to come: another
        # thread, of no other use, gives those back what they had.
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        restoring = threading.Thread(target=torch.set_num_threads, args=(before,))
        restoring.start()
        restoring.join()
