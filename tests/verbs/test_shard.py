"""`shard`: tasks make the bytes of `apply`, beside each other, and leave what is there alone."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from clusters import SHARDS, alone, record_of, rewrite, run_tasks, save, save_family
from conftest import copy_with, run_cli, write_family, write_recipe
from observing import content, identities, staging_of

import skillmerge
from skillmerge.engine.destination import ShardRecord
from skillmerge.engine.runner import Work
from skillmerge.errors import InputError, OutputLocked, StalePlan, UnusableWeights, UsageError
from skillmerge.outputs.attempts import Attempt, conditions_of
from skillmerge.plans import saved
from skillmerge.plans.opening import Access
from skillmerge.reporter import Reporter
from skillmerge.verbs.tasks.shard import Task

FIRST = "model-00001-of-00004.safetensors"
RECIPES: dict[str, dict[str, Any]] = {
    "model": {},
    "shards": {"output": {"path": "merged", "shard_size": "2KB"}},
    "stochastic": {"output": {"path": "merged", "rounding": "stochastic", "seed": 3}},
    "copies": {"copy": [{"tensors": "*norm*", "from": "sft"}]},
    "skill": {"merge": "rl - sft", "coefficients": None, "output": {"path": "merged", "kind": "skill"}},
    "kept": {"merge": "lam * (rl - sft)", "output": {"path": "merged", "kind": "skill", "keep": 0.5}},
    "skill shards": {
        "merge": "rl - sft",
        "coefficients": None,
        "output": {"path": "merged", "kind": "skill", "shard_size": "2KB"},
    },
}


@pytest.mark.parametrize("name", RECIPES)
def test_tasks_make_what_apply_makes(tmp_path: Path, name: str) -> None:
    plan = save_family(tmp_path, **RECIPES[name])
    wanted, output = alone(plan, stats="full"), tmp_path / "merged"
    made = run_tasks(plan, output, tasks=3, stats="full", device="cpu")
    assert sorted(made) == sorted(json.loads(plan.read_text())["shards"][at]["file"] for at in range(len(made)))
    result = skillmerge.finish(plan)
    assert (result.output, result.device) == (output, "cpu")
    assert content(output) == wanted
    assert not staging_of(output).exists()
    skillmerge.verify(output)


def test_tasks_read_skills_and_patches(tmp_path: Path) -> None:
    write_family(tmp_path, shards=SHARDS)
    skillmerge.extract(tmp_path / "rl", tmp_path / "sft", tmp_path / "skill")
    skillmerge.export_patch(tmp_path / "skill", tmp_path / "patch", onto=str(tmp_path / "sft"))
    recipe = write_recipe(
        tmp_path,
        models={
            "target": "target",
            "sft": "sft",
            "math": {"skill": "skill"},
            "tuned": {"patch": "patch", "onto": "sft"},
        },
        merge="target + 0.5 * math + lam * (tuned - sft)",
    )
    plan = save(recipe)
    wanted = alone(plan)
    run_tasks(plan, tmp_path / "merged")
    skillmerge.finish(plan)
    assert content(tmp_path / "merged") == wanted


def test_a_task_is_plain_data(tmp_path: Path) -> None:
    """Another process can do it, given what was pickled."""
    plan, output = save_family(tmp_path), tmp_path / "merged"
    opened = saved.read(plan)
    task = Task(opened, tuple(opened.sizes)[1:3], Access(commits=opened.commits), Work("cpu"), "sampled", False)
    device, made = pickle.loads(pickle.dumps(task)).run(output, Reporter())
    assert (device.split(":")[0], made) == ("cpu", task.shards)
    assert task.run(output, Reporter()) == ("", ())
    assert sorted(run_tasks(plan, output)) == sorted({*opened.sizes} - {*task.shards})


def test_what_is_recorded_is_left_alone(tmp_path: Path) -> None:
    """By whom it was made does not matter; a record that is no longer true counts for nothing."""
    plan, output = save_family(tmp_path), tmp_path / "merged"
    assert len(run_tasks(plan, output)) == SHARDS
    files = staging_of(output) / "files"
    before = identities(files)
    done = skillmerge.shard(plan, index=0, of=1)
    assert (len(done.shards), done.made, done.device) == (SHARDS, (), "")
    assert identities(files) == before
    (files / FIRST).write_bytes((files / FIRST).read_bytes())
    assert skillmerge.shard(plan, index=0, of=1).made == (FIRST,)
    assert {name: it for name, it in identities(files).items() if name != FIRST} == {
        name: it for name, it in before.items() if name != FIRST
    }


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-20]),
        lambda path: path.write_bytes(bytes(200)),
        lambda path: path.write_text("[]\n"),
        lambda path: path.unlink(),
        lambda path: rewrite(path, digest="0" * 64),
        lambda path: rewrite(path, sha256="0" * 64),
        lambda path: rewrite(path, mtime_ns=1),
        lambda path: rewrite(path, shard="model-00009-of-00004.safetensors"),
        lambda path: rewrite(path, statistics={"x": {"no": 1}}),
        lambda path: rewrite(path, size=1),
    ],
    ids=[
        "empty",
        "torn",
        "zeros",
        "list",
        "gone",
        "another plan's",
        "sha256",
        "time",
        "another's",
        "statistics",
        "size",
    ],
)
@pytest.mark.parametrize("number", range(1, SHARDS + 1))
def test_a_torn_record_is_none(tmp_path: Path, spoil: Any, number: int) -> None:
    """The shard is made again, and only that."""
    plan, output = save_family(tmp_path), tmp_path / "merged"
    shard = f"model-{number:05d}-of-{SHARDS:05d}.safetensors"
    run_tasks(plan, output, tasks=1)
    spoil(record_of(output, shard))
    assert skillmerge.shard(plan, index=0, of=1).made == (shard,)


def test_all_at_once_make_one_output(tmp_path: Path) -> None:
    plan, output = save_family(tmp_path), tmp_path / "merged"
    wanted = alone(plan)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: skillmerge.shard(plan, index=0, of=1), range(4)))
    skillmerge.finish(plan)
    assert content(output) == wanted


def test_apply_goes_on_from_tasks_and_tasks_from_apply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, output = save_family(tmp_path), tmp_path / "merged"
    wanted = alone(plan)
    skillmerge.shard(plan, index=0, of=2)
    before = identities(staging_of(output) / "files")
    skillmerge.apply(plan)
    assert content(output) == wanted
    assert {name: identities(output)[name] for name in before} == before
    shutil.rmtree(output)

    def full(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("skillmerge.verbs.apply._Merge._describe", full)
        with pytest.raises(KeyboardInterrupt):
            skillmerge.apply(plan)
    assert skillmerge.shard(plan, index=0, of=1).made == ()
    (staging_of(output) / "files" / FIRST).unlink()
    assert skillmerge.shard(plan, index=0, of=1).made == (FIRST,)
    skillmerge.finish(plan)
    assert content(output) == wanted


def test_a_task_after_the_end_has_nothing_to_do(tmp_path: Path) -> None:
    plan, output = save_family(tmp_path), tmp_path / "merged"
    run_tasks(plan, output)
    skillmerge.finish(plan)
    assert run_tasks(plan, output) == []
    assert not staging_of(output).exists()


def test_more_tasks_than_shards(tmp_path: Path) -> None:
    plan = save_family(tmp_path)
    done = skillmerge.shard(plan, index=9, of=10)
    assert (done.shards, done.made, done.size) == ((), (), 0)
    assert not staging_of(tmp_path / "merged").exists()


def test_a_folder_is_one_plans(tmp_path: Path) -> None:
    plan, output = save_family(tmp_path), tmp_path / "merged"
    run_tasks(plan, output, tasks=2)
    with pytest.raises(UsageError, match="of this plan with other options or inputs") as caught:
        skillmerge.shard(plan, index=0, of=2, stats="off")
    assert "remove the folder" in str(caught.value.fix)
    other = save(write_recipe(tmp_path, coefficients={"lam": 0.25}))
    with pytest.raises(UsageError, match="an unfinished run of another plan"):
        skillmerge.shard(other, index=0, of=2)
    (staging_of(output) / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds notes\.txt"):
        skillmerge.shard(other, index=0, of=2)


def test_a_task_of_another_plan_stops_and_writes_nothing(tmp_path: Path) -> None:
    """Where another run takes the folder over while a shard is made, its file has no way in."""
    plan, output = save_family(tmp_path), tmp_path / "merged"
    preview = skillmerge.plan(tmp_path / "recipe.yaml")
    skillmerge.shard(plan, index=0, of=SHARDS)
    header = conditions_of(staging_of(output))
    assert header is not None
    attempt = Attempt(output, header)
    file = attempt.open_shard(preview.shards[0])
    skillmerge.apply(write_recipe(tmp_path, coefficients={"lam": 0.25}), stats="off")
    seen = content(output)
    file.finish()
    with pytest.raises(OutputLocked, match="has taken over"), attempt.working():
        attempt.record(ShardRecord(preview.shards[0].file, 1, "", {}))
    with pytest.raises(OutputLocked):
        attempt.open_shard(preview.shards[1])
    attempt.close()
    assert content(output) == seen
    assert not staging_of(output).exists()


def test_a_task_that_is_late_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others have made its shards and finished meanwhile: its own run is not needed, and no failure."""
    plan, output = save_family(tmp_path), tmp_path / "merged"
    record, once = Attempt.record, threading.Event()

    def overtaken(self: Attempt, done: Any) -> None:
        if not once.is_set():
            once.set()
            run_tasks(plan, output)
            skillmerge.finish(plan)
        record(self, done)

    monkeypatch.setattr(Attempt, "record", overtaken)
    assert len(skillmerge.shard(plan, index=0, of=1).shards) == SHARDS
    skillmerge.verify(output)
    assert not staging_of(output).exists()


