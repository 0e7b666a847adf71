"""The header's bytes against the reference writer, and the strict parser against the reference reader."""

from __future__ import annotations

import json
import math
import os
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.torch import save

from skillmerge.checkpoints.safetensors import (
    MAX_DIMENSIONS,
    MAX_HEADER_BYTES,
    MAX_NAME,
    build_header,
    header_of,
    parse_header,
    read_header,
)
from skillmerge.errors import InputError
from skillmerge.tensors import DTYPES, StoredTensor

TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}


def reference_header(tensors: list[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """What the safetensors library writes before the data."""
    content = save(
        {name: torch.empty(shape, dtype=TORCH_DTYPES[dtype]) for name, dtype, shape in tensors}, {"format": "pt"}
    )
    return content[: 8 + int.from_bytes(content[:8], "little")]


def parse(document: Any, data: int) -> tuple[StoredTensor, ...]:
    """The specs of a header (a document, or text as it is) before `data` bytes."""
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    return parse_header(text, 8 + len(text) + data, "path", "file")


def test_header_in_use_is_parsed_once_and_then_forgotten() -> None:
    raw, specs = build_header([("a", "BF16", (2, 3))], "file")
    first = header_of(raw, specs[-1].end, "rl/file", "file")
    assert header_of(bytes(bytearray(raw)), specs[-1].end, "sft/file", "file") is first
    assert header_of(raw, specs[-1].end, "sft/other", "other").tensors[0].file == "other"
    with pytest.raises(InputError, match="sft/file: is cut short"):
        header_of(raw, specs[-1].end - 1, "sft/file", "file")
    forgotten = weakref.ref(first)
    del first
    assert forgotten() is None


# Writing.


def test_header_bytes_are_these() -> None:
    raw, specs = build_header([("b", "BF16", (2, 3)), ("a", "F32", (1,)), ("c", "F32", ())])
    assert raw == (
        b"\xc8\x00\x00\x00\x00\x00\x00\x00"
        b'{"__metadata__":{"format":"pt"},'
        b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"c":{"dtype":"F32","shape":[],"data_offsets":[4,8]},'
        b'"b":{"dtype":"BF16","shape":[2,3],"data_offsets":[8,20]}}      '
    )
    assert [(spec.name, spec.start, spec.end) for spec in specs] == [("a", 208, 212), ("c", 212, 216), ("b", 216, 228)]


def test_header_bytes_without_tensors_are_these() -> None:
    raw, specs = build_header([])
    assert raw == b'\x20\x00\x00\x00\x00\x00\x00\x00{"__metadata__":{"format":"pt"}}'
    assert specs == ()


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_header_of_one_dtype_is_the_reference_writers(dtype: str) -> None:
    tensors = [("x", dtype, (3, 5)), ("w", dtype, (0,)), ("", dtype, ()), ("x.y", dtype, (1, 1, 1))]
    assert build_header(tensors)[0] == reference_header(tensors)


def test_header_of_all_dtypes_is_in_the_reference_writers_order() -> None:
    tensors = [(f"{name}-{dtype}", dtype, (2,)) for name in "ba" for dtype in TORCH_DTYPES]
    assert build_header(tensors)[0] == reference_header(tensors)


NAMES = ["a", "A", "a.b", "a-b", "a/b", 'quo"te', "back\\slash", "ünïcödé", "日本", "😀", "ﬁ", "\x7f", "  ", "{}", "é"]


def test_header_of_odd_names_is_the_reference_writers() -> None:
    tensors = [(name, "BF16", (1,)) for name in NAMES]
    assert build_header(tensors)[0] == reference_header(tensors)


names = st.text(st.characters(blacklist_categories=("Cs",)), max_size=12).filter("__metadata__".__ne__)
shapes = st.lists(st.integers(0, 3), max_size=4).map(tuple)


@settings(deadline=None)
@given(st.dictionaries(names, st.tuples(st.sampled_from(list(TORCH_DTYPES)), shapes)))
def test_header_of_anything_is_the_reference_writers(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    triples = [(name, dtype, shape) for name, (dtype, shape) in tensors.items()]
    assert build_header(triples)[0] == reference_header(triples)


plain_names = st.text(st.characters(whitelist_categories=("L", "N", "P", "S")), min_size=1, max_size=20).filter(
    "__metadata__".__ne__
)


@settings(deadline=None)
@given(st.dictionaries(plain_names, st.tuples(st.sampled_from(list(TORCH_DTYPES)), shapes), max_size=8))
def test_header_that_was_built_is_read_back(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    raw, specs = build_header((name, dtype, shape) for name, (dtype, shape) in tensors.items())
    size = specs[-1].end if specs else len(raw)
    read = parse_header(raw[8:], size, "path", "")
    assert sorted(read, key=lambda spec: spec.name) == sorted(specs, key=lambda spec: spec.name)
    assert [spec.start for spec in read] == sorted(spec.start for spec in specs)


# Reading.


def test_header_is_read_with_its_bytes_and_the_files_size(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(save({"b": torch.zeros(2), "a": torch.zeros(3, dtype=torch.int8)}))
    header = read_header(str(path), "x.safetensors")
    start = len(header.raw)
    assert header.tensors == (
        StoredTensor("b", "F32", (2,), "x.safetensors", start, start + 8),
        StoredTensor("a", "I8", (3,), "x.safetensors", start + 8, start + 11),
    )
    assert path.read_bytes().startswith(header.raw)
    assert header.size == path.stat().st_size


def test_file_is_closed_again_whatever_was_in_it(tmp_path: Path) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.write_bytes(save({"a": torch.zeros(1)}))
    bad.write_bytes(b"\x02\0\0\0\0\0\0\0[]")
    before = sorted(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else []
    read_header(str(good), "good")
    for path in (bad, tmp_path, tmp_path / "none"):
        with pytest.raises(InputError):
            read_header(str(path), "bad")
    after = sorted(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else []
    assert after == before


def test_tensors_come_in_the_order_of_their_bytes() -> None:
    document = {
        "z": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]},
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [2, 3]},
        "empty": {"dtype": "F32", "shape": [0], "data_offsets": [2, 2]},
    }
    assert [spec.name for spec in parse(document, 3)] == ["z", "empty", "a"]


def test_offsets_count_from_the_start_of_the_file() -> None:
    text = b'{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}   '
    (spec,) = parse(text, 3)
    assert (spec.start, spec.end) == (8 + len(text), 8 + len(text) + 3)


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}, {"a": "line\nbreak", "b": "日本"}])
def test_metadata_of_strings_is_accepted(metadata: Any) -> None:
    assert parse({"__metadata__": metadata}, 0) == ()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_of_the_format_is_known_to_the_reference_reader_too(dtype: str) -> None:
    data = 3 * DTYPES[dtype].bits  # 24 elements, in bytes
    text = json.dumps({"a": {"dtype": dtype, "shape": [4, 6], "data_offsets": [0, data]}}).encode()
    assert parse(text, data)[0].nbytes == data
    assert len(deserialize(len(text).to_bytes(8, "little") + text + bytes(data))) == 1


def tensor(**changes: Any) -> dict[str, Any]:
    return {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1], **changes}}


