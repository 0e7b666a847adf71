"""`--on`: what is refused before any work, and the run's part of the work, with a cluster of threads in place of Ray.

tests/torture/test_ray.py has a real one.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import threading
import types
from collections.abc import Callable, Collection
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
from clusters import run_tasks, save
from conftest import run_cli, write_family
from observing import assert_finished, content, staging_of, wait_until

import skillmerge
from skillmerge import errors
from skillmerge.engine.runner import Work
from skillmerge.errors import ResourceError, SkillmergeError, UsageError
from skillmerge.plans.opening import Access
from skillmerge.recipes.parse import load, parse_recipe
from skillmerge.reporter import Reporter
from skillmerge.study.gates import GateFailed
from skillmerge.study.scoring.scorers import find_scorer
from skillmerge.verbs.sweep import in_folder
from skillmerge.verbs.sweep import sweep as in_sweep
from skillmerge.verbs.sweep.in_folder import InFolder
from skillmerge.verbs.tasks import cluster, on_ray


class Threads:
    """Takes the place of `Cluster`. before: runs in each task, given how many came before it and its shards."""

    before: Callable[[int, tuple[str, ...]], None] = staticmethod(lambda number, shards: None)
    submitted: list[tuple[tuple[str, ...], set[str]]]

    def __init__(self, on: str, threads: int | None, device: str) -> None:
        self.threads, self.device, self.places = threads or 1, "cpu", 2
        Threads.submitted = []
        self._pool = ThreadPoolExecutor(8)

    def share(self, work: Any) -> bytes:
        return pickle.dumps(work)

    def submit(self, work: bytes, *arguments: Any, avoid: Collection[str] = ()) -> Future[Any]:
        number = len(Threads.submitted)
        Threads.submitted.append((arguments[0], set(avoid)))

        def run() -> Any:
            Threads.before(number, arguments[0])
            return pickle.loads(work)(*arguments)

        return self._pool.submit(run)

    def ended(self, tasks: Collection[Future[Any]], seconds: float) -> list[Future[Any]]:
        return list(wait(tasks, seconds, FIRST_COMPLETED)[0])[:1]

    def result(self, task: Future[Any]) -> Any:
        try:
            return task.result()
        except SkillmergeError as error:
            raise pickle.loads(pickle.dumps(error)) from None

    def find_places(self, reporter: Reporter) -> int:
        return self.places

    def nodes_of(self, host: str) -> set[str]:
        return {"slow"}

    def cancel(self, tasks: Collection[Future[Any]], *, kill: bool = False) -> None:
        for task in tasks:
            task.cancel()

    def close(self) -> None:
        self._pool.shutdown(wait=False)


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> type[Threads]:
    monkeypatch.setattr(cluster, "find_spec", lambda name: name)
    monkeypatch.setattr(on_ray, "Cluster", Threads)
    monkeypatch.setattr(on_ray, "this_node", lambda: "full")
    for name, value in {"PATIENCE": 0.2, "LOOK": 0.02, "SHORT": 0.3}.items():
        monkeypatch.setattr(on_ray, name, value)
    monkeypatch.setattr(Threads, "before", staticmethod(lambda number, shards: None))
    return Threads


@pytest.fixture
def four(tmp_path: Path) -> Path:
    return write_family(tmp_path, shards=4)


def alone(recipe: Path) -> dict[str, str]:
    return content(skillmerge.apply(recipe, recipe.parent / "alone").output)


@pytest.mark.parametrize("on", ["slurm", "Ray", "", "ray:", "ray://", "ray://host", "ray://host:port", "ray://:10001"])
def test_unknown_clusters_are_refused(family: Path, on: str) -> None:
    for command in (["apply", family], ["sweep", family, "--set", "lam=0,1", "--score", "true"]):
        process = run_cli(*command, "--on", on)
        assert process.returncode == 2
        assert process.stderr == f"error: `{on}` is not a cluster\nhelp: choose ray, or ray://HOST:PORT\n"


def test_what_it_cannot_do_is_said_before_any_work(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "find_spec", lambda name: None)
    process = run_cli("apply", family, "--on", "ray")
    assert (process.returncode, process.stderr) == (
        2, "error: `--on` needs Ray\nhelp: pip install 'skillmerge[ray]'\n"
    )  # fmt: skip
    monkeypatch.setattr(cluster, "find_spec", lambda name: name if name == "ray" else None)
    assert run_cli("apply", family, "--on", "ray://host:10001").returncode == 2
    monkeypatch.setattr(cluster, "find_spec", lambda name: name)
    process = run_cli("apply", family, "--on", "ray", "--push", "a/b", "--no-local")
    assert (process.returncode, process.stderr.partition(",")[0]) == (2, "error: `--no-local` keeps no files")
    for options in (["--score", "perplexity:words.txt"], ["--score", "true", "--search", "random"]):
        (family.parent / "words.txt").write_text("words")
        process = run_cli("sweep", family, "--set", "lam=0:1", *options, "--on", "ray", cwd=family.parent)
        assert (process.returncode, process.stderr.partition("\n")[0]) == (
            2, "error: `--on` needs a score by a command, and a grid"
        )  # fmt: skip
    assert {path.name for path in family.parent.iterdir()} == {"target", "rl", "sft", "recipe.yaml", "words.txt"}


def test_an_output_in_a_bucket_is_refused_before_any_work(tasks: type[Threads], family: Path) -> None:
    """By the recipe, by `--output` and in a saved plan: no model is looked at."""
    document = json.loads(family.read_text())
    recipe = family.with_name("bucket.yaml")
    recipe.write_text(json.dumps({**document, "output": {"path": "s3://bucket/merged"}}))
    plan = save(family)
    for model in document["models"]:
        (family.parent / model).rename(family.parent / f"{model}-gone")
    for given in ([recipe], [family, "-o", "s3://bucket/merged"], [plan, "-o", "s3://bucket/merged"]):
        process = run_cli("apply", *given, "--on", "ray")
        assert process.returncode == 2
        assert process.stderr.startswith(
            "error: the output s3://bucket/merged is in a bucket, and tasks of `--on` share a folder\n"
            "help: choose a folder with `--output`"
        )


def test_tasks_make_the_output(tasks: type[Threads], four: Path) -> None:
    wanted = alone(four)
    result = skillmerge.apply(four, on="ray")
    assert_finished(result.output, wanted)
    assert sorted(shards for shards, _ in tasks.submitted) == [(name,) for name in sorted(wanted) if "-of-" in name]
    skillmerge.plan(four, save=four.parent / "plan.json")
    assert skillmerge.apply(four.parent / "plan.json", on="ray").already


def test_full_node_is_avoided_once(tasks: type[Threads], four: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = alone(four)
    making = on_ray.Making._find_folder
    failed: list[int] = []

    def full(self: on_ray.Making) -> None:
        if len(failed) < 1:
            failed.append(1)
            raise ResourceError("the disk is full", fix="free disk space")
        making(self)

    monkeypatch.setattr(on_ray.Making, "_find_folder", full)
    assert_finished(skillmerge.apply(four, on="ray").output, wanted)
    assert [avoid for _, avoid in tasks.submitted] == [set(), set(), set(), set(), {"full"}]


def test_shards_that_are_all_recorded_need_no_cluster(
    tasks: type[Threads], four: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, plan = alone(four), save(four)
    run_tasks(plan, four.parent / "merged", tasks=2)
    monkeypatch.setattr(on_ray, "Cluster", None)
    assert_finished(skillmerge.apply(four, on="ray").output, wanted)


@pytest.mark.parametrize("left", ["tasks", "apply"])
def test_what_another_plan_has_left_is_dropped_as_by_apply(
    tasks: type[Threads], four: Path, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    """So that a run which was stale goes on as it was told to: by the same command, which plans again."""
    output, notes, reporter = four.parent / "merged", [], Reporter()
    done = staging_of(output) / "done"

    def fail(number: int, shards: tuple[str, ...]) -> None:
        if number == 3:
            wait_until(lambda: done.exists() and list(done.glob("*.json")))
            raise errors.InputError("x")

    if left == "tasks":
        skillmerge.shard(save(four), index=0, of=2)
    else:
        tasks.before = staticmethod(fail)
        with pytest.raises(errors.InputError):
            skillmerge.apply(four, on="ray")
        tasks.before = staticmethod(lambda number, shards: None)
    assert list(done.glob("*.json"))
    for file in (four.parent / "rl").iterdir():
        os.utime(file, (1, 1))
    monkeypatch.setattr(reporter, "note", notes.append)
    wanted = alone(four)
    assert_finished(skillmerge.apply(four, on="ray", reporter=reporter).output, wanted)
    assert notes[-1].startswith("dropped an unfinished run of ")


@pytest.mark.parametrize("times", [1, 2])
def test_tasks_without_records_are_made_up_for_once(
    tasks: type[Threads], four: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """They end as if all were well, and work in another folder of the same name."""
    wanted, making, lost = alone(four), on_ray.Making.__call__, "model-00002-of-00004.safetensors"
    left = iter(range(times))

    def elsewhere(self: on_ray.Making, shards: tuple[str, ...]) -> Any:
        return [] if shards == (lost,) and next(left, None) is not None else making(self, shards)

    monkeypatch.setattr(on_ray.Making, "__call__", elsewhere)
    if times == 1:
        assert_finished(skillmerge.apply(four, on="ray").output, wanted)
        assert [shards for shards, _ in tasks.submitted].count((lost,)) == 2
    else:
        with pytest.raises(UsageError, match=f"tasks have ended, but {lost} cannot be seen in .*merged.partial"):
            skillmerge.apply(four, on="ray")
        assert not (staging_of(four.parent / "merged") / "skillmerge.tasks.json").exists()
        assert_finished(skillmerge.apply(four, on="ray").output, wanted)


def test_slow_tasks_have_a_second_copy(tasks: type[Threads], four: Path) -> None:
    wanted, go_on = alone(four), threading.Event()
    tasks.before = staticmethod(lambda number, shards: go_on.wait(60) if number == 3 else None)
    assert_finished(skillmerge.apply(four, on="ray").output, wanted)
    assert len(tasks.submitted) == 5
    assert tasks.submitted[4][0] == tasks.submitted[3][0]
    go_on.set()


def test_error_of_a_task_whose_shards_are_recorded_ends_nothing(tasks: type[Threads], four: Path) -> None:
    """Whether its end is seen before the record or after it."""
    wanted = alone(four)

    def before(number: int, shards: tuple[str, ...]) -> None:
        if number == 3:
            wait_until((staging_of(four.parent / "merged") / "done" / f"{shards[0]}.json").exists)
            raise errors.StalePlan("too late", fix="")

    tasks.before = staticmethod(before)
    assert_finished(skillmerge.apply(four, on="ray").output, wanted)


def test_candidates_are_scored_as_on_one_machine(
    tasks: type[Threads], four: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Side by side, each in a folder that every process calls the same; the scores are those of one after the other."""
    monkeypatch.setattr(in_sweep, "Cluster", Threads)
    monkeypatch.chdir(four.parent)
    both = threading.Barrier(2)
    tasks.before = staticmethod(lambda number, values: both.wait(60) if number < 2 else None)
    scores, places = 'cat {}/model-*.safetensors | cksum | cut -d" " -f1', []
    share = Threads.share
    monkeypatch.setattr(Threads, "share", lambda self, work: places.append(work.scratch) or share(self, work))
    found = skillmerge.sweep(four, ["lam=0:1:0.5"], scores, "on", on="ray")
    alike = skillmerge.sweep(four, ["lam=0:1:0.5"], scores, "one")
    assert [(it.values, it.scores, it.realised) for it in found.trials] == [
        (it.values, it.scores, it.realised) for it in alike.trials
    ]
    assert places == [four.parent / "on" / "scratch"]
    assert not places[0].exists()
    assert skillmerge.sweep(four, ["lam=0:1:0.5"], scores, "on", on="ray").resumed == 3
    assert len(places) == 1
    with pytest.raises(errors.CheckFailed, match="exit status 1"):
        skillmerge.sweep(four, ["lam=0:1:0.5"], "false", "failing", on="ray")


