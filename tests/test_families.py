"""Every family that teams merge, tiny and real: saved by transformers, merged, loaded by transformers again.

Loads run in one helper process for the whole module, because starting transformers takes seconds; one test
goes the whole way through `apply` and `verify --load` on the command line.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from conftest import PAST, read_checkpoint, run_cli, write_checkpoint, write_recipe

import skillmerge
from skillmerge.naming import block_of, module_kind

UPDATES = {"target": [(1, 5e-3)], "sft": [(2, 5e-3)], "rl": [(2, 5e-3), (3, 1e-3)]}
"""Model -> the updates (seed, scale) that it has on top of a common base."""

LAM = 0.7
LOADER = """
import json, sys
from skillmerge.study.load_probe import main
for line in sys.stdin:
    print(json.dumps(main(line.strip())), flush=True)
"""

TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DENSE = {"attention", "mlp", "norm", "embedding"}
SPARSE = {"attention", "expert", "router", "norm", "embedding"}


@dataclass(frozen=True)
class Family:
    """A model class of transformers, its tiny config, and what its checkpoint's names should say.

    stacks: blocks in each stack. kinds: all module kinds present, but for `other`, which `others` names.
    wide: how the names of tensors end that such checkpoints keep in float32. shard_size: of target and rl;
    sft is one file.
    """

    architecture: str
    settings: dict[str, Any]
    kinds: set[str]
    stacks: dict[str, int] = field(default_factory=lambda: {"model.layers": 2})
    others: tuple[str, ...] = ()
    dtype: torch.dtype = torch.bfloat16
    wide: str | None = None
    shard_size: str = "5GB"


FAMILIES = {
    "llama": Family("LlamaForCausalLM", TEXT, DENSE | {"head"}, shard_size="20KB"),
    "qwen2": Family("Qwen2ForCausalLM", {**TEXT, "tie_word_embeddings": True}, DENSE),
    "qwen3": Family("Qwen3ForCausalLM", {**TEXT, "head_dim": 8, "tie_word_embeddings": True}, DENSE),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        {**TEXT, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        SPARSE | {"head"},
        shard_size="20KB",
    ),
    "mistral": Family("MistralForCausalLM", {**TEXT, "head_dim": 8}, DENSE | {"head"}),
    "mixtral": Family("MixtralForCausalLM", {**TEXT, "num_local_experts": 4}, SPARSE | {"head"}, shard_size="20KB"),
    "gemma2": Family("Gemma2ForCausalLM", {**TEXT, "head_dim": 8}, DENSE),
    "gemma3_text": Family("Gemma3ForCausalLM", {**TEXT, "head_dim": 8}, DENSE),
    "gemma3_vision": Family(
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {**TEXT, "head_dim": 8},
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "image_size": 28,
                "patch_size": 14,
                "vision_use_head": False,
            },
            "mm_tokens_per_image": 4,
            "image_token_index": 60,
            "boi_token_index": 61,
            "eoi_token_index": 62,
        },
        DENSE,
        stacks={"language_model.model.layers": 2, "vision_tower.encoder.layers": 3},
        others=("multi_modal_projector.mm_input_projection_weight",),
        shard_size="40KB",
    ),
    "phi3": Family("Phi3ForCausalLM", TEXT, DENSE | {"head"}),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        {
            **TEXT,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
        SPARSE | {"mlp", "head"},
        wide="e_score_correction_bias",
        shard_size="20KB",
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        {**TEXT, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
        SPARSE | {"head"},
        shard_size="40KB",
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        | {"bos_token_id": 1, "eos_token_id": 2},
        DENSE,
        stacks={"transformer.h": 2},
    ),
    "bert": Family(
        "BertForMaskedLM",
        {key: value for key, value in TEXT.items() if key != "num_key_value_heads"},
        DENSE | {"head"},
        stacks={"bert.encoder.layer": 2},
        dtype=torch.float32,
        shard_size="40KB",
    ),
    "t5": Family(
        "T5ForConditionalGeneration",
        {"vocab_size": 64, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_decoder_layers": 3}
        | {"num_heads": 4, "decoder_start_token_id": 0},
        DENSE,
        stacks={"encoder.block": 2, "decoder.block": 3},
    ),
    "whisper": Family(
        "WhisperForConditionalGeneration",
        {"vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "num_mel_bins": 8}
        | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48}
        | {"decoder_ffn_dim": 48, "max_source_positions": 16, "max_target_positions": 32}
        | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
        DENSE,
        stacks={"model.encoder.layers": 2, "model.decoder.layers": 3},
        others=tuple(f"model.encoder.conv{n}.{part}" for n in (1, 2) for part in ("bias", "weight")),
        dtype=torch.float16,
        shard_size="40KB",
    ),
    "qwen2_5_vl": Family(
        "Qwen2_5_VLForConditionalGeneration",
        {
            "text_config": {
                **TEXT,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
            },
            "vision_config": {
                "depth": 3,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 4,
                "out_hidden_size": 32,
                "patch_size": 14,
                "fullatt_block_indexes": [1],
            },
            "image_token_id": 60,
            "video_token_id": 61,
            "vision_start_token_id": 62,
            "vision_end_token_id": 63,
        },
        DENSE | {"head"},
        stacks={"model.layers": 2, "visual.blocks": 3},
        shard_size="40KB",
    ),
}

TIED_HEADS = {
    "qwen2": {"lm_head.weight": "model.embed_tokens.weight"},
    "gemma3_vision": {"language_model.lm_head.weight": "language_model.model.embed_tokens.weight"},
    "gpt2": {"lm_head.weight": "transformer.wte.weight"},
    "bert": {"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"},
    "t5": {
        "lm_head.weight": "shared.weight",
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    },
    "whisper": {"proj_out.weight": "model.decoder.embed_tokens.weight"},
}
"""Copies of the embedding that other writers store too, and transformers does not."""

KINDS = (
    ("llama", "model.layers.1.mlp.gate_proj.weight", "mlp"),
    ("llama", "model.layers.1.post_attention_layernorm.weight", "norm"),
    ("qwen3", "model.layers.0.self_attn.q_norm.weight", "norm"),
    ("qwen3_moe", "model.layers.0.mlp.gate.weight", "router"),
    ("qwen3_moe", "model.layers.0.mlp.experts.3.gate_proj.weight", "expert"),
    ("mixtral", "model.layers.0.block_sparse_moe.gate.weight", "router"),
    ("mixtral", "model.layers.0.block_sparse_moe.experts.0.w1.weight", "expert"),
    ("phi3", "model.layers.0.self_attn.qkv_proj.weight", "attention"),
    ("deepseek_v3", "model.layers.0.mlp.up_proj.weight", "mlp"),
    ("deepseek_v3", "model.layers.0.self_attn.kv_a_layernorm.weight", "norm"),
    ("deepseek_v3", "model.layers.0.self_attn.kv_a_proj_with_mqa.weight", "attention"),
    ("deepseek_v3", "model.layers.1.mlp.gate.e_score_correction_bias", "router"),
    ("deepseek_v3", "model.layers.1.mlp.shared_experts.down_proj.weight", "expert"),
    ("gpt_oss", "model.layers.0.self_attn.sinks", "attention"),
    ("gpt_oss", "model.layers.0.mlp.experts.gate_up_proj_bias", "expert"),
    ("gpt_oss", "model.layers.0.mlp.router.bias", "router"),
    ("gpt2", "transformer.h.0.attn.c_proj.weight", "attention"),
    ("gpt2", "transformer.h.0.mlp.c_proj.weight", "mlp"),
    ("gpt2", "transformer.ln_f.bias", "norm"),
    ("gpt2", "transformer.wpe.weight", "embedding"),
    ("bert", "bert.encoder.layer.0.attention.output.dense.weight", "attention"),
    ("bert", "bert.encoder.layer.0.attention.output.LayerNorm.weight", "norm"),
    ("bert", "bert.encoder.layer.0.intermediate.dense.weight", "mlp"),
    ("bert", "bert.encoder.layer.0.output.dense.weight", "mlp"),
    ("bert", "cls.predictions.transform.dense.weight", "head"),
    ("t5", "decoder.block.0.layer.1.EncDecAttention.k.weight", "attention"),
    ("t5", "decoder.block.0.layer.2.DenseReluDense.wi.weight", "mlp"),
    ("t5", "shared.weight", "embedding"),
    ("whisper", "model.decoder.layers.2.encoder_attn.q_proj.weight", "attention"),
    ("whisper", "model.encoder.layers.0.fc1.weight", "mlp"),
    ("qwen2_5_vl", "visual.blocks.0.attn.qkv.weight", "attention"),
    ("qwen2_5_vl", "visual.patch_embed.proj.weight", "embedding"),
)


def save_models(transformers: Any, folder: Path, family: Family) -> None:
    """target, sft and rl in `folder`, as transformers saves them."""
    kind = getattr(transformers, family.architecture)
    torch.manual_seed(0)
    model = kind(kind.config_class(**family.settings)).to(family.dtype)
    for name, buffer in model.named_buffers():
        if family.wide and name.endswith(family.wide):
            buffer.data = buffer.data.to(torch.float32)
    weights = list({tensor.data_ptr(): tensor for tensor in model.state_dict().values()}.values())
    base = [tensor.clone() for tensor in weights]
    for name, updates in UPDATES.items():
        for tensor, start in zip(weights, base, strict=True):
            tensor.copy_(start)
        for seed, scale in updates:
            generator = torch.Generator().manual_seed(seed)
            for tensor in weights:
                tensor += scale * torch.randn(tensor.shape, generator=generator)
        model.save_pretrained(folder / name, max_shard_size="5GB" if name == "sft" else family.shard_size)


@pytest.fixture(scope="module")
def transformers() -> Any:
    library = pytest.importorskip("transformers")
    library.utils.logging.disable_progress_bar()
    return library


@pytest.fixture(scope="module")
def families(transformers: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's folder with target, sft, rl and merged in it, made when first asked for."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            save_models(transformers, root, FAMILIES[name])
            skillmerge.apply(write_recipe(root, coefficients={"lam": LAM}), device="cpu")
            made[name] = root
        return made[name]

    return folder


@pytest.fixture(scope="module")
def load() -> Iterator[Callable[[Path], dict[str, Any]]]:
    """The load probe in a process of its own, which serves all loads of this module."""
    pytest.importorskip("transformers")
    pipe, environment = subprocess.PIPE, {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOADER]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(folder: Path) -> dict[str, Any]:
            print(folder, file=process.stdin, flush=True)
            return dict(json.loads(process.stdout.readline()))

        yield ask
        process.stdin.close()


def copy_with(
    source: Path, folder: Path, drop: str = "", config: dict[str, Any] | None = None, **changed: torch.Tensor
) -> Path:
    """A copy of a model without one tensor, or with some added or replaced, or with other config keys."""
    tensors = {name: tensor for name, tensor in read_checkpoint(source).items() if name != drop} | changed
    document = json.loads((source / "config.json").read_text())
    return write_checkpoint(folder, tensors, config={**document, **(config or {})})


def inside_block(name: str) -> str:
    """The end of a tensor's name, from its block on: the runtime may call what comes before differently."""
    block = block_of(name)
    assert block is not None
    return name[len(block[0].rpartition(".")[0]) :].lstrip(".")


