"""`apply --on ray` on a real cluster of two nodes: the bytes of `apply`, whatever happens to nodes, tasks and drivers.

`make test-ray` installs Ray beside the environment and runs these; without Ray they are skipped.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from clusters import save
from conftest import MODELS, put_family, run_cli, run_process, tensor_shapes, write_family, write_recipe
from hub_server import HubServer
from observing import assert_finished, content, discard, staging_of, wait_until, wide_shapes
from ray_tasks import CruelTask, happened, order

import skillmerge
from skillmerge import errors
from skillmerge.reporter import Reporter
from skillmerge.verbs.tasks import on_ray

pytestmark = [pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore"), pytest.mark.xdist_group("ray")]
SILENT = "RAY_DEDUP_LOGS_SKIP_REGEX"
os.environ.setdefault(SILENT, "^")  # as the command line does, before Ray is imported
ray = pytest.importorskip("ray", reason="Ray is not installed")

SMALL = {"object_store_memory": 80 << 20, "include_dashboard": False}
STEPS = ("before write", "mid-write", "before rename", "before record")
RETRIED = {"TemporaryError": 4, "ResourceError": 2}
"""Errors that a task may raise fewer times than that, and the run goes on."""


class Nodes:
    """A cluster: a head that runs no tasks, and nodes for one task each, that can be lost."""

    def __init__(self, hub: HubServer) -> None:
        from ray.cluster_utils import Cluster

        self.hub = hub
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = found.getsockname()[1]
        head = {"num_cpus": 0, "ray_client_server_port": self.port, **SMALL}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address, self._nodes = self._cluster.address, []
        self.fill_up()

    def lose(self, node: str) -> None:
        (lost,) = [it for it in self._nodes if it.node_id == node]
        self._nodes.remove(lost)
        self._cluster.remove_node(lost, allow_graceful=False)

    def fill_up(self) -> None:
        while len(self._nodes) < 2:
            self._nodes.append(self._cluster.add_node(num_cpus=1, **SMALL))

    def close(self) -> None:
        ray.shutdown()
        self._cluster.shutdown()


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """A cluster, and this process connected to it, so that its workers are warm."""
    with (
        TemporaryDirectory(prefix="ray-") as folder,
        HubServer(Path(folder) / "hub") as hub,
        pytest.MonkeyPatch.context() as patch,
    ):
        given = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": folder, "HOME": folder}
        given["PYTHONPATH"] = os.pathsep.join(sys.path)  # where workers find the tests' own modules too
        for name, value in {**given, **hub.variables()}.items():
            patch.setenv(name, value)
        started = Nodes(hub)
        patch.setenv("RAY_ADDRESS", started.address)
        ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
        yield started
        started.close()


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The recipe of a family in six shards, whose tasks do as they are ordered."""
    monkeypatch.setattr(on_ray, "Task", CruelTask)
    return write_family(tmp_path, wide_shapes(6, 1024), shards=6)


def alone(recipe: Path) -> dict[str, str]:
    return content(skillmerge.apply(recipe, recipe.parent / "alone").output)


def long_only(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--long"):
        pytest.skip("--long")


@contextmanager
def meanwhile(action: Callable[[], object]) -> Iterator[None]:
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(action)
        yield
        done.result(60)


class Listener(Reporter):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.notes: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)

    def waiting(self, message: str) -> None:
        self.lines.append(message)

    def note(self, message: str) -> None:
        self.notes.append(message)


@pytest.mark.parametrize(
    ("on", "wanted"),
    [("ray", "no Ray cluster runs here"), ("ray://127.0.0.1:9", "the cluster ray://127.0.0.1:9 cannot")],
)
def test_without_a_cluster(tmp_path: Path, request: pytest.FixtureRequest, on: str, wanted: str) -> None:
    """Before the others, which start one: Ray finds what runs on the machine."""
    if on != "ray":
        long_only(request)  # the client tries for a minute
    family = write_family(tmp_path)
    process = run_process("apply", family, "--on", on, "-q", RAY_ADDRESS="", RAY_TMPDIR=str(tmp_path))
    assert process.returncode == 2
    assert process.stderr.startswith(f"error: {wanted}"), process.stderr
    assert "help: run it inside `ray job submit`, start a cluster with `ray start --head`, or" in process.stderr
    assert not list(tmp_path.glob("merged*"))


@pytest.mark.parametrize("kind", ["40 shards", "saved plan", "skill"])
def test_bytes_are_those_of_apply(nodes: Nodes, tmp_path: Path, kind: str) -> None:
    recipe = write_family(tmp_path, wide_shapes(40, 512), shards=40)
    if kind == "skill":
        recipe = write_recipe(
            tmp_path, "rl - sft", coefficients=None, output={"path": "merged", "kind": "skill", "shard_size": "2KB"}
        )
    wanted, listener = alone(recipe), Listener()
    source = save(recipe) if kind == "saved plan" else recipe
    result = skillmerge.apply(source, on="ray", reporter=listener)
    assert (result.output, result.device) == (tmp_path / "merged", "cpu")
    assert_finished(result.output, wanted)
    assert any("/" in line and " shards, " in line for line in listener.lines)
    skillmerge.verify(result.output)
    assert skillmerge.apply(source, on="ray").already


