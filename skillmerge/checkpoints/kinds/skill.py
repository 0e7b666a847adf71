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
from typing import Any

from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.checkpoints.kinds.skill_planes import COMPRESSED, Entry, SkillPlane, load_zstandard
from skillmerge.checkpoints.safetensors import Header, printable
from skillmerge.checkpoints.store import Files, read_json_object
from skillmerge.errors import InputError, some
from skillmerge.tensors import DTYPES, UNIT, TensorSpec, block_count

SKILL_FILE = "skill.json"
SKILL_VERSION = 1
PLANES = ("plus", "minus")
_PART = re.compile(r"(.+)@(\d{1,9})\.(plus|minus)\.(values|starts|mask|gaps)(?:\.zst)?", re.DOTALL)
_MAX_DOCUMENT = 256_000_000
"""Bytes of `skill.json`: 500,000 tensors."""

_MAX_ELEMENTS = 1 << 36
"""Of one tensor: more than any model has, and few enough to walk through."""


def part_name(tensor: str, unit: int, plane: str, part: str) -> str:
    return f"{tensor}@{unit}.{plane}.{part}"


def tensor_digest(units: Sequence[str]) -> str:
    """The digest of a tensor: the sha256 of its units' sha256 digests (hex digits, one behind the other)."""
    return hashlib.sha256("".join(units).encode()).hexdigest()


def open_skill(uri: str, files: Files) -> tuple[Checkpoint, Checkpoint]:
    """Open the skill that `files` are: its planes, `plus` and `minus`, each as a checkpoint of dense tensors.

    Raises InputError where it is missing, damaged, or none.
    """
    names = files.names()
    if SKILL_FILE not in names:
        fix = "name it as a model instead" if "config.json" in names else "`skillmerge extract` makes one"
        raise InputError(f"{files.place} is not a skill: it has no {SKILL_FILE}", fix=fix)
    raw = files.read(SKILL_FILE, _MAX_DOCUMENT)
    document = read_json_object(files, SKILL_FILE, _MAX_DOCUMENT)
    path = files.path(SKILL_FILE)
    if document.get("skill_version") != SKILL_VERSION:
        raise InputError(f"{path}: skill version {document.get('skill_version')!r} is not known to this version")
    try:
        tensors = [_described(name, item) for name, item in document["tensors"].items()]
        configs = [document["configs"][plane] for plane in PLANES]
        wanted = list(document["files"])
        if (
            not wanted
            or len(set(wanted)) != len(wanted)
            or not all(isinstance(config, dict) for config in configs)
            or not all(isinstance(n, str) for n in wanted)
        ):
            raise TypeError
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: does not describe a skill ({error})", fix="the skill is damaged") from error
    if missing := sorted(set(wanted) - set(names)):
        raise InputError(f"{files.place}: files of the skill are missing: {some(missing)}", fix="fetch it again")
    headers = dict(zip(wanted, files.headers(wanted, dict.fromkeys(wanted, 1 << 20)), strict=True))
    if any(spec.name.endswith(COMPRESSED) for header in headers.values() for spec in header.tensors):
        load_zstandard()
    parts = _parts_of(headers, [name for name, *_ in tensors], f"{files.place}")
    planes = []
    for plane, config in zip(PLANES, configs, strict=True):
        ends = dict.fromkeys(wanted, 0)
        entries = []
        for name, shape, file, dtypes in tensors:
            if file not in headers:
                raise InputError(f"{path}: places tensor `{name}` in {file!r}, which is not one of its files")
            dtype = dtypes[PLANES.index(plane)]
            start = ends[file] = -(-ends[file] // 8) * 8
            spec = TensorSpec(name, dtype, shape, file, start, start)
            ends[file] = start + spec.elements * DTYPES[dtype].itemsize
            spec = TensorSpec(name, dtype, shape, file, start, ends[file])
            entries.append(Entry(spec, file, _checked_units(path, spec, parts.get((name, plane), {}))))
        virtual = SkillPlane(files, headers, entries, hashlib.sha256(raw).digest())
        planes.append(
            Checkpoint(
                uri=uri,
                files=virtual,
                names=tuple(names),
                tensors={entry.spec.name: entry.spec for entry in entries},
                shards=dict(zip(wanted, virtual.headers(wanted, {}), strict=True)),
                indexed=True,
                config=config,
                unread=(),
                stored=files,
                sizes={
                    entry.spec.name: sum(part.nbytes for unit in entry.units.values() for part in unit.values())
                    for entry in entries
                },
            )
        )
    return planes[0], planes[1]


def _described(name: str, item: Mapping[str, Any]) -> tuple[str, tuple[int, ...], str, tuple[str, str]]:
    """A tensor of `skill.json`: name, shape, file, and the dtype of each plane."""
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
) -> dict[tuple[str, str], dict[int, dict[str, TensorSpec]]]:
    """Every part of the files, by tensor and plane, then by unit. Raises InputError for one of no tensor."""
    known = set(tensors)
    found: dict[tuple[str, str], dict[int, dict[str, TensorSpec]]] = {}
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
    path: str, spec: TensorSpec, units: Mapping[int, Mapping[str, TensorSpec]]
) -> Mapping[int, Mapping[str, TensorSpec]]:
    """The parts of a tensor's units, whose dtypes and sizes must be those of an encoding. Raises InputError."""
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
    """Whether a part is long enough, which of a compressed one is seen when it is read."""
    return part.name.endswith(COMPRESSED) or part.elements >= elements


def summary(files: Files) -> dict[str, Any]:
    """What `skill.json` says."""
    return dict(json.loads(files.read(SKILL_FILE, _MAX_DOCUMENT)))
