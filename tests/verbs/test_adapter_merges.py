"""Adapters in merges, skills, inspections, sweeps and tasks: the same bytes however they are read and made."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from adapter_models import TARGETS, adapter, expected, expected_difference, wide
from adapter_models import write_adapter as write_any
from bucket_server import S3Server
from clusters import alone, run_tasks, save
from conftest import (
    read_checkpoint,
    run_cli,
    tensor_shapes,
    weights,
    write_checkpoint,
    write_family,
    write_recipe,
)
from hub_server import HubServer
from observing import MergeServer, assert_finished, content, reference
from safetensors.torch import save_file
from skill_reader import read_skill

import skillmerge
from skillmerge.errors import CheckFailed, RecipeError, StalePlan, UsageError
from skillmerge.verbs.demo.miniature import FAMILY, questions

pytestmark = [pytest.mark.xdist_group("transformers"), pytest.mark.filterwarnings("ignore")]


def write_adapter(folder: Path, seed: int = 0, rank: int = 4, **config: Any) -> Path:
    return write_any(folder, tensor_shapes(), seed, rank, **config)


def added(folder: Path) -> dict[str, np.ndarray]:
    """What the adapter in a folder adds to the family, as float32."""
    (folder / "base").exists() or write_checkpoint(
        folder / "base", {name: torch.zeros(shape) for name, shape in tensor_shapes().items()}
    )
    return expected_difference(folder)


ALONE = {"v": {"adapter": "adapter"}}
ONTO = {"rl": {"adapter": "adapter", "onto": "sft"}}
FORMULAS: dict[str, dict[str, Any]] = {
    "difference": {"models": {"target": "target", **ALONE}, "merge": "target + lam * v"},
    "model": {"models": {"target": "target", "sft": "sft", **ONTO}},
    "baked": {"models": {"sft": "sft", **ONTO}, "merge": "rl", "coefficients": None},
    "skill": {"models": {"sft": "sft", **ALONE}, "merge": "v", "coefficients": None,
              "output": {"path": "merged", "kind": "skill", "like": "sft"}},
    "skill of two": {"models": {"sft": "sft", **ONTO}, "merge": "rl - sft", "coefficients": None,
                     "output": {"path": "merged", "kind": "skill"}},
    "alone": {"models": ALONE, "merge": "v", "coefficients": None, "output": {"path": "merged", "kind": "skill"}},
    "method": {"models": {"target": "target", "sft": "sft", **ONTO, **ALONE},
               "merge": "target + lam * ties(rl - sft, v, density=0.5)"},
}  # fmt: skip


@pytest.fixture
def family(tmp_path: Path) -> Path:
    write_family(tmp_path, shards=3)
    write_adapter(tmp_path / "adapter")
    return tmp_path


def test_difference_is_added_like_that_of_two_models(family: Path) -> None:
    """Rounded once: the formula's own arithmetic on what numpy gives."""
    out = skillmerge.apply(write_recipe(family, **FORMULAS["difference"])).output
    (family / "numpy").mkdir()
    shutil.copytree(family / "adapter", family / "numpy" / "adapter")
    updates, target = added(family / "numpy"), read_checkpoint(family / "target")
    for name, value in read_checkpoint(out).items():
        whole = target[name].float() + np.float32(0.7) * torch.from_numpy(updates[name])
        assert torch.equal(value, whole.to(torch.bfloat16)), name


def test_model_with_an_adapter_on_it_is_written_as_its_base_is(family: Path) -> None:
    out = skillmerge.apply(write_recipe(family, **FORMULAS["baked"])).output
    shutil.copytree(family / "sft", family / "base")
    assert [path.name for path in sorted(out.glob("model*"))] == [
        path.name for path in sorted((family / "sft").glob("model*"))
    ]
    for name, value in expected(family).items():
        assert torch.equal(read_checkpoint(out)[name], torch.from_numpy(value).to(torch.bfloat16)), name


def test_output_in_float32_keeps_all_of_it(family: Path) -> None:
    out = skillmerge.apply(
        write_recipe(family, **FORMULAS["baked"], output={"path": "merged", "dtype": "float32"})
    ).output
    shutil.copytree(family / "sft", family / "base")
    for name, value in expected(family).items():
        assert read_checkpoint(out)[name].numpy().tobytes() == value.tobytes()


