"""Several updates in one pass: each by itself and every two, against numpy and against inspecting them alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_tensors, read_checkpoint, run_cli, tensor_shapes, write_checkpoint, write_recipe
from hub_server import HubServer

import skillmerge
from skillmerge.errors import UsageError
from skillmerge.naming import module_kind
from skillmerge.study.inspect import FIGURES_OF_TWO, inspect

MODELS = {"target": "target", "m": "math-rl", "c": "code-rl", "base": "base"}


@pytest.fixture(scope="module")
def skills(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a target, two models trained from the base, and the skills cut from them."""
    folder = tmp_path_factory.mktemp("skills")
    shapes = tensor_shapes(layers=2)
    base = random_tensors(shapes, torch.float32)
    for seed, (name, size) in enumerate({"target": 1e-3, "math-rl": 3e-4, "code-rl": 1e-4}.items(), 1):
        step = random_tensors(shapes, torch.float32, seed, size)
        write_checkpoint(folder / name, {key: (value + step[key]).bfloat16() for key, value in base.items()})
    write_checkpoint(folder / "base", {key: value.bfloat16() for key, value in base.items()})
    for name in ("math", "code"):
        skillmerge.extract(str(folder / f"{name}-rl"), str(folder / "base"), folder / name)
    return folder


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of one tensor whose norms tell them apart."""
    folder = tmp_path_factory.mktemp("sizes")
    for seed, (name, size) in enumerate({"target": 1.0, "base": 2.0, "m": 4.0, "c": 8.0}.items()):
        write_checkpoint(folder / name, random_tensors({"w": (8, 8)}, torch.bfloat16, seed, size))
    skillmerge.extract(str(folder / "m"), str(folder / "base"), folder / "math")
    return folder


def vector(folder: Path, after: str, kind: str) -> Any:
    a, b = (read_checkpoint(folder / name) for name in (after, "base"))
    names = [name for name in sorted(a) if kind in ("all", module_kind(name))]
    return np.concatenate([(a[name].double() - b[name].double()).numpy().ravel() for name in names])


def check(found: Any, folder: Path, first: str, second: str) -> None:
    """The figures of the pair, on whole tensors."""
    (pair,) = found.pairs
    assert (pair["first"], pair["second"]) == (first, second)
    for kind, row in {**pair["modules"], "all": pair["all"]}.items():
        v, k = vector(folder, "math-rl", kind), vector(folder, "code-rl", kind)
        both = (v != 0) & (k != 0)
        assert row["cosine"] == pytest.approx(v @ k / np.linalg.norm(v) / np.linalg.norm(k))
        assert row["conflict"] == pytest.approx((both & (np.sign(v) != np.sign(k))).sum() / both.sum())
        assert row["overlap"] == pytest.approx(both.sum() / (v != 0).sum())
        assert row["updates_ratio"] == pytest.approx(np.linalg.norm(v) / np.linalg.norm(k))
        assert set(row) == {"tensors", *FIGURES_OF_TWO}


def test_two_skills_are_seen_alone_and_together(skills: Path) -> None:
    math, code = str(skills / "math"), str(skills / "code")
    found = inspect(math, code)
    check(found, skills, math, code)
    for place in (math, code):
        alone = inspect(place)
        assert found.updates[place] == {"all": alone.total, "modules": alone.modules}
    together = vector(skills, "math-rl", "all") + vector(skills, "code-rl", "all")
    assert found.total["norm"] == pytest.approx(float(np.linalg.norm(together)))
    assert found.update == f"{math} + {code}"


@pytest.mark.parametrize(
    ("formula", "labels"),
    [
        ("target + a * (m - base) + b * (c - base)", ("m - base", "c - base")),
        ("target + a * ((m - base) + 0.5 * (c - base))", ("m - base", "c - base")),
        ("target - (base - m) + (c - base) / 3", ("m - base", "c - base")),
        ("target + m - base + c - base", ("m - base", "c - base")),
        ("target + a * math + b * (c - base)", ("math", "c - base")),
        ("target + a * math + b * code", ("math", "code")),
    ],
)
def test_recipe_of_several_differences_shows_each(skills: Path, formula: str, labels: tuple[str, str]) -> None:
    places = {"math": {"skill": "math"}, "code": {"skill": "code"}}
    models = {name: place for name, place in {**MODELS, **places}.items() if re.search(rf"\b{name}\b", formula)}
    factors = {name: value for name, value in {"a": 0.7, "b": 0.3}.items() if re.search(rf"\b{name}\b", formula)}
    found = inspect(write_recipe(skills, formula, models=models, coefficients=factors), stats="off")
    check(found, skills, *labels)
    for label, after in zip(labels, ("math-rl", "code-rl"), strict=True):
        alone = inspect(str(skills / "base"), str(skills / after), stats="off").total
        for key in ("norm", "changed", "largest"):
            assert found.updates[label]["all"][key] == alone[key], (label, key)
        if "-" in label:
            assert found.updates[label]["all"]["input_rounding"] == alone["input_rounding"]
            assert found.updates[label]["all"]["ulps"] == alone["ulps"]


@pytest.mark.parametrize(
    "formula",
    [
        "target + a * (m - base)",
        "target + a * (m - base) + b * (m - base)",
        "0.5 * target + 0.5 * m",
        "target + 0.5 * (m + c - 2 * base)",
        "m + a * (target - base)",
        "v * target + (m - base) + (c - base) + w * m",
    ],
)
def test_recipe_of_one_update_is_shown_as_before(skills: Path, formula: str) -> None:
    models = {name: place for name, place in MODELS.items() if re.search(rf"\b{name}\b", formula)}
    known = {"a": 0.7, "b": 0.3, "v": 0.5, "w": 0.5}
    factors = {name: value for name, value in known.items() if re.search(rf"\b{name}\b", formula)}
    found = inspect(write_recipe(skills, formula, models=models, coefficients=factors), stats="off")
    assert (found.updates, found.pairs) == ({}, [])
    assert not {"updates", "pairs"} & set(found.as_dict())


@pytest.mark.parametrize(
    ("formula", "expected"),
    [
        ("target + (m - base) - (c - base)", {"m - base": "base", "base - c": "base"}),
        ("target + (m - base) - 0.5 * (c - target)", {"m - base": "base", "target - c": "target"}),
        ("target + (m - base) + (-0.5) * (c - target)", {"m - base": "base", "target - c": "target"}),
        ("target + (m - base) - b * (c - target)", {"m - base": "base", "target - c": "target"}),
        ("target + (m - base) - (c - target) / 3", {"m - base": "base", "target - c": "target"}),
        ("target - ((m - base) - (c - target))", {"base - m": "base", "c - target": "target"}),
        ("target - 2 * ((m - base) + 0.5 * (c - target))", {"base - m": "base", "target - c": "target"}),
        ("target + m - base - c + base", {"m - base": "base", "base - c": "base"}),
        ("target - base + m - (c - base)", {"m - base": "base", "base - c": "base"}),
        ("target - (base - m) + (c - base)", {"m - base": "base", "c - base": "base"}),
        ("target + (m - base) - (c - target) + 0 * (m - c)", {"m - base": "base", "target - c": "target"}),
        ("target - math - (c - base)", {"- math": "target", "base - c": "base"}),
    ],
)
def test_each_update_is_seen_beside_what_it_was_cut_from(sizes: Path, formula: str, expected: dict[str, str]) -> None:
    """Also one that is subtracted: its weights are of another size than those of the model that was tuned."""
    models: dict[str, Any] = {name: name for name in ("target", "m", "c", "base") if re.search(rf"\b{name}\b", formula)}
    models |= {"math": {"skill": "math"}} if "math" in formula else {}
    factors = {"b": -0.5} if "b *" in formula else None
    found = inspect(write_recipe(sizes, formula, models=models, coefficients=factors), stats="off")
    assert list(found.updates) == list(expected)
    for label, before in expected.items():
        row = found.updates[label]["all"]
        weight = np.linalg.norm(read_checkpoint(sizes / before)["w"].double().numpy())
        assert row["norm"] / row["norm_ratio"] == pytest.approx(weight), label


@pytest.mark.parametrize(
    ("formula", "before", "reference"),
    [
        ("target - (c - base)", "base", "base"),
        ("target - b * (c - base)", "base", "base"),
        ("target - 0.5 * (c - base)", "base", "base"),
        ("target - base + c", "base", "base"),
        ("target - (c - target)", "target", None),
        ("target + (m - base) - (c - base)", "target", None),
    ],
)
def test_update_that_is_subtracted_is_seen_beside_what_it_was_cut_from(
    sizes: Path, formula: str, before: str, reference: str | None
) -> None:
    models = {name: name for name in ("target", "m", "c", "base") if re.search(rf"\b{name}\b", formula)}
    factors = {"b": 0.5} if "b *" in formula else None
    found = inspect(write_recipe(sizes, formula, models=models, coefficients=factors), stats="off")
    weight = np.linalg.norm(read_checkpoint(sizes / before)["w"].double().numpy())
    assert found.total["norm"] / found.total["norm_ratio"] == pytest.approx(weight)
    assert found.second == (f"target - {reference}" if reference else None)


@pytest.mark.parametrize("formula", ["target - (c - base)", "target + (m - base) - (c - base)"])
def test_floor_of_the_tuned_model_is_that_of_an_update_that_is_subtracted_too(sizes: Path, formula: str) -> None:
    models = {name: name for name in ("target", "m", "c", "base") if re.search(rf"\b{name}\b", formula)}
    found = inspect(write_recipe(sizes, formula, models=models, coefficients=None), stats="off")
    row = found.updates["base - c"]["all"] if found.updates else found.total
    wanted = inspect(str(sizes / "base"), str(sizes / "c"), stats="off").total
    for key in ("ulps", "changed", "norm", "norm_ratio", "input_rounding", "input_rounding_added"):
        assert row[key] == wanted[key], key
    tuned = read_checkpoint(sizes / "c")["w"].double().numpy()
    unit = 2.0 ** (np.floor(np.log2(np.abs(tuned))) - 7)
    assert row["input_rounding_added"] == pytest.approx(np.sqrt((unit**2).sum() / 12) / row["norm"])


def test_subtracted_skill_points_the_other_way(skills: Path) -> None:
    models = {"target": "target", "m": "math-rl", "base": "base", "math": {"skill": "math"}}
    recipe = write_recipe(skills, "target + (m - base) - 0.5 * math", models=models, coefficients=None)
    found = inspect(recipe, stats="off")
    (pair,) = found.pairs
    assert (pair["second"], pair["all"]["cosine"]) == ("- math", pytest.approx(-1))
    one, other = (found.updates[label]["all"]["norm_ratio"] for label in ("m - base", "- math"))
    assert other == pytest.approx(one, rel=0.01), "beside the target's weights, not beside the skill's own"


def test_three_updates_make_three_pairs(skills: Path) -> None:
    skillmerge.extract(str(skills / "target"), str(skills / "base"), skills / "third", overwrite=True)
    found = inspect(*(str(skills / name) for name in ("math", "code", "third")))
    named = [(Path(pair["first"]).name, Path(pair["second"]).name) for pair in found.pairs]
    assert named == [("math", "code"), ("math", "third"), ("code", "third")]
    for pair in found.pairs:
        (alone,) = inspect(pair["first"], pair["second"]).pairs
        assert pair == alone


def test_threads_change_nothing(skills: Path) -> None:
    one, four = (inspect(str(skills / "math"), str(skills / "code"), threads=count).as_dict() for count in (1, 4))
    assert one == four


def test_skills_on_the_hub_are_told_from_models(skills: Path, hub: HubServer) -> None:
    for name in ("math", "code", "base", "math-rl"):
        hub.create_from(f"acme/{name}", skills / name)
    found = inspect("hf://acme/math", "hf://acme/code")
    check(found, skills, "hf://acme/math", "hf://acme/code")
    assert inspect("hf://acme/base", "hf://acme/math-rl").title == "from hf://acme/base to hf://acme/math-rl"


def test_what_does_not_go_together_is_told(skills: Path) -> None:
    recipe = write_recipe(skills, "target + m - base", models={k: v for k, v in MODELS.items() if k != "c"})
    for names, message in (
        (("math", "code-rl"), "math is a skill, and .*code-rl is not"),
        (("math-rl", "code"), "code is a skill, and .*math-rl is not"),
        (("math", "math"), "the same skill is named twice"),
        (("base", "math-rl", "code-rl"), "3 models: "),
        ((recipe.name, "math"), "is a recipe, which must be the only argument"),
    ):
        with pytest.raises(UsageError, match=message):
            inspect(*(str(skills / name) for name in names))


def test_terminal_json_and_report_show_every_update_and_pair(skills: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    process = run_cli("inspect", "math", "code", "--report", report, cwd=skills, COLUMNS="120")
    assert process.returncode == 0, process.stderr
    for text in ("Update, math + code", "Each update", "math beside code", "sign conflict"):
        assert text in process.stdout
    for text in ("<h2>Each update</h2>", "<h2>Every two updates</h2>", "<td class=text>code<"):
        assert text in report.read_text()
    document = json.loads(run_cli("inspect", "math", "code", "--json", cwd=skills).stdout)
    assert list(document["updates"]) == ["math", "code"]
    assert [(pair["first"], pair["second"]) for pair in document["pairs"]] == [("math", "code")]
    models = {"target": "target", "math": {"skill": "math"}, "code": {"skill": "code"}, "m": "math-rl", "base": "base"}
    recipe = write_recipe(skills, "target + math + code + (m - base)", models=models, coefficients=None)
    shown = run_cli("inspect", recipe, "--stats", "off").stdout
    assert "Every pair of updates" in shown
    assert "math | m - base" in shown
