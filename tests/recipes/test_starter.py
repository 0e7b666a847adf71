"""What init writes: the starter, each recipe of the gallery, and the schema that editors read beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import random_tensors, run_cli, tensor_shapes, write_checkpoint

import skillmerge
from skillmerge.cli.main import cli
from skillmerge.errors import UsageError
from skillmerge.recipes.starter import gallery

FOLDER = Path(__file__).parent.parent.parent / "recipes"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
EDITOR_LINE = "# yaml-language-server: $schema=skillmerge.schema.json\n"


def test_init_writes_a_recipe_that_plans(tmp_path: Path) -> None:
    process = run_cli("init", cwd=tmp_path)
    assert process.stdout == (
        "wrote recipe.yaml, and skillmerge.schema.json beside it for editors: fill in the models\n"
    )
    text = (tmp_path / "recipe.yaml").read_text()
    assert text == EDITOR_LINE + run_cli("init", "-", cwd=tmp_path).stdout
    for name in ("target-sft", "source-rl", "source-sft"):
        write_checkpoint(tmp_path / "path" / "to" / name, random_tensors(tensor_shapes()))
    assert run_cli("plan", "recipe.yaml", cwd=tmp_path).returncode == 0


def test_init_keeps_the_recipe_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("mine")
    process = run_cli("init", "--from", "past", cwd=tmp_path)
    assert process.returncode == 2
    assert process.stderr == (
        "error: `recipe.yaml` already exists\nhelp: choose another file: `skillmerge init my-recipe.yaml --from past`\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
    assert (tmp_path / "recipe.yaml").read_text() == "mine"


@pytest.mark.parametrize("name", NAMES)
def test_init_from_writes_each_recipe_of_the_folder(name: str, tmp_path: Path) -> None:
    text = (FOLDER / f"{name}.yaml").read_text()
    assert run_cli("init", "-", "--from", name, cwd=tmp_path).stdout == text
    assert list(tmp_path.iterdir()) == []
    assert skillmerge.init(tmp_path / "r.yaml", name).read_text() == EDITOR_LINE + text
    assert skillmerge.lint(tmp_path / "r.yaml").ok
    assert name in " ".join(str(cli.commands["init"].help).split())


def test_init_lists_what_the_recipes_do(tmp_path: Path) -> None:
    lines = run_cli("init", "--list", cwd=tmp_path).stdout.splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    assert lines[NAMES.index("past")] == "past                         Add a skill from one model to another."
    assert max(map(len, lines)) <= 80
    assert all(summary.endswith(".") for summary in gallery().values())
    assert list(tmp_path.iterdir()) == []


def test_every_recipe_says_when_to_use_it_and_when_not() -> None:
    for name in NAMES:
        text = (FOLDER / f"{name}.yaml").read_text()
        assert "\n# When: " in text, name
        assert "\n# Not when: " in text, name
        assert max(map(len, text.splitlines())) <= 120, name


@pytest.mark.parametrize(
    ("name", "help"),
    [
        ("past_ramp", "did you mean `past-ramp`?"),
        (
            "zzz",
            f"choose one of: {', '.join(NAMES[:5])} … and {len(NAMES) - 5} more; `skillmerge init --list` shows all",
        ),
        ("../past", None),
    ],
)
def test_init_from_an_unknown_name_says_which_there_are(name: str, help: str | None, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        skillmerge.init(tmp_path / "r.yaml", name)
    assert error.value.message == f"no recipe is called `{name}`"
    assert error.value.fix == (help or "did you mean `past`?")
    assert list(tmp_path.iterdir()) == []


def test_init_from_a_path_that_is_no_file_to_translate_says_which_is(tmp_path: Path) -> None:
    (tmp_path / "mergekit_config.yml").write_text("")
    (tmp_path / "config.txt").write_text("")
    for name, fix in (
        (tmp_path, f"did you mean `{tmp_path / 'mergekit_config.yml'}`?"),
        (tmp_path / "config.txt", "to translate a file, its name must end in .yaml, .yml, .json"),
    ):
        with pytest.raises(UsageError) as error:
            skillmerge.init(tmp_path / "r.yaml", str(name))
        assert (error.value.message, error.value.fix) == (f"no recipe is called `{name}`", fix)


def test_schema_beside_the_recipe_is_what_schema_prints_and_is_kept(tmp_path: Path) -> None:
    skillmerge.init(tmp_path / "one.yaml")
    beside = tmp_path / "skillmerge.schema.json"
    assert beside.read_text() == run_cli("schema").stdout
    assert json.loads(beside.read_text())["$schema"] == "http://json-schema.org/draft-07/schema#"
    beside.write_text("{}")
    skillmerge.init(tmp_path / "two.yaml", "past")
    assert beside.read_text() == "{}"
