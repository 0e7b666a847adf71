"""A checkpoint: named tensors, however they are stored.

Knows what everything above reads (`Checkpoint`, and `Difference` for a stored skill) and what every kind of stored
weights has to be (`Kind`). Where bytes are is a store's business; which bytes a tensor is made of is its kind's.
"""

from __future__ import annotations

import hashlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

from skillmerge.checkpoints.safetensors import Header
from skillmerge.checkpoints.store import Stat, Store, Wait, Where
from skillmerge.errors import InputError
from skillmerge.methods.terms import minus_of
from skillmerge.tensors import DTYPES, UNIT, TensorSpec

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PIECE = 16 << 20


@dataclass(frozen=True, slots=True)
class Piece:
    """`count` elements of a tensor from `first` on, and where they are to go: `buffer`, from byte `start` on."""

    tensor: str
    first: int
    count: int
    buffer: memoryview
    start: int = 0


@dataclass(frozen=True, slots=True)
class WeightFile:
    """A file that tensors come from.

    described: all that says what its tensors are, which a plan keeps a digest of. version: what tells it from another
    version of it. digest: as the store states it, or None. tensors: their names, in the order of their bytes.
    """

    header: Header
    described: bytes
    version: tuple[int | str, ...]
    digest: tuple[str, str] | None
    tensors: tuple[str, ...]

    @classmethod
    def of(cls, header: Header, stat: Stat) -> WeightFile:
        return cls(header, header.raw, stat.version, stat.digest, tuple(spec.name for spec in header.tensors))

    @property
    def size(self) -> int:
        return self.header.size


