"""The methods for people: what `skillmerge methods` says, all of it from docstrings, and that it is all there."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from conftest import run_cli

import skillmerge
from skillmerge.errors import UsageError
from skillmerge.methods.table import METHODS
from skillmerge.methods.terms import calls
from skillmerge.recipes.formula.bind import bind
from skillmerge.recipes.formula.catalog import NAMES, PARTS
from skillmerge.recipes.formula.parser import parse

EXPLAINED = skillmerge.list_methods().methods


def plain(text: str) -> str:
    return " ".join(text.split())


def test_each_method_of_the_table_is_listed_in_its_order() -> None:
    lines = run_cli("methods").stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(METHODS) == list(EXPLAINED)
    assert [line.split(maxsplit=1)[1] for line in lines] == [method.summary for method in METHODS.values()]
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("name", METHODS)
def test_docstring_has_every_part_and_names_every_keyword(name: str) -> None:
    method = EXPLAINED[name]
    assert method.summary.endswith(".")
    assert method.rule
    assert list(method.parts) == [part for part in PARTS if part in method.parts]
    assert {"When", "Not when", "Example"} <= set(method.parts)
    said = " ".join((*method.rule, method.parts["Example"], method.parts["When"]))
    inherited = {"ties"}  # it has the keywords of `trim` and `elect`
    missing = [it.name for it in method.keywords if not re.search(rf"\b{it.name}\b", said)]
    assert not missing or name in inherited


@pytest.mark.parametrize("name", METHODS)
def test_what_is_shown_is_the_docstring_and_the_call(name: str) -> None:
    method = EXPLAINED[name]
    parts = [f"{part}: {text}" for part, text in method.parts.items()]
    assert plain(METHODS[name].text) == " ".join((method.summary, *method.rule, *parts))
    shown = plain(re.sub(r"─+", "", run_cli("methods", name).stdout))
    table = (f"{it.name} {it.kind} {'required' if it.required else it.default or 'none'}" for it in method.keywords)
    head = ("keyword value default",) if method.keywords else ()
    takes = f"Takes {method.operands}."
    assert shown == plain(" ".join((method.usage, method.summary, *method.rule, takes, *head, *table, *parts)))


@pytest.mark.parametrize("name", METHODS)
def test_example_is_an_expression_that_calls_it(name: str) -> None:
    term = bind(parse(EXPLAINED[name].parts["Example"], NAMES.split(), ["lam"]), {"lam": 0.5})
    assert name in {call.method.name for call in calls(term)}


def test_keywords_have_kinds_and_defaults_as_recipes_write_them() -> None:
    drop = {keyword.name: keyword.as_dict() for keyword in EXPLAINED["drop"].keywords}
    assert drop["density"] == {"name": "density", "kind": "a number from 0 to 1", "required": True, "default": None}
    assert (drop["spread"]["required"], drop["spread"]["default"]) == (False, None)
    assert drop["seed"]["kind"] == "a whole number from 0 to 2^53"
    weights = next(it for it in EXPLAINED["elect"].keywords if it.name == "weights")
    assert (weights.kind, weights.default) == ("a number, or a list with one for each operand", "1")
    assert EXPLAINED["drop"].usage == "drop(v, density=, rescale=probability, [spread=], [seed=])"


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("tis", "did you mean `ties`?"),
        ("TIES", "did you mean `ties`?"),
        ("dare_ties", "write base + elect(drop(a - base, density=0.5), drop(b - base, density=0.5))"),
        ("arcee_fusion", "it is not offered: on updates of RL's size its scores are noise"),
        ("zzz", "`skillmerge methods` lists those that there are"),
    ],
)
def test_unknown_name_is_answered_with_what_to_write(name: str, fix: str) -> None:
    with pytest.raises(UsageError) as error:
        skillmerge.list_methods(name)
    assert (error.value.message, error.value.fix) == (f"no method is called `{name}`", fix)
    process = run_cli("methods", name, "--json")
    assert process.returncode == json.loads(process.stdout)["exit_status"] == 2


def test_methods_are_listed_without_torch() -> None:
    program = (
        "import sys; from skillmerge.cli.main import cli; cli.main(['methods', 'ties'], standalone_mode=False);"
        "print(*{'torch', 'numpy', 'huggingface_hub'} & set(sys.modules), file=sys.stderr)"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert process.stderr.split() == []
