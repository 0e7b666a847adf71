"""Checkpoints read in the layout of others, against whole tensors that are put together without skillmerge."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Mapping
from itertools import permutations
from pathlib import Path

import layouts
import pytest
import torch
from conftest import write_checkpoint
from torch import Tensor

from skillmerge.checkpoints.checkpoint import Checkpoint, Piece, read_bytes
from skillmerge.checkpoints.kinds.table import open_folder
from skillmerge.checkpoints.views import bands
from skillmerge.checkpoints.views.arranged import Arranged, in_layout_of
from skillmerge.tensors import DTYPES, TensorSpec

DTYPE = {torch.bfloat16: "BF16", torch.float32: "F32"}
SIZES = [(3, 5, 7), (4, 4, 8), (3, 6, 6), (4, 8, 4), (1, 3, 5)]
"""Numbers of experts, inner sizes, hidden sizes: also those where a packed matrix, or one of its parts, is square."""


def specs(tensors: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(name, DTYPE[it.dtype], tuple(it.shape), "any") for name, it in tensors.items()}


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def opened(folder: Path, tensors: Mapping[str, Tensor], shards: int = 1) -> Checkpoint:
    return open_folder(
        "it", write_checkpoint(folder, {key: it.contiguous() for key, it in tensors.items()}, shards=shards)
    )


def read_in_pieces(checkpoint: Checkpoint, seed: int = 0) -> dict[str, bytes]:
    """Every tensor, cut anywhere; what belongs to neighbors is asked for together."""
    lots = random.Random(seed)
    found = {}
    for name, spec in checkpoint.tensors.items():
        size = DTYPES[spec.dtype].itemsize
        content, pieces, first = bytearray(spec.nbytes), [], 0
        while first < spec.elements:
            count = min(lots.choice((1, 2, 3, 7, 16, 40)), spec.elements - first)
            pieces.append(Piece(name, first, count, memoryview(content), first * size))
            first += count
        for start in range(0, len(pieces), 3):
            checkpoint.read(pieces[start : start + 3])()
        found[name] = bytes(content)
    return found


def check(view: Checkpoint, wanted: Mapping[str, Tensor]) -> None:
    expected = {name: bytes_of(tensor) for name, tensor in wanted.items()}
    assert {name: (it.shape, it.dtype) for name, it in view.tensors.items()} == {
        name: (it.shape, it.dtype) for name, it in specs(wanted).items()
    }
    assert {name: bytes(read_bytes(view, name)) for name in view.tensors} == expected
    assert read_in_pieces(view) == expected
    assert sorted(name for file in view.files.values() for name in file.tensors) == sorted(wanted)


@pytest.mark.parametrize("band", [bands.BAND, 40], ids=["whole", "bands"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    ("table", "stored", "wanted"),
    [
        (table, *pair)
        for table in ("LAYOUTS", "WITH_BIAS")
        for pair in permutations(getattr(layouts, table), 2)
    ],
)  # fmt: skip
def test_every_layout_is_read_in_every_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: str, stored: str, wanted: str,
    size: tuple[int, int, int], band: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(bands, "BAND", band)
    monkeypatch.setattr(bands, "_STRETCH", 4 * band)
    makers: Mapping[str, Callable[..., dict[str, Tensor]]] = getattr(layouts, table)
    made = layouts.experts(*size)
    target = makers[wanted](made)
    view = in_layout_of(opened(tmp_path, makers[stored](made), shards=2), specs(target))
    if "by_kind" in (stored, wanted) and size[1] == size[2]:
        # Nothing tells whether square matrices are transposed.
        assert not view.tensors.keys() & {name for name in target if ".experts." in name}
        return
    assert isinstance(view, Arranged)
    check(view, target)


@pytest.mark.parametrize("fused", [True, False])
def test_fused_projections_are_read_apart_and_the_other_way_round(tmp_path: Path, fused: bool) -> None:
    made = layouts.experts(3, 5, 8, dtype=torch.float32)
    target = layouts.dense(made, fused)
    view = in_layout_of(opened(tmp_path, layouts.dense(made, not fused)), specs(target))
    check(view, target)
    assert view.naming.layout == (f"projections {'fused' if fused else 'split'}",)


def reads_of(view: Checkpoint, monkeypatch: pytest.MonkeyPatch, names: list[str]) -> int:
    """How many reads of files it takes to read tensors into one buffer, behind each other."""
    store, count = view.store, []
    read = store.read
    monkeypatch.setattr(store, "read", lambda *arguments: count.append(arguments) or read(*arguments))
    content, pieces, start = memoryview(bytearray(sum(view.tensors[name].nbytes for name in names))), [], 0
    for name in names:
        pieces.append(Piece(name, 0, view.tensors[name].elements, content, start))
        start += view.tensors[name].nbytes
    view.read(pieces)()
    return len(count)


def test_runs_are_read_in_few_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Split from packed takes one read for neighbors; packed from split one or two for each expert."""
    made = layouts.experts(4, 5, 8)
    packed, split = layouts.packed(made), layouts.split(made)
    names = [f"{layouts.AT}.experts.{it}.{part}_proj.weight" for it in range(4) for part in ("gate", "up")]
    view = in_layout_of(opened(tmp_path / "packed", packed), specs(split))
    assert reads_of(view, monkeypatch, names) == 1
    view = in_layout_of(opened(tmp_path / "split", split), specs(packed))
    assert reads_of(view, monkeypatch, [f"{layouts.AT}.experts.gate_up_proj"]) == 4
    view = in_layout_of(opened(tmp_path / "split", split), specs(layouts.transposed(made)))
    assert reads_of(view, monkeypatch, [f"{layouts.AT}.experts.gate_up_proj"]) == 8