def test_changed_headers_exit_7(tmp_path: Path) -> None:
    plan = save_family(tmp_path)
    copy_with(tmp_path / "rl", tmp_path / "other", drop="model.norm.weight")
    shutil.copy(tmp_path / "other/model.safetensors", tmp_path / "rl" / FIRST)
    with pytest.raises(StalePlan, match="model rl: other tensors or sizes in model-00001-of-00004"):
        skillmerge.shard(plan, index=0, of=1)
    process = run_cli("shard", "plan.json", "--index", "0", "--of", "1", cwd=tmp_path)
    assert process.returncode == 7, process.stderr
    assert "plan again: skillmerge plan" in process.stderr
    assert not (staging_of(tmp_path / "merged") / "done").exists()


def test_bad_weights_exit_4_and_keep_what_others_made(tmp_path: Path) -> None:
    plan, output = save_family(tmp_path), tmp_path / "merged"
    last = tmp_path / "sft/model-00004-of-00004.safetensors"
    skillmerge.shard(plan, index=0, of=SHARDS)
    before = last.stat()
    with open(last, "r+b") as stream:
        stream.seek(-2, 2)
        stream.write(b"\xff\x7f")
    os.utime(last, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(UnusableWeights):
        skillmerge.shard(plan, index=0, of=1)
    assert record_of(output, FIRST).exists()


def test_what_cannot_be_a_task_is_refused(tmp_path: Path) -> None:
    plan = save_family(tmp_path)
    with pytest.raises(UsageError, match="is a recipe, but tasks need a saved plan") as caught:
        skillmerge.shard(tmp_path / "recipe.yaml", index=0, of=1)
    assert "-o plan.json" in str(caught.value.fix)
    with pytest.raises(UsageError, match="would replace model `rl`"):
        skillmerge.shard(plan, tmp_path / "rl", index=0, of=1)
    copy_with(tmp_path / "rl", tmp_path / "rl", drop="model.norm.weight")
    for path in (tmp_path / "rl").glob("model-*"):
        path.unlink()
    (tmp_path / "rl/model.safetensors.index.json").unlink()
    broken = tmp_path / "broken.json"
    assert skillmerge.plan(tmp_path / "recipe.yaml", save=broken).problems
    with pytest.raises(InputError, match="problem"):
        skillmerge.shard(broken, index=0, of=1)


def test_slurm_array_from_the_command_line(tmp_path: Path) -> None:
    plan, output = save_family(tmp_path), tmp_path / "merged"
    wanted = alone(plan)
    array = {"SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "3", "SLURM_ARRAY_TASK_COUNT": "2"}
    for task in ("1", "3"):
        environment = {**array, "SLURM_ARRAY_TASK_STEP": "2", "SLURM_ARRAY_TASK_ID": task, "SLURM_CPUS_PER_TASK": "1"}
        process = run_cli("shard", "plan.json", cwd=tmp_path, **environment)
        assert process.returncode == 0, process.stderr
        assert process.stdout.startswith(f"task {(int(task) - 1) // 2} of 2: 2 shards, "), process.stdout
        assert " 2 made in " in process.stdout
    process = run_cli("shard", "plan.json", cwd=tmp_path, SLURM_ARRAY_TASK_ID="3", **array)
    assert (process.returncode, process.stdout) == (2, "")
    assert "the Slurm array has holes" in process.stderr
    assert run_cli("shard", "plan.json", cwd=tmp_path).returncode == 2
    process = run_cli("shard", "plan.json", "--json", cwd=tmp_path, JOB_COMPLETION_INDEX="1", SKILLMERGE_OF="2")
    assert json.loads(process.stdout)["made"] == []
    skillmerge.finish(plan)
    assert content(output) == wanted
