"""Standard input and output as files, and what is suggested next."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from conftest import run_cli, weights

import skillmerge


def piped(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


def test_a_plan_goes_through_a_pipe(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = run_cli("plan", family, "-o", "-", "--set", "lam=0.5")
    assert plan.returncode == 0, plan.stderr
    piped(monkeypatch, plan.stdout)
    assert run_cli("apply", "-", "-o", tmp_path / "through").returncode == 0
    direct = skillmerge.apply(family, tmp_path / "direct", coefficients={"lam": 0.5})
    assert weights(tmp_path / "through") == weights(direct.output)


@pytest.mark.parametrize("command", ["plan -", "apply - -o merged"])
def test_an_empty_pipe_is_the_fault_of_what_writes_it(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    piped(monkeypatch, "\n")
    process = run_cli(*command.split(), cwd=tmp_path)
    assert (process.returncode, process.stderr) == (
        2, "error: standard input is empty\nhelp: check whether the command before the pipe failed\n"
    )  # fmt: skip


def test_standard_streams_are_no_folders_and_no_saved_plans(family: Path) -> None:
    process = run_cli("apply", family, "-o", "-")
    assert process.returncode == 2
    assert "error: the output is a folder, which cannot go to standard output\n" in process.stderr
    process = run_cli("plan", family, "--diff", "-")
    assert process.returncode == 2
    assert process.stderr.startswith("error: `--diff` takes a file, not standard input\n")


def test_extract_suggests_a_line_to_paste(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr("skillmerge.cli.commands.studying.suggest", shown.append)
    run_cli("extract", "--from", "rl", "--minus", "sft", "-o", "math", cwd=family.parent)
    assert shown == ['in a recipe, under `models`: skill: {skill: "./math"}']
    assert not os.path.isabs(shown[0].split('"')[1])
