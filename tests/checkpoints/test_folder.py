"""Opening a checkpoint folder, reading byte ranges of it, and noticing that it changed.

What is refused, and how, stands in test_hostile; here is what is understood.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import random_tensors, tensor_shapes, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from skillmerge.checkpoints.checkpoint import Checkpoint, read_bytes
from skillmerge.checkpoints.kinds.table import open_folder
from skillmerge.checkpoints.store import read_json_object
from skillmerge.checkpoints.stores.folder import Folder, resolve_inside
from skillmerge.errors import InputError, StalePlan

TENSORS = random_tensors(tensor_shapes())
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def read(checkpoint: Checkpoint, name: str, first: int = 0, count: int | None = None) -> bytes:
    return bytes(read_bytes(checkpoint, name, first, count))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", TENSORS, shards=2, config={"model_type": "odd"})


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", TENSORS, config={"model_type": "odd"})


# Opening.


def test_shards_with_an_index_are_opened(sharded: Path) -> None:
    checkpoint = open_folder("uri", sharded)
    assert checkpoint.uri == "uri"
    assert checkpoint.indexed
    assert list(checkpoint.files) == [FIRST, SECOND]
    assert checkpoint.unread == ()
    assert checkpoint.config == {"model_type": "odd"}
    assert {name: spec.shape for name, spec in checkpoint.tensors.items()} == tensor_shapes()


def test_tensors_come_shard_by_shard_in_the_order_of_their_bytes(sharded: Path) -> None:
    checkpoint = open_folder("uri", sharded)
    places = [(spec.file, spec.start) for spec in checkpoint.tensors.values()]
    assert places == sorted(places)


def test_single_file_is_opened_without_an_index(single: Path) -> None:
    checkpoint = open_folder("uri", single)
    assert not checkpoint.indexed
    assert list(checkpoint.files) == ["model.safetensors"]
    assert checkpoint.tensors.keys() == TENSORS.keys()


def test_single_file_of_another_name_is_opened(single: Path) -> None:
    (single / "model.safetensors").rename(single / "weights.safetensors")
    assert list(open_folder("uri", single).files) == ["weights.safetensors"]


def test_single_file_of_the_usual_name_goes_before_others(single: Path) -> None:
    shutil.copy(single / "model.safetensors", single / "another.safetensors")
    checkpoint = open_folder("uri", single)
    assert list(checkpoint.files) == ["model.safetensors"]
    assert checkpoint.unread == ("another.safetensors",)


def test_index_of_a_single_file_is_believed(single: Path) -> None:
    index = {"weight_map": dict.fromkeys(TENSORS, "model.safetensors")}
    (single / INDEX).write_text(json.dumps(index))
    checkpoint = open_folder("uri", single)
    assert checkpoint.indexed
    assert checkpoint.unread == ()


def test_shards_that_the_index_leaves_out_are_told(sharded: Path) -> None:
    shutil.copy(sharded / FIRST, sharded / "old.safetensors")
    assert open_folder("uri", sharded).unread == ("old.safetensors",)


def test_folder_with_the_ending_of_a_shard_is_no_shard(sharded: Path) -> None:
    (sharded / "old.safetensors").mkdir()
    assert list(open_folder("uri", sharded).files) == [FIRST, SECOND]


def test_metadata_of_the_index_is_not_believed(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    (sharded / INDEX).write_text(json.dumps({**index, "metadata": {"total_size": -1}}))
    assert len(open_folder("uri", sharded).tensors) == len(TENSORS)


def test_config_may_be_missing(single: Path) -> None:
    (single / "config.json").unlink()
    assert open_folder("uri", single).config == {}


def test_folder_may_itself_be_a_link(single: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(single)
    assert len(open_folder("uri", tmp_path / "link").tensors) == len(TENSORS)


def test_link_inside_the_folder_is_followed(single: Path) -> None:
    (single / "blobs").mkdir()
    (single / "model.safetensors").rename(single / "blobs" / "1")
    (single / "model.safetensors").symlink_to("blobs/1")
    assert len(open_folder("uri", single).tensors) == len(TENSORS)


def test_adapter_leftovers_beside_a_whole_model_do_not_hurt(single: Path) -> None:
    (single / "adapter_config.json").write_text("{}")
    save_file({"lora_A.weight": torch.zeros(1)}, single / "adapter_model.safetensors")
    assert open_folder("uri", single).tensors.keys() == TENSORS.keys()


def test_hub_cache_subfolder_may_link_to_its_repositorys_blobs(single: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--a--b"
    inner = repository / "snapshots" / "0123" / "inner"
    (repository / "blobs").mkdir(parents=True)
    shutil.copytree(single, inner)
    (inner / "model.safetensors").rename(repository / "blobs" / "abc")
    (inner / "model.safetensors").symlink_to("../../../blobs/abc")
    assert resolve_inside(inner, "model.safetensors", False) == (repository / "blobs" / "abc").resolve()
    (repository / "blobs" / "deep").mkdir()
    (repository / "blobs" / "abc").rename(repository / "blobs" / "deep" / "abc")
    (inner / "model.safetensors").unlink()
    (inner / "model.safetensors").symlink_to("../../../blobs/deep/abc")
    with pytest.raises(InputError, match="leaves its folder"):
        resolve_inside(inner, "model.safetensors", False)


def test_pickles_are_named_and_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "optimizer.pt"):
        os.mkfifo(tmp_path / name)  # opening one would wait for ever
    with pytest.raises(InputError) as caught:
        open_folder("uri", tmp_path)
    assert "only optimizer.pt, pytorch_model-00001-of-00002.bin, pytorch_model" in caught.value.message
    assert "save_pretrained" in str(caught.value.fix)


def test_folder_that_nobody_may_list_is_refused(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", forbidden)
    with pytest.raises(InputError, match="cannot be opened: Permission denied"):
        open_folder("uri", single)


@pytest.mark.parametrize("text", ['{"a": Infinity}', '{"a": [0, NaN]}', ' {"é": "\\u00e9"}\n'])
def test_json_that_python_writes_is_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    assert len(read_json_object(Folder(tmp_path, follow_links=False), "x.json")) == 1


@pytest.mark.parametrize(("depth", "accepted"), [(50, True), (51, False)])
def test_json_is_read_down_to_a_depth(tmp_path: Path, depth: int, accepted: bool) -> None:
    text = '{"a":' * (depth - 1) + "1" + "}" * (depth - 1)
    (tmp_path / "x.json").write_text(text)
    if accepted:
        assert read_json_object(Folder(tmp_path, follow_links=False), "x.json")
        return
    with pytest.raises(InputError, match="nested too deeply"):
        read_json_object(Folder(tmp_path, follow_links=False), "x.json")


# Reading.


def test_every_tensor_is_read_bit_for_bit(sharded: Path) -> None:
    checkpoint = open_folder("uri", sharded)
    for name, tensor in TENSORS.items():
        assert read(checkpoint, name) == raw_bytes(tensor)
    checkpoint.close()


@settings(deadline=None)
@given(st.data())
def test_any_range_of_a_tensor_is_read(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp() / "ranges"
    if not folder.exists():
        write_checkpoint(folder, TENSORS)
    checkpoint = open_folder("uri", folder)
    name = data.draw(st.sampled_from(list(TENSORS)))
    first = data.draw(st.integers(0, checkpoint.tensors[name].elements))
    count = data.draw(st.integers(0, checkpoint.tensors[name].elements - first))
    assert read(checkpoint, name, first, count) == raw_bytes(TENSORS[name])[2 * first : 2 * (first + count)]
    checkpoint.close()


def test_short_reads_are_continued(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, buffers, offset: whole(file, [buffers[0][:7]], offset))
    checkpoint = open_folder("uri", single)
    assert read(checkpoint, "lm_head.weight") == raw_bytes(TENSORS["lm_head.weight"])
    checkpoint.close()


def test_many_threads_share_one_descriptor_for_each_shard(sharded: Path) -> None:
    checkpoint = open_folder("uri", sharded)
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda name: read(checkpoint, name), list(TENSORS) * 8))
    assert found == [raw_bytes(tensor) for tensor in TENSORS.values()] * 8
    assert len(checkpoint.store._descriptors) == 2
    checkpoint.close()
    assert checkpoint.store._descriptors == {}


def test_closed_checkpoint_can_be_closed_again_and_read_again(single: Path) -> None:
    checkpoint = open_folder("uri", single)
    read(checkpoint, "lm_head.weight")
    checkpoint.close()
    checkpoint.close()
    assert read(checkpoint, "lm_head.weight") == raw_bytes(TENSORS["lm_head.weight"])
    checkpoint.close()


# Changes.

CHANGES: dict[str, Callable[[Path], object]] = {
    "size": lambda path: os.truncate(path, path.stat().st_size + 1),
    "time": lambda path: os.utime(path, ns=(0, path.stat().st_mtime_ns + 1)),
    "absence": lambda path: path.unlink(),
}


def test_file_with_another_inode_is_the_same(sharded: Path) -> None:
    """Some FUSE filesystems number a file anew at every look."""
    checkpoint = open_folder("uri", sharded)
    read(checkpoint, "lm_head.weight")
    for file in (FIRST, SECOND):
        shutil.copy2(sharded / file, sharded / "new")
        (sharded / "new").rename(sharded / file)
    checkpoint.check_unchanged()
    for name, tensor in TENSORS.items():
        assert read(checkpoint, name) == raw_bytes(tensor)
    checkpoint.close()


@pytest.mark.parametrize("change", CHANGES)
def test_changed_shard_is_noticed_before_and_after_reading(sharded: Path, change: str) -> None:
    checkpoint = open_folder("uri", sharded)
    checkpoint.check_unchanged()
    CHANGES[change](sharded / SECOND)
    checkpoint.check_unchanged({FIRST})
    for files in (None, {SECOND}, {FIRST, SECOND}):
        with pytest.raises(StalePlan, match=f"{SECOND} changed while it was in use"):
            checkpoint.check_unchanged(files)
    name = next(name for name, spec in checkpoint.tensors.items() if spec.file == SECOND)
    with pytest.raises(StalePlan, match=f"{SECOND} changed while it was in use"):
        read(checkpoint, name)
    assert checkpoint.store._descriptors == {}


def test_shard_that_is_cut_while_it_is_read_is_noticed(single: Path) -> None:
    checkpoint = open_folder("uri", single)
    last = max(checkpoint.tensors.values(), key=lambda spec: spec.end).name
    read(checkpoint, last)
    os.truncate(single / "model.safetensors", checkpoint.tensors[last].start + 2)
    with pytest.raises(StalePlan):
        read(checkpoint, last)
    checkpoint.close()


def test_reading_alone_changes_nothing(sharded: Path) -> None:
    checkpoint = open_folder("uri", sharded)
    for name in TENSORS:
        read(checkpoint, name)
    checkpoint.check_unchanged()
    checkpoint.close()
