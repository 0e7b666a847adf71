"""The recipe: what is read, and how every mistake is told (snapshots)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from schemas import validator

from skillmerge.checkpoints.place import Local, Location, parse_location
from skillmerge.errors import RecipeError, UsageError
from skillmerge.recipes.parse import load, parse_recipe
from skillmerge.recipes.recipe import unused_names
from skillmerge.recipes.schema import schema as recipe_schema
from skillmerge.recipes.starter import recipe_text
from skillmerge.recipes.yamltext import read
from skillmerge.verbs.sweep.candidates import path_of

GOOD = """\
skillmerge: 1
models:
  target: ./runs/target
  rl: /models/rl
  sft: {path: ./sft}
coefficients:
  lam:
    default: 1.0
    rules:
      - {layers: 0-3, value: 0.0}
      - {layers: 4-, ramp: [0.5, 1.0]}
      - {tensors: "*.mlp.*", value: 0.8}
      - {tensors: ["*embed_tokens*", "*lm_head*"], modules: [embedding, head], value: 0}
merge: target + lam * (rl - sft)
copy:
  - {tensors: "model.visual.*", from: target}
ignore: ["lm_head.weight"]
output:
  path: ./merged
  like: target
  dtype: bfloat16
  rounding: stochastic
  seed: 3
  shard_size: 5GB
"""


def parse(text: str, **overrides: float):
    return parse_recipe(text, "recipe.yaml", Path("/home"), overrides)


def test_recipe_is_read_into_frozen_data() -> None:
    recipe = parse(GOOD)
    assert dict(recipe.models) == {"target": "./runs/target", "rl": "/models/rl", "sft": "./sft"}
    assert recipe.model_place("target") == Local(Path("/home/runs/target"))
    assert recipe.model_place("rl") == Local(Path("/models/rl"))
    assert recipe.output.path == Path("/home/merged")
    assert recipe.output.shard_size == 5_000_000_000
    assert (recipe.output.dtype, recipe.output.rounding, recipe.output.seed) == ("bfloat16", "stochastic", 3)
    assert [rule.value for rule in recipe.coefficients["lam"].rules] == [0.0, 0.0, 0.8, 0.0]
    with pytest.raises(AttributeError):
        recipe.folder = Path("/")  # type: ignore[misc]


def test_set_replaces_a_schedule_by_a_number() -> None:
    assert parse(GOOD, lam=0.25).coefficients["lam"].resolve(["x"]) == {"x": 0.25}
    with pytest.raises(UsageError, match="no such coefficient"):
        parse(GOOD, lamb=0.25)


def test_set_in_a_recipe_without_coefficients_says_how_to_name_a_number() -> None:
    text = "skillmerge: 1\nmodels: {target: t, rl: r, sft: s}\nmerge: target + 0.7 * (rl - sft)\n"
    named = re.escape("`coefficients: {lam: 0.7}` and `merge: target + lam * (rl - sft)`")
    with pytest.raises(UsageError, match=named):
        parse(text, lam=0.5)
    with pytest.raises(UsageError, match=named):
        path_of(parse(text), "lam.rules.0.value")


def test_greek_names_work_everywhere() -> None:
    recipe = parse(GOOD.replace("lam", "λ"), λ=0.5)
    assert list(recipe.coefficients) == ["λ"]


def test_models_that_do_nothing_are_named() -> None:
    assert unused_names(parse(GOOD.replace("models:\n", "models:\n  base: ./base\n"))) == ["base"]


@pytest.mark.parametrize(
    ("uri", "wanted"),
    [
        ("hf://acme/rl", Location("acme/rl")),
        ("hf://acme/rl@main", Location("acme/rl", "main")),
        ("hf://acme/rl@refs/pr/7", Location("acme/rl", "refs/pr/7")),
        ("hf://acme/rl@refs/pr/7/sub/model", Location("acme/rl", "refs/pr/7", "sub/model")),
        ("hf://acme/rl@feature%2Fx/sub", Location("acme/rl", "feature/x", "sub")),
        ("hf://acme/rl/sub", Location("acme/rl", "", "sub")),
        ("hf://acme/rl-v1.5_x/", Location("acme/rl-v1.5_x")),
        (f"hf://acme/rl@{'0123456789' * 4}", Location("acme/rl", "0123456789" * 4)),
    ],
)
def test_places_on_the_hub_are_read(uri: str, wanted: Location) -> None:
    place = parse(GOOD.replace("/models/rl", uri)).model_place("rl")
    assert place == wanted
    assert wanted.pinned == (len(wanted.revision) == 40)
    assert parse_location(str(wanted).replace("feature/x", "feature%2Fx")) == wanted


@pytest.mark.parametrize(
    "uri",
    ["hf://", "hf://acme", "hf://acme/", "hf://acme/rl@", "hf:///rl", "hf://acme/rl/../x", "hf://acme/rl//x",
     "hf://ac me/rl", "hf://acme/rl@a..b", "hf://-acme/rl", "hf://acme/rl@a\\b"],
)  # fmt: skip
def test_places_that_the_hub_cannot_have_are_refused(uri: str) -> None:
    recipe = parse(GOOD.replace("/models/rl", f"'{uri}'"))
    with pytest.raises(RecipeError, match=r"recipe\.yaml:4:7: .*hf://"):
        recipe.model_place("rl")


def test_places_of_other_kinds_are_refused() -> None:
    with pytest.raises(RecipeError, match="ftp://"):
        parse(GOOD.replace("/models/rl", "ftp://bucket/rl")).model_place("rl")


SNAPSHOTS = {
    "unknown key": (
        ('tensors: "*.mlp', 'tensor: "*.mlp'),
        """\
