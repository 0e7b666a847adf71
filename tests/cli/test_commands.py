"""The command line as a person and as a pipeline meet it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import random_tensors, run_cli, run_process, tensor_shapes, write_checkpoint

import skillmerge
from skillmerge.cli.commands import starting
from skillmerge.errors import CheckFailed, UsageError
from skillmerge.study.loads.loading import check_load


def test_apply_reports_on_stdout_and_keeps_stderr_for_the_rest(family: Path) -> None:
    process = run_cli("apply", family)
    assert process.returncode == 0, process.stderr
    assert "effective λ" in process.stdout
    assert f"wrote {family.parent / 'merged'}" in process.stdout
    assert skillmerge.verify(family.parent / "merged").tensors == 12


def test_apply_prints_one_json_object(family: Path) -> None:
    process = run_cli("apply", family, "--json")
    document = json.loads(process.stdout)
    assert document["ok"]
    assert document["output"] == str(family.parent / "merged")
    assert {"plan_digest", "statistics", "files", "seconds", "warnings", "already"} <= document.keys()


def test_errors_are_json_too_and_say_the_status(family: Path) -> None:
    (family.parent / "rl" / "model-00001-of-00002.safetensors").write_bytes(b"short")
    process = run_cli("apply", family, "--json")
    document = json.loads(process.stdout)
    assert process.returncode == document["exit_status"] == 4
    assert not document["ok"]
    assert document["error"] == "InputError"
    assert "model-00001-of-00002.safetensors" in document["message"]


def test_refused_plan_is_json_with_its_error(family: Path) -> None:
    assert not {"exit_status", "message", "fix"} & json.loads(run_cli("plan", family, "--json").stdout).keys()
    shutil.rmtree(family.parent / "rl")
    write_checkpoint(family.parent / "rl", random_tensors(tensor_shapes(layers=1)))
    process = run_cli("plan", family, "--json")
    document = json.loads(process.stdout)
    assert process.returncode == document["exit_status"] == 4
    assert (document["ok"], document["error"], bool(document["problems"])) == (False, "InputError", True)
    assert document["problems"][0]["message"] in document["message"]
    assert document["fix"]


def test_same_command_again_has_nothing_to_do(family: Path) -> None:
    run_cli("apply", family)
    process = run_cli("apply", family)
    assert process.returncode == 0
    assert "nothing to do" in process.stdout


def test_existing_output_needs_overwrite(family: Path) -> None:
    run_cli("apply", family)
    process = run_cli("apply", family, "--set", "lam=0.5")
    assert process.returncode == 2
    assert "--overwrite" in process.stderr
    assert run_cli("apply", family, "--set", "lam=0.5", "--overwrite").returncode == 0


@pytest.mark.parametrize("value", ["lam", "lam=", "lam=high", "lam=nan", "lam=inf"])
def test_set_takes_name_and_finite_number(family: Path, value: str) -> None:
    process = run_cli("apply", family, "--set", value)
    assert process.returncode == 2
    assert "NAME=NUMBER" in process.stderr


def test_options_can_be_set_in_the_environment(family: Path) -> None:
    process = run_cli(
        "apply",
        family,
        SKILLMERGE_OUTPUT=str(family.parent / "other"),
        SKILLMERGE_SET="lam=0.25",
        SKILLMERGE_STATS="off",
    )
    assert process.returncode == 0, process.stderr
    manifest = json.loads((family.parent / "other" / "skillmerge.manifest.json").read_text())
    assert manifest["tensors"][0]["coefficients"] == [0.25]
    assert manifest["statistics"]["mode"] == "off"


def test_paths_of_a_recipe_start_at_its_own_folder(family: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert run_cli("apply", family, cwd=elsewhere).returncode == 0
    assert (family.parent / "merged").is_dir()
    assert run_cli("apply", family, "--output", "here", cwd=elsewhere).returncode == 0
    assert (elsewhere / "here").is_dir()


def test_quiet_says_nothing(family: Path) -> None:
    process = run_cli("apply", family, "-q")
    assert process.stdout == process.stderr == ""


def test_verbose_says_where_it_computes(family: Path) -> None:
    assert "computing on cpu: as requested" in run_cli("apply", family, "-v", "--device", "cpu").stderr


def test_device_that_is_not_there_is_a_usage_error(family: Path) -> None:
    process = run_cli("apply", family, "--device", "cuda:99")
    assert process.returncode == 2
    assert "CUDA devices" in process.stderr
    assert run_cli("apply", family, "--device", "tpu").returncode == 2


def test_output_that_would_replace_an_input_is_refused(family: Path) -> None:
    for place in (family.parent, family.parent / "rl", "/"):
        process = run_cli("apply", family, "--overwrite", "--output", place)
        assert process.returncode == 2
        assert "would replace" in process.stderr


def test_verify_passes_and_fails(family: Path) -> None:
    run_cli("apply", family)
    output = family.parent / "merged"
    process = run_cli("verify", output)
    assert process.returncode == 0
    assert "verified" in process.stdout
    assert json.loads(run_cli("verify", output, "--json").stdout)["tensors"] == 12
    (output / "stray.txt").write_text("x")
    assert run_cli("verify", output).returncode == 3
    assert run_cli("verify", family.parent / "nothing").returncode == 2


def test_demo_does_the_whole_job(tmp_path: Path) -> None:
    process = run_cli("demo", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    for phrase in (
        "target-sft",
        "merge: target + lam",
        "effective λ",
        "verified",
        "512 questions",
    ):
        assert phrase in process.stdout
    before, control, after = (
        float(re.search(rf"{name}.*?([\d.]+)% +([\d.]+)%", process.stdout)[2])  # type: ignore[index]
        for name in ("before", "shuffled", "with the skill ")
    )
    assert after > max(before, control) + 20
    assert skillmerge.verify(tmp_path / "skillmerge-demo" / "merged").files == 7
    assert {"questions.jsonl", "eval.py"} <= {path.name for path in (tmp_path / "skillmerge-demo").iterdir()}
    assert run_cli("demo", cwd=tmp_path).returncode == 2


def test_demo_replaces_the_status_of_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("skillmerge.cli.messages._shown", True)
    monkeypatch.setattr("sys.stdout", sys.stderr)
    (tmp_path / "recipe.yaml").write_text("skillmerge: 1")
    starting._show_family("demo", tmp_path / "recipe.yaml")
    assert capsys.readouterr().err.startswith("\r\x1b[KFour small trained models are in demo:")


def test_misspelt_command_and_option_are_usage_errors(family: Path) -> None:
    assert run_cli("aply", family).returncode == 2
    assert run_cli("apply", family, "--ovewrite").returncode == 2
    assert run_cli("apply").returncode == 2


def test_bug_is_told_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skillmerge.recipes.schema.schema", lambda: 1 / 0)
    process = run_cli("schema")
    assert process.returncode == 1
    assert "this is a bug in skillmerge" in process.stderr


def test_help_imports_nothing_heavy_and_is_quick() -> None:
    program = (
        "import sys, time; t = time.process_time(); sys.argv = ['skillmerge', '--help']\n"
        "import skillmerge.cli.main as c\n"
        "try: c.cli.main(standalone_mode=False)\n"
        "finally: print(time.process_time() - t, *sys.modules)"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    seconds, *loaded = process.stdout.splitlines()[-1].split()
    assert not {"torch", "transformers", "rich", "pydantic", "ruamel.yaml", "huggingface_hub", "numpy"} & set(loaded)
    assert float(seconds) < 0.2


def test_progress_off_a_terminal_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from skillmerge.cli import messages

    clock = iter([0.0, 10.0, 31.0, 40.0])
    monkeypatch.setattr(messages.time, "monotonic", lambda: next(clock))
    with messages.TerminalReporter(quiet=False, verbose=False).bar(1_000_000) as progress:
        progress(100_000)
        progress(310_000)
        progress(400_000)
    assert capsys.readouterr().err == "merging: 310.0 KB of 1.0 MB, 10.0 KB/s, 69 s left\n"


def test_finished_output_is_made_again_where_more_is_asked_of_it(family: Path) -> None:
    run_cli("apply", family, "--stats", "off")
    assert json.loads(run_cli("apply", family, "--stats", "off", "--json").stdout)["already"]
    again = json.loads(run_cli("apply", family, "--stats", "full", "--overwrite", "--json").stdout)
    assert (again["already"], again["statistics"]["mode"]) == (False, "full")
    assert run_cli("apply", family, "--stats", "full", "--hash-inputs").returncode == 2
    assert run_cli("apply", family, "--stats", "full", "--hash-inputs", "--overwrite").returncode == 0
    inputs = json.loads((family.parent / "merged" / "skillmerge.manifest.json").read_text())["inputs"]
    assert all(len(file["sha256"]) == 64 for item in inputs for file in item["files"])


# ---------------------------------------------------------------------------------- outputs that stand in the way


def test_overwrite_replaces_models_and_nothing_else(family: Path) -> None:
    thesis = family.parent / "home" / "docs" / "thesis.txt"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("years of work")
    process = run_cli("apply", family, "-o", family.parent / "home", "--overwrite")
    assert process.returncode == 2
    assert "holds no model" in process.stderr
    assert thesis.read_text() == "years of work"


def test_output_is_never_the_folder_one_stands_in(family: Path, tmp_path: Path) -> None:
    here = write_checkpoint(tmp_path / "here", random_tensors(tensor_shapes()))
    process = run_cli("apply", family, "-o", ".", "--overwrite", cwd=here)
    assert process.returncode == 2
    assert "the current folder" in process.stderr


def test_damaged_output_is_made_again_by_overwrite(family: Path) -> None:
    assert run_cli("apply", family).returncode == 0
    shard = next((family.parent / "merged").glob("*.safetensors"))
    good = shard.read_bytes()
    shard.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    process = run_cli("apply", family, "--overwrite")
    assert process.returncode == 0
    assert "nothing to do" not in process.stdout
    assert shard.read_bytes() == good
    assert "nothing to do" in run_cli("apply", family, "--overwrite").stdout


def test_saved_plan_replaces_only_a_plan(family: Path) -> None:
    text = family.read_text()
    process = run_cli("plan", family, "-o", family)
    assert process.returncode == 2
    assert family.read_text() == text
    for _ in range(2):
        assert run_cli("plan", family, "-o", family.parent / "plan.json").returncode == 0


@pytest.mark.parametrize("arguments", [("init", "no/such/r.yaml"), ("demo", "file"), ("demo", "file/inside")])
def test_place_that_cannot_be_written_is_a_usage_error(tmp_path: Path, arguments: tuple[str, str]) -> None:
    (tmp_path / "file").write_text("")
    process = run_cli(*arguments, cwd=tmp_path)
    assert process.returncode == 2
    assert "Traceback" not in process.stderr


def test_demo_beside_the_folder_one_stands_in(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    process = run_cli("demo", "../outer", cwd=tmp_path / "inner")
    assert process.returncode == 0, process.stderr
    assert "$ skillmerge verify ../outer/merged" in process.stdout


# ------------------------------------------------------------------------------------------- results and warnings


@pytest.mark.parametrize("keys", [{"lam": 0.0}, {"rl": "sft"}])
def test_merge_that_does_nothing_says_so(family: Path, keys: dict[str, object]) -> None:
    folder = family.parent
    if "rl" in keys:
        shutil.rmtree(folder / "rl")
        shutil.copytree(folder / "sft", folder / "rl")
    extra = ["--set", "lam=0"] if "lam" in keys else []
    warnings = json.loads(run_cli("apply", family, "--json", *extra).stdout)["warnings"]
    assert len(warnings) == 1
    assert "changed nothing" in warnings[0]


@pytest.mark.parametrize("arguments", [[], ["x.yaml", "--threads", "0"], ["x.yaml", "--set", "lam"], ["nope.yaml"]])
def test_every_error_is_one_json_object_where_that_is_asked(arguments: list[str]) -> None:
    process = run_cli("apply", *arguments, SKILLMERGE_JSON="1")
    document = json.loads(process.stdout)
    assert not document["ok"]
    assert document["exit_status"] == process.returncode == 2


@pytest.mark.parametrize("command", [["plan"], ["plan", "--json"], ["apply"], ["apply", "--json"]])
def test_reader_that_leaves_early_is_no_error(family: Path, command: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing) as pipe:
        process = subprocess.run(
            [sys.executable, "-m", "skillmerge", *command, str(family)], stdout=pipe, stderr=subprocess.PIPE
        )
    assert process.returncode == 0, process.stderr
    assert b"Traceback" not in process.stderr


def test_results_that_cannot_be_written(family: Path) -> None:
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [sys.executable, "-m", "skillmerge", "plan", str(family)], stdout=full, stderr=subprocess.PIPE
        )
    assert process.returncode == 5
    assert b"Traceback" not in process.stderr


def test_terminal_that_knows_only_ascii_gets_ascii(family: Path) -> None:
    process = run_process("plan", family, PYTHONIOENCODING="ascii")
    assert process.returncode == 0, process.stderr
    assert "reads " in process.stdout


def test_signs_that_a_terminal_lacks_are_spelled_and_json_stays_json(tmp_path: Path) -> None:
    process = run_process("plan", "λ…▁模😀.yaml", "--json", PYTHONIOENCODING="ascii", cwd=tmp_path)
    assert process.stderr.startswith("error: lambda...1\\u6a21\\U0001f600.yaml does not exist\n")
    assert json.loads(process.stdout)["message"] == "λ…▁模😀.yaml does not exist"


def test_control_characters_in_names_do_not_reach_the_terminal(family: Path) -> None:
    output = family.parent / "out\x1b[31m"
    assert "\x1b" not in run_cli("apply", family, "-o", output).stdout
    (output / "x\x1b]0;owned\x07").write_text("")
    process = run_cli("verify", output)
    assert process.returncode == 3
    assert "\x1b" not in process.stderr
    assert "\\x1b]0;owned" in process.stderr


def test_brackets_in_names_are_not_markup(tmp_path: Path) -> None:
    shapes = {"[red]w[/x]": (4, 4), "plain": (4, 4)}
    for seed, model in enumerate(("[red]t", "s", "r")):
        write_checkpoint(tmp_path / model, random_tensors(shapes, seed=seed), config={"model_type": "odd"})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text('skillmerge: 1\nmodels: {t: "[red]t", s: s, r: r}\nmerge: t + r - s\noutput: {path: out}\n')
    process = run_cli("plan", recipe)
    assert process.returncode == 0, process.stderr
    assert "[red]t" in process.stdout
    assert "[red]w[/x]" in process.stdout


# --------------------------------------------------------------------------------------------------- the same in Python


@pytest.mark.parametrize(
    "wrong",
    [{"threads": 0}, {"threads": -3}, {"device": "gpu"}, {"memory_limit": "2GB"}, {"stats": "all"},
     {"coefficients": {"lam": "0.5"}}, {"coefficients": {"lam": True}}],
)  # fmt: skip
def test_arguments_are_checked_before_any_work(family: Path, wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        skillmerge.apply(family, **wrong)  # type: ignore[arg-type]
    assert not list(family.parent.glob("merged*"))


def test_folder_one_stands_in_has_no_say_in_loading(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`verify --load` must not import what lies about."""
    output = skillmerge.apply(family).output
    for name in ("json", "transformers", "skillmerge"):
        (family.parent / f"{name}.py").write_text("raise SystemExit('taken over')")
    monkeypatch.chdir(family.parent)
    with pytest.raises(CheckFailed, match=r"model_type|Unrecognized|config\.json") as caught:
        check_load(output)
    assert "taken over" not in str(caught.value)


def test_folder_that_is_gone_is_told(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    command = f'cd "{gone}" && rmdir "{gone}" && exec "{sys.executable}" -m skillmerge lint recipe.yaml --sarif s.json'
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.run(["sh", "-c", command], capture_output=True, text=True, env=environment, check=False)
    assert process.returncode == 2, process.stderr
    assert "Traceback" not in process.stderr
