"""What a method asks to know of a whole unit, gathered run by run: exact sums, and exact sizes by rank.

Nothing depends on how a unit is cut into runs, as long as they begin at its blocks: sums are of blocks, folded in a
fixed order and added exactly, and ranks are counted.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from skillmerge.bits import fold_rows
from skillmerge.methods.method import Rank, Ranks, Sums
from skillmerge.tensors import BLOCK

_LOW = 15
"""The lower bits of a size, which are counted in a second reading."""
_HIGH_BINS, _LOW_BINS = 1 << 16, 1 << _LOW


class Fold(Protocol):
    """An answer in the making. `partial` may run in several threads at once, everything else in one."""

    def partial(self, operands: Sequence[Tensor], where: dict[str, int], run: slice) -> Any:
        """Return what a run of the unit adds, that part of the operands, which may have more for whole rows."""

    def add(self, partial: Any) -> None: ...

    def next_reading(self) -> bool:
        """Return whether all runs have to be read once more."""

    @property
    def answer(self) -> Any:
        """What is sent back to the method."""


def fold_of(wish: Sums | Ranks) -> Fold:
    return SumFold(wish) if isinstance(wish, Sums) else RankFold(wish)


class SumFold:
    def __init__(self, wish: Sums) -> None:
        self._terms = wish.terms
        self._blocks: list[list[float]] = []

    def partial(self, operands: Sequence[Tensor], where: dict[str, int], run: slice) -> list[list[float]]:
        return [_sums_of_blocks(term[run]) for term in self._terms(*operands, **where)]

    def add(self, partial: list[list[float]]) -> None:
        self._blocks = self._blocks or [[] for _ in partial]
        for known, new in zip(self._blocks, partial, strict=True):
            known += new

    def next_reading(self) -> bool:
        return False

    @property
    def answer(self) -> list[float]:
        return [_exact_sum(blocks) for blocks in self._blocks]


def _exact_sum(values: list[float]) -> float:
    try:
        return math.fsum(values)
    except (ValueError, OverflowError):  # infinities of two signs
        return math.nan


def _sums_of_blocks(term: Tensor) -> list[float]:
    """Return the sum of each block, of which only the last may be short. Overwrites the term."""
    whole = term.numel() // BLOCK * BLOCK
    sums = fold_rows(term[:whole].view(-1, BLOCK)).tolist() if whole else []
    return sums + (fold_rows(term[whole:].view(1, -1)).tolist() if whole < term.numel() else [])


class RankFold:
    """Sizes by their bits, which order float32 numbers of at least 0: first the upper ones, then the lower ones of
    those that share the upper ones with a size of a wanted rank."""

    def __init__(self, wish: Ranks) -> None:
        self._size, self._ranks = wish.size, wish.ranks
        self._counts = torch.zeros(_HIGH_BINS, dtype=torch.int64)
        self._bins: dict[int, Tensor] = {}
        """Of the second reading: upper bits -> counts by lower bits."""
        self._found: list[tuple[int, int, int]] = []
        """Of each rank: its upper bits, how many sizes have larger ones, and its rank among those that share them."""

    def partial(self, operands: Sequence[Tensor], where: dict[str, int], run: slice) -> Tensor | dict[int, Tensor]:
        bits = self._size(*operands, **where)[run].float().view(torch.int32) & 0x7FFFFFFF  # a NaN may have a sign
        high = bits >> _LOW
        if not self._found:
            return torch.bincount(high, minlength=_HIGH_BINS).cpu()
        low = bits & (_LOW_BINS - 1)
        return {bin: torch.bincount(low[high == bin], minlength=_LOW_BINS).cpu() for bin in self._bins}

    def add(self, partial: Tensor | dict[int, Tensor]) -> None:
        if isinstance(partial, Tensor):
            self._counts += partial
        else:
            for bin, counts in partial.items():
                self._bins[bin] += counts

    def next_reading(self) -> bool:
        if self._found or not any(self._ranks):
            return False
        for rank in self._ranks:
            bin, above = _bin_of(self._counts, rank) if rank else (_HIGH_BINS, 0)
            self._found.append((bin, above, rank - above))
            if rank:
                self._bins[bin] = torch.zeros(_LOW_BINS, dtype=torch.int64)
        return True

    @property
    def answer(self) -> list[Rank]:
        return [self._rank(*found) for found in self._found] or [Rank(math.inf, 0) for _ in self._ranks]

    def _rank(self, bin: int, above: int, rank: int) -> Rank:
        if not rank:
            return Rank(math.inf, 0)
        low, larger = _bin_of(self._bins[bin], rank)
        (size,) = struct.unpack("<f", struct.pack("<I", (bin << _LOW) | low))
        return Rank(size, above + larger + int(self._bins[bin][low]))


def _bin_of(counts: Tensor, rank: int) -> tuple[int, int]:
    """Return the bin of the size of that rank, 1 the largest, and how many sizes are in the bins above it."""
    from_top = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, rank))
    above = int(from_top[place - 1]) if place else 0
    return len(counts) - 1 - place, above
