"""Adapters as checkpoints: a model with an adapter put onto it, and an adapter's difference in a model's shape.

    onto a model   W + s B A, computed in float64 and rounded once to float32 (float64, where the model or what replaces
                   a tensor has it); DoRA: m (W + s B A) / norm. What the adapter leaves alone is the model's own
    a difference   s B A, rounded once to float32; zero where the adapter has nothing

A changed tensor is float32 here whatever the model stores; `written_dtype` is the model's own.
"""

from __future__ import annotations

import hashlib
import threading
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from skillmerge.checkpoints.checkpoint import Checkpoint, Difference, Piece, read_bytes, sha256_as_read
from skillmerge.checkpoints.kinds.lora.adapter import Adapter
from skillmerge.checkpoints.kinds.lora.parts import MERGE
from skillmerge.checkpoints.store import Wait, nothing_to_wait_for
from skillmerge.checkpoints.stores.overlaid import Overlaid
from skillmerge.checkpoints.tokenizers.tokenizer import is_of_tokenizer, vocabulary_file
from skillmerge.checkpoints.views.arranged import in_layout_of
from skillmerge.checkpoints.views.fitting import Change, Model, changes_of, no_module
from skillmerge.checkpoints.views.unpacking import products_of
from skillmerge.errors import InputError, some
from skillmerge.tensors import DTYPES, StoredTensor, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from skillmerge.checkpoints.views.low_rank import Area, Matrices

Renames = Sequence[tuple[str, str]]


class _Adapting(Checkpoint):
    """What both views share: the adapter, its changes, and its matrices, of which torch is needed only to read."""

    adapter: Adapter
    changes: Mapping[str, Change]

    @cached_property
    def _matrices(self) -> Matrices:
        from skillmerge.checkpoints.views.low_rank import Matrices

        return Matrices(self.adapter)

    def _of_change(self, name: str) -> int:
        """Return the bytes of the adapter that a tensor takes."""
        change = self.changes.get(name)
        if change is None or change.arranged is not None:
            return change.arranged.cost(name) if change is not None and change.arranged is not None else 0
        return sum(spec.nbytes for spec in change.stored)


