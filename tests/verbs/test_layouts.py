"""Whole merges of models that store their experts and projections in different tensors."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import layouts
import pytest
import torch
from conftest import MODELS, run_cli, weights, write_checkpoint, write_recipe
from hub_server import HubServer
from torch import Tensor

import skillmerge
from skillmerge.checkpoints.safetensors import build_header

COUNT, INNER, HIDDEN = 4, 24, 16


def write_layout(folder: Path, make: Callable[..., dict[str, Tensor]], seed: int, shards: int = 2) -> None:
    """Two layers of experts and what is the same in every layout. The update of `rl` is small."""
    tensors = {"model.embed_tokens.weight": torch.full((8, HIDDEN), 0.5, dtype=torch.bfloat16)}
    for layer in range(2):
        base = layouts.experts(COUNT, INNER, HIDDEN, 10 + layer)
        moved = layouts.experts(COUNT, INNER, HIDDEN, 100 + 10 * seed + layer)
        made = {name: (tensor.float() + 0.01 * moved[name].float()).bfloat16() for name, tensor in base.items()}
        tensors |= {name.replace("layers.0.", f"layers.{layer}."): it for name, it in make(made).items()}
    write_checkpoint(folder, tensors, shards=shards, config={"model_type": "odd"})


def family(folder: Path, **makers: Callable[..., dict[str, Tensor]]) -> Path:
    for seed, model in enumerate(MODELS):
        write_layout(folder / model, makers[model], seed)
    return write_recipe(folder)


MIXED = {"target": layouts.packed, "rl": layouts.split, "sft": layouts.transposed}


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A family of three layouts; what comes of the same weights in one is in `wanted`."""
    alike = family(tmp_path / "alike", **dict.fromkeys(MODELS, layouts.packed))
    skillmerge.apply(alike, tmp_path / "wanted")
    return family(tmp_path, **MIXED)


def test_every_command_reads_the_donors_layout(mixed: Path, edit: Callable[..., Path]) -> None:
    folder, same = mixed.parent, weights(mixed.parent / "wanted")
    before = skillmerge.plan(mixed, save=folder / "plan.json")
    assert before.problems == ()
    for threads in (1, 3):
        assert weights(skillmerge.apply(mixed, overwrite=True, threads=threads).output) == same
    assert weights(skillmerge.apply(folder / "plan.json", folder / "saved").output) == same
    assert skillmerge.verify(folder / "merged").tensors == len(before.tensors)
    assert skillmerge.rebuild(folder / "merged", check=True).tensors == len(before.tensors)
    assert len(skillmerge.inspect(mixed).tensors) == len(before.tensors)
    manifest = json.loads((folder / "merged" / "skillmerge.manifest.json").read_text())
    assert [item.get("layout") for item in manifest["inputs"]] == [None, ["experts packed"], ["experts transposed"]]
    assert [row["name"] for row in manifest["tensors"]] == list(before.tensors)


def test_the_plan_says_it_in_a_line_and_proposes_nothing(mixed: Path) -> None:
    shown = run_cli("plan", mixed)
    assert (shown.returncode, "copy" in shown.stdout + shown.stderr) == (0, False)
    lines = [line for line in shown.stdout.splitlines() if "layout" in line]
    assert lines == [
        "note: model `rl` is read in the layout of `target`: experts packed",
        "note: model `sft` is read in the layout of `target`: experts transposed",
    ]


def test_tasks_make_their_shares_of_it(mixed: Path) -> None:
    folder = mixed.parent
    skillmerge.plan(mixed, save=folder / "plan.json")
    for index in range(2):
        skillmerge.shard(folder / "plan.json", folder / "merged", index=index, of=2)
    done = skillmerge.finish(folder / "plan.json", folder / "merged")
    assert weights(done.output) == weights(folder / "wanted")


def test_tasks_know_the_donors_layout_from_tensors_that_a_skill_does_without(
    tmp_path: Path,
) -> None:
    """Where 2I = H gate and up are square, and `down_proj` alone tells that they are transposed in `sft`."""
    for seed, (model, make) in enumerate({"rl": layouts.packed, "sft": layouts.transposed}.items()):
        write_checkpoint(tmp_path / model, make(layouts.experts(3, 4, 8, seed)), config={"model_type": "odd"})
    keys = {"ignore": ["*.down_proj"], "output": {"kind": "skill", "path": "skill"}}
    recipe = write_recipe(tmp_path, "rl - sft", models={"rl": "rl", "sft": "sft"}, coefficients=None, **keys)
    skillmerge.apply(recipe)
    skillmerge.plan(recipe, save=tmp_path / "plan.json")
    skillmerge.shard(tmp_path / "plan.json", tmp_path / "tasks", index=0, of=1)
    done = skillmerge.finish(tmp_path / "plan.json", tmp_path / "tasks")
    assert weights(done.output) == weights(tmp_path / "skill")


def test_a_skill_of_another_layout_is_added_and_its_parents_are_known(mixed: Path) -> None:
    folder = mixed.parent
    skillmerge.extract(folder / "rl", folder / "sft", folder / "skill")  # as rl has it: one by one
    recipe = write_recipe(
        folder, "target + lam * v", models={"target": "target", "v": {"skill": "skill"}}, output={"path": "of_skill"}
    )
    assert weights(skillmerge.apply(recipe).output) == weights(folder / "wanted")
    for parent in ("rl", "sft"):
        assert skillmerge.verify(folder / "skill", parent=str(folder / parent)).parent == parent


