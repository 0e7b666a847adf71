"""The package's functions are the commands: their names, words, docstrings and results; and what importing costs."""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import click
import pytest
from conftest import run_cli

import skillmerge
from skillmerge.brief import brief
from skillmerge.cli.main import cli
from skillmerge.errors import UsageError

SCREEN = 24 * 80

SCALARS = {"str", "int", "float", "bool", "Path", "str | None", "Path | None", "float | None"}

TERMINAL = {
    "json", "quiet", "verbose", "report", "result_file", "events", "junit", "markdown", "sarif", "detailed_exitcode",
    "list", "dry_run",
}  # fmt: skip
"""Options that only concern the terminal and files about a run. Python has results, reporters, `Preview.done`, and
`rehearse_push`."""

WORDS = {
    "extract": {"from": "rl", "minus": "sft"},
    "init": {"from": "source"},
    "apply": {"set": "coefficients"},
    "plan": {"set": "coefficients"},
    "inspect": {"set": "coefficients"},
    "sweep": {"set": "axes"},
    "push": {"tag": "tags"},
    "sign": {"password_file": "password"},
    "attest": {"password_file": "password", "bom": "bom_file"},
}
"""Options whose parameters have another name, as `from` and `set` must, and several values are named in the plural."""

ONLY_PYTHON = {
    "apply": {"commits", "expected"},
    "sweep": {"finished"},
    "demo": {"finished"},
}
"""Parameters that no option sets, besides `reporter`."""

FUNCTIONS = {"import": "import_recipe", "methods": "list_methods"}
"""Commands whose function has another name: `import` is a word of Python, `skillmerge.methods` a package."""

ALSO = {"SkillmergeError", "__version__", "export_patch", "rehearse_push", "verify_signed"}
"""Public names that are no commands."""


def words(command: click.Command) -> set[str]:
    """A command's arguments and long options, as a parameter would be called."""
    found = set()
    for parameter in command.params:
        long = [name for name in parameter.opts if name.startswith("--")]
        found.add(long[0].removeprefix("--").replace("-", "_") if long else str(parameter.name))
    return found - {"help", "log_format", "details"}


def function_of(command: str) -> Callable[..., Any]:
    """The function that does what a command does."""
    return getattr(skillmerge, FUNCTIONS.get(command, command))  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------------ names


