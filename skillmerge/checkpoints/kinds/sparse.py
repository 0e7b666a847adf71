"""Runs of numbers that are mostly zero, stored in the smallest of four encodings. Pure functions on bits.

A run (a part of one tensor) is kept as one of

    zero     nothing at all
    dense    every element
    bitmap   `mask`: one bit per element, least significant first; `values`: the elements whose bit is set
    gaps     `gaps`: a byte per step, 0 to 254 for so many zeros and then a value, 255 for 255 zeros and no
             value, restarting at every block of BLOCK elements; `values`

`starts` says for each block, and for the end, how many values come before it (with gaps, in a second row, how
many bytes of `gaps`), so that any block can be decoded by itself. Every part is padded with zeros to a multiple
of 8 bytes. Values are bits: nothing here does arithmetic on them. Knows nothing about files or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from skillmerge.bits import bit_view
from skillmerge.tensors import BLOCK, CHUNK, block_count

_SKIP = 255


@dataclass(frozen=True, slots=True)
class Encoded:
    """A run's parts by name: one-dimensional tensors, `starts` of int32 with one or two rows."""

    encoding: str
    parts: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in self.parts.values())


class Encoder:
    """Takes a run piece by piece, in order; `finish`, once, gives the smallest encoding of all of it."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._length = self._count = 0
        self._values: list[Tensor] = []
        self._masks: list[Tensor] = []
        self._codes: list[Tensor] | None = []
        self._ends: list[Tensor] = []
        self._bounds = [torch.zeros(1, dtype=torch.int64)]

    def add(self, mask: Tensor, places: Tensor, values: Tensor) -> None:
        """The next elements, as many as `mask` has: zero but for `values` where it is set, which is at the
        ascending `places` (int64, from 0).

        All pieces but the last have a multiple of BLOCK elements.
        """
        length, count = mask.numel(), values.numel()
        bounds = torch.searchsorted(places, torch.arange(BLOCK, block_count(length) * BLOCK + 1, BLOCK))
        self._masks.append(pack(mask))
        if count > length // 8:
            self._codes = None  # a byte for each value would be more than the mask
        if self._codes is not None:
            codes, ends = _gap_codes(places, bounds)
            self._ends.append(ends + sum(map(len, self._codes)))
            self._codes.append(codes)
        if count:
            self._values.append(values)
        self._bounds.append(bounds + self._count)
        self._length, self._count = self._length + length, self._count + count

    def finish(self) -> Encoded:
        """Return all that was added. The tensors are new ones."""
        if self._count == 0:
            return Encoded("zero", {})
        size = self._dtype.itemsize
        values, bounds = torch.cat(self._values), torch.cat(self._bounds).to(torch.int32)
        self._values.clear()
        mask = torch.cat(self._masks)
        candidates = {
            "dense": self._length * size,
            "bitmap": len(mask) + self._count * size + bounds.numel() * 4,
        }
        if self._codes is not None:
            coded = sum(map(len, self._codes))
            candidates["gaps"] = coded + self._count * size + bounds.numel() * 8
        chosen = min(candidates, key=lambda name: candidates[name])
        if chosen == "dense" and self._count == self._length:
            return Encoded("dense", {"values": _padded(values)})
        if chosen == "dense":
            dense = torch.zeros(self._length, dtype=self._dtype)
            bit_view(dense)[places_of(unpack(mask))] = bit_view(values)
            return Encoded("dense", {"values": _padded(dense)})
        if chosen == "bitmap":
            parts = {"values": _padded(values), "starts": _padded(bounds), "mask": _padded(mask)}
        else:
            assert self._codes is not None
            ends = torch.cat([torch.zeros(1, dtype=torch.int64), *self._ends]).to(torch.int32)
            starts = torch.stack([_padded(bounds), _padded(ends)])
            parts = {"values": _padded(values), "starts": starts, "gaps": _padded(torch.cat(self._codes))}
        return Encoded(chosen, parts)


def decode(encoding: str, parts: dict[str, Tensor], starts: Sequence[Tensor], first: int, out: Tensor) -> None:
    """Fill `out` with the elements from `first` (a block's first) on.

    parts: slices of the parts, `values` (with dense, exactly these elements) and `mask` or `gaps` for just these
    blocks. starts: the rows of `starts` for them, the end included. Raises ValueError, RuntimeError or IndexError
    where these do not belong together.
    """
    bits = bit_view(out)
    if encoding == "dense":
        bits.copy_(bit_view(parts["values"])[: out.numel()])
        return
    bits.zero_()
    if encoding == "zero":
        return
    values, bounds = bit_view(parts["values"]), starts[0] - starts[0][0]
    if encoding == "gaps":
        bits[_places(parts["gaps"], bounds, starts[1])] = values
        return
    for begin in range(0, out.numel(), CHUNK):
        end = min(begin + CHUNK, out.numel())
        places = places_of(unpack(parts["mask"][begin // 8 : -(-end // 8)])[: end - begin])
        low, high = int(bounds[begin // BLOCK]), int(bounds[block_count(end)])
        if len(places) != high - low:
            raise ValueError("the mask has not as many bits as there are values")
        bits[begin:end].scatter_(0, places, values[low:high])


# numpy does these several times faster than torch.


def differing(a: Tensor, b: Tensor) -> Tensor:
    """Return where two tensors of one dtype do not hold the same bits, as bool."""
    return torch.from_numpy(bit_view(a).numpy() != bit_view(b).numpy())


def within(a: Tensor, b: Tensor, units: int) -> Tensor:
    """Return where the bits of two tensors of one dtype, as integers, are at most so many apart, as bool."""
    apart = bit_view(a).numpy() - bit_view(b).numpy()  # wraps around, as does the sum
    return torch.from_numpy((apart + apart.dtype.type(units)).view(f"u{apart.itemsize}") <= 2 * units)


def bits_in_use(values: Tensor) -> int:
    """Return all bits that any of these integers has."""
    return int(np.bitwise_or.reduce(values.numpy())) if values.numel() else 0


def places_of(mask: Tensor) -> Tensor:
    """Return the indices (int64) at which a bool `mask` is set."""
    return torch.from_numpy(np.flatnonzero(mask.numpy()))


def pack(mask: Tensor) -> Tensor:
    """Return one bit (of uint8) per element of a bool `mask`, least significant first."""
    return torch.from_numpy(np.packbits(mask.numpy(), bitorder="little"))


def unpack(bits: Tensor) -> Tensor:
    """Return the bits as bool, eight for each byte."""
    return torch.from_numpy(np.unpackbits(bits.numpy(), bitorder="little")).view(torch.bool)


def _gap_codes(places: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bytes of `gaps` for a piece, and how many of them there are up to the end of each block."""
    if not len(places):
        return torch.empty(0, dtype=torch.uint8), torch.zeros_like(bounds)
    inside = places & (BLOCK - 1)
    before = torch.cat([inside.new_full((1,), -1), inside[:-1]])
    firsts = torch.cat([bounds.new_zeros(1), bounds[:-1]])
    before[firsts[firsts < bounds]] = -1
    gaps = inside - before - 1
    ends = torch.cumsum(gaps // _SKIP + 1, 0)
    codes = torch.full((int(ends[-1]),), _SKIP, dtype=torch.uint8)
    codes[ends - 1] = (gaps % _SKIP).to(torch.uint8)
    return codes, torch.cat([ends.new_zeros(1), ends])[bounds]


def _places(codes: Tensor, bounds: Tensor, starts: Tensor) -> Tensor:
    """Return where the values of these blocks go, counted from the first block's first element."""
    starts = (starts - starts[0]).to(torch.int64)
    codes = codes[: int(starts[-1])]
    skip = codes == _SKIP
    reached = torch.cumsum(codes.to(torch.int64) + (~skip).to(torch.int64), 0)
    before = torch.cat([reached.new_zeros(1), reached])[starts[:-1]]
    blocks = torch.arange(len(before)) * BLOCK - before
    counts = (bounds[1:] - bounds[:-1]).to(torch.int64)
    return reached[~skip] - 1 + torch.repeat_interleave(blocks, counts)


def _padded(values: Tensor) -> Tensor:
    """With zeros behind, to a multiple of 8 bytes."""
    left = -(values.numel() * values.element_size()) % 8 // values.element_size()
    return torch.cat([values, values.new_zeros(left)]) if left else values