def test_bounds_are_where_they_are_said_to_be() -> None:
    assert len(parse(tensor(shape=[1] * MAX_DIMENSIONS), 1)) == 1
    with pytest.raises(InputError, match=f"{MAX_DIMENSIONS + 1} dimensions"):
        parse(tensor(shape=[1] * (MAX_DIMENSIONS + 1)), 1)
    assert len(parse({"n" * MAX_NAME: tensor()["a"]}, 1)) == 1
    with pytest.raises(InputError, match="too long"):
        parse({"n" * (MAX_NAME + 1): tensor()["a"]}, 1)
    most = (1 << 63) - 1
    assert parse(tensor(shape=[0, most], data_offsets=[0, 0]), 0)[0].shape == (0, most)
    with pytest.raises(InputError, match="not natural numbers"):
        parse(tensor(shape=[0, most + 1], data_offsets=[0, 0]), 0)


def test_header_of_the_largest_size_is_read_and_one_byte_more_is_not(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(MAX_HEADER_BYTES.to_bytes(8, "little") + b"{}".ljust(MAX_HEADER_BYTES))
    assert read_header(str(path), "x").tensors == ()
    path.write_bytes((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}".ljust(MAX_HEADER_BYTES + 1))
    with pytest.raises(InputError, match="the largest accepted"):
        read_header(str(path), "x")


def test_header_is_read_whatever_a_call_of_the_system_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by letting calls of the system give less: the file was taken for a damaged one."""
    path, real = tmp_path / "x.safetensors", os.pread
    path.write_bytes(save({"a": torch.zeros(2), "b": torch.zeros(3, dtype=torch.int8)}))
    wanted = read_header(str(path), "x")
    monkeypatch.setattr(os, "pread", lambda descriptor, count, start: real(descriptor, min(count, 3), start))
    assert read_header(str(path), "x") == wanted


def test_error_says_which_file_and_what_to_do() -> None:
    with pytest.raises(InputError) as caught:
        parse(tensor(dtype="X"), 1)
    assert str(caught.value) == (
        "path: tensor `a` has an unknown dtype 'X'\nthe file is damaged or incomplete: fetch it again from its source"
    )


# Fuzzing: what we accept, the reference reader accepts and understands alike.


def reference(text: bytes, data: bytes) -> dict[str, tuple[str, tuple[int, ...], int]] | None:
    """name -> dtype, shape, bytes as the reference reader sees them; None where it refuses."""
    try:
        found = deserialize(len(text).to_bytes(8, "little") + text + data)
    except SafetensorError:
        return None
    return {name: (info["dtype"], tuple(info["shape"]), len(info["data"])) for name, info in found}


def accepts_no_more_than_the_reference(text: bytes, data: bytes) -> bool:
    """Whether we accept it; fails where we do and the reference does not, or where it sees something else."""
    try:
        specs = parse_header(text, 8 + len(text) + len(data), "path", "file")
    except InputError:
        return False
    assert {spec.name: (spec.dtype, spec.shape, spec.nbytes) for spec in specs} == reference(text, data)
    return True


ODD = [
    *("", " ", "\n", "\f", "\0", "\u00a0", ",", ":", "{", "}", "[", "]", "{}", "[]", '"', "//"),
    *("0", "1", "2", "4", "-0", "-1", "00", "01", "1.0", "1e0", "true", "null", "NaN", "Infinity"),
    *(str(1 << bits) for bits in (31, 32, 62, 63, 64, 70)),
    *('""', '"a"', '"é"', '"\\u0061"', '"\\ud800"', '"\\ud83d\\ude00"', '"\\u0000"', '"\0"', '"\x1b"', '"\\x"'),
    *('"__metadata__"', '"dtype"', '"shape"', '"data_offsets"', '"U8"', '"F32"', '"F4"', '"F6_E2M3"', '"u8"', '"X"'),
]
described = st.tuples(st.sampled_from(["U8", "F32", "BF16", "F4", "I64"]), shapes)


@st.composite
def headers(draw: st.DrawFn) -> tuple[bytes, int]:
    """A header and the size of its data, right but for some odd pieces."""
    pieces, position = ["{"], 0
    for name, (dtype, shape) in zip("abcd", draw(st.lists(described, max_size=4)), strict=False):
        end = position + math.prod(shape) * DTYPES[dtype].bits // 8
        pieces += [f'"{name}"', ":", "{", '"dtype"', ":", f'"{dtype}"', ",", '"shape"', ":", "["]
        pieces += [part for size in shape for part in (str(size), ",")][:-1]
        pieces += ["]", ",", '"data_offsets"', ":", "[", str(position), ",", str(end), "]", "}", ","]
        position = end
    pieces = [*(pieces[:-1] if len(pieces) > 1 else pieces), "}"]
    for where, odd, instead in draw(
        st.lists(st.tuples(st.integers(0, 200), st.sampled_from(ODD), st.booleans()), max_size=2)
    ):
        at = where % len(pieces)
        pieces[at] = odd if instead else pieces[at] + odd
    return "".join(pieces).encode(), max(0, position + draw(st.sampled_from([0, 0, 0, 0, 0, 1, -1])))


@settings(max_examples=1000, deadline=None)
@given(headers())
@example((b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}', 0))
@example((b'{"a":{"dtype":"U8","shape":[0,18446744073709551616],"data_offsets":[0,0]}}', 0))
@example((b'{"__metadata__":{"a":"\\ud800"}}', 0))
def test_fuzzed_header_is_accepted_only_where_the_reference_accepts_it(header: tuple[bytes, int]) -> None:
    accepts_no_more_than_the_reference(header[0], bytes(header[1]))


GOOD = reference_header([("a", "F32", (2, 3)), ("b", "BF16", (4,)), ("c.ü", "U8", (0, 7)), ("d", "F16", ())])[8:]
GOOD_DATA = bytes(24 + 8 + 2)


def test_unspoilt_header_of_the_fuzzing_is_accepted_by_both() -> None:
    assert accepts_no_more_than_the_reference(GOOD, GOOD_DATA)
    assert parse_header(GOOD, 8 + len(GOOD) + len(GOOD_DATA), "path", "file")[0].name == "a"


edits = st.lists(st.tuples(st.integers(0, len(GOOD)), st.integers(0, 2), st.binary(max_size=3)), min_size=1, max_size=3)


@settings(max_examples=1000, deadline=None)
@given(edits, st.integers(-1, 1))
def test_spoilt_header_is_accepted_only_where_the_reference_accepts_it(
    changes: list[tuple[int, int, bytes]], more: int
) -> None:
    text = GOOD
    for position, removed, added in changes:
        text = text[:position] + added + text[position + removed :]
    accepts_no_more_than_the_reference(text, bytes(len(GOOD_DATA) + more))


@settings(deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes, sized: bool) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes((len(content).to_bytes(8, "little") if sized else b"") + content)
    with suppress(InputError):
        read_header(str(path), "any")
