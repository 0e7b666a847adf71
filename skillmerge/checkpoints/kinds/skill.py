"""A stored skill: a difference of two checkpoints, read as the two of them.

    skill.json                       what each tensor is, and of what it was made
    skill-00001-of-00002.safetensors the parts of `skillmerge.sparse` encodings

An element of a skill is a pair, `plus` minus `minus`. Where the difference of the parents is a number of their
own dtype that gives the one back when added to the other, `plus` is that difference and `minus` is 0; where it
is not, they are the parents' elements themselves. So a skill is exact, whatever the parents hold, and any
formula with it computes what it would have computed with them. Nearly all of both planes is zero.

The part `values` of plane `plus` of the second unit of tensor `w` is stored as `w@1.plus.values`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from skillmerge.checkpoints.checkpoint import INDEX_FILE, Checkpoint, Difference, WeightFile
from skillmerge.checkpoints.kinds.skill_planes import COMPRESSED, Entry, SkillPlane, load_zstandard
from skillmerge.checkpoints.safetensors import Header, printable
from skillmerge.checkpoints.store import Store, read_headers, read_json_object
from skillmerge.errors import InputError, some
from skillmerge.tensors import DTYPES, UNIT, StoredTensor, TensorSpec, block_count

WORD, NOUN, WRITTEN = "skill", "a skill", "{{skill: {uri}}}"
SKILL_FILE = "skill.json"
SKILL_VERSION = 1
PLANES = ("plus", "minus")
_PART = re.compile(r"(.+)@(\d{1,9})\.(plus|minus)\.(values|starts|mask|gaps)(?:\.zst)?", re.DOTALL)
_MAX_DOCUMENT = 256_000_000
"""Bytes of `skill.json`: 500,000 tensors."""

_MAX_ELEMENTS = 1 << 36
"""Most units of one tensor: more than any model has, and few enough to iterate over."""

_Parts = Mapping[tuple[str, str], Mapping[int, Mapping[str, StoredTensor]]]
"""Stored parts by tensor and plane, then by unit, then by what they are."""


def part_name(tensor: str, unit: int, plane: str, part: str) -> str:
    return f"{tensor}@{unit}.{plane}.{part}"


def tensor_digest(units: Sequence[str]) -> str:
    """Return the digest of a tensor: the sha256 of its units' sha256 digests (hex digits, concatenated)."""
    return hashlib.sha256("".join(units).encode()).hexdigest()


def claims(store: Store) -> bool:
    files = store.list()
    return SKILL_FILE in files and INDEX_FILE not in files


def open(uri: str, store: Store, onto: Checkpoint | None = None) -> Difference:
    """Open a skill: its planes, `plus` and `minus`, each as a checkpoint.

    Raises InputError if it is missing, damaged, or none.
    """
    files, place = store.list(), store.at.place
    if SKILL_FILE not in files:
        made = "`skillmerge extract --from AFTER --minus BEFORE -o SKILL` makes one"
        if "adapter_config.json" in files:
            made = "`skillmerge extract --from ADAPTER --minus MODEL -o SKILL` makes one of it"
            raise InputError(
                f"{place} is a PEFT adapter, not a skill",
                fix=f"in a recipe write `{{adapter: …}}` in the place of `{{skill: …}}`; {made}",
            )
        fix = f"it is a model, which recipes name by its path alone; {made}" if "config.json" in files else made
        raise InputError(f"{place} is not a skill: it has no {SKILL_FILE}", fix=fix)
    described = _describe(store)
    if missing := sorted(set(described.files) - set(files)):
        raise InputError(f"{place}: files of the skill are missing: {some(missing)}", fix="fetch it again")
    headers = read_headers(store, described.files, dict.fromkeys(described.files, 1 << 20))
    if any(spec.name.endswith(COMPRESSED) for header in headers.values() for spec in header.tensors):
        load_zstandard()
    parts = _parts_of(headers, [name for name, *_ in described.tensors], place)
    plus, minus = (_plane(uri, store, described, headers, parts, plane) for plane in PLANES)
    return Difference(plus, minus)


@dataclass(frozen=True, slots=True)
class _Description:
    """The content of `skill.json`. tensors: name, shape, file, and the dtype of each plane; configs: one for each
    plane; same: see `Checkpoint`."""

    digest: bytes
    tensors: list[tuple[str, tuple[int, ...], str, tuple[str, str]]]
    configs: tuple[Mapping[str, Any], Mapping[str, Any]]
    files: list[str]
    same: frozenset[str]


def _describe(store: Store) -> _Description:
    """Read and check `skill.json`. Raises InputError if it does not describe a skill."""
    document = read_json_object(store, SKILL_FILE, _MAX_DOCUMENT)
    path = store.at.path(SKILL_FILE)
    if document.get("skill_version") != SKILL_VERSION:
        raise InputError(f"{path}: skill version {document.get('skill_version')!r} is not known to this version")
    try:
        tensors = [_described(name, item) for name, item in document["tensors"].items()]
        plus, minus = (document["configs"][plane] for plane in PLANES)
        files, same = list(document["files"]), document.get("same", [])
        if (
            not files
            or len(set(files)) != len(files)
            or not all(isinstance(config, dict) for config in (plus, minus))
            or not isinstance(same, list)
            or not all(isinstance(name, str) for name in (*files, *same))
        ):
            raise TypeError
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: does not describe a skill ({error})", fix="the skill is damaged") from error
    digest = hashlib.sha256(store.read_small(SKILL_FILE, _MAX_DOCUMENT)).digest()
    return _Description(digest, tensors, (plus, minus), files, frozenset(same))


