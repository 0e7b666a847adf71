"""PEFT loads what is written as an adapter, and makes the model of it that the same formula makes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter_models import EXPERTS, VARIANTS, Q, Variant, adapter, merged, model_of, wide
from conftest import read_checkpoint, write_recipe
from safetensors.torch import load_file

import skillmerge
from skillmerge.errors import RecipeError

pytestmark = [pytest.mark.xdist_group("transformers"), pytest.mark.filterwarnings("ignore")]

JOINED = ("linear", "patterns", "rslora", "fan_in_fan_out", "embedding", "embedding_tied", "lora_bias", "experts",
          "experts_patterns", "experts_transposed", "experts_on_split", "mixtral_on_split")  # fmt: skip


def both_ways(folder: Path, packed: bool, **keys: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What PEFT makes of the written adapter, computed in float64, and what the formula makes as a model."""
    models = {"base": "base", "a": {"adapter": "a", "onto": "base"}, "b": {"adapter": "b", "onto": "base"}}
    recipe: dict[str, Any] = {"models": models, "merge": "base + lam * (a - base) + 0.3 * (b - base)", **keys}
    for output in ({"path": "adapter", "kind": "adapter"}, {"path": "model", "dtype": "float32"}):
        skillmerge.apply(write_recipe(folder, **recipe, output=output))
    return merged(folder, folder / "merged", torch.float64, packed), read_checkpoint(folder / "model")


def near(theirs: dict[str, torch.Tensor], ours: dict[str, torch.Tensor], base: dict[str, torch.Tensor]) -> int:
    """Within the roundings of both: of B to float32, of either model, of the sum. Returns how many tensors changed."""
    assert theirs.keys() == ours.keys()
    changed = 0
    for name, values in theirs.items():
        whole, found, own = wide(values), wide(ours[name]), wide(base[name])
        added = np.abs(whole - own).max(initial=0.0)
        changed += bool(added)
        assert (np.abs(whole - found) <= 2**-22 * (np.abs(whole).max(initial=0.0) + added)).all(), name
    return changed


@pytest.mark.parametrize("name", JOINED)
def test_peft_merges_what_the_formula_merges(name: str, tmp_path: Path) -> None:
    for link, seed in (("a", 7), ("b", 8)):
        (tmp_path / link).symlink_to(adapter(name, seed=seed) / "adapter")
    (tmp_path / "base").symlink_to(adapter(name) / "base")
    theirs, ours = both_ways(tmp_path, VARIANTS[name].packed)
    base = read_checkpoint(tmp_path / "base")
    assert near(theirs, ours, base)
    again = {"base": "base", "v": {"adapter": "adapter"}}
    output = {"path": "again", "dtype": "float32"}
    skillmerge.apply(write_recipe(tmp_path, "base + v", models=again, coefficients=None, output=output))
    assert near(read_checkpoint(tmp_path / "again"), ours, base)


@pytest.mark.parametrize("name", ["patterns", "rslora", "fan_in_fan_out", "embedding", "lora_bias"])
def test_beside_its_model_it_generates_what_the_merged_model_generates(name: str, tmp_path: Path) -> None:
    """Loaded by PEFT and never merged, as a server does."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    for link, seed in (("a", 7), ("b", 8)):
        (tmp_path / link).symlink_to(adapter(name, seed=seed) / "adapter")
    (tmp_path / "base").symlink_to(adapter(name) / "base")
    both_ways(tmp_path, VARIANTS[name].packed, coefficients={"lam": 1.5})
    base, merged = (
        AutoModelForCausalLM.from_pretrained(tmp_path / it, dtype=torch.float64).eval() for it in ("base", "model")
    )
    words = torch.arange(1, 9)[None]
    plain = base(words).logits.detach()
    beside = PeftModel.from_pretrained(base, tmp_path / "adapter").to(torch.float64).eval()
    theirs, ours = beside(words).logits, merged(words).logits
    assert (ours - plain).abs().max() > 1e3 * (ours - theirs).abs().max()
    made = [
        it.generate(input_ids=words, max_new_tokens=8, do_sample=False, pad_token_id=0).tolist()
        for it in (beside, merged)
    ]
    assert made[0] == made[1]


def made_by_peft(folder: Path, words: dict[str, Any], variant: Variant, seed: int) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder.parent / "base", dtype=torch.float32)
    trained = get_peft_model(base, LoraConfig(**{"lora_alpha": 6, "task_type": "CAUSAL_LM", **words}))
    torch.manual_seed(seed)
    for parameter in trained.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.02
    trained.save_pretrained(folder)


UNLIKE: dict[str, tuple[Variant, dict[str, Any], dict[str, Any]]] = {
    "modules": (Variant({}), {"r": 4, "target_modules": ["q_proj", "embed_tokens"]},
                {"r": 9, "target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
    "experts": (Variant({}, "qwen3_moe"), {"r": 4, "target_modules": Q, "target_parameters": EXPERTS},
                {"r": 2, "target_modules": ["k_proj"], "target_parameters": EXPERTS[:1]}),
}  # fmt: skip


@pytest.mark.parametrize("name", UNLIKE)
def test_adapters_of_other_modules_and_ranks(name: str, tmp_path: Path) -> None:
    """One has only some of the other's modules and parameters; experts are stored one by one."""
    variant, *words = UNLIKE[name]
    model_of(variant, torch.float32).save_pretrained(tmp_path / "base")
    for seed, (folder, word) in enumerate(zip("ab", words, strict=True)):
        made_by_peft(tmp_path / folder, word, variant, seed)
    lam = {"default": 0.5, "rules": [{"tensors": "*down_proj*", "value": 0.0}]}
    for coefficient in (0.5, lam):
        for output in ("adapter", "model", "merged"):
            _remove(tmp_path / output)
        theirs, ours = both_ways(tmp_path, variant.packed, coefficients={"lam": coefficient})
        assert near(theirs, ours, read_checkpoint(tmp_path / "base"))
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert not any("base_layer" in it for it in names)


