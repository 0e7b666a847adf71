"""What config.json says of a stack: each layer is what it was in its own model, or the stack is refused."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import read_checkpoint, run_cli, write_recipe
from model_families import FAMILIES, TEXT

import skillmerge
from skillmerge.checkpoints.model_config import layers_in
from skillmerge.plans.stacks.config import check_depth, leveled, stacked_config
from skillmerge.plans.stacks.keys import ALWAYS, EVERY, FIRST, LAST, NUMBERS, REPEATED
from skillmerge.plans.stacks.order import Layer, Order, Unsayable

FULL, NEAR = "full_attention", "sliding_attention"


def order(text: str, **configs: dict[str, Any]) -> Order:
    """`a0 a1 b3`: layer 0 of a, and so on, each an entry of its own."""
    layers = [Layer(entry, word[0], int(word[1:])) for entry, word in enumerate(text.split())]
    counts = {model: config["num_hidden_layers"] for model, config in configs.items()}
    return Order(layers, configs, counts, text[0])


def edited(text: str, said: dict[str, Any], count: int = 6, **others: dict[str, Any]) -> dict[str, Any]:
    """The values of these keys in the stack."""
    configs = {"a": {"num_hidden_layers": count, **said}, **others}
    config, edits = stacked_config(order(text, **configs))
    assert {key: new for key, _, new in edits if key in said} == {
        key: config[key] for key in said if config[key] != said[key]
    }
    assert config["num_hidden_layers"] == len(text.split())
    return {key: config[key] for key in said}


B: dict[str, Any] = {"num_hidden_layers": 3, "layer_types": [NEAR, NEAR, FULL], "mlp_only_layers": [1]}

EDITED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("a0 a1 a1 a5", {"layer_types": [FULL, NEAR, FULL, NEAR, FULL, NEAR]}, {"layer_types": [FULL, NEAR, NEAR, NEAR]}),
    ("a4 a5 a0", {"mlp_layer_types": ["dense", *["sparse"] * 5]}, {"mlp_layer_types": ["sparse", "sparse", "dense"]}),
    ("a5 a0 a1", {"no_rope_layers": [1, 1, 1, 0, 1, 0]}, {"no_rope_layers": [0, 1, 1]}),
    ("a0 a3 a3", {"mlp_only_layers": [0, 3]}, {"mlp_only_layers": [0, 1, 2]}),
    (
        "a1 a3 a5",
        {"moe_layers": [1, 3, 5], "interleave_moe_layer_step": 2},
        {"moe_layers": [0, 1, 2], "interleave_moe_layer_step": 2},
    ),
    (
        "a0 a1 a0 a1",
        {"kda_layers": [1, 3], "full_attn_layers": [2]},
        {"kda_layers": [1, 3], "full_attn_layers": [2, 4]},
    ),
    ("a0 a0 a1 a2", {"first_k_dense_replace": 1}, {"first_k_dense_replace": 2}),
    ("a1 a2", {"first_k_dense_replace": 1}, {"first_k_dense_replace": 0}),
    ("a0 a1 a2", {"first_k_dense_replace": 1}, {"first_k_dense_replace": 1}),
    ("a0 a1 a5 a4", {"num_kv_shared_layers": 2}, {"num_kv_shared_layers": 2}),
    ("a0 a5", {"num_kv_shared_layers": 2}, {"num_kv_shared_layers": 1}),
    (
        "a0 a2 a1",
        {"max_window_layers": 4, "use_sliding_window": False},
        {"max_window_layers": 4, "use_sliding_window": False},
    ),
    (
        "a0 a1 a0 a5",
        {"max_window_layers": 4, "use_sliding_window": True},
        {"max_window_layers": 3, "use_sliding_window": True},
    ),
    ("a0 a1 a2 a3 a4 a5", {"moe_layer_end_index": 5}, {"moe_layer_end_index": 5}),
    (
        "a0 a0 a5",
        {"moe_layer_start_index": 1, "moe_layer_end_index": -1},
        {"moe_layer_start_index": 2, "moe_layer_end_index": -1},
    ),
    ("a1 a2 a3", {"hybrid_override_pattern": "M*M-ME"}, {"hybrid_override_pattern": "*M-"}),
    (
        "a0 a1 a1",
        {"attention_types": [[["global", "local"], 3]]},
        {"attention_types": [[["global", "local", "local"], 1]]},
    ),
    ("a1 a1", {"attention_layers": ["global", "local"] * 3}, {"attention_layers": ["local", "local"]}),
    ("a2 a0", {"num_attention_heads_per_layer": [1, 2, 3, 4, 5, 6]}, {"num_attention_heads_per_layer": [3, 1]}),
    ("a0 a1 a4 a5 a2 a3", {"sliding_window_pattern": 2}, {"sliding_window_pattern": 2}),
    (
        "a0 a1 a5 a5",
        {"sliding_window_pattern": 6, "layer_types": [NEAR] * 5 + [FULL]},
        {"sliding_window_pattern": 6, "layer_types": [NEAR, NEAR, FULL, FULL]},
    ),
    ("a0 a2 a3 a1", {"sliding_window_pattern": "LLLG"}, {}),
    ("a2 a0", {"eos_token_id": [1, 2, 3, 4, 5, 6], "architectures": ["x"] * 6, "hidden_size": 6}, {"hidden_size": 6}),
    (
        "a2 a0",
        {"rope_scaling": {"mrope_section": [1, 2, 3, 4, 5, 6]}},
        {"rope_scaling": {"mrope_section": [1, 2, 3, 4, 5, 6]}},
    ),
    ("a0 a1 a2 a3 a4 a5", {"aux_layer_ids": [1, 4]}, {"aux_layer_ids": [1, 4]}),
    ("a1 a0", {"vision_feature_layers": [1, 4]}, {"vision_feature_layers": [1, 4]}),
    ("a5 a0 a5", {"swiglu_limits": [0, 0, 0, 0, 0, 7]}, {"swiglu_limits": [7, 0, 7]}),
    (
        "a3 a0 a3",
        {"per_layer_config": {"0": {"sliding_window": 8}, "3": {"skip": ["mlp"]}, "4": {"sliding_window": 9}}},
        {"per_layer_config": {"0": {"skip": ["mlp"]}, "1": {"sliding_window": 8}, "2": {"skip": ["mlp"]}}},
    ),
]


@pytest.mark.parametrize(("text", "said", "wanted"), [row for row in EDITED if row[2]], ids=lambda it: str(it)[:40])
def test_what_is_said_of_layers_follows_them(text: str, said: dict[str, Any], wanted: dict[str, Any]) -> None:
    found = edited(text, said)
    assert {key: found[key] for key in wanted} == wanted


def test_layers_of_another_model_are_what_that_says() -> None:
    said = {"layer_types": [FULL] * 6, "mlp_only_layers": [0]}
    assert edited("a0 a1 b1 b2", said, b=B) == {"layer_types": [FULL, FULL, NEAR, FULL], "mlp_only_layers": [0, 2]}
    assert edited("a1 b0", {"layer_types": [FULL] * 6}, b={**B, "mlp_only_layers": []}) == {"layer_types": [FULL, NEAR]}


def test_nested_sections_are_edited_and_vision_is_not() -> None:
    vision = {"num_hidden_layers": 4, "layer_types": [FULL] * 4, "depth": 4}
    config = {"text_config": {"num_hidden_layers": 4, "layer_types": [NEAR, NEAR, NEAR, FULL]}, "vision_config": vision}
    given = Order([Layer(0, "a", 3), Layer(0, "a", 0)], {"a": config}, {"a": 4}, "a")
    found, edits = stacked_config(given)
    assert found == {"text_config": {"num_hidden_layers": 2, "layer_types": [FULL, NEAR]}, "vision_config": vision}
    assert [key for key, _, _ in edits] == ["text_config.num_hidden_layers", "text_config.layer_types"]
    assert config["text_config"]["num_hidden_layers"] == 4


@pytest.mark.parametrize("text", [{}, {"model_type": "llama", "vocab_size": 8}])
def test_a_depth_that_is_not_said_cannot_change(text: dict[str, Any]) -> None:
    """The number of layers of another tower is not that of the language model."""
    config = {"text_config": text, "vision_config": {"num_hidden_layers": 3}}
    assert layers_in(config) is None
    for numbers in ((0, 1), (0, 1, 2, 2)):
        given = Order([Layer(0, "a", number) for number in numbers], {"a": config}, {"a": 3}, "a")
        with pytest.raises(
            Unsayable, match=f"does not say how many layers there are, and the stack has {len(numbers)}"
        ):
            check_depth(given)
    check_depth(Order([Layer(0, "a", 1)] * 3, {"a": config}, {"a": 3}, "a"))
    assert stacked_config(Order([Layer(0, "a", 1)] * 3, {"a": config}, {"a": 3}, "a")) == (config, ())


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (
        "a0 a1 a0",
        {"first_k_dense_replace": 1},
        "layer 2 of the stack, layer 0 of `a`, is of a kind that config.json can give to the first layers only",
    ),
    (
        "a5 a0",
        {"num_kv_shared_layers": 1},
        "layer 5 of `a` is of a kind that config.json can give to the last layers only (`num_kv",
    ),
    (
        "a0 a1 a3",
        {"sliding_window_pattern": 2},
        "what it is (`sliding_window_pattern: 2`), and its layer 3 would be layer 2, of another kind",
    ),
    ("a0 a1 a3", {"sliding_window_pattern": "LG"}, "its layer 3 would be layer 2"),
    (
        "a0 a4 a2",
        {"attn_layer_period": 4, "attn_layer_offset": 2, "expert_layer_period": 1, "expert_layer_offset": 0},
        "",
    ),
    ("a0 a2", {"attn_layer_period": 4, "attn_layer_offset": 2}, "its layer 2 would be layer 1"),
    ("a0 a2", {"decoder_sparse_step": 2}, "its layer 2 would be layer 1"),
    ("a0 a2", {"model_type": "gemma2"}, "(one in 2, as `gemma2` models do), and its layer 2 would be layer 1"),
    ("a0 a1 a3", {"model_type": "smollm3"}, "(one in 4, as `smollm3` models do), and its layer 3 would be layer 2"),
    (
        "a0 a2",
        {"aux_layer_ids": [1, 4]},
        "has `aux_layer_ids`, which may be a list of layers that skillmerge does not know",
    ),
    ("a0 a1", {"layer_types": [FULL] * 7}, "has 7 `layer_types` for 6 layers"),
    (
        "a0 a1 a3",
        {"no_rope_layers": [], "no_rope_layer_interval": 4},
        "what it is (`no_rope_layer_interval: 4`), and its layer 3 would be layer 2, of another kind",
    ),
    (
        "a0 a2",
        {"scale_attn_by_inverse_layer_idx": True},
        "layers of `a` compute with their numbers (`scale_attn_by_inverse_layer_idx`), and layer 2 of `a` gets another",
    ),
    ("a0 a2", {"model_type": "diffllama"}, "compute with their numbers (as `diffllama` models do)"),
    ("a0 a2", {"cross_layer_interval": 4}, "layers of another kind stand between its layers"),
    ("a0 a2", {"num_hidden_groups": 1}, "the layers share their weights"),
    ("a0 a2", {"hidden_size_per_layer_input": 256}, "its embeddings have columns for each layer"),
    (
        "a0 a2",
        {"quantization_config": {"modules_to_not_convert": ["model.layers.0.mlp"]}},
        "names layers by their numbers, and layer 2 moves",
    ),
    (
        "a0 a2",
        {"quantization_config": {"ignore": [r"re:.*layers\.0\.mlp.*"]}},
        "names layers by their numbers, and layer 2 moves",
    ),
    ("a0 b0", {"quantization": {"bits": 4}}, "not quantized alike"),
    ("a0 b0", {"layer_types": [FULL] * 6}, "config.json of `b` has no `layer_types`"),
    ("a0 b0", {"quantization_config": {"quant_method": "fp8"}}, "not quantized alike"),
    ("a0 b0", {"first_k_dense_replace": 2}, "config.json of `b` does not say `first_k_dense_replace`"),
    ("a0 a1", {"attention_types": [[["global"], 10**15]]}, "has other `attention_types` than layers"),
    ("a0 a1", {"attention_types": 3}, "has other `attention_types` than layers"),
]


@pytest.mark.parametrize(("text", "said", "message"), [row for row in REFUSED if row[2]], ids=lambda it: str(it)[:40])
def test_what_no_configuration_can_say_is_refused(text: str, said: dict[str, Any], message: str) -> None:
    with pytest.raises(Unsayable) as refused:
        edited(text, said, **({"b": {"num_hidden_layers": 3}} if "b" in text else {}))
    assert message in str(refused.value)


ODD: list[Any] = [
    None, True, -1, 3, 0.5, float("nan"), "", "LLLG", "abcd", [], [0, 1, 2, 3], ["a"] * 4, [[1], {}, None, 2], {"a": 1},
    [[["g", "l"], 2]],
]  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_configurations_that_say_anything_are_described_or_refused(seed: int) -> None:
    chance = random.Random(seed)
    rules = [*NUMBERS, *FIRST, *LAST, *EVERY, *ALWAYS, *REPEATED, "attention_types", "hybrid_override_pattern"]
    for _ in range(300):
        configs = [
            {chance.choice(rules): chance.choice(ODD) for _ in range(6)} | {"num_hidden_layers": 4} for _ in "ab"
        ]
        words = " ".join(f"{chance.choice('ab')}{chance.randrange(4)}" for _ in range(4))
        given = order(f"a0 {words}", a=configs[0], **({"b": configs[1]} if "b" in words else {}))
        with suppress(Unsayable):
            assert stacked_config(given)[0]["num_hidden_layers"] == 5
        assert leveled(configs[1], configs[0])["num_hidden_layers"] == 4


def test_a_key_that_only_another_model_has_is_refused() -> None:
    with pytest.raises(
        Unsayable, match="`b` says by `layer_types` what its layers are, that of `a` does not"
    ) as refused:
        edited("a0 a1 b0", {}, b={"num_hidden_layers": 3, "layer_types": [FULL] * 3})
    assert refused.value.entry == 2


def test_leveled_configurations_differ_in_nothing_but_what_layers_compute() -> None:
    a = {
        "num_hidden_layers": 6,
        "layer_types": [FULL] * 6,
        "rope_theta": 1e4,
        "first_k_dense_replace": 2,
        "moe_layers": [1],
    }
    b = {"num_hidden_layers": 3, "layer_types": [NEAR] * 3, "rope_theta": 5e5, "mlp_only_layers": [1]}
    level = leveled(b, a)
    assert level == {**a, "rope_theta": 5e5, "mlp_only_layers": None}


# ------------------------------------------------------------------------------------------------ with transformers

STACKED = {
    "llama": "0 1 0 1 1", "qwen3": "1 0", "gemma2": "0 1 0 1", "gemma3_text": "0 1 1 0 0", "gemma3_vision": "0 1 1",
    "qwen3_moe": "0 1 1", "gpt_oss": "0 1 1 0", "deepseek_v3": "0 0 1 1", "gpt2": "1 1 0 0", "mistral": "0 1 0",
}  # fmt: skip


@pytest.mark.parametrize("name", STACKED)
def test_outputs_load_and_generate(
    name: str,
    families: Callable[[str], Path],
    load: Callable[[Path], dict[str, Any]],
    transformers: Any,
    tmp_path: Path,
) -> None:
    """Each layer's output by transformers is what its own weights compute: hidden states of the stack, layer by layer,
    equal those of a model that transformers itself was told to make of these layers."""
    folder, numbers = families(name), [int(word) for word in STACKED[name].split()]
    stack = [{"from": "rl", "layers": number} for number in numbers]
    models = {"rl": str(folder / "rl"), "deep": {"stack": stack}}
    output = skillmerge.apply(write_recipe(tmp_path, "deep", models=models, coefficients=None)).output
    report = load(output)
    assert report["ok"], report
    kind = getattr(transformers, FAMILIES[name].architecture)
    with torch.no_grad():
        ours, theirs = (kind.from_pretrained(path, dtype=torch.float32).eval() for path in (output, folder / "rl"))
        _restack(theirs, numbers)
        tokens = torch.arange(1, 20)[None] % TEXT["vocab_size"]
        assert torch.equal(ours(tokens).logits, theirs(tokens, use_cache=False).logits)


def _restack(model: Any, numbers: list[int]) -> None:
    """Put the layers of a loaded model into another order, by hand."""
    for module in model.modules():
        for attribute in ("layers", "h"):
            layers = getattr(module, attribute, None)
            if (
                isinstance(layers, torch.nn.ModuleList)
                and "ision" not in type(module).__name__
                and "Siglip" not in type(module).__name__
            ):
                setattr(module, attribute, torch.nn.ModuleList(layers[number] for number in numbers))
                module.config.num_hidden_layers = len(numbers)
                kinds = getattr(module.config, "layer_types", None)
                if kinds:
                    module.config.layer_types = [kinds[number] for number in numbers]
                return


def test_what_config_cannot_say_is_refused_at_its_entry(families: Callable[[str], Path], tmp_path: Path) -> None:
    stack = [{"from": "rl", "layers": 1}, {"from": "rl", "layers": 0}]
    models = {"rl": str(families("deepseek_v3") / "rl"), "deep": {"stack": stack}}
    refused = run_cli("plan", write_recipe(tmp_path, "deep", models=models, coefficients=None))
    assert refused.returncode == 2
    assert (
        "layer 1 of the stack, layer 0 of `rl`, is of a kind that config.json can give to the first layers only"
        in refused.stderr
    )
    assert "help: leave that layer out, or begin with it" in refused.stderr


def test_config_json_keeps_everything_else(families: Callable[[str], Path], tmp_path: Path) -> None:
    source = families("llama") / "rl"
    models = {
        "rl": str(source),
        "deep": {"stack": [{"from": "rl"}, {"from": "rl"}]},
        "same": {"stack": [{"from": "rl"}]},
    }
    output = skillmerge.apply(write_recipe(tmp_path, "deep", models=models, coefficients=None)).output
    before, after = (path.joinpath("config.json").read_text() for path in (source, output))
    assert after == before.replace('"num_hidden_layers": 2', '"num_hidden_layers": 4')
    other = {path.name for path in source.iterdir() if "safetensors" not in path.name}
    assert other <= {path.name for path in output.iterdir()}
    path = write_recipe(tmp_path, "same", models=models, coefficients=None, output={"path": "same", "dtype": "float16"})
    same = skillmerge.apply(path).output
    assert json.loads((same / "config.json").read_text())["dtype"] == "float16"
    assert {tensor.dtype for tensor in read_checkpoint(same).values()} == {torch.float16}