recipe.yaml:12:10: unknown key `tensor`
   12 |       - {tensor: "*.mlp.*", value: 0.8}
      |          ^^^^^^
did you mean `tensors`?""",
    ),
    "misspelt model": (
        ("(rl - sft)", "(rl - stf)"),
        """\
recipe.yaml:14:29: the expression names `stf`, which is neither a model nor a coefficient
   14 | merge: target + lam * (rl - stf)
      |                             ^^^
did you mean `sft`?""",
    ),
    "duplicate key": (
        ("ignore:", "merge: target\nignore:"),
        """\
recipe.yaml:17:1: duplicate key `merge`
   17 | merge: target
      | ^^^^^
remove one of the two; the first is on line 14""",
    ),
    "string for a number": (
        ("default: 1.0", 'default: "1.0"'),
        """\
recipe.yaml:8:14: `default` must be a number, not the text '1.0'
    8 |     default: "1.0"
      |              ^^^^^
remove the quotes: 1.0""",
    ),
    "not finite": (
        ("value: 0.8", "value: .inf"),
        """\
recipe.yaml:12:37: `value` must be a finite number, not inf
   12 |       - {tensors: "*.mlp.*", value: .inf}
      |                                     ^^^^
write a number, such as 1""",
    ),
    "division by a model": (
        ("merge: target + lam * (rl - sft)", "merge: target / rl"),
        """\
recipe.yaml:14:15: the expression divides by a model
   14 | merge: target / rl
      |               ^
only numbers and coefficients divide""",
    ),
    "backward layers": (
        ("layers: 0-3", "layers: 3-0"),
        """\
recipe.yaml:10:18: `3-0` runs backwards
   10 |       - {layers: 3-0, value: 0.0}
      |                  ^^^
write 0-3""",
    ),
    "layers with dots": (
        ("layers: 0-3", "layers: 0..3"),
        """\
recipe.yaml:10:18: `0..3` does not name layers
   10 |       - {layers: 0..3, value: 0.0}
      |                  ^^^^
did you mean `0-3`?""",
    ),
    "misspelt model under copy": (
        ("from: target", "from: targt"),
        """\
recipe.yaml:16:39: `targt` is not a model of this recipe
   16 |   - {tensors: "model.visual.*", from: targt}
      |                                       ^^^^^
did you mean `target`?""",
    ),
    "misspelt top key": (
        ("merge: target", "merg: target"),
        """\
recipe.yaml:14:1: unknown key `merg`
   14 | merg: target + lam * (rl - sft)
      | ^^^^
did you mean `merge`?""",
    ),
    "misspelt module": (
        ("modules: [embedding, head]", "modules: [embeding, head]"),
        """\
