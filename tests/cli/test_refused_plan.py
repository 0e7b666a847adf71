"""What is shown of a plan that cannot be applied, and of the models of a stored skill."""

from __future__ import annotations

import json
import os
import pty
import sys
from pathlib import Path

import pytest
from conftest import read_checkpoint, run_cli, write_checkpoint, write_family, write_recipe

import skillmerge
from skillmerge.cli import console as console_module
from skillmerge.cli.console import console


def without(folder: Path, part: str) -> None:
    """Take the tensors out of a checkpoint whose names have this part."""
    tensors = {name: tensor for name, tensor in read_checkpoint(folder).items() if part not in name}
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    write_checkpoint(folder, tensors)


def test_refused_plan_has_no_size_and_no_digest(tmp_path: Path) -> None:
    """Found by a newcomer: a model of 160 KB would be written in 3.6 KB, and `-q` printed the digest of such a plan."""
    recipe = write_family(tmp_path)
    without(tmp_path / "rl", "layers.1")
    shown, quiet = run_cli("plan", recipe), run_cli("plan", recipe, "-q")
    page = run_cli("plan", recipe, "--markdown", "-")
    for process in (shown, quiet, page):
        assert process.returncode == 4
        assert "lacks" in process.stdout
        assert "writes" not in process.stdout
        assert skillmerge.plan(recipe).digest not in process.stdout
    assert json.loads(run_cli("plan", recipe, "--json").stdout)["digest"] == skillmerge.plan(recipe).digest


def test_skill_is_one_model_in_a_plan(family: Path) -> None:
    """Found by a newcomer: `math:minus` stood in a plan, and nothing says what that is."""
    folder = family.parent
    skillmerge.extract(str(folder / "rl"), str(folder / "sft"), folder / "math")
    recipe = write_recipe(folder, "target + lam * math", models={"target": "target", "math": {"skill": "math"}})
    for options in ([], ["--markdown", "-"]):
        process = run_cli("plan", recipe, *options)
        assert ":minus" not in process.stdout
        assert "math, target" in process.stdout


def test_extract_advises_its_own_option(family: Path) -> None:
    folder = family.parent
    without(folder / "rl", ".mlp.")
    process = run_cli("extract", "--from", folder / "rl", "--minus", folder / "sft", "-o", folder / "math")
    assert process.returncode == 4
    assert process.stderr.endswith(
        "help: check that it is the right model, and complete. If the skill does not need those tensors, pass "
        "`--ignore GLOB` for each kind of name.\n"
    )


@pytest.mark.parametrize(("columns", "wide"), [(80, 80), (200, 120), (0, 120)])
def test_pipe_on_a_terminal_is_as_wide_as_the_terminal(
    columns: int, wide: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by a newcomer: `gate … | tail` printed 120 columns on a terminal of 80."""
    import fcntl
    import struct
    import termios

    monkeypatch.delenv("COLUMNS", raising=False)
    master, terminal = pty.openpty()
    reader, writer = os.pipe()
    try:
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        with os.fdopen(writer, "w") as piped, os.fdopen(terminal, "w") as shown:
            monkeypatch.setattr(sys, "stdout", piped)
            monkeypatch.setattr(sys, "stderr", shown)
            assert console().width == wide
            monkeypatch.setenv("COLUMNS", "90")
            assert console().width == 90
            monkeypatch.undo()
    finally:
        os.close(reader)
        os.close(master)


def test_file_is_wide_whatever_the_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    with open(tmp_path / "plan.txt", "w") as file:
        monkeypatch.setattr(sys, "stdout", file)
        monkeypatch.setattr(console_module.os, "get_terminal_size", lambda at: os.terminal_size((40, 24)))
        assert console().width == 120
        monkeypatch.undo()