def test_from_the_hub_to_the_hub(nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with nodes.hub.environment(monkeypatch):
        put_family(nodes.hub, tmp_path / "models", shards=4)
        models = {model: f"hf://acme/{model}" for model in MODELS}
        recipe = write_recipe(tmp_path, models=models, output={"path": "merged", "license": "mit"})
        wanted = alone(recipe)
        result = skillmerge.apply(recipe, on="ray", push="acme/merged")
        assert content(result.output) == wanted
        shards = [name for name in wanted if name.startswith("model-")]
        assert len(shards) == 4
        for name in shards:
            assert nodes.hub.content("acme/merged", name) == (result.output / name).read_bytes()


@pytest.mark.parametrize("step", STEPS)
def test_a_node_is_lost(nodes: Nodes, family: Path, request: pytest.FixtureRequest, step: str) -> None:
    """Its tasks go on elsewhere; what it had recorded is not made again."""
    if step != "mid-write":
        long_only(request)
    wanted, folder = alone(family), family.parent
    order(folder, stops_at=step)

    def lose() -> None:
        wait_until(lambda: happened(folder))
        nodes.lose(happened(folder)[0][0])

    with meanwhile(lose):
        result = skillmerge.apply(family, on="ray")
    assert_finished(result.output, wanted)
    nodes.fill_up()


def test_a_straggler_has_a_second_copy(nodes: Nodes, family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slow node would need a minute for each shard."""
    monkeypatch.setattr(on_ray, "SHORT", 1.0)
    wanted, listener = alone(family), Listener()
    order(family.parent, pace=60)
    result = skillmerge.apply(family, on="ray", reporter=listener)
    assert_finished(result.output, wanted)
    assert result.seconds < 40
    assert [line for line in listener.lines if "a second time" in line]


@pytest.mark.parametrize(
    "kind", ["CheckFailed", "InputError", "UnusableWeights", "StalePlan", "OutputLocked", *RETRIED]
)
def test_error_of_a_task_is_that_of_the_run(nodes: Nodes, family: Path, kind: str) -> None:
    """Status, message and advice. What would fail again is not tried again, and the next run does what is left."""
    folder, status = family.parent, getattr(errors, kind).exit_status
    wanted = alone(family)
    order(folder, raises=kind, times=RETRIED.get(kind, 1))
    process = run_cli("apply", family, "--on", "ray", "-q")
    assert (process.returncode, process.stdout) == (status, "")
    if kind != "StalePlan":
        assert process.stderr == f"error: a {kind} of a task\nhelp: so it was ordered\n"
    assert not (folder / "merged").exists()
    seen = happened(folder)
    assert len(seen) == RETRIED.get(kind, 1)
    if kind == "ResourceError":
        assert seen[0][0] != seen[1][0]
    assert run_cli("apply", family, "--on", "ray", "-q").returncode == 0
    assert_finished(folder / "merged", wanted)


@pytest.mark.parametrize("kind", RETRIED)
def test_error_that_passes_ends_nothing(nodes: Nodes, family: Path, kind: str) -> None:
    wanted = alone(family)
    order(family.parent, raises=kind, times=RETRIED[kind] - 1)
    process = run_cli("apply", family, "--on", "ray", "-q")
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")
    assert_finished(family.parent / "merged", wanted)
    assert len(happened(family.parent)) == RETRIED[kind] - 1


def test_unusable_weights_are_found_by_a_task(nodes: Nodes, tmp_path: Path) -> None:
    import torch
    from conftest import copy_with

    recipe = write_family(tmp_path, tensor_shapes(), shards=2)
    (tmp_path / "rl").rename(tmp_path / "good")
    copy_with(tmp_path / "good", tmp_path / "rl", **{"model.norm.weight": torch.full((16,), torch.nan).bfloat16()})
    wanted = run_cli("apply", recipe, "-q", cwd=tmp_path)
    found = run_cli("apply", recipe, "--on", "ray", "-q", cwd=tmp_path)
    assert (found.returncode, found.stderr) == (wanted.returncode, wanted.stderr) == (4, wanted.stderr)
    assert not list(tmp_path.glob("merged*"))


DRIVER = (
    "import sys; from skillmerge.verbs.tasks import on_ray; from ray_tasks import CruelTask; on_ray.Task = CruelTask\n"
    "from skillmerge.cli.main import main; main()"
)


def start_driver(family: Path, *options: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != SILENT}
    command = [sys.executable, "-c", DRIVER, "apply", str(family), "--on", "ray", *options]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**environment, "NO_COLOR": "1"}
    )


def test_results_alone_are_on_stdout(nodes: Nodes, family: Path, request: pytest.FixtureRequest) -> None:
    """Ray would print there that a task has failed and is tried again."""
    long_only(request)
    order(family.parent, raises="TemporaryError", times=3)
    stdout, stderr = start_driver(family, "--json", "-q").communicate(timeout=120)
    assert json.loads(stdout)["ok"]
    assert stderr == ""
    assert len(happened(family.parent)) == 3


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_driver_is_started_again(nodes: Nodes, family: Path, request: pytest.FixtureRequest, number: int) -> None:
    """It goes on from the records; one that was interrupted leaves no task at work."""
    if number != signal.SIGKILL:
        long_only(request)
    wanted, output = alone(family), family.parent / "merged"
    order(family.parent, pace=600)  # one node works, the other stands
    driver = start_driver(family)
    done = staging_of(output) / "done"
    wait_until(lambda: done.exists() and len(list(done.iterdir())) >= 2)
    driver.send_signal(number)
    _, stderr = driver.communicate(timeout=60)
    assert driver.returncode == (-number if number == signal.SIGKILL else 128 + number), stderr
    if number != signal.SIGKILL:
        assert "help: finished shards are kept; rerun to continue" in stderr
        assert not (staging_of(output) / "skillmerge.tasks.json").exists()
    kept = {path.name for path in done.iterdir()}
    order(family.parent)
    listener = Listener()
    skillmerge.apply(family, on="ray", reporter=listener)
    assert_finished(output, wanted)
    found = re.search(r"continuing an interrupted run: (\d+) ", listener.notes[-1])
    assert found is not None
    assert int(found[1]) >= len(kept)  # a task may outlive its driver by a shard


def test_nodes_that_do_not_fit_are_refused(nodes: Nodes, family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version, and another folder."""
    with monkeypatch.context() as patch:
        patch.setattr("skillmerge.verbs.tasks.cluster.__version__", "0.0.1")
        with pytest.raises(errors.UsageError, match=r"a node of the cluster has skillmerge .*, and this is .*0\.0\.1"):
            skillmerge.apply(family, on="ray")
    elsewhere = family.parent / "elsewhere" / "merged"
    share = on_ray.Cluster.share
    monkeypatch.setattr(on_ray.Cluster, "share", lambda self, work: share(self, replace(work, target=elsewhere)))
    process = run_cli("apply", family, "--on", "ray", "-q")
    assert process.returncode == 2
    assert process.stderr.startswith(f"error: a node of the cluster does not see {elsewhere}.partial\nhelp: choose a ")
    assert not list(family.parent.glob("merged*"))


def test_options_reach_the_tasks(nodes: Nodes, family: Path) -> None:
    """A node has one CPU: tasks that take two would wait for ever."""
    assert skillmerge.apply(family, on="ray", threads=1, stats="full", device="cpu").device == "cpu"
    discard(family.parent / "merged")
    listener = Listener()
    with pytest.raises(KeyboardInterrupt), meanwhile(lambda: interrupt_when(lambda: listener.warnings)):
        skillmerge.apply(family, on="ray", threads=2, reporter=listener)
    assert listener.warnings == ["no node of the cluster has the 2 CPUs that a task takes; waiting for one"]


def interrupt_when(condition: Callable[[], object]) -> None:
    wait_until(condition)
    os.kill(os.getpid(), signal.SIGINT)


def test_from_outside_of_the_cluster(nodes: Nodes, family: Path, request: pytest.FixtureRequest) -> None:
    """As a client, in a process of its own."""
    long_only(request)
    wanted = alone(family)
    process = run_process("apply", family, "--on", f"ray://127.0.0.1:{nodes.port}", "--json")
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout)["ok"]
    assert_finished(family.parent / "merged", wanted)


def test_candidates_are_scored_side_by_side(nodes: Nodes, family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at a time, which the command waits for; in the folder of the driver, with the scores of one machine."""
    folder = family.parent
    monkeypatch.chdir(folder)
    (folder / "score.sh").write_text(
        "touch at-work.$$; while [ $(ls at-work.* | wc -l) -lt 2 ]; do sleep 0.1; done\n"
        'cat "$1"/model-*.safetensors | cksum | cut -d" " -f1\n'
    )
    axes, score = ["lam=0:1:0.25"], "sh score.sh"
    found = skillmerge.sweep(family, axes, score, "on", on="ray")
    assert len(found.trials) == 5
    alike = skillmerge.sweep(family, axes, score, "alone")
    assert [trial.scores for trial in found.trials] == [trial.scores for trial in alike.trials]
    assert [trial.realised for trial in found.trials] == [trial.realised for trial in alike.trials]
    assert skillmerge.sweep(family, axes, score, "on", on="ray").resumed == 5
    assert not (folder / "on" / "scratch").exists()
    failing = run_cli("sweep", family, "--set", "lam=0,1", "--score", "false", "-o", "failing", "--on", "ray", "-q")
    assert failing.returncode == 3
    assert "the command failed with exit status 1" in failing.stderr


def test_models_are_not_touched(nodes: Nodes, family: Path) -> None:
    before = {model: content(family.parent / model) for model in MODELS}
    skillmerge.apply(family, on="ray")
    assert {model: content(family.parent / model) for model in MODELS} == before
