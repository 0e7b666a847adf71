"""A checkpoint, wherever it lies: its tensors, its config, and byte ranges on demand.

Knows what makes a set of files a checkpoint: one weight file, or an index and its shards, which agree both
ways. Where the files are and how their bytes are got is the business of a `Files`: a folder, a repository.
Everything they say is checked before it is believed. Pickles are never opened.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from skillmerge.checkpoints.safetensors_header import Header, printable, refuse_bulk, unique_keys
from skillmerge.errors import InputError, some
from skillmerge.tensors import TensorSpec

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PATCH_FILE = "delta_metadata.json"
"""What a sparse patch has beside its places and values, and no model."""

MAX_JSON_BYTES = 32_000_000
"""Room for an index of 300,000 tensors."""

_MAX_JSON_NESTING = 50
_PIECE = 16 << 20
_SHARD_NAME = re.compile(r"[^/\\\x00-\x1f\x7f\ud800-\udfff]{1,243}\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Files(Protocol):
    """The files of one checkpoint, by name; a name has `/` in it where the file lies in a subfolder.

    place: what to call them in messages. root: the local folder, or None. revision: the commit, or None where
    there are no versions. remote: whether reading goes over a network. license: what the model card says it is.
    """

    @property
    def place(self) -> str: ...
    @property
    def root(self) -> Path | None: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def remote(self) -> bool: ...
    @property
    def license(self) -> str | None: ...

    def names(self) -> list[str]:
        """Every file, sorted. Raises InputError where there is no such place."""

    def path(self, name: str) -> str:
        """What to call one file in messages."""

    def read(self, name: str, limit: int) -> bytes:
        """A small file, whole. Raises InputError where it is missing, unsafe or larger than `limit`."""

    def headers(self, names: Sequence[str], sizes: Mapping[str, int]) -> list[Header]:
        """The headers of weight files, `sizes` being how many bytes each is likely to have at most.

        Raises InputError where one is missing, unsafe or damaged.
        """

    def begin(self, name: str, position: int, buffer: memoryview) -> Callable[[], None]:
        """Begin to fill `buffer` with a weight file's bytes from `position` on; call the result to wait.

        Either may raise InputError, StalePlan, TemporaryError.
        """

    def announce(self, name: str, position: int, nbytes: int) -> None:
        """Bytes that will be read soon."""

    def version(self, name: str) -> list[int | str]:
        """What tells a weight file from another version of it."""

    def known_digest(self, name: str) -> tuple[int, tuple[str, str]] | None:
        """Size and digest (`sha256` or `git_sha1`, hex digits) of a file as whoever keeps it states them, or None
        where it has to be read."""

    def check_unchanged(self, names: Sequence[str]) -> None:
        """Raise StalePlan where a weight file is no longer the one whose header was read."""

    def cancel(self) -> None:
        """Give up waiting: what is being read is no longer wanted."""

    def close(self) -> None: ...


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


def read_json_object(files: Files, name: str, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint, read strictly. Raises InputError."""
    content, path = files.read(name, limit), files.path(name)
    try:
        refuse_bulk(content, limit)
        document = json.loads(content.decode("utf-8"), object_pairs_hook=unique_keys)
    except RecursionError as error:
        raise InputError(f"{path}: is nested too deeply") from error
    except ValueError as error:
        raise InputError(f"{path}: is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise InputError(f"{path}: is not a JSON object")
    if _nests_deeper(document, _MAX_JSON_NESTING):
        raise InputError(f"{path}: is nested too deeply")
    return document


def digest_of(kind: str, content: bytes | bytearray) -> tuple[str, str]:
    """The digest of a file's content. git_sha1 is the name that git gives to a file with that content."""
    if kind == "git_sha1":
        return kind, hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    return kind, hashlib.sha256(content).hexdigest()


def _nests_deeper(document: Any, limit: int) -> bool:
    level = [document]
    for _ in range(limit):
        level = [
            inner
            for item in level
            if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
    return bool(level)


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
