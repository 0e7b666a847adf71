"""What people write who begin with adapters, stacks, experts and tokens, and what they are told to write instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import layouts
import pytest
from adapter_models import write_adapter
from conftest import MODELS, run_cli, tensor_shapes, write_checkpoint, write_family, write_recipe

import skillmerge
from skillmerge.errors import CheckFailed, RecipeError, SkillmergeError

SHAPES = tensor_shapes()
V = {"adapter": "adapter"}
ALREADY = (
    "is a difference already, which counts as no model: write target + lam * v, so that the factors of models add up"
)

RECIPES: dict[str, tuple[str, dict[str, Any], dict[str, Any], str, str]] = {
    "a difference is no model": ("target + lam * (v - sft)", {"v": V, "sft": "sft"}, {}, "0.3 models' worth", ALREADY),
    "an average with one": ("0.5 * target + 0.5 * v", {"v": V}, {}, "0.5 models' worth", ALREADY),
    "adapters alone": (
        "lam * v", {"v": V}, {}, "a difference, not a model",
        "add it to a model: target + lam * v; or store it with `output: {kind: adapter}`",
    ),
    "a model as an adapter": (
        "target + v", {"v": {"adapter": "sft"}}, {}, "is a model, not a PEFT adapter",
        "write its place alone, without `adapter:`, and subtract the model that it was trained from: rl - sft",
    ),
    "an adapter as a skill": (
        "target + v", {"v": {"skill": "adapter"}}, {}, "adapter is a PEFT adapter, not a skill",
        "write `{adapter: …}` in the place of `{skill: …}`",
    ),
    "lora for adapter": (
        "target + v", {"v": {"lora": "adapter"}}, {}, "unknown key `lora`",
        "for a LoRA adapter, write `{adapter: FOLDER}`",
    ),
    "onto a place": (
        "target + v - target", {"v": {**V, "onto": "./sft"}}, {}, "`./sft` is not a model of this recipe",
        "give it a name: add `NAME: ./sft` under `models`, and write `onto: NAME`",
    ),
    "onto a place with a name": (
        "target + v - before", {"v": {**V, "onto": "./sft"}, "before": "./sft"}, {},
        "`./sft` is not a model of this recipe", "write its name: `onto: before`",
    ),
    "a larger model": (
        "target + v", {"v": {"adapter": "large"}}, {}, "make a matrix of shape [32, 32]",
        "the adapter says that it was trained on `acme/large`: name a model of that size",
    ),
    "other bases": (
        "v + w", {"v": V, "w": {"adapter": "large"}}, {"output": {"kind": "adapter"}}, "an adapter has one base",
        "give each adapter `onto:` that model, and write base + lam * (v - base) for each; otherwise leave",
    ),
    "a part of a stack by mergekit's words": (
        "deep", {"deep": {"stack": [{"from": "target", "layer_range": [0, 2]}]}}, {}, "unknown key `layer_range`",
        "write `layers: 0-1`: both ends count",
    ),
    "a range of no layers": (
        "deep", {"deep": {"stack": [{"from": "target", "layer_range": [2, 0]}]}}, {}, "unknown key `layer_range`",
        "did you mean `layers`?",
    ),
    "a stack of one part": (
        "deep", {"deep": {"stack": {"from": "target"}}}, {}, "`stack` must be a list, not a table",
        "write a list: `stack: [{from: target}]`",
    ),
    "a row as a text": (
        "target", {}, {"vocabulary": "by-token", "tokens": {"<a>": "target"}}, "`<a>` must be a table",
        "write `tokens: {<a>: {from: target}}`",
    ),
}  # fmt: skip


@pytest.fixture
def family(tmp_path: Path) -> Path:
    write_family(tmp_path)
    write_adapter(tmp_path / "adapter", SHAPES, base_model_name_or_path="acme/sft")
    large = {name: (32,) * len(shape) for name, shape in SHAPES.items()}
    write_adapter(tmp_path / "large", large, base_model_name_or_path="acme/large")
    return tmp_path


def told(recipe: Path) -> tuple[str, str]:
    with pytest.raises(SkillmergeError) as caught:
        skillmerge.plan(recipe)
    return caught.value.what if isinstance(caught.value, RecipeError) else str(caught.value), str(caught.value.fix)


@pytest.mark.parametrize("case", RECIPES)
def test_a_beginning_is_told_what_to_write(family: Path, case: str) -> None:
    merge, models, keys, message, fix = RECIPES[case]
    lam = {"lam": 0.7} if "lam" in merge else None
    recipe = write_recipe(family, merge, models={"target": "target", **models}, coefficients=lam, **keys)
    what, advice = told(recipe)
    assert message in what
    assert fix in advice


def test_adapters_on_one_model_are_written_as_advised(family: Path) -> None:
    write_adapter(family / "other", SHAPES, seed=1, base_model_name_or_path="acme/base")
    models = {"base": "sft", "v": {**V, "onto": "base"}, "w": {"adapter": "other", "onto": "base"}}
    merge = "base + lam * (v - base) + 0.5 * (w - base)"
    output = {"kind": "adapter", "path": "./joined"}
    skillmerge.apply(write_recipe(family, merge, models=models, output=output))
    skillmerge.verify(family / "joined")


def test_parts_that_replace_can_be_left_out_of_an_adapter_without_a_base(family: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = family / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    plain = {name: it for name, it in tensors.items() if "lm_head" not in name}
    rows = next(iter(plain.values())).new_zeros(1, SHAPES["model.embed_tokens.weight"][1])
    name = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    save_file({**plain, "base_model.model.lm_head.weight": rows.repeat(32, 1), name: rows}, file)
    config = family / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace("{", '{"trainable_token_indices": [3], ', 1))
    output = {"kind": "adapter", "path": "./joined"}
    keys: dict[str, Any] = {"models": {"v": V}, "output": output}
    assert "or leave these tensors out with `ignore`" in told(write_recipe(family, "lam * v", **keys))[1]
    skillmerge.apply(write_recipe(family, "lam * v", ignore=["lm_head.weight", "*.embed_tokens.weight"], **keys))
    assert load_file(family / "joined" / "adapter_model.safetensors").keys() == plain.keys()


def test_a_plan_shows_what_is_put_onto_a_model_and_names_no_donor_of_an_adapter(family: Path) -> None:
    models = {"base": "sft", "v": {**V, "onto": "base"}}
    keys: dict[str, Any] = {"models": models, "output": {"kind": "adapter"}}
    shown = run_cli("plan", write_recipe(family, "base + lam * (v - base)", **keys), cwd=family).stdout
    assert "adapter onto base" in shown
    assert "(donor)" not in shown
    whole = run_cli("plan", write_recipe(family, "base + lam * (v - base)", models=models), cwd=family).stdout
    assert "base (donor)" in whole


def test_parents_of_a_skill_are_those_that_can_be_shown(family: Path) -> None:
    """Of an adapter's skill the subtracted model has no part in the numbers."""
    skillmerge.extract(family / "adapter", family / "sft", family / "skill")
    with pytest.raises(CheckFailed) as caught:
        skillmerge.verify(family / "skill", parent=family / "sft")
    assert caught.value.fix == f"pass one of its parents: rl = {family / 'adapter'}"


RULES: dict[str, tuple[dict[str, Any], str]] = {
    "a packed expert by name": ({"tensors": "*.experts.3.*"}, "this model has its experts packed: write `experts: 3`"),
    "experts of another kind": (
        {"experts": "0-2", "modules": "router"},
        "numbered experts are of the kind `expert`: leave `modules` out, or write a rule for each",
    ),
}


@pytest.mark.parametrize("case", RULES)
def test_rules_for_experts(tmp_path: Path, case: str) -> None:
    for seed, model in enumerate(MODELS):
        write_checkpoint(
            tmp_path / model, layouts.packed(layouts.experts(5, 12, 8, seed)), config={"model_type": "odd"}
        )
    rule, advice = RULES[case]
    coefficients = {"lam": {"default": 1.0, "rules": [{**rule, "value": 0.5}]}}
    assert told(write_recipe(tmp_path, coefficients=coefficients))[1] == advice
