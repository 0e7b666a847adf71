"""A sparse patch: the elements of a checkpoint that have changed, read as that checkpoint with the patch on it.

    *.safetensors          for each tensor that changed: NAME.indices, the places in the flattened tensor, ascending
                           (int32 or int64), and NAME.values, the new elements there, in the tensor's own dtype
    delta_metadata.json    `shapes`: the whole tensors' shapes; may be missing

That is how trainers ship weights to inference servers between the steps of RL: where places and new values
lie side by side nothing is computed, so nothing is rounded
(https://github.com/vllm-project/vllm/pull/50723 has the same in memory).
"""

from __future__ import annotations

import hashlib
import threading
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from skillmerge.checkpoints.checkpoint import PATCH_FILE, Checkpoint
from skillmerge.checkpoints.safetensors import Header
from skillmerge.checkpoints.store import Files, read_json_object
from skillmerge.errors import InputError, some
from skillmerge.tensors import CHUNK, DTYPES, TensorSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor


INDICES, VALUES = ".indices", ".values"
_FIX = "patches hold places in ascending order, each once, and the new elements of the tensors they are for"


@dataclass(slots=True)
class _Change:
    """What a patch says of one tensor; `starts` says how many places come before each CHUNK elements of it."""

    spec: TensorSpec
    indices: TensorSpec
    values: TensorSpec
    starts: list[int] | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class PatchedFiles:
    """The base's files, with other elements where the patch has them. See `checkpoint.Files` for the promises."""

    def __init__(
        self, base: Checkpoint, patch: Files, headers: Mapping[str, Header], changes: Sequence[_Change]
    ) -> None:
        self._base, self._patch, self._patch_files = base.files, patch, sorted(headers)
        self.place, self.root, self.revision = patch.place, patch.root, patch.revision
        self.remote, self.license = base.files.remote or patch.remote, base.files.license
        self._changes: dict[str, list[_Change]] = {file: [] for file in base.shards}
        for change in sorted(changes, key=lambda change: change.spec.start):
            self._changes[change.spec.file].append(change)
        self._begins = {file: [change.spec.start for change in found] for file, found in self._changes.items()}
        stated = hashlib.sha256(b"".join(headers[file].raw for file in self._patch_files)).digest()
        # What the plan keeps of a header stands for all that says what the tensors are.
        self.shards = {file: replace(header, raw=header.raw + stated) for file, header in base.shards.items()}

    def names(self) -> list[str]:
        return self._base.names()

    def path(self, name: str) -> str:
        return self._base.path(name)

    def read(self, name: str, limit: int) -> bytes:
        return self._base.read(name, limit)

    def headers(self, names: Sequence[str], sizes: Mapping[str, int]) -> list[Header]:
        return [self.shards[name] for name in names]

    def begin(self, name: str, position: int, buffer: memoryview) -> Callable[[], None]:
        wait = self._base.begin(name, position, buffer)

        def finish() -> None:
            wait()
            end = position + len(buffer)
            for change in self._changes[name][max(0, bisect_right(self._begins[name], position) - 1) :]:
                if change.spec.start >= end:
                    break
                if change.spec.end > position:
                    self._put(change, position, buffer)

        return finish

    def announce(self, name: str, position: int, nbytes: int) -> None:
        self._base.announce(name, position, nbytes)

    def version(self, name: str) -> list[int | str]:
        return [*self._base.version(name), *(part for file in self._patch_files for part in self._patch.version(file))]

    def known_digest(self, name: str) -> tuple[int, tuple[str, str]] | None:
        return None if name in self.shards else self._base.known_digest(name)

    def check_unchanged(self, names: Sequence[str]) -> None:
        self._base.check_unchanged(names)
        self._patch.check_unchanged(self._patch_files)

    def cancel(self) -> None:
        self._patch.cancel()
        self._base.cancel()

    def close(self) -> None:
        """The base is somebody else's to close."""
        self._patch.close()

    def _put(self, change: _Change, position: int, buffer: memoryview) -> None:
        """Put the new elements into `buffer`, which holds the file's bytes from `position` on."""
        import torch

        from skillmerge.bits import bit_view, torch_dtype

        spec, size = change.spec, DTYPES[change.spec.dtype].itemsize
        begin, end = max(position, spec.start) - spec.start, min(position + len(buffer), spec.end) - spec.start
        first, last = begin // size, -(-end // size)
        starts = self._starts(change)
        low, high = starts[first // CHUNK], starts[-(-last // CHUNK)]
        if low == high:
            return
        places = self._part(change.indices, low, high, torch.int64)
        inside = slice(*torch.searchsorted(places, torch.tensor([first, last])).tolist())
        values = self._part(change.values, low + inside.start, low + inside.stop, torch_dtype(spec.dtype))
        view = buffer[spec.start + begin - position : spec.start + end - position]
        whole = (begin, end) == (first * size, last * size)  # a digest's pieces may cut through an element
        memory = view if whole else memoryview(bytearray((last - first) * size))
        if not whole:
            memory[begin - first * size : end - first * size] = view
        out = torch.frombuffer(memory, dtype=torch.uint8).view(values.dtype)
        bit_view(out)[places[inside] - first] = bit_view(values)
        if not whole:
            view[:] = memory[begin - first * size : end - first * size]

    def _starts(self, change: _Change) -> list[int]:
        """Where each CHUNK's places start, from a first look at all of them. Raises InputError."""
        import torch

        with change.lock:
            if change.starts is None:
                elements, count = change.spec.elements, change.indices.elements
                starts = torch.zeros(-(-elements // CHUNK) + 1, dtype=torch.int64)
                ends = torch.arange(1, len(starts)) * CHUNK
                before = -1
                for begin in range(0, count, CHUNK):
                    places = self._part(change.indices, begin, min(begin + CHUNK, count), torch.int64)
                    ascending = before < int(places[0]) and bool((places.diff() > 0).all())
                    if not ascending or int(places[-1]) >= elements:
                        raise InputError(
                            f"{self._patch.path(change.indices.file)}: `{change.indices.name}` is not a list of "
                            f"ascending places from 0 to {elements - 1}",
                            fix=_FIX,
                        )
                    before = int(places[-1])
                    starts[1:] += torch.searchsorted(places, ends)
                change.starts = starts.tolist()
        return change.starts

    def _part(self, spec: TensorSpec, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Elements of a patch's tensor; places as int64, whatever they are stored in."""
        import torch

        from skillmerge.bits import torch_dtype

        stored = torch_dtype(spec.dtype) if spec.name.endswith(VALUES) else getattr(torch, _WIDTHS[spec.dtype])
        if last <= first:
            return torch.empty(0, dtype=dtype)
        content = bytearray((last - first) * DTYPES[spec.dtype].itemsize)
        self._patch.begin(spec.file, spec.start + first * DTYPES[spec.dtype].itemsize, memoryview(content))()
        return torch.frombuffer(content, dtype=stored).to(dtype)


_WIDTHS = {"I32": "int32", "I64": "int64"}


def open_patch(uri: str, files: Files, base: Checkpoint) -> Checkpoint:
    """Open the checkpoint that the patch in `files` makes of `base`.

    Raises InputError where it is missing, damaged, or for another model.
    """
    names = files.names()
    weights = sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)
    if not weights:
        raise InputError(f"{files.place} has no *.safetensors: it is not a sparse patch")
    headers = dict(zip(weights, files.headers(weights, dict.fromkeys(weights, 1 << 17)), strict=True))
    specs: dict[str, TensorSpec] = {}
    for spec in (spec for header in headers.values() for spec in header.tensors):
        if spec.name in specs:
            raise InputError(f"{files.place}: `{spec.name}` is in both {specs[spec.name].file} and {spec.file}")
        specs[spec.name] = spec
    odd = [name for name in specs if not name.endswith((INDICES, VALUES))]
    if odd or not specs:
        what = f"it has tensors that are no places or values: {some(odd)}" if odd else "it holds nothing"
        raise InputError(
            f"{files.place} is not a sparse patch: {what}", fix=f"it must have NAME{INDICES}, NAME{VALUES}"
        )
    changes = [_change(files, specs, name, base) for name in sorted({name.rpartition(".")[0] for name in specs})]
    if PATCH_FILE in names:
        _check_shapes(files, base)
    patched = PatchedFiles(base, files, headers, changes)
    return replace(base, uri=uri, files=patched, shards=patched.shards)


def _change(files: Files, specs: Mapping[str, TensorSpec], name: str, base: Checkpoint) -> _Change:
    indices, values, spec = specs.get(name + INDICES), specs.get(name + VALUES), base.tensors.get(name)
    if indices is None or values is None:
        raise InputError(f"{files.place}: tensor `{name}` has places but no values, or values but no places", fix=_FIX)
    if spec is None:
        raise InputError(
            f"{files.place}: tensor `{name}` is not in {base.place}", fix="name the model that the patch was made for"
        )
    if (
        indices.dtype not in _WIDTHS
        or len(indices.shape) != 1
        or indices.shape != values.shape
        or values.dtype != spec.dtype
        or indices.elements > spec.elements
        or DTYPES[spec.dtype].torch_name is None
    ):
        raise InputError(
            f"{files.place}: the patch of tensor `{name}` ({indices.dtype} {list(indices.shape)}, {values.dtype} "
            f"{list(values.shape)}) does not fit it ({spec.dtype} {list(spec.shape)} in {base.place})",
            fix=_FIX,
        )
    return _Change(spec, indices, values)


def _check_shapes(files: Files, base: Checkpoint) -> None:
    shapes = read_json_object(files, PATCH_FILE).get("shapes")
    for name, shape in shapes.items() if isinstance(shapes, dict) else ():
        spec = base.tensors.get(name)
        if spec is None or list(spec.shape) != shape:
            found = f"has shape {list(spec.shape)} there" if spec else "is not there"
            raise InputError(
                f"{files.path(PATCH_FILE)}: the patch is not for {base.place}: tensor `{name}` {found}",
                fix="name the model that the patch was made for",
            )
