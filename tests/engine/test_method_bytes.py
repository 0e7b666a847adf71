"""Methods on files: the bytes that they give in memory, whatever the threads, tiles, shards, places and accidents."""

from __future__ import annotations

import json
import math
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import method_oracles as oracles
import numpy as np
import oracle
import pytest
import torch
from clusters import alone, run_tasks, save
from conftest import (
    MODELS,
    hub_recipe,
    put_family,
    random_tensors,
    read_checkpoint,
    weights,
    write_checkpoint,
    write_recipe,
)
from hub_server import HubServer
from in_memory import compute
from observing import MergeServer, content, finished_shards, identities

import skillmerge
from skillmerge.engine.runners import threads as runner
from skillmerge.errors import UnusableWeights, UsageError
from skillmerge.plans.budget import Budget
from skillmerge.plans.opening import Access
from skillmerge.recipes.parse import load
from skillmerge.reporter import Reporter
from skillmerge.tensors import BLOCK
from skillmerge.verbs.sweep.candidates import with_values
from skillmerge.verbs.sweep.in_memory import MergedModel

FORMS = {
    "elementwise": "target + lam * elect(drop(rl - sft, density=.6), drop(target - sft, density=.5), weights=[1, .5])",
    "gram": "slerp(multislerp(target, rl), karcher(target, rl, sft), t=lam)",
    "rank": "target + lam * ties(rl - sft, target - sft, density=.3, rescale=l2) - band(rl - target, density=.4)",
    "rows": "target + drop(rl - sft, density=.5, spread=.2) + model_stock(rl - sft, target - sft, scope=row)",
    "chain": "target + trim(sce(rl - sft, trim(target - sft, density=.8), select=.7), density=lam, rescale=l1)",
    "models": "median(target, slerp(rl, sft, t=.4, scope=row), target + clip(rl - sft, at=.01))",
}
WHOLE = "target + trim(rl - sft, density=.3, scope=model, rescale=l1)"
SHAPES = {
    "model.embed_tokens.weight": (700, 100),
    "model.layers.0.input_layernorm.weight": (7,),
    "model.layers.0.mlp.experts.up_proj": (3, 150, 301),
    "model.layers.0.self_attn.scale": (),
    "model.layers.1.mlp.up_proj.weight": (256, 256),
    "model.layers.1.mlp.down_proj.weight": (530, 301),
    "model.layers.1.self_attn.sinks": (40, 1),
}


def write_models(
    folder: Path, shards: int = 2, dtype: torch.dtype = torch.bfloat16, turn: int = 0, donor: int = 2
) -> None:
    for seed, name in enumerate(MODELS):
        tensors = list(random_tensors(SHAPES, dtype, seed).items())
        order = tensors if name == "target" else tensors[turn:] + tensors[:turn]
        write_checkpoint(folder / name, dict(order), shards=shards if name != "target" else donor)


def recipe_of(folder: Path, merge: str, **keys: Any) -> Path:
    uses = {"lam": 0.6} if "lam" in merge else {}
    return write_recipe(folder, merge, **{"coefficients": uses, "output": {"path": "merged", "seed": 5}, **keys})


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("methods")
    write_models(folder)
    return folder


def assert_bits(found: torch.Tensor, wanted: torch.Tensor, name: str) -> None:
    assert found.dtype == wanted.dtype
    assert torch.equal(found.view(-1).view(torch.uint8), wanted.view(-1).view(torch.uint8)), name


