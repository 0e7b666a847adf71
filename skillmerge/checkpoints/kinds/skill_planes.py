"""One plane of a stored skill, decoded as it is read: plain tensors, whatever their encoding."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from skillmerge.checkpoints.checkpoint import Checkpoint, Piece, WeightFile
from skillmerge.checkpoints.store import Store, Wait, nothing_to_wait_for
from skillmerge.errors import InputError, UsageError
from skillmerge.tensors import BLOCK, DTYPES, UNIT, StoredTensor, TensorSpec, block_count

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
    """A tensor of one plane, and its parts by unit."""

    spec: TensorSpec
    units: Mapping[int, Mapping[str, StoredTensor]]
    """Those that are not all zero."""


class SkillPlane(Checkpoint):
    """One plane of a skill, as a checkpoint."""

    def __init__(
        self,
        uri: str,
        store: Store,
        config: Mapping[str, Any],
        entries: Mapping[str, Entry],
        files: Mapping[str, WeightFile],
        same: frozenset[str],
    ) -> None:
        tensors = {name: entry.spec for name, entry in entries.items()}
        super().__init__(uri, store.at, store, config, tensors, files)
        self.same = same
        self._entries = entries
        self._starts: dict[tuple[str, int], list[Tensor]] = {}
        self._recent: OrderedDict[str, bytearray] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, pieces: Sequence[Piece]) -> Wait:
        """Decodes at once: there is nothing to wait for."""
        for piece in pieces:
            if piece.count:
                self._decode(self._entries[piece.tensor], piece.first, piece.count, self.view(piece))
        return nothing_to_wait_for

    def hint(self, tensor: str, first: int, count: int) -> None:
        """The first elements of a unit announce the unit."""
        unit, inside = divmod(first, UNIT)
        if inside == 0:
            for part in self._entries[tensor].units.get(unit, {}).values():
                self.store.hint(part.file, part.start, part.nbytes)

    def cost(self, tensor: str) -> int:
        return sum(part.nbytes for unit in self._entries[tensor].units.values() for part in unit.values())

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
            f"{self.store.at.path(entry.spec.file)}: tensor `{entry.spec.name}` is not encoded as it should be",
            fix="the skill is damaged: `skillmerge verify` says whether it is what was written",
        )

    def _rows(self, entry: Entry, unit: int) -> list[Tensor]:
        """Return the rows of `starts`, checked: what they point at is there."""
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

    def _part(self, spec: StoredTensor, first: int, last: int, dtype: Any) -> Tensor:
        import torch

        if last <= first:
            return torch.empty(0, dtype=dtype)
        if spec.name.endswith(COMPRESSED):
            inflated = self._inflated(spec)
            if len(inflated) < last * dtype.itemsize:
                raise InputError(
                    f"{self.store.at.path(spec.file)}: `{spec.name}` is too short", fix="the skill is damaged"
                )
            return torch.frombuffer(inflated, dtype=torch.uint8).view(dtype)[first:last]
        content = bytearray((last - first) * dtype.itemsize)
        self.store.read(spec.file, spec.start + first * dtype.itemsize, memoryview(content))()
        return torch.frombuffer(content, dtype=dtype)

    def _length(self, spec: StoredTensor, itemsize: int) -> int:
        """Return how many elements a part has."""
        return len(self._inflated(spec)) // itemsize if spec.name.endswith(COMPRESSED) else spec.elements

    def _inflated(self, spec: StoredTensor) -> bytearray:
        """Return a compressed part as it was. The latest are kept: neighboring tiles want the same."""
        with self._lock:
            if spec.name in self._recent:
                self._recent.move_to_end(spec.name)
                return self._recent[spec.name]
        content = bytearray(spec.nbytes)
        self.store.read(spec.file, spec.start, memoryview(content))()
        size = int.from_bytes(content[:8], "little")
        try:
            inflated = bytearray(inflate(bytes(content[8 : 8 + size]), _MAX_PART))
        except ValueError as error:
            raise InputError(
                f"{self.store.at.path(spec.file)}: `{spec.name}` is not compressed as it should be",
                fix="the skill is damaged",
            ) from error
        inflated += bytes(-len(inflated) % 8)
        with self._lock:
            self._recent[spec.name] = inflated
            while len(self._recent) > 1 and sum(map(len, self._recent.values())) > _RECENT:
                self._recent.popitem(last=False)
        return inflated


def deflate(content: bytes | memoryview) -> bytes:
    """Return one zstd frame. Raises UsageError if zstandard is not installed."""
    return bytes(load_zstandard().ZstdCompressor(level=_LEVEL).compress(content))


def inflate(frame: bytes, limit: int) -> bytes:
    """Return what a zstd frame holds. Raises ValueError if it is none, or would be larger than `limit` bytes."""
    zstandard = load_zstandard()
    try:
        if not 0 <= zstandard.frame_content_size(frame) <= limit:
            raise ValueError("too large")
        return bytes(zstandard.ZstdDecompressor().decompress(frame))
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error


def check_zstandard() -> None:
    """Raise UsageError if compressed skills can be neither written nor read."""
    load_zstandard()


def load_zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise UsageError(
            "a compressed skill needs the package zstandard", fix="pip install 'skillmerge[zstd]'"
        ) from error
    return zstandard
