"""What is refused of adapters: by key, by tensor and by model, each with what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import run_cli
from refused_adapters import PREFIX, Q, refused, write_both

from skillmerge.checkpoints.kinds.lora import adapter as lora

MERGE = "help: merge it with the library that made it (peft: `merge_and_unload`), and name that folder as a model"
CONFIG = "adapter/adapter_config.json: "
KEYS = {
    "peft_type": ({"peft_type": "IA3"}, "`peft_type` is 'IA3'; only LORA can be read as a difference", MERGE),
    "qalora": ({"use_qalora": True},
        "`use_qalora` is set, which means QALoRA, whose A works on groups of inputs: that cannot be read", MERGE),
    "kasa": ({"kasa_config": {"beta": 1}},
        "`kasa_config` is set, which means KaSA, which changes the base's weights: that cannot be read", MERGE),
    "bdlora": ({"use_bdlora": {"nblocks": 2}},
        "`use_bdlora` is set, which means BD-LoRA, whose matrices are blocks: that cannot be read", MERGE),
    "arrow": ({"arrow_config": {"top_k": 3}},
        "`arrow_config` is set, which means Arrow, which routes between adapters: that cannot be read", MERGE),
    "replication": ({"layer_replication": [[0, 2]]},
        "`layer_replication` is set, which means repeated layers, which the base does not have: that cannot be read",
        MERGE),
    "alora": ({"alora_invocation_tokens": [1]},
        "`alora_invocation_tokens` is set, which means aLoRA, which works only after certain tokens: that cannot be "
        "read", MERGE),
    "velora": ({"velora_config": {"scale": 1}}, "`velora_config` is set, which means VeLoRA: that cannot be read",
        MERGE),
    "monteclora": ({"monteclora_config": {"num_samples": 2}},
        "`monteclora_config` is set, which means MonteCLoRA, whose weights are random: that cannot be read", MERGE),
    "unknown": ({"shiny_config": {"a": 1}}, "sets `shiny_config`, which this version does not know", MERGE),
    "rank": ({"r": "8"}, "`r` is '8', and a rank is a number from 1 to 65536", ""),
    "no rank": ({"r": None}, "`r` is None, and a rank is a number from 1 to 65536", ""),
    "alpha": ({"lora_alpha": "x"}, "`lora_alpha` is 'x', not a number", ""),
    "alpha 0": ({"lora_alpha": 0}, "`lora_alpha` is 0, with which the adapter would add nothing",
        "help: write the `lora_alpha` of the training run into the file; verl's merger leaves 0 there"),
    "rslora": ({"use_rslora": "true"}, "`use_rslora` is 'true', not true or false", ""),
    "fan_in_fan_out": ({"fan_in_fan_out": 1}, "`fan_in_fan_out` is 1, not true or false", ""),
    "DoRA of parameters": ({"use_dora": True, "target_parameters": ["mlp.experts.down_proj"]},
        "sets `use_dora` and `target_parameters`, which do not go together", MERGE),
    "patterns": ({"rank_pattern": [1]}, "`rank_pattern` is [1], not a table of numbers", ""),
    "pattern": ({"rank_pattern": {"q": 0}}, "`rank_pattern` gives 'q' the rank 0", ""),
    "parameters": ({"target_parameters": {"a": 1}}, "`target_parameters` is {'a': 1}, not a list of names", ""),
    "rows": ({"trainable_token_indices": [1, 1]},
        "`trainable_token_indices` is not a list of rows, each once, or a table of such", ""),
}  # fmt: skip


@pytest.mark.parametrize("case", KEYS)
def test_adapter_is_refused_by_its_key(tmp_path: Path, case: str) -> None:
    keys, message, help = KEYS[case]
    assert refused(write_both(tmp_path, **keys)) == "\n".join(filter(None, [CONFIG + message, help]))


@pytest.mark.parametrize("begun", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "PiSSA"])
def test_adapter_that_changed_its_base_is_refused(tmp_path: Path, begun: str) -> None:
    assert refused(write_both(tmp_path, init_lora_weights=begun)) == (
        f"{CONFIG}`init_lora_weights` is `{begun}`, which changed the base's weights before training\n"
        "help: save it as a difference of the unchanged base: `save_pretrained(NEW, "
        "path_initial_model_for_weight_conversion=INITIAL)` in peft"
    )


OTHER = "help: name the model that the adapter was trained on, or read its modules under other names with `rename`"
AGAIN = "help: the adapter is incomplete: fetch it again, or save it again with `save_pretrained`"
UNLIKE = "help: weights and configuration are of different adapters: fetch both again"
WEIGHTS = "adapter/adapter_model.safetensors: "
A, B = f"`{PREFIX}{Q}.lora_A.weight`", f"`{PREFIX}{Q}.lora_B.weight`"
TENSORS: dict[str, tuple[dict[str, Any], str]] = {
    "module not in the base": (
        {"tensors": {"layers.0.self_attn.q_proj.lora_A.weight": (2, 8), "layers.0.self_attn.q_proj.lora_B.weight":
            (6, 2), f"{Q}.lora_A.weight": None, f"{Q}.lora_B.weight": None}},
        "adapter: `base_model.model.layers.0.self_attn.q_proj.lora_A.weight` changes module "
        "`layers.0.self_attn.q_proj`, which base does not have\n"
        "help: the nearest is `model.layers.0.self_attn.q_proj.weight`; to read it so, add "
        '`rename: [{from: "", to: "model."}]`',
    ),
    "module of one of two towers": (
        {"tensors": {f"model.language_model.layers.0.self_attn.q_proj.lora_{part}.weight": shape
                     for part, shape in (("A", (2, 8)), ("B", (6, 2)))},
         "base": {"language_model.model.layers.0.self_attn.q_proj.weight": (6, 8),
                  "vision_tower.encoder.layers.0.self_attn.q_proj.weight": (6, 8), f"{Q}.weight": None}},
        "adapter: `base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight` changes module "
        "`model.language_model.layers.0.self_attn.q_proj`, which base does not have\n"
        "help: the nearest is `language_model.model.layers.0.self_attn.q_proj.weight`; to read it so, add "
        '`rename: [{from: "model.language_model.", to: "language_model.model."}]`',
    ),
    "no such module": (
        {"tensors": {"nothing.lora_A.weight": (2, 8), "nothing.lora_B.weight": (6, 2)}},
        f"adapter: `{PREFIX}nothing.lora_A.weight` changes module `nothing`, which base does not have\n{OTHER}",
    ),
    "another shape": (
        {"tensors": {f"{Q}.lora_A.weight": (2, 9)}},
        f"adapter: {A} [2, 9] and {B} [6, 2] make a matrix of shape [6, 9], and `{Q}.weight` of base has [6, 8]\n"
        f"{OTHER}",
    ),
    "vocabulary grew": (
        {"tensors": {"lm_head.weight": (14, 8)}},
        f"adapter: `{PREFIX}lm_head.weight` has 14 rows, and `lm_head.weight` of base has 12: tokens were added or "
        "removed in training\n"
        "help: name a base whose embedding has that many rows: `resize_token_embeddings(14)` in transformers makes one",
    ),
    "vocabulary grew under LoRA": (
        {"tensors": {"model.embed_tokens.lora_embedding_A": (2, 14), "model.embed_tokens.lora_embedding_B": (8, 2)}},
        f"adapter: `{PREFIX}model.embed_tokens.lora_embedding_A` has 14 rows, and `model.embed_tokens.weight` of base "
        "has 12: tokens were added or removed in training\n"
        "help: name a base whose embedding has that many rows: `resize_token_embeddings(14)` in transformers makes one",
    ),
    "no A": (
        {"tensors": {f"{Q}.lora_A.weight": None}},
        f"{WEIGHTS}module `{Q}` has {B} and no pair of A and B\n{AGAIN}",
    ),
    "ranks contradict each other": (
        {"tensors": {f"{Q}.lora_A.weight": (3, 8)}},
        f"{WEIGHTS}the ranks of {A} [3, 8] and {B} [6, 2] contradict each other\n{AGAIN}",
    ),
    "ranks contradict the configuration": (
        {"r": 4},
        f"adapter: {A} has rank 2, and adapter/adapter_config.json gives it 4\n"
        "help: weights and configuration are of different adapters: fetch both again",
    ),
    "parts of matrices": (
        {"tensors": {f"{Q}.lora_A.weight": (0,)}},
        f"{WEIGHTS}{A} [0] and {B} [6, 2] are parts of matrices: they were saved without being gathered (FSDP, ZeRO "
        "3)\nhelp: save the adapter again, with its parameters gathered",
    ),
    "convolution": (
        {"tensors": {f"{Q}.lora_A.weight": (2, 8, 3), f"{Q}.lora_B.weight": (6, 2, 1)}},
        f"{WEIGHTS}{A} [2, 8, 3] is of a convolution, which is not read\n"
        "help: merge the adapter with peft (`merge_and_unload`), and name that folder as a model",
    ),
    "tensor without a meaning": (
        {"tensors": {f"{Q}.lora_E": (2, 1)}},
        f"{WEIGHTS}what tensor `{PREFIX}{Q}.lora_E` means is not known\n{AGAIN}",
    ),
    "state dict": (
        {"tensors": {f"{Q}.lora_A.default.weight": (2, 8), f"{Q}.lora_A.weight": None}},
        f"{WEIGHTS}what tensor `{PREFIX}{Q}.lora_A.default.weight` means is not known\n"
        "help: a state dict has the adapter's name in its tensors' names: save the adapter with peft's "
        "`save_pretrained`",
    ),
    "tensor of another library": (
        {"tensors": {f"!{Q}.lora_A.weight": (2, 8)}},
        f"{WEIGHTS}tensor `{Q}.lora_A.weight` does not begin with `base_model.model.`, as those of PEFT do\n"
        "help: save the adapter with peft's `save_pretrained`",
    ),
    "replaces what the base does not have": (
        {"tensors": {"score.weight": (2, 8)}},
        f"adapter: `{PREFIX}score.weight` changes `score.weight`, which base does not have\n{OTHER}",
    ),
    "magnitude": (
        {"tensors": {f"{Q}.lora_magnitude_vector": (5,)}, "use_dora": True},
        f"{WEIGHTS}`{PREFIX}{Q}.lora_magnitude_vector` [5] does not fit {B} [6, 2]\n{AGAIN}",
    ),
    "DoRA without magnitudes": (
        {"use_dora": True},
        f"{WEIGHTS}module `{Q}` has nothing but {A}, {B}, and adapter/adapter_config.json sets `use_dora`\n{UNLIKE}",
    ),
    "magnitudes without DoRA": (
        {"tensors": {f"{Q}.lora_magnitude_vector": (6,)}},
        f"{WEIGHTS}module `{Q}` has `{PREFIX}{Q}.lora_magnitude_vector`, and adapter/adapter_config.json does not set "
        f"`use_dora`\n{UNLIKE}",
    ),
    "biases that were lost": (
        {"lora_bias": True},
        f"{WEIGHTS}module `{Q}` has nothing but {A}, {B}, and adapter/adapter_config.json sets `lora_bias`\n{UNLIKE}",
    ),
    "DoRA of rows inside another tensor": (
        {"tensors": {"model.layers.0.mlp.up_proj.lora_A.weight": (2, 8),
                     "model.layers.0.mlp.up_proj.lora_B.weight": (10, 2),
                     "model.layers.0.mlp.up_proj.lora_magnitude_vector": (10,),
                     f"{Q}.lora_magnitude_vector": (6,)},
         "base": {"model.layers.0.mlp.gate_up_proj.weight": (20, 8)}, "use_dora": True},
        f"{WEIGHTS}`{PREFIX}model.layers.0.mlp.up_proj.lora_magnitude_vector` scales the rows of "
        "`model.layers.0.mlp.up_proj.weight` (DoRA), which base stores as a part of another tensor\n"
        "help: name a model that stores it by itself; or merge the adapter with peft (`merge_and_unload`), and name "
        "that folder as a model",
    ),
    "square, and not known which way": (
        {"tensors": {f"{Q}.lora_B.weight": (8, 2)}, "fan_in_fan_out": True,
         "base": {f"{Q}.weight": (8, 8), f"{Q}.bias": (8,), "config": {"model_type": "llama"}}},
        f"adapter: {A} and {B} change `{Q}.weight`, which is square, and neither `fan_in_fan_out` in "
        "adapter/adapter_config.json nor other matrices show whether it is stored transposed\n"
        "help: merge the adapter with peft (`merge_and_unload`), and name that folder as a model",
    ),
    "two modules for one tensor": (
        {"tensors": {"model.layers.0.mlp.up_proj.lora_A.weight": (2, 8),
                     "model.layers.0.mlp.up_proj.lora_B.weight": (10, 2),
                     "old.layers.0.mlp.up_proj.lora_A.weight": (2, 8),
                     "old.layers.0.mlp.up_proj.lora_B.weight": (10, 2)},
         "rename": [{"from": "old.", "to": "model."}],
         "base": {"model.layers.0.mlp.gate_up_proj.weight": (20, 8)}},
        f"adapter: `{PREFIX}model.layers.0.mlp.up_proj.lora_A.weight` and "
        f"`{PREFIX}old.layers.0.mlp.up_proj.lora_A.weight` both change `model.layers.0.mlp.up_proj.weight`",
    ),
    "twice": (
        {"tensors": {f"{Q}.weight": (6, 8)}},
        f"{WEIGHTS}{A} and `{PREFIX}{Q}.weight` both change `{Q}.weight`",
    ),
    "rows without indices": (
        {"tensors": {"model.embed_tokens.token_adapter.trainable_tokens_delta": (2, 8)}},
        f"{CONFIG}`trainable_token_indices` does not say which rows "
        f"`{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta` replaces",
    ),
    "other rows": (
        {"tensors": {"model.embed_tokens.token_adapter.trainable_tokens_delta": (2, 8)},
         "trainable_token_indices": [1, 2, 3]},
        f"{WEIGHTS}`{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta` has shape [2, 8], and "
        "`trainable_token_indices` names 3 rows",
    ),
    "rows beyond the embedding": (
        {"tensors": {"model.embed_tokens.token_adapter.trainable_tokens_delta": (2, 8)},
         "trainable_token_indices": [1, 12]},
        f"adapter: the rows of `{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta` [2, 8] are not rows "
        f"of `model.embed_tokens.weight` [12, 8] of base\n{OTHER}",
    ),
    "modules that were lost": (
        {"modules_to_save": ["lm_head"]},
        f"{WEIGHTS}has no tensors for `modules_to_save` in adapter/adapter_config.json\n"
        f"{AGAIN}; if they were left out on purpose, set it to null",
    ),
    "rows that were lost": (
        {"trainable_token_indices": [3]},
        f"{WEIGHTS}has no tensors for `trainable_token_indices` in adapter/adapter_config.json\n"
        f"{AGAIN}; if they were left out on purpose, set it to null",
    ),
    "head that is tied": (
        {"tensors": {"lm_head.lora_A.weight": (2, 8), "lm_head.lora_B.weight": (12, 2)},
         "base": {"tied": True, "lm_head.weight": False}},
        f"adapter: `{PREFIX}lm_head.lora_A.weight` changes module `lm_head`, which base does not have: its config ties "
        "the head to the embedding, and the adapter does not do the same to both\n"
        "help: name a model that stores both (`tie_word_embeddings: false`)",
    ),
    "head that is tied, replaced": (
        {"tensors": {"lm_head.weight": (12, 8)}, "base": {"tied": True, "lm_head.weight": False}},
        f"adapter: `{PREFIX}lm_head.weight` changes `lm_head.weight`, which base does not have: its config ties the "
        "head to the embedding, and the adapter does not do the same to both\n"
        "help: name a model that stores both (`tie_word_embeddings: false`)",
    ),
    "module of PEFT without the model's": (
        {"tensors": {"lm_head.original_module.weight": (12, 8)}},
        f"{WEIGHTS}`{PREFIX}lm_head.original_module.weight` has no `{PREFIX}lm_head.weight` of its shape beside it\n"
        f"{AGAIN}",
    ),
    "experts that do not fit": (
        {"tensors": {"model.layers.0.mlp.experts.lora_A.weight": (4, 8),
                     "model.layers.0.mlp.experts.lora_B.weight": (7, 4)},
         "target_parameters": ["mlp.experts.gate_up_proj"],
         "base": {"model.layers.0.mlp.experts.gate_up_proj": (2, 6, 8)}},
        f"adapter: `{PREFIX}model.layers.0.mlp.experts.lora_A.weight` [4, 8] and "
        f"`{PREFIX}model.layers.0.mlp.experts.lora_B.weight` [7, 4] fit no parameter of `model.layers.0.mlp.experts` "
        f"in base: `model.layers.0.mlp.experts.gate_up_proj` [2, 6, 8]\n{OTHER}",
    ),
    "experts that fit in two ways": (
        {"tensors": {"model.layers.0.mlp.experts.lora_A.weight": (4, 8),
                     "model.layers.0.mlp.experts.lora_B.weight": (8, 4)},
         "target_parameters": ["mlp.experts.gate_up_proj"],
         "base": {"model.layers.0.mlp.experts.gate_up_proj": (2, 8, 8)}},
        f"adapter: `{PREFIX}model.layers.0.mlp.experts.lora_A.weight` [4, 8] and "
        f"`{PREFIX}model.layers.0.mlp.experts.lora_B.weight` [8, 4] fit more than one parameter, or one in two ways: "
        "`model.layers.0.mlp.experts.gate_up_proj`\n"
        "help: merge the adapter with peft (`merge_and_unload`), and name that folder as a model",
    ),
    "experts that the base has split otherwise": (
        {"tensors": {"model.layers.0.mlp.experts.lora_A.weight": (4, 8),
                     "model.layers.0.mlp.experts.lora_B.weight": (6, 4)},
         "target_parameters": ["mlp.experts.gate_up_proj"],
         "base": {f"model.layers.0.mlp.experts.{expert}.{part}_proj.weight": (5, 8)
                  for expert in (0, 1) for part in ("gate", "up")}},
        "adapter: the adapter names packed experts (`model.layers.0.mlp.experts`), and base has them split: "
        "`model.layers.0.mlp.experts.0.gate_proj.weight`, `model.layers.0.mlp.experts.0.up_proj.weight` … and 2 "
        "more\nhelp: name a model that stores them packed, as transformers has them in memory",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_adapter_is_refused_by_its_tensor(tmp_path: Path, case: str) -> None:
    words, message = TENSORS[case]
    assert refused(write_both(tmp_path, **words)) == message


ONTO = "help: give `onto:` the model that the adapter was trained on"
ALONE = {
    "a whole tensor": ({"lm_head.weight": (12, 8)}, {}, "adapter: `lm_head.weight` replaces a whole tensor, which is "
        f"no difference\n{ONTO}, and subtract that model"),
    "whole tensors": ({"lm_head.weight": (12, 8), f"{Q}.base_layer.bias": (6,)}, {},
        f"adapter: `{Q}.bias`, `lm_head.weight` replace whole tensors, which is no difference\n"
        f"{ONTO}, and subtract that model"),
    "rows": ({"model.embed_tokens.token_adapter.trainable_tokens_delta": (1, 8)}, {"trainable_token_indices": [3]},
        "adapter: replaces some rows of `model.embed_tokens.weight`, which is no difference\n"
        f"{ONTO}, and subtract that model"),
    "DoRA": ({f"{Q}.lora_magnitude_vector": (6,)}, {"use_dora": True},
        f"adapter: DoRA scales the base's rows (`{Q}.weight`), so that "
        f"its difference depends on the base\n{ONTO}, and subtract that model"),
}  # fmt: skip


@pytest.mark.parametrize("case", ALONE)
def test_what_replaces_is_no_difference(tmp_path: Path, case: str) -> None:
    tensors, config, message = ALONE[case]
    found = refused(write_both(tmp_path, tensors, onto=False, **config))
    assert sorted(found.replace(",", "").split()) == sorted(message.replace(",", "").split())


def test_copy_of_the_embedding_has_to_be_the_bases(tmp_path: Path) -> None:
    name = "model.embed_tokens"
    write_both(tmp_path, {f"{name}.lora_embedding_A": (2, 12), f"{name}.lora_embedding_B": (8, 2),
                          f"{name}.base_layer.weight": (12, 8)})  # fmt: skip
    message = (
        f"adapter: `{PREFIX}{name}.base_layer.weight` is a copy of the base's `{name}.weight`, and not that of base"
    )
    process = run_cli("apply", "recipe.yaml", cwd=tmp_path)
    assert process.returncode == 4
    assert message in process.stderr.replace(f"{tmp_path}/", "")
    assert not (tmp_path / "out").exists()


def test_pickled_adapter_is_refused(tmp_path: Path) -> None:
    write_both(tmp_path)
    (tmp_path / "adapter" / lora.WEIGHTS).rename(tmp_path / "adapter" / lora.PICKLED)
    message = (
        "adapter/adapter_model.bin: is a pickle, which can run code and is never loaded\n"
        "help: load the adapter with peft and save it again, which writes safetensors: "
        "`PeftModel.from_pretrained(BASE, FOLDER).save_pretrained(NEW)`"
    )
    assert refused(tmp_path) == message
    for command in (("extract", "--from", "adapter", "--minus", "base", "-o", "out"), ("inspect", "base", "adapter")):
        assert refused(tmp_path, *command) == f"error: {message}"


def test_adapter_as_a_model_is_told_how_to_write_it(tmp_path: Path) -> None:
    write_both(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace('{"adapter": "adapter", "onto": "base"}', '"adapter"'))
    assert refused(tmp_path).endswith(
        "adapter is a PEFT adapter, not a model\n"
        "help: in a recipe write it as {adapter: adapter, onto: MODEL}, or as {adapter: adapter} for its difference"
    )


NAMES = {
    "rl": "adapter has no adapter named `rl`\nhelp: leave `name` out: there is only one adapter, at the top",
    "../base": "adapter has no adapter named `../base`\nhelp: leave `name` out: there is only one adapter, at the top",
}


@pytest.mark.parametrize("name", NAMES)
def test_name_of_no_adapter_is_refused(tmp_path: Path, name: str) -> None:
    write_both(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace('"onto"', f'"name": "{name}", "onto"'))
    assert refused(tmp_path) == NAMES[name]


def test_adapters_in_subfolders_are_named(tmp_path: Path) -> None:
    write_both(tmp_path)
    (tmp_path / "adapter").rename(tmp_path / "rl")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "rl").rename(tmp_path / "adapter" / "rl")
    assert refused(tmp_path) == (
        "adapter has no adapter at the top, but in subfolders: rl\nhelp: add its name: `{adapter: …, name: rl}`"
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace('"onto"', '"name": "lr", "onto"'))
    assert refused(tmp_path) == "adapter has no adapter named `lr`\nhelp: there are: rl"
    recipe.write_text(recipe.read_text().replace('"lr"', '"rl"'))
    assert run_cli("apply", "recipe.yaml", cwd=tmp_path).returncode == 0
