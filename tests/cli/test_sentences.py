"""What an inspection says in sentences: each figure in them is the inspection's, and nothing unknown is claimed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sample_pages import made_sweep

import skillmerge
from skillmerge.cli.show.sentences import of_sweep, sentences
from skillmerge.study.inspect import Inspection, inspect


@pytest.fixture
def found(family: Path) -> Inspection:
    return inspect(family)


def layers(**energies: float) -> dict[str, Any]:
    return {f"model.layers {name[1:]}": {"energy": energy} for name, energy in energies.items()}


def test_recipe_is_told_by_size_place_relation_and_rounding(found: Inspection) -> None:
    size, place, relation, rounding = sentences(found)
    assert size.startswith(f"{found.total['changed']:.1%} of ")
    assert f"{100 * found.total['norm_ratio']:.2g}% of the weights' norm" in size
    largest = max(found.modules, key=lambda kind: found.modules[kind]["energy"] or 0)
    assert f"of its energy is in {largest} tensors" in place
    assert "with the target's own update, target - sft, is" in relation
    assert "the effective lambda is" in rounding


def test_two_models_are_told_what_lambda_1_would_do(family: Path) -> None:
    told = sentences(inspect(family.parent / "sft", family.parent / "rl"))
    assert not any("cosine" in sentence for sentence in told)
    assert told[-1].startswith("Added to bfloat16 weights at lambda 1, the effective lambda is ")


def test_nothing_of_rounding_is_said_where_nothing_was_forecast(family: Path) -> None:
    assert not any("lambda" in sentence for sentence in sentences(inspect(family, stats="off")))


def test_equal_models_do_not_differ(family: Path) -> None:
    assert sentences(inspect(family.parent / "sft", family.parent / "sft")) == ["The models do not differ."]


@pytest.mark.parametrize(
    ("energies", "text"),
    [
        ({"_0": 0.1, "_1": 0.6, "_2": 0.3}, "layer 1 of model.layers holds half of it"),
        ({"_0": 0.2, "_1": 0.2, "_2": 0.3, "_3": 0.3}, "layers 2 to 3 of model.layers hold half of it"),
        ({"_0": 0.1, "_1": 0.1, "_2": 0.1}, None),  # most of it is outside
        ({"_0": 0.5, "_1": 0.5}, None),  # of two layers nothing needs to be said
    ],
)
def test_place_is_the_shortest_run_of_layers_that_holds_half(
    found: Inspection, energies: dict[str, float], text: str | None
) -> None:
    place = sentences(replace(found, layers=layers(**energies)))[1]
    assert (f"; {text}." in place) if text else ("half of it" not in place)


@pytest.mark.parametrize(
    ("cosine", "deviations", "text"),
    [
        (0.01, 2.9, "is 0.01: no more than chance gives (sign-flip z 2.9)"),
        (0.2, 40.0, "is 0.2: they pull the same way (sign-flip z 40)."),
        (-0.2, -40.0, "is -0.2: they pull opposite ways (sign-flip z -40)."),
        (0.2, None, "is 0.2."),
    ],
)
def test_relation_is_judged_against_chance(
    found: Inspection, cosine: float, deviations: float | None, text: str
) -> None:
    total = {**found.total, "cosine": cosine, "cosine_z_signs": deviations, "updates_ratio": 0.25}
    modules = {kind: {**row, "cosine": 0.1, "cosine_z_signs": 1.0} for kind, row in found.modules.items()}
    told = sentences(replace(found, total=total, modules=modules))[2]
    assert told.endswith(f"{text.rstrip('.')}. It is 0.25 times as long as that update.")
    modules["norm"] = {**modules["norm"], "cosine": 0.5, "cosine_z_signs": -5.0}
    exception = "; of norm tensors it is 0.5 (z 5)"
    assert (exception in sentences(replace(found, total=total, modules=modules))[2]) == ("chance" in text)


def test_sweep_names_the_smallest_candidate_within_noise(family: Path) -> None:
    found = made_sweep(skillmerge.plan(family))
    assert found.smallest is not None
    assert found.smallest is not found.best
    assert of_sweep(found)[-1].sentence.endswith(f" The smallest is lam = {found.smallest.values['lam']:g}.")
