"""Nothing of an output can be changed, added, lost or exchanged without `verify` saying so."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from conftest import run_cli, write_family
from safetensors.torch import load_file, save_file

import skillmerge
from skillmerge.checkpoints.safetensors import read_header
from skillmerge.errors import CheckFailed, ResourceError, UsageError
from skillmerge.outputs import manifest, verify
from skillmerge.outputs.buckets import at_hand

CONFIG = {"vocab_size": 32, "num_hidden_layers": 1, "torch_dtype": "bfloat16"}
MANIFEST, RUN_LOG = "skillmerge.manifest.json", "skillmerge.run.json"
SHARD, OTHER_SHARD = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
FILES = ["config.json", SHARD, OTHER_SHARD, "model.safetensors.index.json", MANIFEST, RUN_LOG, "tokenizer.json"]


def assert_refused(output: Path, match: str | None = None) -> None:
    with pytest.raises(CheckFailed, match=match) as caught:
        skillmerge.verify(output)
    assert caught.value.exit_status == 3
    assert str(output) in caught.value.message


def forge(output: Path, change: Callable[[dict[str, Any]], object] = lambda document: None) -> None:
    """Write a manifest that agrees with the files as they are now, as one who knows how would."""
    path = output / MANIFEST
    document = json.loads(path.read_text())
    for file in document["files"]:
        data = (output / file["name"]).read_bytes()
        file |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    change(document)
    del document["digest"]
    text = json.dumps(document, ensure_ascii=False, separators=(", ", ": "))
    document["digest"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_bytes(manifest.to_bytes(document))


def flipped(data: bytes, position: int, bit: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :]


# ----------------------------------------------------------------------------------------------- as it should be


def test_verify_accepts_what_apply_wrote_and_counts_it(output: Path) -> None:
    verdict = skillmerge.verify(output)
    assert sorted(path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()) == sorted(
        [*FILES, "1_Pooling/config.json"]
    )
    assert verdict.files == len(FILES) + 1
    assert verdict.tensors == 6
    sizes = [path.stat().st_size for path in output.rglob("*") if path.name not in (MANIFEST, RUN_LOG)]
    assert verdict.bytes == sum(sizes) - (output / "1_Pooling").stat().st_size
    assert verdict.load is None


def test_verify_accepts_an_output_that_was_moved(output: Path) -> None:
    moved = output.rename(output.with_name("elsewhere"))
    skillmerge.verify(moved)


def test_forged_manifest_is_accepted_where_the_files_are_sound(output: Path) -> None:
    """The forger of these tests does not fail for reasons of its own."""
    forge(output)
    skillmerge.verify(output)


# ------------------------------------------------------------------------------------------------- every byte


def header_regions(data: bytes) -> dict[str, range]:
    size = 8 + int.from_bytes(data[:8], "little")
    text = len(data[:size].rstrip(b" "))
    return {
        "length": range(8),
        "header": range(8, text),
        "padding": range(text, size),
        "payload": range(size, len(data)),
    }


def test_every_region_of_a_shard_is_there_to_be_changed(merged: Path) -> None:
    assert all(header_regions((merged / SHARD).read_bytes()).values())


@pytest.mark.parametrize("region", ["length", "header", "padding", "payload"])
def test_changed_byte_in_a_shard_is_found(output: Path, region: str) -> None:
    path, dice = output / SHARD, random.Random(0)
    data = path.read_bytes()
    positions = list(header_regions(data)[region])
    # Every byte of a header; of the rest the edges and a sample.
    chosen = positions if region != "payload" else [positions[0], positions[-1], *dice.sample(positions, 100)]
    for position in chosen:
        path.write_bytes(flipped(data, position, dice.randrange(8)))
        assert_refused(output)
    path.write_bytes(data)
    skillmerge.verify(output)


@pytest.mark.parametrize("name", [name for name in FILES if name not in (SHARD, OTHER_SHARD, MANIFEST)])
def test_changed_byte_in_a_small_file_is_found(output: Path, name: str) -> None:
    path, dice = output / name, random.Random(1)
    data = path.read_bytes()
    for position in range(len(data)) if len(data) < 400 else dice.sample(range(len(data)), 400):
        path.write_bytes(flipped(data, position, dice.randrange(8)))
        assert_refused(output)
    path.write_bytes(data)
    skillmerge.verify(output)


@pytest.mark.parametrize("bit", [None, 5], ids=["any bit", "case"])
def test_changed_byte_in_the_manifest_is_found(output: Path, bit: int | None) -> None:
    """Every place of it. Bit 5 turns small letters into capitals and spaces into nothing: lenient readers pass it."""
    path, dice = output / MANIFEST, random.Random(2)
    data = path.read_bytes()
    for position in range(0, len(data), 1 if bit is None else 5):
        path.write_bytes(flipped(data, position, dice.randrange(8) if bit is None else bit))
        with pytest.raises(CheckFailed):
            manifest.read(output)
    path.write_bytes(data)
    skillmerge.verify(output)


# ------------------------------------------------------------------------------------------------- whole files


@pytest.mark.parametrize("name", FILES)
def test_missing_file_is_found(output: Path, name: str) -> None:
    (output / name).unlink()
    assert_refused(output, name)


@pytest.mark.parametrize("name", FILES)
def test_renamed_file_is_found(output: Path, name: str) -> None:
    (output / name).rename(output / f"other-{name}")
    assert_refused(output, name)


@pytest.mark.parametrize("kept", [0, -1, 100])
@pytest.mark.parametrize("name", [*FILES, "1_Pooling/config.json"])
def test_truncated_file_is_found(output: Path, name: str, kept: int) -> None:
    size = (output / name).stat().st_size
    os.truncate(output / name, size - 1 if kept == -1 else min(kept, size - 1))
    assert_refused(output, name)


@pytest.mark.parametrize("name", FILES)
def test_lengthened_file_is_found(output: Path, name: str) -> None:
    with open(output / name, "ab") as stream:
        stream.write(b"\n")
    assert_refused(output, name)


@pytest.mark.parametrize(
    "name", ["stray.txt", ".hidden", "model.bin", "new/deeper/file", "1_Pooling/model.safetensors"]
)
def test_added_file_is_found(output: Path, name: str) -> None:
    (output / name).parent.mkdir(parents=True, exist_ok=True)
    (output / name).write_bytes(b"")
    assert_refused(output, name)
    assert run_cli("verify", output).stderr.endswith("help: move them out of the folder\n")


@pytest.mark.parametrize("name", [*FILES, "1_Pooling/config.json"])
def test_link_in_place_of_a_file_is_found(output: Path, name: str, tmp_path: Path) -> None:
    """What a link leads to can change at any time, and stays behind when the folder is moved."""
    (output / name).rename(tmp_path / "outside")
    (output / name).symlink_to(tmp_path / "outside")
    assert_refused(output, "plain file")


def test_link_in_place_of_a_folder_is_found(output: Path, tmp_path: Path) -> None:
    (output / "1_Pooling").rename(tmp_path / "outside")
    (output / "1_Pooling").symlink_to(tmp_path / "outside")
    assert_refused(output, "1_Pooling")


@pytest.mark.parametrize("name", FILES)
def test_device_or_folder_in_place_of_a_file_is_found(output: Path, name: str) -> None:
    (output / name).unlink()
    os.mkfifo(output / name)  # who opens it to read waits for ever
    assert_refused(output, name)
    (output / name).unlink()
    (output / name).mkdir()
    assert_refused(output, name)


def test_added_link_is_found(output: Path) -> None:
    (output / "link").symlink_to(output)
    assert_refused(output, "link")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_unreadable_file_is_found(output: Path) -> None:
    (output / SHARD).chmod(0)
    assert_refused(output, SHARD)


def test_unreadable_disk_is_the_machines_fault(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hash_file(path: Path, stop: object = None) -> str:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(verify, "hash_file", hash_file)
    with pytest.raises(
        ResourceError, match=r"skillmerge.run.json: Input/output error\ncheck it with `skillmerge doctor"
    ):
        verify.verify_files(output)


def test_file_that_the_library_cannot_open_is_the_machines_fault(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by letting calls of the system fail: torch, which maps the file, has an error of its own for that."""

    def safe_open(path: Path, framework: str) -> None:
        raise RuntimeError(f"unable to open file <{path}> in read-only mode: Input/output error (5)")

    monkeypatch.setattr("safetensors.safe_open", safe_open)
    with pytest.raises(ResourceError, match="could not be opened on this machine: unable to open file"):
        verify.verify_files(output)


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="the stand-in is Linux's")
def test_file_that_cannot_be_mapped_is_read_by_the_library_all_the_same(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a stand-in with its header, in which a wrong one is seen too."""
    real, opened = safetensors.safe_open, []

    def safe_open(path: Any, framework: str) -> Any:
        if Path(path).is_relative_to(output):
            raise RuntimeError(f"unable to mmap 80 bytes from file <{path}>: No such device (19)")
        opened.append(str(path))
        return real(path, framework=framework)

    monkeypatch.setattr("safetensors.safe_open", safe_open)
    verify.verify_files(output)
    assert len(opened) == 2
    specs = read_header(str(output / SHARD), SHARD).tensors
    with pytest.raises(CheckFailed, match="reads different tensors"):
        verify.check_shard(output / SHARD, specs[1:])


# ---------------------------------------------------------------------------------------- whole files exchanged


def test_exchanged_shards_are_found(output: Path) -> None:
    shard, other = output / SHARD, output / OTHER_SHARD
    shard.rename(output / "aside")
    other.rename(shard)
    (output / "aside").rename(other)
    assert_refused(output)
    forge(output)
    assert_refused(output)


def test_shard_of_another_merge_is_found(output: Path) -> None:
    """The same names, shapes and sizes, other numbers."""
    tensors = {name: tensor + 1 for name, tensor in load_file(output / SHARD).items()}
    save_file(tensors, output / SHARD, metadata={"format": "pt"})
    assert_refused(output, "sha256")


def change_tensor(output: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> str:
    """Rewrite one matrix of a shard and forge the digests; its name."""
    tensors = load_file(output / SHARD)
    name = next(name for name in tensors if "q_proj" in name)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, output / SHARD, metadata={"format": "pt"})
    forge(output)
    return name


@pytest.mark.parametrize(
    "change",
    [lambda tensor: tensor.to(torch.float16), lambda tensor: tensor.reshape(4, 16), lambda tensor: tensor[:-1]],
    ids=["dtype", "shape", "row"],
)
def test_tensor_of_another_kind_than_described_is_found(
    output: Path, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    name = change_tensor(output, change)
    assert_refused(output, name)


def test_tensor_added_or_lost_is_found(output: Path) -> None:
    tensors = load_file(output / SHARD)
    name, tensor = tensors.popitem()
    index = json.loads((output / "model.safetensors.index.json").read_text())
    for added, lost in (("new.weight", None), (None, name)):
        changed = {**tensors, **({added: tensor.clone(), name: tensor} if added else {})}
        save_file(changed, output / SHARD, metadata={"format": "pt"})
        places = {**index["weight_map"], **({added: SHARD} if added else {})}
        places.pop(lost, None)
        (output / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        forge(output)
        assert_refused(output, added or name)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 17, -1])
def test_number_that_is_none_is_found_whatever_the_digests_say(output: Path, value: float, place: int) -> None:
    def put(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[place] = value
        return tensor

    name = change_tensor(output, put)
    assert_refused(output, f"{name}` holds NaN or Inf")
    skillmerge.verify(output, allow_nonfinite=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_number_that_is_none_is_found_at_every_seam(tmp_path: Path, dtype: torch.dtype, monkeypatch: Any) -> None:
    """Pieces of the file, blocks of a tensor, and short reads of the system: none hides a number."""
    monkeypatch.setattr(verify, "PIECE", 64)
    monkeypatch.setattr(verify, "BLOCK", 24)

    class Dribble(FileIO):
        def readinto(self, view: Any) -> int:
            return int(super().readinto(memoryview(view)[:7]) or 0)

    shapes = {"model.layers.0.mlp.up_proj.weight": (5, 8), "model.layers.0.mlp.down_proj.weight": (67,)}
    recipe = write_family(tmp_path, shapes, dtype, shards=1)
    skillmerge.apply(recipe)
    path = tmp_path / "merged" / "model.safetensors"
    monkeypatch.setattr(at_hand, "FileIO", Dribble)
    skillmerge.verify(tmp_path / "merged")
    sound = load_file(path)
    for name, tensor in sound.items():
        for place in range(0, tensor.numel(), 1 if tensor.numel() < 60 else 3):
            tensors = {**sound, name: tensor.clone()}
            tensors[name].view(-1)[place] = float("nan")
            save_file(tensors, path, metadata={"format": "pt"})
            forge(tmp_path / "merged")
            with pytest.raises(CheckFailed, match="NaN"):
                skillmerge.verify(tmp_path / "merged")


# ------------------------------------------------------------------------------------------------ the manifest


def of_another_version(document: dict[str, Any]) -> None:
    document["manifest_version"] = 2


def without(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda document: document.__delitem__(key)


FORGERIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "another version": of_another_version,
    "a file less": lambda document: document["files"].pop(),
    "a tensor less": lambda document: document["tensors"].pop(),
    "another shape": lambda document: document["tensors"][0].update(shape=[1]),
    "another dtype": lambda document: document["tensors"][0].update(dtype="F16"),
    "a tensor's name that is none": lambda document: document["tensors"][0].update(name=["a"]),
    "another file": lambda document: document["tensors"][0].update(file=OTHER_SHARD),
    "another size": lambda document: document["files"][0].update(size=1),
    "another digest": lambda document: document["files"][0].update(sha256="0" * 64),
    "a name outside": lambda document: document["files"][0].update(name="../../etc/passwd"),
    "no name": lambda document: document["files"][0].pop("name"),
    "a name that is none": lambda document: document["files"][0].update(name=["config.json"]),
    "files that are none": lambda document: document.update(files=7),
    "tensors that are none": lambda document: document.update(tensors={"a": 1}),
    "no run log": lambda document: document["environment"].pop("run_log"),
    "environment that is none": lambda document: document.update(environment=[]),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_forged_manifest_is_found(output: Path, forgery: str) -> None:
    forge(output, FORGERIES[forgery])
    assert_refused(output)


def test_forged_run_log_outside_is_found(output: Path) -> None:
    shutil.copy(output / RUN_LOG, output.parent / "run.json")
    forge(output, lambda document: document["environment"]["run_log"].update(name="../run.json"))
    assert_refused(output, MANIFEST)


def test_forged_config_that_contradicts_the_weights_is_found(output: Path) -> None:
    config = json.loads((output / "config.json").read_text())
    (output / "config.json").write_text(json.dumps({**config, "vocab_size": 10_000}))
    forge(output)
    assert_refused(output, "vocab_size")


@pytest.mark.parametrize("key", ["files", "tensors", "environment", "plan_digest", "statistics", "manifest_version"])
def test_manifest_without_a_part_is_found(output: Path, key: str) -> None:
    forge(output, without(key))
    assert_refused(output)


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b"null", b"7", b"{", b"\xff\xfe", b'{"manifest_version": 1}', b"[" * 100_000,
     b'{"manifest_version": 1, "manifest_version": 1}', b'{"manifest_version": 1, "digest": NaN}'],
    ids=lambda content: content[:20].decode("latin-1"),
)  # fmt: skip
def test_manifest_that_is_none_is_found(output: Path, content: bytes) -> None:
    (output / MANIFEST).write_bytes(content)
    assert_refused(output, MANIFEST)


def test_manifest_of_another_encoding_is_found(output: Path) -> None:
    """Python's reader guesses encodings: the same document in other bytes is not the same file."""
    text = (output / MANIFEST).read_text()
    (output / MANIFEST).write_bytes(text.encode("utf-16"))
    assert_refused(output, MANIFEST)


# -------------------------------------------------------------------------------------------- the command line


def test_verify_exit_statuses(output: Path) -> None:
    assert run_cli("verify", output).returncode == 0
    (output / "stray").write_text("")
    failed = run_cli("verify", output)
    assert failed.returncode == 3
    assert "stray" in failed.stderr
    nowhere = run_cli("verify", output / "nowhere")
    assert nowhere.returncode == 2


def test_verify_of_no_folder_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        skillmerge.verify(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError):
        skillmerge.verify(tmp_path / "file")


def test_verify_of_a_checkpoint_without_proof_says_so(merged: Path) -> None:
    with pytest.raises(CheckFailed, match="no readable") as caught:
        skillmerge.verify(merged.parent / "target")
    assert "skillmerge apply" in str(caught.value.fix)


@pytest.fixture
def peak_memory() -> Iterator[Callable[[], int]]:
    import tracemalloc

    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()


def test_verify_reads_in_bounded_memory(tmp_path: Path, peak_memory: Callable[[], int]) -> None:
    recipe = write_family(tmp_path, {"model.layers.0.mlp.up_proj.weight": (4096, 4096)}, shards=1)
    skillmerge.apply(recipe)
    before = peak_memory()
    skillmerge.verify(tmp_path / "merged")
    assert peak_memory() - before < 16 << 20 < (tmp_path / "merged" / "model.safetensors").stat().st_size