NODES = {
    "cpus": [{"CPU": 16.0}, {"CPU": 2.0}],
    "gpus": [{"CPU": 64.0}, {"CPU": 16.0, "GPU": 8.0}],
    "many gpus": [{"CPU": 4.0, "GPU": 8.0}],
    "none": [{"memory": 1.0}],
}


@pytest.mark.parametrize(
    ("nodes", "threads", "device", "found", "fix"),
    [
        ("cpus", None, "auto", (8, 2), None),
        ("cpus", 3, "cpu", (3, 5), None),
        ("cpus", 32, "cpu", (32, 0), "let the cluster grow, or pass a lower `--threads`"),
        ("cpus", None, "cuda", (8, 0), "let the cluster grow, or compute on the CPU: leave `--device` out"),
        ("gpus", None, "cuda:1", (2, 8), None),
        ("gpus", None, "auto", (8, 10), None),
        ("many gpus", None, "cuda", (1, 4), None),
        ("none", None, "auto", (8, 0), "let the cluster grow"),
    ],
)
def test_tasks_have_what_nodes_can_give(
    monkeypatch: pytest.MonkeyPatch, nodes: str, threads: int | None, device: str, found: tuple[int, int], fix: Any
) -> None:
    """With CUDA every GPU of a node has work. Where no node can take a task, that is said."""
    rows = [{"NodeID": str(at), "Alive": True, "Resources": has} for at, has in enumerate(NODES[nodes])]
    fake = types.SimpleNamespace(is_initialized=lambda: True, nodes=lambda: rows)
    monkeypatch.setitem(sys.modules, "ray", fake)
    reporter, fixes = Reporter(), []
    monkeypatch.setattr(reporter, "show_warning", lambda message, fix: fixes.append(fix))
    connected = cluster.Cluster("ray", threads, device)
    assert (connected.threads, connected.find_places(reporter)) == found
    assert fixes == ([fix] if fix else [])


