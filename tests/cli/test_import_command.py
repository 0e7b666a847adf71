"""The command import: where its recipe, its messages and its statuses go."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import run_cli

TIES = """\
merge_method: ties
base_model: ./base
models:
  - model: ./a
    parameters: {weight: 1, lambda: 0.5}
dtype: bfloat16
"""
RECIPE = """\
# ties, from m.yml
# warning: mergekit computes in bfloat16; skillmerge computes in float32 and rounds once (line 6)
# note: `lambda` 0.5 under `models` does nothing in mergekit; move it if it was meant (line 5)
skillmerge: 1
models:
  base: ./base
  a: ./a
merge: base + elect(a - base)
output: {path: ./merged, dtype: bfloat16}
"""
WARNING = "warning: mergekit computes in bfloat16; skillmerge computes in float32 and rounds once (line 6)\n"
NOTE = "note: `lambda` 0.5 under `models` does nothing in mergekit; move it if it was meant (line 5)\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "m.yml").write_text(TIES)
    return tmp_path


def test_recipe_goes_to_standard_output_and_messages_do_not(folder: Path) -> None:
    for more in ((), ("-o", "-")):
        process = run_cli("import", "m.yml", *more, cwd=folder)
        assert (process.returncode, process.stdout, process.stderr) == (0, RECIPE, WARNING + NOTE)
    assert run_cli("import", "m.yml", "-q", cwd=folder).stderr == WARNING


def test_recipe_is_written_and_plans_next(folder: Path) -> None:
    process = run_cli("import", "m.yml", "-o", "r.yaml", cwd=folder)
    assert (process.returncode, process.stdout) == (0, "wrote r.yaml\n")
    assert process.stderr == WARNING + NOTE
    assert (folder / "r.yaml").read_text() == RECIPE
    process = run_cli("import", "m.yml", "-o", "r.yaml", cwd=folder)
    assert process.returncode == 2
    assert process.stderr == (
        "error: `r.yaml` already exists\n"
        "help: pass `--overwrite` to replace it, or choose another file with `--output`\n"
    )
    assert run_cli("import", "m.yml", "-o", "r.yaml", "--overwrite", cwd=folder).returncode == 0


def test_strict_fails_on_warnings_and_writes_nothing(folder: Path) -> None:
    process = run_cli("import", "m.yml", "-o", "r.yaml", "--strict", cwd=folder)
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr == f"{WARNING}{NOTE}error: 1 warning under --strict\n"
    assert not (folder / "r.yaml").exists()


def test_json_has_the_recipe(folder: Path) -> None:
    process = run_cli("import", "m.yml", "--json", cwd=folder)
    assert json.loads(process.stdout) == {
        "ok": True, "file": "m.yml", "method": "ties", "output": None, "recipe": RECIPE,
        "warnings": [WARNING.removeprefix("warning: ").strip()], "notes": [NOTE.removeprefix("note: ").strip()],
    }  # fmt: skip


def test_init_translates_too(folder: Path) -> None:
    assert run_cli("init", "-", "--from", "m.yml", cwd=folder).stdout == RECIPE
    assert run_cli("init", "r.yaml", "--from", "m.yml", cwd=folder).returncode == 0
    assert (folder / "r.yaml").read_text().partition("\n")[2] == RECIPE


def test_refusal_shows_the_line(folder: Path) -> None:
    (folder / "m.yml").write_text("merge_method: arcee_fusion\nmodels: [{model: ./a}]\nbase_model: ./b\n")
    process = run_cli("import", "m.yml", cwd=folder)
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr == (
        "error: m.yml:1:1: arcee_fusion is not offered: on updates of RL's size its float32 scores are noise\n"
        "    1 | merge_method: arcee_fusion\n      | ^^^^^^^^^^^^\nhelp: use `ram` or `ties`\n"
    )


def test_file_that_is_not_there_or_not_of_mergekit(folder: Path) -> None:
    process = run_cli("import", "n.yml", cwd=folder)
    assert process.stderr == "error: n.yml does not exist\nhelp: name a mergekit file\n"
    assert "did you mean `m.yml`?" in run_cli("import", "m.yaml", cwd=folder).stderr
    (folder / "x.yml").write_text("a: 1\n")
    assert run_cli("import", "x.yml", cwd=folder).returncode == 2
    (folder / "e.yml").write_text("# nothing\n")
    assert run_cli("import", "e.yml", cwd=folder).stderr == "error: e.yml: is empty\nhelp: name a mergekit file\n"
