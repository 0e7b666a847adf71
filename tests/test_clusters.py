"""The examples of docs/clusters.md: each is what its scheduler takes, and does what is said of it."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from action_runner import load_yaml
from command_server import Commands
from conftest import write_family
from hub_server import HubServer
from schemas import fits_kubernetes
from test_pipelines import _plain, _program

import skillmerge
from skillmerge import errors
from skillmerge.cli.main import cli

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "clusters.md").read_text()
RESULTS = (ROOT / "benchmarks" / "RESULTS.md").read_text()
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
    """Rules of batch/v1 that its schema does not say: a policy needs pods that are never restarted, and its container;
    FailIndex a limit by index, and sorted codes without 0."""
    job: dict[str, Any] = load_yaml(example(name))
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    spec = job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["restartPolicy"] == "Never"
    disruption, failed = spec["podFailurePolicy"]["rules"]
    assert disruption == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
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


def without(document: dict[str, Any], *path: str | int) -> dict[str, Any]:
    """A copy of a document that lacks something."""
    copy = json.loads(json.dumps(document))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return dict(copy)


@pytest.mark.parametrize("name", ["merge-shards.yaml", "merge-finish.yaml"])
def test_kubernetes_knows_every_field_of_its_jobs(name: str) -> None:
    """By the schema of the version that the page asks for, and by a newer one."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    job = load_yaml(example(name))
    assert "since Kubernetes 1.33" in TEXT
    for version in ("1.33", "1.37"):
        fits_kubernetes(job, version)
    for wrong in (
        {**job, "spec": {**job["spec"], "backOffLimit": 5}},
        {**job, "spec": {**job["spec"], "completions": "64"}},
        without(job, "spec", "template", "spec", "containers", 0, "name"),
        without(job, "spec", "podFailurePolicy", "rules", 1, "onExitCodes", "operator"),
    ):
        with pytest.raises(kubernetes_validate.ValidationError):
            fits_kubernetes(wrong)


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
    pytest.importorskip("kubernetes_validate")
    for group in (head, workers):
        fits_kubernetes({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ray"}, **group["template"]})


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


def test_argo_workflow_has_only_fields_that_argo_knows() -> None:
    models = pytest.importorskip("hera.workflows.models")
    workflow = load_yaml(example("merge-argo.yaml"))
    read = models.Workflow.model_validate(workflow)
    assert _plain(json.loads(read.model_dump_json(by_alias=True, exclude_unset=True))) == _plain(workflow)
    main, skillmerge_ = workflow["spec"]["templates"]
    assert {step["template"] for group in main["steps"] for step in group} == {skillmerge_["name"]}
    retried = set(map(int, re.findall(r"\d+", skillmerge_["retryStrategy"]["expression"])))
    assert 75 in retried
    assert not retried & set(NEVER)


def test_argo_workflow_makes_an_output(commands: Commands, tmp_path: Path) -> None:
    """Its steps in their order, each with what Argo would put into its command."""
    main = load_yaml(example("merge-argo.yaml"))["spec"]["templates"][0]
    write_family(tmp_path, shards=2)
    for group in main["steps"]:
        (step,) = group
        command = step["arguments"]["parameters"][0]["value"].replace("/models", str(tmp_path))
        count = int(step.get("withSequence", {}).get("count", 1))
        assert (f"--of {count}" in command) == ("{{item}}" in command) == (count > 1)
        for item in {0, 1, count - 1} if count > 1 else {0}:
            environment = {**os.environ, "PATH": f"{commands.folder}:{os.environ['PATH']}"}
            subprocess.run(["sh", "-c", command.replace("{{item}}", str(item))], env=environment, check=True)
    skillmerge.verify(tmp_path / "merged")


def test_submitit_makes_an_output(tmp_path: Path) -> None:
    """As processes of this machine, with its own executor. A script, because its function is pickled."""
    pytest.importorskip("submitit")
    write_family(tmp_path, shards=2)
    text = example("merge_submitit.py").replace("/shared", str(tmp_path)).replace(", 64", ", 2")
    (tmp_path / "merge_submitit.py").write_text(text)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "merge_submitit.py"], cwd=tmp_path, env=environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "2 shards made\n"
    skillmerge.verify(tmp_path / "merged")


def test_submitit_script_is_a_module_with_names_that_exist() -> None:
    tree = ast.parse(example("merge_submitit.py"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    for call in calls:
        assert isinstance(call.func, ast.Attribute)
        if isinstance(call.func.value, ast.Name) and call.func.value.id == "skillmerge":
            known = inspect.signature(getattr(skillmerge, call.func.attr)).parameters
            assert {str(word.arg) for word in call.keywords} <= set(known)


def test_verification_in_tasks_reads_everything_once(commands: Commands, tmp_path: Path) -> None:
    output = skillmerge.apply(write_family(tmp_path, shards=3)).output
    script, read = example("merge-verify.sbatch").replace("/shared", str(tmp_path)), 0
    for task in range(2):
        array = {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_COUNT": "2"}
        environment = {**os.environ, **array, "PATH": f"{commands.folder}:{os.environ['PATH']}"}
        done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert f"part {task} of 2" in done.stdout
        read += int(re.search(r"part \d of 2, (\d+) of", done.stdout)[1])  # type: ignore[index]
    assert read == len(skillmerge.verify(output).output.manifest.files)
    minimum = min(line.partition("=")[2] for line in script.splitlines() if "--array" in line)
    assert minimum.startswith("0-"), "parts count from 0"


def test_script_to_the_hub_leaves_nothing_here(commands: Commands, hub: HubServer, licensed: Path) -> None:
    folder = licensed.parent
    document = json.loads(licensed.read_text())
    (folder / "recipe.yaml").write_text(json.dumps(document))
    script = example("merge-to-hub.sh").replace("/shared", str(folder)).replace("your-org", "acme")
    environment = {**os.environ, **hub.variables(), "PATH": f"{commands.folder}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert any(name.endswith(".safetensors") for name in hub.tree("acme/merged"))
    assert not list(folder.glob("merged*"))


def test_time_and_cost_are_what_the_arithmetic_says() -> None:
    """Each row of the table, by the page's own program with the row's numbers."""
    program = example("cost.py")
    table = TEXT.partition("## Time and cost")[2].partition("| --- |")[2].partition("\n\n")[0].splitlines()[1:]
    assert len(table) == 6
    for line in table:
        parameters, tasks, link, storage, *wanted = [cell.strip() for cell in line.strip("|").split("|")]
        number, word = parameters.split()
        given = {
            "parameters": float(number) * {"billion": 1e9, "trillion": 1e12}[word],
            "tasks, cores": (int(tasks), 8),
            "link": float(link.split()[0]) / 8,
            "storage": float(storage.split()[0]),
        }
        text = program
        for name, value in given.items():
            text = re.sub(rf"^{name} = [^#\n]*", f"{name} = {value}  ", text, flags=re.M)
        said: list[str] = []
        exec(compile(text, "cost.py", "exec"), {"print": said.append})
        moved, seconds, price = re.fullmatch(r"([\d.]+ TB), (\d+) s, ([\d.]+)", said[0]).groups()  # type: ignore[union-attr]
        assert wanted == [moved, _duration(int(seconds)), price], (line, said)


def _duration(seconds: int) -> str:
    if seconds < 100:
        return f"{seconds} s"
    minutes = seconds / 60
    return f"{minutes:.2g} min" if minutes < 100 else f"{seconds / 3600:.1f} h"


def test_measured_figures_of_the_page_are_those_of_the_benchmark() -> None:
    row = re.search(r"^\| skillmerge \| [\d.]+ [^|]*\| ([\d.]+) [^|]*\| (\d+)", RESULTS, re.M)
    assert row is not None
    assert f"{float(row[1]):.1f} seconds without 1.1" in TEXT
    assert abs((float(row[1]) - 1.1) / 3.1 - 1.6) < 0.05
    assert abs(int(row[2]) - 290) < 10


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
