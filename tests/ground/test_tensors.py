"""Sizes, tiles and the dtype table."""

from __future__ import annotations

import pytest
import torch

from skillmerge.tensors import DTYPES, format_bytes, parse_size


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("5GB", 5_000_000_000),
        ("700 MB", 700_000_000),
        ("2GiB", 2 << 30),
        ("1.5kb", 1500),
        ("1000", 1000),
        ("3t", 3 * 10**12),
    ],
)
def test_size_is_read(text: str, wanted: int) -> None:
    assert parse_size(text) == wanted


@pytest.mark.parametrize("text", ["", "GB", "5 bytes", "-5GB", "5iB", "0", "0.1", "1e9"])
def test_size_that_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("count", "wanted"), [(0, "0 B"), (999, "999 B"), (3_087_467_144, "3.1 GB"), (5e15, "5000.0 TB")]
)
def test_bytes_are_written_for_people(count: float, wanted: str) -> None:
    assert format_bytes(count) == wanted


def test_dtype_table_agrees_with_torch() -> None:
    for dtype in DTYPES.values():
        if dtype.torch_name is not None:
            found = getattr(torch, dtype.torch_name)
            assert found.itemsize * 8 == dtype.bits
            assert found.is_floating_point == (dtype.kind in ("float", "quantised"))