def test_adapters_are_put_onto_each_other(family: Path) -> None:
    """RL that continued on the merged SFT: `rl` is the base with both."""
    write_adapter(family / "second", seed=5, rank=2)
    models = {"base": "sft", "sft": {"adapter": "adapter", "onto": "base"}, "rl": {"adapter": "second", "onto": "sft"}}
    out = skillmerge.apply(
        write_recipe(family, "rl", models=models, coefficients=None, output={"path": "both", "dtype": "float32"})
    ).output
    shutil.copytree(family / "sft", family / "base")
    step = {name: torch.from_numpy(value) for name, value in expected(family).items()}
    (family / "next").mkdir()
    write_checkpoint(family / "next" / "base", step)
    shutil.copytree(family / "second", family / "next" / "adapter")
    for name, value in expected(family / "next").items():
        assert read_checkpoint(out)[name].numpy().tobytes() == value.tobytes()


@pytest.mark.parametrize("name", FORMULAS)
def test_bytes_are_the_same_for_threads_and_tiles(family: Path, name: str) -> None:
    recipe = write_recipe(family, **FORMULAS[name])
    wanted = weights(skillmerge.apply(recipe, family / "one", threads=1).output)
    assert weights(skillmerge.apply(recipe, family / "eight", threads=8).output) == wanted
    if not skillmerge.plan(recipe).recipe.makes_skill:
        few = skillmerge.apply(recipe, family / "few", memory_limit=560_000_000, threads=1)
        assert weights(few.output) == wanted


@pytest.mark.parametrize("name", FORMULAS)
def test_tasks_make_what_apply_makes(family: Path, name: str) -> None:
    plan = save(write_recipe(family, **FORMULAS[name]))
    wanted = alone(plan)
    run_tasks(plan, family / "merged", tasks=2)
    skillmerge.finish(plan)
    assert content(family / "merged") == wanted


@pytest.mark.parametrize("name", ["difference", "model", "skill"])
def test_outputs_are_verified_and_rebuilt(family: Path, name: str) -> None:
    out = skillmerge.apply(write_recipe(family, **FORMULAS[name]), hash_inputs=True).output
    skillmerge.verify(out)
    process = run_cli("rebuild", out, "--check")
    assert process.returncode == 0, process.stderr
    adapter_file = family / "adapter" / "adapter_config.json"
    adapter_file.write_text(adapter_file.read_text().replace('"lora_alpha": 6', '"lora_alpha": 7'))
    assert run_cli("rebuild", out, "--check").returncode != 0


def test_saved_plan_of_another_adapter_is_stale(family: Path) -> None:
    plan = save(write_recipe(family, **FORMULAS["difference"]))
    shutil.rmtree(family / "adapter")
    write_adapter(family / "adapter", lora_alpha=7)
    process = run_cli("apply", plan)
    assert process.returncode == 7
    assert "model v" in process.stderr


@pytest.mark.parametrize("name", ["difference", "model", "skill of two"])
def test_kill_and_resume_give_the_same_bytes(server: MergeServer, family: Path, name: str) -> None:
    recipe = write_recipe(family, **FORMULAS[name])
    wanted, output = reference(server, recipe), family / "merged"
    for step in (2, 9, 16):
        server.run(recipe, kill_at=step)
        assert server.run(recipe)["status"] == 0
        assert_finished(output, wanted)
        shutil.rmtree(output)


@pytest.mark.parametrize("own", [{}, {"name": "math"}])
def test_adapter_on_the_hub_has_the_bytes_of_the_folder(hub: HubServer, family: Path, own: dict[str, str]) -> None:
    local = skillmerge.apply(write_recipe(family, **FORMULAS["model"])).output
    if own:
        write_adapter(family / "other", seed=8)
        (family / "adapter").rename(family / "other" / "math")
        (family / "other").rename(family / "adapter")
    for name in ("target", "sft", "adapter"):
        hub.create_from(f"acme/{name}", family / name)
    models = {
        "target": "hf://acme/target",
        "sft": "hf://acme/sft",
        "rl": {"adapter": "hf://acme/adapter", "onto": "sft", **own},
    }
    (family / "remote").mkdir()
    recipe = write_recipe(family / "remote", models=models)
    made = skillmerge.apply(recipe)
    assert weights(made.output) == weights(local)
    assert [item.revision for item in made.manifest.inputs if item.name == "rl"] == [
        hub.repos["acme/adapter"].refs["main"]
    ]
    lock = run_cli("plan", recipe, "--lock")
    assert lock.returncode == 0, lock.stderr
    assert run_cli("apply", recipe, "--locked", "--overwrite", "-o", family / "again").returncode == 0