@pytest.mark.parametrize("name", FAMILIES)
def test_merged_family_loads_without_stray_keys(
    name: str, families: Callable[[str], Path], load: Callable[[Path], dict[str, Any]]
) -> None:
    report = load(families(name) / "merged")
    assert report["ok"], report["why"]
    assert report["class"] == FAMILIES[name].architecture
    assert report["finite"] is True
    assert report["shape"] == [1, 8, 64]
    assert not [key for key in report if key.endswith(("_keys", "_msgs"))]


@pytest.mark.parametrize("name", FAMILIES)
def test_merged_family_equals_a_float64_merge(name: str, families: Callable[[str], Path]) -> None:
    folder = families(name)
    models = {model: read_checkpoint(folder / model) for model in UPDATES}
    merged = read_checkpoint(folder / "merged")
    assert merged.keys() == models["target"].keys()
    changed = total = 0
    for key, found in merged.items():
        inputs = {model: tensors[key] for model, tensors in models.items()}
        assert found.dtype == inputs["target"].dtype, key
        exact = oracle.evaluate(PAST, inputs, {"lam": LAM})
        # Rounded once, so half a unit; and what float32 loses where the terms cancel each other.
        magnitude = oracle.evaluate("abs(target) + lam * (abs(rl) + abs(sft))", inputs, {"lam": LAM, "abs": abs})
        allowed = oracle.unit(exact, found.dtype) / 2 + magnitude * 2.0**-22
        error = np.abs(found.to(torch.float64).numpy() - exact)
        assert (error <= allowed).all(), f"{key}: {(error / allowed).max()} times what is allowed"
        changed += int((found != inputs["target"]).sum())
        total += found.numel()
    assert changed > total / 2


