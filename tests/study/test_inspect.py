"""Every figure of inspect against numpy on whole tensors in float64, and against values known beforehand."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    numpy_of,
    random_tensors,
    read_checkpoint,
    run_cli,
    tensor_shapes,
    write_checkpoint,
    write_family,
    write_recipe,
)

import skillmerge
from skillmerge.errors import InputError, UsageError
from skillmerge.naming import module_kind
from skillmerge.study.inspect import inspect
from skillmerge.study.spectrum import truncated_svd
from skillmerge.study.update_metrics import add_up, describe, measure_pair, measure_update
from skillmerge.tensors import ULP_EDGES

FIGURES = [
    "norm", "norm_ratio", "energy", "other_norm", "updates_ratio", "cosine", "cosine_z", "cosine_z_signs", "conflict",
    "conflict_z", "changed", "above_absolute", "above_relative", "overlap", "overlap_chance",
]  # fmt: skip


def figures(names: list[str], rl: Any, sft: Any, target: Any, whole: float) -> dict[str, float]:
    """What the docs say, computed on whole tensors."""
    a = np.concatenate([sft[name].astype(np.float64).ravel() for name in names])
    b = np.concatenate([rl[name].astype(np.float64).ravel() for name in names])
    t = np.concatenate([target[name].astype(np.float64).ravel() for name in names])
    v, k = b - a, t - a
    both = (v != 0) & (k != 0)
    opposite = (np.sign(v) != np.sign(k)) & both
    cosine = (v @ k) / np.linalg.norm(v) / np.linalg.norm(k)
    conflict = opposite.sum() / both.sum()
    return {
        "changed": float((v != 0).mean()),
        "above_absolute": float((np.abs(v) > 1e-5).mean()),
        "above_relative": float((np.abs(v) > 1e-3 * np.abs(a)).mean()),
        "norm": float(np.linalg.norm(v)),
        "norm_ratio": float(np.linalg.norm(v) / np.linalg.norm(a)),
        "energy": float((v @ v) / whole),
        "other_norm": float(np.linalg.norm(k)),
        "updates_ratio": float(np.linalg.norm(v) / np.linalg.norm(k)),
        "cosine": float(cosine),
        "cosine_z": float(cosine * math.sqrt(len(v))),
        "cosine_z_signs": float((v @ k) / np.sqrt(((v * k) ** 2).sum())),
        "conflict": float(conflict),
        "conflict_z": float((conflict - 0.5) * 2 * math.sqrt(both.sum())),
        "overlap": float(both.sum() / (v != 0).sum()),
        "overlap_chance": float((k != 0).mean()),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_figures_equal_those_of_numpy(tmp_path: Path, dtype: torch.dtype) -> None:
    shapes = {**tensor_shapes(layers=2), "model.layers.0.mlp.down_proj.weight": (700, 900)}
    recipe = write_family(tmp_path, shapes, dtype)
    found = inspect(recipe)
    rl, sft, target = (numpy_of(tmp_path / name) for name in ("rl", "sft", "target"))
    whole = sum(float((rl[n].astype(np.float64) - sft[n].astype(np.float64)).ravel() @
                      (rl[n].astype(np.float64) - sft[n].astype(np.float64)).ravel()) for n in rl)  # fmt: skip
    groups = {"all": list(rl)}
    for kind in found.modules:
        groups[kind] = [name for name in rl if module_kind(name) == kind]
    rows = {"all": found.total, **found.modules}
    rows |= {name: found.tensors[name] for name in rl}
    groups |= {name: [name] for name in rl}
    assert rows.keys() == groups.keys()
    for label, row in rows.items():
        wanted = figures(groups[label], rl, sft, target, whole)
        for key in FIGURES:
            assert row[key] == pytest.approx(wanted[key], rel=1e-10, abs=1e-14), (label, key)
    assert sum(group["energy"] for group in found.modules.values()) == pytest.approx(1)
    assert sum(row["tensors"] for row in found.layers.values()) == len(rl)
    assert sum(row["tensors"] for row in found.cells.values()) == len(rl)


def test_knowledge_is_taken_against_the_base_where_there_is_one(tmp_path: Path) -> None:
    recipe = write_family(tmp_path)
    write_checkpoint(tmp_path / "base", random_tensors(tensor_shapes(), torch.float32, 0))
    found = inspect(recipe, base=str(tmp_path / "base"))
    base, target, rl, sft = (read_checkpoint(tmp_path / name) for name in ("base", "target", "rl", "sft"))
    v = torch.cat([(rl[name].double() - sft[name].double()).flatten() for name in base])
    k = torch.cat([(target[name].double() - base[name].double()).flatten() for name in base])
    assert found.second == "target - base"
    assert found.total["cosine"] == pytest.approx(float(v @ k / v.norm() / k.norm()), rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_units_in_the_last_place_are_steps_between_numbers(dtype: torch.dtype) -> None:
    """Neighbours, binades crossed, zeros of two signs, subnormals: counted by stepping through the numbers."""
    start = torch.tensor([1.0, -1.0, 0.0, -0.0, 0.5, 2.0, 1e-7, -3.0], dtype=dtype)
    for steps, label in ((1, 0), (2, 1), (3, 2), (4, 2), (7, 3), (16, 4), (60, 5), (200, 6), (3000, 7)):
        moved = start.clone()
        for _ in range(steps):
            moved = torch.nextafter(moved, torch.full_like(moved, 100.0)) if dtype == torch.float32 else _up(moved)
        update = measure_update(moved.double() - start.double(), start, start, moved)
        assert update.ulps is not None
        assert update.ulps == [8 if index == label else 0 for index in range(len(ULP_EDGES) + 1)], steps
    zero = torch.tensor([0.0], dtype=dtype)
    update = measure_update(torch.zeros(1).double(), zero, zero, -zero)
    assert (update.changed, update.ulps) == (1, [1, *[0] * len(ULP_EDGES)])


def _up(values: torch.Tensor) -> torch.Tensor:
    """The next number above, of 16-bit floats; above -0 and +0 alike is the least subnormal."""
    bits = values.view(torch.int16).int()
    after = torch.where(bits >= 0, bits + 1, torch.where(bits == -32768, torch.ones_like(bits), bits - 1))
    return after.to(torch.int16).view(values.dtype)


def test_synthetic_update_has_its_known_values(tmp_path: Path) -> None:
    """A tenth of the elements moved by exactly one unit; an update at a known angle to the target's own."""
    count = 200_000
    generator = torch.Generator().manual_seed(4)
    sft = (1 + torch.rand(count, generator=generator) / 2).bfloat16()
    moved = torch.arange(count) % 10 == 0
    rl = (sft.view(torch.int16) + moved.to(torch.int16)).view(torch.bfloat16)
    for name, tensor in (("sft", sft), ("rl", rl)):
        write_checkpoint(tmp_path / name, {"model.layers.0.mlp.weight": tensor})
    total = inspect(str(tmp_path / "sft"), str(tmp_path / "rl")).total
    assert total["changed"] == total["above_absolute"] == total["above_relative"] == 0.1
    assert total["ulps"] == [count // 10, *[0] * len(ULP_EDGES)]
    assert total["norm"] == pytest.approx(2**-7 * math.sqrt(count / 10), rel=1e-12)
    x, y = (torch.randn(count, generator=generator, dtype=torch.float64) for _ in range(2))
    x /= x.norm()
    y = y - (x @ y) * x
    y /= y.norm()
    before = torch.zeros(count)
    for name, tensor in (("sft", before), ("rl", x.float()), ("target", (0.6 * x + 0.8 * y).float())):
        write_checkpoint(tmp_path / "angle" / name, {"model.layers.0.mlp.weight": tensor})
    found = inspect(write_recipe(tmp_path / "angle"))
    assert found.total["cosine"] == pytest.approx(0.6, abs=1e-6)
    assert found.total["cosine_z"] == pytest.approx(0.6 * math.sqrt(count), rel=1e-5)
    assert found.total["conflict"] == pytest.approx(math.acos(0.6) / math.pi, abs=0.005), "of Gaussian updates"


def test_unrelated_updates_are_within_chance(tmp_path: Path) -> None:
    count = 300_000
    for seed, name in enumerate(("rl", "target")):
        tensors = random_tensors({"model.layers.0.mlp.weight": (count,)}, torch.float32, seed)
        write_checkpoint(tmp_path / name, tensors)
    write_checkpoint(tmp_path / "sft", {"model.layers.0.mlp.weight": torch.zeros(count)})
    total = inspect(write_recipe(tmp_path)).total
    assert abs(total["cosine_z"]) < 3.5
    assert abs(total["conflict_z"]) < 3.5


def test_z_of_random_signs_does_not_overstate(tmp_path: Path) -> None:
    """A hundred elements carry the norms of 300,000: a cosine of theirs by chance is no wonder."""
    count, seen = 300_000, []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        v, k = (torch.randn(count, generator=generator, dtype=torch.float64) for _ in range(2))
        v[:100] *= 1000
        k[:100] *= 1000
        pair = measure_pair(v, k)
        row = describe(measure_update(v, None, None, None), pair, 1.0)
        seen.append((abs(row["cosine_z"]), abs(row["cosine_z_signs"])))
    assert max(plain for plain, _ in seen) > 20
    assert max(signs for _, signs in seen) < 3.5


@pytest.mark.parametrize("stats", ["sampled", "full"])
@pytest.mark.parametrize(
    ("output", "lam"),
    [({}, 0.3), ({}, 1.0), ({"dtype": "float32"}, 0.7), ({"rounding": "stochastic", "seed": 3}, 0.4)],
)
def test_forecast_is_what_apply_then_measures(tmp_path: Path, stats: str, output: dict[str, Any], lam: float) -> None:
    shapes = {**tensor_shapes(), "model.layers.0.mlp.down_proj.weight": (1000, 900)}
    write_family(tmp_path, shapes)
    recipe = write_recipe(tmp_path, coefficients={"lam": lam}, output={"path": "merged", **output})
    found = inspect(recipe, stats=stats)
    assert found.forecast is not None
    measured = skillmerge.apply(recipe, stats=stats).manifest.statistics
    assert found.as_dict()["forecast"]["as_planned"] == measured.as_dict()


def test_model_called_base_is_not_the_base(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "rl", "other", "target")):
        write_checkpoint(tmp_path / name, random_tensors(tensor_shapes(), seed=seed))
    models = {"target": "target", "rl": "rl", "base": "base"}
    recipe = write_recipe(tmp_path, "target + lam * (rl - base)", models=models)
    plain, given = inspect(recipe), inspect(recipe, base=str(tmp_path / "other"))
    assert plain.total["norm"] == given.total["norm"]
    assert plain.total["other_norm"] != given.total["other_norm"]
    recipe = write_recipe(tmp_path, "base + lam * (rl - target)", models=models)
    assert inspect(recipe).total["other_norm"] > 0


