"""The examples of docs/clusters.md: each is what its scheduler takes, and does what is said of it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest
from action_runner import load_yaml
from command_server import Commands
from conftest import write_family
from test_pipelines import _program

import skillmerge
from skillmerge import errors
from skillmerge.cli.main import cli

TEXT = (Path(__file__).parent.parent / "docs" / "clusters.md").read_text()
EXAMPLES = re.findall(r"^```(?:yaml|python|bash)\n(.*?)^```$", TEXT, re.M | re.S)
NEVER = [1, 2, 3, 4, 7]
"""Exit statuses of what would fail again."""


def example(name: str) -> str:
    (found,) = [text for text in EXAMPLES if f"# {name}\n" in text]
    return found


def assert_is_a_command(words: list[str]) -> None:
    command = cli.commands[words[0]]
    known = {name for parameter in command.params if isinstance(parameter, click.Option) for name in parameter.opts}
    assert {word for word in words if word.startswith("-")} <= known, words


def test_every_command_of_the_page_is_one() -> None:
    found = re.findall(r"skillmerge ((?:plan|shard|finish|apply|sweep|verify) [^`\n&|]*)", TEXT)
    assert len(found) > 10
    for line in found:
        assert_is_a_command(shlex.split(line))


@pytest.mark.parametrize(("name", "action"), [("merge-shards.yaml", "FailIndex"), ("merge-finish.yaml", "FailJob")])
def test_kubernetes_jobs_repeat_what_may_pass(name: str, action: str) -> None:
    """The rules of batch/v1: a policy needs pods that are never restarted, and its container; FailIndex a limit by
    index, and sorted codes without 0."""
    job: dict[str, Any] = load_yaml(example(name))
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    spec = job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["restartPolicy"] == "Never"
    disruption, failed = spec["podFailurePolicy"]["rules"]
    assert disruption == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}
    assert failed == {
        "action": action,
        "onExitCodes": {"containerName": container["name"], "operator": "In", "values": NEVER},
    }
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    assert_is_a_command(container["args"])
    if action == "FailIndex":
        assert spec["completionMode"] == "Indexed"
        assert spec["backoffLimitPerIndex"] > 0
        assert container["env"] == [{"name": "SKILLMERGE_OF", "value": str(spec["completions"])}]
    models = pytest.importorskip("hera.workflows.models")
    models.Container.model_validate(container)
    for volume in pod["volumes"]:
        models.Volume.model_validate(volume)


def test_ray_job_merges_on_its_cluster() -> None:
    """The fields of ray.io/v1 that it has, one image with the version of Ray that is tested, and the same volumes."""
    job: dict[str, Any] = load_yaml(example("merge-rayjob.yaml"))
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    assert spec.keys() == {"entrypoint", "backoffLimit", "shutdownAfterJobFinishes", "rayClusterSpec"}
    program, *words = shlex.split(spec["entrypoint"])
    assert (program, words[0], words[-2:]) == ("skillmerge", "apply", ["--on", "ray"])
    assert_is_a_command(words)
    cluster = spec["rayClusterSpec"]
    assert cluster.keys() == {"rayVersion", "headGroupSpec", "workerGroupSpecs"}
    assert f"ray=={cluster['rayVersion']}\n" in (Path(__file__).parent.parent / "constraints.txt").read_text()
    assert f"rayproject/ray:{cluster['rayVersion']}-" in TEXT
    head, (workers,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert head.keys() == {"rayStartParams", "template"}
    assert workers.keys() - head.keys() == {"groupName", "replicas", "minReplicas", "maxReplicas"}
    pods = [group["template"]["spec"] for group in (head, workers)]
    assert pods[0]["volumes"] == pods[1]["volumes"]
    containers = [container for pod in pods for container in pod["containers"]]
    assert len({container["image"] for container in containers}) == 1
    assert all(container["volumeMounts"][0]["mountPath"] == "/models" for container in containers)
    models = pytest.importorskip("hera.workflows.models")
    for container in containers:
        models.Container.model_validate(container)
    for volume in pods[0]["volumes"]:
        models.Volume.model_validate(volume)


def test_statuses_that_are_never_repeated_are_those_of_errors_that_stay() -> None:
    kinds = (kind for kind in vars(errors).values() if isinstance(kind, type))
    statuses = {kind.exit_status for kind in kinds if issubclass(kind, errors.SkillmergeError)}
    assert statuses - {5, 6, 75} == set(NEVER)


def test_kubernetes_job_makes_its_shards(commands: Commands, tmp_path: Path) -> None:
    """The command of the manifest with what the control plane would set, and an end by `finish --wait`."""
    job = load_yaml(example("merge-shards.yaml"))["spec"]["template"]["spec"]["containers"][0]
    finish = load_yaml(example("merge-finish.yaml"))["spec"]["template"]["spec"]["containers"][0]
    skillmerge.plan(write_family(tmp_path, shards=2), save=tmp_path / "plan.json")
    for index in (*range(64), None):
        container = job if index is not None else finish
        words = [word.replace("/models", str(tmp_path)) for word in (*container["command"], *container["args"])]
        given = {each["name"]: each["value"] for each in container.get("env", ())}
        given |= {"JOB_COMPLETION_INDEX": str(index)} if index is not None else {}
        if index is None or index in (0, 1, 63):  # the others have nothing to do
            environment = {**os.environ, "PATH": f"{commands.folder}:{os.environ['PATH']}", **given}
            assert subprocess.run(words, env=environment, check=False).returncode == 0
    skillmerge.verify(tmp_path / "merged")


@pytest.mark.parametrize(("status", "restarts", "again"), [(0, 0, False), (75, 0, True), (143, 4, True), (75, 5, False),
                                                          (2, 0, False), (7, 0, False)])  # fmt: skip
def test_slurm_task_queues_up_again_where_that_helps(tmp_path: Path, status: int, restarts: int, again: bool) -> None:
    _program(tmp_path, "skillmerge", f"exit {status}")
    _program(tmp_path, "scontrol", f'echo "$@" > {tmp_path}/requeued')
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": str(restarts)}
    ended = subprocess.run(["bash", "-c", example("merge-shards.sbatch")], env=environment, check=False)
    assert ended.returncode == status
    assert (tmp_path / "requeued").exists() == again


def test_slurm_scripts_make_an_output(commands: Commands, tmp_path: Path) -> None:
    """All three, with an sbatch that runs each task of an array at once."""
    write_family(tmp_path, shards=2)
    here = str(tmp_path)
    for name in ("merge-shards.sbatch", "merge-finish.sbatch", "submit.sh"):
        (tmp_path / name).write_text(example(name).replace("/shared", here).replace("0-63", "0-1"))
    _program(
        tmp_path,
        "sbatch",
        'script="${!#}"\n'
        'if grep -q "^#SBATCH --array=0-1$" "$script"; then\n'
        "  export SLURM_ARRAY_TASK_MIN=0 SLURM_ARRAY_TASK_MAX=1 SLURM_ARRAY_TASK_COUNT=2 SLURM_ARRAY_TASK_STEP=1\n"
        '  for task in 0 1; do SLURM_ARRAY_TASK_ID=$task bash "$script" >&2 || exit; done\n'
        "  echo 17\n"
        'else [ "$1" = --dependency=afterok:17 ] && bash "$script"; fi',
    )
    environment = {**os.environ, "PATH": f"{commands.folder}:{tmp_path}:{os.environ['PATH']}"}
    ended = subprocess.run(["bash", "submit.sh"], cwd=tmp_path, env=environment, check=False)
    assert ended.returncode == 0
    assert (tmp_path / "merged.result.json").exists()
    skillmerge.verify(tmp_path / "merged")


def test_the_order_of_sources_is_that_of_the_page() -> None:
    rows = re.findall(r"^\| (options|Slurm|AWS|Kubernetes|torchrun)", TEXT, re.M)
    assert rows == ["options", "Slurm", "AWS", "Kubernetes", "torchrun"]
    for status in (0, 2, 3, 4, 6, 7, 75):
        assert re.search(rf"^\| {status} \|", TEXT, re.M), status


def test_python_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_family(tmp_path)
    monkeypatch.chdir(tmp_path)
    (block,) = [text for text in EXAMPLES if text.startswith("import skillmerge")]
    exec(compile(block, "clusters.md", "exec"), {})
    skillmerge.verify("merged")
