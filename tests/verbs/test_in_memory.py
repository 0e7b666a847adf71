"""Candidates merged in memory have the weights that `apply` writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_recipe
from safetensors.torch import load_file, save_file

import skillmerge
from skillmerge.errors import InputError
from skillmerge.plans.opening import Access
from skillmerge.recipes.parse import load
from skillmerge.reporter import Reporter
from skillmerge.verbs.sweep import in_memory
from skillmerge.verbs.sweep.candidates import with_values
from skillmerge.verbs.sweep.in_memory import MergedModel
from skillmerge.verbs.sweep.sweep import sweep


class Notes(Reporter):
    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


pytestmark = pytest.mark.xdist_group("transformers")

transformers = pytest.importorskip("transformers")


# --------------------------------------------------------------------------------------------------------- in place


@pytest.mark.parametrize("formula", ["target + lam * (rl - sft)", "(1 - lam) * target + lam * rl"])
def test_weights_in_memory_are_those_that_apply_writes(tmp_path: Path, formula: str, demo: Path) -> None:
    """Bit for bit, for every candidate, statistics included."""
    names = {"target": "target-sft", "rl": "source-rl", "sft": "source-sft"}
    models = {key: str(demo / name) for key, name in names.items()}
    recipe = load(write_recipe(tmp_path, formula, models=models, coefficients={"lam": 1.0}))
    model = MergedModel(recipe, Access(), "cpu", Reporter())
    for lam in (0.0, 0.3, 1.0, -1.0, 1.7):
        candidate = with_values(recipe, {"lam": lam})
        statistics = model.use(candidate)
        made = skillmerge.apply(candidate, tmp_path / f"out-{lam}")
        wanted = transformers.AutoModelForCausalLM.from_pretrained(made.output, dtype="auto").state_dict()
        found = model.model.state_dict()
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert torch.equal(found[name].view(torch.int16), tensor.view(torch.int16)), (lam, name)
        assert statistics.all == made.manifest.statistics.all
    model.close()


def test_stochastic_rounding_in_memory_too(tmp_path: Path, demo: Path) -> None:
    models = {
        key: str(demo / name) for key, name in {"target": "target-sft", "rl": "source-rl", "sft": "source-sft"}.items()
    }
    output = {"rounding": "stochastic", "seed": 3}
    recipe = load(write_recipe(tmp_path, models=models, output=output))
    model = MergedModel(recipe, Access(), "cpu", Reporter())
    model.use(recipe)
    made = skillmerge.apply(recipe, tmp_path / "out")
    wanted = transformers.AutoModelForCausalLM.from_pretrained(made.output, dtype="auto").state_dict()
    for name, tensor in model.model.state_dict().items():
        assert torch.equal(tensor.view(torch.int16), wanted[name].view(torch.int16)), name
    model.close()


@pytest.mark.parametrize("onto", [False, True])
def test_an_adapter_is_held_in_memory_as_well(
    tmp_path: Path, demo: Path, onto: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its elements as float32, and no zeros to take from them."""
    skillmerge.extract(str(demo / "source-rl"), str(demo / "source-sft"), tmp_path / "skill")
    skillmerge.export(tmp_path / "skill", tmp_path / "adapter", lora_rank=2, base=str(demo / "source-sft"))
    models = {"target": str(demo / "target-sft"), "sft": str(demo / "source-sft"),
              "v": {"adapter": "adapter", **({"onto": "sft"} if onto else {})}}  # fmt: skip
    formula = "target + lam * (v - sft)" if onto else "target + lam * v"
    recipe = load(write_recipe(tmp_path, formula, models=models))
    size = sum(it.nbytes for it in load_file(demo / "target-sft" / "model.safetensors").values())
    monkeypatch.setattr(in_memory, "free_memory", lambda: 6 * size)  # target, v as float32, twice; model and sft
    model = MergedModel(recipe, Access(), "cpu", Reporter())
    for lam in (0.3, 1.0):
        candidate = with_values(recipe, {"lam": lam})
        model.use(candidate)
        made = skillmerge.apply(candidate, tmp_path / f"out-{lam}")
        wanted = transformers.AutoModelForCausalLM.from_pretrained(made.output, dtype="auto").state_dict()
        for name, tensor in model.model.state_dict().items():
            assert torch.equal(tensor.view(torch.int16), wanted[name].view(torch.int16)), name
    model.close()


