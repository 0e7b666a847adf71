"""Plain weights: every tensor is a run of bytes in a safetensors file, and an index may name the files.

Everything that index and headers say is checked before it is believed, and they must agree both ways.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from skillmerge.checkpoints.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint, Piece, WeightFile
from skillmerge.checkpoints.safetensors import Header, printable
from skillmerge.checkpoints.store import Store, Wait, all_of, read_headers, read_json_object
from skillmerge.errors import InputError, some
from skillmerge.tensors import DTYPES, StoredTensor

WORD, NOUN, WRITTEN = "model", "a model", "{uri}"
_SHARD_OF = re.compile(r"(.*?)(\d+)-of-(\d+)\.safetensors")
_SHARD_NAME = re.compile(r"[^/\\\x00-\x1f\x7f\ud800-\udfff]{1,243}\.safetensors")


def claims(store: Store) -> bool:
    """Return whether there is an index, a file of the usual name, or just one weight file which is not an adapter's."""
    files = store.list()
    weights = weight_names(files)
    adapter = weights == ["adapter_model.safetensors"] and "adapter_config.json" in files
    return INDEX_FILE in files or SINGLE_FILE in weights or (len(weights) == 1 and not adapter)


def weight_names(files: Collection[str]) -> list[str]:
    return [name for name in files if name.endswith(".safetensors") and "/" not in name]


def check_weight_names(store: Store) -> None:
    for name in weight_names(store.list()):
        if not _SHARD_NAME.fullmatch(name):
            raise InputError(f"{store.at.place}: {name!r} is not a name that a weight file can have")


def missing_shards(files: Collection[str]) -> str | None:
    """Return which parts are missing by the names of the others, such as `shard 2 of 2`; None if none are.

    Names say how many parts there are: `model-00001-of-00002.safetensors`.
    """
    parts: dict[tuple[str, str], set[int]] = {}
    for match in map(_SHARD_OF.fullmatch, files):
        if match is not None:
            parts.setdefault((match[1], match[3]), set()).add(int(match[2]))
    for (_, of), found in parts.items():
        first = 0 if 0 in found else 1
        if len(of) < 7 and (missing := [str(part) for part in range(first, int(of) + first) if part not in found]):
            return f"shard{'s' if len(missing) > 1 else ''} {some(missing)} of {int(of)}"
    return None


def open(uri: str, store: Store, onto: Checkpoint | None = None) -> Checkpoint:
    """Open a model. Raises InputError if it is missing, unsafe or damaged."""
    files, place = store.list(), store.at.place
    check_weight_names(store)
    weights = weight_names(files)
    index = read_index(store) if INDEX_FILE in files else None
    if index is None:
        shards = [SINGLE_FILE if SINGLE_FILE in weights else weights[0]]
        if (missing := missing_shards(shards)) is not None:
            verb = "are" if missing.startswith("shards") else "is"
            raise InputError(
                f"{place}: {missing} {verb} missing: only {shards[0]} is there",
                fix=f"the checkpoint is incomplete: fetch it again, with {INDEX_FILE}",
            )
    else:
        if SINGLE_FILE in weights and SINGLE_FILE not in index.values():
            raise InputError(
                f"{place} has both {SINGLE_FILE} and {INDEX_FILE}, which does not name it",
                fix="move one of them away, so that it is clear which is the model",
            )
        shards = sorted(set(index.values()))
    headers = read_headers(store, shards, _header_sizes(shards, index))
    tensors = _collect(place, headers, index)
    if index is not None:
        _compare_index(place, index, tensors)
    if not tensors:
        raise InputError(f"{place} holds no tensors")
    return Dense(
        uri,
        store.at,
        store,
        read_json_object(store, "config.json") if "config.json" in files else {},
        tensors,
        {file: WeightFile.of(header, files[file]) for file, header in headers.items()},
        indexed=index is not None,
        unread=[name for name in weights if name not in headers],
    )