@pytest.mark.parametrize("form", FORMS)
def test_threads_and_tiles_change_no_byte(family: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of weights, of statistics, of what methods found; and the weights are those of a computation in memory."""
    recipe, outputs = recipe_of(family, FORMS[form]), []
    for number, (threads, tile) in enumerate([(1, 1), (2, 3), (8, 1), (2, 64), (8, 64)]):
        chosen = Budget(threads, tile * BLOCK, 0)
        with monkeypatch.context() as patch:
            patch.setattr(runner, "budget", lambda plan, chosen=chosen, **limits: chosen)
            output = skillmerge.apply(recipe, family / f"{form}-{number}", device="cpu", stats="full").output
        outputs.append(content(output))
    assert all(other == outputs[0] for other in outputs)
    models = {model: read_checkpoint(family / model) for model in MODELS}
    lam = {"lam": 0.6} if "lam" in FORMS[form] else {}
    for name, found in read_checkpoint(family / f"{form}-0").items():
        inputs = {model: models[model][name] for model in MODELS}
        options = {"name": name, "seed": 5, "dtype": torch.bfloat16, "tile": 2 * BLOCK}
        assert_bits(found, compute(FORMS[form], inputs, **options, **lam), name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_formats_are_merged_from_files_as_in_memory(tmp_path: Path, dtype: torch.dtype) -> None:
    write_models(tmp_path, dtype=dtype)
    merge = FORMS["chain"].replace("lam", ".6") + " + .5 * drop(rl - target, density=.5)"
    found = read_checkpoint(skillmerge.apply(recipe_of(tmp_path, merge), device="cpu").output)
    models = {model: read_checkpoint(tmp_path / model) for model in MODELS}
    for name, tensor in found.items():
        inputs = {model: models[model][name] for model in MODELS}
        assert_bits(tensor, compute(merge, inputs, name=name, seed=5, dtype=dtype), name)


@pytest.mark.parametrize("form", ["rank", "rows", "chain"])
def test_shard_layouts_change_no_byte_of_a_tensor(family: Path, tmp_path: Path, form: str) -> None:
    wanted = weights(skillmerge.apply(recipe_of(family, FORMS[form]), tmp_path / "wanted").output)
    for shards in (1, 3, 7):
        folder = tmp_path / str(shards)
        write_models(folder, shards, turn=shards)
        assert weights(skillmerge.apply(recipe_of(folder, FORMS[form])).output) == wanted
    split = {"path": "split", "seed": 5, "shard_size": "100KB"}
    again = read_checkpoint(skillmerge.apply(recipe_of(family, FORMS[form], output=split), tmp_path / "split").output)
    for name, tensor in read_checkpoint(tmp_path / "wanted").items():
        assert_bits(again[name], tensor, name)


@pytest.mark.parametrize("form", ["elementwise", "gram", "rank", "rows"])
def test_hub_gives_the_bytes_of_folders(tmp_path: Path, hub: HubServer, form: str) -> None:
    put_family(hub, tmp_path, layers=2, hidden=48)
    wanted = weights(skillmerge.apply(recipe_of(tmp_path, FORMS[form])).output)
    remote = hub_recipe(tmp_path / "hub")
    document = json.loads(remote.read_text()) | {"merge": FORMS[form], "output": {"path": "merged", "seed": 5}}
    document["coefficients"] = {"lam": 0.6} if "lam" in FORMS[form] else {}
    remote.write_text(json.dumps(document))
    for way in ("stream", "download"):
        assert weights(skillmerge.apply(remote, tmp_path / way, hub=way, threads=2).output) == wanted


# -------------------------------------------------------------------------------------------------------- accidents


@pytest.mark.parametrize("form", ["rank", "elementwise", "whole model"])
def test_killed_merge_goes_on_to_the_same_bytes(server: MergeServer, tmp_path: Path, form: str) -> None:
    write_models(tmp_path, shards=3, donor=7)
    merge = FORMS.get(form, WHOLE)
    recipe, output, dice = recipe_of(tmp_path, merge), tmp_path / "merged", random.Random(2)
    undisturbed = server.run(recipe)
    wanted, kept = content(output), 0
    for part in range(1, 5):
        shutil.rmtree(output)
        assert server.run(recipe, kill_at=part * undisturbed["steps"] // 5)["status"] == -signal.SIGKILL
        before = finished_shards(output)
        kept += len(before)
        server.run(recipe, kill_at=dice.randrange(1, 40))
        skillmerge.apply(recipe)
        assert content(output) == wanted
        assert {name: identities(output)[name] for name in before} == before
    assert kept > 0


def test_tasks_refuse_what_has_to_read_the_whole_model(tmp_path: Path) -> None:
    write_models(tmp_path)
    plan = save(recipe_of(tmp_path, WHOLE))
    with pytest.raises(UsageError, match="`trim` with scope=model has to read the whole model") as refused:
        run_tasks(plan, tmp_path / "merged", tasks=2, device="cpu")
    assert refused.value.fix == "write scope=matrix in the recipe, or merge on one machine: `skillmerge apply`"


@pytest.mark.parametrize("form", ["rank", "rows", "elementwise"])
def test_tasks_make_what_apply_makes(tmp_path: Path, form: str) -> None:
    write_models(tmp_path)
    plan = save(recipe_of(tmp_path, FORMS[form]))
    wanted = alone(plan, stats="full")
    run_tasks(plan, tmp_path / "merged", tasks=2, stats="full", device="cpu")
    assert content(skillmerge.finish(plan).output) == wanted
    skillmerge.verify(tmp_path / "merged")


@pytest.mark.parametrize("form", FORMS)
def test_output_is_rebuilt_and_checked(family: Path, tmp_path: Path, form: str) -> None:
    output = skillmerge.apply(recipe_of(family, FORMS[form]), tmp_path / "out").output
    skillmerge.rebuild(output, check=True, threads=3, base_folder=family)
    again = skillmerge.rebuild(output, tmp_path / "again", threads=1, base_folder=family)
    assert weights(again.output) == weights(output)
    skillmerge.rebuild(output, check=True, sample=0.3, seed=2, base_folder=family)


# ----------------------------------------------------------------------------------------------------------- skills


@pytest.mark.parametrize(
    "merge",
    [
        "trim(rl - sft, density=.3)",
        "trim(rl - sft, density=lam, rescale=l2)",
        "lam * ties(rl - sft, target - sft, density=.4)",
        "drop(rl - sft, density=.5, spread=.1)",
        "slerp(rl - sft, target - sft, t=.3)",
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_method_is_stored_as_a_skill(tmp_path: Path, merge: str, dtype: torch.dtype) -> None:
    """The stored skill, added to a model, is what the difference itself would be if it is rounded once."""
    write_models(tmp_path, dtype=dtype)
    output = {"path": "skill", "kind": "skill", "seed": 5}
    recipe = recipe_of(tmp_path, merge, output=output)
    skills = [skillmerge.apply(recipe, tmp_path / f"skill-{threads}", threads=threads).output for threads in (1, 2, 8)]
    assert content(skills[1]) == content(skills[0]) == content(skills[2])
    models = {model: read_checkpoint(tmp_path / model) for model in MODELS}
    models["zero"] = {name: torch.zeros_like(tensor) for name, tensor in models["target"].items()}
    write_checkpoint(tmp_path / "zero", models["zero"])
    added = write_recipe(
        tmp_path,
        "zero + s",
        models={"zero": "zero", "s": {"skill": "skill-1"}},
        coefficients={},
        output={"path": "all"},
    )
    found = read_checkpoint(skillmerge.apply(added).output)
    lam = {"lam": 0.6} if "lam" in merge else {}
    for name, tensor in found.items():
        inputs = {model: models[model][name] for model in MODELS}
        wanted = compute(merge, inputs, name=name, seed=5, dtype=dtype, **lam)
        assert torch.equal(tensor, wanted), name


# ------------------------------------------------------------------------------------------------------- in memory


@pytest.mark.xdist_group("transformers")
@pytest.mark.parametrize("form", ["elementwise", "rank", "gram"])
def test_sweep_in_memory_has_the_weights_that_apply_writes(tmp_path: Path, demo: Path, form: str) -> None:
    transformers = pytest.importorskip("transformers")
    places = {"target": "target-sft", "rl": "source-rl", "sft": "source-sft"}
    models = {key: str(demo / name) for key, name in places.items()}
    recipe = load(write_recipe(tmp_path, FORMS[form], models=models, coefficients={"lam": 0.5}))
    model = MergedModel(recipe, Access(), "cpu", Reporter())
    for lam in (0.3, 0.0, 0.9):
        candidate = with_values(recipe, {"lam": lam})
        statistics = model.use(candidate)
        made = skillmerge.apply(candidate, tmp_path / f"out-{lam}")
        wanted = transformers.AutoModelForCausalLM.from_pretrained(made.output, dtype="auto").state_dict()
        for name, tensor in model.model.state_dict().items():
            assert_bits(tensor, wanted[name], f"{lam} {name}")
        assert statistics.all == made.manifest.statistics.all
    model.close()


# ------------------------------------------------------------------------------------------------------ not finite


@pytest.mark.parametrize("form", [*FORMS.values(), "target + clip(rl - sft, at=.1)", "median(target, rl, sft)"])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_infinities_and_nans_are_refused_by_model_and_element(tmp_path: Path, form: str, value: float) -> None:
    """Also where a method would leave them out."""
    tensors = {name: random_tensors({"w": (400, 300)}, seed=seed) for seed, name in enumerate(MODELS)}
    tensors["rl"]["w"].view(-1)[[30_003, 100_005]] = torch.tensor([value, -value], dtype=torch.bfloat16)
    for name in MODELS:
        write_checkpoint(tmp_path / name, tensors[name])
    with pytest.raises(UnusableWeights, match=r"model `rl` holds .* in tensor `w` at element 30003"):
        skillmerge.apply(recipe_of(tmp_path, form), device="cpu")


def test_infinities_are_refused_in_skills_too(tmp_path: Path) -> None:
    tensors = {name: random_tensors({"w": (400, 300)}, seed=seed) for seed, name in enumerate(MODELS)}
    tensors["sft"]["w"][3, 4] = float("inf")
    for name in MODELS:
        write_checkpoint(tmp_path / name, tensors[name])
    recipe = recipe_of(tmp_path, "clip(rl - sft, at=.1)", output={"path": "merged", "kind": "skill"})
    with pytest.raises(UnusableWeights, match=r"model `sft` holds .* in tensor `w` at element 904"):
        skillmerge.apply(recipe, device="cpu")


@pytest.mark.parametrize("form", FORMS.values())
def test_infinities_that_are_allowed_spoil_their_matrix_at_most(tmp_path: Path, form: str) -> None:
    shape = (2, 300, 400)
    tensors = {name: random_tensors({"w": shape}, seed=seed) for seed, name in enumerate(MODELS)}
    recipe = recipe_of(tmp_path, form)
    for name in MODELS:
        write_checkpoint(tmp_path / name, tensors[name])
    wanted = read_checkpoint(skillmerge.apply(recipe, tmp_path / "finite").output)["w"]
    tensors["rl"]["w"][1, [2, 280], 3] = torch.tensor([float("inf"), float("-inf")], dtype=torch.bfloat16)
    write_checkpoint(tmp_path / "rl", tensors["rl"])
    outputs = [skillmerge.apply(recipe, tmp_path / f"{n}", threads=n, allow_nonfinite=True).output for n in (1, 8)]
    assert weights(outputs[0]) == weights(outputs[1])
    assert_bits(read_checkpoint(outputs[0])["w"][0], wanted[0], "the other matrix")


def test_matrices_that_cancel_are_named_with_the_way_out(family: Path, tmp_path: Path) -> None:
    recipe = recipe_of(family, "target + multislerp(rl - sft, sft - rl, target - sft, weights=[1, 1, 0])")
    with pytest.raises(UnusableWeights) as refused:
        skillmerge.apply(recipe, tmp_path / "out")
    assert refused.value.message.endswith("`: `multislerp` has no direction for matrices that cancel")
    assert refused.value.fix == "use `karcher`, or leave one of them out"


# ------------------------------------------------------------------------------------------------------ whole models


def of_model(merge: str, models: dict[str, dict[str, torch.Tensor]]) -> dict[str, np.ndarray]:
    """What a sparsifier of the whole model leaves of rl - sft, tensor by tensor."""
    v, u = ({name: models[model][name].double().numpy() - models["sft"][name].double().numpy() for name in SHAPES}
            for model in ("rl", "target"))  # fmt: skip
    flat = [np.concatenate([part.ravel() for part in parts.values()]) for parts in (v, u)]
    if merge.startswith("match"):
        result = oracles.match(*flat)
    else:
        rescale = "l2" if "l2" in merge else "none"
        result = oracles.trim(flat[0], density=0.3, rescale=rescale)
    ends = np.cumsum([part.size for part in v.values()])[:-1]
    return {name: part.reshape(v[name].shape) for name, part in zip(v, np.split(result, ends), strict=True)}


@pytest.mark.parametrize(
    "merge",
    [
        "trim(rl - sft, density=.3, scope=model)",
        "trim(rl - sft, density=.3, scope=model, rescale=l2)",
        "match(rl - sft, to=target - sft, scope=model)",
    ],
)
def test_whole_model_is_ranked_and_measured_together(
    family: Path, tmp_path: Path, merge: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, outputs = recipe_of(family, f"target + {merge}"), []
    for threads, tile in ((1, 1), (8, 3), (2, 64)):
        chosen = Budget(threads, tile * BLOCK, 0)
        with monkeypatch.context() as patch:
            patch.setattr(runner, "budget", lambda plan, chosen=chosen, **limits: chosen)
            outputs.append(skillmerge.apply(recipe, tmp_path / f"{threads}", device="cpu").output)
    assert content(outputs[1]) == content(outputs[0]) == content(outputs[2])
    models = {model: read_checkpoint(family / model) for model in MODELS}
    wanted = of_model(merge, models)
    for name, found in read_checkpoint(outputs[0]).items():
        exact = models["target"][name].double().numpy() + wanted[name]
        rounded = oracle.rounded(exact, torch.bfloat16)
        error = np.abs(found.double().numpy() - rounded)
        inexact = oracle.unit(rounded, torch.bfloat16) + 2.0**-21 * np.abs(exact - wanted[name])
        assert np.all(error <= (inexact if "l2" in merge or "match" in merge else 0)), name
    skillmerge.rebuild(outputs[0], check=True, sample=0.4, seed=1, base_folder=family)


@pytest.mark.parametrize(
    "merge", ["trim(rl - sft, density=.3, scope=model)", "match(rl - sft, to=target - sft, scope=model)"]
)
def test_whole_model_without_an_element_has_nothing_to_rank(tmp_path: Path, merge: str) -> None:
    for model in MODELS:
        write_checkpoint(tmp_path / model, {"model.layers.0.mlp.up_proj.weight": torch.zeros(0, 8)})
    output = skillmerge.apply(recipe_of(tmp_path, f"target + {merge}"), device="cpu").output
    assert read_checkpoint(output)["model.layers.0.mlp.up_proj.weight"].shape == (0, 8)


# ----------------------------------------------------------------------------------------------- what calls have found


def test_manifest_has_what_calls_found_of_each_matrix(family: Path, tmp_path: Path) -> None:
    """Thresholds, and the shares that they keep, which are larger than what was asked for where sizes tie."""
    models = {model: read_checkpoint(family / model) for model in MODELS}
    merge = "target + trim(rl - sft, density=.3, rescale=l2) + band(target - sft, density=.4, gamma=.1)"
    made = skillmerge.apply(recipe_of(family, merge), tmp_path / "out", device="cpu")
    more_than_asked = 0
    for row in made.manifest.tensors:
        v, w = (sizes_by_matrix(models[model][row.name], models["sft"][row.name]) for model in ("rl", "target"))
        count = max(1, math.floor(0.3 * v.shape[1]))
        least = np.sort(v, axis=1)[:, -count]
        kept = v >= least[:, None]
        assert row.scalars is not None
        assert row.scalars["trim 1 threshold"] == least.tolist()
        assert row.scalars["trim 1 kept"] == (kept.sum(1) / v.shape[1]).tolist()
        factors = np.sqrt((v.astype(float) ** 2).sum(1) / (np.where(kept, v, 0).astype(float) ** 2).sum(1))
        np.testing.assert_allclose(row.scalars["trim 1 factor"], factors, rtol=1e-12)
        stay, above = max(1, math.floor(0.4 * w.shape[1])), math.floor(0.1 * w.shape[1])
        below = max(0, w.shape[1] - stay - above)
        assert row.scalars["band 2 smallest"] == np.sort(w, axis=1)[:, below].tolist()
        assert row.scalars["band 2 largest"] == np.sort(w, axis=1)[:, below + stay - 1].tolist()
        more_than_asked += int((kept.sum(1) > count).sum())
    assert more_than_asked, "some sizes tie at the threshold"


def test_share_that_is_kept_of_the_whole_model_is_that_of_all_tensors(family: Path, tmp_path: Path) -> None:
    models = {model: read_checkpoint(family / model) for model in MODELS}
    merge = "target + trim(rl - sft, density=.2, scope=model)"
    made = skillmerge.apply(recipe_of(family, merge), tmp_path / "out", device="cpu")
    v = np.concatenate([sizes_by_matrix(models["rl"][name], models["sft"][name]).ravel() for name in SHAPES])
    least = np.sort(v)[-math.floor(0.2 * v.size)]
    wanted = {"trim 1 threshold": [least], "trim 1 kept": [(v >= least).mean()], "trim 1 factor": [1.0]}
    assert all(row.scalars == wanted for row in made.manifest.tensors)


def sizes_by_matrix(one: torch.Tensor, other: torch.Tensor) -> np.ndarray:
    matrix = math.prod(one.shape[-2:])
    return np.abs((one.float() - other.float()).numpy()).reshape(-1, matrix)
