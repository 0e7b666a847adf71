"""Models of another architecture: what is said to do about them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import run_cli, write_checkpoint, write_recipe

import skillmerge

NAMES = ("target", "rl", "sft")
CONFIG = {"model_type": "llama", "num_hidden_layers": 2}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    tensors = {f"model.layers.{layer}.mlp.up_proj.weight": torch.ones(4, 4) for layer in range(2)}
    for name in NAMES:
        write_checkpoint(tmp_path / name, tensors, config=CONFIG)
    return write_recipe(tmp_path)


def says(recipe: Path, model: str, **keys: object) -> None:
    (recipe.parent / model / "config.json").write_text(json.dumps({**CONFIG, **keys}))


def helped(recipe: Path) -> str | None:
    found = [it.help for it in skillmerge.plan(recipe).compared.found if it.key in ("model_type", "num_hidden_layers")]
    assert len(found) == 1
    return found[0]


def test_another_architecture_points_to_the_line_of_the_path(recipe: Path) -> None:
    """Found by a newcomer: the only advice was to accept it."""
    says(recipe, "rl", model_type="gpt2")
    done = run_cli("plan", recipe, "-q")
    assert done.stdout.splitlines()[:4] == [
        "problem: `rl` is gpt2 with 2 layers, the donor `target` llama with 2 layers: is it the right model?",
        f"help: check the path of `rl`: {recipe}:5: `rl: rl`",
        "help: after checking, to accept these differences, add to the recipe:",
        "accept: [architecture]",
    ]


def test_every_model_of_another_architecture_is_pointed_to(recipe: Path) -> None:
    says(recipe, "rl", model_type="gpt2")
    says(recipe, "sft", model_type="gpt2")
    assert helped(recipe) == (
        f"check the path of `rl`: {recipe}:5: `rl: rl`\ncheck the path of `sft`: {recipe}:6: `sft: sft`"
    )


@pytest.mark.parametrize("model", ["rl", "target"])
def test_configuration_of_another_model_is_recognized_by_its_layers(recipe: Path, model: str) -> None:
    says(recipe, model, num_hidden_layers=32)
    line = 4 + NAMES.index(model)
    assert helped(recipe) == (
        f"the weights of `{model}` have 2 layers: its config.json is of another model\n"
        f"check the path of `{model}`: {recipe}:{line}: `{model}: {model}`"
    )


def test_weights_of_a_deeper_model_have_their_own_configuration(recipe: Path) -> None:
    tensors = {f"model.layers.{layer}.mlp.up_proj.weight": torch.ones(4, 4) for layer in range(3)}
    write_checkpoint(recipe.parent / "rl", tensors, config={**CONFIG, "num_hidden_layers": 3})
    assert helped(recipe) == f"check the path of `rl`: {recipe}:5: `rl: rl`"