@dataclass(frozen=True, slots=True)
class Naming:
    """How the names of a checkpoint's tensors differ from the stored ones.

    rename: prefixes and their replacements; the first match wins. unwrapped: parts that a training
    library left in them. stack: the models whose layers it is made of, and their layers. edits: what its `config.json`
    says otherwise for that: key, old value, new value. layout: how the weights are arranged in other tensors than they
    are stored in, in words.
    """

    rename: tuple[tuple[str, str], ...] = ()
    unwrapped: tuple[str, ...] = ()
    stack: tuple[tuple[str, str], ...] = ()
    edits: tuple[tuple[str, Any, Any], ...] = ()
    layout: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return what plans and manifests hold of it: nothing, where names are as they are stored."""
        rename = {"rename": [{"from": old, "to": new} for old, new in self.rename]} if self.rename else {}
        unwrapped = {"unwrapped": list(self.unwrapped)} if self.unwrapped else {}
        stack = {"stack": [{"from": model, "layers": layers} for model, layers in self.stack]} if self.stack else {}
        edits = [{"key": key, "old": old, "new": new} for key, old, new in self.edits]
        layout = {"layout": list(self.layout)} if self.layout else {}
        return {**rename, **unwrapped, **stack, **({"config_edits": edits} if edits else {}), **layout}


class Checkpoint(ABC):
    """A checkpoint, open for reading from any number of threads.

    uri: what the recipe calls its place. at: that place. store: where its side files are. config: the parsed
    `config.json`, empty if there is none. tensors: by name, file by file in the order of their bytes. files: the
    weight files, by name. indexed: whether an index names them. unread: weight files that the index leaves out.
    naming: how its names differ from the stored ones. is_checked: False of a patch that does not say which model it is
    for. same: of a plane of a skill, the quantized tensors that it has no update of; None of anything else.
    trained_on: of an adapter, the model that it says it was trained on. rearranged: tensors with other elements than
    are stored, in the order of another model's rows. fixed: runs of elements (first, last) that an output takes as they
    are, whatever its formula: they are the same in all of its models.

    A kind says how tensors are read; what it does not say here is true of one whose weight files are its store's.
    """

    naming = Naming()
    is_checked = True
    same: frozenset[str] | None = None
    rearranged: frozenset[str] = frozenset()
    fixed: Mapping[str, Sequence[tuple[int, int]]] = MappingProxyType({})
    trained_on: str | None = None

    def __init__(
        self,
        uri: str,
        at: Where,
        store: Store,
        config: Mapping[str, Any],
        tensors: Mapping[str, TensorSpec],
        files: Mapping[str, WeightFile],
        *,
        indexed: bool = True,
        unread: Sequence[str] = (),
    ) -> None:
        self.uri, self.at, self.store, self.config = uri, at, store, config
        self.tensors, self.files, self.indexed, self.unread = tensors, files, indexed, tuple(unread)

    @property
    def place(self) -> str:
        """Its name in messages."""
        return self.at.place

    @property
    def own(self) -> Checkpoint:
        """The checkpoint of the files that lie at its place: another one for what is put onto a model."""
        return self

    @abstractmethod
    def read(self, pieces: Sequence[Piece]) -> Wait:
        """Begin to put elements where they belong, in native byte order; what is wanted together is asked together.

        Pieces whose bytes follow each other in a file and in a buffer may be fetched as one. Raises InputError,
        StalePlan, TemporaryError, as the Wait does.
        """

    @abstractmethod
    def hint(self, tensor: str, first: int, count: int) -> None:
        """Elements that will be read soon."""

    def cost(self, tensor: str) -> int:
        """Return how many bytes of its files a tensor takes."""
        return self.tensors[tensor].nbytes

    def written_dtype(self, tensor: str) -> str:
        """Return the dtype that an output like this one has for a tensor. It differs from the tensor's own where that
        is computed from what is stored in another one."""
        return self.tensors[tensor].dtype

    def costs(self, tensor: str) -> Mapping[str, int]:
        """Return the same by file: those that a tensor comes from."""
        return {self.tensors[tensor].file: self.cost(tensor)}

    def stated(self, file: str) -> tuple[int, tuple[str, str]] | None:
        """Size and digest of one of its files, weights or not, as its store states them; None if it does not."""
        known = self.files.get(file) or self.store.list()[file]
        return (known.size, known.digest) if known.digest is not None else None

    def sha256(self, file: str, stop: threading.Event | None = None) -> str:
        """Return the sha256 of a weight file; of no use where `stop` was set meanwhile. Raises InputError if it is
        not the one that is stated."""
        digest, size, stated = hashlib.sha256(), self.files[file].size, self.files[file].digest
        buffer = memoryview(bytearray(min(size, _PIECE)))
        for position in range(0, size, _PIECE):
            if stop is not None and stop.is_set():
                return ""
            piece = buffer[: min(_PIECE, size - position)]
            self.store.read(file, position, piece)()
            digest.update(piece)
        found = ("sha256", digest.hexdigest())
        if stated is not None and stated[0] == "sha256" and stated != found:
            raise InputError(
                f"{self.store.at.path(file)}: does not have the sha256 that the Hub states",
                fix="it is damaged: report it",
            )
        return found[1]

    def check_unchanged(self, files: Collection[str] | None = None) -> None:
        """Raise StalePlan if a weight file is no longer the one that was opened."""
        self.store.check_unchanged(sorted(self.files if files is None else files))

    def cancel(self) -> None:
        """Give up waiting: what is being read is no longer wanted."""
        self.store.cancel()

    def close(self) -> None:
        self.store.close()

    def view(self, piece: Piece) -> memoryview:
        """Return the bytes that a piece goes to."""
        nbytes = piece.count * DTYPES[self.tensors[piece.tensor].dtype].itemsize
        return piece.buffer[piece.start : piece.start + nbytes]


class View(Checkpoint):
    """A checkpoint seen in another way: what a view does not say itself, the checkpoint beneath is asked."""

    def __init__(
        self, checkpoint: Checkpoint, tensors: Mapping[str, TensorSpec], files: Mapping[str, WeightFile]
    ) -> None:
        super().__init__(checkpoint.uri, checkpoint.at, checkpoint.store, checkpoint.config, tensors, files,
                         indexed=checkpoint.indexed, unread=checkpoint.unread)  # fmt: skip
        self.naming, self.same, self.is_checked = checkpoint.naming, checkpoint.same, checkpoint.is_checked
        self.trained_on = checkpoint.trained_on
        self.rearranged, self.fixed = checkpoint.rearranged, checkpoint.fixed
        self._checkpoint = checkpoint

    @property
    def beneath(self) -> Checkpoint:
        """The checkpoint that is seen."""
        return self._checkpoint

    @property
    def own(self) -> Checkpoint:
        return self._checkpoint.own

    def written_dtype(self, tensor: str) -> str:
        known = tensor in self._checkpoint.tensors
        return self._checkpoint.written_dtype(tensor) if known else super().written_dtype(tensor)

    def costs(self, tensor: str) -> Mapping[str, int]:
        return self._checkpoint.costs(tensor)

    def sha256(self, file: str, stop: threading.Event | None = None) -> str:
        return self._checkpoint.sha256(file, stop)

    def check_unchanged(self, files: Collection[str] | None = None) -> None:
        self._checkpoint.check_unchanged(files)

    def cancel(self) -> None:
        self._checkpoint.cancel()

    def close(self) -> None:
        self._checkpoint.close()


@dataclass(frozen=True, slots=True)
class Difference:
    """Two checkpoints of the same tensors, one minus the other: what a stored skill is."""

    plus: Checkpoint
    minus: Checkpoint


def named(name: str, opened: Checkpoint | Difference) -> dict[str, Checkpoint]:
    """Return the checkpoints of a recipe's model, by the names that plans call them by."""
    if isinstance(opened, Checkpoint):
        return {name: opened}
    return {name: opened.plus, minus_of(name): opened.minus}