class Adapted(_Adapting):
    """A model with an adapter on it."""

    def __init__(self, adapter: Adapter, base: Checkpoint, rename: Renames) -> None:
        """Raises InputError if the adapter is not for this model."""
        self.adapter, self._base = adapter, base
        self.changes = _changes(adapter, Model(base.place, base.tensors, base.config), rename)
        at = replace(
            adapter.at,
            remote=base.at.remote or adapter.at.remote,
            license=adapter.at.license or base.at.license,
        )
        own = adapter.files[adapter.file]
        said = hashlib.sha256(own.described + repr(list(rename)).encode()).digest()
        tensors = {name: self._spec(spec) for name, spec in base.tensors.items()}
        files = {
            # What the plan keeps of a header stands for all that says what the tensors are.
            name: replace(file, described=file.described + said, version=file.version + own.version, digest=None)
            for name, file in base.files.items()
        }
        # Training may have added tokens, and then their tokenizer is beside the adapter.
        has_tokens = bool(vocabulary_file(adapter.store.list()))
        store = Overlaid(base.store, adapter.store, is_of_tokenizer) if has_tokens else base.store
        super().__init__(adapter.uri, at, store, base.config, tensors, files, indexed=base.indexed, unread=base.unread)
        self.naming, self.trained_on = base.naming, adapter.lora.base

    @property
    def own(self) -> Checkpoint:
        return self.adapter

    def written_dtype(self, tensor: str) -> str:
        return self._base.written_dtype(tensor)

    def read(self, pieces: Sequence[Piece]) -> Wait:
        """The model's elements are read to the ends of their pieces' places, and widened there from the first one
        on."""
        changed = [piece for piece in pieces if piece.tensor in self.changes and piece.count]
        wait = self._base.read([self._beneath(it) for it in pieces if not self._is_replaced(it.tensor)])
        if not changed:
            return wait

        def finish() -> None:
            wait()
            for piece in changed:
                self._change(piece)

        return finish

    def hint(self, tensor: str, first: int, count: int) -> None:
        if not self._is_replaced(tensor):
            self._base.hint(tensor, first, count)

    def cost(self, tensor: str) -> int:
        return self._of_change(tensor) + (0 if self._is_replaced(tensor) else self._base.cost(tensor))

    def sha256(self, file: str, stop: threading.Event | None = None) -> str:
        """Return the digest of the model's file with the adapter on it."""
        return sha256_as_read(self, file, self._base.files[file].described, stop)

    def check_unchanged(self, files: Collection[str] | None = None) -> None:
        self._base.check_unchanged(files)
        self.adapter.check_unchanged()

    def cancel(self) -> None:
        self.adapter.cancel()
        self._base.cancel()

    def close(self) -> None:
        """The model is somebody else's to close."""
        self.adapter.close()

    def _is_replaced(self, tensor: str) -> bool:
        return tensor in self.changes and self.changes[tensor].whole is not None

    def _spec(self, spec: TensorSpec) -> TensorSpec:
        change = self.changes.get(spec.name)
        if change is None:
            return spec
        kept = [it.dtype for it in change.stored if change.product is None and change.bias is None]
        return replace(spec, dtype="F64" if "F64" in (spec.dtype, *kept) else "F32")

    def _beneath(self, piece: Piece) -> Piece:
        """Return the piece of the model, at the end of the place for the wider elements."""
        wide, narrow = self.tensors[piece.tensor].dtype, self._base.tensors[piece.tensor].dtype
        room = DTYPES[wide].itemsize - DTYPES[narrow].itemsize
        return replace(piece, start=piece.start + piece.count * room)

    def _change(self, piece: Piece) -> None:
        """Widen the elements of a piece and change them, in areas from the first one on."""
        import torch

        from skillmerge.bits import torch_dtype
        from skillmerge.checkpoints.views.low_rank import areas

        change, spec = self.changes[piece.tensor], self.tensors[piece.tensor]
        self._matrices.confirm(change.same)
        out = torch.frombuffer(self.view(piece), dtype=torch_dtype(spec.dtype))
        if change.whole is not None:
            out.copy_(self._matrices.stored(change.whole, piece.first, piece.count))
            return
        beneath, narrow = self._beneath(piece), self._base.tensors[piece.tensor].dtype
        place = piece.buffer[beneath.start : beneath.start + piece.count * DTYPES[narrow].itemsize]
        own = torch.frombuffer(place, dtype=torch_dtype(narrow))
        rows, columns = spec.shape[-2:] if len(spec.shape) > 1 else (1, spec.elements)
        for area in areas(piece.first, piece.count, rows, columns):
            asked = slice(area.start, area.start + area.count)
            values = torch.zeros(area.shape, dtype=torch.float64)
            values.view(-1)[area.inside] = own[asked].to(torch.float64)
            out[asked] = self._changed(piece.tensor, change, area, values).view(-1)[area.inside]
        if change.rows is not None:
            self._put_rows(piece, change, out)

    def _changed(self, name: str, change: Change, area: Area, values: Tensor) -> Tensor:
        """Return an area of the model's elements as the adapter leaves them, in float64."""
        for copy in change.copies:
            self._compare(name, copy, area, values)
        if change.bias is not None:
            return values.add_(self._matrices.vector(change.bias)[area.columns] * change.scale)
        if change.arranged is not None:
            values.view(-1)[area.inside] += _stored(change.arranged, name, area.first, area.count)
            return values
        if change.product is None:
            return values
        product = change.product
        values.add_(self._matrices.product(product, area))
        if product.pair.magnitude is not None:
            norms = self._matrices.norms(product, name, lambda *run: _stored(self._base, name, *run))
            outputs = area.columns if product.transposed else area.rows
            factors, lengths = self._matrices.vector(product.pair.magnitude)[outputs], norms[outputs]
            if not product.transposed:
                factors, lengths = factors[:, None], lengths[:, None]
            values.mul_(factors).div_(lengths)
        return values

    def _compare(self, name: str, copy: StoredTensor, area: Area, values: Tensor) -> None:
        """Raise InputError unless the adapter's copy of the model's elements is one, in its own dtype: that of training
        may have been narrower than the model's."""
        import torch

        kept = self._matrices.stored(copy, area.first, area.count)
        if not torch.equal(kept, values.view(-1)[area.inside].to(kept.dtype)):
            raise InputError(
                f"{self.adapter.place}: `{copy.name}` is a copy of the base's `{name}`, and not that of "
                f"{self._base.place}",
                fix="name the model that the adapter was trained on",
            )

    def _put_rows(self, piece: Piece, change: Change, out: Tensor) -> None:
        """Put the rows that are replaced into a piece."""
        assert change.rows is not None
        columns = self.tensors[piece.tensor].shape[1]
        rows = change.rows.rows
        for at in range(bisect_left(rows, (piece.first // columns,)), len(rows)):
            row, index = rows[at]
            begin, end = max(piece.first, row * columns), min(piece.first + piece.count, (row + 1) * columns)
            if begin >= end:
                break
            first = index * columns + begin - row * columns
            found = self._matrices.stored(change.rows.values, first, end - begin)
            out[begin - piece.first : end - piece.first] = found.to(out.dtype)


class AdapterPlane(_Adapting):
    """An adapter's difference with the tensors of another checkpoint, or, `minus`, the zeros that are taken from
    it."""

    def __init__(
        self, adapter: Adapter, model: Model, tensors: Mapping[str, TensorSpec], changes: Mapping[str, Change]
    ) -> None:
        """model: whose configuration the adapter has, as it has no other."""
        file = replace(adapter.files[adapter.file], tensors=tuple(tensors))
        super().__init__(adapter.uri, adapter.at, adapter.store, model.config, tensors, {adapter.file: file})
        self.adapter, self.changes, self.trained_on = adapter, changes, adapter.lora.base

    def read(self, pieces: Sequence[Piece]) -> Wait:
        """Computes at once: there is nothing to wait for."""
        for piece in pieces:
            if piece.tensor in self.changes and piece.count:
                self._fill(piece)
            else:
                view = self.view(piece)
                view[:] = bytes(len(view))
        return nothing_to_wait_for

    def hint(self, tensor: str, first: int, count: int) -> None:
        """Matrices are small, and read as wholes."""

    def cost(self, tensor: str) -> int:
        return self._of_change(tensor)

    def sha256(self, file: str, stop: threading.Event | None = None) -> str:
        return self.adapter.sha256(file, stop)

    def check_unchanged(self, files: Collection[str] | None = None) -> None:
        self.adapter.check_unchanged(files)

    def _fill(self, piece: Piece) -> None:
        import torch

        from skillmerge.bits import torch_dtype
        from skillmerge.checkpoints.views.low_rank import areas

        change, spec = self.changes[piece.tensor], self.tensors[piece.tensor]
        self._matrices.confirm(change.same)
        out = torch.frombuffer(self.view(piece), dtype=torch_dtype(spec.dtype))
        rows, columns = spec.shape[-2:] if len(spec.shape) > 1 else (1, spec.elements)
        for area in areas(piece.first, piece.count, rows, columns):
            if change.product is not None:
                values = self._matrices.product(change.product, area).view(-1)[area.inside]
            elif change.arranged is not None:
                values = _stored(change.arranged, piece.tensor, area.first, area.count)
            else:
                assert change.bias is not None
                values = (self._matrices.vector(change.bias)[area.columns] * change.scale)[area.inside]
            out[area.start : area.start + area.count] = values


def _stored(checkpoint: Checkpoint, name: str, first: int, count: int) -> Tensor:
    """Return elements of a checkpoint."""
    import torch

    from skillmerge.bits import torch_dtype

    content = read_bytes(checkpoint, name, first, count)
    return torch.frombuffer(content, dtype=torch_dtype(checkpoint.tensors[name].dtype))


def onto(adapter: Adapter, base: Checkpoint, rename: Renames = ()) -> Adapted:
    """Return a model with an adapter on it. Raises InputError if the adapter is not for this model."""
    return Adapted(adapter, base, rename)


def difference(adapter: Adapter, model: Model, rename: Renames = ()) -> Difference:
    """Return what an adapter adds to any model, with the names and shapes of `model`.

    Raises InputError if it does not fit, or holds what is no difference.
    """
    changes = _changes(adapter, model, rename)
    _refuse_replacements(adapter, changes)
    tensors = {
        name: TensorSpec(name, "F32", spec.shape, adapter.file)
        for name, spec in model.tensors.items()
        if DTYPES[spec.dtype].is_float
    }
    planes = AdapterPlane(adapter, model, tensors, changes), AdapterPlane(adapter, model, tensors, {})
    for plane in planes:
        # There is no update of what is no plain number.
        plane.same = frozenset(model.tensors.keys() - tensors.keys())
    return Difference(*planes)


def check_fit(adapter: Adapter, model: Model, rename: Renames) -> None:
    """Raise InputError if an adapter is not for this model, in whatever layout it stores its tensors."""
    _changes(adapter, model, rename)


def _changes(adapter: Adapter, model: Model, rename: Renames) -> dict[str, Change]:
    """Return all that an adapter changes, by the model's names. Raises InputError if it is not for this model."""
    changes, left = changes_of(adapter, model, rename)
    if not left:
        return changes
    added = products_of(adapter, left, model, rename)
    products = {name: Change(product) for name, (_, product) in added.items() if product is not None}
    plane = AdapterPlane(adapter, model, {name: spec for name, (spec, _) in added.items()}, products)
    arranged = in_layout_of(plane, model.tensors, whole=False)
    for name, (_, product) in added.items():
        if product is not None and name in arranged.tensors:
            raise no_module(adapter, product.pair, model, rename)
        if product is not None and product.pair.magnitude is not None:
            raise _scaled_elsewhere(adapter, product.pair.magnitude, name, model)
    targets = arranged.tensors.keys() - added.keys()
    for name in targets & changes.keys():
        raise InputError(f"{adapter.place}: two pairs of A and B change `{name}`")
    return changes | {name: Change(arranged=arranged) for name in targets}


def _scaled_elsewhere(adapter: Adapter, magnitude: StoredTensor, name: str, model: Model) -> InputError:
    """Return the error for DoRA on rows that a model stores inside another tensor."""
    return InputError(
        f"{adapter.at.path(adapter.file)}: `{magnitude.name}` scales the rows of `{name}` (DoRA), which {model.said} "
        "stores as a part of another tensor",
        fix=f"name a model that stores it by itself; or {MERGE}",
    )


def _refuse_replacements(adapter: Adapter, changes: Mapping[str, Change]) -> None:
    """Raise InputError where an adapter replaces what a difference cannot know."""
    scaled = [name for name, change in changes.items() if change.product and change.product.pair.magnitude]
    if scaled:
        raise InputError(
            f"{adapter.place}: DoRA scales the base's rows ({some([f'`{name}`' for name in scaled], 2)}), so that its "
            "difference depends on the base",
            fix="give `onto:` the model that the adapter was trained on, and subtract that model",
        )
    parts = [f"some rows of `{name}`" for name, change in changes.items() if change.rows]
    whole = [f"`{name}`" for name, change in changes.items() if change.whole]
    if parts or whole:
        several = "replace whole tensors" if len(whole) > 1 else "replaces a whole tensor"
        what = f"replaces {some(parts, 2)}" if parts else f"{some(whole, 2)} {several}"
        raise InputError(
            f"{adapter.place}: {what}, which is no difference",
            fix="give `onto:` the model that the adapter was trained on, and subtract that model",
        )
