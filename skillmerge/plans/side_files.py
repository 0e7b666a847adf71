"""The files of a model that hold no weights: which are carried from the donor, and the one edit ever made.

Carried byte for byte: config, generation config, tokenizer, templates, processor, license. Left behind: code,
pickles, optimizer state, logs, and model cards that describe another model. The only edit is the dtype in
`config.json`, where the output's dtype differs from the donor's.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.checkpoints.foreign import disguised
from skillmerge.checkpoints.store import digest_of
from skillmerge.errors import InputError, StalePlan, some
from skillmerge.tensors import StoredTensor

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
_CONFIGS = "config.json"
"""How the names of files end that are read for the plan, because they may hold `auto_map`."""

_MAX_BYTES = 128 << 20
_MAX_DEPTH = 2
_NO_NAME = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
_AUTO_MAP = re.compile(rb"auto_map|\\u00(61|75|74|6[fF]|5[fF]|6[dD]|70)")
"""The key, or an escape that could spell a letter of it."""

_DTYPE_KEY = re.compile(rb'("(?:torch_)?dtype"\s*:\s*")(bfloat16|float16|float32|float64)(")')


@dataclass(frozen=True, slots=True)
class SideFile:
    """A side file of the output: its name (with `/` if it is in a subfolder), size and digest.

    digest: (`sha256` or `git_sha1`, hex digits); the second is what the Hub knows of small files. content: the
    bytes, or None if they are still to be fetched from the donor.
    """

    name: str
    size: int
    digest: tuple[str, str]
    content: bytes | None

    @classmethod
    def of(cls, name: str, content: bytes) -> SideFile:
        return cls(name, len(content), ("sha256", hashlib.sha256(content).hexdigest()), content)


def collect(donor: Checkpoint, dtype: str | None, allow_code: bool) -> tuple[SideFile, ...]:
    """Return the side files that the output takes from its donor. `dtype` is the new dtype for `config.json`, or None.

    Raises InputError for a config that runs code on loading (`auto_map`), unless `allow_code`.
    """
    files = []
    for name in _carried(donor.store.list(), allow_code):
        if _NO_NAME.search(name):
            raise InputError(f"{donor.place}: the file name {name!r} is not text", fix="rename that file")
        known = donor.stated(name)
        if known is not None and not name.endswith(_CONFIGS):
            files.append(SideFile(name, *known, content=None))
            continue
        content = _checked(donor, name, allow_code)
        if name == "config.json" and dtype is not None:
            content = with_dtype(content, dtype)
        files.append(SideFile.of(name, content))
    return tuple(files)


def fetch(donor: Checkpoint, files: Iterable[SideFile], allow_code: bool) -> tuple[SideFile, ...]:
    """Return the same files with all of their contents. Raises StalePlan if one is not what was planned with."""
    fetched = []
    for file in files:
        if file.content is None:
            content = _checked(donor, file.name, allow_code)
            if len(content) != file.size or file.digest != digest_of(file.digest[0], content):
                raise StalePlan(f"{donor.store.at.path(file.name)} has changed since the plan was made")
            file = SideFile.of(file.name, content)
        fetched.append(file)
    return tuple(fetched)


def _checked(donor: Checkpoint, name: str, allow_code: bool) -> bytes:
    content = donor.store.read_small(name, _MAX_BYTES)
    if (known := disguised(content[:32], text=True)) is not None:
        raise InputError(f"{donor.store.at.path(name)}: {known[0]}", fix=known[1])
    if name.endswith(".json") and not allow_code:
        _refuse_code(donor.store.at.path(name), content)
    return content


def with_dtype(config: bytes, dtype: str) -> bytes:
    """`config.json` with its dtype keys set to `dtype` and every other byte as it was."""
    return _DTYPE_KEY.sub(rb"\g<1>" + dtype.encode() + rb"\g<3>", config)


def index_bytes(specs: dict[str, list[StoredTensor]]) -> bytes:
    """`model.safetensors.index.json` for shards -> tensors, in the form that transformers writes."""
    weight_map = {spec.name: shard for shard, tensors in specs.items() for spec in tensors}
    total = sum(spec.nbytes for tensors in specs.values() for spec in tensors)
    document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(document, indent=2) + "\n").encode()


def _carried(names: Iterable[str], allow_code: bool) -> list[str]:
    """Return the names of side files among all of a checkpoint's."""
    names = list(names)
    carried = (*_CARRIED, "*.py") if allow_code else _CARRIED
    # A folder with weights is a model of its own, not a part of this one.
    models = {name.rpartition("/")[0] + "/" for name in names if name.endswith(".safetensors") and "/" in name}
    result = []
    for name in names:
        *folders, file = name.split("/")
        left = any(fnmatchcase(folder, glob) for folder in folders for glob in _FOLDERS_LEFT)
        left |= len(folders) > _MAX_DEPTH or any(name.startswith(model) for model in models)
        left |= any(fnmatchcase(file, glob) for glob in _LEFT)
        if not left and any(fnmatchcase(file, glob) for glob in carried):
            result.append(name)
    return result


def _refuse_code(path: str, content: bytes) -> None:
    if not _AUTO_MAP.search(content):
        return
    try:
        found = _auto_maps(json.loads(content))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not valid JSON: {error}") from error
    if found:
        raise InputError(
            f"{path}: has `auto_map`, which runs code on loading: {some(found)}",
            fix="if you trust that code: `skillmerge apply RECIPE --allow-code`; *.py files are then carried too",
        )


def _auto_maps(document: Any) -> list[str]:
    if not isinstance(document, dict):
        return []
    entry = document.get("auto_map")
    here = [str(value) for value in entry.values()] if isinstance(entry, dict) else [str(entry)] if entry else []
    return here + [name for value in document.values() for name in _auto_maps(value)]