@dataclass(slots=True)
class _Range:
    """A stretch of one file that is read in one go into a stretch of one buffer."""

    file: str
    position: int
    buffer: memoryview
    start: int
    nbytes: int

    def goes_on(self, file: str, position: int, start: int) -> bool:
        return (self.file, self.position + self.nbytes, self.start + self.nbytes) == (file, position, start)


class Dense(Checkpoint):
    """Tensors whose bytes are read straight into the caller's buffers, neighbors in one go."""

    tensors: Mapping[str, StoredTensor]

    def read(self, pieces: Sequence[Piece]) -> Wait:
        ranges: list[_Range] = []
        latest: dict[int, _Range] = {}
        for piece in pieces:
            spec, buffer = self.tensors[piece.tensor], id(piece.buffer)
            itemsize = DTYPES[spec.dtype].itemsize
            position, nbytes = spec.start + piece.first * itemsize, piece.count * itemsize
            before = latest.get(buffer)
            if before is not None and before.goes_on(spec.file, position, piece.start):
                before.nbytes += nbytes
            elif nbytes:
                latest[buffer] = _Range(spec.file, position, piece.buffer, piece.start, nbytes)
                ranges.append(latest[buffer])
        return all_of(
            [self.store.read(it.file, it.position, it.buffer[it.start : it.start + it.nbytes]) for it in ranges]
        )

    def hint(self, tensor: str, first: int, count: int) -> None:
        spec = self.tensors[tensor]
        itemsize = DTYPES[spec.dtype].itemsize
        self.store.hint(spec.file, spec.start + first * itemsize, count * itemsize)


def read_index(store: Store) -> dict[str, str]:
    """Return the index's weight map."""
    path = store.at.path(INDEX_FILE)
    weight_map = read_json_object(store, INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path}: has no `weight_map` table")
    for tensor, file in weight_map.items():
        if not printable(tensor):
            raise InputError(f"{path}: names a tensor that no file can hold: {tensor[:80]!r}")
        if not isinstance(file, str) or not _SHARD_NAME.fullmatch(file):
            raise InputError(
                f"{path}: places tensor `{tensor}` in {str(file)[:80]!r}; only names of *.safetensors files "
                "in the same folder are allowed"
            )
    return weight_map


def _header_sizes(shards: Sequence[str], index: Mapping[str, str] | None) -> dict[str, int]:
    """Return how large headers are likely to be, padding included: an entry has about 100 bytes beside its name."""
    if index is None:
        return dict.fromkeys(shards, 1 << 17)
    sizes = dict.fromkeys(shards, 4096)
    for tensor, file in index.items():
        sizes[file] += 140 + len(tensor.encode())
    return sizes


def _collect(
    place: str, headers: Mapping[str, Header], index: Mapping[str, str] | None = None
) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for header in headers.values():
        for spec in header.tensors:
            other = tensors.setdefault(spec.name, spec)
            if other is not spec:
                named = (index or {}).get(spec.name)
                left = next((it.file for it in (other, spec) if named is not None and it.file != named), None)
                told = f"the index names {named}: {left} is probably left over from another save; " if left else ""
                raise InputError(
                    f"{place}: tensor `{spec.name}` is in both {other.file} and {spec.file}",
                    fix=f"{told}save the model again into an empty folder (`save_pretrained`), or fetch it again",
                )
    return tensors


def _compare_index(place: str, index: Mapping[str, str], tensors: Mapping[str, StoredTensor]) -> None:
    missing = sorted(name for name, file in index.items() if name not in tensors or tensors[name].file != file)
    if missing:
        raise InputError(
            f"{place}: {INDEX_FILE} names tensors that their shards lack: {some(missing)}",
            fix="index and shards are of different saves: fetch them again, or save the model again",
        )
    extra = sorted(tensors.keys() - index.keys())
    if extra:
        raise InputError(
            f"{place}: shards hold tensors that {INDEX_FILE} does not name: {some(extra)}",
            fix="index and shards are of different saves: fetch them again, or save the model again",
        )
