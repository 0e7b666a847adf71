"""One plane of a stored skill, decoded as it is read: plain tensors, whatever their encoding."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from skillmerge.checkpoints.safetensors import Header
from skillmerge.checkpoints.store import Files
from skillmerge.errors import InputError, UsageError
from skillmerge.tensors import BLOCK, DTYPES, UNIT, TensorSpec, block_count

if TYPE_CHECKING:
    from torch import Tensor


COMPRESSED = ".zst"
"""The end of a compressed part's name: 8 bytes with the frame's length, little-endian, a zstd frame, zeros."""

_LEVEL = 3
_MAX_PART = UNIT * 8 + 8
_RECENT = 64 << 20
"""Bytes of decompressed parts that are kept."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of one plane: its place in the plane, and its parts by unit."""

    spec: TensorSpec
    file: str
    units: Mapping[int, Mapping[str, TensorSpec]]
    """Those that are not all zero."""


class SkillPlane:
    """One plane of a skill, as if its dense tensors lay one behind the other in files.

    See `checkpoint.Files` for what its methods promise; `stored` are the files that really are there.
    """

    def __init__(self, stored: Files, headers: Mapping[str, Header], entries: Sequence[Entry], raw: bytes) -> None:
        self.stored, self.place, self.root = stored, stored.place, stored.root
        self.revision, self.remote, self.license = stored.revision, stored.remote, stored.license
        self._entries: dict[str, list[Entry]] = {file: [] for file in headers}
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

    def _decode(self, entry: Entry, first: int, count: int, buffer: memoryview) -> None:
        """Put `count` elements from `first` on into `buffer`, unit by unit; whole blocks are decoded."""
        import torch

        from skillmerge.bits import torch_dtype

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

    def _decode_blocks(self, entry: Entry, unit: int, first: int, out: Tensor) -> None:
        from skillmerge.bits import torch_dtype
        from skillmerge.checkpoints.kinds.sparse import decode

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

    def _damaged(self, entry: Entry) -> InputError:
        return InputError(
            f"{self.path(entry.file)}: tensor `{entry.spec.name}` is not encoded as it should be",
            fix="the skill is damaged: `skillmerge verify` says whether it is what was written",
        )

    def _rows(self, entry: Entry, unit: int) -> list[Tensor]:
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
    return bytes(load_zstandard().ZstdCompressor(level=_LEVEL).compress(content))


def inflate(frame: bytes, limit: int) -> bytes:
    """What a zstd frame holds. Raises ValueError where it is none, or would be larger than `limit` bytes."""
    zstandard = load_zstandard()
    try:
        if not 0 <= zstandard.frame_content_size(frame) <= limit:
            raise ValueError("too large")
        return bytes(zstandard.ZstdDecompressor().decompress(frame))
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error


def check_zstandard() -> None:
    """Raise UsageError where compressed skills can be neither written nor read."""
    load_zstandard()


def load_zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise UsageError(
            "a compressed skill needs the package zstandard", fix="pip install 'skillmerge[zstd]'"
        ) from error
    return zstandard
