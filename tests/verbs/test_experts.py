"""Coefficients for some experts: in rules, for experts one by one and packed, in models, skills, tasks and methods."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import layouts
import numpy as np
import pytest
import torch
from conftest import MODELS, hub_recipe, numpy_of, read_checkpoint, run_cli, weights, write_checkpoint, write_recipe
from hub_server import HubServer
from torch import Tensor

import skillmerge
from skillmerge.checkpoints.views.spooled import Spooled
from skillmerge.engine.measures.cells import cells, rows_of
from skillmerge.errors import RecipeError
from skillmerge.outputs import manifest
from skillmerge.tensors import BLOCK, CHUNK

COUNT = 5
SIZES = [(COUNT, 12, 8), (COUNT, 190, 130)]
"""Few elements, and matrices that end within blocks of 65,536."""
RULES = {"lam": {"default": 0.7, "rules": [{"experts": "0-1", "value": 0.0}, {"experts": "3", "value": 0.3}]}}
LAMBDAS = (0.0, 0.0, 0.7, 0.3, 0.7)


def family(
    folder: Path,
    make: Callable[..., dict[str, Tensor]],
    size: tuple[int, int, int] = SIZES[0],
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    for seed, model in enumerate(MODELS):
        base, moved = layouts.experts(*size), layouts.experts(*size, 50 + seed, torch.float32)
        made = {name: (it.float() + 0.05 * moved[name]).to(dtype) for name, it in base.items()}
        write_checkpoint(folder / model, make(made), shards=2, config={"model_type": "odd"})
    return write_recipe(folder, coefficients=RULES)


def expected(folder: Path, size: tuple[int, int, int]) -> dict[str, Any]:
    """Every expert's matrices by numpy, one by one: t - lam * (sft - rl) in float32, rounded once; t itself for 0."""
    target, rl, sft = (numpy_of(folder / model) for model in MODELS)
    found = {}
    for name, it in target.items():
        number = name.partition(".experts.")[2].partition(".")[0]
        lam = np.float32(LAMBDAS[int(number)] if number else 0.7)
        value = it.astype(np.float32) - lam * (sft[name].astype(np.float32) - rl[name].astype(np.float32))
        found[name] = it if lam == 0 else value.astype(it.dtype)
    return found


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("layout", ["packed", "transposed", "mixtral"])
def test_each_expert_has_its_lambda_in_every_layout(tmp_path: Path, layout: str, size: tuple[int, int, int]) -> None:
    split = family(tmp_path / "split", layouts.split, size)
    skillmerge.apply(split)
    one_by_one = numpy_of(tmp_path / "split" / "merged")
    for name, wanted in expected(tmp_path / "split", size).items():
        assert np.array_equal(one_by_one[name].view(np.uint16), wanted.view(np.uint16)), name
    other = family(tmp_path / layout, getattr(layouts, layout), size)
    for threads in (1, 3):
        skillmerge.apply(other, overwrite=True, threads=threads)
        merged = read_checkpoint(tmp_path / layout / "merged")
        made = as_parts(read_checkpoint(tmp_path / "split" / "merged"))
        wanted_tensors = getattr(layouts, layout)(made)
        assert merged.keys() == wanted_tensors.keys()
        for name, tensor in merged.items():
            assert torch.equal(tensor.view(torch.int16), wanted_tensors[name].contiguous().view(torch.int16)), name


def as_parts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    at = f"{layouts.AT}.experts"
    stacked = {
        part: torch.stack([tensors[f"{at}.{expert}.{name}.weight"] for expert in range(COUNT)])
        for part, name in layouts.NAMES.items()
    }
    return {**stacked, "router": tensors[f"{layouts.AT}.gate.weight"]}


def statistics_of(folder: Path) -> dict[str, Any]:
    document = json.loads((folder / "skillmerge.manifest.json").read_text())
    return dict(document["statistics"]["modules"]["expert"])


def test_rounding_is_measured_alike_in_both_layouts(tmp_path: Path) -> None:
    """Blocks are not those of whole tensors where experts differ; every element is counted once."""
    found = []
    for layout in ("split", "packed"):
        recipe = family(tmp_path / layout, getattr(layouts, layout), SIZES[1])
        skillmerge.apply(recipe, stats="full", threads=2)
        found.append(statistics_of(tmp_path / layout / "merged"))
    for key in ("changed", "vanished", "realised", "norm_ratio", "asked_lambda", "realised_lambda"):
        assert found[0][key] == pytest.approx(found[1][key], rel=1e-9), key