def test_every_command_is_a_function_and_nothing_else_is_public() -> None:
    assert set(skillmerge.__all__) == {FUNCTIONS.get(name, name) for name in cli.commands} | ALSO
    assert set(skillmerge.__all__) <= set(dir(skillmerge))
    assert len(skillmerge.__all__) == len(set(skillmerge.__all__))


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_function_is_called_what_the_package_calls_it(name: str) -> None:
    name = FUNCTIONS.get(name, name)
    function = getattr(skillmerge, name)
    assert inspect.isfunction(function)
    assert function.__name__ == function.__qualname__ == name
    assert function.__module__ == f"skillmerge.{skillmerge._HOMES[name]}"
    summary = (inspect.getdoc(function) or "").splitlines()[0]
    assert summary.endswith((".", ":", ";", "or")) or len(summary) > 60, summary
    assert inspect.signature(function).return_annotation is not inspect.Signature.empty


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(str(skillmerge.__file__)).read_text())
    (checked,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {}
    for node in checked.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            assert alias.asname == alias.name, "only a name that is imported as itself is exported to type checkers"
            seen[alias.name] = str(node.module).removeprefix("skillmerge.")
    assert seen == skillmerge._HOMES


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'skillmerge' has no attribute 'swep'"):
        skillmerge.swep  # noqa: B018


def test_no_module_takes_the_place_of_a_function() -> None:
    program = (
        "import pkgutil, importlib, skillmerge\n"
        "for module in pkgutil.walk_packages(skillmerge.__path__, 'skillmerge.'):\n"
        "    if not module.name.endswith(('__main__', 'load_probe', 'built_in')):\n"
        "        importlib.import_module(module.name)\n"
        "print(*[name for name in skillmerge._HOMES if not callable(getattr(skillmerge, name))])"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == ""


def test_names_cost_nothing_before_they_are_used() -> None:
    program = (
        "import sys, skillmerge; dir(skillmerge); print(*sys.modules)\n"
        "for name in skillmerge.__all__: getattr(skillmerge, name)\n"
        "print(*sys.modules)"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    before, after = (set(line.split()) for line in process.stdout.splitlines())
    assert {name for name in before if name.startswith("skillmerge")} == {"skillmerge", "skillmerge.version"}
    assert "dataclasses" not in before
    assert not {"torch", "transformers", "rich", "click"} & after


def test_the_package_runs_as_a_module() -> None:
    process = run_cli("--version")
    assert process.stdout.strip() == f"skillmerge, version {skillmerge.__version__}"


# ------------------------------------------------------------------------------------------------ words


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_function_has_the_words_of_its_command(name: str) -> None:
    other = WORDS.get(name, {})
    said = {other.get(word, word) for word in words(cli.commands[name]) - TERMINAL}
    parameters = set(inspect.signature(function_of(name)).parameters)
    assert said - parameters == set()
    assert parameters - said == ({"reporter"} & parameters) | ONLY_PYTHON.get(name, set())


def test_no_pair_of_words_is_left_over() -> None:
    for name, pairs in WORDS.items():
        assert set(pairs) <= words(cli.commands[name])
        assert not {*pairs, *pairs.values()} & TERMINAL
    assert {word for command in cli.commands.values() for word in words(command)} >= TERMINAL


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_defaults_are_those_of_the_command(name: str) -> None:
    parameters = inspect.signature(function_of(name)).parameters
    for option in cli.commands[name].params:
        parameter = parameters.get(str(option.name))
        default = option.to_info_dict()["default"]
        if parameter is None or parameter.default is parameter.empty or default in (None, "100%"):
            continue
        assert parameter.default == default, option.name


# ------------------------------------------------------------------------------------------------ results


@pytest.mark.parametrize("name", sorted(set(cli.commands) - {"init", "schema"}))
def test_result_is_frozen_short_and_plain(name: str) -> None:
    function = function_of(name)
    for word in inspect.signature(function).return_annotation.split(" | "):
        kind = getattr(sys.modules[function.__module__], word)
        assert is_dataclass(kind)
        assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
        assert inspect.signature(kind.as_dict).return_annotation == "dict[str, Any]"
        scalar = all(field.type in SCALARS for field in fields(kind))
        assert scalar or kind.__repr__ is brief, f"give {word} a short repr: __repr__ = brief"


def as_printed(document: Any) -> Any:
    return json.loads(json.dumps(document))


def test_results_are_what_json_prints(family: Path) -> None:
    """One run of each command that reads or writes a plain merge, beside the function's result."""
    output, skill = family.parent / "merged", family.parent / "skill"
    changing = {"seconds", "already", "disk_free"}
    rl, sft = str(family.parent / "rl"), str(family.parent / "sft")
    gates = family.parent / "gates.yaml"
    gates.write_text("gates: {vanished: {max: 1}}\n")
    cases: list[tuple[Callable[[], Any], list[Any]]] = [
        (lambda: skillmerge.plan(family), ["plan", family]),
        (lambda: skillmerge.apply(family), ["apply", family]),
        (lambda: skillmerge.verify(output), ["verify", output]),
        (lambda: skillmerge.gate(output, gates), ["gate", output, "--gates", gates]),
        (lambda: skillmerge.rebuild(output, check=True), ["rebuild", output, "--check"]),
        (lambda: skillmerge.attest(output), ["attest", output]),
        (lambda: skillmerge.extract(rl, sft, skill), ["extract", "--from", rl, "--minus", sft, "-o", skill]),
        (lambda: skillmerge.verify(skill, parent=rl), ["verify", skill, "--parent", rl]),
        (lambda: skillmerge.inspect(skill), ["inspect", skill]),
        (lambda: skillmerge.lint(family), ["lint", family]),
        (lambda: skillmerge.list_methods("ties"), ["methods", "ties"]),
    ]
    for function, arguments in cases:
        result = function()
        printed = json.loads(run_cli(*arguments, "--json").stdout)
        assert printed.pop("ok") is True, arguments
        kept, expected = ({key: value for key, value in it.items() if key not in changing}
                          for it in (printed, as_printed(result.as_dict())))  # fmt: skip
        assert kept == expected, arguments
        assert list(printed) == list(result.as_dict()), arguments
        assert is_dataclass(result)
        assert len(repr(result)) < SCREEN, arguments
        assert repr(result).startswith(f"{type(result).__name__}(")
        with pytest.raises(AttributeError):
            setattr(result, fields(result)[0].name, None)


def test_brief_counts_what_is_long(family: Path) -> None:
    plan = skillmerge.plan(family)
    assert repr(plan).startswith("Preview(recipe=Recipe(…), inputs=[3 items], donor='target', coefficients=[1 item], ")
    assert "tensors={12 items}" in repr(plan)
    assert len(brief(plan)) < 1000
    result = skillmerge.apply(family)
    assert f"output='{result.output}'" in repr(result) or "…'" in repr(result)
    assert "plan=Plan(recipe=" in repr(result)


# ------------------------------------------------------------------------------------------------ work of commands


def test_plan_saves_and_compares(family: Path) -> None:
    saved = family.parent / "plan.json"
    first = skillmerge.plan(family, save=saved, memory_limit=2 << 30, threads=2)
    assert first.ok
    assert (first.needs.threads, first.changes, first.done) == (2, None, False)
    assert json.loads(saved.read_text()) == {"ok": True, **as_printed(first.as_dict())}
    second = skillmerge.plan(family, coefficients={"lam": 0.5}, diff=saved)
    assert second.changes == (*second.as_dict()["changes"],)
    assert any(change.startswith("lam: 0.7 before, 0.5 now") for change in second.changes)
    assert skillmerge.plan(family, diff=saved).changes == ()
    assert skillmerge.apply(saved).plan is not None
    assert skillmerge.plan(family).done


def test_plan_is_not_saved_over_something_else(family: Path) -> None:
    text = family.read_text()
    with pytest.raises(UsageError, match="is not a saved plan"):
        skillmerge.plan(family, save=family)
    assert family.read_text() == text


def test_init_writes_a_recipe_that_lint_reads(tmp_path: Path) -> None:
    path = skillmerge.init(tmp_path / "recipe.yaml")
    assert skillmerge.lint(path).findings == skillmerge.lint([path]).findings == ()
    with pytest.raises(UsageError, match="already exists"):
        skillmerge.init(path)


def test_lint_fails_on_warnings_where_it_is_strict(family: Path, edit: Callable[..., Path]) -> None:
    edit(family, coefficients={"lam": 0.7, "unused": 1.0})
    assert skillmerge.lint(family).ok
    assert skillmerge.lint(family).count("warning") == 1
    assert not skillmerge.lint(family, strict=True).ok


def test_schema_is_what_the_command_prints() -> None:
    assert json.loads(run_cli("schema").stdout) == skillmerge.schema()


def test_export_says_which_of_two_forms(tmp_path: Path) -> None:
    for given in ({}, {"lora_rank": 4, "onto": "sft"}):
        with pytest.raises(UsageError, match="no format was given"):
            skillmerge.export(tmp_path / "skill", tmp_path / "out", **given)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="`--base` applies only to adapters"):
        skillmerge.export(tmp_path / "skill", tmp_path / "out", onto="sft", base="base")


def test_rebuild_says_which_of_two_works(tmp_path: Path) -> None:
    for given in ({}, {"check": True, "output": tmp_path / "out"}):
        with pytest.raises(UsageError, match="either `check` or `output`"):
            skillmerge.rebuild(tmp_path, **given)  # type: ignore[arg-type]


def test_export_writes_both_forms(family: Path, tmp_path: Path) -> None:
    rl, sft = str(family.parent / "rl"), str(family.parent / "sft")
    skill = skillmerge.extract(rl, sft, tmp_path / "skill").output
    adapter = skillmerge.export(skill, tmp_path / "adapter", lora_rank=4)
    patch = skillmerge.export(skill, tmp_path / "patch", onto=sft)
    assert (type(adapter).__name__, type(patch).__name__) == ("Exported", "Patch")
    assert skillmerge.export_patch(skill, tmp_path / "again", onto=sft).elements == patch.as_dict()["elements"]
    assert max(map(len, map(repr, (adapter, patch)))) < SCREEN


def test_demo_gives_its_parts_as_they_are_there(tmp_path: Path) -> None:
    parts: list[Any] = []
    demo = skillmerge.demo(tmp_path / "demo", finished=parts.append)
    assert parts == [demo.recipe, demo.result, demo.verdict]
    before, control, after = (answer.greedy for answer in demo.answers)
    assert after > max(before, control) + 0.2
    assert len(repr(demo)) < 3 * SCREEN
    assert [answer["model"] for answer in demo.as_dict()["answers"]] == [answer.name for answer in demo.answers]
    with pytest.raises(UsageError, match="already exists"):
        skillmerge.demo(tmp_path / "demo")