@pytest.mark.parametrize("where", ["target", "base"])
def test_nan_outside_the_update_is_told_too(family: Path, where: str) -> None:
    folder = family.parent
    write_checkpoint(folder / "base", random_tensors(tensor_shapes()))
    tensors = read_checkpoint(folder / where)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    for path in (folder / where).glob("model*"):
        path.unlink()
    write_checkpoint(folder / where, tensors)
    with pytest.raises(InputError, match=r"holds nan in tensor `model.layers.1.mlp.up_proj.weight`"):
        inspect(family, base=str(folder / "base"))


def test_extremes_are_figures_too(tmp_path: Path) -> None:
    for scale in (1e-100, 1e100, 1e140):
        folder = tmp_path / str(scale)
        for seed, name in enumerate(("target", "rl", "sft")):
            plain = random_tensors({"model.layers.0.mlp.up_proj.weight": (40, 40)}, torch.float64, seed)
            write_checkpoint(folder / name, {key: value * scale for key, value in plain.items()})
        inspect(write_recipe(folder, output={"path": "merged", "dtype": "float32"}), stats="full")
        json.dumps(inspect(str(folder / "sft"), str(folder / "rl")).as_dict(), allow_nan=False)
        spectra = inspect(str(folder / "sft"), str(folder / "rl"), spectral=4).spectra
        assert all(math.isfinite(value or 0) and value for row in spectra.values() for value in row.values())
    large = torch.randn(50, 60) * 1e37
    assert torch.isfinite(truncated_svd(large, 5, 0)[1]).all()