def test_a_patch_of_another_layout_is_read_too(mixed: Path) -> None:
    folder = mixed.parent
    write_layout(folder / "rl", layouts.transposed, 1)  # a patch has the layout of what it is for
    skillmerge.extract(folder / "rl", folder / "sft", folder / "skill")
    skillmerge.export(folder / "skill", folder / "patch", onto=str(folder / "sft"))
    models = {"target": "target", "sft": "sft", "rl": {"patch": "patch", "onto": "sft"}}
    recipe = write_recipe(folder, models=models, output={"path": "of_patch"})
    assert weights(skillmerge.apply(recipe).output) == weights(folder / "wanted")


def test_models_on_the_hub_are_streamed(mixed: Path, hub: HubServer) -> None:
    folder = mixed.parent
    for model in MODELS:
        hub.create_from(f"acme/{model}", folder / model)
    recipe = write_recipe(folder, models={model: f"hf://acme/{model}" for model in MODELS}, output={"path": "far"})
    assert weights(skillmerge.apply(recipe).output) == weights(folder / "wanted")


def test_a_method_sees_the_donors_matrices(mixed: Path) -> None:
    """Ranks and norms are those of the matrices that the donor has, however the others store theirs."""
    folder, merge = mixed.parent, "target + ties(rl - sft, sft - target, density=0.5)"
    alike = write_recipe(folder / "alike", merge, coefficients=None, output={"path": "of_method"})
    recipe = write_recipe(folder, merge, coefficients=None, output={"path": "of_method"})
    assert weights(skillmerge.apply(recipe).output) == weights(skillmerge.apply(alike).output)


def test_projections_that_are_fused_in_one_model_are_merged(tmp_path: Path) -> None:
    for name, fused in (("alike", dict.fromkeys(MODELS, True)), ("mixed", {"target": True, "rl": False, "sft": True})):
        for seed, model in enumerate(MODELS):
            tensors = layouts.dense(layouts.experts(3, 5, 8, seed), fused[model])
            write_checkpoint(tmp_path / name / model, tensors, config={"model_type": "odd"})
        skillmerge.apply(write_recipe(tmp_path / name))
    assert weights(tmp_path / "mixed" / "merged") == weights(tmp_path / "alike" / "merged")


def test_a_killed_merge_is_resumed(mixed: Path) -> None:
    """Shards that are done stay as they are; the rest is made from the other layouts again."""
    from skillmerge.engine import shards

    folder = mixed.parent
    write_layout(folder / "target", layouts.packed, 0, shards=4)
    skillmerge.apply(mixed, folder / "once")
    complete, done = shards._Run._complete, []

    def stop_later(self: shards._Run, file: shards._ShardFile) -> None:
        if done:
            raise KeyboardInterrupt
        complete(self, file)
        done.append(file.shard.file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards._Run, "_complete", stop_later)
        with pytest.raises(KeyboardInterrupt):
            skillmerge.apply(mixed, threads=1)
    assert weights(skillmerge.apply(mixed).output) == weights(folder / "once")


def test_the_memory_for_transposed_matrices_is_counted(mixed: Path) -> None:
    """`rl` is packed as it is, and `sft` transposed: two matrices of 2I x H for each thread."""
    alike = skillmerge.plan(mixed.parent / "alike" / "recipe.yaml").needs
    crossed = skillmerge.plan(mixed).needs
    assert alike is not None
    assert crossed is not None
    assert crossed.memory - alike.memory == crossed.threads * 2 * (2 * 2 * INNER * HIDDEN * 2)


def hollow(folder: Path, **shapes: tuple[int, ...]) -> Path:
    """A model whose weights are a hole in the disk, however large its header says that they are."""
    folder.mkdir(parents=True)
    header, specs = build_header(((name.replace("__", "."), "BF16", shape) for name, shape in shapes.items()), "it")
    with open(folder / "model.safetensors", "wb") as stream:
        stream.write(header)
        stream.truncate(max(spec.end for spec in specs))
    (folder / "config.json").write_text("{}")
    return folder


HOSTILE: dict[str, dict[str, tuple[int, ...]]] = {
    "a billion experts": {"gate_up_proj": (10**9, 2, 1), "down_proj": (10**9, 1, 1)},
    "no experts": {"gate_up_proj": (0, 2, 1), "down_proj": (0, 1, 1)},
    "no rows": {"gate_up_proj": (2, 0, 1), "down_proj": (2, 1, 0)},
    "an odd number of rows": {"gate_up_proj": (2, 3, 1), "down_proj": (2, 1, 1)},
    "other axes": {"gate_up_proj": (2, 2, 1, 1), "down_proj": (2,)},
}


@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.parametrize("donor", ["split", "packed"])
def test_hostile_shapes_stop_the_plan(tmp_path: Path, what: str, donor: str) -> None:
    at = "model__layers__0__mlp__experts"
    packed = {f"{at}__{name}": shape for name, shape in HOSTILE[what].items()}
    split = {f"{at}__{it}__{part}_proj__weight": (1, 1) for it in range(2) for part in ("gate", "up", "down")}
    for model in MODELS:
        shapes = packed if (model == "target") == (donor == "packed") else split
        hollow(tmp_path / model, model__norm__weight=(4,), **shapes)
    rules = {"lam": {"default": 0.7, "rules": [{"tensors": "*", "value": 0.5}]}}
    started = time.process_time()
    done = run_cli("apply", write_recipe(tmp_path, coefficients=rules))
    assert done.returncode == 4, done.stderr
    assert time.process_time() - started < 2
    assert not (tmp_path / "merged").exists()
