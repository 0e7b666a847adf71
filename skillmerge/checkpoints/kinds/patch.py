"""A sparse patch: the elements of a checkpoint that have changed, read as that checkpoint with the patch on it.

    *.safetensors          for each tensor that changed: NAME.indices, the places in the flattened tensor, ascending
                           (int32 or int64), and NAME.values, the new elements there, in the tensor's own dtype
    delta_metadata.json    `shapes`: the whole tensors' shapes; `base`: samples of the model that it is for; both may be
                           missing

That is how trainers ship weights to inference servers between the steps of RL: where places and new values
lie side by side nothing is computed, so nothing is rounded
(https://github.com/vllm-project/vllm/pull/50723 has the same in memory).
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from skillmerge.checkpoints.checkpoint import INDEX_FILE, Checkpoint, Piece, read_bytes, sha256_as_read
from skillmerge.checkpoints.safetensors import Header
from skillmerge.checkpoints.store import Store, Wait, read_headers, read_json_object
from skillmerge.errors import InputError, some
from skillmerge.tensors import CHUNK, DTYPES, StoredTensor, TensorSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor


WORD, NOUN, WRITTEN = "patch", "a sparse patch", "{{patch: {uri}, onto: MODEL}}"
PATCH_FILE = "delta_metadata.json"
"""A file that only patches have, beside positions and values."""

INDICES, VALUES = ".indices", ".values"
_SAMPLES, _SAMPLED = 8, 4096
"""Tensors and elements of each that show whether a model is the one that a patch is for."""
_OTHER_MODEL = "name the model that the patch was made for"
_FIX = "patches hold places in ascending order, each once, and the new elements of the tensors they are for"


@dataclass(slots=True)
class _Change:
    """One tensor of a patch; `starts`: how many positions come before each CHUNK elements of it."""

    spec: TensorSpec
    indices: StoredTensor
    values: StoredTensor
    starts: list[int] | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class Patched(Checkpoint):
    """The base's tensors, with other elements where the patch has them."""

    def __init__(
        self,
        uri: str,
        patch: Store,
        base: Checkpoint,
        headers: Mapping[str, Header],
        changes: Sequence[_Change],
        is_checked: bool,
    ) -> None:
        """is_checked: whether the patch says which model it is for, and `base` is that one."""
        self.is_checked = is_checked
        at = replace(patch.at, remote=base.at.remote or patch.at.remote, license=base.at.license)
        listed = patch.list()
        version = tuple(part for file in sorted(headers) for part in listed[file].version)
        stated = hashlib.sha256(b"".join(headers[file].raw for file in sorted(headers))).digest()
        files = {
            # What the plan keeps of a header stands for all that says what the tensors are.
            name: replace(file, described=file.described + stated, version=file.version + version, digest=None)
            for name, file in base.files.items()
        }
        super().__init__(
            uri, at, base.store, base.config, base.tensors, files, indexed=base.indexed, unread=base.unread
        )
        self._base, self._patch, self._patch_files = base, patch, sorted(headers)
        self._changes = {change.spec.name: change for change in changes}

    def read(self, pieces: Sequence[Piece]) -> Wait:
        wait = self._base.read(pieces)
        changed = [piece for piece in pieces if piece.tensor in self._changes and piece.count]
        if not changed:
            return wait

        def finish() -> None:
            wait()
            for piece in changed:
                self._put(self._changes[piece.tensor], piece.first, piece.first + piece.count, self.view(piece))

        return finish

    def hint(self, tensor: str, first: int, count: int) -> None:
        self._base.hint(tensor, first, count)

    def cost(self, tensor: str) -> int:
        return self._base.cost(tensor)

    def sha256(self, file: str, stop: threading.Event | None = None) -> str:
        """Return the digest of the base's file with the patch applied."""
        return sha256_as_read(self, file, self._base.files[file].described, stop)

    def check_unchanged(self, files: Collection[str] | None = None) -> None:
        self._base.check_unchanged(files)
        self._patch.check_unchanged(self._patch_files)

    def cancel(self) -> None:
        self._patch.cancel()
        self._base.cancel()

    def close(self) -> None:
        """The base is somebody else's to close."""
        self._patch.close()

    def _put(self, change: _Change, first: int, last: int, view: memoryview) -> None:
        """Put the new elements into `view`, which holds elements first..last of the tensor."""
        import torch

        from skillmerge.bits import bit_view, torch_dtype

        starts = self._starts(change)
        low, high = starts[first // CHUNK], starts[-(-last // CHUNK)]
        if low == high:
            return
        places = self._part(change.indices, low, high, torch.int64)
        inside = slice(*torch.searchsorted(places, torch.tensor([first, last])).tolist())
        values = self._part(change.values, low + inside.start, low + inside.stop, torch_dtype(change.spec.dtype))
        out = torch.frombuffer(view, dtype=torch.uint8).view(values.dtype)
        bit_view(out)[places[inside] - first] = bit_view(values)

    def _starts(self, change: _Change) -> list[int]:
        """Return where each CHUNK's places start, from a first look at all of them. Raises InputError."""
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
                            f"{self._patch.at.path(change.indices.file)}: `{change.indices.name}` is not a list of "
                            f"ascending places from 0 to {elements - 1}",
                            fix=_FIX,
                        )
                    before = int(places[-1])
                    starts[1:] += torch.searchsorted(places, ends)
                change.starts = starts.tolist()
        return change.starts

    def _part(self, spec: StoredTensor, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Return elements of a patch's tensor; places as int64, whatever they are stored in."""
        import torch

        from skillmerge.bits import torch_dtype

        stored = torch_dtype(spec.dtype) if spec.name.endswith(VALUES) else getattr(torch, _WIDTHS[spec.dtype])
        if last <= first:
            return torch.empty(0, dtype=dtype)
        content = bytearray((last - first) * DTYPES[spec.dtype].itemsize)
        self._patch.read(spec.file, spec.start + first * DTYPES[spec.dtype].itemsize, memoryview(content))()
        return torch.frombuffer(content, dtype=stored).to(dtype)


_WIDTHS = {"I32": "int32", "I64": "int64"}


def claims(store: Store) -> bool:
    files = store.list()
    return PATCH_FILE in files and INDEX_FILE not in files


def open(uri: str, store: Store, onto: Checkpoint | None) -> Checkpoint:
    """Open the checkpoint that a patch makes of `onto`.

    Raises InputError if it is missing, damaged, or for another model.
    """
    assert onto is not None
    files, place = store.list(), store.at.place
    weights = sorted(name for name in files if name.endswith(".safetensors") and "/" not in name)
    if not weights:
        raise InputError(f"{place} has no *.safetensors: it is not a sparse patch")
    headers = read_headers(store, weights, dict.fromkeys(weights, 1 << 17))
    specs: dict[str, StoredTensor] = {}
    for spec in (spec for header in headers.values() for spec in header.tensors):
        if spec.name in specs:
            raise InputError(f"{place}: `{spec.name}` is in both {specs[spec.name].file} and {spec.file}")
        specs[spec.name] = spec
    odd = [name for name in specs if not name.endswith((INDICES, VALUES))]
    if odd or not specs:
        what = f"it has tensors that are no places or values: {some(odd)}" if odd else "it holds nothing"
        raise InputError(f"{place} is not a sparse patch: {what}", fix=f"it must have NAME{INDICES}, NAME{VALUES}")
    changes = [_change(place, specs, name, onto) for name in sorted({name.rpartition(".")[0] for name in specs})]
    metadata = read_json_object(store, PATCH_FILE) if PATCH_FILE in files else {}
    _check_shapes(store, metadata, onto)
    return Patched(uri, store, onto, headers, changes, is_checked=_check_samples(store, metadata, onto))


def samples(base: Checkpoint, changed: Sequence[str]) -> list[dict[str, Any]]:
    """Return what `delta_metadata.json` says of the model that a patch is for: digests of a few thousand elements in
    the middle of some tensors among `changed`, which planning can read too."""
    names = sorted(changed)
    return [_sample(base, name) for name in names[:: max(1, -(-len(names) // _SAMPLES))]]


def _sample(base: Checkpoint, name: str) -> dict[str, Any]:
    elements = base.tensors[name].elements
    count = min(elements, _SAMPLED)
    content = read_bytes(base, name, (elements - count) // 2, count)
    return {"tensor": name, "elements": count, "sha256": hashlib.sha256(content).hexdigest()}


def _check_samples(store: Store, metadata: Mapping[str, Any], base: Checkpoint) -> bool:
    """Return whether the patch says what it is for. Raises InputError if that is not `base`."""
    rows = metadata.get("base")
    if not isinstance(rows, list) or not rows or len(rows) > _SAMPLES:
        return False
    for row in rows:
        name = row.get("tensor") if isinstance(row, dict) else None
        if not isinstance(name, str) or name not in base.tensors or _sample(base, name) != row:
            raise InputError(
                f"{store.at.place}: the patch is for another model than {base.place}: "
                f"the weights of tensor `{name}` differ",
                fix=_OTHER_MODEL,
            )
    return True


def _change(place: str, specs: Mapping[str, StoredTensor], name: str, base: Checkpoint) -> _Change:
    indices, values, spec = specs.get(name + INDICES), specs.get(name + VALUES), base.tensors.get(name)
    if indices is None or values is None:
        raise InputError(f"{place}: tensor `{name}` has places but no values, or values but no places", fix=_FIX)
    if spec is None:
        raise InputError(f"{place}: tensor `{name}` is not in {base.place}", fix=_OTHER_MODEL)
    if (
        indices.dtype not in _WIDTHS
        or len(indices.shape) != 1
        or indices.shape != values.shape
        or values.dtype != spec.dtype
        or indices.elements > spec.elements
        or DTYPES[spec.dtype].torch_name is None
    ):
        raise InputError(
            f"{place}: the patch of tensor `{name}` ({indices.dtype} {list(indices.shape)}, {values.dtype} "
            f"{list(values.shape)}) does not fit it ({spec.dtype} {list(spec.shape)} in {base.place})",
            fix=_FIX,
        )
    return _Change(spec, indices, values)


def _check_shapes(store: Store, metadata: Mapping[str, Any], base: Checkpoint) -> None:
    shapes = metadata.get("shapes")
    for name, shape in shapes.items() if isinstance(shapes, dict) else ():
        spec = base.tensors.get(name)
        if spec is None or list(spec.shape) != shape:
            found = f"has shape {list(spec.shape)} there" if spec else "is not there"
            raise InputError(
                f"{store.at.path(PATCH_FILE)}: the patch is not for {base.place}: tensor `{name}` {found}",
                fix=_OTHER_MODEL,
            )