def test_candidates_are_the_same_in_whatever_folder_a_node_works(
    tasks: type[Threads], four: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe that was named by a relative path, and its lock."""
    sent: list[Any] = []
    monkeypatch.setattr(in_sweep, "Cluster", Threads)
    monkeypatch.chdir(four.parent)
    submit = Threads.submit

    def watched(self: Threads, work: bytes, *arguments: Any, avoid: Collection[str] = ()) -> Future[Any]:
        sent.append(arguments[1])
        return submit(self, work, *arguments, avoid=avoid)

    monkeypatch.setattr(Threads, "submit", watched)
    skillmerge.sweep(Path("recipe.yaml"), ["lam=0,1"], "echo 1 #", on="ray")
    for recipe in sent:
        assert recipe.model_place("rl").path == four.parent / "rl"
        assert Path(recipe.document.name) == four
        assert recipe.output.path == four.parent / "merged"
    assert len(sent) == 2


def test_candidate_that_two_nodes_score_at_once_is_scored(four: Path) -> None:
    """Ray runs a task again where it believes a node dead, which may go on all the same."""
    recipe, both = (
        load(four),
        "touch at-work.$$; while [ $(ls at-work.* | wc -l) -lt 2 ]; do sleep 0.05; done; echo 1 #",
    )
    scoring = InFolder(find_scorer(both), Access(), Work("cpu", 1), (0,), four.parent / "scratch", four.parent)
    with ThreadPoolExecutor(2) as pool:
        trials = [pool.submit(scoring, {"lam": 0.5}, recipe, True) for _ in range(2)]
        assert [trial.result(60)[0].scores["score"].value for trial in trials] == [1, 1]
    assert list((four.parent / "scratch").iterdir()) == []


def test_candidate_that_fails_beside_others_leaves_nothing(four: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray tries it again under another name: what was unfinished would fill the disk."""
    scratch = four.parent / "scratch"

    def fail(*given: Any) -> None:
        (scratch / f"{given[1].name}.partial" / "files").mkdir(parents=True)
        raise errors.TemporaryError("x")

    monkeypatch.setattr(in_folder, "merge", fail)
    scoring = InFolder(find_scorer("echo 1 #"), Access(), Work("cpu", 1), (0,), scratch, four.parent)
    with pytest.raises(errors.TemporaryError):
        scoring({"lam": 0.5}, load(four), True)
    assert list(scratch.iterdir()) == []


def test_a_sweep_that_no_node_can_take_says_so(
    tasks: type[Threads], four: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(in_sweep, "Cluster", Threads)
    monkeypatch.setattr(Threads, "find_places", lambda self, reporter: asked.append(reporter))
    monkeypatch.chdir(four.parent)
    skillmerge.sweep(four, ["lam=0,1"], "echo 1 #", on="ray", reporter=(reporter := Reporter()))
    assert asked == [reporter]


def kinds(kind: type[SkillmergeError] = SkillmergeError) -> list[type[SkillmergeError]]:
    return [kind, *(inner for each in kind.__subclasses__() for inner in kinds(each))]


def test_errors_cross_the_border_between_processes() -> None:
    """Every kind, with its message, advice, status and whatever else it has."""
    with pytest.raises(errors.RecipeError) as raised:
        parse_recipe("skillmerge: 2\nmodels: 3\n", "recipe.yaml", Path())
    made = [raised.value, GateFailed([], fix="look"), errors.Interrupted(15, fix="rerun")]
    made += [kind("what\nand where", fix="do this") for kind in kinds() if kind not in map(type, made)]
    for error in made:
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error)
        assert (str(again), again.as_dict()) == (str(error), error.as_dict())
        assert again.args == error.args
