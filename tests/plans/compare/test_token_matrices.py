"""Matrices with a row for each token, of the architectures of transformers: under the names that files have."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MODELS, random_tensors, tensor_shapes, write_checkpoint, write_recipe
from pair_cases import tokenizer

import skillmerge
from skillmerge.naming import layer_of
from skillmerge.plans.compare.roles import heads, token_matrices
from skillmerge.tensors import TensorSpec

pytestmark = pytest.mark.xdist_group("transformers")

ROWS = 100_003
"""A prime, which no other matrix has as many rows as."""

KINDS = (
    "bert", "big_bird", "biogpt", "bloom", "camembert", "codegen", "ctrl", "data2vec-text", "deepseek_v4", "electra",
    "falcon", "falcon_mamba", "gpt2", "gpt_neox", "gptj", "jamba", "llama", "mamba", "mamba2", "modernbert-decoder",
    "mpt",
    "nemotron_h", "openai-gpt", "opt", "qwen2", "rembert", "roberta", "roformer", "rwkv", "trocr",
    "whisper", "xglm", "xlm", "xlnet", "xlstm",
)  # fmt: skip


@pytest.fixture(scope="module")
def quiet(transformers: Any) -> Any:
    """The library, without its advice on models that are made with settings of their own."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.CRITICAL)
    yield transformers
    transformers.logging.set_verbosity(level)


def stored(library: Any, kind: str) -> dict[str, torch.Tensor]:
    """The tensors of a small model, without their values, under the names that its files have."""
    own = library.AutoConfig.for_model(kind)
    sizes = ("num_hidden_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "num_blocks")
    given = {"vocab_size": ROWS, **{key: 2 for key in sizes if hasattr(own, key)}}
    with torch.device("meta"):
        model = library.AutoModelForCausalLM.from_config(library.AutoConfig.for_model(kind, **given))
    tensors = model.state_dict()
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return tensors
    return revert_weight_conversion(model, tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_embedding_and_head_are_known(kind: str, quiet: Any) -> None:
    if kind not in quiet.CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {kind}")
    tensors = {name: tuple(tensor.shape) for name, tensor in stored(quiet, kind).items() if tensor.dim() == 2}
    specs = [TensorSpec(name, "F32", shape, "model.safetensors") for name, shape in tensors.items()]
    matrices = {name for name, shape in tensors.items() if shape[0] == ROWS and layer_of(name) is None}
    found, scores = token_matrices(specs, {"vocab_size": ROWS}), heads(specs, {"vocab_size": ROWS})
    assert found == matrices
    assert len(scores) == 1
    assert scores < found


@pytest.mark.parametrize(
    ("embedding", "head"),
    [
        ("backbone.embeddings.weight", None),
        ("rwkv.embeddings.weight", "head.weight"),
        ("transformer.tokens_embed.weight", None),
        ("model.embed_tokens.weight", "head.weight"),
    ],
)
def test_other_tokens_are_a_problem_under_every_name(embedding: str, head: str | None, tmp_path: Path) -> None:
    """And a head that is there is found, so that runtimes start with no random one."""
    config = {
        "model_type": "odd",
        "architectures": ["OddForCausalLM"],
        "tie_word_embeddings": not head,
        "vocab_size": 32,
    }
    swapped = ["b", "a", *"cdefgh", "ab", "cd", "abcd"]
    for seed, name in enumerate(MODELS):
        shapes = {embedding: (32, 16), "blocks.0.attention.key.weight": (16, 16), **({head: (32, 16)} if head else {})}
        tensors = random_tensors(shapes)
        step = random_tensors(shapes, torch.float32, seed, 1e-3)
        write_checkpoint(
            tmp_path / name, {key: (it + step[key]).bfloat16() for key, it in tensors.items()}, config=config
        )
        words = swapped if name == "rl" else sorted(swapped, key=lambda word: (len(word), word))
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(tokenizer(words, {})))
    plan = skillmerge.plan(write_recipe(tmp_path))
    assert [it.message for it in plan.problems] == [
        "2 ids mean different tokens in models whose embedding or head is merged: `a` is 0 in `target` and `sft`, "
        "1 in `rl`; `b` is 1 in `target` and `sft`, 0 in `rl`"
    ]
    assert plan.warnings == ()


def test_rows_for_the_start_of_moshi_are_no_alarm(tmp_path: Path) -> None:
    config = {"model_type": "moshi", "vocab_size": 32, "tie_word_embeddings": False}
    for seed, name in enumerate(MODELS):
        shapes = {**tensor_shapes(), "model.embed_tokens.weight": (33, 16)}
        write_checkpoint(tmp_path / name, random_tensors(shapes, seed=seed), config=config)
    assert skillmerge.plan(write_recipe(tmp_path)).warnings == ()