def test_one_of_two_parameters_is_named_as_if_it_were_alone(tmp_path: Path) -> None:
    variant = Variant({}, "qwen3_moe")
    model_of(variant, torch.float32).save_pretrained(tmp_path / "base")
    for seed, folder in enumerate("ab"):
        made_by_peft(tmp_path / folder, {"r": 2, "target_modules": Q, "target_parameters": EXPERTS}, variant, seed)
    lam = {"default": 0.5, "rules": [{"tensors": "*down_proj*", "value": 0.0}]}
    merge = "base + lam * (a - base + b - base)"
    theirs, ours = both_ways(tmp_path, False, coefficients={"lam": lam}, merge=merge)
    assert near(theirs, ours, read_checkpoint(tmp_path / "base"))


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def test_loading_it_warns_of_nothing_that_is_missing(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    (tmp_path / "a").symlink_to(adapter("patterns") / "adapter")
    (tmp_path / "base").symlink_to(adapter("patterns") / "base")
    models = {"a": {"adapter": "a"}}
    skillmerge.apply(write_recipe(tmp_path, "0.5 * a", models=models, coefficients=None,
                                  output={"path": "out", "kind": "adapter"}))  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        loaded = PeftModel.from_pretrained(base, tmp_path / "out")
    assert not [str(it.message) for it in told if "key" in str(it.message) or "Adapter" in str(it.message)]
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    inside = {name.replace(".default", ""): it for name, it in loaded.state_dict().items() if "lora_" in name}
    assert inside.keys() == stored.keys()
    assert all(torch.equal(inside[name], it) for name, it in stored.items())


def test_parameters_whose_nesting_no_adapter_shows(tmp_path: Path) -> None:
    """Each has one of the two, so that neither shows which PEFT would name `base_layer`."""
    variant = Variant({}, "qwen3_moe")
    model_of(variant, torch.float32).save_pretrained(tmp_path / "base")
    for folder, parameters in (("a", EXPERTS[:1]), ("b", EXPERTS[1:])):
        made_by_peft(tmp_path / folder, {"r": 2, "target_modules": Q, "target_parameters": parameters}, variant, 1)
    with pytest.raises(RecipeError, match="how PEFT would call both is not known"):
        both_ways(tmp_path, False)


@pytest.mark.parametrize(
    ("rule", "packed"),
    [
        ({"tensors": "*experts.2.up_proj*"}, False),
        ({"experts": "0-1", "tensors": "*up_proj*"}, False),
        ({"experts": "0-1", "tensors": "*gate_up_proj*"}, True),
    ],
)
def test_parts_of_what_an_adapter_has_as_one_need_one_coefficient(
    tmp_path: Path, rule: dict[str, Any], packed: bool
) -> None:
    variant = Variant({}, "qwen3_moe")
    model_of(variant, torch.float32).save_pretrained(tmp_path / "base", save_original_format=not packed)
    for folder in "ab":
        made_by_peft(tmp_path / folder, {"r": 2, "target_modules": Q, "target_parameters": EXPERTS}, variant, 1)
    lam = {"default": 0.5, "rules": [{**rule, "value": 0.0}]}
    with pytest.raises(RecipeError, match=r"have `model\.layers\.0\.mlp\.experts\.gate_up_proj` as one"):
        both_ways(tmp_path, False, coefficients={"lam": lam})
