"""A checkpoint, wherever it lies: its tensors, its config, and byte ranges on demand.

Knows what makes a set of files a checkpoint: one weight file, or an index and its shards, which agree both
ways. Where the files are and how their bytes are got is the business of a `Files`: a folder, a repository.
Everything they say is checked before it is believed. Pickles are never opened.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from skillmerge.checkpoints.safetensors import Header, printable
from skillmerge.checkpoints.store import Files, read_json_object
from skillmerge.errors import InputError, some
from skillmerge.tensors import TensorSpec

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PATCH_FILE = "delta_metadata.json"
"""What a sparse patch has beside its places and values, and no model."""
_PIECE = 16 << 20
_SHARD_NAME = re.compile(r"[^/\\\x00-\x1f\x7f\ud800-\udfff]{1,243}\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A checkpoint, open for reading.

    `names` are all of its files; `tensors` maps names to specs, shard by shard in the order of their bytes;
    `config` is the parsed `config.json` (empty where there is none); `unread` names the weight files that the
    index leaves out. Where `files` decode what is stored, `stored` are the files as they are, and `sizes` how
    many bytes of them each tensor takes.
    """

    uri: str
    files: Files
    names: tuple[str, ...]
    tensors: dict[str, TensorSpec]
    shards: dict[str, Header]
    indexed: bool
    config: dict[str, Any]
    unread: tuple[str, ...]
    stored: Files | None = None
    sizes: Mapping[str, int] | None = None

    @property
    def place(self) -> str:
        return self.files.place

    def read_into(self, spec: TensorSpec, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the tensor's bytes from byte `start` on."""
        self.files.begin(spec.file, spec.start + start, buffer)()

    def bytes_of(self, tensor: str) -> int:
        """How many bytes of the files a tensor takes."""
        return self.tensors[tensor].nbytes if self.sizes is None else self.sizes[tensor]

    def sha256(self, file: str, stop: threading.Event | None = None) -> str:
        """The sha256 of a weight file. Raises InputError where it is not the one that the Hub states."""
        digest, size = hashlib.sha256(), self.shards[file].size
        buffer = memoryview(bytearray(min(size, _PIECE)))
        for position in range(0, size, _PIECE):
            if stop is not None and stop.is_set():
                return ""
            piece = buffer[: min(_PIECE, size - position)]
            (self.stored or self.files).begin(file, position, piece)()
            digest.update(piece)
        found, known = ("sha256", digest.hexdigest()), self.files.known_digest(file)
        if known is not None and known[1][0] == "sha256" and known[1] != found:
            raise InputError(
                f"{self.files.path(file)}: does not have the sha256 that the Hub states", fix="it is damaged: report it"
            )
        return found[1]

    def check_unchanged(self, files: set[str] | None = None) -> None:
        """Raise StalePlan where a shard is no longer the file whose header was read."""
        self.files.check_unchanged(sorted(self.shards if files is None else files))

    def close(self) -> None:
        self.files.close()


def open_checkpoint(uri: str, files: Files) -> Checkpoint:
    """Open the checkpoint that `files` are (named `uri` in the manifest).

    Raises InputError where it is missing, unsafe, damaged, or not a safetensors checkpoint.
    """
    names = files.names()
    if "skill.json" in names and INDEX_FILE not in names:
        raise InputError(f"{files.place} is a skill, not a model", fix=f"in a recipe write it as {{skill: {uri}}}")
    if PATCH_FILE in names and INDEX_FILE not in names:
        raise InputError(
            f"{files.place} is a sparse patch, not a model",
            fix=f"in a recipe write it as {{patch: {uri}, onto: MODEL}}",
        )
    weights = _weight_files(files, names)
    index = _read_index(files) if INDEX_FILE in names else None
    if index is None:
        shards = [_the_only_file(files, names, weights)]
    else:
        if SINGLE_FILE in weights and SINGLE_FILE not in index.values():
            raise InputError(
                f"{files.place} has both {SINGLE_FILE} and {INDEX_FILE}, which does not name it",
                fix="it is unclear which of the two is the model: move one away",
            )
        shards = sorted(set(index.values()))
    headers = dict(zip(shards, files.headers(shards, _header_sizes(shards, index)), strict=True))
    tensors = _collect(files, headers)
    if index is not None:
        _compare_index(files, index, tensors)
    if not tensors:
        raise InputError(f"{files.place} holds no tensors")
    return Checkpoint(
        uri=uri,
        files=files,
        names=tuple(names),
        tensors=tensors,
        shards=headers,
        indexed=index is not None,
        config=read_json_object(files, "config.json") if "config.json" in names else {},
        unread=tuple(name for name in weights if name not in headers),
    )


def versions(checkpoints: Mapping[str, Checkpoint]) -> dict[str, dict[str, list[int | str]]]:
    """What tells the weight files of models from changed ones, on this machine: model -> file -> version."""
    return {
        name: {file: checkpoint.files.version(file) for file in checkpoint.shards}
        for name, checkpoint in checkpoints.items()
    }


def _weight_files(files: Files, names: Sequence[str]) -> list[str]:
    weights = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    for name in weights:
        if not _SHARD_NAME.fullmatch(name):
            raise InputError(f"{files.place}: {name!r} is not a name that a weight file can have")
    return weights


def _read_index(files: Files) -> dict[str, str]:
    """The index's weight map."""
    path = files.path(INDEX_FILE)
    weight_map = read_json_object(files, INDEX_FILE).get("weight_map")
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


def _the_only_file(files: Files, names: Sequence[str], weights: list[str]) -> str:
    place = files.place
    if SINGLE_FILE in weights:
        return SINGLE_FILE
    if weights in ([], ["adapter_model.safetensors"]) and "adapter_config.json" in names:
        raise InputError(
            f"{place} is a PEFT adapter, not a whole model",
            fix="merge the adapter into its base first (peft: merge_and_unload), then name that folder",
        )
    if len(weights) == 1:
        return weights[0]
    if weights:
        raise InputError(
            f"{place} has {len(weights)} *.safetensors files but no {INDEX_FILE}: {some(weights)}",
            fix="the checkpoint is incomplete: fetch its index too",
        )
    pickles = [name for name in names if name.endswith(_PICKLES) and "/" not in name]
    if pickles:
        raise InputError(
            f"{place} has no *.safetensors, only {some(pickles)}",
            fix="pickles can run code and are never loaded: save the model with save_pretrained first",
        )
    inner = sorted({name.split("/")[0] for name in names if name.endswith(".safetensors")})
    raise InputError(
        f"{place} has no *.safetensors",
        fix=f"did you mean one of its folders: {some(inner)}?" if inner else "name a folder that holds a model",
    )


def _header_sizes(shards: Sequence[str], index: Mapping[str, str] | None) -> dict[str, int]:
    """How large headers are likely to be, padding included: an entry has about 100 bytes beside its name."""
    if index is None:
        return dict.fromkeys(shards, 1 << 17)
    sizes = dict.fromkeys(shards, 4096)
    for tensor, file in index.items():
        sizes[file] += 140 + len(tensor.encode())
    return sizes


def _collect(files: Files, headers: dict[str, Header]) -> dict[str, TensorSpec]:
    tensors: dict[str, TensorSpec] = {}
    for header in headers.values():
        for spec in header.tensors:
            other = tensors.setdefault(spec.name, spec)
            if other is not spec:
                raise InputError(f"{files.place}: tensor `{spec.name}` is in both {other.file} and {spec.file}")
    return tensors


def _compare_index(files: Files, index: dict[str, str], tensors: dict[str, TensorSpec]) -> None:
    missing = sorted(name for name, file in index.items() if name not in tensors or tensors[name].file != file)
    if missing:
        raise InputError(f"{files.place}: {INDEX_FILE} names tensors that their shards lack: {some(missing)}")
    extra = sorted(tensors.keys() - index.keys())
    if extra:
        raise InputError(f"{files.place}: shards hold tensors that {INDEX_FILE} does not name: {some(extra)}")