class Kind(Protocol):
    """A way to store weights: a module in `kinds/`, and a line in its table.

    WORD: what a recipe calls the place: `model`, `skill`, `patch` or `adapter`. NOUN: what messages call it. WRITTEN:
    how to write it in a recipe, with `{uri}`.
    """

    @property
    def WORD(self) -> str: ...
    @property
    def NOUN(self) -> str: ...
    @property
    def WRITTEN(self) -> str: ...

    def claims(self, store: Store) -> bool:
        """Return whether a store holds weights of this kind, by its files' names or what a small one of them says."""

    def open(self, uri: str, store: Store, onto: Checkpoint | None) -> Checkpoint | Difference:
        """Open what is in a store. onto: the model that a patch is for.

        Raises InputError if it is missing, unsafe, damaged, or not of this kind.
        """


def read_bytes(checkpoint: Checkpoint, tensor: str, first: int = 0, count: int | None = None) -> bytearray:
    """Return elements of a tensor, by default all of them, as bytes."""
    spec = checkpoint.tensors[tensor]
    count = spec.elements - first if count is None else count
    content = bytearray(count * DTYPES[spec.dtype].itemsize)
    checkpoint.read([Piece(tensor, first, count, memoryview(content))])()
    return content


def versions(checkpoints: Mapping[str, Checkpoint]) -> dict[str, dict[str, list[int | str]]]:
    """Return the version of each weight file, which shows later whether it has changed: model -> file -> version."""
    return {
        name: {file: list(item.version) for file, item in checkpoint.files.items()}
        for name, checkpoint in checkpoints.items()
    }


def sha256_as_read(checkpoint: Checkpoint, file: str, described: bytes, stop: threading.Event | None = None) -> str:
    """Return the digest of a file's tensors as they are read, behind `described`; of no use where `stop` was set
    meanwhile."""
    digest = hashlib.sha256(described)
    for name in checkpoint.files[file].tensors:
        elements = checkpoint.tensors[name].elements
        for first in range(0, elements, UNIT):
            if stop is not None and stop.is_set():
                return ""
            digest.update(read_bytes(checkpoint, name, first, min(UNIT, elements - first)))
    return digest.hexdigest()


def in_shards(sizes: Mapping[str, int], limit: int) -> list[tuple[str, list[str]]]:
    """Return the files that hold these tensors in their order, each with at most `limit` bytes or one tensor."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, nbytes in sizes.items():
        if groups[-1] and filled + nbytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += nbytes
    if len(groups) == 1:
        return [(SINGLE_FILE, groups[0])]
    return [(f"model-{number:05d}-of-{len(groups):05d}.safetensors", names) for number, names in enumerate(groups, 1)]
