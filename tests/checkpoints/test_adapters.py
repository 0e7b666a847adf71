"""LoRA adapters of every variant, as real PEFT makes them: put onto their models, and as differences."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_models import (
    DIFFERENCES,
    MERGED,
    PREFIX,
    SMALL,
    VARIANTS,
    adapter,
    expected,
    expected_difference,
    merged,
    product,
    sizes,
    wide,
)
from conftest import read_checkpoint, write_checkpoint
from safetensors.torch import load_file, save_file

from skillmerge.checkpoints.checkpoint import Checkpoint, Difference, Piece, read_bytes
from skillmerge.checkpoints.kinds.lora import adapter as lora
from skillmerge.checkpoints.kinds.table import open_folder
from skillmerge.checkpoints.stores.folder import Folder
from skillmerge.checkpoints.views import low_rank
from skillmerge.checkpoints.views.adapted import difference, onto
from skillmerge.checkpoints.views.fitting import Model
from skillmerge.engine.values import read_values
from skillmerge.errors import InputError

pytestmark = [pytest.mark.xdist_group("transformers"), pytest.mark.filterwarnings("ignore")]

BOTH = [torch.float32, torch.bfloat16]


def put_onto(folder: Path) -> Checkpoint:
    opened = lora.open("uri", Folder(folder / "adapter"))
    return onto(opened, open_folder("uri", folder / "base"))


def alone(folder: Path) -> Difference:
    base = open_folder("uri", folder / "base")
    return difference(lora.open("uri", Folder(folder / "adapter")), Model("base", base.tensors, base.config))


def changed(checkpoint: Checkpoint) -> set[str]:
    return {name for name in checkpoint.tensors if checkpoint.tensors[name].dtype == "F32"}


# With a base in bfloat16, PEFT gives a tied head a copy of the embedding's pair, which is trained by itself.
@pytest.mark.parametrize(
    ("name", "dtype"), [(name, dtype) for name in VARIANTS for dtype in BOTH if name in MERGED or dtype == BOTH[0]]
)
def test_adapter_on_its_model_is_the_sum_rounded_once(name: str, dtype: torch.dtype) -> None:
    folder = adapter(name, dtype)
    found, wanted = put_onto(folder), expected(folder)
    assert found.tensors.keys() == wanted.keys()
    different = 0
    for tensor, value in wanted.items():
        values = read_values(found, tensor).to(torch.float32).numpy().reshape(value.shape)
        assert values.tobytes() == value.tobytes(), tensor
        different += not np.array_equal(value, wide(read_checkpoint(folder / "base")[tensor]))
    assert different >= 1


@pytest.mark.parametrize("name", DIFFERENCES)
def test_adapter_alone_is_what_it_adds_rounded_once(name: str) -> None:
    folder = adapter(name)
    found = alone(folder)
    for tensor, value in expected_difference(folder).items():
        assert read_values(found.plus, tensor).numpy().tobytes() == value.tobytes(), tensor
        assert not read_values(found.minus, tensor).any()
        assert (found.plus.cost(tensor) > 0) == bool(value.any())


@pytest.mark.parametrize("name", MERGED)
def test_adapter_on_its_model_is_pefts_in_float64(name: str, tmp_path: Path) -> None:
    """To one unit in the last place of float32."""
    folder = adapter(name)
    theirs = merged(folder, tmp_path, torch.float64, VARIANTS[name].packed)
    ours = put_onto(folder)
    assert theirs.keys() == ours.tensors.keys()
    for tensor, value in theirs.items():
        values, whole = read_values(ours, tensor).double().numpy(), wide(value).reshape(-1)
        units = np.spacing(np.abs(whole).astype(np.float32)).astype(np.float64)
        assert (np.abs(values - whole) <= units).all(), tensor


@pytest.mark.parametrize("name", MERGED)
def test_adapter_on_its_model_is_near_pefts_in_float32(name: str, tmp_path: Path) -> None:
    """Within what float32 sums can lose: (r + 2) 2^-24 of |W| + the sum of |s b a|; with DoRA, 1e-7 of a row's norm."""
    folder = adapter(name)
    theirs = merged(folder, tmp_path, torch.float32, VARIANTS[name].packed)
    ours, added, rank = put_onto(folder), sizes(folder), 7 if name == "rslora" else 6
    for tensor, value in theirs.items():
        values, whole = read_values(ours, tensor).double().numpy(), wide(value)
        bound = (rank + 2) * 2**-24 * added[tensor]
        if "dora" in name and value.dim() == 2:
            bound = 1e-7 * np.sqrt((whole**2).sum(axis=int(name == "dora"), keepdims=True))
            if name != "dora":  # rows of few elements, and a B that begins with numbers near 1, so that sums cancel
                bound = bound + 2 * (rank + 2) * 2**-24 * added[tensor]
        assert (np.abs(values.reshape(whole.shape) - whole) <= bound).all(), tensor