@pytest.mark.skipif(sys.version_info < (3, 11), reason="obstore needs Python 3.11")
def test_adapter_in_a_bucket_has_the_bytes_of_the_folder(s3: S3Server, family: Path) -> None:
    local = skillmerge.apply(write_recipe(family, **FORMULAS["difference"])).output
    (family / "named").mkdir()
    shutil.copytree(family / "adapter", family / "named" / "math")
    models = {"target": s3.put_folder("family/target", family / "target"),
              "v": {"adapter": s3.put_folder("family/named", family / "named"), "name": "math"}}  # fmt: skip
    (family / "remote").mkdir()
    made = skillmerge.apply(write_recipe(family / "remote", **{**FORMULAS["difference"], "models": models}))
    assert weights(made.output) == weights(local)


def test_skill_of_an_adapter_holds_it_exactly(family: Path) -> None:
    skill = skillmerge.extract(family / "adapter", family / "sft", family / "skill").output
    (family / "numpy").mkdir()
    shutil.copytree(family / "adapter", family / "numpy" / "adapter")
    updates = added(family / "numpy")
    planes = read_skill(skill)
    for name, value in updates.items():
        plus, minus = planes[name]
        assert plus.numpy().tobytes() == value.tobytes()
        assert not minus.any()
    models = {"target": "target", "v": {"skill": "skill"}}
    stored = skillmerge.apply(write_recipe(family, "target + lam * v", models=models), family / "stored").output
    assert weights(stored) == weights(skillmerge.apply(write_recipe(family, **FORMULAS["difference"])).output)


def test_parent_of_a_skill_is_its_adapter(family: Path) -> None:
    write_adapter(family / "other", seed=3)
    skill = skillmerge.extract(family / "adapter", family / "sft", family / "skill").output
    assert skillmerge.verify(skill, parent=family / "adapter").parent == "rl"
    for other in ("other", "sft"):
        with pytest.raises(CheckFailed, match="is not a parent of"):
            skillmerge.verify(skill, parent=family / other)


def test_parent_of_a_skill_without_a_head_may_change_the_tied_one_too(tmp_path: Path) -> None:
    folder = adapter("embedding_and_head_tied")
    skill = skillmerge.extract(folder / "adapter", folder / "base", tmp_path / "skill").output
    assert skillmerge.verify(skill, parent=folder / "adapter").parent == "rl"


def test_skill_of_an_adapter_that_replaces_is_that_of_the_model(tmp_path: Path) -> None:
    folder = adapter("modules_to_save")
    skill = skillmerge.extract(folder / "adapter", folder / "base", tmp_path / "skill").output
    whole, base = expected(folder), read_checkpoint(folder / "base")
    for name, (plus, minus) in read_skill(skill).items():
        update = wide(plus) - wide(minus)
        wanted = whole[name].astype(np.float64) - wide(base[name])
        assert np.array_equal(update.reshape(wanted.shape), wanted), name


def test_adapter_that_replaces_is_no_update_alone(tmp_path: Path) -> None:
    folder = adapter("dora")
    with pytest.raises(UsageError, match="alone it is no update") as caught:
        skillmerge.inspect(folder / "adapter")
    assert caught.value.fix == f"pass its model first: `skillmerge inspect MODEL {folder / 'adapter'}`"
    skill = skillmerge.extract(folder / "adapter", folder / "base", tmp_path / "skill").output
    with pytest.raises(UsageError, match="are not known without it"):
        skillmerge.verify(skill, parent=folder / "adapter")
    assert skillmerge.verify(skill, parent=folder / "base").parent == "sft"