@pytest.mark.parametrize("name", FAMILIES)
def test_family_merges_through_a_skill_as_it_does_directly(
    name: str, families: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = families(name)
    recipe = json.loads((folder / "recipe.yaml").read_text())
    skillmerge.extract(str(folder / "rl"), str(folder / "sft"), tmp_path / "math")
    recipe["models"] = {"target": str(folder / "target"), "math": {"skill": "math"}}
    recipe["merge"] = "target + lam * math"
    recipe["output"] = {**recipe.get("output", {}), "path": "stored"}
    recipe.pop("ignore", None)
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    stored = skillmerge.apply(tmp_path / "recipe.yaml").output
    direct = folder / "merged"
    assert {p.name: p.read_bytes() for p in stored.glob("*.safetensors")} == {
        p.name: p.read_bytes() for p in direct.glob("*.safetensors")
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_merged_family_keeps_files_and_layout(name: str, families: Callable[[str], Path]) -> None:
    folder = families(name)
    donor = {path.name: path for path in (folder / "target").iterdir()}
    merged = {path.name: path for path in (folder / "merged").iterdir()}
    assert donor.keys() == {file for file in merged if not file.startswith("skillmerge.")}
    family = FAMILIES[name]
    assert ("model.safetensors" in donor) == (family.shard_size == "5GB"), "sharded where it should be"
    wide = {torch.float32} if family.wide else set()
    assert {tensor.dtype for tensor in read_checkpoint(folder / "merged").values()} == {family.dtype} | wide
    for file in ("config.json", "generation_config.json"):
        assert file not in donor or merged[file].read_bytes() == donor[file].read_bytes()


@pytest.mark.parametrize("name", FAMILIES)
def test_family_names_tell_blocks_and_kinds(name: str, families: Callable[[str], Path]) -> None:
    family = FAMILIES[name]
    tensors = read_checkpoint(families(name) / "merged")
    blocks = {block for key in tensors if (block := block_of(key)) is not None}
    assert Counter(stack for stack, _ in blocks) == family.stacks
    assert {index for _, index in blocks} == set(range(max(family.stacks.values())))
    assert {module_kind(key) for key in tensors} - {"other"} == family.kinds
    assert {key for key in tensors if module_kind(key) == "other"} == set(family.others)
    for stack, count in family.stacks.items():
        for index in range(count):
            inside = {module_kind(key) for key in tensors if block_of(key) == (stack, index)}
            assert {"attention", "norm"} <= inside
            assert inside & {"mlp", "expert"}
            assert not inside & {"embedding", "head", "other"}


@pytest.mark.parametrize(("name", "key", "kind"), KINDS)
def test_family_tensor_is_of_its_kind(name: str, key: str, kind: str, families: Callable[[str], Path]) -> None:
    assert key in read_checkpoint(families(name) / "target")
    assert module_kind(key) == kind


@pytest.mark.parametrize("name", TIED_HEADS)
@pytest.mark.parametrize("writer", ["target", "rl"])
def test_tied_copies_of_the_embedding_are_accounted_for(
    name: str,
    writer: str,
    families: Callable[[str], Path],
    load: Callable[[Path], dict[str, Any]],
    tmp_path: Path,
) -> None:
    tied = TIED_HEADS[name]
    for model in UPDATES:
        tensors = read_checkpoint(families(name) / model)
        copies = {copy: tensors[key].clone() for copy, key in tied.items()} if model == writer else {}
        copy_with(families(name) / model, tmp_path / model, **copies)
    result = skillmerge.apply(write_recipe(tmp_path, coefficients={"lam": LAM}), device="cpu")
    merged = read_checkpoint(result.output)
    assert merged.keys() == read_checkpoint(tmp_path / "target").keys()
    for copy, key in tied.items():
        assert (copy in merged) == (writer == "target")
        assert copy not in merged or torch.equal(merged[copy], merged[key])
    report = load(result.output)
    assert report["ok"], report["why"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for name, family in FAMILIES.items()
        for kind in ("attention", "expert", "norm")
        if kind in family.kinds
    ],
)
def test_load_names_a_missing_tensor(
    name: str,
    kind: str,
    families: Callable[[str], Path],
    load: Callable[[Path], dict[str, Any]],
    tmp_path: Path,
) -> None:
    merged = families(name) / "merged"
    keys = [key for key in read_checkpoint(merged) if block_of(key) and module_kind(key) == kind]
    report = load(copy_with(merged, tmp_path / "broken", drop=keys[-1]))
    assert report["ok"] is False
    # Experts stored one by one are one tensor in memory: the runtime names that one.
    named = inside_block(keys[-1])
    expected = named if kind != "expert" else f"{named.split('.')[0]}.{named.split('.')[1]}.mlp."
    assert expected in report["why"]


def test_load_names_a_tensor_too_many(
    families: Callable[[str], Path], load: Callable[[Path], dict[str, Any]], tmp_path: Path
) -> None:
    extra = {"model.layers.7.surplus.weight": torch.ones(3)}
    report = load(copy_with(families("llama") / "merged", tmp_path / "broken", **extra))
    assert report["ok"] is False
    assert report["unexpected_keys"] == ["model.layers.7.surplus.weight"]
    assert report["why"] == "unexpected_keys: model.layers.7.surplus.weight"


def test_load_names_a_tensor_of_another_shape_with_both_shapes(
    families: Callable[[str], Path], load: Callable[[Path], dict[str, Any]], tmp_path: Path
) -> None:
    changed = {"model.layers.1.self_attn.k_proj.weight": torch.ones(8, 32)}
    report = load(copy_with(families("llama") / "merged", tmp_path / "broken", **changed))
    assert report["ok"] is False
    assert report["why"] == "mismatched_keys: model.layers.1.self_attn.k_proj.weight [8, 32] instead of [16, 32]"


def test_load_names_an_expert_that_does_not_fit_the_others(
    families: Callable[[str], Path], load: Callable[[Path], dict[str, Any]], tmp_path: Path
) -> None:
    changed = {"model.layers.1.mlp.experts.2.up_proj.weight": torch.ones(8, 32)}
    report = load(copy_with(families("qwen3_moe") / "merged", tmp_path / "broken", **changed))
    assert report["ok"] is False
    assert "model.layers.1.mlp.experts.gate_up_proj" in report["why"]


def test_load_refuses_outputs_that_are_not_finite(
    families: Callable[[str], Path], load: Callable[[Path], dict[str, Any]], tmp_path: Path
) -> None:
    norm = torch.full((32,), float("nan"), dtype=torch.bfloat16)
    changed = {"model.norm.weight": norm}
    report = load(copy_with(families("llama") / "merged", tmp_path / "broken", **changed))
    assert (report["ok"], report["finite"]) == (False, False)
    assert "not finite" in report["why"]


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"architectures": ["LlamaForNothing"]}, "LlamaForNothing"),
        ({"model_type": "unheard-of"}, "unheard-of"),
        ({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}, "trust_remote_code"),
        ({"hidden_act": "unheard-of"}, "unheard-of"),
        ({"num_hidden_layers": 3}, "model.layers.2."),
        ({"num_hidden_layers": 1}, "model.layers.1."),
    ],
)
def test_load_says_what_is_wrong_with_a_config(
    config: dict[str, Any],
    why: str,
    families: Callable[[str], Path],
    load: Callable[[Path], dict[str, Any]],
    tmp_path: Path,
) -> None:
    report = load(copy_with(families("llama") / "merged", tmp_path / "broken", config=config))
    assert report["ok"] is False
    assert why in report["why"]


