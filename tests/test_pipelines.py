"""The examples of docs/pipelines.md: each is what its reader takes, and the scripts do what is said of them."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import click
import pytest
from action_runner import load_yaml
from command_server import Commands
from schemas import fits

from skillmerge import errors
from skillmerge.cli.main import cli

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "pipelines.md").read_text()
EXAMPLES = re.findall(r"^```(?:yaml|python|bash)\n(.*?)^```$", TEXT, re.M | re.S)


def example(name: str) -> str:
    """The example whose first comment is the name of its file."""
    (found,) = [text for text in EXAMPLES if f"# {name}\n" in text]
    return found


def commands() -> list[list[str]]:
    """Every call of skillmerge in the page, as words."""
    joined = re.sub(r"\\\n\s*", " ", TEXT)
    found = []
    for line in re.findall(r"(?:^|[\s`(])(skillmerge (?:lint|plan|apply|verify) [^`\n&|]*)", joined):
        found.append(shlex.split(line.replace('"$RECIPE"', "RECIPE").split(" #")[0].rstrip("\"'), ")))
    return found


@pytest.mark.parametrize("name", [".github/workflows/merge-plan.yml", ".github/workflows/merge-apply.yml"])
def test_github_workflow_fits_the_published_schema_and_the_action(name: str) -> None:
    workflow = load_yaml(example(name))
    fits(workflow, "vendor.github-workflows")
    action = load_yaml((ROOT / "action.yml").read_text())
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    own = [step for step in steps if "skillmerge@" in step.get("uses", "")]
    assert own
    for step in own:
        assert set(step["with"]) <= set(action["inputs"])
    for used in re.findall(r"steps\.merge\.outputs\.(\w+)", example(name)):
        assert used in action["outputs"]
    assert not any("${{" in step.get("run", "") for step in steps)
    assert all(job["timeout-minutes"] for job in workflow["jobs"].values())


def test_every_input_and_output_of_the_action_is_documented() -> None:
    action = load_yaml((ROOT / "action.yml").read_text())
    assert set(action["inputs"]) == set(re.findall(r"^\| `([\w-]+)` \|", TEXT, re.M))
    outputs = re.search(r"^Outputs: (.*)\.$", TEXT, re.M)
    assert outputs is not None
    assert set(re.findall(r"`(\w+)`", outputs[1])) == set(action["outputs"])


def test_gitlab_pipeline_fits_the_published_schema() -> None:
    pipeline = load_yaml(example(".gitlab-ci.yml"))
    fits(pipeline, "vendor.gitlab-ci")
    assert pipeline["apply"]["needs"] == ["plan"]
    assert 75 in pipeline["apply"]["retry"]["exit_codes"]


def test_argo_workflow_has_only_fields_that_argo_knows() -> None:
    models = pytest.importorskip("hera.workflows.models")
    workflow = load_yaml(example("argo-workflow.yaml"))
    read = models.Workflow.model_validate(workflow)
    assert _plain(json.loads(read.model_dump_json(by_alias=True, exclude_unset=True))) == _plain(workflow)
    templates = {template["name"] for template in workflow["spec"]["templates"]}
    steps = [step for group in workflow["spec"]["templates"][0]["steps"] for step in group]
    assert {step["template"] for step in steps} <= templates
    assert workflow["spec"]["entrypoint"] in templates


def _plain(value: Any) -> Any:
    """Quantities and counts compare as text; a group of parallel steps is a list, however it is wrapped."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else str(value)


def test_pre_commit_configuration_names_a_hook_that_exists() -> None:
    clientlib = pytest.importorskip("pre_commit.clientlib")
    (hook,) = clientlib.load_manifest(str(ROOT / ".pre-commit-hooks.yaml"))
    (repo,) = load_yaml(example(".pre-commit-config.yaml"))["repos"]
    assert [each["id"] for each in repo["hooks"]] == [hook["id"]]


def test_every_command_of_the_page_is_one() -> None:
    found = commands()
    assert len(found) >= 12
    for words in found:
        command = cli.commands[words[1]]
        known = {name for parameter in command.params if isinstance(parameter, click.Option) for name in parameter.opts}
        used = {word.split("=")[0] for word in words[2:] if word.startswith("-") and word != "-"}
        assert used <= known, words