MIXES: dict[str, tuple[dict[str, float], Any]] = {
    "(1 - a) * target + a * rl": ({"a": 0.3}, lambda t, r, s: r - t),
    "a * target + b * rl": ({"a": 0.7, "b": 0.3}, lambda t, r, s: 0.3 * (r - t)),
    "target + a * (rl - sft) + b * (rl - target)": (
        {"a": 0.9, "b": 0.1}, lambda t, r, s: 0.9 * (r - s) + 0.1 * (r - t)
    ),
    "target + a * (rl - sft) + b * (rl - target) ": ({"a": 0.9, "b": 0.0}, lambda t, r, s: 0.9 * (r - s)),
    "target + a * b * (rl - sft) / 2": ({"a": 0.9, "b": 0.1}, lambda t, r, s: r - s),
    "target - a * (rl - sft)": ({"a": 0.9}, lambda t, r, s: s - r),
}  # fmt: skip
"""Several coefficients are part of the update; one before all of it is not."""


@pytest.mark.parametrize("formula", MIXES)
def test_coefficients_that_mix_are_part_of_the_update(family: Path, formula: str) -> None:
    folder = family.parent
    coefficients, update = MIXES[formula]
    found = inspect(write_recipe(folder, formula, coefficients=coefficients))
    target, rl, sft = (numpy_of(folder / name) for name in ("target", "rl", "sft"))
    for name, row in found.tensors.items():
        wanted = update(*(model[name].astype(np.float64) for model in (target, rl, sft)))
        assert row["norm"] == pytest.approx(float(np.linalg.norm(wanted)), rel=1e-10), name