def test_load_of_a_model_that_names_no_class_takes_the_automatic_one(
    families: Callable[[str], Path], load: Callable[[Path], dict[str, Any]], tmp_path: Path
) -> None:
    target = families("llama") / "merged"
    report = load(copy_with(target, tmp_path / "headless", drop="lm_head.weight", config={"architectures": None}))
    assert report["ok"], report["why"]
    assert (report["class"], report["shape"]) == ("LlamaModel", [1, 8, 32])


def test_load_reports_a_missing_shard_and_serves_on(
    families: Callable[[str], Path], load: Callable[[Path], dict[str, Any]], tmp_path: Path
) -> None:
    merged = families("llama") / "merged"
    broken = Path(shutil.copytree(merged, tmp_path / "broken"))
    next(broken.glob("model-00002-*")).unlink()
    report = load(broken)
    assert report["ok"] is False
    assert "model-00002-" in report["why"]
    assert load(merged)["ok"] is True


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        (
            "ViTForImageClassification",
            {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
            | {"image_size": 32, "patch_size": 16},
        ),
        (
            "Wav2Vec2ForCTC",
            {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
            | {"vocab_size": 16, "conv_dim": [16, 16], "conv_kernel": [10, 8], "conv_stride": [5, 4]}
            | {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2},
        ),
    ],
)
def test_load_makes_up_pictures_and_sound(
    architecture: str,
    settings: dict[str, Any],
    transformers: Any,
    load: Callable[[Path], dict[str, Any]],
    tmp_path: Path,
) -> None:
    kind = getattr(transformers, architecture)
    kind(kind.config_class(**settings)).save_pretrained(tmp_path)
    report = load(tmp_path)
    assert report["ok"], report["why"]
    assert report["finite"] is True