def test_inspect_forecasts_the_lambdas_of_experts_alike_in_both_layouts(tmp_path: Path) -> None:
    forecasts = []
    for layout in ("split", "packed"):
        found = skillmerge.inspect(family(tmp_path / layout, getattr(layouts, layout), SIZES[1]), stats="full")
        assert found.forecast is not None
        forecasts.append(found.forecast["as_planned"].modules["expert"])
    split, packed = forecasts
    assert packed.asked_lambda == pytest.approx(split.asked_lambda, rel=1e-9)
    assert packed.realised_lambda == pytest.approx(split.realised_lambda, rel=1e-9)


@pytest.mark.parametrize("by", [None, "block"])
def test_a_gate_for_lambda_sees_packed_experts_too(tmp_path: Path, edit: Callable[..., Path], by: str | None) -> None:
    rules = {"lam": {"default": 0.7, "rules": [{"experts": "1-", "value": 0.2}]}}
    gates = tmp_path / "gates.yaml"
    gates.write_text(json.dumps({"gates": {"realised_lambda": {"min": 0.6, "modules": "expert", "by": by}}}))
    found = []
    for layout in ("split", "packed"):
        recipe = family(tmp_path / layout, getattr(layouts, layout), SIZES[1])
        made = skillmerge.apply(edit(recipe, coefficients=rules), stats="full")
        outcomes = skillmerge.gate(made.output, gates).outcomes
        found += [it.measured for it in outcomes if "lambda" in it.gate and not it.passed]
    assert found[0] == pytest.approx(found[1], rel=1e-9)
    assert 0.2 < found[0] < 0.4


def test_experts_that_stay_leave_a_packed_tensor_its_lambda(tmp_path: Path, edit: Callable[..., Path]) -> None:
    """As it is where they are stored one by one."""
    found = []
    for layout in ("split", "packed"):
        recipe = family(tmp_path / layout, getattr(layouts, layout), SIZES[1])
        rules = [{"experts": "0-1", "value": 0.0}, {"layers": "0", "experts": "2-", "value": 0.5}]
        edit(recipe, coefficients={"lam": {"default": 0.5, "rules": rules}}, gates={"realised_lambda": {"min": 0.4}})
        skillmerge.apply(recipe, stats="full")
        found.append(statistics_of(tmp_path / layout / "merged"))
    for key in ("asked_lambda", "realised_lambda"):
        assert found[0][key] == pytest.approx(found[1][key], rel=1e-9), key


def test_layers_of_a_report_show_shares_of_what_was_requested_in_both_layouts(tmp_path: Path) -> None:
    """A manifest has lambda of packed experts alone: beside it, the shares of all others would pass for lambdas."""
    for layout in ("split", "packed"):
        made = skillmerge.apply(family(tmp_path / layout, getattr(layouts, layout), SIZES[1]), stats="full")
        found = {cell.kind: cell.group.shown[0] for cell in cells(rows_of(manifest.read(made.output).tensors))}
        assert found == {"router": "1", "expert": "1"}, layout


def test_the_plan_and_the_manifest_have_the_slices(tmp_path: Path) -> None:
    recipe = family(tmp_path, layouts.packed)
    made = skillmerge.apply(recipe)
    document = json.loads((made.output / "skillmerge.manifest.json").read_text())
    rows = {row["name"]: row for row in document["tensors"]}
    for name in ("gate_up_proj", "down_proj"):
        row = rows[f"{layouts.AT}.experts.{name}"]
        assert (row["action"], row["coefficients"]) == ("merge", [])
        assert row["statistics"]["total"] * COUNT == 3 * np.prod(row["shape"])  # of the experts that are computed
        assert row["slices"] == [
            {"experts": [0, 1], "action": "copy", "coefficients": [0.0]},
            {"experts": [2, 2], "action": "merge", "coefficients": [0.7]},
            {"experts": [3, 3], "action": "merge", "coefficients": [0.3]},
            {"experts": [4, 4], "action": "merge", "coefficients": [0.7]},
        ]
    assert "slices" not in rows[f"{layouts.AT}.gate.weight"]
    assert skillmerge.verify(made.output).tensors == len(rows)
    assert skillmerge.rebuild(made.output, check=True).tensors == len(rows)


def test_rules_that_give_all_experts_the_same_change_nothing(tmp_path: Path, edit: Callable[..., Path]) -> None:
    recipe = family(tmp_path, layouts.packed)
    alike = edit(recipe, coefficients={"lam": {"default": 0.2, "rules": [{"experts": "0-", "value": 0.7}]}})
    alike = edit(alike, coefficients={"lam": {"default": 0.7, "rules": [{"experts": "0-", "value": 0.7}]}})
    with_rule = weights(skillmerge.apply(alike, tmp_path / "rule").output)
    assert with_rule == weights(skillmerge.apply(edit(recipe, coefficients={"lam": 0.7}), tmp_path / "plain").output)
    assert weights(skillmerge.apply(recipe, tmp_path / "set", coefficients={"lam": 0.7}).output) == with_rule


