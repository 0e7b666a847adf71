"""Models read under other names: by `rename`, and without what training libraries leave in names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import put_family, read_checkpoint, run_cli, weights, write_checkpoint, write_family, write_recipe
from hub_server import HubServer

import skillmerge
from skillmerge.checkpoints.views.renamed import WRAPPERS, replaced, wrappers_of
from skillmerge.errors import InputError, RecipeError, StalePlan

Edit = Callable[..., Path]
OLD, NEW = "model.language_model.", "model."
RENAME = [{"from": OLD, "to": NEW}]


def rename(folder: Path, change: Callable[[str], str]) -> None:
    tensors = {change(name): tensor for name, tensor in read_checkpoint(folder).items()}
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    write_checkpoint(folder, tensors, config=json.loads((folder / "config.json").read_text()))


def nested(name: str) -> str:
    return name.replace(NEW, OLD, 1) if name.startswith(NEW) else name


def models(**entries: Any) -> dict[str, Any]:
    return {"target": "target", "rl": {"path": "rl", "rename": RENAME}, "sft": "sft", **entries}


@pytest.fixture
def odd(tmp_path: Path, edit: Edit) -> Path:
    """A family whose `rl` has other names, which its recipe renames; what comes of it without is in `wanted`."""
    recipe = write_family(tmp_path, config={"model_type": "odd"})
    skillmerge.apply(recipe, tmp_path / "wanted")
    rename(tmp_path / "rl", nested)
    return edit(recipe, models=models())


def test_every_command_reads_through_the_rename(odd: Path, edit: Edit) -> None:
    folder, same = odd.parent, weights(odd.parent / "wanted")
    before = skillmerge.plan(odd, save=folder / "plan.json")
    assert before.problems == ()
    assert weights(skillmerge.apply(odd).output) == same
    assert weights(skillmerge.apply(folder / "plan.json", folder / "saved").output) == same
    assert skillmerge.verify(folder / "merged").tensors == len(before.tensors)
    assert skillmerge.rebuild(folder / "merged", check=True).tensors == len(before.tensors)
    assert weights(skillmerge.rebuild(folder / "merged", folder / "again").output or folder) == same
    assert len(skillmerge.inspect(odd).tensors) == len(before.tensors)
    gates = edit(odd, gates={"norm_ratio": {"max": 10}, "changed": {"min": 0.001}})
    assert all(outcome.passed for outcome in skillmerge.apply(gates, folder / "gated").gates)
    assert skillmerge.gate(folder / "gated").ok
    with_hashes = skillmerge.apply(odd, folder / "hashed", hash_inputs=True)
    assert all(file.sha256 for item in with_hashes.manifest.inputs for file in item.files)


def test_plan_and_manifest_say_it_where_it_is_so(odd: Path) -> None:
    skillmerge.apply(odd)
    manifest = json.loads((odd.parent / "merged" / "skillmerge.manifest.json").read_text())
    for document in (skillmerge.plan(odd).as_dict(), manifest):
        inputs = {item["name"]: item for item in document["inputs"]}
        assert inputs["rl"]["rename"] == RENAME
        assert not {"rename", "unwrapped"} & (inputs["target"].keys() | inputs["sft"].keys())
        assert "unwrapped" not in inputs["rl"]


def test_another_rename_is_another_plan(odd: Path, edit: Edit) -> None:
    """Two tensors of one shape change places: the names are the same, the bytes are not."""
    before = skillmerge.plan(odd, save=odd.parent / "plan.json")
    layer = f"{OLD}layers.{{}}."
    swap = [{"from": layer.format(old), "to": f"{NEW}layers.{new}."} for old, new in ((0, 1), (1, 0))]
    text = odd.read_text()
    edit(odd, models=models(rl={"path": "rl", "rename": [*swap, *RENAME]}))
    after = skillmerge.plan(odd, diff=odd.parent / "plan.json")
    assert after.weights_digest != before.weights_digest
    assert "model rl: its tensors are now read under other names" in (after.changes or ())
    rl, output = (
        read_checkpoint(odd.parent / "rl"),
        read_checkpoint(Path(skillmerge.apply(edit(odd, merge="rl")).output)),
    )
    assert torch.equal(output["model.layers.0.mlp.up_proj.weight"], rl[f"{OLD}layers.1.mlp.up_proj.weight"])
    saved = odd.parent / "plan.json"
    document = json.loads(saved.read_text())
    for item in document["inputs"]:
        item.pop("rename", None)
    saved.write_text(json.dumps(document, indent=1))
    odd.write_text(text)
    with pytest.raises(StalePlan, match="now read under other names"):
        skillmerge.apply(saved, odd.parent / "other")


def test_output_of_a_renamed_donor_has_the_new_names(tmp_path: Path, edit: Edit) -> None:
    recipe = write_family(tmp_path, config={"model_type": "odd"})
    rename(tmp_path / "target", nested)
    edit(recipe, models=models(rl="rl", target={"path": "target", "rename": RENAME}))
    output = Path(skillmerge.apply(recipe).output)
    assert read_checkpoint(output).keys() == read_checkpoint(tmp_path / "sft").keys()
    assert (output / "config.json").read_bytes() == (tmp_path / "target" / "config.json").read_bytes()
    note = "the output has the names that `target` is renamed to, but config.json is unchanged: check that they fit"
    assert any(note in each for each in skillmerge.plan(recipe).notes)


def test_skills_and_patches_can_be_renamed(tmp_path: Path, edit: Edit) -> None:
    recipe = write_family(tmp_path)
    wanted = weights(skillmerge.apply(recipe, tmp_path / "wanted").output)
    for model in ("rl", "sft"):
        rename(tmp_path / model, nested)
    skillmerge.extract(str(tmp_path / "rl"), str(tmp_path / "sft"), tmp_path / "skill")
    skillmerge.export_patch(tmp_path / "skill", tmp_path / "patch", onto=str(tmp_path / "sft"))
    skill = {"target": "target", "skill": {"skill": "skill", "rename": RENAME}}
    write_recipe(tmp_path, "target + lam * skill", models=skill)
    assert weights(skillmerge.apply(recipe).output) == wanted
    assert skillmerge.rebuild(tmp_path / "merged", check=True)
    patched = models(sft={"path": "sft", "rename": RENAME}, rl={"patch": "patch", "onto": "sft", "rename": RENAME})
    write_recipe(tmp_path, models=patched)
    assert weights(skillmerge.apply(recipe, tmp_path / "patched").output) == wanted


def test_models_on_the_hub_and_locks_can_be_renamed(hub: HubServer, tmp_path: Path, edit: Edit) -> None:
    recipe = put_family(hub, tmp_path)
    wanted = weights(skillmerge.apply(recipe, tmp_path / "wanted").output)
    rename(tmp_path / "rl", nested)
    hub.create_from("acme/odd", tmp_path / "rl")
    edit(recipe, models=models(rl={"path": "hf://acme/odd", "rename": RENAME}))
    skillmerge.plan(recipe, lock=True)
    assert weights(skillmerge.apply(recipe, locked=True).output) == wanted


def test_sweep_reads_through_the_rename(odd: Path) -> None:
    scorer = "python -c 'print(1.0)'"
    swept = skillmerge.sweep(odd, ["lam=0.5,1"], scorer)
    assert len(swept.scored) == 2


def refused(recipe: Path) -> tuple[str, str | None]:
    with pytest.raises(RecipeError) as error:
        skillmerge.plan(recipe)
    return error.value.what, error.value.fix


def test_rename_that_renames_nothing_is_told_with_what_is_near(odd: Path, edit: Edit) -> None:
    def trial(*rules: tuple[str, str]) -> tuple[str, str | None]:
        listed = [{"from": old, "to": new} for old, new in rules]
        return refused(edit(odd, models=models(rl={"path": "rl", "rename": listed})))

    assert trial(("model.langauge_model.", NEW)) == (
        "no tensor of model `rl` begins with `model.langauge_model.`",
        "did you mean `model.language_model.`?",
    )
    assert trial(("xyz", NEW)) == (
        "no tensor of model `rl` begins with `xyz`",
        "its names begin with `lm_head.`, `model.`, `model.language_model.`, `model.language_model.embed_tokens.` … "
        "and 2 more",
    )
    assert trial((OLD, NEW), ("model.language_model.layers.", "odd.")) == (
        "no tensor of model `rl` is left that begins with `model.language_model.layers.`: an earlier rule renames them",
        "put this rule first; the first rule that matches wins",
    )


def test_mistake_in_a_rename_is_shown_where_it_is(odd: Path, edit: Edit) -> None:
    edit(odd, models=models(rl={"path": "rl", "rename": [{"from": "xyz", "to": ""}]}))
    line = next(number for number, text in enumerate(odd.read_text().splitlines(), 1) if '"xyz"' in text)
    assert f"recipe.yaml:{line}:" in run_cli("plan", odd).stderr
    edit(odd, models=models(rl={"path": "rl", "rename": [{"frm": "xyz", "to": ""}]}))
    assert "did you mean `from`?" in run_cli("lint", odd).stdout
    edit(odd, models=models(rl={"path": "rl", "rename": []}))
    assert run_cli("lint", odd).returncode == 2


def test_two_tensors_under_one_name_are_refused(odd: Path, edit: Edit) -> None:
    folder = odd.parent
    tensors = read_checkpoint(folder / "rl")
    write_checkpoint(folder / "rl", {**tensors, "model.norm.weight": torch.zeros(16, dtype=torch.bfloat16)})
    with pytest.raises(InputError) as error:
        skillmerge.plan(odd)
    one, other = (f"`{name}norm.weight`" for name in (NEW, OLD))
    assert error.value.message.splitlines()[0].partition(":6:12: ")[2] in {
        f"model `rl` ({folder / 'rl'}): {first} and {second} would both be read as `model.norm.weight`"
        for first, second in ((one, other), (other, one))
    }
    assert error.value.fix == "change the `rename` of model `rl`"
    edit(odd, models=models(rl={"path": "rl", "rename": [{"from": "model.norm.weight", "to": ""}]}))
    with pytest.raises(InputError, match="would be read as '', which is no name for a tensor"):
        skillmerge.plan(odd)


@pytest.mark.parametrize(
    "change",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: name.replace("model.", "model._orig_mod."),
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: f"module._forward_module.{name}",
        lambda name: "_fsdp_wrapped_module." + name.replace(".mlp.", "._fsdp_wrapped_module.mlp."),
        lambda name: name.replace(".mlp.", ".mlp._checkpoint_wrapped_module."),
    ],
)
def test_what_training_left_in_names_is_left_out(tmp_path: Path, change: Callable[[str], str]) -> None:
    recipe = write_family(tmp_path)
    wanted = weights(skillmerge.apply(recipe, tmp_path / "wanted").output)
    rename(tmp_path / "rl", change)
    (note,) = [each for each in skillmerge.plan(recipe).notes if "is read without" in each]
    parts = change("model.layers.0.mlp.up_proj.weight").split(".")
    left = [part for part in WRAPPERS if part in parts]
    told = " and ".join(f"`{part}.` ({WRAPPERS[part]})" for part in left)
    assert note == f"model `rl` is read without {told} in the names of its tensors"
    result = skillmerge.apply(recipe)
    assert weights(result.output) == wanted
    assert {item.name: item.unwrapped for item in result.manifest.inputs} == {"target": None, "rl": left, "sft": None}
    assert skillmerge.rebuild(result.output, check=True)


def test_output_of_wrapped_models_has_names_that_runtimes_know(tmp_path: Path) -> None:
    recipe = write_family(tmp_path)
    wanted = read_checkpoint(tmp_path / "sft").keys()
    for model in ("target", "rl", "sft"):
        rename(tmp_path / model, lambda name: f"_orig_mod.{name}")
    assert read_checkpoint(Path(skillmerge.apply(recipe).output)).keys() == wanted


def test_the_same_weights_inside_and_outside_of_a_wrapper_are_refused(tmp_path: Path) -> None:
    recipe = write_family(tmp_path)
    norm = torch.zeros(16, dtype=torch.bfloat16)
    write_checkpoint(tmp_path / "rl", {**read_checkpoint(tmp_path / "rl"), "_orig_mod.model.norm.weight": norm})
    for file in (tmp_path / "rl").glob("model-*"):
        file.unlink()
    (tmp_path / "rl" / "model.safetensors.index.json").unlink()
    with pytest.raises(InputError, match=r"would both be read as `model\.norm\.weight`") as error:
        skillmerge.plan(recipe)
    assert error.value.fix == "it holds the same weights twice: save it again from the model inside its wrappers"


def test_a_part_that_computes_something_stays(tmp_path: Path) -> None:
    names = ["model.layers.0.module.weight", "model.layers.0.q.base_layer.weight", "module.norm.weight"]
    assert wrappers_of(names) == ()
    assert wrappers_of(["module.norm.weight", "module.head.weight"]) == ("module",)
    assert wrappers_of(["x._orig_mod"]) == ()
    assert replaced("a.b", [("a.", ""), ("a", "z")]) == "b"


def test_what_was_planned_with_the_names_as_they_are_stays_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved plans and manifests of versions that took names as they are stored."""
    recipe = write_family(tmp_path)
    for model in ("target", "rl", "sft"):
        rename(tmp_path / model, lambda name: f"_orig_mod.{name}")
    with monkeypatch.context() as patch:
        patch.setattr("skillmerge.plans.opening.wrappers_of", lambda names: ())
        skillmerge.plan(recipe, save=tmp_path / "plan.json")
        made = weights(skillmerge.apply(recipe).output)
    assert skillmerge.rebuild(tmp_path / "merged", check=True)
    assert weights(skillmerge.rebuild(tmp_path / "merged", tmp_path / "again").output or tmp_path) == made
    shutil.rmtree(tmp_path / "merged")
    assert weights(skillmerge.apply(tmp_path / "plan.json").output) == made
    assert all(name.startswith("_orig_mod.") for name in read_checkpoint(tmp_path / "merged"))


