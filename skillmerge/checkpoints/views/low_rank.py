"""The arithmetic of adapters: s B A element by element, in float64 and in a fixed order; norms of rows for DoRA.

    acc = 0; for k = 0 .. r-1: acc += B[:, k] * A[k]        the product and the sum rounded to float64, one by one
    s * acc                                                 in float64

The sum with a weight, W + s * acc, is computed in float64 too, and rounded once, to float32. An element depends on
nothing but its row of B and its column of A, so that its bytes are the same however a matrix is cut into pieces.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skillmerge.bits import fold_rows, torch_dtype
from skillmerge.checkpoints.checkpoint import read_bytes
from skillmerge.checkpoints.kinds.lora.adapter import Adapter
from skillmerge.checkpoints.kinds.lora.parts import Same
from skillmerge.checkpoints.views.fitting import Product
from skillmerge.errors import InputError
from skillmerge.naming import module_kind
from skillmerge.tensors import StoredTensor

AREA = 1 << 16
"""About as many elements are computed at once: they and the factors of their columns stay in the cache."""

LONG = AREA // 4
"""Elements of a row of which parts are computed. Shorter ones are computed as wholes, even where a part is asked for:
a step for each rank and part takes longer than a few more elements."""

_READ = 1 << 22
"""Elements that are read at once, where all of a tensor is looked at."""

KEPT_BYTES = 64 << 20
"""Of an adapter's matrices that are kept in memory; the last one is, whatever its size."""


@dataclass(frozen=True, slots=True)
class Area:
    """A rectangle of a stack of matrices, whole rows or a part of one, around consecutive elements that are asked for.

    first: the first of them in the tensor; start: the same, counted from the beginning of all that was asked for.
    inside: where they are in the rectangle, element by element.
    """

    expert: int
    rows: slice
    columns: slice
    first: int
    start: int
    inside: slice

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start

    @property
    def count(self) -> int:
        return int(self.inside.stop - self.inside.start)