def _plane(
    uri: str, store: Store, described: _Description, headers: Mapping[str, Header], parts: _Parts, plane: str
) -> SkillPlane:
    """Return one plane of the skill. Raises InputError if the parts of a tensor are not those of an encoding."""
    path, number = store.at.path(SKILL_FILE), PLANES.index(plane)
    entries = {}
    inside: dict[str, list[str]] = {file: [] for file in headers}
    for name, shape, file, dtypes in described.tensors:
        if file not in headers:
            raise InputError(f"{path}: places tensor `{name}` in {file!r}, which is not one of its files")
        spec = TensorSpec(name, dtypes[number], shape, file)
        entries[name] = Entry(spec, _checked_units(path, spec, parts.get((name, plane), {})))
        inside[file].append(name)
    listed = store.list()
    files = {
        # What the plan keeps of a header stands for all that says what the tensors are.
        file: replace(
            WeightFile.of(header, listed[file]), described=header.raw + described.digest, tensors=tuple(inside[file])
        )
        for file, header in headers.items()
    }
    return SkillPlane(uri, store, described.configs[number], entries, files, described.same)


def _described(name: str, item: Mapping[str, Any]) -> tuple[str, tuple[int, ...], str, tuple[str, str]]:
    """Return a tensor of `skill.json`: name, shape, file, and the dtype of each plane."""
    shape, dtypes = item["shape"], (item["dtype"], item["minus_dtype"])
    if not printable(name) or not all(type(size) is int and size >= 0 for size in shape) or len(shape) > 64:
        raise ValueError(name)
    elements = 1
    for size in shape:  # step by step: a later 0 hides nothing
        elements *= max(1, size)
        if elements > _MAX_ELEMENTS:
            raise ValueError(f"{name} has too many elements")
    if not all(DTYPES[dtype].is_float for dtype in dtypes) or not isinstance(item["file"], str):
        raise ValueError(name)
    digests = item.get("digests", {})
    if not isinstance(digests, dict) or not all(isinstance(digest, str) for digest in digests.values()):
        raise ValueError(name)
    return name, tuple(shape), item["file"], dtypes


def _parts_of(
    headers: Mapping[str, Header], tensors: Sequence[str], place: str
) -> dict[tuple[str, str], dict[int, dict[str, StoredTensor]]]:
    """Return every part of the files, by tensor and plane, then by unit. Raises InputError for one of no tensor."""
    known = set(tensors)
    found: dict[tuple[str, str], dict[int, dict[str, StoredTensor]]] = {}
    for spec in (spec for header in headers.values() for spec in header.tensors):
        match = _PART.fullmatch(spec.name)
        if match is None or match[1] not in known:
            raise InputError(f"{place}: its files hold a part of no tensor: {spec.name}", fix="the skill is damaged")
        unit = found.setdefault((match[1], match[3]), {}).setdefault(int(match[2]), {})
        if match[4] in unit:
            raise InputError(f"{place}: two of its files hold `{spec.name}`", fix="the skill is damaged")
        unit[match[4]] = spec
    return found


def _checked_units(
    path: str, spec: TensorSpec, units: Mapping[int, Mapping[str, StoredTensor]]
) -> Mapping[int, Mapping[str, StoredTensor]]:
    """Return the parts of a tensor's units, whose dtypes and sizes must be those of an encoding. Raises InputError."""
    for unit, found in units.items():
        length = min(UNIT, spec.elements - unit * UNIT)
        plain = {"values": spec.dtype, "starts": "I32", "mask": "U8", "gaps": "U8"}
        kinds = set(found) if all(_kind(item, plain[part]) for part, item in found.items()) else set()
        blocks = block_count(length) + 1
        good = length > 0 and (
            (kinds == {"values"} and _holds(found["values"], length))
            or (
                kinds == {"values", "starts", "mask"}
                and _holds(found["mask"], -(-length // 8))
                and len(found["starts"].shape) == 1
                and found["starts"].elements >= blocks
            )
            or (
                kinds == {"values", "starts", "gaps"}
                and found["starts"].shape[:-1] == (2,)
                and found["starts"].shape[-1] >= blocks
            )
        )
        if not good:
            raise InputError(
                f"{path}: the parts of tensor `{spec.name}` are not those of an encoding", fix="the skill is damaged"
            )
    return units


def _kind(part: TensorSpec, dtype: str) -> bool:
    return part.dtype == ("U8" if part.name.endswith(COMPRESSED) else dtype)


def _holds(part: TensorSpec, elements: int) -> bool:
    """Return whether a part is long enough. A compressed part is checked when it is read."""
    return part.name.endswith(COMPRESSED) or part.elements >= elements


def summary(store: Store) -> dict[str, Any]:
    """Return what `skill.json` says."""
    return dict(json.loads(store.read_small(SKILL_FILE, _MAX_DOCUMENT)))