def test_every_exit_status_is_explained_to_schedulers() -> None:
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.SkillmergeError)
    ]
    for status in {kind.exit_status for kind in kinds} | {0, 10, 130, 143}:
        assert re.search(rf"^\| (\d+, )?{status}[ ,]", TEXT, re.M), status


class Airflow(Exception):
    pass


class AirflowFail(Exception):
    pass


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("exit 0", None),
        ("exit 75", Airflow),
        ("exit 143", Airflow),
        ("kill -TERM $$", Airflow),
        ("exit 4", AirflowFail),
    ],
)
def test_airflow_task_is_retried_where_that_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, error: type[Exception] | None
) -> None:
    source = example("dags/merge_release.py")
    compile(source, "merge_release.py", "exec")
    body = re.search(r"^AGAIN.*?(?=^@dag)", source, re.M | re.S)
    assert body is not None
    names: dict[str, Any] = {
        "subprocess": subprocess, "AirflowException": Airflow, "AirflowFailException": AirflowFail
    }  # fmt: skip
    exec(body[0], names)
    _program(tmp_path, "skillmerge", script)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    if error is None:
        names["skillmerge"]("plan")
    else:
        with pytest.raises(error):
            names["skillmerge"]("plan")


def _program(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{script}\n")
    (folder / name).chmod(0o755)


def slurm(tmp_path: Path, script: str, restarts: int = 0) -> subprocess.Popen[str]:
    """The batch script, with programs of its own in the place of skillmerge and scontrol."""
    _program(tmp_path, "skillmerge", script)
    _program(tmp_path, "scontrol", f'echo "$@" > {tmp_path}/requeued')
    batch = tmp_path / "job.sbatch"
    batch.write_text(example("merge-release.sbatch"))
    assert subprocess.run(["bash", "-n", batch], check=False).returncode == 0
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": str(restarts)}
    return subprocess.Popen(["bash", batch], env=environment, text=True)


@pytest.mark.parametrize(("status", "again"), [(0, False), (75, True), (143, True), (2, False), (7, False)])
def test_slurm_job_queues_up_again_where_that_helps(tmp_path: Path, status: int, again: bool) -> None:
    assert slurm(tmp_path, f"exit {status}").wait(30) == status
    assert (tmp_path / "requeued").exists() == again


def test_slurm_job_does_not_queue_up_for_ever(tmp_path: Path) -> None:
    assert slurm(tmp_path, "exit 75", restarts=20).wait(30) == 75
    assert not (tmp_path / "requeued").exists()


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal: the job's, once its trap is set."""
    mask = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.M)
    return mask is not None and int(mask[1], 16) >> (number - 1) & 1 == 1


@pytest.mark.parametrize(("ends", "again"), [(143, True), (0, False)])
def test_slurm_job_that_is_told_to_stop_waits_for_what_the_merge_says(tmp_path: Path, ends: int, again: bool) -> None:
    script = f"trap 'sleep 0.3; exit {ends}' TERM; touch {tmp_path}/running; while :; do sleep 0.05; done"
    job = slurm(tmp_path, script)
    deadline = time.monotonic() + 30
    while not ((tmp_path / "running").exists() and catches(job.pid, signal.SIGTERM)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    job.send_signal(signal.SIGTERM)
    assert job.wait(30) == ends
    assert (tmp_path / "requeued").exists() == again
    if again:
        assert (tmp_path / "requeued").read_text() == "requeue 17\n"


def test_merge_that_slurm_stops_is_continued(family: Path, commands: Commands, tmp_path: Path) -> None:
    """The script with the real program: it exits as the merge does."""
    text = example("merge-release.sbatch").replace("/models/recipes/release.yaml --locked", str(family))
    batch = tmp_path / "job.sbatch"
    batch.write_text(text.replace("/models/release", str(tmp_path / "out")))
    environment = {**os.environ, "PATH": f"{commands.folder}:/usr/bin:/bin", "SLURM_JOB_ID": "17"}
    assert subprocess.run(["bash", batch], env=environment, check=False).returncode == 0
    assert (tmp_path / "out" / "skillmerge.manifest.json").exists()