def test_difference_of_two_adapters_is_a_skill(family: Path) -> None:
    write_adapter(family / "other", seed=3)
    skill = skillmerge.extract(family / "adapter", family / "other", family / "skill").output
    assert set(read_skill(skill)) == {f"{module}.weight" for module in TARGETS}


def test_inspect_shows_ranks_scales_and_shares(family: Path) -> None:
    found = skillmerge.inspect(family / "adapter")
    assert found.title == f"adapter {family / 'adapter'}"
    rows = {row.module: row for row in found.adapters[str(family / "adapter")]}
    assert {name: (row.matrices, row.ranks, row.scales) for name, row in rows.items()} == {
        "attention": (1, (4, 4), (1.5, 1.5)), "mlp": (2, (4, 4), (1.5, 1.5)), "head": (1, (4, 4), (1.5, 1.5)),
    }  # fmt: skip
    process = run_cli("inspect", write_recipe(family, **FORMULAS["model"]))
    assert "Adapter rl" in process.stdout
    beside = skillmerge.inspect(family / "sft", family / "adapter")
    assert beside.as_dict()["adapters"][str(family / "adapter")][1]["share"] == pytest.approx(2 / 3)
    assert "adapters" not in skillmerge.inspect(family / "sft", family / "rl").as_dict()


def test_sweep_scores_adapters(family: Path) -> None:
    recipe = write_recipe(family, **FORMULAS["difference"])
    score = f"{sys.executable} -c \"import sys, json; print(json.dumps({{'s': 1.0}}))\" {{}}"
    found = skillmerge.sweep(recipe, axes=["lam=0.5,1"], score=score, output=family / "sweep")
    assert len(found.scored) == 2


def test_adapters_of_other_bases_are_told(family: Path) -> None:
    shutil.rmtree(family / "adapter")
    write_adapter(family / "adapter", base_model_name_or_path="acme/base")
    write_adapter(family / "other", seed=3, base_model_name_or_path="/somewhere/sft")
    recipe = write_recipe(
        family, "target + lam * (rl - v)",
        models={"target": "target", "v": {"adapter": "adapter"}, "rl": {"adapter": "other"}},
    )  # fmt: skip
    process = run_cli("plan", recipe)
    assert process.returncode == 0
    assert (
        "warning: adapter `v` says that it was trained on `acme/base`, and `rl` on `/somewhere/sft` help: if RL "
        "continued the SFT adapter, its skill is the difference of the two; if it started from the merged SFT model, "
        "its skill is its adapter alone"
    ) in " ".join(process.stdout.split())
    assert "accept: [adapter-base]" in process.stdout
    document = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump({**document, "accept": ["adapter-base"]}))
    assert skillmerge.plan(recipe, strict=True).warnings == ()


def test_adapter_of_a_model_with_fewer_layers_is_told(family: Path) -> None:
    """Layer 2 of a deeper model may be another one, and an adapter has no configuration to compare."""
    deeper = {"deep": {"stack": [{"from": "target", "layers": "0-1"}, {"from": "target", "layers": "0-2"}]}}
    models = {"target": "target", "v": {"adapter": "adapter"}, **deeper}
    recipe = write_recipe(family, "deep + lam * v", models=models)
    (told,) = skillmerge.plan(recipe).warnings
    assert "adapter `v` changes the first 3 of 5 layers of `deep`" in told.message
    assert (
        skillmerge.plan(write_recipe(family, "deep + lam * v", models=models, accept=["architecture"])).warnings == ()
    )
    stacked = {"on": {"adapter": "adapter", "onto": "target"},
               "deep_on": {"stack": [{**part, "from": "on"} for part in deeper["deep"]["stack"]]}}  # fmt: skip
    chosen = shutil.copytree(family / "adapter", family / "chosen")
    document = json.loads((chosen / "adapter_config.json").read_text())
    (chosen / "adapter_config.json").write_text(json.dumps({**document, "layers_to_transform": [0, 1, 2]}))
    meant = write_recipe(family, "deep + lam * v", models={**models, "v": {"adapter": "chosen"}})
    assert skillmerge.plan(meant).warnings == ()
    advised = write_recipe(family, "deep + lam * (deep_on - deep)", models={"target": "target", **deeper, **stacked})
    assert skillmerge.plan(advised).warnings == ()
    assert skillmerge.plan(write_recipe(family, **FORMULAS["difference"])).warnings == ()


