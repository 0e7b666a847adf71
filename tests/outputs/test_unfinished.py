"""Unfinished runs: what is said of them to those who take them for outputs."""

from __future__ import annotations

from pathlib import Path

from conftest import run_cli


def test_an_unfinished_run_is_no_output(tmp_path: Path) -> None:
    (tmp_path / "merged.partial" / "files").mkdir(parents=True)
    process = run_cli("verify", "merged", cwd=tmp_path)
    assert (process.returncode, process.stderr) == (
        2,
        "error: folder merged does not exist, but merged.partial is an unfinished run\n"
        "help: run `skillmerge apply` again to finish it\n",
    )
    process = run_cli("verify", "merged.partial", cwd=tmp_path)
    assert (process.returncode, process.stderr) == (
        3,
        "error: merged.partial is an unfinished run, not an output\nhelp: run `skillmerge apply` again to finish it\n",
    )
