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
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from skillmerge.checkpoints.checkpoint import Checkpoint, Files, read_json_object
from skillmerge.checkpoints.safetensors_header import Header, printable
from skillmerge.errors import InputError, UsageError, some
from skillmerge.tensors import BLOCK, DTYPES, UNIT, TensorSpec, block_count

if TYPE_CHECKING:
    from torch import Tensor

SKILL_FILE = "skill.json"
SKILL_VERSION = 1
PLANES = ("plus", "minus")
_PART = re.compile(r"(.+)@(\d{1,9})\.(plus|minus)\.(values|starts|mask|gaps)(?:\.zst)?", re.DOTALL)
_MAX_DOCUMENT = 256_000_000
"""Bytes of `skill.json`: 500,000 tensors."""

COMPRESSED = ".zst"
"""The end of a compressed part's name: 8 bytes with the frame's length, little-endian, a zstd frame, zeros."""

_LEVEL = 3
_MAX_PART = UNIT * 8 + 8
_RECENT = 64 << 20
"""Bytes of decompressed parts that are kept."""

_MAX_ELEMENTS = 1 << 36
"""Of one tensor: more than any model has, and few enough to walk through."""


def part_name(tensor: str, unit: int, plane: str, part: str) -> str:
    return f"{tensor}@{unit}.{plane}.{part}"