def test_rename_is_about_what_an_adapter_changes(family: Path) -> None:
    for name in ("target", "sft"):
        tensors = {name.replace("model.", "model.text.", 1): it for name, it in read_checkpoint(family / name).items()}
        write_checkpoint(family / f"inner-{name}", tensors)
    plain = skillmerge.apply(write_recipe(family, **FORMULAS["difference"]), family / "plain").output
    entry = {"adapter": "adapter", "rename": [{"from": "model.", "to": "model.text."}]}
    recipe = write_recipe(family, "target + lam * v", models={"target": "inner-target", "v": entry})
    renamed = read_checkpoint(skillmerge.apply(recipe).output)
    for name, value in read_checkpoint(plain).items():
        assert torch.equal(value, renamed[name.replace("model.", "model.text.", 1)])


def test_rename_that_renames_nothing_of_an_adapter_is_told(family: Path) -> None:
    entry = {"adapter": "adapter", "rename": [{"from": "base_model.model.model.", "to": "model."}]}
    with pytest.raises(RecipeError) as caught:
        skillmerge.plan(write_recipe(family, "target + lam * v", models={"target": "target", "v": entry}))
    assert caught.value.what == "no tensor of model `v` begins with `base_model.model.model.`"
    assert caught.value.fix == "its names begin with `lm_head.`, `model.`, `model.layers.`"


def test_rename_may_be_about_a_parameter_alone(tmp_path: Path) -> None:
    at = "model.layers.0.mlp.experts"
    pair = {"lora_A.weight": torch.randn(8, 6), "lora_B.weight": torch.randn(10, 8)}
    (tmp_path / "v").mkdir()
    save_file(
        {f"base_model.model.{at}.{part}": it for part, it in pair.items()}, tmp_path / "v" / "adapter_model.safetensors"
    )
    words = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_parameters": ["mlp.experts.gate_up_proj"]}
    (tmp_path / "v" / "adapter_config.json").write_text(json.dumps(words))
    write_checkpoint(tmp_path / "target", {f"{at}.w13": torch.zeros(4, 10, 6)})
    entry = {"adapter": "v", "rename": [{"from": f"{at}.gate_up_proj", "to": f"{at}.w13"}]}
    recipe = write_recipe(tmp_path, "target + lam * v", models={"target": "target", "v": entry})
    assert read_checkpoint(skillmerge.apply(recipe, tmp_path / "out").output)[f"{at}.w13"].any()


RECIPES = {
    "nowhere": ({"models": {"a": "a", "v": {"onto": "a"}}, "merge": "a + v"},
        "`v` has none of `path`, `skill`, `patch`, `adapter`, `stack`"),
    "no tensors": ({"models": {"a": "a", **ALONE}, "merge": "a + v", "copy": [{"tensors": "*", "from": "v"}]},
        "`v` is an adapter, which has no tensors to take"),
    "onto an adapter alone": ({"models": {"a": "a", **ALONE, "w": {"adapter": "x", "onto": "v"}}, "merge": "a + w - w"},
        "`v` is an adapter, which has no tensors to take"),
    "a circle": ({"models": {"a": {"adapter": "x", "onto": "b"}, "b": {"adapter": "x", "onto": "a"}}, "merge": "a"},
        "`a` onto `b` onto `a`: a circle"),
    "onto itself": ({"models": {"a": {"adapter": "x", "onto": "a"}}, "merge": "a"}, "`a` onto `a`: a circle"),
    "a name of no adapter": ({"models": {"a": {"path": "x", "name": "y"}}, "merge": "a"},
        "only an adapter has a `name`"),
    "onto nothing": ({"models": {"a": {"adapter": "x", "onto": "b"}}, "merge": "a"},
        "`b` is not a model of this recipe"),
    "both": ({"models": {"a": {"adapter": "x", "patch": "b", "onto": "c"}}, "merge": "a"},
        "`a` has more than one of `path`, `skill`, `patch`, `adapter`, `stack`"),
    "a patch alone": ({"models": {"a": {"patch": "b"}}, "merge": "a"}, "`patch` and `onto` go together"),
    "onto alone": ({"models": {"a": {"path": "b", "onto": "a"}}, "merge": "a"}, "`patch` and `onto` go together"),
}  # fmt: skip