@pytest.mark.parametrize(("area", "longest"), [(7, 3), (48, 1000), (1000, 30)])
@pytest.mark.parametrize("name", ["linear", "fan_in_fan_out", "embedding", "tokens", "experts", "dora", "dora_fan",
                                  "tokens_beside", "modules_tied",
                                  "experts_on_split"])  # fmt: skip
def test_any_part_is_that_part_of_the_whole(
    name: str, area: int, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the tiles, however many elements are computed at once, in whole rows and in parts of them."""
    folder = adapter(name, torch.bfloat16)
    whole = {tensor: bytes(read_bytes(put_onto(folder), tensor)) for tensor in changed(put_onto(folder))}
    monkeypatch.setattr(low_rank, "AREA", area)
    monkeypatch.setattr(low_rank, "LONG", longest)
    monkeypatch.setattr(low_rank, "KEPT_BYTES", 1)
    monkeypatch.setattr(low_rank, "_READ", area)
    again, draw = put_onto(folder), random.Random(area)
    for tensor, content in whole.items():
        elements = again.tensors[tensor].elements
        for _ in range(12):
            first = draw.randrange(elements)
            count = draw.randint(0, elements - first)
            assert read_bytes(again, tensor, first, count) == content[4 * first : 4 * (first + count)]


def test_matrices_are_kept_up_to_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = lora.open("uri", Folder(adapter("experts_on_split") / "adapter"))
    sizes, matrices = [spec.nbytes for spec in opened.tensors.values()], low_rank.Matrices(opened)
    monkeypatch.setattr(low_rank, "KEPT_BYTES", 2 * max(sizes))
    for spec in 2 * list(opened.tensors.values()):
        matrices._matrix(spec)
        assert 0 < matrices._bytes <= 2 * max(sizes)
        assert matrices._bytes == sum(it.nbytes for it in matrices._kept.values())
    assert sum(sizes) > 2 * max(sizes)


@pytest.mark.parametrize("name", ["linear", "tokens", "modules_to_save", "bias", "experts_on_split"])
def test_what_is_read_together_goes_where_it_belongs(name: str) -> None:
    """Elements are widened in place: neighbors, and what lies between the pieces, stay as they are."""
    checkpoint, draw = put_onto(adapter(name, torch.bfloat16)), random.Random(5)
    whole = {tensor: bytes(read_bytes(checkpoint, tensor)) for tensor in checkpoint.tensors}
    buffer, wanted, pieces, end = bytearray(b"\xaa" * 3_000_000), {}, [], 8
    memory = memoryview(buffer)
    for tensor, spec in list(checkpoint.tensors.items()) * 2:
        first = draw.randrange(spec.elements)
        count, size = draw.randint(0, spec.elements - first), spec.nbytes // spec.elements
        pieces.append(Piece(tensor, first, count, memory, end))
        wanted[end] = whole[tensor][first * size : (first + count) * size]
        end += count * size + (8 if draw.random() < 0.5 else 0)
        end += -end % 4
    checkpoint.read(pieces)()
    expect = bytearray(b"\xaa" * len(buffer))
    for start, content in wanted.items():
        expect[start : start + len(content)] = content
    assert buffer == expect


def test_adapter_reads_several_at_once_and_from_threads() -> None:
    from concurrent.futures import ThreadPoolExecutor

    folder = adapter("dora")
    checkpoint, wanted = put_onto(folder), expected(folder)
    work = [name for name in wanted for _ in range(5)]
    with ThreadPoolExecutor(8) as pool:
        for name, content in zip(work, pool.map(lambda it: read_bytes(checkpoint, it), work), strict=True):
            assert bytes(content) == wanted[name].tobytes()


def test_what_an_adapter_leaves_alone_is_as_the_model_stores_it() -> None:
    folder = adapter("linear", torch.bfloat16)
    checkpoint, base = put_onto(folder), open_folder("uri", folder / "base")
    for name, spec in base.tensors.items():
        assert checkpoint.written_dtype(name) == "BF16"
        if name not in changed(checkpoint):
            assert read_bytes(checkpoint, name) == read_bytes(base, name)
            assert checkpoint.cost(name) == spec.nbytes
    assert len(changed(checkpoint)) == 5


def test_named_adapter_is_the_one_in_its_subfolder(tmp_path: Path) -> None:
    shutil.copytree(adapter("linear") / "adapter", tmp_path, dirs_exist_ok=True)
    shutil.copytree(adapter("patterns") / "adapter", tmp_path / "rl")
    store = Folder(tmp_path)
    assert lora.names_in(store) == ["", "rl"]
    for name, made in {"": "linear", "rl": "patterns"}.items():
        base = open_folder("uri", adapter(made) / "base")
        checkpoint = onto(lora.open("uri", store, name=name), base)
        for tensor, value in expected(adapter(made)).items():
            assert bytes(read_bytes(checkpoint, tensor)) == value.tobytes()


def write_adapter(folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    document = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["x"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(document))
    save_file({f"base_model.model.{name}": value for name, value in tensors.items()}, folder / lora.WEIGHTS)
    return folder


def random_pair(module: str, outputs: int, inputs: int, seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {f"{module}.lora_A.weight": torch.randn(4, inputs, generator=draw),
            f"{module}.lora_B.weight": torch.randn(outputs, 4, generator=draw)}  # fmt: skip


def test_adapter_of_single_experts_changes_packed_ones(tmp_path: Path) -> None:
    """Two experts of four, and only one projection of one of them: the rest stays."""
    at = "model.layers.0.mlp.experts"
    pairs = {
        (1, "gate_proj"): random_pair(f"{at}.1.gate_proj", 20, 32, 1),
        (1, "down_proj"): random_pair(f"{at}.1.down_proj", 32, 20, 2),
        (3, "up_proj"): random_pair(f"{at}.3.up_proj", 20, 32, 3),
    }
    write_adapter(tmp_path, {name: it for pair in pairs.values() for name, it in pair.items()})
    base = read_checkpoint(adapter("experts") / "base")
    wanted = {name: wide(base[name]) for name in (f"{at}.gate_up_proj", f"{at}.down_proj")}
    for (expert, what), pair in pairs.items():
        added = product(*(wide(it) for it in pair.values()), 1.5)
        rows = {"gate_proj": slice(0, 20), "up_proj": slice(20, 40), "down_proj": slice(0, 32)}[what]
        wanted[f"{at}.{'down_proj' if what == 'down_proj' else 'gate_up_proj'}"][expert, rows] += added
    found = onto(lora.open("uri", Folder(tmp_path)), open_folder("uri", adapter("experts") / "base"))
    assert changed(found) == base.keys()
    for name, value in base.items():
        expect = wanted.get(name, wide(value)).astype(np.float32)
        assert bytes(read_bytes(found, name)) == expect.tobytes()


def test_adapter_of_one_projection_changes_its_rows_of_a_fused_one(tmp_path: Path) -> None:
    at = "model.layers.0.mlp"
    pair = random_pair(f"{at}.up_proj", 20, 32)
    write_adapter(tmp_path / "adapter", pair)
    fused = torch.randn(40, 32)
    write_checkpoint(tmp_path / "base", {f"{at}.gate_up_proj.weight": fused, f"{at}.down_proj.weight": fused[:, :20]})
    wanted = wide(fused)
    wanted[20:] += product(*(wide(it) for it in pair.values()), 1.5)
    found = put_onto(tmp_path)
    assert bytes(read_bytes(found, f"{at}.gate_up_proj.weight")) == wanted.astype(np.float32).tobytes()


def test_terms_are_added_in_their_order(tmp_path: Path) -> None:
    """2^60 - 2^60 + 1 is 1 in this order, and 0 in others."""
    at = "model.layers.0.mlp.up_proj"
    pair = {f"{at}.lora_A.weight": torch.tensor([[2.0**30], [2.0**30], [1.0], [0.0]]).repeat(1, 3),
            f"{at}.lora_B.weight": torch.tensor([[2.0**30, -(2.0**30), 1.0, 0.0]]).repeat(5, 1)}  # fmt: skip
    write_adapter(tmp_path / "adapter", pair, lora_alpha=4)
    write_checkpoint(tmp_path / "base", {f"{at}.weight": torch.zeros(5, 3)})
    assert read_values(put_onto(tmp_path), f"{at}.weight").tolist() == [1.0] * 15


def test_products_of_float64_are_rounded_before_they_are_added(tmp_path: Path) -> None:
    """Those of narrower adapters need no rounding: fused additions are the same."""
    at, draw = "model.layers.0.mlp.up_proj", np.random.default_rng(0)
    a, b, base = draw.normal(size=(4, 33)), draw.normal(size=(21, 4)), draw.normal(size=(21, 33))
    pair = {f"{at}.lora_A.weight": torch.from_numpy(a), f"{at}.lora_B.weight": torch.from_numpy(b)}
    write_adapter(tmp_path / "adapter", pair)
    write_checkpoint(tmp_path / "base", {f"{at}.weight": torch.from_numpy(base)})
    total = np.zeros((21, 33))
    for k in range(4):
        total += b[:, k : k + 1] * a[k]
    assert bytes(read_bytes(put_onto(tmp_path), f"{at}.weight")) == (base + total * 1.5).tobytes()


def test_square_embedding_is_transposed(tmp_path: Path) -> None:
    """As many tokens as dimensions: its shape does not show it."""
    draw = torch.Generator().manual_seed(4)
    a, b = torch.randn(4, 8, generator=draw), torch.randn(8, 4, generator=draw)
    pair = {"model.embed_tokens.lora_embedding_A": a, "model.embed_tokens.lora_embedding_B": b}
    write_adapter(tmp_path / "adapter", pair)
    write_checkpoint(tmp_path / "base", {"model.embed_tokens.weight": torch.zeros(8, 8)})
    wanted = product(wide(a), wide(b), 1.5).T.astype(np.float32)
    assert bytes(read_bytes(put_onto(tmp_path), "model.embed_tokens.weight")) == wanted.tobytes()


def test_what_plans_keep_of_an_adapter_covers_all_that_decides_its_values(tmp_path: Path) -> None:
    """Not its weights, whose versions tell them apart, but shapes, scale and names."""
    pair = random_pair("model.layers.0.mlp.up_proj", 5, 3)
    found = [
        lora.open("uri", Folder(write_adapter(tmp_path / str(number), tensors, lora_alpha=alpha)))
        for number, (tensors, alpha) in enumerate(((pair, 6), (pair, 7), (random_pair("model.layers.1.x", 5, 3), 6)))
    ]
    assert len({it.files[it.file].described for it in found}) == 3
    write_checkpoint(tmp_path / "base", {"model.layers.0.mlp.up_proj.weight": torch.zeros(5, 3)})
    base = open_folder("uri", tmp_path / "base")
    on = [onto(it, base) for it in found[:2]]
    assert len({it.files["model.safetensors"].described for it in (base, *on)}) == 3
    assert len({it.sha256("model.safetensors") for it in (base, *on)}) == 3


def test_head_that_is_stored_beside_a_tied_embedding_follows(tmp_path: Path) -> None:
    """Runtimes take the embedding for it, and others the file."""
    embedding = torch.randn(6, 4)
    pair = {"model.embed_tokens.lora_embedding_A": torch.randn(4, 6),
            "model.embed_tokens.lora_embedding_B": torch.randn(4, 4)}  # fmt: skip
    write_adapter(tmp_path / "adapter", pair)
    tensors = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding.clone()}
    write_checkpoint(tmp_path / "base", tensors, config={"tie_word_embeddings": True})
    tied = put_onto(tmp_path)
    assert read_bytes(tied, "lm_head.weight") == read_bytes(tied, "model.embed_tokens.weight")
    assert bytes(read_bytes(tied, "lm_head.weight")) != embedding.numpy().tobytes()
    write_checkpoint(tmp_path / "base", tensors)
    assert bytes(read_bytes(put_onto(tmp_path), "lm_head.weight")) == embedding.numpy().tobytes()


def test_tied_head_with_a_pair_of_its_own_is_what_was_trained() -> None:
    """The merged model gives what the adapter at work gives."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = adapter("embedding_and_head_tied")
    assert f"{PREFIX}lm_head.lora_A.weight" in load_file(folder / "adapter" / lora.WEIGHTS)
    trained = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "adapter")
    values = read_values(put_onto(folder), "model.embed_tokens.weight").reshape(-1, SMALL["hidden_size"])
    again = AutoModelForCausalLM.from_pretrained(folder / "base")
    again.load_state_dict({"model.embed_tokens.weight": values}, strict=False)
    again.tie_weights()
    tokens = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.allclose(again(tokens).logits, trained(tokens).logits, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "spoiled"),
    [
        ("modules_beside", "lm_head.modules_to_save.weight"),
        ("modules_tied", "lm_head.weight"),
        ("embedding_and_head_tied", "lm_head.lora_B.weight"),
        ("tokens_beside", "model.embed_tokens.token_adapter.base_layer.weight"),
        ("tokens_beside_tied", "lm_head.token_adapter.trainable_tokens_delta"),
        ("tokens_beside_tied", "lm_head.token_adapter.base_layer.weight"),
    ],
)
def test_what_is_there_twice_has_to_be_the_same(tmp_path: Path, name: str, spoiled: str) -> None:
    shutil.copytree(adapter(name), tmp_path, dirs_exist_ok=True)
    stored = load_file(tmp_path / "adapter" / lora.WEIGHTS)
    stored[PREFIX + spoiled][1, 2] += 1
    save_file(stored, tmp_path / "adapter" / lora.WEIGHTS)
    checkpoint = put_onto(tmp_path)
    with pytest.raises(InputError, match=r"and they differ|and not that of"):
        [read_bytes(checkpoint, tensor) for tensor in checkpoint.tensors]