def test_parts_of_two_dtypes_are_read_in_the_wider_one(tmp_path: Path) -> None:
    """As where an adapter changes some of them, which have more digits then."""
    made = layouts.experts(3, 5, 7)
    stored = {name: it.float() / 3 if "up_proj" in name else it for name, it in layouts.split(made).items()}
    wanted = layouts.packed({**made, "up": made["up"].float() / 3})
    view = in_layout_of(opened(tmp_path, stored), specs(layouts.packed(made)))
    check(view, wanted)


@pytest.mark.parametrize("first", [True, False])
def test_what_has_two_meanings_is_left_alone(tmp_path: Path, first: bool) -> None:
    """A donor that packs an expert and has it by itself too: it is not clear which is meant."""
    made = layouts.experts(3, 5, 7)
    one, packed = {f"{layouts.AT}.experts.1.gate_proj.weight": made["gate"][1]}, layouts.packed(made)
    both = {**one, **packed} if first else {**packed, **one}
    view = in_layout_of(opened(tmp_path, layouts.mixtral(made)), specs(both))
    assert f"{layouts.AT}.experts.gate_up_proj" not in view.tensors


def test_a_million_experts_are_none(tmp_path: Path) -> None:
    """A header can say so in a few bytes."""
    name = f"{layouts.AT}.experts.down_proj"
    huge = {name: TensorSpec(name, "BF16", (10**9, 1, 1), "any")}
    stored = opened(tmp_path, layouts.split(layouts.experts(2, 1, 1)))
    assert in_layout_of(stored, huge) is stored


def test_a_tensor_of_which_something_would_be_left_over_is_not_taken_apart(tmp_path: Path) -> None:
    """The donor has the gate, and nothing of the other half of the fused tensor."""
    made = layouts.experts(3, 5, 8, dtype=torch.float32)
    stored = opened(tmp_path, layouts.dense(made, True))
    wanted = specs(layouts.dense(made, False))
    del wanted["model.layers.0.mlp.up_proj.weight"]
    assert "model.layers.0.mlp.gate_up_proj.weight" in in_layout_of(stored, wanted).tensors
    assert "model.layers.0.mlp.gate_proj.weight" in in_layout_of(stored, wanted, whole=False).tensors


def named_alike(it: layouts.Experts) -> dict[str, Tensor]:
    """Each projection packed by itself, and `down_proj` called as where gate and up are one."""
    packed = {f"{layouts.AT}.experts.{name}": it[part] for part, name in layouts.NAMES.items()}
    return {f"{layouts.AT}.gate.weight": it["router"], **packed}


def weights_apart(it: layouts.Experts) -> dict[str, Tensor]:
    """gpt-oss with the weights one by one, and the biases packed as they were."""
    apart = {name: tensor for name, tensor in layouts.split(it).items() if ".experts." in name}
    rest = {name: tensor for name, tensor in layouts.gpt_oss(it).items() if not name.endswith("_proj")}
    return {**apart, **rest}


ALIKE = [(named_alike, layouts.packed), (layouts.packed, named_alike), (weights_apart, layouts.gpt_oss),
         (layouts.gpt_oss, weights_apart)]  # fmt: skip


@pytest.mark.parametrize(("stored", "wanted"), ALIKE)
def test_tensors_that_both_have_tell_how_the_others_are_stored(
    tmp_path: Path, stored: Callable[..., dict[str, Tensor]], wanted: Callable[..., dict[str, Tensor]]
) -> None:
    """`down_proj` shows that gate and up are not transposed, and the biases that their rows are in turn."""
    made = layouts.experts(3, 5, 7)
    check(in_layout_of(opened(tmp_path, stored(made)), specs(wanted(made))), wanted(made))


def test_bands_go_with_the_thread_that_read_them(tmp_path: Path) -> None:
    """A merge whose methods look at the whole model first has new threads for each time."""
    made = layouts.experts(3, 5, 7)
    view = in_layout_of(opened(tmp_path, layouts.transposed(made)), specs(layouts.packed(made)))
    assert isinstance(view, Arranged)
    thread = threading.Thread(target=read_bytes, args=(view, f"{layouts.AT}.experts.down_proj"))
    thread.start()
    thread.join()
    read_bytes(view, f"{layouts.AT}.experts.gate_up_proj")
    held = [*view._bands._known]
    assert held
    assert {band.tensor for band in held} == {f"{layouts.AT}.experts.gate_up_proj"}