@pytest.mark.parametrize("case", RECIPES)
def test_entry_of_an_adapter_is_checked(tmp_path: Path, case: str) -> None:
    keys, message = RECIPES[case]
    with pytest.raises(RecipeError) as caught:
        skillmerge.plan(write_recipe(tmp_path, coefficients=None, **keys))
    assert caught.value.what == message


def test_adapter_that_changes_while_it_is_read_is_noticed(family: Path) -> None:
    from skillmerge.plans.opening import Access, planned

    with planned(write_recipe(family, **FORMULAS["difference"]), None, Access(), print) as (_, checkpoints):
        checkpoints["v"].check_unchanged()
        (family / "adapter" / "adapter_config.json").write_text("{}")
        with pytest.raises(StalePlan, match="changed while it was in use"):
            checkpoints["v"].check_unchanged()


def train_by_reward(folder: Path) -> None:
    """RL by LoRA in the miniature: from its SFT model, answers are sampled and the right ones reinforced."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(FAMILY / "source-sft", dtype=torch.float32)
    words = AutoTokenizer.from_pretrained(FAMILY / "source-sft")
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
    model = get_peft_model(base, config)
    optimizer = torch.optim.Adam([it for it in model.parameters() if it.requires_grad], lr=3e-3)
    asked = questions()[:64]
    inputs = words([" ".join(question.words) for question in asked], return_tensors="pt")["input_ids"]
    for _ in range(8):
        with torch.inference_mode():
            found = model.generate(input_ids=inputs, max_new_tokens=5, do_sample=True, top_k=0)
        right = [
            question.wanted in words.decode(row[inputs.shape[1] :]) for question, row in zip(asked, found, strict=True)
        ]
        reward = torch.tensor(right).float()
        logits = model(input_ids=found[:, :-1].clone()).logits.log_softmax(-1)
        chosen = logits.gather(-1, found[:, 1:, None].clone())[..., 0][:, inputs.shape[1] - 1 :]
        loss = -((reward - reward.mean() + 0.01)[:, None] * chosen).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder / "rl-adapter")
    model.merge_and_unload().save_pretrained(folder / "rl")


def test_past_in_the_miniature_by_adapter_is_that_by_checkpoints(tmp_path: Path) -> None:
    """`target + v_rl` by adapter, against `target + (rl - sft)` from whole float32 checkpoints: one unit of the
    output's bfloat16."""
    train_by_reward(tmp_path)
    for name, at in {"target": "target-sft", "sft": "source-sft"}.items():
        shutil.copytree(FAMILY / at, tmp_path / name)
    by_adapter = {"target": "target", "v_rl": {"adapter": "rl-adapter"}}
    for name, merge, models in (
        ("adapter", "target + v_rl", by_adapter),
        ("whole", "target + (rl - sft)", {"target": "target", "rl": "rl", "sft": "sft"}),
        (
            "onto",
            "target + (rl - sft)",
            {"target": "target", "sft": "sft", "rl": {"adapter": "rl-adapter", "onto": "sft"}},
        ),
    ):
        (tmp_path / name).mkdir()
        models = {key: str(tmp_path / it) if isinstance(it, str) else {**it, "adapter": str(tmp_path / it["adapter"])}
                  for key, it in models.items()}  # fmt: skip
        recipe = write_recipe(tmp_path / name, merge, models=models, coefficients=None, accept=["update-size"])
        process = run_cli("apply", recipe)
        assert process.returncode == 0, process.stderr
    ours, theirs = (read_checkpoint(tmp_path / name / "merged") for name in ("adapter", "whole"))
    changed = 0
    for name, value in theirs.items():
        one = value.view(torch.int16).int() - ours[name].view(torch.int16).int()
        assert ((one.abs() <= 1) | (value == ours[name])).all(), name
        changed += not torch.equal(ours[name], read_checkpoint(tmp_path / "target")[name])
        near = read_checkpoint(tmp_path / "onto" / "merged")[name].view(torch.int16).int()
        assert ((near - ours[name].view(torch.int16).int()).abs() <= 1).all(), name
    assert changed >= 8