def test_coefficients_that_mix_by_layer(family: Path) -> None:
    """Each tensor's own update; no single curve over lambda says what these do, and none is shown."""
    folder = family.parent
    rules = {"default": 0.5, "rules": [{"layers": 0, "value": 0.0}, {"layers": 1, "value": 0.9}]}
    formula = "target + a * (rl - sft) + b * (rl - target)"
    found = inspect(write_recipe(folder, formula, coefficients={"a": rules, "b": 0.25}))
    target, rl, sft = (numpy_of(folder / name) for name in ("target", "rl", "sft"))
    for name, row in found.tensors.items():
        share = 0.0 if "layers.0." in name else 0.9 if "layers.1." in name else 0.5
        t, r, s = (model[name].astype(np.float64) for model in (target, rl, sft))
        wanted = share * (r - s) + 0.25 * (r - t)
        assert row["norm"] == pytest.approx(float(np.linalg.norm(wanted)), rel=1e-10, abs=1e-12), name
    assert found.forecast is not None
    assert not found.forecast["curves"]
    assert "unless a rule says otherwise" in found.update


def test_what_is_left_out_is_named_with_the_reason(tmp_path: Path) -> None:
    plain = random_tensors({"w": (4, 4), "gone": (2,), "wide": (3,)})
    write_checkpoint(tmp_path / "a", {**plain, "step": torch.tensor([1, 2]), "none": torch.zeros(0)})
    changed = {"w": plain["w"] * 2, "new": plain["gone"], "wide": torch.ones(4), "step": torch.tensor([1, 3])}
    write_checkpoint(tmp_path / "b", {**changed, "none": torch.zeros(0)})
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    found = inspect(a, b)
    assert list(found.tensors) == ["w"]
    assert found.left == {
        "gone": f"not in {b}", "new": f"not in {a}", "none": "has no elements", "step": f"I64 in {a}",
        "wide": f"[4] in {b}, [3] in {a}",
    }  # fmt: skip
    for name in ("a", "b"):
        shutil.rmtree(tmp_path / name)
        write_checkpoint(tmp_path / name, {"none": torch.zeros(0)})
    with pytest.raises(UsageError, match="share no tensor"):
        inspect(str(tmp_path / "a"), str(tmp_path / "b"))


def test_quantised_weights_that_differ_are_refused(tmp_path: Path) -> None:
    for value, name in enumerate(("a", "b")):
        norm = {"model.norm.weight": torch.ones(4)}
        write_checkpoint(tmp_path / name, {"w": torch.full((4, 4), value).to(torch.float8_e4m3fn), **norm})
    with pytest.raises(InputError, match="is quantized"):
        inspect(str(tmp_path / "a"), str(tmp_path / "b"))


def test_coefficients_need_a_recipe(family: Path) -> None:
    with pytest.raises(UsageError, match="coefficients apply only to a recipe"):
        inspect(str(family.parent / "sft"), str(family.parent / "rl"), coefficients={"lam": 2.0})


def test_threads_and_tiles_change_nothing(family: Path) -> None:
    one, two = (inspect(family, threads=count).as_dict() for count in (1, 4))
    assert one == two


def test_skill_is_inspected_as_its_parents_are(family: Path) -> None:
    folder = family.parent
    skillmerge.extract(str(folder / "rl"), str(folder / "sft"), folder / "math")
    skill = inspect(str(folder / "math")).total
    models = inspect(str(folder / "sft"), str(folder / "rl")).total
    for key in ("changed", "above_absolute", "norm", "energy", "elements", "largest"):
        assert skill[key] == models[key], key
    assert skill["ulps"] is None
    used = write_recipe(
        folder, "target + lam * math", models={"target": "target", "math": {"skill": "math"}, "base": "sft"}
    )
    found = inspect(used, base=str(folder / "sft"))
    direct = inspect(write_recipe(folder))
    assert found.total["cosine"] == direct.total["cosine"]
    assert found.forecast is not None
    assert direct.forecast is not None
    assert found.forecast["curves"] == direct.forecast["curves"]