recipe.yaml:13:62: this must be `attention`, `mlp`, `norm`, `embedding`, `head`, `router` or `expert`, not 'embeding'
   13 |       - {tensors: ["*embed_tokens*", "*lm_head*"], modules: [embeding, head], value: 0}
      |                                                              ^^^^^^^^
did you mean `embedding`?""",
    ),
    "misspelt dtype": (
        ("dtype: bfloat16", "dtype: bf16"),
        """\
recipe.yaml:21:10: `dtype` must be `same`, `bfloat16`, `float16` or `float32`, not 'bf16'
   21 |   dtype: bf16
      |          ^^^^
did you mean `bfloat16`?""",
    ),
    "missing version": (
        ("skillmerge: 1\n", ""),
        """\
recipe.yaml:1:1: missing key `skillmerge`
    1 | models:
      | ^
start the recipe with `skillmerge: 1`""",
    ),
    "missing operator": (
        ("lam * (rl", "lam (rl"),
        """\
recipe.yaml:14:21: the expression lacks an operator before `(`
   14 | merge: target + lam (rl - sft)
      |                     ^
did you mean `*`?""",
    ),
}


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_mistake_reads_as_it_should(name: str) -> None:
    (old, new), wanted = SNAPSHOTS[name]
    assert old in GOOD
    with pytest.raises(RecipeError) as error:
        parse(GOOD.replace(old, new, 1))
    assert str(error.value) == wanted


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("value: 0.8", "value: 0.8, ramp: [0, 1]", "both `value` and `ramp`"),
        ("value: 0.8", "modules: mlp", "neither `value` nor `ramp`"),
        ("layers: 0-3, ", "", "selects nothing"),
        ("ramp: [0.5, 1.0]", "ramp: [0.5]", "must be two numbers"),
        ("skillmerge: 1", "skillmerge: 2", "format version 2 is unknown"),
        ("skillmerge: 1", 'skillmerge: "1"', "format version '1'"),
        ("shard_size: 5GB", "shard_size: big", "is not a size"),
        ("shard_size: 5GB", "shard_size: 0GB", "not a positive size"),
        ("seed: 3", "seed: -3", "greater than or equal to 0"),
        ("  lam:\n", "  rl:\n", "already names something else"),
        ("  target: ./runs", "  my target: ./runs", "cannot be used as a name"),
        ("ignore: [", "ignore: [3, ", "must be text"),
        ("path: ./merged", "path: 3", "must be text, not 3"),
        ("like: target", "like: tarrget", "not a model of this recipe"),
        ("  rl: /models/rl", "  rl:", "`rl` must be text, not empty"),
        ("value: 0.8", "value: true", "must be a number, not true"),
        ("merge: target + lam * (rl - sft)", "merge: [target]", "`merge` must be text, not a list"),
    ],
)
def test_mistake_is_told_with_its_place(old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(RecipeError, match=message) as error:
        parse(GOOD.replace(old, new, 1))
    assert error.value.message.startswith("recipe.yaml:")
    assert " | " in error.value.message


def test_expression_in_a_folded_text_is_located_at_its_start() -> None:
    text = GOOD.replace("merge: target + lam * (rl - sft)", "merge: >-\n  target +\n  lam * (rl - stf)")
    with pytest.raises(RecipeError, match=r"recipe\.yaml:14:8: the expression names `stf`"):
        parse(text)


@pytest.mark.parametrize("text", [GOOD, recipe_text(), json.dumps(read(GOOD, "x").data)])
def test_schema_accepts_what_the_parser_accepts(text: str) -> None:
    held = validator(recipe_schema())
    held.check_schema(recipe_schema())
    held.validate(read(text, "x").data)
    assert parse(text).models


@pytest.mark.parametrize("name", ["unknown key", "string for a number", "misspelt top key", "misspelt dtype"])
def test_schema_refuses_what_the_parser_refuses(name: str) -> None:
    old, new = SNAPSHOTS[name][0]
    assert not validator(recipe_schema()).is_valid(read(GOOD.replace(old, new, 1), "x").data)


def test_recipe_that_is_not_there_says_how_to_start(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist") as error:
        load(tmp_path / "none.yaml")
    assert "skillmerge init" in str(error.value.fix)
