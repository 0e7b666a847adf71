"""The keys `vocabulary` and `tokens` of a recipe, by its text alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import write_recipe

import skillmerge
from skillmerge.errors import RecipeError
from skillmerge.recipes.parse import load


def test_rows_go_by_id_unless_the_recipe_says_otherwise(tmp_path: Path) -> None:
    assert not load(write_recipe(tmp_path)).by_token
    assert not load(write_recipe(tmp_path, vocabulary="by-id")).by_token
    assert load(write_recipe(tmp_path, vocabulary="by-token")).by_token


def test_model_that_gives_a_row_is_used(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"vocabulary": "by-token", "tokens": {"<think>": {"from": "rl"}}}
    recipe = load(write_recipe(tmp_path, "target + lam * (target - sft)", **keys))
    assert recipe.tokens == {"<think>": "rl"}
    assert recipe.used_models() == ["target", "rl", "sft"]
    assert "unused-name" not in [it.rule.id for it in skillmerge.lint(recipe.document.name).findings]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tokens": {"a": {"from": "rl"}}}, "`tokens` takes rows by token"),
        ({"tokens": {"a": {"from": "none"}}, "vocabulary": "by-token"}, "`none` is not a model of this recipe"),
        ({"tokens": {"a": {"form": "rl"}}, "vocabulary": "by-token"}, "unknown key `form`"),
        ({"tokens": {"a": "rl"}, "vocabulary": "by-token"}, "`a` must be a table"),
        ({"tokens": {"a": {"from": "rl"}}, "vocabulary": "by-token",
          "models": {"target": "target", "sft": "sft", "rl": {"skill": "rl"}}, "merge": "target + lam * rl"},
         "`rl` is a skill, which has no tensors to take"),
    ],
)  # fmt: skip
def test_mistakes_are_found_in_the_text(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    recipe = write_recipe(tmp_path, **keys)
    with pytest.raises(RecipeError) as caught:
        load(recipe)
    assert message in str(caught.value)
    assert any(message in it.message for it in skillmerge.lint(recipe).findings)
