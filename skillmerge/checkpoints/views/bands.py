"""Parts that are rows in one layout and columns in another: rectangles of them, and bands of stored matrices.

A whole matrix is read, or a band of its columns, and kept while threads read from it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from skillmerge.checkpoints.checkpoint import Checkpoint, Piece
from skillmerge.checkpoints.store import Wait
from skillmerge.checkpoints.views.relations import Window
from skillmerge.tensors import DTYPES

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BAND = 32 << 20
"""Bytes of a matrix that are kept to be transposed. A thread keeps those that its latest read needed, which are one or
two."""

_STRETCH = 8 << 20
"""Bytes that are read together to pick columns of a matrix that is larger than a band."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A part in this checkpoint, and where it is in the layout that is asked for."""

    stored: Window
    wanted: Window

    @property
    def is_run(self) -> bool:
        return self.stored.is_run and self.wanted.is_run


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Elements of a part, counted along the axis with the larger steps in the wanted tensor, and along the other."""

    outer: int
    inner: int
    shape: tuple[int, int]


def rectangles(wanted: Window, first: int, last: int) -> Iterator[Rectangle]:
    """Yield what elements first..last of a tensor hold of a part, as up to three rectangles."""
    (outer, inner), (large, small) = wanted.shape, (wanted.row, wanted.column)
    if large < small:
        (outer, inner), (large, small) = (inner, outer), (small, large)
    first, last = first - wanted.first, last - wanted.first
    top, bottom = min(first // large, outer - 1), min((last - 1) // large, outer - 1)
    start = min(inner, -(-(first - top * large) // small))
    stop = min(inner, -(-(last - bottom * large) // small))
    if top == bottom:
        found = [(top, top + 1, start, stop)]
    else:
        found = [(top, top + 1, start, inner), (top + 1, bottom, 0, inner), (bottom, bottom + 1, 0, stop)]
    for low, high, begin, end in found:
        if low < high and begin < end:
            yield Rectangle(low, begin, (high - low, end - begin))


@dataclass(frozen=True, slots=True)
class Band:
    """Columns `column`..`column + width` of a matrix inside a stored tensor, which begins at element `first` and has
    `rows` rows of `length`."""

    tensor: str
    first: int
    rows: int
    length: int
    column: int
    width: int


def by_band(pair: Pair, rectangle: Rectangle, itemsize: int) -> Iterator[tuple[Rectangle, Band]]:
    """Yield a rectangle, cut so that each piece of it is in one band of the stored matrix."""
    stored = pair.stored
    length, step = max(stored.row, stored.column), min(stored.row, stored.column)
    top, offset = divmod(stored.first, length)
    rows = -(-stored.last // length) - top
    width = min(length, max(1, BAND // (rows * itemsize)))
    # The rectangle's axis that runs along a row of the stored matrix: the columns of the part if it is stored straight.
    along_columns = stored.column <= stored.row
    is_outer = along_columns == (pair.wanted.row < pair.wanted.column)
    low = rectangle.outer if is_outer else rectangle.inner
    high = low + rectangle.shape[0 if is_outer else 1]
    while low < high:
        column = (offset + low * step) // width * width
        end = min(high, -(-(column + width - offset) // step))
        cut = (
            replace(rectangle, outer=low, shape=(end - low, rectangle.shape[1]))
            if is_outer
            else replace(rectangle, inner=low, shape=(rectangle.shape[0], end - low))
        )
        yield cut, Band(stored.tensor, top * length, rows, length, column, min(width, length - column))
        low = end


class _Held:
    """A band in memory, read by the first thread that needs it."""

    def __init__(self, checkpoint: Checkpoint, band: Band) -> None:
        self._checkpoint, self._band = checkpoint, band
        self._lock = threading.Lock()
        self._values: Tensor | None = None
        self._content = bytearray(0)
        self._wait: Wait | None = None

    def begin(self) -> None:
        """Begin to read it, if that is one read."""
        band = self._band
        with self._lock:
            if self._wait is None and self._values is None and band.width == band.length:
                self._content = bytearray(band.rows * band.length * self._itemsize)
                piece = Piece(band.tensor, band.first, band.rows * band.length, memoryview(self._content))
                self._wait = self._checkpoint.read([piece])

    def values(self) -> Tensor:
        """Return its elements, row by row, as integers of their size."""
        import torch

        with self._lock:
            if self._values is None:
                dtype = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[self._itemsize]
                if self._wait is not None:
                    self._wait()
                    self._values = torch.frombuffer(self._content, dtype=dtype)
                else:
                    self._values = self._picked(dtype)
            return self._values

    @property
    def _itemsize(self) -> int:
        return DTYPES[self._checkpoint.tensors[self._band.tensor].dtype].itemsize

    def _picked(self, dtype: torch.dtype) -> Tensor:
        """Read all rows, a few at a time, and keep the band's columns."""
        import torch

        band = self._band
        values = torch.empty((band.rows, band.width), dtype=dtype)
        count = max(1, _STRETCH // (band.length * self._itemsize))
        content = bytearray(min(count, band.rows) * band.length * self._itemsize)
        rows = torch.frombuffer(content, dtype=dtype).view(-1, band.length)
        for top in range(0, band.rows, count):
            some = min(count, band.rows - top)
            first = band.first + top * band.length
            self._checkpoint.read([Piece(band.tensor, first, some * band.length, memoryview(content))])()
            values[top : top + some] = rows[:some, band.column : band.column + band.width]
        return values.view(-1)


class Bands:
    """The bands that threads read from: each thread's are those of its latest read, as long as it lives."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._known: WeakValueDictionary[Band, _Held] = WeakValueDictionary()
        self._of_thread = threading.local()
        self._lock = threading.Lock()

    def hold(self, bands: Iterable[Band]) -> Mapping[Band, _Held]:
        """Return these bands, which are being read, and let go of what this thread had before."""
        with self._lock:
            mine = {band: self._known.get(band) or _Held(self._checkpoint, band) for band in bands}
            self._known.update(mine)
            self._of_thread.bands = mine
        for held in mine.values():
            held.begin()
        return mine

    def close(self) -> None:
        self._of_thread = threading.local()