def test_load_says_so_where_it_cannot_make_up_inputs(
    transformers: Any, load: Callable[[Path], dict[str, Any]], tmp_path: Path
) -> None:
    """Text and picture both needed: the weights fit, and the report says that only the run failed."""
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.CLIPConfig(
        text_config={**small, "vocab_size": 64},
        vision_config={**small, "image_size": 28, "patch_size": 14},
        projection_dim=16,
    )
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    report = load(tmp_path)
    assert report["ok"] is False
    assert report["why"].startswith("its weights load, but it does not run on made-up inputs")


def test_verify_load_on_the_command_line(families: Callable[[str], Path], tmp_path: Path) -> None:
    """The whole way as a person goes it; then a donor whose config promises biases that nobody has."""
    folder = families("qwen3_moe")
    apply = partial(run_cli, "apply", "--device", "cpu", "--output")
    assert apply(tmp_path / "merged", folder / "recipe.yaml").returncode == 0
    checked = run_cli("verify", "--load", "--json", tmp_path / "merged")
    assert checked.returncode == 0, checked.stderr
    assert json.loads(checked.stdout)["load"]["class"] == "Qwen3MoeForCausalLM"

    for model in UPDATES:
        copy_with(folder / model, tmp_path / model, config={"attention_bias": True})
    recipe = write_recipe(tmp_path)
    assert apply(tmp_path / "promising", recipe).returncode == 0
    assert run_cli("verify", tmp_path / "promising").returncode == 0
    checked = run_cli("verify", "--load", tmp_path / "promising")
    assert checked.returncode == 3
    assert "missing_keys: model.layers.0.self_attn.k_proj.bias" in checked.stderr
