"""What exists is documented: every command, option, exit status and recipe key is in README or docs."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import click
import pytest

from skillmerge import errors
from skillmerge.cli.main import cli
from skillmerge.cli.show.figures import FIGURES, FORECAST, SPECTRAL
from skillmerge.recipes.mergekit.methods import METHODS
from skillmerge.recipes.schema import schema as recipe_schema

ROOT = Path(__file__).parent.parent
HOOKS = runpy.run_path(str(ROOT / "docs" / "hooks.py"))
DOCUMENTED = (ROOT / "README.md").read_text() + "".join(
    HOOKS["with_generated"](path.read_text()) for path in sorted((ROOT / "docs").glob("*.md"))
)


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_command_and_its_options_are_documented_and_explained(name: str) -> None:
    command = cli.commands[name]
    (text,) = re.findall(rf"^### skillmerge {name}\n\n```text\n(.*?)^```$", DOCUMENTED, re.M | re.S)
    assert command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option) and parameter.name != "help":
            assert parameter.help, parameter.name
            long = next(option for option in parameter.opts if option.startswith("--"))
            assert long in text, long
            assert parameter.envvar == "SKILLMERGE_" + long.removeprefix("--").replace("-", "_").upper()


def test_options_with_a_note_are_there() -> None:
    known = {
        option
        for command in cli.commands.values()
        for parameter in command.params
        for option in parameter.opts + parameter.secondary_opts
    }
    notes = (ROOT / "docs" / "commands.md").read_text().split("## Notes on options")[1].split("\n## ")[0]
    noted = re.findall(
        r"`(--[\w-]+)", "".join(line.split("|")[1] for line in notes.splitlines() if line.startswith("| `"))
    )
    assert len(noted) > 20
    assert [option for option in noted if option not in known] == []


def test_commands_in_the_docs_exist() -> None:
    """Every `skillmerge NAME --option` in code, wherever it is."""
    found = re.findall(r"(?:\$ |`|&& |\| )skillmerge ([a-z]\w*)\b([^`|&;>\n]*)", DOCUMENTED)
    assert len(found) > 150
    wrong = []
    for name, rest in found:
        command = cli.commands.get(name)
        known = {option for each in command.params for option in each.opts + each.secondary_opts} if command else set()
        used = re.findall(r"(?<=\s)--?[a-z][\w-]*", rest)
        wrong += [f"{name} {option}" for option in used if option not in known | {"-h", "--help"}]
        wrong += [] if command else [name]
    assert wrong == []


def test_every_figure_is_documented() -> None:
    for key, figure in {**FIGURES, **SPECTRAL, **FORECAST}.items():
        assert f"| {figure.label} | `{key}` |" in DOCUMENTED, key


def test_every_key_of_a_recipe_is_documented() -> None:
    schema = recipe_schema()
    keys = set(schema["properties"])
    for table in schema["definitions"].values():
        keys |= set(table.get("properties", {}))
    assert len(keys) > 15
    assert [key for key in sorted(keys) if f"`{key}`" not in DOCUMENTED and f"{key}:" not in DOCUMENTED] == []


def test_every_exit_status_is_documented() -> None:
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.SkillmergeError)
    ]
    statuses = {kind.exit_status for kind in kinds} | {0, 130, 143}
    assert statuses >= {1, 2, 3, 4, 5, 6, 7, 75}
    assert [status for status in statuses if f"| {status} |" not in DOCUMENTED] == []


def test_tests_of_the_threat_model_exist() -> None:
    tests = {path.relative_to(ROOT / "tests").with_suffix("") for path in (ROOT / "tests").rglob("test_*.py")}
    named = re.findall(r"`((?:torture/)?test_\w+)`", (ROOT / "docs" / "threat-model.md").read_text())
    assert len(named) > 30
    assert [name for name in named if not any(str(path).endswith(name) for path in tests)] == []


def test_methods_of_mergekit_are_on_its_page() -> None:
    page = (ROOT / "docs" / "mergekit.md").read_text()
    rows = page.split("## Method by method")[1].split("\n## ")[0]
    named = {
        name
        for line in rows.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`([a-z_]+)`", line.split("|")[1])
    }
    assert named == {*METHODS, "arcee_fusion"}


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/*.md")), ids=lambda page: page.stem)
def test_page_holds_its_generated_text(page: Path) -> None:
    """Found by a newcomer: read in the repository, pages were empty. `python docs/hooks.py` writes them again."""
    text = page.read_text()
    assert HOOKS["written_again"](text) == text
    ends = set(re.findall(r"^<!-- end of (\w+) -->$", text, re.MULTILINE))
    assert {name for name in HOOKS["COMMITTED"] if f"\n<!-- {name} -->\n" in text} <= ends