@pytest.mark.parametrize("merge", ["target + lam * (rl - sft)", "target + ties(rl - sft, sft - target, density=lam)"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_same_bytes_for_threads_tasks_and_a_resumed_run(
    tmp_path: Path, edit: Callable[..., Path], merge: str, rounding: str
) -> None:
    rules = {"lam": {"default": 0.7, "rules": [{"experts": "1-2", "value": 0.4}, {"experts": "4", "value": 1.0}]}}
    recipe = edit(family(tmp_path, layouts.packed, SIZES[1]), merge=merge, coefficients=rules)
    edit(recipe, output={"path": "merged", "rounding": rounding})
    wanted = weights(skillmerge.apply(recipe, threads=1).output)
    assert weights(skillmerge.apply(recipe, tmp_path / "three", threads=3).output) == wanted
    skillmerge.plan(recipe, save=tmp_path / "plan.json")
    for index in range(2):
        skillmerge.shard(tmp_path / "plan.json", tmp_path / "tasks", index=index, of=2)
    assert weights(skillmerge.finish(tmp_path / "plan.json", tmp_path / "tasks").output) == wanted


def test_methods_see_each_expert_by_itself(tmp_path: Path) -> None:
    """What a method finds of an expert of a packed tensor is what it finds of that expert's own tensor."""
    merge = "target + trim(rl - sft, density=lam)"
    rules = {"lam": {"default": 0.5, "rules": [{"experts": "0-1", "value": 0.25}, {"experts": "3", "value": 0.75}]}}
    outputs, scalars = [], []
    for layout in ("split", "packed"):
        family(tmp_path / layout, getattr(layouts, layout))
        made = skillmerge.apply(write_recipe(tmp_path / layout, merge, coefficients=rules))
        outputs.append(read_checkpoint(made.output))
        document = json.loads((made.output / "skillmerge.manifest.json").read_text())
        rows = {row["name"]: row.get("scalars", {}) for row in document["tensors"] if "down_proj" in row["name"]}
        scalars.append([value for _, row in sorted(rows.items()) for value in row["trim 1 threshold"]])
    assert scalars[0] == scalars[1]
    for expert in range(COUNT):
        one = outputs[0][f"{layouts.AT}.experts.{expert}.down_proj.weight"]
        assert torch.equal(one, outputs[1][f"{layouts.AT}.experts.down_proj"][expert]), expert


def test_what_slices_read_again_is_kept_until_their_tensor_is_merged(
    tmp_path: Path, hub: HubServer, edit: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = {"lam": {"default": 0.5, "rules": [{"experts": "0-1", "value": 0.0}, {"experts": "3", "value": 1.0}]}}
    merge = "target + lam * trim(rl - sft, density=.5)"
    local = edit(family(tmp_path, layouts.packed, SIZES[1]), merge=merge, coefficients=rules)
    for model in MODELS:
        hub.create_from(f"acme/{model}", tmp_path / model)
    remote = edit(hub_recipe(tmp_path / "hub"), merge=merge, coefficients=rules)
    kept: Counter[str] = Counter()
    forget = Spooled.forget

    def counted(checkpoint: Spooled, tensor: str) -> None:
        kept[tensor] += tensor in checkpoint._kept
        forget(checkpoint, tensor)
        assert tensor not in checkpoint._kept

    monkeypatch.setattr(Spooled, "forget", counted)
    merged = skillmerge.apply(remote, tmp_path / "far", hub="stream", threads=2).output
    assert weights(merged) == weights(skillmerge.apply(local, tmp_path / "near").output)
    assert kept == dict.fromkeys(layouts.packed(layouts.experts(*SIZES[1])), len(MODELS))


def test_a_skill_can_be_of_some_experts(tmp_path: Path, edit: Callable[..., Path]) -> None:
    whole = family(tmp_path, layouts.packed, SIZES[1])
    rules = {"lam": {"default": 0.0, "rules": [{"experts": "1-2", "value": 1.0}]}}
    edit(whole, merge="lam * (rl - sft)", coefficients=rules, output={"kind": "skill", "path": "skill"})
    skillmerge.apply(whole)
    skillmerge.plan(whole, save=tmp_path / "plan.json")
    skillmerge.shard(tmp_path / "plan.json", tmp_path / "tasks", index=0, of=1)
    assert weights(skillmerge.finish(tmp_path / "plan.json", tmp_path / "tasks").output) == weights(tmp_path / "skill")
    assert skillmerge.rebuild(tmp_path / "skill", check=True)
    models = {"target": "target", "v": {"skill": "skill"}}
    skillmerge.apply(write_recipe(tmp_path, "target + v", models=models, coefficients=None))
    merged, target, rl, sft = (read_checkpoint(tmp_path / it) for it in ("merged", *MODELS))
    for name in (f"{layouts.AT}.experts.gate_up_proj", f"{layouts.AT}.experts.down_proj"):
        for expert in range(COUNT):
            wanted = target[name][expert]
            if expert in (1, 2):
                wanted = (wanted.float() - (sft[name][expert].float() - rl[name][expert].float())).bfloat16()
            assert torch.equal(merged[name][expert], wanted), (name, expert)
    assert torch.equal(merged[f"{layouts.AT}.gate.weight"], target[f"{layouts.AT}.gate.weight"])


def test_the_plan_shows_the_coefficient_over_the_experts(tmp_path: Path) -> None:
    for layout in ("split", "packed"):
        shown = run_cli("plan", family(tmp_path / layout, getattr(layouts, layout)))
        assert shown.returncode == 0, shown.stderr
        assert "lam over experts: 0 ▁▁█▄█ 4  (0 to 0.7)" in shown.stdout


MISTAKES = {
    "past the last": ({"experts": "4-5", "value": 0}, "expert 5 is past the last expert, which is 4"),
    "no experts": ({"experts": "0", "modules": "norm", "value": 0}, "this rule matches no tensor"),
    "all": ({"experts": "all", "value": 0}, "`all` does not name experts"),
    "backwards": ({"experts": "3-1", "value": 0}, "`3-1` runs backwards"),
    "the first": ({"experts": "-3", "value": 0}, "`-3` could be the first experts or the last"),
}


@pytest.mark.parametrize("what", MISTAKES)
@pytest.mark.parametrize("layout", ["split", "packed"])
def test_mistakes_are_told(tmp_path: Path, edit: Callable[..., Path], what: str, layout: str) -> None:
    rule, message = MISTAKES[what]
    recipe = family(tmp_path, getattr(layouts, layout))
    with pytest.raises(RecipeError) as raised:
        skillmerge.plan(edit(recipe, coefficients={"lam": {"rules": [rule]}}))
    assert message in str(raised.value)


def test_a_tensor_with_the_name_of_a_slice_stops_the_plan(tmp_path: Path) -> None:
    """Else the last expert would be nobody's."""
    recipe, name = family(tmp_path, layouts.packed), f"{layouts.AT}.experts.down_proj[1]"
    for model in MODELS:
        tensors = {**read_checkpoint(tmp_path / model), name: torch.zeros(2, 2)}
        shutil.rmtree(tmp_path / model)
        write_checkpoint(tmp_path / model, tensors, config={"model_type": "odd"})
    done = run_cli("apply", recipe)
    assert (done.returncode, f"tensor `{name}` is called" in done.stderr) == (4, True)


def shares_by_numpy(folder: Path, expert: int) -> tuple[float, float]:
    """Changed share and relative norm of rl - sft of one expert."""
    rl, sft = (numpy_of(folder / model) for model in ("rl", "sft"))
    names = [name for name in rl if f".experts.{expert}." in name]
    update = [rl[name].astype(np.float64) - sft[name].astype(np.float64) for name in names]
    changed = sum(int((it != 0).sum()) for it in update) / sum(it.size for it in update)
    norm = sum(float((it**2).sum()) for it in update) ** 0.5
    return changed, norm / sum(float((sft[name].astype(np.float64) ** 2).sum()) for name in names) ** 0.5


def test_inspect_measures_each_expert_in_both_layouts(tmp_path: Path) -> None:
    found = {}
    for layout in ("split", "packed"):
        family(tmp_path / layout, getattr(layouts, layout), SIZES[1])
        found[layout] = skillmerge.inspect(str(tmp_path / layout / "sft"), str(tmp_path / layout / "rl"))
    assert list(found["packed"].experts) == list(found["split"].experts)
    for expert in range(COUNT):
        changed, norm_ratio = shares_by_numpy(tmp_path / "split", expert)
        for place in ("model.layers 0", "layers"):
            for each in found.values():
                row = each.experts[f"{place} {expert}"]
                assert row["changed"] == pytest.approx(changed, rel=1e-12)
                assert row["norm_ratio"] == pytest.approx(norm_ratio, rel=1e-12)
    assert found["packed"].as_dict()["experts"] == found["packed"].experts


def test_dense_models_have_no_experts(tmp_path: Path) -> None:
    for seed, model in enumerate(MODELS):
        write_checkpoint(tmp_path / model, layouts.dense(layouts.experts(3, 5, 8, seed), True))
    found = skillmerge.inspect(str(tmp_path / "sft"), str(tmp_path / "rl"))
    assert found.experts == {}
    assert "experts" not in found.as_dict()


def test_inspect_draws_figures_over_experts(tmp_path: Path) -> None:
    family(tmp_path, layouts.packed)
    page = tmp_path / "page.html"
    shown = run_cli("inspect", tmp_path / "sft", tmp_path / "rl", "--details", "--report", page)
    assert shown.returncode == 0, shown.stderr
    assert "relative norm over experts 0 to 4, all layers:" in shown.stdout
    assert "in expert" in shown.stdout
    text = page.read_text()
    assert "relative norm by expert" in text
    assert "<th scope=col>4" in text


def test_the_report_of_a_plan_has_a_map_over_experts(tmp_path: Path, edit: Callable[..., Path]) -> None:
    recipe, page = family(tmp_path, layouts.packed), tmp_path / "page.html"
    assert run_cli("plan", recipe, "--report", page).returncode == 0
    assert "lam by expert, as requested" in page.read_text()
    assert run_cli("plan", edit(recipe, coefficients={"lam": 0.7}), "--report", page).returncode == 0
    assert "by expert" not in page.read_text()


def test_an_update_of_several_models_is_weighed_by_expert(tmp_path: Path, edit: Callable[..., Path]) -> None:
    """Coefficients inside of the update count, each expert's its own: here sft - target, with rl - sft or without."""
    rules = {"w": {"default": 1.0, "rules": [{"experts": "0", "value": 0.0}]}}
    found = []
    for layout in ("split", "packed"):
        recipe = family(tmp_path / layout, getattr(layouts, layout))
        merge = "target + w * (rl - sft) + (sft - target)"
        found.append(skillmerge.inspect(edit(recipe, merge=merge, coefficients=rules)))
    target, rl, sft = (numpy_of(tmp_path / "split" / model) for model in MODELS)
    for expert in range(COUNT):
        names = [name for name in target if f".experts.{expert}." in name]
        after = rl if expert else sft
        squares = [float(((after[it].astype(np.float64) - target[it].astype(np.float64)) ** 2).sum()) for it in names]
        for each in found:
            assert each.experts[f"layers {expert}"]["norm"] == pytest.approx(sum(squares) ** 0.5, rel=1e-12)


def test_statistics_do_not_depend_on_chunks_and_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile of some experts may begin inside a block, and a chunk of it too."""
    recipe = family(tmp_path, layouts.packed, (COUNT, 300, 200), torch.float32)
    found = []
    for chunk, tile in ((CHUNK, 1 << 21), (BLOCK, 1 << 21), (2 * BLOCK, BLOCK), (3 * BLOCK, 3 * BLOCK)):
        monkeypatch.setattr("skillmerge.engine.worker.CHUNK", chunk)
        monkeypatch.setattr("skillmerge.plans.budget.TILE_BYTES", 2 * tile)
        made = skillmerge.apply(recipe, overwrite=True, stats="full", threads=2)
        document = json.loads((made.output / "skillmerge.manifest.json").read_text())
        found.append(
            (document["statistics"], [row.get("statistics") for row in document["tensors"]], weights(made.output))
        )
    assert all(each == found[0] for each in found)


def test_what_methods_find_does_not_depend_on_chunks_and_tiles(
    tmp_path: Path, edit: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums are of blocks of each expert's matrix, wherever in the tensor that begins."""
    rules = {"lam": {"default": 0.5, "rules": [{"experts": "0-1", "value": 0.25}, {"experts": "3", "value": 0.75}]}}
    merge = "target + trim(rl - sft, density=lam, rescale=l2)"
    recipe = family(tmp_path, layouts.packed, (COUNT, 300, 200), torch.float32)
    recipe = edit(recipe, merge=merge, coefficients=rules)
    found = []
    for chunk, tile in ((CHUNK, 1 << 21), (BLOCK, 1 << 21), (2 * BLOCK, BLOCK)):
        monkeypatch.setattr("skillmerge.engine.worker.CHUNK", chunk)
        monkeypatch.setattr("skillmerge.plans.budget.TILE_BYTES", 2 * tile)
        made = skillmerge.apply(recipe, overwrite=True, threads=2)
        found.append(([row.scalars for row in made.manifest.tensors], weights(made.output)))
    assert all(each == found[0] for each in found)
