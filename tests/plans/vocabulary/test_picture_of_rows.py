"""How a plan shows rows by token: in a terminal, as Markdown, in the report, as JSON, and on the model card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import run_cli, write_recipe
from test_rows_by_hand import write_models
from token_rows import BASE, Words, by_token

import skillmerge
from skillmerge.outputs.hub.card import write_card
from skillmerge.outputs.output import Output
from skillmerge.recipes.recipe import Push

MIXED: tuple[Words, Words, Words] = (
    [*BASE, "<tool>", "<think>", None, None],
    ["<think>", *BASE, "</think>", *[f"<{number}>" for number in range(12)]],
    [*BASE, None, "<tool>", "<think>"],
)
TABLE = """\
 tokens           same   moved   only here   only there   padding
 ────────────────────────────────────────────────────────────────
 target (donor)     10       -           -            -         2
 rl                  0       9           1           13         0
 sft                 8       2           0            0         1
"""
LINES = """\
lm_head.weight, model.embed_tokens.weight: 9 of 12 rows merged by token, 3 as in `target`
moved in `rl`: a (1, here 0), b (2, here 1), c (3, here 2), d (4, here 3), e (5, here 4), f (6, here 5), \
g (7, here 6), h (8, here 7), …
not in `rl`: <tool>
only in `rl`: </think>, <0>, <1>, <2>, <3>, <4>, <5>, <6>, …
moved in `sft`: <tool> (9, here 8), <think> (10, here 9)
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    write_models(tmp_path, MIXED)
    return write_recipe(tmp_path, **by_token())


def test_plan_shows_what_is_the_same_what_moved_and_what_is_on_one_side(recipe: Path) -> None:
    shown = run_cli("plan", recipe, COLUMNS="80")
    assert shown.returncode == 0, shown.stderr
    text = "\n".join(line.rstrip() for line in shown.stdout.splitlines()) + "\n"
    assert TABLE in text
    assert LINES in text
    assert "compared target, rl, sft: configuration, tokenizer (rows by token), chat template" in text


def test_markdown_shows_the_same(recipe: Path, tmp_path: Path) -> None:
    run_cli("plan", recipe, "--markdown", tmp_path / "plan.md")
    page = (tmp_path / "plan.md").read_text()
    assert "| tokens | same | moved | only here | only there | padding |" in page
    assert "| `rl` | 0 | 9 | 1 | 13 | 0 |" in page
    assert "- ``not in `rl`: <tool>``" in page


def test_report_shows_the_same(recipe: Path, tmp_path: Path) -> None:
    assert run_cli("plan", recipe, "--report", tmp_path / "plan.html").returncode == 0
    page = (tmp_path / "plan.html").read_text()
    assert "<h3>Rows by token</h3>" in page
    assert "only in <code>rl</code>: &lt;/think&gt;, &lt;0&gt;" in page


def test_json_and_manifest_hold_the_same(recipe: Path, tmp_path: Path) -> None:
    planned = json.loads(run_cli("plan", recipe, "--json").stdout)["vocabulary"]
    assert planned["rows"] == "by-token"
    assert planned["models"]["sft"] == {
        "same": 8, "moved": 2, "only_donor": 0, "only_model": 0, "padding": 1,
        "examples": {
            "moved": [{"token": "<tool>", "donor": 8, "model": 9}, {"token": "<think>", "donor": 9, "model": 10}],
            "only_donor": [], "only_model": [],
        },
    }  # fmt: skip
    assert set(planned["matrices"]) == {"lm_head.weight", "model.embed_tokens.weight"}
    output = skillmerge.apply(recipe, tmp_path / "out").output
    assert json.loads((tmp_path / "out" / "skillmerge.manifest.json").read_text())["vocabulary"] == planned
    card = write_card(Output.open(output).manifest, Push("acme/merged"), "mit")
    assert "## Rows by token\n\nTokens that a parent lacks, and padding, have the rows of `target`.\n" in card
    assert "| lm_head.weight | 12 | 9 | 3 | - |" in card


def test_tokens_of_a_stranger_are_text_and_nothing_else(tmp_path: Path) -> None:
    """Line ends, control characters, half of a pair of surrogates, what turns the line around, and very long ones."""
    odd = ["<\nproblem: x>", "<\x1b[31m>", "<\ud800>", "<\u202ex>", "<\u2028>", "<" + "y" * 1_000_000 + ">"]
    write_models(tmp_path, (BASE, [*BASE, *odd], BASE))
    recipe = write_recipe(tmp_path, **by_token())
    shown = run_cli("plan", recipe)
    line = next(line for line in shown.stdout.splitlines() if line.startswith("only in `rl`"))
    assert line == r"only in `rl`: <\nproblem: x>, <\x1b[31m>, <\ud800>, <\u202ex>, <\u2028>, <yyyyyyyyyyyyyyyyyyyyyy…"
    output = skillmerge.apply(recipe, tmp_path / "out").output
    assert skillmerge.verify(output).tensors == 3


def test_donors_rows_are_named_where_there_are_any(tmp_path: Path) -> None:
    write_models(tmp_path, (BASE, [*BASE, "<x>"], BASE))
    shown = run_cli("plan", write_recipe(tmp_path, **by_token())).stdout
    assert "lm_head.weight, model.embed_tokens.weight: 8 of 8 rows merged by token\n" in shown


def test_nothing_is_shown_by_id(tmp_path: Path) -> None:
    write_models(tmp_path, (BASE, BASE, BASE))
    recipe = write_recipe(tmp_path)
    assert "padding" not in run_cli("plan", recipe).stdout
    assert "vocabulary" not in json.loads(run_cli("plan", recipe, "--json").stdout)
