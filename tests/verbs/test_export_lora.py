"""A skill as a LoRA adapter: the best of its rank, and one that PEFT loads and merges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_tensors, run_cli, tensor_shapes, write_checkpoint, write_recipe
from safetensors.torch import load_file

import skillmerge
from skillmerge.claim import hold
from skillmerge.errors import InputError, OutputLocked, UsageError
from skillmerge.reporter import Reporter
from skillmerge.study.spectrum import truncated_svd

pytestmark = pytest.mark.xdist_group("transformers")

LINEAR = "model.layers.0.mlp.up_proj.weight"


def low_rank(rows: int, columns: int, rank: int, seed: int = 0, scale: float = 1e-2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator)
    return left @ right * scale


@pytest.mark.parametrize(("rows", "columns"), [(300, 200), (64, 500), (10, 10), (400, 400)])
def test_truncated_svd_is_the_best_of_its_rank(rows: int, columns: int) -> None:
    """Against numpy's full decomposition: a matrix of falling singular values."""
    generator = torch.Generator().manual_seed(1)
    least = min(rows, columns)
    u = torch.linalg.qr(torch.randn(rows, least, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(columns, least, generator=generator, dtype=torch.float64)).Q
    values = 0.8 ** torch.arange(least, dtype=torch.float64)
    matrix = u * values @ v.T
    for rank in (1, 5, least):
        left, found, right = truncated_svd(matrix, rank, seed=3)
        assert torch.allclose(found, values[:rank], rtol=1e-6, atol=1e-12)
        best = (u[:, :rank] * values[:rank]) @ v[:, :rank].T
        assert torch.allclose(left * found @ right.T, best, atol=1e-6)
        again = truncated_svd(matrix, rank, seed=3)
        assert torch.equal(again[1], found)


def skill_of(folder: Path, updates: dict[str, torch.Tensor], config: dict[str, Any] | None = None) -> Path:
    sft = random_tensors({name: tuple(tensor.shape) for name, tensor in updates.items()}, torch.float32, 1)
    write_checkpoint(folder / "sft", sft, config=config)
    write_checkpoint(folder / "rl", {name: sft[name] + updates[name] for name in sft}, config=config)
    return skillmerge.extract(str(folder / "rl"), str(folder / "sft"), folder / "skill").output


def test_adapter_holds_all_of_a_low_rank_update(tmp_path: Path) -> None:
    skill = skill_of(tmp_path, {LINEAR: low_rank(200, 120, 4), "model.norm.weight": torch.zeros(16)})
    exported = skillmerge.export(skill, tmp_path / "adapter", lora_rank=4)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{LINEAR.removesuffix('.weight')}.lora_{part}.weight"] for part in "AB")
    assert (tuple(a.shape), tuple(b.shape)) == ((4, 120), (200, 4))
    assert torch.allclose(b @ a, low_rank(200, 120, 4), atol=2e-6)
    assert exported.energy > 0.9999
    assert exported.modules[LINEAR]["energy"] > 0.9999
    assert exported.left == ("model.norm.weight",)


def test_energy_is_what_the_adapter_keeps(tmp_path: Path) -> None:
    update = {LINEAR: random_tensors({"x": (300, 400)}, torch.float32, 5)["x"], "model.norm.weight": torch.ones(16)}
    exported = skillmerge.export(skill_of(tmp_path, update), tmp_path / "adapter", lora_rank=16)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{LINEAR.removesuffix('.weight')}.lora_{part}.weight"] for part in "AB")
    values = torch.linalg.svdvals(update[LINEAR].double())
    best = float((values[:16] ** 2).sum() / (values**2).sum())
    kept = exported.modules[LINEAR]["energy"]
    assert best * 0.96 <= kept <= best * 1.0001
    lost = float(((b @ a).double() - update[LINEAR].double()).norm() ** 2) / float(update[LINEAR].double().norm() ** 2)
    assert 1 - lost == pytest.approx(kept, abs=1e-4)
    assert exported.left_energy == pytest.approx(16 / (16 + float((values**2).sum())), rel=1e-4)


def test_rank_above_the_matrix_is_padded(tmp_path: Path) -> None:
    skillmerge.export(skill_of(tmp_path, {LINEAR: low_rank(6, 40, 6)}), tmp_path / "adapter", lora_rank=16)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{LINEAR.removesuffix('.weight')}.lora_{part}.weight"] for part in "AB")
    assert a.shape == (16, 40)
    assert torch.allclose(b @ a, low_rank(6, 40, 6), atol=2e-6)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft and transformers have not quite met
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peft_loads_and_merges_it(tmp_path: Path, dtype: torch.dtype) -> None:
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    config = transformers.Qwen2Config(
        vocab_size=64, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(config).to(dtype)
    model.save_pretrained(tmp_path / "sft")
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and "proj" in name:
            weight.data += low_rank(*weight.shape, 12, seed=len(name), scale=2e-2).to(dtype)
    model.save_pretrained(tmp_path / "rl")
    skill = skillmerge.extract(str(tmp_path / "rl"), str(tmp_path / "sft"), tmp_path / "skill").output
    skillmerge.export(skill, tmp_path / "adapter", lora_rank=8)
    base = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path / "sft", dtype=dtype)
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert adapted.peft_config["default"].task_type == "CAUSAL_LM"
    merged = adapted.merge_and_unload().state_dict()
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    changed = 0
    for name, weight in before.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" in tensors:
            update = tensors[f"{module}.lora_B.weight"].double() @ tensors[f"{module}.lora_A.weight"].double()
            wanted = weight.double() + update
            unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-22
            assert torch.all((merged[name].double() - wanted).abs() <= unit * (wanted.abs() + update.abs()) + 1e-7), (
                name
            )
            changed += 1
        else:
            assert torch.equal(merged[name], weight), name
    assert changed == 14
    assert torch.isfinite(adapted(input_ids=torch.tensor([[1, 2, 3]])).logits).all()


def test_what_cannot_be_exported_is_told(tmp_path: Path) -> None:
    skill = skill_of(tmp_path, {LINEAR: low_rank(8, 8, 2)})
    with pytest.raises(UsageError, match="a number from 1"):
        skillmerge.export(skill, tmp_path / "adapter", lora_rank=0)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="already exists"):
        skillmerge.export(skill, tmp_path / "taken", lora_rank=2)
    with pytest.raises(UsageError, match="would replace"):
        skillmerge.export(skill, skill, lora_rank=2)
    with pytest.raises(InputError, match="is not a skill"):
        skillmerge.export(tmp_path / "rl", tmp_path / "adapter", lora_rank=2)
    other = skill_of(tmp_path / "norms", {"model.norm.weight": torch.ones(4)})
    with pytest.raises(InputError, match="no matrix of a linear module"):
        skillmerge.export(other, tmp_path / "adapter", lora_rank=2)
    turned = skill_of(tmp_path / "gpt2", {"transformer.h.0.mlp.c_fc.weight": low_rank(8, 8, 2)}, {"model_type": "gpt2"})
    with pytest.raises(InputError, match="matrices transposed"):
        skillmerge.export(turned, tmp_path / "adapter", lora_rank=2)
    assert not (tmp_path / "adapter").exists()