def test_parents_of_a_skill_are_known_by_either_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_family(tmp_path)
    for model in ("rl", "sft"):
        rename(tmp_path / model, lambda name: f"_orig_mod.{name}")
    skillmerge.extract(str(tmp_path / "rl"), str(tmp_path / "sft"), tmp_path / "skill")
    with monkeypatch.context() as patch:
        patch.setattr("skillmerge.plans.opening.wrappers_of", lambda names: ())
        skillmerge.extract(str(tmp_path / "rl"), str(tmp_path / "sft"), tmp_path / "old")
    for skill in ("skill", "old"):
        assert skillmerge.verify(tmp_path / skill, parent=str(tmp_path / "rl")).parent == "rl"


def test_what_was_planned_with_another_donor_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions whose donor depended on the numbers took `sft` for this one."""
    write_family(tmp_path)
    for model in ("target", "sft"):
        (tmp_path / model / "tokenizer.json").write_text(f'"{model}"')
    recipe = write_recipe(tmp_path, "target + rl - sft", coefficients=None)
    with monkeypatch.context() as patch:
        patch.setattr("skillmerge.recipes.recipe.donor_of", lambda expression, skills: "sft")
        skillmerge.plan(recipe, save=tmp_path / "plan.json")
        skillmerge.apply(recipe)
    assert skillmerge.rebuild(tmp_path / "merged", check=True)
    skillmerge.rebuild(tmp_path / "merged", tmp_path / "again")
    skillmerge.apply(tmp_path / "plan.json", tmp_path / "saved")
    for name in ("merged", "again", "saved"):
        assert (tmp_path / name / "tokenizer.json").read_text() == '"sft"'
    assert "the donor was sft, and is target now" in (
        skillmerge.plan(recipe, diff=tmp_path / "plan.json").changes or ()
    )
