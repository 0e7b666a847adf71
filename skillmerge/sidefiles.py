"""The files of a model that hold no weights: which are carried from the donor, and the one edit ever made.

Carried byte for byte: config, generation config, tokenizer, templates, processor, licence. Left behind: code,
pickles, optimiser state, logs, and model cards that describe another model. The only edit is the dtype in
`config.json`, where the output's dtype differs from the donor's.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from skillmerge.checkpoints.folder import Checkpoint, resolve_inside
from skillmerge.errors import InputError, some
from skillmerge.tensors import TensorSpec

_CARRIED = (
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.tiktoken",
    "*.spm",
    "*.bpe",
    "LICENSE*",
    "NOTICE*",
    "LICENCE*",
)
_LEFT = (
    "*.safetensors.index.json",
    "*.bin.index.json",
    "skillmerge.*",
    "trainer_state.json",
    "training_args*",
    "*_results.json",
    "adapter_config.json",
    "args.json",
    "requirements*.txt",
    "latest*",
    "events.*",
    "quantize_config.json",
    ".*",
)
_FOLDERS_LEFT = (
    "checkpoint-*",
    "runs",
    "wandb",
    "original",
    "global_step*",
    "onnx",
    "openvino",
    "gguf",
    ".*",
)
_MAX_BYTES = 128 << 20
_NO_NAME = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
_AUTO_MAP = re.compile(rb"auto_map|\\u00(61|75|74|6[fF]|5[fF]|6[dD]|70)")
"""The key, or an escape that could spell a letter of it."""

_DTYPE_KEY = re.compile(rb'("(?:torch_)?dtype"\s*:\s*")(bfloat16|float16|float32|float64)(")')


@dataclass(frozen=True, slots=True)
class SideFile:
    """A side file of the output: its name (with `/` where it lies in a subfolder), bytes and digest."""

    name: str
    content: bytes
    sha256: str

    @property
    def size(self) -> int:
        return len(self.content)


def collect(donor: Checkpoint, dtype: str | None, allow_code: bool) -> tuple[SideFile, ...]:
    """The side files that the output takes from its donor. `dtype` is the new dtype for `config.json`, or None.

    Raises InputError for a config that runs code on loading (`auto_map`), unless `allow_code`.
    """
    files = []
    for name in sorted(_walk(donor.root, allow_code)):
        if _NO_NAME.search(name):
            raise InputError(f"{donor.root}: the file name {name!r} is not text", fix="rename that file")
        path = resolve_inside(donor.root, name, donor.follow_links)
        if not path.is_file():
            raise InputError(f"{donor.root / name}: is not a plain file", fix="replace it, or move it away")
        if path.stat().st_size > _MAX_BYTES:
            raise InputError(f"{donor.root / name}: is larger than any side file should be")
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InputError(f"{donor.root / name}: cannot be read: {error.strerror}") from error
        if name.endswith(".json") and not allow_code:
            _refuse_code(donor.root / name, content)
        if name == "config.json" and dtype is not None:
            content = with_dtype(content, dtype)
        files.append(SideFile(name, content, hashlib.sha256(content).hexdigest()))
    return tuple(files)


def with_dtype(config: bytes, dtype: str) -> bytes:
    """`config.json` with its dtype keys set to `dtype` and every other byte as it was."""
    return _DTYPE_KEY.sub(rb"\g<1>" + dtype.encode() + rb"\g<3>", config)


def index_bytes(specs: dict[str, list[TensorSpec]]) -> bytes:
    """`model.safetensors.index.json` for shards -> tensors, in the form that transformers writes."""
    weight_map = {spec.name: shard for shard, tensors in specs.items() for spec in tensors}
    total = sum(spec.nbytes for tensors in specs.values() for spec in tensors)
    document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(document, indent=2) + "\n").encode()


def _walk(root: Path, allow_code: bool) -> list[str]:
    carried = (*_CARRIED, "*.py") if allow_code else _CARRIED
    names = []
    for folder, folders, files in os.walk(root):
        inside = os.path.relpath(folder, root)
        depth = 0 if inside == "." else inside.count(os.sep) + 1
        folders[:] = sorted(
            name for name in folders if depth < 2 and not any(fnmatchcase(name, glob) for glob in _FOLDERS_LEFT)
        )
        if depth and any(name.endswith(".safetensors") for name in files):
            folders.clear()  # a model of its own, not a part of this one
            continue
        for name in files:
            if any(fnmatchcase(name, glob) for glob in _LEFT) or not any(fnmatchcase(name, glob) for glob in carried):
                continue
            names.append(name if inside == "." else f"{inside}/{name}".replace(os.sep, "/"))
    return names


def _refuse_code(path: Path, content: bytes) -> None:
    if not _AUTO_MAP.search(content):
        return
    try:
        found = _auto_maps(json.loads(content))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not valid JSON: {error}") from error
    if found:
        raise InputError(
            f"{path}: has `auto_map`, which runs code on loading: {some(found)}",
            fix="if you trust that code, allow it with --allow-code; *.py files are then carried too",
        )


def _auto_maps(document: Any) -> list[str]:
    if not isinstance(document, dict):
        return []
    entry = document.get("auto_map")
    here = [str(value) for value in entry.values()] if isinstance(entry, dict) else [str(entry)] if entry else []
    return here + [name for value in document.values() for name in _auto_maps(value)]