def test_model_with_an_adapter_beside_it_is_a_model(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"w": torch.zeros(5, 3)})
    write_adapter(tmp_path, random_pair("w", 5, 3))
    assert not lora.claims(Folder(tmp_path))
    assert open_folder("uri", tmp_path).tensors.keys() == {"w"}


@pytest.mark.parametrize("name", ["linear", "modules_to_save", "experts_on_split"])
def test_adapter_keeps_what_every_kind_promises(name: str) -> None:
    """As `test_kind_promises` says: files hold the tensors, hints change nothing, and closing twice is no harm."""
    kinds = [put_onto(adapter(name, torch.bfloat16))]
    kinds += [alone(adapter(name)).plus, alone(adapter(name)).minus] if name in DIFFERENCES else []
    for checkpoint in kinds:
        assert [it for file in checkpoint.files.values() for it in file.tensors] == list(checkpoint.tensors)
        for file, known in checkpoint.files.items():
            assert all(checkpoint.tensors[tensor].file == file for tensor in known.tensors)
        before = {tensor: bytes(read_bytes(checkpoint, tensor)) for tensor in checkpoint.tensors}
        for tensor, spec in checkpoint.tensors.items():
            checkpoint.hint(tensor, 0, spec.elements)
            assert read_bytes(checkpoint, tensor, spec.elements, 0) == b""
        assert before == {tensor: bytes(read_bytes(checkpoint, tensor)) for tensor in checkpoint.tensors}
        checkpoint.check_unchanged()
        checkpoint.cancel()
        checkpoint.close()
        checkpoint.close()
