"""Checkpoints that hold less than they say, each told by name; and those whose config explains what looks missing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_checkpoint
from safetensors.torch import save_file

from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.checkpoints.kinds.dense import missing_shards
from skillmerge.checkpoints.kinds.table import open_folder
from skillmerge.errors import InputError
from skillmerge.plans.compare.complete import check_complete

BLOCK = ("self_attn.q_proj.weight", "self_attn.o_proj.weight", "mlp.up_proj.weight", "input_layernorm.weight")
CONFIG = {"model_type": "llama", "num_hidden_layers": 6}
FETCH = "fetch or save that checkpoint again; if it is meant to be so, write `accept: [architecture]`"

Tensors = dict[str, torch.Tensor]


def blocks(count: int = 6, stack: str = "model.layers", inner: tuple[str, ...] = BLOCK) -> Tensors:
    return {f"{stack}.{index}.{name}": torch.zeros(2, 2) for index in range(count) for name in inner}


def opened(folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any] = CONFIG) -> Checkpoint:
    return open_folder("m", write_checkpoint(folder, tensors, config=config))


def said(folder: Path, tensors: Tensors, config: Mapping[str, Any] = CONFIG) -> list[tuple[str, str]]:
    tensors = {"model.embed_tokens.weight": torch.zeros(8, 2), **tensors}
    return [(it.level, it.message) for it in check_complete({"m": opened(folder, tensors, config)}, "")]


def without(tensors: Tensors, *patterns: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if not any(re.search(it, name) for it in patterns)}


# Files.


def test_a_lone_shard_is_not_a_model(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, blocks(), shards=2, config=CONFIG)
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError) as caught:
        open_folder("m", tmp_path)
    assert caught.value.message == (
        f"{tmp_path}: shard 2 of 2 is missing: only model-00001-of-00002.safetensors is there"
    )
    assert caught.value.fix == "the checkpoint is incomplete: fetch it again, with model.safetensors.index.json"


@pytest.mark.parametrize(
    ("files", "missing"),
    [
        (["model-00002-of-00002.safetensors"], "shard 1 of 2"),
        (["model-00002-of-00004.safetensors"], "shards 1, 3, 4 of 4"),
        (["pytorch_model-1-of-3.safetensors"], "shards 2, 3 of 3"),
        (["consolidated.00001-of-00002.safetensors"], "shard 2 of 2"),
        (["model-00000-of-00002.safetensors", "model-00001-of-00002.safetensors"], None),
        (["model-00001-of-00001.safetensors"], None),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "mtp.safetensors"], None),
        (["model.safetensors"], None),
        (["model-00001-of-99999999999999.safetensors"], None),
    ],
)
def test_names_of_shards_say_how_many_there_are(files: list[str], missing: str | None) -> None:
    assert missing_shards(files) == missing


def test_one_shard_that_is_all_is_a_model(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, blocks(), config=CONFIG)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    assert check_complete({"m": open_folder("m", tmp_path)}, "m") == []


def test_an_index_that_leaves_a_shard_out_is_a_warning(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, blocks(), shards=3, config=CONFIG)
    index = tmp_path / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    part = "model-00002-of-00003.safetensors"
    document["weight_map"] = {name: file for name, file in document["weight_map"].items() if file != part}
    index.write_text(json.dumps(document))
    (tmp_path / part).unlink()
    [warning, *_] = check_complete({"m": open_folder("m", tmp_path)}, "m")
    assert (warning.level, warning.message, warning.help) == (
        "warning",
        "model `m`: shard 2 of 3 is missing by the names of the others, and model.safetensors.index.json does not "
        "name it",
        FETCH,
    )


def test_an_index_of_pickles_may_name_what_is_missing(tmp_path: Path) -> None:
    tensors = {**blocks(), "lm_head.weight": torch.zeros(8, 2), "model.rotary_emb.inv_freq": torch.zeros(2)}
    weight_map = dict.fromkeys([*tensors, "model.norm.weight"], "pytorch_model-00001-of-00001.bin")
    kept = without(tensors, "inv_freq", "lm_head")
    checkpoint = opened(tmp_path, kept, {**CONFIG, "tie_word_embeddings": True})
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    [warning] = check_complete({"m": open_folder("m", tmp_path)}, "m")
    assert (warning.level, warning.message) == (
        "warning",
        "model `m`: pytorch_model.bin.index.json names tensors that the *.safetensors lack: `model.norm.weight`",
    )
    for other in ("{", "[]", '{"weight_map": 1}', json.dumps({"weight_map": dict.fromkeys("abc", "x.bin")})):
        (tmp_path / "pytorch_model.bin.index.json").write_text(other)
        assert check_complete({"m": open_folder("m", tmp_path)}, "m") == []
    checkpoint.close()


# What the config says.


def test_fewer_blocks_than_the_config_says_are_a_problem(tmp_path: Path) -> None:
    assert said(tmp_path, blocks(4)) == [
        ("problem", "model `m`: config.json says 6 layers, and the weights hold 4"),
    ]


def test_a_donor_with_fewer_blocks_is_a_problem_of_the_accounting(tmp_path: Path) -> None:
    assert check_complete({"m": opened(tmp_path, blocks(4))}, "m") == []


def test_more_blocks_than_the_config_says_are_heads_for_speculation(tmp_path: Path) -> None:
    extra = {f"model.layers.6.{name}": torch.zeros(2, 2) for name in ("eh_proj.weight", "enorm.weight")}
    assert said(tmp_path, {**blocks(), **extra}, {**CONFIG, "num_nextn_predict_layers": 1}) == []


def test_a_block_that_is_missing_between_others_is_a_problem(tmp_path: Path) -> None:
    assert said(tmp_path, without(blocks(), r"layers\.3\.")) == [
        ("problem", "model `m`: layer 3 of `model.layers` is missing between the others"),
    ]
    assert said(tmp_path / "no", without(blocks(), r"layers\.[23]\."), {"model_type": "odd"}) == [
        ("warning", "model `m`: layers 2, 3 of `model.layers` are missing between the others"),
    ]


def test_leftovers_with_larger_numbers_are_no_blocks(tmp_path: Path) -> None:
    assert said(tmp_path, {**blocks(), "model.layers.9.extra": torch.zeros(2)}) == []
    small = blocks(3, "vision_tower.layers", ("weight", "bias"))
    assert said(tmp_path / "small", {**blocks(), **small}, {**CONFIG, "vision_config": {"num_hidden_layers": 3}}) == []


def test_a_block_of_an_absurd_number_costs_nothing(tmp_path: Path) -> None:
    far = {f"model.layers.{10**15}.{name}": torch.zeros(2, 2) for name in BLOCK}
    assert said(tmp_path, {**blocks(), **far}) == [
        ("warning", "model `m`: layers 6, 7, 8, 9, 10, 11, 12, 13 … and 1 more of `model.layers` are missing between "
                    "the others"),
    ]  # fmt: skip


def test_each_part_of_a_multimodal_model_has_its_own_count(tmp_path: Path) -> None:
    config = {"text_config": {"num_hidden_layers": 6}, "vision_config": {"depth": 4}, "audio_config": {"num_layers": 3}}
    whole = {
        **blocks(6, "model.language_model.layers"),
        **blocks(4, "model.visual.blocks"),
        **blocks(3, "model.audio_tower.layers"),
    }
    assert said(tmp_path / "whole", whole, config) == []
    assert said(tmp_path / "text", without(whole, r"layers\.5\."), config) == [
        ("problem", "model `m`: config.json says 6 layers, and the weights hold 5"),
    ]
    assert said(tmp_path / "vision", without(whole, r"visual\.blocks\.3", "audio_tower"), config) == [
        ("warning", "model `m`: config.json says 4 vision layers, and the weights hold 3"),
        ("note", "model `m`: config.json says 3 audio layers, and the weights hold none"),
    ]


def test_stacks_that_together_may_be_what_the_config_counts_are_a_note(tmp_path: Path) -> None:
    halves = {**blocks(4, "model.upper.layers"), **blocks(4, "model.lower.layers")}
    assert said(tmp_path, halves) == [("note", "model `m`: config.json says 6 layers, and the weights hold 4")]


@pytest.mark.parametrize(
    "config",
    [
        {"num_layers": 6, "num_decoder_layers": 4},
        {"encoder_layers": 6, "decoder_layers": 4, "num_hidden_layers": 6},
    ],
)
def test_encoder_and_decoder_have_their_own_counts(tmp_path: Path, config: dict[str, int]) -> None:
    whole = {**blocks(6, "encoder.block"), **blocks(4, "decoder.block")}
    assert said(tmp_path / "whole", whole, config) == []
    assert said(tmp_path / "encoder", without(whole, r"encoder\.block\.5"), config) == [
        ("problem", "model `m`: config.json says 6 encoder layers, and the weights hold 5"),
    ]
    assert said(tmp_path / "decoder", without(whole, r"decoder\.block\.3"), config) == [
        ("problem", "model `m`: config.json says 4 decoder layers, and the weights hold 3"),
    ]


def test_blocks_that_are_shared_are_stored_once(tmp_path: Path) -> None:
    shared = blocks(1, "albert.encoder.albert_layer_groups.0.albert_layers")
    assert said(tmp_path, shared, {"num_hidden_layers": 12, "num_hidden_groups": 1}) == []


def test_layers_of_a_projector_may_be_numbered_as_they_like(tmp_path: Path) -> None:
    projector = {f"model.projector.layers.{index}.weight": torch.zeros(2, 2) for index in (0, 2)}
    assert said(tmp_path, {**blocks(), **projector}) == []


def test_experts_that_no_block_has_are_a_problem(tmp_path: Path) -> None:
    inner = tuple(f"mlp.experts.{expert}.up_proj.weight" for expert in range(3))
    assert said(tmp_path, blocks(inner=(*BLOCK, *inner)), {**CONFIG, "num_experts": 4}) == [
        ("problem", "model `m`: config.json says 4 experts in a layer, and the weights hold 3"),
    ]
    assert said(tmp_path / "all", blocks(inner=(*BLOCK, *inner)), {**CONFIG, "num_experts": 3}) == []
    packed = blocks(inner=(*BLOCK, "mlp.experts.up_proj"))
    assert said(tmp_path / "packed", packed, {**CONFIG, "num_experts": 4}) == []


def test_biases_that_the_config_promises_are_a_warning(tmp_path: Path) -> None:
    config = {**CONFIG, "attention_bias": True}
    assert said(tmp_path, blocks(), config) == [
        (
            "warning",
            "model `m`: config.json says `attention_bias`, and no layer of `model.layers` has `self_attn.q_proj.bias`",
        ),
    ]
    assert said(tmp_path / "there", blocks(inner=(*BLOCK, "self_attn.q_proj.bias")), config) == []


# Blocks beside each other.


@pytest.mark.parametrize(
    "keys",
    [
        {"num_experts_per_tok": 8},
        {"eos_token_id": [3, 9]},
        {"num_key_value_heads": [8] * 3 + [4] + [8] * 12},
        {"languages": list("abcdefgh")},
        {"attn_layer_period": 8},
    ],
    ids=str,
)
def test_a_lost_tensor_is_seen_whatever_else_has_numbers_of_blocks(tmp_path: Path, keys: dict[str, Any]) -> None:
    """Found by a review: such keys split the layers into kinds of one or two, in which nothing could be missing."""
    held = without(blocks(16), r"layers\.3\.mlp\.up_proj")
    assert said(tmp_path, held, {**CONFIG, "num_hidden_layers": 16, **keys}) == [
        ("warning", "model `m`: layer 3 of `model.layers` lacks `mlp.up_proj.weight`, which the layers beside it have"),
    ]


def test_a_block_that_lacks_what_its_neighbors_have_is_a_warning(tmp_path: Path) -> None:
    assert said(tmp_path, without(blocks(), r"\.3\.mlp")) == [
        ("warning", "model `m`: layer 3 of `model.layers` lacks `mlp.up_proj.weight`, which the layers beside it have"),
    ]


@pytest.mark.parametrize("index", [0, 5])
def test_a_block_at_an_end_may_be_meant_so(tmp_path: Path, index: int) -> None:
    [(level, message)] = said(tmp_path, without(blocks(), rf"\.{index}\.mlp"))
    assert level == "note"
    assert message.startswith(f"model `m`: layer {index} of `model.layers` lacks `mlp.up_proj.weight`")


def test_one_expert_of_one_block_that_is_missing_is_a_warning(tmp_path: Path) -> None:
    inner = tuple(f"mlp.experts.{expert}.up_proj.weight" for expert in range(4))
    tensors = without(blocks(inner=(*BLOCK, *inner)), r"\.2\.mlp\.experts\.1")
    assert said(tmp_path, tensors, {**CONFIG, "num_experts": 4}) == [
        (
            "warning",
            "model `m`: layer 2 of `model.layers` lacks `mlp.experts.1.up_proj.weight`, which the layers beside it "
            "have",
        ),
    ]


def test_a_pattern_that_nothing_explains_is_one_note(tmp_path: Path) -> None:
    assert said(tmp_path, without(blocks(9), r"\.[147]\.mlp"), {**CONFIG, "num_hidden_layers": 9}) == [
        (
            "note",
            "model `m`: 3 layers of `model.layers` lack tensors that others have, and config.json does not say why",
        ),
    ]


def mixed(special: Callable[[int], bool], count: int = 12) -> Tensors:
    """Blocks of two kinds: those that `special` names have a mixer in the attention's place."""
    return {
        (name.replace("self_attn", "mixer") if special(int(name.split(".")[2])) else name): tensor
        for name, tensor in blocks(count).items()
    }


