"""Models over a network are read once, however often methods have to know whole tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import hub_recipe, put_family, random_tensors, weights, write_checkpoint, write_recipe
from hub_server import HubServer

import skillmerge
from skillmerge.checkpoints.checkpoint import Checkpoint, Piece
from skillmerge.checkpoints.kinds.table import open_folder
from skillmerge.checkpoints.store import Wait
from skillmerge.checkpoints.views.spooled import Spool, Spooled

TIES = "target + ties(rl - sft, target - sft, density=0.3, rescale=l1)"


def test_merge_from_the_hub_reads_every_byte_once(hub: HubServer, tmp_path: Path) -> None:
    folders = put_family(hub, tmp_path / "models", hidden=64, vocabulary=2000)
    write_recipe(folders.parent, TIES)
    wanted = weights(skillmerge.apply(folders).output)
    recipe = hub_recipe(tmp_path / "hub")
    write_recipe(recipe.parent, TIES, models={name: f"hf://acme/{name}" for name in ("target", "rl", "sft")})
    plan = skillmerge.plan(recipe)
    hub.requests.clear()
    result = skillmerge.apply(recipe)
    assert weights(result.output) == wanted
    sent = [request.range for request in hub.requests if "/storage/" in request.path and request.range]
    sizes = [int(text.split("-")[1]) + 1 - int(text[6:].split("-")[0]) for text in sent]
    headers = 3 * 2 * (1 << 16)
    assert plan.bytes_read <= sum(sizes) <= plan.bytes_read + headers
    assert plan.bytes_again == 3 * plan.bytes_read
    assert not [path for path in result.output.parent.iterdir() if path.name.endswith(".partial")]


class Counted(Spooled):
    """Counts what goes to the checkpoint beneath."""

    asked = 0

    def read(self, pieces: list[Piece]) -> Wait:  # type: ignore[override]
        before = self._checkpoint.read
        count = self

        def counted(far: list[Piece]) -> Wait:
            count.asked += sum(piece.count for piece in far)
            return before(far)

        self._checkpoint.read = counted  # type: ignore[method-assign,assignment]
        try:
            return super().read(pieces)
        finally:
            self._checkpoint.read = before  # type: ignore[method-assign]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    write_checkpoint(tmp_path / "model", random_tensors({"a": (40, 50), "b": (70,)}))
    return open_folder("model", tmp_path / "model")


def read(checkpoint: Checkpoint, tensor: str, first: int, last: int) -> bytes:
    content = bytearray(2 * (last - first))
    checkpoint.read([Piece(tensor, first, last - first, memoryview(content))])()
    return bytes(content)


def test_runs_of_any_cut_are_found_again(checkpoint: Checkpoint, tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spooled = Counted(checkpoint, {"a": 1}, spool)
    whole = read(checkpoint, "a", 0, 2000)
    for first, last in ((0, 700), (1300, 2000), (650, 1400)):
        assert read(spooled, "a", first, last) == whole[2 * first : 2 * last]
    assert spooled.asked == 700 + 700 + 750
    for first, last in ((0, 2000), (3, 1999), (699, 701)):
        assert read(spooled, "a", first, last) == whole[2 * first : 2 * last]
    assert spooled.asked == 2150
    assert read(spooled, "b", 0, 70) == read(checkpoint, "b", 0, 70)
    assert read(spooled, "b", 0, 70) == read(checkpoint, "b", 0, 70)
    assert spooled.asked == 2150 + 140, "b is not read again by methods"
    spool.close()


def test_room_of_a_forgotten_tensor_is_used_again(checkpoint: Checkpoint, tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spooled = Counted(checkpoint, {"a": 1, "b": 1}, spool)
    read(spooled, "a", 0, 2000)
    spooled.forget("a")
    read(spooled, "b", 0, 70)
    assert read(spooled, "a", 0, 2000) == read(checkpoint, "a", 0, 2000)
    assert read(spooled, "b", 0, 70) == read(checkpoint, "b", 0, 70)
    assert spool.room(3861) == 4000 + 4000, "b lies where a was, with 3,860 bytes to spare, and a behind both"
    spool.close()


def test_tensor_that_is_read_for_two_is_kept_until_both_are_merged(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """As the embedding of a model whose head is tied to it, beside models that have both."""
    spool = Spool(tmp_path)
    spooled = Counted(checkpoint, {"a": 2}, spool)
    whole = read(spooled, "a", 0, 2000)
    spooled.forget("a")
    assert read(spooled, "a", 0, 2000) == whole
    assert spooled.asked == 2000
    spooled.forget("a")
    assert spool.room(4000) == 0
    spool.close()