def tensor_digest(units: Sequence[str]) -> str:
    """The digest of a tensor: the sha256 of its units' sha256 digests (hex digits, one behind the other)."""
    return hashlib.sha256("".join(units).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor of one plane: its place in the plane, and its parts by unit."""

    spec: TensorSpec
    file: str
    units: Mapping[int, Mapping[str, TensorSpec]]
    """Those that are not all zero."""


class SkillPlane:
    """One plane of a skill, as if its dense tensors lay one behind the other in files.

    See `checkpoint.Files` for what its methods promise; `stored` are the files that really are there.
    """

    def __init__(self, stored: Files, headers: Mapping[str, Header], entries: Sequence[_Entry], raw: bytes) -> None:
        self.stored, self.place, self.root = stored, stored.place, stored.root
        self.revision, self.remote, self.license = stored.revision, stored.remote, stored.license
        self._entries: dict[str, list[_Entry]] = {file: [] for file in headers}
        for entry in entries:
            self._entries[entry.file].append(entry)
        self._begins = {file: [entry.spec.start for entry in found] for file, found in self._entries.items()}
        self._headers = {
            # What the plan keeps of a header stands for all that says what the tensors are.
            file: Header(header.raw + raw, tuple(entry.spec for entry in self._entries[file]), header.size,
                         header.identity)
            for file, header in headers.items()
        }  # fmt: skip
        self._starts: dict[tuple[str, int], list[Tensor]] = {}
        self._recent: OrderedDict[str, bytearray] = OrderedDict()
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        return self.stored.names()

    def path(self, name: str) -> str:
        return self.stored.path(name)

    def read(self, name: str, limit: int) -> bytes:
        return self.stored.read(name, limit)

    def headers(self, names: Sequence[str], sizes: Mapping[str, int]) -> list[Header]:
        return [self._headers[name] for name in names]

    def begin(self, name: str, position: int, buffer: memoryview) -> Callable[[], None]:
        """Decodes at once: there is nothing to wait for."""
        index = bisect_right(self._begins[name], position) - 1
        while buffer:
            entry = self._entries[name][index]
            itemsize = DTYPES[entry.spec.dtype].itemsize
            count = min(entry.spec.end - position, len(buffer))
            first = (position - entry.spec.start) // itemsize
            self._decode(entry, first, count // itemsize, buffer[:count])
            position += count
            buffer = buffer[count:]
            index += 1
        return _nothing

    def announce(self, name: str, position: int, nbytes: int) -> None:
        """The first bytes of a unit announce the unit."""
        entry = self._entries[name][bisect_right(self._begins[name], position) - 1]
        unit, inside = divmod((position - entry.spec.start) // DTYPES[entry.spec.dtype].itemsize, UNIT)
        if inside == 0 and unit in entry.units:
            for part in entry.units[unit].values():
                self.stored.announce(part.file, part.start, part.nbytes)

    def version(self, name: str) -> list[int | str]:
        return self.stored.version(name)

    def known_digest(self, name: str) -> tuple[int, tuple[str, str]] | None:
        return self.stored.known_digest(name)

    def check_unchanged(self, names: Sequence[str]) -> None:
        self.stored.check_unchanged(names)

    def cancel(self) -> None:
        self.stored.cancel()

    def close(self) -> None:
        self.stored.close()

    def _decode(self, entry: _Entry, first: int, count: int, buffer: memoryview) -> None:
        """Put `count` elements from `first` on into `buffer`, unit by unit; whole blocks are decoded."""
        import torch

        from skillmerge.arithmetic import torch_dtype

        out = torch.frombuffer(buffer, dtype=torch.uint8).view(torch_dtype(entry.spec.dtype))
        done = 0
        while done < count:
            unit, inside = divmod(first + done, UNIT)
            length = min(UNIT, entry.spec.elements - unit * UNIT)
            many = min(count - done, length - inside)
            low, high = inside // BLOCK * BLOCK, min(length, block_count(inside + many) * BLOCK)
            piece = out[done : done + many]
            if (low, high) == (inside, inside + many):
                self._decode_blocks(entry, unit, low, piece)
            else:
                whole = torch.empty(high - low, dtype=out.dtype)
                self._decode_blocks(entry, unit, low, whole)
                piece.copy_(whole[inside - low : inside - low + many])
            done += many

    def _decode_blocks(self, entry: _Entry, unit: int, first: int, out: Tensor) -> None:
        from skillmerge.arithmetic import torch_dtype
        from skillmerge.sparse import decode

        parts = entry.units.get(unit)
        if parts is None:
            return decode("zero", {}, (), first, out)
        dtype = torch_dtype(entry.spec.dtype)
        last = first + out.numel()
        if "starts" not in parts:
            values = self._part(parts["values"], first, last, dtype)
            if len(values) < out.numel():
                raise self._damaged(entry)
            return decode("dense", {"values": values}, (), first, out)
        import torch

        kind = "gaps" if "gaps" in parts else "mask"
        rows = [row[first // BLOCK : block_count(last) + 1] for row in self._rows(entry, unit)]
        low, high = int(rows[0][0]), int(rows[0][-1])
        begin, end = (int(rows[1][0]), int(rows[1][-1])) if kind == "gaps" else (first // 8, -(-last // 8))
        read = {
            "values": self._part(parts["values"], low, high, dtype),
            kind: self._part(parts[kind], begin, end, torch.uint8),
        }
        try:
            decode("gaps" if kind == "gaps" else "bitmap", read, rows, first, out)
        except (RuntimeError, IndexError, ValueError) as error:
            raise self._damaged(entry) from error

    def _damaged(self, entry: _Entry) -> InputError:
        return InputError(
            f"{self.path(entry.file)}: tensor `{entry.spec.name}` is not encoded as it should be",
            fix="the skill is damaged: `skillmerge verify` says whether it is what was written",
        )

    def _rows(self, entry: _Entry, unit: int) -> list[Tensor]:
        """The rows of `starts`, checked: what they point at is there."""
        key = (entry.spec.name, unit)
        if key not in self._starts:
            import torch

            parts = entry.units[unit]
            spec = parts["starts"]
            blocks = block_count(min(UNIT, entry.spec.elements - unit * UNIT))
            # Each row is padded: only what is needed of it is read, and a file may claim anything.
            width = spec.shape[-1]
            rows = [
                self._part(spec, row * width, row * width + blocks + 1, torch.int32)
                for row in range(2 if "gaps" in parts else 1)
            ]
            limits = [(self._length(parts["values"], DTYPES[entry.spec.dtype].itemsize), BLOCK)]
            limits += [(self._length(parts["gaps"], 1), BLOCK + BLOCK // 255 + 1)] if "gaps" in parts else []
            for row, (end, most) in zip(rows, limits, strict=True):
                steps = row.diff()
                if int(row[0]) != 0 or int(row[-1]) > end or not bool(((steps >= 0) & (steps <= most)).all()):
                    raise self._damaged(entry)
            with self._lock:
                self._starts[key] = rows
        return self._starts[key]

    def _part(self, spec: TensorSpec, first: int, last: int, dtype: Any) -> Tensor:
        import torch

        if last <= first:
            return torch.empty(0, dtype=dtype)
        if spec.name.endswith(COMPRESSED):
            inflated = self._inflated(spec)
            if len(inflated) < last * dtype.itemsize:
                raise InputError(f"{self.path(spec.file)}: `{spec.name}` is too short", fix="the skill is damaged")
            return torch.frombuffer(inflated, dtype=torch.uint8).view(dtype)[first:last]
        content = bytearray((last - first) * dtype.itemsize)
        self.stored.begin(spec.file, spec.start + first * dtype.itemsize, memoryview(content))()
        return torch.frombuffer(content, dtype=dtype)

    def _length(self, spec: TensorSpec, itemsize: int) -> int:
        """How many elements a part has."""
        return len(self._inflated(spec)) // itemsize if spec.name.endswith(COMPRESSED) else spec.elements

    def _inflated(self, spec: TensorSpec) -> bytearray:
        """A compressed part as it was. The latest are kept: neighbouring tiles want the same."""
        with self._lock:
            if spec.name in self._recent:
                self._recent.move_to_end(spec.name)
                return self._recent[spec.name]
        content = bytearray(spec.nbytes)
        self.stored.begin(spec.file, spec.start, memoryview(content))()
        size = int.from_bytes(content[:8], "little")
        try:
            inflated = bytearray(inflate(bytes(content[8 : 8 + size]), _MAX_PART))
        except ValueError as error:
            raise InputError(
                f"{self.path(spec.file)}: `{spec.name}` is not compressed as it should be", fix="the skill is damaged"
            ) from error
        inflated += bytes(-len(inflated) % 8)
        with self._lock:
            self._recent[spec.name] = inflated
            while len(self._recent) > 1 and sum(map(len, self._recent.values())) > _RECENT:
                self._recent.popitem(last=False)
        return inflated


def _nothing() -> None:
    pass


def deflate(content: bytes | memoryview) -> bytes:
    """One zstd frame. Raises UsageError where zstandard is not installed."""
    return bytes(_zstandard().ZstdCompressor(level=_LEVEL).compress(content))


def inflate(frame: bytes, limit: int) -> bytes:
    """What a zstd frame holds. Raises ValueError where it is none, or would be larger than `limit` bytes."""
    zstandard = _zstandard()
    try:
        if not 0 <= zstandard.frame_content_size(frame) <= limit:
            raise ValueError("too large")
        return bytes(zstandard.ZstdDecompressor().decompress(frame))
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error


def check_zstandard() -> None:
    """Raise UsageError where compressed skills can be neither written nor read."""
    _zstandard()


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise UsageError(
            "a compressed skill needs the package zstandard", fix="pip install 'skillmerge[zstd]'"
        ) from error
    return zstandard


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
        _zstandard()
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
            entries.append(_Entry(spec, file, _checked_units(path, spec, parts.get((name, plane), {}))))
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