@pytest.mark.parametrize(
    ("special", "config"),
    [
        (lambda index: index == 4, {"layer_types": ["full"] * 4 + ["linear"] + ["full"] * 7}),
        (lambda index: index < 1, {"first_k_dense_replace": 1}),
        (lambda index: index in (4, 7), {"mlp_only_layers": [4, 7]}),
        (lambda index: index in (4, 9), {"cross_attention_layers": [4, 9]}),
        (lambda index: index % 4 == 3, {"decoder_sparse_step": 4}),
        (lambda index: index % 4 == 0, {"moe_layer_freq": 4}),
        (lambda index: index == 5, {"moe_layer_freq": [1] * 5 + [0] + [1] * 6}),
        (lambda index: index == 5, {"hybrid_override_pattern": "MMMMM*MMMMMM"}),
        (lambda index: index == 5, {"block_configs": [{"no": False}] * 5 + [{"no": True}] + [{"no": False}] * 6}),
        (lambda index: index in (4, 8), {"linear_attn_config": {"full_attn_layers": [5, 9]}}),
        (lambda index: index % 3 == 1, {"block_types": ["recurrent", "attention", "recurrent"]}),
        (lambda index: index % 6 == 4, {"num_hidden_layers": 24, "attn_layer_period": 6, "attn_layer_offset": 4}),
        (lambda index: index == 4, {"attn_layer_period": 16, "attn_layer_offset": 4}),
        (lambda index: index >= 9, {"text_config": {"num_hidden_layers": 12, "num_kv_shared_layers": 3}}),
        (lambda index: index >= 11, {"num_hidden_layers": 11, "num_nextn_predict_layers": 1}),
    ],
)
def test_what_the_config_explains_is_not_told(
    tmp_path: Path, special: Callable[[int], bool], config: dict[str, Any]
) -> None:
    config = {"num_hidden_layers": 12, **config}
    tensors = mixed(special, max(12, config["num_hidden_layers"]))
    assert said(tmp_path, tensors, config) == []
    # And a block that lacks what those of its own kind have is told all the same.
    [(level, message)] = said(tmp_path / "cut", without(tensors, r"\.2\.mlp"), config)
    assert (level, "layer 2 of" in message) == ("warning", True)


