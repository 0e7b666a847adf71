"""Tensor specifications: name, dtype, shape, size. No I/O, no torch.

The dtype names are those of the safetensors format
(https://github.com/huggingface/safetensors#format), in the order in which its own writer ranks
them: a file's tensors are sorted by falling rank, then by name.

One word for each stretch of elements or bytes:

    block   BLOCK elements of a tensor, counted from its first: what statistics are kept for
    chunk   CHUNK elements at most, which are computed at once
    tile    consecutive elements of one output tensor that a worker makes in one go (`engine.tiles.Tile`)
    span    consecutive tiles of an output file, read and written together (`engine.tiles.Span`)
    unit    UNIT elements of a tensor, which a stored skill encodes together
    part    one of the arrays that a unit is stored as (`checkpoints.kinds.skill`)
    run     consecutive elements of one tensor of a model, where others come from (`plans.mapping.Run`)
    shard   a weight file
    page    PAGE bytes of memory or disk

A layer of the model, which its tensors' names call a block now and then, is a layer (`naming`).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

BLOCK = 1 << 16
"""No statistic and no random number depends on how tensors are cut into tiles, because blocks are counted from the
tensor's first element."""

CHUNK = 4 * BLOCK
"""On the CPU: large enough to hide the cost of a call, small enough for the L2 cache (measured, see
benchmarks/RESULTS.md). No result depends on it."""

UNIT = 1 << 22
"""Decides the memory that a worker needs to make a skill."""

PAGE = 4096
"""What direct I/O aligns to."""

ULP_EDGES = (1, 2, 4, 8, 16, 64, 256)
"""Upper ends of the classes in which changes are counted, in units in the last place; a last class has no end."""


@dataclass(frozen=True, slots=True)
class DType:
    """A safetensors dtype. `kind` is float, integer, bool, complex or quantized (never plain numbers)."""

    name: str
    bits: int
    kind: str
    rank: int
    torch_name: str | None = None

    @property
    def itemsize(self) -> int:
        """Bytes per element; only meaningful for whole-byte dtypes."""
        return self.bits // 8

    @property
    def is_float(self) -> bool:
        return self.kind == "float"


_TABLE = (
    ("BOOL", 8, "bool", "bool"),
    ("F4", 4, "quantised", None),
    ("F6_E2M3", 6, "quantised", None),
    ("F6_E3M2", 6, "quantised", None),
    ("U8", 8, "integer", "uint8"),
    ("I8", 8, "integer", "int8"),
    ("F8_E5M2", 8, "quantised", "float8_e5m2"),
    ("F8_E4M3", 8, "quantised", "float8_e4m3fn"),
    ("F8_E8M0", 8, "quantised", "float8_e8m0fnu"),
    ("F8_E4M3FNUZ", 8, "quantised", "float8_e4m3fnuz"),
    ("F8_E5M2FNUZ", 8, "quantised", "float8_e5m2fnuz"),
    ("I16", 16, "integer", "int16"),
    ("U16", 16, "integer", "uint16"),
    ("F16", 16, "float", "float16"),
    ("BF16", 16, "float", "bfloat16"),
    ("I32", 32, "integer", "int32"),
    ("U32", 32, "integer", "uint32"),
    ("F32", 32, "float", "float32"),
    ("C64", 64, "complex", "complex64"),
    ("F64", 64, "float", "float64"),
    ("I64", 64, "integer", "int64"),
    ("U64", 64, "integer", "uint64"),
)
DTYPES = {name: DType(name, bits, kind, rank, torch) for rank, (name, bits, kind, torch) in enumerate(_TABLE)}

OUTPUT_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""The names a recipe uses for `output.dtype`, and those of the format."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor as a checkpoint describes it, however it is stored. `file` is the weight file that it comes from."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its values, concatenated."""
        return self.elements * DTYPES[self.dtype].bits // 8


@dataclass(frozen=True, slots=True)
class StoredTensor(TensorSpec):
    """A tensor whose values are bytes start..end of `file`, counted from the file's first byte (not from its data)."""

    start: int
    end: int


def block_count(elements: int) -> int:
    return -(-elements // BLOCK)


def overlaps(runs: Sequence[tuple[int, int]], first: int, last: int) -> Iterator[tuple[int, int]]:
    """Yield what of ascending runs is in first..last, which excludes `last`, as each run its own."""
    for index in range(max(0, bisect_right(runs, (first, first)) - 1), len(runs)):
        start, stop = max(first, runs[index][0]), min(last, runs[index][1])
        if start < stop:
            yield start, stop
        elif runs[index][0] >= last:
            return


def format_bytes(count: float) -> str:
    """Return bytes for people, in the decimal units that disks and the Hub use: 3.1 GB."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def format_count(count: float) -> str:
    """Return a number of parameters for people: 1.54 B."""
    for unit in ("", " K", " M", " B", " T"):
        if count < 999.5 or unit == " T":
            return f"{count:.3g}{unit}"
        count /= 1000
    raise AssertionError("unreachable")


def percent(share: float) -> str:
    """Return a share for people: 98.4%. Only all is 100%, and only nothing is 0%."""
    if share in (0, 1):
        return f"{share:.0%}"
    return f"{min(max(share, 0.001), 0.999):.1%}"


def parse_size(text: str) -> int:
    """`5GB`, `700 MB`, `2GiB`, `1000000` -> bytes. Raises ValueError."""
    import re

    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"`{text}` is not a size; write it like 5GB, 700MB or 2GiB")
    number, prefix, binary = match.groups()
    if binary and not prefix:
        raise ValueError(f"`{text}` is not a size; write it like 5GB, 700MB or 2GiB")
    base = 1024 if binary else 1000
    size = float(number) * base ** " KMGT".index(prefix.upper() or " ")
    if not 1 <= size < 1 << 62:
        raise ValueError(f"`{text}` is not a positive size that a disk could have")
    return int(size)