def areas(first: int, count: int, rows: int, columns: int) -> Iterator[Area]:
    """Yield the rectangles around elements of a stack of matrices, in their order."""
    at, last = first, first + count
    while at < last:
        row, column = divmod(at, columns)
        expert, row = divmod(row, rows)
        if columns > LONG:
            width = min(columns - column, last - at, AREA)
            across, height, inside = slice(column, column + width), 1, slice(0, width)
        else:
            needed = -(-(column + last - at) // columns)
            across, height = slice(0, columns), min(needed, rows - row, AREA // columns + 2)
            inside = slice(column, min(height * columns, column + last - at))
        found = Area(expert, slice(row, row + height), across, at, at - first, inside)
        yield found
        at += found.count


class Matrices:
    """An adapter's matrices, read once and kept while they are in use; their products. For any number of threads."""

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter
        self._kept: OrderedDict[tuple[str, int], Tensor] = OrderedDict()
        self._bytes = 0
        """Of what is kept, which may be a hundred thousand small matrices: counting them each time would take hours."""
        self._norms: dict[str, Tensor] = {}
        self._confirmed: set[Same] = set()
        self._lock = threading.Lock()
        self._measuring = threading.Lock()

    def stored(self, spec: StoredTensor, first: int = 0, count: int | None = None) -> Tensor:
        """Return elements of a stored tensor, flat, in its own dtype."""
        return torch.frombuffer(read_bytes(self._adapter, spec.name, first, count), dtype=torch_dtype(spec.dtype))

    def confirm(self, same: Sequence[Same]) -> None:
        """Raise InputError unless tensors that have to be the same are; they are compared once."""
        for it in same:
            with self._measuring:
                if it not in self._confirmed and not self._is_same(it):
                    raise InputError(
                        f"{self._adapter.at.path(self._adapter.file)}: `{it.one.name}` and `{it.other.name}` are for "
                        "one tensor of the model, and they differ",
                        fix="name a model that stores embedding and head (`tie_word_embeddings: false`)"
                        if module_kind(it.one.name) != module_kind(it.other.name)
                        else "the adapter is damaged: save it again",
                    )
                self._confirmed.add(it)

    def _is_same(self, it: Same) -> bool:
        if it.one.dtype != it.other.dtype:
            return False
        if it.turned:
            return torch.equal(self._matrix(it.one).T, self._matrix(it.other))
        pieces = ((at, min(_READ, it.one.elements - at)) for at in range(0, it.one.elements, _READ))
        return all(torch.equal(self.stored(it.one, *run), self.stored(it.other, *run)) for run in pieces)

    def vector(self, spec: StoredTensor) -> Tensor:
        """Return a small tensor in float64."""
        return self._keep((spec.name, -1), lambda: self.stored(spec).to(torch.float64))

    def product(self, product: Product, area: Area) -> Tensor:
        """Return s B A in an area, as float64."""
        left = self._left(product, area)[:, :, None].unbind(1)
        right = self._right(product, area.expert)[:, area.columns].unbind(0)
        total = torch.zeros(area.shape, dtype=torch.float64)
        if "F64" in (product.pair.a.dtype, product.pair.b.dtype):
            for b, a in zip(left, right, strict=True):
                total.add_(b * a)
        else:
            for b, a in zip(left, right, strict=True):
                # Fused or not, it is the same: the product of two float32 is exact in float64.
                total.addcmul_(b, a)
        return total.mul_(product.scale)

    def norms(self, product: Product, name: str, read: Callable[[int, int], Tensor]) -> Tensor:
        """Return the norms of W + s B A over the inputs of each output, as float64: a pass over all of W, done once.

        name: the tensor. read: gives so many elements of W, from the first one on. Areas are cut in one way only, and
        added up in their order.
        """
        rows, columns = product.rows, product.columns
        step = columns * (1 if columns > LONG else AREA // columns + 2)
        step *= max(1, _READ // step)  # whole areas, in few large reads, which may go over a network
        with self._measuring:
            if name not in self._norms:
                squares = torch.zeros(columns if product.transposed else rows, dtype=torch.float64)
                for first in range(0, rows * columns, step):
                    own = read(first, min(step, rows * columns - first))
                    for area in areas(first, own.numel(), rows, columns):
                        values = own[area.start : area.start + area.count].to(torch.float64, copy=True).view(area.shape)
                        values.add_(self.product(product, area))
                        values.mul_(values)
                        if product.transposed:
                            squares[area.columns] += fold_rows(values.T.contiguous())
                        else:
                            squares[area.rows] += fold_rows(values)
                self._norms[name] = squares.sqrt_()
            return self._norms[name]

    def _left(self, product: Product, area: Area) -> Tensor:
        """Return the factors of an area's rows, [rows, r] in float64."""
        if product.transposed:
            a = self._matrix(product.pair.a)
            part = a.view(product.experts, product.rank, -1)[area.expert, :, area.rows].T
        else:
            b = self._matrix(product.pair.b)
            part = b.view(b.shape[0], product.rank, product.experts)[area.rows, :, area.expert]
        return part.to(torch.float64)

    def _right(self, product: Product, expert: int) -> Tensor:
        """Return the factors of all columns, [r, columns] in float64."""

        def made() -> Tensor:
            if product.transposed:
                b = self._matrix(product.pair.b)
                return b.view(b.shape[0], product.rank, product.experts)[:, :, expert].T.to(torch.float64).contiguous()
            a = self._matrix(product.pair.a)
            return a.view(product.experts, product.rank, -1)[expert].to(torch.float64)

        which = product.pair.b if product.transposed else product.pair.a
        return self._keep((f"{which.name}:{product.transposed}", expert), made)

    def _matrix(self, spec: StoredTensor) -> Tensor:
        return self._keep((spec.name, -2), lambda: self.stored(spec).view(spec.shape))

    def _keep(self, key: tuple[str, int], make: Callable[[], Tensor]) -> Tensor:
        """Return what `make` gives, from before if it is kept."""
        with self._lock:
            if (found := self._kept.get(key)) is not None:
                self._kept.move_to_end(key)
                return found
        made = make()
        with self._lock:
            if key in self._kept:  # another thread was faster
                return self._kept[key]
            self._kept[key] = made
            self._bytes += made.nbytes
            while self._bytes > KEPT_BYTES and len(self._kept) > 1:
                _, old = self._kept.popitem(last=False)
                self._bytes -= old.nbytes
        return made
