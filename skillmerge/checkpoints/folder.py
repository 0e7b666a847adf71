"""A checkpoint on local disk: its tensors, its config, its side files, and byte ranges on demand.

Everything that a folder says is checked before it is believed: names stay inside the folder, links do not
lead out (but for the Hub cache's own layout), index and headers agree both ways. Weights are only ever read
with `preadv` into buffers that the caller owns; nothing is mapped. Pickles are never opened.
"""

from __future__ import annotations

import errno
import json
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skillmerge.checkpoints.safetensors_header import (
    FileIdentity,
    Header,
    printable,
    read_header,
    unique_keys,
)
from skillmerge.errors import InputError, ResourceError, StalePlan, some
from skillmerge.tensors import TensorSpec

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_MAX_JSON_BYTES = 32_000_000
"""Room for an index of 300,000 tensors."""

_MAX_JSON_NESTING = 50
_SHARD_NAME = re.compile(r"[^/\\\x00-\x1f\x7f\ud800-\udfff]{1,243}\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(slots=True)
class Checkpoint:
    """A checkpoint folder, open for reading.

    `tensors` maps names to specs, shard by shard in the order of their bytes; `config` is the parsed
    `config.json` (empty where there is none); `unread` names the weight files that the index leaves out.
    """

    uri: str
    root: Path
    tensors: dict[str, TensorSpec]
    shards: dict[str, Header]
    indexed: bool
    config: dict[str, Any]
    unread: tuple[str, ...]
    follow_links: bool
    _descriptors: dict[str, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def read_into(self, spec: TensorSpec, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the tensor's bytes from byte `start` on."""
        descriptor = self._descriptors.get(spec.file)
        if descriptor is None:
            descriptor = self._open(spec.file)
        position = spec.start + start
        while buffer:
            try:
                count = os.preadv(descriptor, [buffer], position)
            except OSError as error:
                raise InputError(f"{self.root / spec.file}: cannot be read: {error.strerror}") from error
            if count == 0:
                raise self._changed(spec.file)
            position += count
            buffer = buffer[count:]

    def announce(self, spec: TensorSpec, start: int, nbytes: int) -> None:
        """Tell the system that `nbytes` of the tensor from byte `start` on will be read soon."""
        descriptor = self._descriptors.get(spec.file)
        if descriptor is None:
            descriptor = self._open(spec.file)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, spec.start + start, nbytes, os.POSIX_FADV_WILLNEED)

    def check_unchanged(self, files: set[str] | None = None) -> None:
        """Raise StalePlan where a shard is no longer the file whose header was read."""
        for file in self.shards if files is None else sorted(files):
            try:
                identity = FileIdentity.of((self.root / file).stat())
            except OSError:
                identity = None
            if identity != self.shards[file].identity:
                raise self._changed(file)

    def close(self) -> None:
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def _open(self, file: str) -> int:
        with self._lock:
            if file not in self._descriptors:
                try:
                    descriptor = os.open(self.root / file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
                except OSError as error:
                    if error.errno in (errno.EMFILE, errno.ENFILE):
                        raise ResourceError(
                            f"{self.root / file}: too many files are open", fix="raise the limit: ulimit -n 4096"
                        ) from error
                    raise self._changed(file) from error
                if FileIdentity.of(os.fstat(descriptor)) != self.shards[file].identity:
                    os.close(descriptor)
                    raise self._changed(file)
                self._descriptors[file] = descriptor
            return self._descriptors[file]

    def _changed(self, file: str) -> StalePlan:
        return StalePlan(
            f"{self.root / file} changed while it was in use",
            fix="make sure that nothing writes to the inputs, then run the same command again",
        )


def open_folder(uri: str, root: Path, *, follow_links: bool = False) -> Checkpoint:
    """Open the checkpoint in folder `root` (named `uri` in messages and in the manifest).

    Raises InputError where it is missing, unsafe, damaged, or not a safetensors checkpoint.
    """
    weights = _weight_files(root)
    index = _read_index(root, follow_links)
    if index is None:
        files = [_the_only_file(root, weights)]
    else:
        if SINGLE_FILE in weights and SINGLE_FILE not in index.values():
            raise InputError(
                f"{root} has both {SINGLE_FILE} and {INDEX_FILE}, which does not name it",
                fix="it is unclear which of the two is the model: move one away",
            )
        files = sorted(set(index.values()))
    for file in files:
        resolve_inside(root, file, follow_links)
    with ThreadPoolExecutor(min(8, len(files))) as pool:
        headers = dict(zip(files, pool.map(lambda file: read_header(str(root / file), file), files), strict=True))
    tensors = _collect(root, headers)
    if index is not None:
        _compare_index(root, index, tensors)
    if not tensors:
        raise InputError(f"{root} holds no tensors")
    return Checkpoint(
        uri=uri,
        root=root,
        tensors=tensors,
        shards=headers,
        indexed=index is not None,
        config=read_json_object(root, "config.json", follow_links) if os.path.lexists(root / "config.json") else {},
        unread=tuple(name for name in weights if name not in headers),
        follow_links=follow_links,
    )


def resolve_inside(root: Path, name: str, follow_links: bool) -> Path:
    """The path of `name` in `root`, with every link followed. Raises InputError where it leads out.

    The Hub cache's layout is allowed: `snapshots/<commit>/…` pointing to `blobs/…` of the same repository.
    """
    path = root / name
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"{path}: is missing or a broken link", fix="the checkpoint is incomplete: fetch it again"
        ) from error
    home = root.resolve()
    if follow_links or target.is_relative_to(home):
        return target
    for folder in (home, *home.parents):
        if folder.parent.name == "snapshots" and target.parent == folder.parent.parent / "blobs":
            return target
    raise InputError(
        f"{path}: is a link that leaves its folder, to {target}",
        fix="if you trust it, allow it with --follow-links",
    )


def read_json_object(root: Path, name: str, follow_links: bool) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint, read strictly. Raises InputError."""
    path = resolve_inside(root, name, follow_links)
    try:
        if not path.is_file() or path.stat().st_size > _MAX_JSON_BYTES:
            raise InputError(f"{root / name}: is not a file of sane size")
        document = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=unique_keys)
    except RecursionError as error:
        raise InputError(f"{root / name}: is nested too deeply") from error
    except (ValueError, OSError) as error:
        raise InputError(f"{root / name}: is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise InputError(f"{root / name}: is not a JSON object")
    if _nests_deeper(document, _MAX_JSON_NESTING):
        raise InputError(f"{root / name}: is nested too deeply")
    return document


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


def _weight_files(root: Path) -> list[str]:
    """The names in `root` that end in .safetensors, sorted."""
    try:
        names = sorted(path.name for path in root.iterdir() if path.name.endswith(".safetensors"))
    except OSError as error:
        what = {errno.ENOENT: "does not exist", errno.ENOTDIR: "is not a folder"}.get(error.errno or 0)
        raise InputError(
            f"{root} {what or f'cannot be opened: {error.strerror}'}",
            fix="a model is a folder with *.safetensors and config.json",
        ) from error
    for name in names:
        if not _SHARD_NAME.fullmatch(name):
            raise InputError(f"{root}: {name!r} is not a name that a weight file can have")
    return names


def _read_index(root: Path, follow_links: bool) -> dict[str, str] | None:
    """The index's weight map, or None where there is no index."""
    if not os.path.lexists(root / INDEX_FILE):
        return None
    path = root / INDEX_FILE
    weight_map = read_json_object(root, INDEX_FILE, follow_links).get("weight_map")
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


def _the_only_file(root: Path, weights: list[str]) -> str:
    if SINGLE_FILE in weights:
        return SINGLE_FILE
    if weights in ([], ["adapter_model.safetensors"]) and (root / "adapter_config.json").exists():
        raise InputError(
            f"{root} is a PEFT adapter, not a whole model",
            fix="merge the adapter into its base first (peft: merge_and_unload), then name that folder",
        )
    if len(weights) == 1:
        return weights[0]
    if weights:
        raise InputError(
            f"{root} has {len(weights)} *.safetensors files but no {INDEX_FILE}: {some(weights)}",
            fix="the checkpoint is incomplete: fetch its index too",
        )
    pickles = sorted(path.name for path in root.iterdir() if path.name.endswith(_PICKLES))
    if pickles:
        raise InputError(
            f"{root} has no *.safetensors, only {some(pickles)}",
            fix="pickles can run code and are never loaded: save the model with save_pretrained first",
        )
    inner = sorted(path.name for path in root.iterdir() if _has_weights(path))
    raise InputError(
        f"{root} has no *.safetensors",
        fix=f"did you mean one of its folders: {some(inner)}?" if inner else "name a folder that holds a model",
    )


def _has_weights(folder: Path) -> bool:
    try:
        return any(path.name.endswith(".safetensors") for path in folder.iterdir())
    except OSError:
        return False


def _collect(root: Path, headers: dict[str, Header]) -> dict[str, TensorSpec]:
    tensors: dict[str, TensorSpec] = {}
    for header in headers.values():
        for spec in header.tensors:
            other = tensors.setdefault(spec.name, spec)
            if other is not spec:
                raise InputError(f"{root}: tensor `{spec.name}` is in both {other.file} and {spec.file}")
    return tensors


def _compare_index(root: Path, index: dict[str, str], tensors: dict[str, TensorSpec]) -> None:
    missing = sorted(name for name, file in index.items() if name not in tensors or tensors[name].file != file)
    if missing:
        raise InputError(f"{root}: {INDEX_FILE} names tensors that their shards lack: {some(missing)}")
    extra = sorted(tensors.keys() - index.keys())
    if extra:
        raise InputError(f"{root}: shards hold tensors that {INDEX_FILE} does not name: {some(extra)}")
