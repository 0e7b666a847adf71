"""Families that belong together, saved as their users save them: no problem and no warning, wherever they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MODELS, read_checkpoint, run_cli, write_checkpoint, write_recipe
from hub_server import HubServer
from model_families import FAMILIES, TEXT, Family, save_models
from pair_cases import tokenizer

pytestmark = pytest.mark.xdist_group("transformers")

_LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 32}  # fmt: skip
_VISION = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 14}
OTHERS = {
    "llama3_scaling": Family("LlamaForCausalLM", {**TEXT, "rope_parameters": _LLAMA3}, set()),
    "qwen2_window_off": Family(
        "Qwen2ForCausalLM", {**TEXT, "sliding_window": 32, "use_sliding_window": False, "max_window_layers": 2}, set()
    ),
    "qwen2_vl": Family(
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": {
                **TEXT,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
            },
            "vision_config": _VISION,
        },
        set(),
    ),
    "phi3_long": Family(
        "Phi3ForCausalLM",
        {
            **TEXT,
            "original_max_position_embeddings": 32,
            "rope_parameters": {
                "rope_type": "longrope", "rope_theta": 1e4, "long_factor": [1.5] * 4, "short_factor": [1.0] * 4,
            },
        },
        set(),
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM", {key: value for key, value in TEXT.items() if key != "num_key_value_heads"}, set(),
        dtype=torch.float16,
    ),
    "cohere": Family("CohereForCausalLM", TEXT, set()),
    "olmo2": Family("Olmo2ForCausalLM", TEXT, set()),
    "granite": Family("GraniteForCausalLM", {**TEXT, "attention_multiplier": 0.5, "logits_scaling": 8.0}, set()),
    "starcoder2": Family("Starcoder2ForCausalLM", TEXT, set()),
    "mamba2": Family(
        "Mamba2ForCausalLM",
        {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "num_heads": 8, "head_dim": 8}
        | {"n_groups": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        set(),
    ),
}  # fmt: skip
ALL = {**FAMILIES, **OTHERS}
"""The architectures of the tests and others."""


@pytest.fixture(scope="module")
def saved(transformers: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with target, sft and rl as transformers saves them."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            save_models(transformers, made[name], ALL[name])
        return made[name]

    return folder


def older(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration as version 4 of transformers writes it: other keys for rotary positions and the dtype."""
    found = {key: older(value) if key.endswith("_config") else value for key, value in config.items()}
    if "dtype" in found:
        found["torch_dtype"] = found.pop("dtype")
    rope = found.pop("rope_parameters", None)
    if rope and "full_attention" in rope:
        found["rope_theta"] = rope["full_attention"]["rope_theta"]
        if "sliding_attention" in rope:
            found["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    elif rope:
        rope = dict(rope)
        for new, old in (("rope_theta", "rope_theta"), ("partial_rotary_factor", "partial_rotary_factor")):
            if new in rope:
                found[old] = rope.pop(new)
        kind = rope.pop("rope_type", "default")
        found["rope_scaling"] = {"type": kind, **rope} if kind != "default" or rope else None
    kinds = found.get("layer_types")
    if kinds and set(kinds) == {"full_attention"}:
        del found["layer_types"]
    whole = (found.get("head_dim") or 0) * found.get("num_attention_heads", 0) == found.get("hidden_size")
    if whole and found.get("model_type") in ("llama", "mistral", "olmo2", "qwen2", "granite"):
        del found["head_dim"]
    return found


def write_tokenizer(folder: Path, *, again: bool) -> None:
    """The tokenizer of a model, or the same as a library saves it again: other spelling, the same ids."""
    document = tokenizer([*"abcdefgh", "ab", "cd", "abcd"], {11: "<|endoftext|>", 12: "<|im_end|>"})
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    if again:
        document["model"]["merges"] = [" ".join(merge) for merge in document["model"]["merges"]]
        document |= {"truncation": None, "padding": {"strategy": "BatchLongest"}, "decoder": {"type": "ByteLevel"}}
        document["model"]["byte_fallback"] = False
        settings["chat_template"] = "{{ messages }}\n"
        settings["model_max_length"] = 4096
    else:
        (folder / "chat_template.jinja").write_text("{{ messages }}")
        settings["added_tokens_decoder"] = {"11": {"content": "<|endoftext|>"}, "12": {"content": "<|im_end|>"}}
    (folder / "tokenizer.json").write_text(json.dumps(document))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def as_users_do(saved: Path, folder: Path) -> None:
    """target as it was saved, sft by an older library, rl by a trainer: differences that mean nothing."""
    for model in MODELS:
        shutil.copytree(saved / model, folder / model)
        write_tokenizer(folder / model, again=model == "sft")
        path = folder / model / "config.json"
        config = json.loads(path.read_text())
        if model == "sft":
            config = {**older(config), "transformers_version": "4.44.2", "_name_or_path": "/data/sft/step-900"}
        elif model == "rl":
            config |= {
                "transformers_version": "4.57.1", "use_cache": False, "attention_dropout": 0.1, "unsloth_version": "1",
            }  # fmt: skip
        path.write_text(json.dumps(config))
        generation = {
            "eos_token_id": {"target": [2, 12], "sft": [12, 2], "rl": 12}[model],
            "transformers_version": "4.4",
        }
        if model == "rl":
            generation |= {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "max_new_tokens": 512}
        (folder / model / "generation_config.json").write_text(json.dumps(generation))


def remarks(recipe: Path) -> tuple[int, list[str], list[str]]:
    """Exit status, problems and warnings of a plan."""
    planned = run_cli("plan", recipe, "--json")
    plan = json.loads(planned.stdout)
    return planned.returncode, [it["reason"] for it in plan["problems"]], plan["warnings"]


@pytest.mark.parametrize("name", ALL)
def test_family_gives_no_problem_and_no_warning(
    name: str, saved: Callable[[str], Path], hub: HubServer, tmp_path: Path
) -> None:
    as_users_do(saved(name), tmp_path)
    hub.create_from("acme/rl", tmp_path / "rl")
    recipe = write_recipe(tmp_path, models={"target": "target", "sft": "sft", "rl": "hf://acme/rl"})
    assert remarks(recipe) == (0, [], [])
    (tmp_path / "back").mkdir()
    places = {"target": "../sft", "sft": "hf://acme/rl", "rl": "../target"}
    assert remarks(write_recipe(tmp_path / "back", models=places)) == (0, [], [])


def test_there_are_enough_families() -> None:
    assert len(ALL) >= 24


@pytest.mark.parametrize("stated", ["rl", "sft"])
def test_padding_rows_are_no_alarm(stated: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    """Rows beyond the tokens, as `resize_token_embeddings(pad_to_multiple_of=...)` adds them, whatever config says."""
    for model in MODELS:
        source, folder = saved("llama") / model, tmp_path / model
        tensors = read_checkpoint(source)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.cat([tensors[name], torch.zeros(64, 32, dtype=torch.bfloat16)])
        config = json.loads((source / "config.json").read_text())
        write_checkpoint(folder, tensors, config={**config, "vocab_size": 120 if model == stated else 128})
        write_tokenizer(folder, again=model == stated)
    assert remarks(write_recipe(tmp_path)) == (0, [], [])


@pytest.mark.parametrize("writer", MODELS)
def test_stored_copy_of_a_tied_head_is_no_alarm(writer: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    for model in MODELS:
        tensors = read_checkpoint(saved("qwen2") / model)
        copy = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()} if model == writer else {}
        config = json.loads((saved("qwen2") / model / "config.json").read_text())
        write_checkpoint(tmp_path / model, {**tensors, **copy}, config=config)
    assert remarks(write_recipe(tmp_path)) == (0, [], [])


def test_vision_tower_that_newer_versions_describe_at_length_is_no_alarm(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
    """Newer versions write that images have two axes; older ones wrote nothing."""
    for model in MODELS:
        shutil.copytree(saved("qwen2_5_vl") / model, tmp_path / model)
        config = json.loads((tmp_path / model / "config.json").read_text())
        config["vision_config"].pop("rope_parameters", None)
        if model == "rl":
            config["vision_config"]["rope_parameters"] = {"rope_type": "axial", "rope_theta": 1e4}
        (tmp_path / model / "config.json").write_text(json.dumps(config))
    assert remarks(write_recipe(tmp_path)) == (0, [], [])
