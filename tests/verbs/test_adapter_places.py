"""Adapters by name, behind links and on the Hub; and what is said of their models and licenses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import DOWN, PREFIX, modules, write_adapter, write_base
from conftest import read_checkpoint, run_cli, weights, write_recipe
from hub_server import HubServer
from huggingface_hub import ModelCard
from safetensors.torch import save_file

import skillmerge
from skillmerge.errors import InputError, UsageError

ONTO = {"base": "./base", "rl": {"adapter": "./rl", "onto": "base"}}


@pytest.fixture
def family(tmp_path: Path) -> Path:
    write_base(tmp_path / "base", 4)
    write_adapter(tmp_path / "rl", modules(4), seed=1)
    return tmp_path


def recipe_of(folder: Path, merge: str, models: dict[str, Any], **keys: Any) -> Path:
    folder.mkdir(exist_ok=True)
    return write_recipe(folder, merge, models=models, **{"coefficients": None, **keys})


def card_of(folder: Path, license: str) -> None:
    (folder / "README.md").write_text(f"---\nlicense: {license}\n---\n")


@pytest.mark.parametrize("onto", [True, False])
def test_named_adapter_on_the_hub_has_the_bytes_of_the_folder(hub: HubServer, family: Path, onto: bool) -> None:
    (family / "all").mkdir()
    shutil.move(family / "rl", family / "all" / "rl")
    hub.create_from("acme/all", family / "all")
    entry = {"name": "rl", **({"onto": "base"} if onto else {})}
    made = []
    for name, place in (("local", "../all"), ("remote", "hf://acme/all")):
        models = {"base": "../base", "rl": {"adapter": place, **entry}}
        made.append(skillmerge.apply(recipe_of(family / name, "rl" if onto else "base + rl", models)))
    assert weights(made[0].output) == weights(made[1].output)


def test_links_that_leave_an_adapters_folder_are_followed_where_asked(family: Path) -> None:
    (family / "linked").mkdir()
    for file in (family / "rl").iterdir():
        (family / "linked" / file.name).symlink_to(file)
    with pytest.raises(InputError, match="is a link that leaves its folder"):
        skillmerge.extract(family / "linked", family / "base", family / "skill")
    made = skillmerge.extract(family / "linked", family / "base", family / "skill", follow_links=True)
    wanted = skillmerge.extract(family / "rl", family / "base", family / "plain")
    file = "skill-00001-of-00001.safetensors"
    assert (made.output / file).read_bytes() == (wanted.output / file).read_bytes()
    assert skillmerge.inspect(family / "linked", follow_links=True).adapters


def test_license_of_an_adapter_counts_beside_that_of_its_model(family: Path) -> None:
    card_of(family / "base", "mit")
    recipe = recipe_of(family, "rl", ONTO)
    assert {it.license for it in skillmerge.plan(recipe).inputs} == {"mit"}  # PEFT writes cards without one
    card_of(family / "rl", "cc-by-nc-4.0")
    assert [(it.name, it.license) for it in skillmerge.plan(recipe).inputs] == [
        ("base", "mit"), ("rl", "cc-by-nc-4.0"),
    ]  # fmt: skip


def test_card_names_the_model_of_an_adapter_as_peft_does(hub: HubServer, family: Path) -> None:
    hub.create_from("acme/rl", family / "rl")
    output = {"kind": "adapter", "path": "./out", "license": "mit"}
    recipe = recipe_of(family, "0.5 * v", {"v": {"adapter": "hf://acme/rl"}}, output=output)
    skillmerge.apply(recipe, push="acme/joined")
    card = ModelCard(hub.content("acme/joined", "README.md").decode())
    assert card.data.to_dict() == {
        "base_model": ["acme/base"], "base_model_relation": "adapter", "library_name": "peft", "license": "mit",
        "tags": ["lora", "skillmerge"],
    }  # fmt: skip
    assert (
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM  # or the class for its task\n\n"
        'base = AutoModelForCausalLM.from_pretrained("acme/base")\n'
        'model = PeftModel.from_pretrained(base, "acme/joined")\n'
    ) in card.text
    assert "[acme/rl](https://huggingface.co/acme/rl)" in card.text


@pytest.mark.parametrize("base", [None, "/home/somebody/models/sft"])
def test_card_names_no_folder_as_the_model_of_an_adapter(hub: HubServer, tmp_path: Path, base: str | None) -> None:
    write_adapter(tmp_path / "rl", modules(kinds=(DOWN,)), base_model_name_or_path=base)
    output = {"kind": "adapter", "path": "./out", "license": "mit"}
    skillmerge.apply(recipe_of(tmp_path, "0.5 * v", {"v": {"adapter": "./rl"}}, output=output))
    skillmerge.push(tmp_path / "out", "acme/joined")
    card = ModelCard(hub.content("acme/joined", "README.md").decode())
    assert "base_model" not in card.data.to_dict()
    assert 'from_pretrained("BASE")  # the model that the adapters were trained on' in card.text
    assert "somebody" not in card.text


def test_attestation_gives_files_of_the_model_no_place_in_the_adapter(hub: HubServer, family: Path) -> None:
    for name in ("base", "rl"):
        hub.create_from(f"acme/{name}", family / name)
    models = {"base": "hf://acme/base", "rl": {"adapter": "hf://acme/rl", "onto": "base"}}
    out = skillmerge.apply(recipe_of(family / "work", "rl", models)).output
    made = skillmerge.attest(out, bom_file=family / "bom.json")
    found = json.loads(made.attestation.read_text())["predicate"]["buildDefinition"]["resolvedDependencies"]
    commit = {name: hub.repos[f"acme/{name}"].refs["main"] for name in ("base", "rl")}
    assert {it["name"]: it.get("uri") for it in found} == {
        "base": f"hf://acme/base@{commit['base']}",
        "base/model.safetensors": f"hf://acme/base@{commit['base']}/model.safetensors",
        "rl": f"hf://acme/rl@{commit['rl']}",
        "rl/model.safetensors": None,
    }
    inputs = {it["bom-ref"]: it for it in json.loads((family / "bom.json").read_text())["components"]}
    assert [it["name"] for it in inputs["input/base"]["components"]] == ["model.safetensors"]
    assert "components" not in inputs["input/rl"]


def test_ramp_over_layers_that_only_adapters_show_is_told(tmp_path: Path) -> None:
    write_base(tmp_path / "base", 4)
    write_adapter(tmp_path / "rl", modules(4)[4:], seed=1)
    lam = {"default": 1.0, "rules": [{"layers": "0-", "ramp": [0.0, 1.0]}]}
    told = (
        "the ramp of `lam` goes over layers 2, 3 of `model.layers` alone, which the adapters change: no model in the "
        "recipe shows how many there are"
    )
    for output in ({"kind": "adapter", "path": "out"}, {"kind": "skill", "path": "out"}):
        alone = recipe_of(tmp_path, "lam * v", {"v": {"adapter": "rl"}}, output=output, coefficients={"lam": lam})
        assert told in [it.message for it in skillmerge.plan(alone).warnings]
        both = recipe_of(tmp_path, "lam * (rl - base)", ONTO, output=output, coefficients={"lam": lam})
        assert not skillmerge.plan(both).warnings
    write_adapter(tmp_path / "rl", modules(4), seed=1)
    assert not skillmerge.plan(alone).warnings


@pytest.mark.parametrize(
    ("merge", "models"),
    [("lam * rl", {"rl": {"adapter": "./rl"}}), ("base + lam * (rl - base)", ONTO)],
)
def test_recipe_of_an_adapter_is_inspected_as_what_it_adds(family: Path, merge: str, models: dict[str, Any]) -> None:
    output = {"kind": "adapter", "path": "./out"}
    recipe = recipe_of(family, merge, models, output=output, coefficients={"lam": 0.5})
    found = skillmerge.inspect(recipe)
    assert {name.rpartition(".")[2] for name in found.tensors} == {"weight"}
    alone = skillmerge.inspect(family / "rl")
    assert found.total["norm"] == pytest.approx(alone.total["norm"])
    assert [(row.module, row.ranks) for row in found.adapters["rl"]] == [("attention", (2, 2)), ("mlp", (2, 2))]


def test_gates_of_models_are_not_for_adapters(family: Path) -> None:
    output = {"kind": "adapter", "path": "./out"}
    out = skillmerge.apply(recipe_of(family, "0.5 * rl", {"rl": {"adapter": "./rl"}}, output=output)).output
    (family / "gates.yaml").write_text(json.dumps({"gates": {"loads": True}}))
    with pytest.raises(UsageError, match="is an adapter, and gates measure models"):
        skillmerge.gate(out, family / "gates.yaml")


def test_factors_beyond_float32_need_a_smaller_coefficient(family: Path) -> None:
    output = {"kind": "adapter", "path": "./out"}
    process = run_cli("apply", recipe_of(family, "1e39 * rl", {"rl": {"adapter": "./rl"}}, output=output))
    assert process.returncode == 4
    assert process.stderr.endswith("\nhelp: use a smaller coefficient\n")


def test_report_counts_what_rules_select(family: Path) -> None:
    rules = [{"tensors": "model.layers.1.*", "value": 0.3}, {"layers": "2-", "value": 0.5}]
    lam = {"default": 0.7, "rules": rules}
    recipe = recipe_of(family, "lam * v", {"v": {"adapter": "./rl"}}, coefficients={"lam": lam},
                       output={"kind": "adapter", "path": "./out"})  # fmt: skip
    recipe.write_text("\n".join(recipe.read_text().replace('{"layers"', '\n{"layers"').splitlines()))
    page = family / "page.html"
    assert run_cli("apply", recipe, "--report", page).returncode == 0
    assert "← 2 tensors" in page.read_text()
    assert "← 4 tensors" in page.read_text()


def test_commands_say_which_order_and_which_folder_is_meant(family: Path) -> None:
    (family / "all").mkdir()
    shutil.copytree(family / "rl", family / "all" / "rl")
    shutil.copytree(family / "rl", family / "both")
    shutil.copytree(family / "base", family / "both", dirs_exist_ok=True)
    asked = {
        ("inspect", "rl", "base"): (
            "error: rl is an adapter, which changes a model\nhelp: pass the model first: `skillmerge inspect base rl`\n"
        ),
        ("inspect", "all"): "error: all is a folder, but not a skill\nhelp: pass one of its adapters: all/rl\n",
        ("inspect", "both"): (
            "error: both is a folder, but not a skill\n"
            "help: pass two models, before and after, or a recipe, or skills\n"
        ),
        ("extract", "--from", "base", "--minus", "rl", "-o", "skill"): (
            "error: rl is an adapter, and base is none: the difference depends on the model that the adapter is for\n"
            "help: write a recipe with `output: {kind: skill}`, `merge: rl - sft` and "
            "`sft: {adapter: rl, onto: MODEL}`\n"
        ),
    }
    for command, told in asked.items():
        process = run_cli(*command, cwd=family)
        assert (process.returncode, process.stderr) == (2, told)


def test_model_that_an_adapters_skill_was_made_beside_is_no_parent_of_it(family: Path) -> None:
    """None of its weights are in the skill."""
    skillmerge.extract(family / "rl", family / "base", family / "skill")
    process = run_cli("verify", "skill", "--parent", "base", cwd=family)
    assert process.returncode == 3
    assert process.stderr.splitlines()[-1] == f"help: pass one of its parents: rl = {family / 'rl'}"


def test_patch_of_an_adapters_skill_needs_two_models(family: Path) -> None:
    skillmerge.extract(family / "rl", family / "base", family / "skill")
    process = run_cli("export", "skill", "--onto", "base", "-o", "patch", cwd=family)
    assert process.returncode == 4
    assert process.stderr.endswith("; for an adapter, make a model of it first, with a recipe\n")
    merged = recipe_of(family, "rl", ONTO, output={"path": "./whole"})
    skillmerge.apply(merged)
    skillmerge.extract(family / "whole", family / "base", family / "skill", overwrite=True)
    skillmerge.export(family / "skill", family / "patch", onto=family / "base")


def test_copy_of_an_embedding_is_compared_in_the_dtype_of_training(tmp_path: Path) -> None:
    """A model in float32 that was loaded in bfloat16 for training."""
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "rl", [])
    name = f"{PREFIX}model.embed_tokens"
    embedding = read_checkpoint(tmp_path / "base")["model.embed_tokens.weight"].to(torch.bfloat16)
    for copy, fits in ((embedding, True), (embedding + 1, False)):
        tensors = {f"{name}.lora_embedding_A": torch.ones(2, 32), f"{name}.lora_embedding_B": torch.ones(8, 2),
                   f"{name}.base_layer.weight": copy}  # fmt: skip
        save_file(tensors, tmp_path / "rl" / "adapter_model.safetensors")
        process = run_cli("apply", recipe_of(tmp_path, "rl", ONTO), "--overwrite")
        assert (process.returncode == 0) == fits, process.stderr
    assert "is a copy of the base's `model.embed_tokens.weight`, and not that of" in process.stderr


def test_commands_take_adapters_from_the_hub(hub: HubServer, family: Path) -> None:
    (family / "all").mkdir()
    shutil.copytree(family / "rl", family / "all" / "rl")
    for name in ("base", "all"):
        hub.create_from(f"acme/{name}", family / name)
    place = "hf://acme/all/rl"
    made = skillmerge.extract(place, "hf://acme/base", family / "skill").manifest
    commits = {name: hub.repos[f"acme/{name}"].refs["main"] for name in ("base", "all")}
    assert [(item.name, item.revision) for item in made.inputs] == [("rl", commits["all"]), ("sft", commits["base"])]
    assert skillmerge.verify(family / "skill", parent=place).parent == "rl"
    alone = skillmerge.inspect(place)
    assert alone.total == skillmerge.inspect(family / "rl").total
    assert skillmerge.inspect("hf://acme/base", place).total["norm"] == pytest.approx(alone.total["norm"])
    with pytest.raises(UsageError, match="is an adapter, which changes a model"):
        skillmerge.inspect(place, "hf://acme/base")