def test_layers_that_the_recipe_leaves_alone_are_shown_too(family: Path) -> None:
    rules = [{"layers": "0-1", "value": 0.0}]
    recipe = write_recipe(family.parent, coefficients={"lam": {"default": 1.0, "rules": rules}})
    assert (
        inspect(recipe).total["changed"]
        == inspect(str(family.parent / "sft"), str(family.parent / "rl")).total["changed"]
    )


def test_two_differences_are_seen_as_their_sum(tmp_path: Path) -> None:
    for seed, name in enumerate(("target", "a", "b", "sft")):
        write_checkpoint(tmp_path / name, random_tensors(tensor_shapes(), seed=seed))
    models = {"target": "target", "a": "a", "b": "b", "sft": "sft"}
    recipe = write_recipe(tmp_path, "target + 0.6 * (a - sft) - 0.4 * (b - sft)", models=models)
    found = inspect(recipe)
    tensors = {name: read_checkpoint(tmp_path / name) for name in models}
    squares = 0.0
    for name in tensors["a"]:
        a, b, sft = (tensors[model][name].double() for model in ("a", "b", "sft"))
        squares += float(((0.6 * a - 0.4 * b - 0.2 * sft) ** 2).sum())
    assert found.total["norm"] == pytest.approx(math.sqrt(squares), rel=1e-10)
    assert found.forecast is not None
    assert found.forecast["curves"] == {}
    measured = skillmerge.apply(recipe).manifest.statistics
    assert found.forecast["as_planned"] == measured


def test_add_up_forgets_what_one_part_does_not_know() -> None:
    wide = torch.tensor([1.0, 0.0], dtype=torch.float64)
    known = measure_update(wide, wide, None, None)
    unknown = measure_update(wide, None, None, None)
    total = add_up([known, unknown])
    assert (total.elements, total.changed, total.weights, total.above_relative) == (4, 2, None, None)


def test_what_cannot_be_inspected_is_told(family: Path, tmp_path: Path) -> None:
    folder = family.parent
    for arguments, error, message in (
        ((str(folder / "rl"),), UsageError, "is a folder, but not a skill"),
        ((str(folder / "rl"), str(folder / "nowhere")), InputError, "nowhere"),
        ((write_recipe(folder, "target"),), UsageError, "no update to inspect"),
        ((str(folder / "no-such-thing"),), InputError, "no-such-thing"),
    ):
        with pytest.raises(error, match=message):
            inspect(*arguments)
    with pytest.raises(UsageError, match="leave `--base` out"):
        inspect(str(folder / "sft"), str(folder / "rl"), base=str(folder / "target"))
    tensors = read_checkpoint(folder / "rl")
    tensors["model.norm.weight"][5] = float("nan")
    write_checkpoint(folder / "broken", tensors)
    with pytest.raises(InputError, match=r"holds nan in tensor `model.norm.weight` at element 5"):
        inspect(str(folder / "sft"), str(folder / "broken"))
    write_checkpoint(folder / "other", {"something.else": torch.zeros(3)})
    with pytest.raises(UsageError, match="share no tensor"):
        inspect(str(folder / "sft"), str(folder / "other"))


def test_inspect_command(family: Path) -> None:
    folder = family.parent
    process = run_cli("inspect", "sft", "rl", "--details", cwd=folder)
    assert process.returncode == 0, process.stderr
    for text in ("Update, after - before", "changed by units in the last place: 1: ", "Effect of rounding"):
        assert text in process.stdout
    process = run_cli("inspect", "recipe.yaml", "--set", "lam=0.4", "--details", cwd=folder)
    for text in ("Beside the target's own update, target - sft", "a cosine near 0", "in this recipe (sampled)"):
        assert text in process.stdout
    short = run_cli("inspect", "recipe.yaml", "--set", "lam=0.4", cwd=folder).stdout
    assert "in this recipe (sampled)" in short
    assert "Beside the target's own update" not in short
    document = json.loads(run_cli("inspect", "recipe.yaml", "--json", "--stats", "off", cwd=folder).stdout)
    assert document["forecast"] is None
    assert set(document["all"]) >= set(FIGURES)


def test_file_of_weights_in_place_of_a_model_is_named(family: Path) -> None:
    for places in ((family.parent / "sft/model.safetensors", family.parent / "rl"), (family.parent / "sft/a.bin", "b")):
        Path(places[0]).touch()
        with pytest.raises(UsageError) as caught:
            inspect(*places)
        assert caught.value.message == f"`{places[0]}` is a file, not a folder"
        assert caught.value.fix == f"name the model's folder: `{family.parent / 'sft'}`"
    with pytest.raises(UsageError, match="is a recipe, which must be the only argument"):
        inspect(family, family.parent / "rl")
