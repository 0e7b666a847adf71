"""The header of a safetensors file, read as if it came from an enemy and written byte for byte by us.

Format (https://github.com/huggingface/safetensors#format): 8 bytes with the header's size, little-endian;
the header, a JSON object padded with spaces; then the tensors' bytes without holes, to the file's end.
Accepts no file that the reference implementation refuses. Knows nothing about models, indexes or folders.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any
from weakref import WeakValueDictionary

from skillmerge.checkpoints.foreign import disguised
from skillmerge.errors import InputError, unreadable
from skillmerge.tensors import DTYPES, StoredTensor

MAX_HEADER_BYTES = 24_000_000
"""Room for 160,000 tensors in one file, such as an adapter of 384 experts in each of 60 layers. The reference
implementation allows four times as much, which takes 2 GB of memory and ten seconds to parse when somebody means
harm."""

MAX_NAME = 1000
MAX_DIMENSIONS = 64
_MAX_INTEGER = (1 << 63) - 1
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, those that turn the direction of text, and halves of characters (which UTF-8 lacks)."""

_INFO_KEYS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, eq=False)  # without slots, so that weak references to it can be held
class Header:
    """The tensors of one file in the order of their bytes, the header's bytes (size field included), and the
    file's size."""

    raw: bytes
    tensors: tuple[StoredTensor, ...]
    size: int


_IN_USE: WeakValueDictionary[tuple[bytes, int, str], Header] = WeakValueDictionary()
_PARSING = Lock()
"""One at a time, which takes no longer: parsing leaves no room for another thread."""


def read_header(path: str, file: str) -> Header:
    """Read and check the header of the file at `path`; `file` is its name in the returned specs.

    Raises InputError if anything at all is not as the format says.
    """
    with opened(path) as (descriptor, status):
        size = status.st_size
        raw = fetch_header(lambda start, count: read_range(descriptor, start, count), size, path)
    return header_of(raw, size, path, file)


def header_of(raw: bytes, size: int, path: str, file: str) -> Header:
    """Return the header whose bytes are `raw`, of a file of `size` bytes. The models of a family usually have the same
    headers: one that is in use is not parsed again. Raises InputError."""
    key = raw, size, file
    with _PARSING:
        header = _IN_USE.get(key)
        if header is None:
            header = _IN_USE[key] = Header(raw, parse_header(raw[8:], size, path, file), size)
    return header


@contextmanager
def opened(path: str) -> Iterator[tuple[int, os.stat_result]]:
    """Yield a descriptor of the regular file at `path`, and its status.

    Raises InputError and ResourceError, of reading in the body too.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise unreadable(path, error, "opened") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path}: is not a regular file")
        yield descriptor, status
    except OSError as error:
        raise unreadable(path, error) from error
    finally:
        os.close(descriptor)


def read_range(descriptor: int, start: int, count: int) -> bytes:
    """Return bytes of a file, fewer only at its end: one call of the system may give less than it could."""
    found = b""
    while len(found) < count and (piece := os.pread(descriptor, count - len(found), start + len(found))):
        found += piece
    return found


def fetch_header(read: Callable[[int, int], bytes], file_size: int, path: str) -> bytes:
    """Return the header's bytes, size field included; `read(start, count)` gives bytes of the file."""
    start = read(0, 8)
    if len(start) < 8:
        raise _broken(path, f"is {file_size} bytes long; even an empty file of this format has 10")
    size = int.from_bytes(start, "little")
    if (8 + size > file_size or read(8, 1) != b"{") and (known := disguised(read(0, 32))) is not None:
        raise InputError(f"{path}: {known[0]}", fix=known[1])
    if 8 + size > file_size:
        raise _broken(path, f"claims a header of {size} bytes but is only {file_size} bytes long")
    if size > MAX_HEADER_BYTES:
        raise InputError(f"{path}: has a header of {size} bytes; the largest accepted is {MAX_HEADER_BYTES}")
    text = read(8, size)
    if len(text) != size:
        raise _broken(path, "ended while its header was read")
    return start + text


