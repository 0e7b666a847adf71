"""Messages of sweeps: scores that are read again, narrow ranges, files that are replaced, what is missing."""

from __future__ import annotations

import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import run_cli

from skillmerge.cli.show.studying import apply_best
from skillmerge.errors import UsageError
from skillmerge.verbs.sweep.candidates import parse_axis
from skillmerge.verbs.sweep.sweep import sweep

SCORE = """\
import json, sys
found = json.load(open(sys.argv[1] + '/skillmerge.manifest.json'))['statistics']['all']
lam = found.get('asked_lambda') or 0
print(json.dumps({'skill': {'value': -abs(lam - float(sys.argv[2])), 'error': 0.1}}))
"""
"""A score that is best at a lambda of the command line, with an error that makes neighbors as good."""


def best_at(family: Path, lam: float) -> str:
    (family.parent / "score.py").write_text(SCORE)
    return f"{shlex.quote(sys.executable)} {family.parent}/score.py {{}} {lam}"


def test_sweep_says_what_it_did_not_score_again(family: Path) -> None:
    arguments = ("sweep", "recipe.yaml", "--set", "lam=0:1:0.25", "--score", "echo 1 #")
    assert run_cli(*arguments[:3], "lam=0,1", *arguments[4:], cwd=family.parent).stderr == ""
    for read in (2, 5):
        assert run_cli(*arguments, cwd=family.parent).stderr == (
            f"note: {read} of 5 candidates read from recipe.sweep/journal.jsonl; if the command changed, "
            "pass `--overwrite` to score them again\n"
        )
    assert run_cli(*arguments, "--overwrite", cwd=family.parent).stderr == ""


def test_sweep_names_the_smallest_within_noise_and_the_edge(family: Path) -> None:
    arguments = ("sweep", "recipe.yaml", "--set", "lam=0.25:1:0.25", "--score")
    process = run_cli(*arguments, best_at(family, 0.75), "-o", "inside", cwd=family.parent)
    assert process.stdout.splitlines()[-2:] == [
        "best: lam = 0.75, written to inside.best.yaml",
        "smallest within noise of the best: lam = 0.5",
    ]
    assert process.stderr == ""
    process = run_cli(*arguments, best_at(family, 2), "-o", "edge", cwd=family.parent)
    assert process.stderr == (
        "warning: the best `lam`, 1, is at the edge of what was tried\n"
        "help: try a wider range with `--set lam=START:STOP:STEP`\n"
    )


def test_best_recipe_claims_no_share_above_1(family: Path) -> None:
    found = sweep(family, ["lam=0,1"], "echo [1, 1, 1, 1] #")
    assert "# score = 1 ± 0.3 (95 %), the highest of 2 candidates" in found.best_recipe.read_text()


def test_edges_are_those_of_three_values_or_more() -> None:
    grid, pair, free = parse_axis("lam=0:2:0.3"), parse_axis("lam=0.5,1"), parse_axis("lam=0:2")
    assert [grid.has_at_its_edge(value) for value in (0, 0.3, 1.8)] == [False, False, True]
    assert not pair.has_at_its_edge(1)
    assert [free.has_at_its_edge(value) for value in (1.99, 2)] == [False, True]


def test_sweep_names_the_best_recipe_that_it_replaces(family: Path) -> None:
    arguments = ("sweep", "recipe.yaml", "--score", best_at(family, 0.5))
    assert run_cli(*arguments, "--set", "lam=0:1:0.25", cwd=family.parent).stderr == ""
    process = run_cli(*arguments, "--set", "lam=0,1", cwd=family.parent)
    assert process.stderr.splitlines()[-1] == "note: replaced recipe.best.yaml, which an earlier sweep wrote"


def test_next_command_writes_where_nothing_is(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(family.parent)
    found = sweep("recipe.yaml", ["lam=0,1"], "echo 1 #")
    assert apply_best(found) == "skillmerge apply recipe.best.yaml"
    Path("merged").mkdir()
    assert apply_best(found) == "skillmerge apply recipe.best.yaml -o merged-best"
    Path("merged-best").mkdir()
    assert apply_best(found) == "skillmerge apply recipe.best.yaml -o merged-2"


def test_sweep_that_cannot_start_makes_no_folder(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (family.parent / "free_score.py").write_text("def score(model):\n    return 1.0\n")
    monkeypatch.chdir(family.parent)
    absent = {"optuna", "transformers", "lm_eval"}
    for module in ("verbs.sweep.setting", "study.scoring.scorers"):
        monkeypatch.setattr(f"skillmerge.{module}.find_spec", lambda name: None if name in absent else find_spec(name))
    extra = "pip install 'skillmerge[{}]'"
    told = {
        ("echo 1 #", "tpe"): (
            "`--search tpe` needs the package optuna", f"{extra.format('sweep')}, or leave `--search` out"
        ),
        ("free_score:score", None): (
            "this score needs transformers", f"{extra.format('transformers')}, or score with a command"
        ),
        ("lm-eval:arc", None): ("`--score lm-eval` needs lm-evaluation-harness", extra.format("lm-eval")),
        ("qa:nothere", None): (
            "`--score`: file `nothere` does not exist",
            "check the path; paths start at the folder where you run the command",
        ),
    }  # fmt: skip
    for (score, search), (message, fix) in told.items():
        with pytest.raises(UsageError) as caught:
            sweep("recipe.yaml", ["lam=0:1" if search else "lam=0,1"], score, search=search)
        assert (caught.value.message, caught.value.fix) == (message, fix)
    assert not Path("recipe.sweep").exists()