def test_failed_export_leaves_nothing(tmp_path: Path) -> None:
    skill = skill_of(tmp_path, {LINEAR: low_rank(8, 8, 2)})
    file = next(skill.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-4:] = b"\xff\xff\xff\x7f"  # a NaN among the values
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"too large for an adapter|not encoded as it should be"):
        skillmerge.export(skill, tmp_path / "adapter", lora_rank=2)
    assert not (tmp_path / "adapter").exists()


def test_the_base_is_what_was_subtracted(tmp_path: Path) -> None:
    """Whatever the order of a recipe's models; and none where there is none."""
    skill_of(tmp_path, {LINEAR: low_rank(8, 8, 2)})
    skill = {"kind": "skill", "path": "cut"}
    models = {"sft": "sft", "rl": "rl"}
    cut = skillmerge.apply(write_recipe(tmp_path, "rl - sft", models=models, coefficients=None, output=skill)).output
    skillmerge.export(cut, tmp_path / "adapter", lora_rank=2)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "sft"
    half = {"kind": "skill", "path": "half"}
    recipe = write_recipe(tmp_path, "0.5 * cut", models={"cut": {"skill": "cut"}}, coefficients=None, output=half)
    skillmerge.export(skillmerge.apply(recipe).output, tmp_path / "other", lora_rank=2)
    assert json.loads((tmp_path / "other" / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    skillmerge.export(cut, tmp_path / "hub", lora_rank=2, base="hf://acme/model@abc123")
    config = json.loads((tmp_path / "hub" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("acme/model", "abc123")
    with pytest.raises(UsageError, match="cannot name a subfolder"):
        skillmerge.export(cut, tmp_path / "sub", lora_rank=2, base="hf://acme/model/sub")


def test_tables_inside_linear_modules_are_left(tmp_path: Path) -> None:
    table = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    skill = skill_of(tmp_path, {LINEAR: low_rank(8, 8, 2), table: low_rank(8, 4, 2)})
    assert skillmerge.export(skill, tmp_path / "adapter", lora_rank=2).left == (table,)


def test_one_export_at_a_time(tmp_path: Path) -> None:
    """Another run is told that the place is taken; what a killed run left is in nobody's way."""
    skill = skill_of(tmp_path, {LINEAR: low_rank(8, 8, 2)})
    beside = tmp_path / ".adapter.writing"
    beside.mkdir()
    (beside / "adapter_model.safetensors").write_bytes(b"half")
    with hold(beside, Reporter()), pytest.raises(OutputLocked):
        skillmerge.export(skill, tmp_path / "adapter", lora_rank=2)
    assert (beside / "adapter_model.safetensors").read_bytes() == b"half"
    skillmerge.export(skill, tmp_path / "adapter", lora_rank=2)
    assert len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == 2
    assert not beside.exists()


def test_export_command(tmp_path: Path) -> None:
    shapes = tensor_shapes()
    for seed, name in enumerate(("rl", "sft")):
        write_checkpoint(tmp_path / name, random_tensors(shapes, seed=seed))
    assert run_cli("extract", "--from", "rl", "--minus", "sft", "-o", "skill", cwd=tmp_path).returncode == 0
    process = run_cli("export", "skill", "--lora-rank", "4", "-o", "adapter", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "of the skill's energy" in process.stdout
    assert "of the energy, in" in process.stdout
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "sft"
    assert (config["r"], config["lora_alpha"]) == (4, 4)
    process = run_cli("export", "skill", "--lora-rank", "4", "-o", "other", "--base", "acme/x", "--json", cwd=tmp_path)
    document = json.loads(process.stdout)
    assert document["rank"] == 4
    assert json.loads((tmp_path / "other" / "adapter_config.json").read_text())["base_model_name_or_path"] == "acme/x"