def test_a_skill_is_held_in_memory_as_well(tmp_path: Path, demo: Path) -> None:
    skillmerge.extract(str(demo / "source-rl"), str(demo / "source-sft"), tmp_path / "skill")
    models = {"target": str(demo / "target-sft"), "math": {"skill": "skill"}}
    recipe = load(write_recipe(tmp_path, "target + lam * math", models=models))
    model = MergedModel(recipe, Access(), "cpu", Reporter())
    model.use(with_values(recipe, {"lam": 0.9}))
    made = skillmerge.apply(with_values(recipe, {"lam": 0.9}), tmp_path / "out")
    wanted = transformers.AutoModelForCausalLM.from_pretrained(made.output, dtype="auto").state_dict()
    for name, tensor in model.model.state_dict().items():
        assert torch.equal(tensor.view(torch.int16), wanted[name].view(torch.int16)), name
    model.close()


def test_too_little_memory_is_told_before_any_work(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skillmerge.verbs.sweep.in_memory.free_memory", lambda: 1000)
    process_free = pytest.raises(skillmerge.SkillmergeError, match="scoring in memory needs")
    with process_free:
        MergedModel(load(demo / "recipe.yaml"), Access(), "cpu", Reporter())


def test_tied_parameters_that_part_are_loaded_anew(tmp_path: Path) -> None:
    """Both the embedding and the head are in the files, equal at first: transformers makes one parameter of them."""
    config = transformers.Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    for seed, name in enumerate(("target", "rl", "sft")):
        torch.manual_seed(seed)
        transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path / name)
        tensors = load_file(tmp_path / name / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})
    rules = {"default": 0.0, "rules": [{"tensors": "*embed_tokens*", "value": 0.5}]}
    recipe = load(write_recipe(tmp_path, coefficients={"lam": rules}))
    listener = Notes()
    model = MergedModel(with_values(recipe, {"lam.rules.0.value": 0.0}), Access(), "cpu", listener)
    assert any("loaded from files" in note for note in listener.notes)
    candidate = with_values(recipe, {"lam.rules.0.value": 0.7})
    model.use(candidate)
    out = skillmerge.apply(candidate, tmp_path / "out").output
    wanted = transformers.Qwen2ForCausalLM.from_pretrained(out, dtype="auto").state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.model.state_dict().items())
    model.close()


def test_sweep_that_begins_at_0_compares_the_models_all_the_same(demo: Path, tmp_path: Path) -> None:
    """Found by a review: at 0 no model but the target is used, and none was compared for the other candidates."""
    shutil.copytree(demo, tmp_path / "demo")
    config = tmp_path / "demo" / "source-rl" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "rope_theta": 5.0, "rope_parameters": None}))
    recipe = load(tmp_path / "demo" / "recipe.yaml")
    model = MergedModel(with_values(recipe, {"lam": 0.0}), Access(), "cpu", Reporter())
    with pytest.raises(InputError, match="rope base"):
        model.use(with_values(recipe, {"lam": 0.5}))
    model.close()


def changed(demo: Path, into: Path, file: str, change: Callable[[dict[str, Any]], None], coefficient: Any) -> Path:
    """A copy of the family in which a file of `source-rl` says something else. Returns a recipe of it."""
    shutil.copytree(demo, into)
    path = into / "source-rl" / file
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    names = {"target": "target-sft", "rl": "source-rl", "sft": "source-sft"}
    return write_recipe(into, models=names, coefficients={"lam": coefficient})


@pytest.mark.parametrize("values", ["0,0.5", "0.5,0"])
def test_sweep_refuses_a_problem_of_any_candidate_before_a_score(demo: Path, tmp_path: Path, values: str) -> None:
    """Found by a review: the models were compared for the first candidate alone, here without the embedding."""

    def swap(document: dict[str, Any]) -> None:
        vocabulary = document["model"]["vocab"]
        one, other = list(vocabulary)[-2:]
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]

    lam = {"default": 0.5, "rules": [{"modules": "embedding", "value": 0}]}
    path = changed(demo, tmp_path / "demo", "tokenizer.json", swap, lam)
    with pytest.raises(InputError, match="2 ids mean different tokens"):
        sweep(path, [f"lam.rules.0.value={values}"], f"qa:{demo / 'choose.jsonl'}", tmp_path / "out")
    assert len((tmp_path / "out" / "journal.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("values", ["-0.5,0.5", "0.5,-0.5"])
def test_sweep_warns_alike_whichever_sign_comes_first(demo: Path, tmp_path: Path, values: str) -> None:
    """Found by a review: the template of a model that is only subtracted is not compared, nor was it later."""
    path = changed(demo, tmp_path / "demo", "tokenizer_config.json", lambda it: it.update(chat_template="B"), 0.5)
    reporter = Reporter()
    sweep(path, [f"lam={values}"], f"qa:{demo / 'choose.jsonl'}", tmp_path / "out", reporter=reporter)
    assert reporter.warnings == ["`rl` has a chat template and `target` has none; the output has none"]