@pytest.mark.parametrize(
    "others",
    [
        {"_name_or_path": "/models/qwen/one-of-them"},
        {"dtype": "bfloat16"},
        {"languages": ["de", "en", "es", "fr", "it", "nl", "pl"]},
        {"eos_token_ids": list(range(100, 113))},
    ],
)
def test_what_is_no_entry_for_each_block_explains_nothing(tmp_path: Path, others: dict[str, Any]) -> None:
    assert said(tmp_path, without(blocks(), r"\.3\.mlp"), {**CONFIG, **others}) == [
        ("warning", "model `m`: layer 3 of `model.layers` lacks `mlp.up_proj.weight`, which the layers beside it have"),
    ]


def test_models_of_the_donors_tensors_are_told_of_once(tmp_path: Path) -> None:
    tensors = without(blocks(), r"\.3\.mlp")
    models = {name: opened(tmp_path / name, tensors) for name in ("rl", "target", "sft")}
    assert [it.values for it in check_complete(models, "target")] == [{"target": "1 missing"}]


def test_what_has_no_config_or_is_a_skill_is_not_looked_at(tmp_path: Path) -> None:
    cut = without(blocks(), r"\.3\.mlp")
    assert check_complete({"m": opened(tmp_path / "none", cut, {})}, "m") == []
    assert check_complete({"m:minus": opened(tmp_path / "skill", cut)}, "") == []


def test_a_lone_shard_beside_other_weights_is_told_as_before(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, blocks(), config=CONFIG)
    save_file({"x": torch.zeros(1)}, tmp_path / "model-00001-of-00002.safetensors")
    checkpoint = open_folder("m", tmp_path)
    assert checkpoint.unread == ("model-00001-of-00002.safetensors",)
