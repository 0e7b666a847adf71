"""Standard input and output as files, and what is suggested next."""

from __future__ import annotations

import io
import json
import os
import shlex
import sys
import xml.etree.ElementTree as xml
from pathlib import Path

import pytest
from conftest import run_cli, run_process, weights

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


def test_sweep_of_standard_input_writes_files_with_plain_names(
    family: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    piped(monkeypatch, family.read_text())
    score = f"{shlex.quote(sys.executable)} -c 'print(1)' {{}}"
    process = run_cli("sweep", "-", "--set", "lam=0.5,1", "--score", score, "-q", cwd=family.parent)
    assert process.returncode == 0, process.stderr
    assert (family.parent / "recipe.best.yaml").is_file()
    assert (family.parent / "recipe.sweep" / "results.json").is_file()
    assert not list(family.parent.glob("-*"))


def test_quiet_sweep_suggests_nothing(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr("skillmerge.cli.commands.studying.suggest", shown.append)
    command = ("sweep", family, "--set", "lam=0.5,1", "--score", f"{shlex.quote(sys.executable)} -c 'print(1)' {{}}")
    assert run_cli(*command, "-q").returncode == 0
    assert not shown
    assert run_cli(*command).returncode == 0
    assert shown


def test_pipes_are_utf_8_whatever_the_terminal_is(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.rename(family.parent / "rl", family.parent / "λ")
    text = family.read_text().replace('"rl": "rl"', '"rl": "λ"').encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text), encoding="latin-1"))
    assert run_cli("plan", "-", "--markdown", "-", cwd=family.parent).returncode == 0
    family.write_bytes(text)
    piped = [
        run_process("plan", family, "--markdown", "-", PYTHONIOENCODING=encoding).stdout
        for encoding in ("utf-8", "latin-1")
    ]
    assert "`λ`" in piped[0].replace(str(family.parent) + "/", "")
    assert piped[0].partition("disk free")[0] == piped[1].partition("disk free")[0]


def test_closed_standard_input_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    process = run_cli("plan", "-")
    assert (process.returncode, process.stderr) == (
        2, "error: standard input is closed\nhelp: name a recipe file\n"
    )  # fmt: skip


def test_mergekit_file_can_come_through_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    piped(monkeypatch, "merge_method: passthrough\nmodels: [{model: org/a}]\n")
    process = run_cli("init", "-", "--from", "-")
    assert process.returncode == 0, process.stderr
    assert "skillmerge: 1\nmodels:\n  a: hf://org/a\nmerge: a\n" in process.stdout


def test_documents_for_programs_go_to_standard_output_alone(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(family.parent)
    document = json.loads(family.read_text()) | {"gates": {"changed": {"max": 0.0}}}
    family.write_text(json.dumps(document))
    for option in ("--junit", "--events", "--report", "--result-file"):
        process = run_cli("apply", family, option, "-")
        assert process.returncode == 3
        if option == "--events":
            assert [json.loads(line)["event"] for line in process.stdout.splitlines()][-1] == "failed"
        elif option == "--junit":
            assert xml.fromstring(process.stdout).get("failures") == "1"
        elif option == "--report":
            assert process.stdout.rstrip().endswith("</html>")
        else:
            assert json.loads(process.stdout)["gates"][0]["passed"] is False
    assert not Path("-").exists()


@pytest.mark.parametrize(
    "command",
    [
        "attest merged -o -",
        "attest merged --bom -",
        "sign merged --private-key key.pem --signature -",
        "sweep recipe.yaml --set lam=0,1 --score true -o -",
    ],
)
def test_what_cannot_be_printed_is_refused(command: str, tmp_path: Path) -> None:
    process = run_cli(*command.split(), cwd=tmp_path)
    assert process.returncode == 2
    assert " cannot write to standard output\nhelp: name a file with `--" in process.stderr
