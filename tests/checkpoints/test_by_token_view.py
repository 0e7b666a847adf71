"""Rows of one checkpoint in the order of another's: every piece of them against the rows written out."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from conftest import write_checkpoint

from skillmerge.checkpoints.checkpoint import Piece
from skillmerge.checkpoints.kinds.table import open_folder
from skillmerge.checkpoints.tokenizers.small_files import SmallFiles
from skillmerge.checkpoints.views.by_token import OWN, ZERO, ByToken, Matrix, RowMap
from skillmerge.engine.values import read_values
from skillmerge.tensors import TensorSpec, overlaps

NAME = "model.embed_tokens.weight"


def view(folder: Path, rows: list[tuple[int, int]], dtypes: tuple[torch.dtype, torch.dtype], read: str) -> ByToken:
    """Two models of 9 and 7 rows, the first in the order of `rows`: source and row there."""
    matrices = [torch.randn(count, 5).to(dtype) for count, dtype in zip((9, 7), dtypes, strict=True)]
    models = [open_folder(name, write_checkpoint(folder / name, {NAME: matrix, "other": torch.ones(3)}))
              for name, matrix in zip("ab", matrices, strict=True)]  # fmt: skip
    spec = TensorSpec(NAME, read, (len(rows), 5), "model.safetensors")
    matrix = Matrix(spec, RowMap(rows), ((models[0], NAME), (models[1], NAME)), ("a", "b"))
    return ByToken(models[0], {NAME: matrix}, {}, SmallFiles())


@pytest.mark.parametrize(
    ("dtypes", "read"),
    [
        ((torch.float32, torch.float32), "F32"),
        ((torch.bfloat16, torch.bfloat16), "BF16"),
        ((torch.bfloat16, torch.float32), "F32"),
        ((torch.float16, torch.bfloat16), "F32"),
        ((torch.float32, torch.float64), "F64"),
    ],
)
def test_every_piece_is_what_its_rows_say(tmp_path: Path, dtypes: tuple[torch.dtype, ...], read: str) -> None:
    torch.manual_seed(3)
    chance = random.Random(1)
    rows = [(OWN, 3), (OWN, 4), (1, 0), (1, 1), (1, 6), (ZERO, 0), (ZERO, 0), (OWN, 0), (OWN, 8), (1, 2)]
    seen = view(tmp_path, rows, (dtypes[0], dtypes[1]), read)
    stored = [read_values(it, NAME).view(-1, 5).double() for it in (seen.beneath, open_folder("b", tmp_path / "b"))]
    wanted = torch.stack([torch.zeros(5).double() if source == ZERO else stored[source][row] for source, row in rows])
    assert torch.equal(read_values(seen, NAME).double(), wanted.flatten())
    for _ in range(60):
        first = chance.randrange(50)
        count = chance.randrange(51 - first)
        assert torch.equal(read_values(seen, NAME, first, count).double(), wanted.flatten()[first : first + count])
    assert torch.equal(read_values(seen, "other"), torch.ones(3))


def test_pieces_go_where_they_are_wanted_and_nowhere_else(tmp_path: Path) -> None:
    seen = view(tmp_path, [(OWN, 1), (ZERO, 0), (1, 0)], (torch.float32, torch.float32), "F32")
    buffer = bytearray(b"\x55" * 100)
    seen.read([Piece(NAME, 3, 9, memoryview(buffer), 8)])()
    assert buffer[:8] == b"\x55" * 8
    assert buffer[44:] == b"\x55" * 56
    assert torch.equal(torch.frombuffer(buffer[8:44], dtype=torch.float32), read_values(seen, NAME, 3, 9))


def test_rows_that_follow_each_other_are_one_run() -> None:
    added = [
        *((OWN, row) for row in range(150_000)),
        (OWN, 150_001),
        (OWN, 150_000),
        *((1, 9 + it) for it in range(64)),
    ]
    rows = RowMap(added)
    assert len(rows) == 4
    assert rows.rows == 150_066
    assert rows.count_of(OWN) == 150_002
    assert [*rows.runs(149_999, 150_004)] == [(0, 149_999, 149_999, 1), (0, 150_001, 150_000, 1),
                                             (0, 150_000, 150_001, 1), (1, 9, 150_002, 2)]  # fmt: skip


def test_only_rows_in_their_own_order_are_an_identity() -> None:
    assert RowMap([(OWN, 0), (OWN, 1)]).is_identity
    assert not RowMap([(OWN, 1), (OWN, 2)]).is_identity
    assert not RowMap([(OWN, 0), (1, 1)]).is_identity
    assert not RowMap([(ZERO, 0)]).is_identity


def test_what_decides_the_rows_is_described(tmp_path: Path) -> None:
    described = set()
    for number, rows in enumerate(([(OWN, 0), (OWN, 1)], [(OWN, 1), (OWN, 0)], [(OWN, 0), (1, 1)], [(OWN, 0)])):
        torch.manual_seed(0)
        seen = view(tmp_path / str(number), rows, (torch.float32, torch.float32), "F32")
        described.add(seen.files["model.safetensors"].described)
        assert seen.rearranged == {NAME}
    assert len(described) == 4


def test_costs_are_of_its_own_rows(tmp_path: Path) -> None:
    rows = [(OWN, 3), (OWN, 4), (1, 0), (ZERO, 0), (OWN, 0)]
    seen = view(tmp_path, rows, (torch.float32, torch.float32), "F32")
    assert seen.cost(NAME) == 3 * 5 * 4
    assert seen.cost("other") == 12


def test_overlaps_are_those_that_every_pair_shows() -> None:
    chance = random.Random(2)
    for _ in range(200):
        edges = sorted(chance.sample(range(60), 2 * chance.randrange(6)))
        runs = list(zip(edges[::2], edges[1::2], strict=True))
        first = chance.randrange(60)
        last = first + chance.randrange(1, 20)
        wanted = [(max(first, a), min(last, b)) for a, b in runs if max(first, a) < min(last, b)]
        assert [*overlaps(runs, first, last)] == wanted