def parse_header(text: bytes, file_size: int, path: str, file: str) -> tuple[StoredTensor, ...]:
    """Return the tensors that the header `text` (without its size field) describes, ordered by their bytes."""
    document = _load_object(text, path)
    metadata = document.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(_is_text(part) for item in metadata.items() for part in item)
    ):
        raise _broken(path, "has a `__metadata__` that is not a table of strings")
    data_start = 8 + len(text)
    specs = [_parse_tensor(name, info, data_start, path, file) for name, info in document.items()]
    specs.sort(key=lambda spec: (spec.start, spec.end))
    position = data_start
    for spec in specs:
        if spec.start != position:
            what = "overlaps the one before it" if spec.start < position else "leaves a hole before it"
            raise _broken(path, f"tensor `{spec.name}` {what} (offset {spec.start}, expected {position})")
        position = spec.end
    if position != file_size:
        what = "is cut short" if file_size < position else "has bytes after its last tensor"
        raise _broken(path, f"{what}: {file_size} bytes long, its header describes {position}")
    return tuple(specs)


def build_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], file: str = ""
) -> tuple[bytes, tuple[StoredTensor, ...]]:
    """Header bytes (size field included) for (name, dtype, shape) triples, and their specs in file order.

    The order, the JSON and the padding are those of the reference writer, with {"format": "pt"} as metadata.
    """
    ordered = sorted(tensors, key=lambda item: (-DTYPES[item[1]].rank, item[0]))
    document: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    ends = []
    position = 0
    for name, dtype, shape in ordered:
        end = position + math.prod(shape) * DTYPES[dtype].bits // 8
        document[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        ends.append((position, end))
        position = end
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    specs = tuple(
        StoredTensor(name, dtype, shape, file, base + start, base + end)
        for (name, dtype, shape), (start, end) in zip(ordered, ends, strict=True)
    )
    return len(text).to_bytes(8, "little") + text, specs


def _broken(path: str, what: str) -> InputError:
    return InputError(f"{path}: {what}", fix="the file is damaged or incomplete: fetch it again from its source")


def _load_object(text: bytes, path: str) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise _broken(path, "has a header that does not start with `{`")
    try:
        refuse_bulk(text, MAX_HEADER_BYTES)
        document = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=unique_keys,
            parse_int=_natural,
            parse_constant=_refuse_constant,
        )
    except RecursionError as error:
        raise _broken(path, "has a header that is nested too deeply") from error
    except ValueError as error:
        raise _broken(path, f"has a header that is not strict JSON: {error}") from error
    if not isinstance(document, dict):
        raise _broken(path, "has a header that is not a JSON object")
    return document


def refuse_bulk(text: bytes, most: int) -> None:
    """Raise ValueError for JSON that has more parts than a table of tensors of at most `most` bytes can have.

    Each tensor takes over 10 bytes for each of its commas and colons. Millions of empty tables, lists or numbers
    would take seconds and a gigabyte to build.
    """
    if text.count(b",") + text.count(b":") > most // 12:
        raise ValueError(f"it has more than {most // 12:,} parts")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} is defined twice")
    return table


def printable(name: str) -> bool:
    """Return whether a tensor's name is one that can be shown and stored: some text, not endless, nothing unseen."""
    return 0 < len(name) <= MAX_NAME and _UNPRINTABLE.search(name) is None


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _natural(text: str) -> int:
    # Python reads -0 as 0; the reference implementation refuses it.
    if text.startswith("-") or len(text) > 20:
        raise ValueError(f"{text[:20]} is not a natural number of 64 bits")
    return int(text)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _parse_tensor(name: str, info: Any, data_start: int, path: str, file: str) -> StoredTensor:
    if not printable(name):
        why = "is empty, has control characters in it or is too long"
        raise _broken(path, f"has a tensor whose name {why}: {name[:80]!r}")
    if not isinstance(info, dict) or info.keys() != _INFO_KEYS:
        raise _broken(path, f"tensor `{name}` must have exactly the keys dtype, shape and data_offsets")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    known = DTYPES.get(dtype) if isinstance(dtype, str) else None
    if known is None:
        raise _broken(path, f"tensor `{name}` has an unknown dtype {str(dtype)[:20]!r}")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise _broken(path, f"tensor `{name}` has a shape or data_offsets that are not natural numbers")
    if len(shape) > MAX_DIMENSIONS:
        raise _broken(path, f"tensor `{name}` has {len(shape)} dimensions; no runtime takes so many")
    # Bounded step by step: the reference refuses an overflow even where a later 0 would hide it.
    elements = 1
    for size in shape:
        elements *= size
        if elements * known.bits > _MAX_INTEGER:
            raise _broken(path, f"tensor `{name}` has a shape {shape} whose size overflows")
    start, end = offsets
    if elements * known.bits != (end - start) * 8:
        raise _broken(path, f"tensor `{name}` of shape {shape} and dtype {dtype} does not fill its {end - start} bytes")
    return StoredTensor(name, dtype, tuple(shape), file, data_start + start, data_start + end)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= _MAX_INTEGER for item in value)
