"""Commands that take their models from the command line name what was typed, and their own options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_tensors, run_cli, tensor_shapes, write_checkpoint

PLAIN: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "rope_theta": 10000.0, "vocab_size": 32,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
BIAS = "model.layers.0.self_attn.q_proj.bias"


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """`old`, and models that do not belong to it."""
    old = random_tensors(tensor_shapes(), torch.bfloat16, 0)
    new = random_tensors(tensor_shapes(), torch.bfloat16, 1)
    write_checkpoint(tmp_path / "old", old, config=PLAIN)
    write_checkpoint(tmp_path / "rope", new, config={**PLAIN, "rope_theta": 1e6})
    write_checkpoint(tmp_path / "bias", {**new, BIAS: torch.zeros(16)}, config=PLAIN)
    wide = torch.zeros(40, 16, dtype=torch.bfloat16)
    write_checkpoint(tmp_path / "wide", {**new, "lm_head.weight": wide}, config=PLAIN)
    wrapped = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in new.items()}
    write_checkpoint(tmp_path / "wrapped", wrapped, config=PLAIN)
    write_checkpoint(tmp_path / "deep", new, config={**PLAIN, "num_hidden_layers": 5})
    return tmp_path


EXTRACTED = {
    "rope": (
        "error: 1 problem between the models:\n"
        "rope base: `old` has 10,000, `./rope` 1,000,000: the update was trained for other positions than the output "
        "computes\n"
        "help: after checking, to accept these differences: --accept rope\n"
    ),
    "bias": (
        "error: 1 problem between the models:\n"
        f"`old` lacks 1 tensor that the formula needs: {BIAS}\n"
        'help: if the skill does not need them, pass: --ignore "model.layers.*.self_attn.q_proj.bias"\n'
    ),
    "wide": (
        "error: 1 problem between the models:\n"
        "1 tensor differs in shape between `./wide` and `old`: `lm_head.weight` [40, 16] against [32, 16]\n"
        "their vocabularies seem to differ\n"
        'help: if the skill does not need them, pass: --ignore "lm_head.weight"\n'
    ),
    "wrapped": (
        "error: 1 problem between the models:\n"
        "`old` has the tensors of `./wrapped` under other names: `model.…` for `model.language_model.…`\n"
        "help: to read one under the other's names, write a recipe with `output: {kind: skill}`, and in its `models:`\n"
        '  sft: {path: old, rename: [{from: "model.", to: "model.language_model."}]}\n'
    ),
    "deep": (
        "error: 2 problems between the models:\n"
        "`old` is llama with 3 layers, `./deep` llama with 5 layers: is it the right model?\n"
        "config.json and weights of `./deep` contradict each other: config.json says num_hidden_layers = 5, but the "
        "weights hold 3 layers (`model.layers.0` to `model.layers.2`)\n"
        "help: the weights of `./deep` have 3 layers: its config.json is of another model\n"
        "check the path of `./deep`\n"
    ),
}


@pytest.mark.parametrize("name", EXTRACTED)
def test_extract_names_the_folders_that_were_typed(pair: Path, name: str) -> None:
    done = run_cli("extract", "--from", f"./{name}", "--minus", "old", "--output", "skill", cwd=pair)
    assert (done.returncode, done.stderr) == (4, EXTRACTED[name])


INSPECTED = {
    "rope": "warning: rope base: `old` has 10,000, `./rope` 1,000,000: the update was trained for other positions than "
    "the output computes",
    "bias": f"note: 1 tensor is left out: {BIAS} (not in old)",
    "wide": "note: 1 tensor is left out: lm_head.weight ([40, 16] in ./wide, [32, 16] in old)",
}


@pytest.mark.parametrize("name", INSPECTED)
def test_inspect_names_the_folders_that_were_typed(pair: Path, name: str) -> None:
    done = run_cli("inspect", "old", f"./{name}", "--stats", "off", cwd=pair)
    assert done.returncode == 0
    assert INSPECTED[name] in (*done.stdout.splitlines(), *done.stderr.splitlines())
    assert "donor" not in done.stdout + done.stderr
