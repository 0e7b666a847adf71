"""`finish`: an output of what tasks have made, checked and published as `apply` does."""

from __future__ import annotations

import json
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from clusters import SHARDS, alone, record_of, run_tasks, save, save_family, set_time
from conftest import flip, put_family, random_tensors, run_cli, tensor_shapes, write_checkpoint, write_recipe
from hub_server import HubServer
from observing import content, identities, staging_of

import skillmerge
from skillmerge.engine.destination import ShardRecord
from skillmerge.errors import (
    CheckFailed,
    OutputLocked,
    ResourceError,
    StalePlan,
    TemporaryError,
    UnusableWeights,
    UsageError,
)
from skillmerge.outputs.attempts import Attempt
from skillmerge.outputs.journal import Header
from skillmerge.outputs.staging import Staging
from skillmerge.outputs.tasks import news
from skillmerge.plans import saved
from skillmerge.reporter import Reporter
from skillmerge.study.gates import GateFailed
from skillmerge.verbs import apply
from skillmerge.verbs.tasks import collect
from skillmerge.verbs.tasks.shard import conditions

FIRST, LAST = "model-00001-of-00004.safetensors", "model-00004-of-00004.safetensors"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "PATIENCE", 0.0)
    monkeypatch.setattr(collect, "LOOK", 0.02)


class Listener(Reporter):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.notes: list[str] = []
        self.events: list[str] = []

    def waiting(self, message: str) -> None:
        self.lines.append(message)

    def note(self, message: str) -> None:
        self.notes.append(message)

    def event(self, name: str, **what: Any) -> None:
        self.events.append(name)


def test_missing_shards_are_named(tmp_path: Path) -> None:
    """Nothing is lost by asking too early, however often."""
    plan, output = save_family(tmp_path), tmp_path / "merged"
    wanted = alone(plan)
    with pytest.raises(TemporaryError, match=r"4 of 4 shards are missing: model-00001-of-00004\.safetensors, model-"):
        skillmerge.finish(plan)
    assert not staging_of(output).exists()
    skillmerge.shard(plan, index=0, of=SHARDS)
    before = identities(staging_of(output) / "files")
    for _ in range(2):
        process = run_cli("finish", "plan.json", cwd=tmp_path)
        assert process.returncode == 75
        assert "error: 3 of 4 shards are missing: model-00002-of-00004.safetensors, " in process.stderr
    assert identities(staging_of(output) / "files") == before
    assert sorted(run_tasks(plan, output)) != []
    assert run_cli("finish", "plan.json", "-q", cwd=tmp_path).returncode == 0
    assert content(output) == wanted


def test_records_are_believed_and_files_that_changed_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By size and time; what has another time is read, and with `verify` everything is."""
    plan, output = save_family(tmp_path), tmp_path / "merged"
    run_tasks(plan, output)
    read: list[str] = []
    is_intact = Staging.is_intact

    def watched(self: Staging, done: Any, stop: Any = None) -> bool:
        read.append(done.file)
        return is_intact(self, done, stop)

    monkeypatch.setattr(Staging, "is_intact", watched)
    files = staging_of(output) / "files"
    set_time(files / FIRST, 10**18)
    monkeypatch.setattr("skillmerge.verbs.apply._Merge._describe", lambda *_: (_ for _ in ()).throw(CheckFailed("no")))
    for verify, wanted in ((False, [FIRST]), (True, sorted(path.name for path in files.iterdir()))):
        read.clear()
        with pytest.raises(CheckFailed):
            skillmerge.finish(plan, verify=verify)
        assert sorted(read) == wanted


@pytest.mark.parametrize("way", ["size", "bytes", "gone", "bytes, times kept"])
def test_damaged_shards_are_missing(tmp_path: Path, way: str) -> None:
    plan, output = save_family(tmp_path), tmp_path / "merged"
    wanted = alone(plan)
    run_tasks(plan, output)
    file = staging_of(output) / "files" / LAST
    if way == "size":
        file.write_bytes(file.read_bytes()[:-1])
    elif way == "gone":
        file.unlink()
    else:
        flip(file, keep_times=way != "bytes")
    with pytest.raises(TemporaryError, match=f"1 of 4 shards is missing: {LAST}"):
        skillmerge.finish(plan, verify=way == "bytes, times kept")
    assert run_tasks(plan, output) == [LAST]
    skillmerge.finish(plan)
    assert content(output) == wanted


@pytest.mark.parametrize("shard", [f"model-{number:05d}-of-{SHARDS:05d}.safetensors" for number in range(1, 5)])
def test_torn_records_are_missing(tmp_path: Path, shard: str) -> None:
    plan, output = save_family(tmp_path), tmp_path / "merged"
    run_tasks(plan, output)
    record = record_of(output, shard)
    whole = record.read_bytes()
    for torn in (b"", whole[: len(whole) // 2], whole[:-2], whole.replace(b'"sha256": "', b'"sha256": "0')):
        record.write_bytes(torn)
        with pytest.raises(TemporaryError, match=f"1 of 4 shards is missing: {shard}"):
            skillmerge.finish(plan)
    assert run_tasks(plan, output) == [shard]
    skillmerge.finish(plan)
    skillmerge.verify(output)


def test_asking_too_early_stops_no_task(tmp_path: Path) -> None:
    """Also one that has recorded nothing yet."""
    plan, output = save_family(tmp_path), tmp_path / "merged"
    document = json.loads(plan.read_text())
    made = Header(saved.read(plan).digests()[0], conditions(document["versions"], "sampled", False))
    shard = skillmerge.plan(tmp_path / "recipe.yaml").shards[0]
    with closing(Attempt(output, made)) as attempt:
        file = attempt.open_shard(shard)
        with pytest.raises(TemporaryError, match="4 of 4 shards are missing"):
            skillmerge.finish(plan)
        file.finish()
        attempt.record(ShardRecord(shard.file, shard.size, "", {}))
    assert record_of(output, FIRST).exists()


def test_a_slower_task_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its shard is recorded already: the file stays. And it cannot come in while the output is checked."""
    plan, output = save_family(tmp_path), tmp_path / "merged"
    preview = skillmerge.plan(tmp_path / "recipe.yaml")
    made = Header(saved.read(plan).digests()[0], conditions(preview.versions, "sampled", False))
    with closing(Attempt(output, made)) as slow:
        for shard in preview.shards[:2]:
            slow.open_shard(shard).finish()
        run_tasks(plan, output)
        before = identities(staging_of(output) / "files")
        slow.record(ShardRecord(preview.shards[0].file, preview.shards[0].size, "", {}))
        assert identities(staging_of(output) / "files") == before
        check = apply.check_structure

        def late(*given: Any) -> None:
            record_of(output, preview.shards[1].file).unlink()
            with pytest.raises(OutputLocked, match="has taken over"):
                slow.record(ShardRecord(preview.shards[1].file, preview.shards[1].size, "", {}))
            check(*given)

        monkeypatch.setattr(apply, "check_structure", late)
        skillmerge.finish(plan)
    skillmerge.verify(output)


def test_only_finish_takes_the_lock(tmp_path: Path) -> None:
    """Tasks work beside a command that holds the folder; a second one that would clear it does not."""
    plan, output = save_family(tmp_path), tmp_path / "merged"
    skillmerge.shard(plan, index=0, of=2)
    with closing(Staging(output)):
        for verb in (skillmerge.finish, skillmerge.apply):
            with pytest.raises(OutputLocked, match="another run is writing"):
                verb(plan)
        assert len(skillmerge.shard(plan, index=1, of=2).made) == 2
    skillmerge.finish(plan)
    skillmerge.verify(output)


@pytest.mark.parametrize("torn", ["", '{"version": 2, "plan": "', "[]", "gone"])
def test_a_torn_file_of_the_tasks_is_written_again(tmp_path: Path, torn: str) -> None:
    """Records say themselves what they are of."""
    plan, output = save_family(tmp_path), tmp_path / "merged"
    wanted = alone(plan)
    skillmerge.shard(plan, index=0, of=2)
    path = staging_of(output) / "skillmerge.tasks.json"
    whole = path.read_bytes()
    path.unlink() if torn == "gone" else path.write_text(torn)
    assert skillmerge.shard(plan, index=0, of=2).made == ()
    assert len(skillmerge.shard(plan, index=1, of=2).made) == 2
    assert path.read_bytes() == whole
    path.unlink() if torn == "gone" else path.write_text(torn)
    skillmerge.finish(plan)
    assert content(output) == wanted


def test_it_waits_for_the_last_shard(tmp_path: Path) -> None:
    """And begins to wait before the first task has."""
    plan, output = save_family(tmp_path), tmp_path / "merged"
    wanted, listener = alone(plan), Listener()
    waiting = threading.Thread(target=lambda: skillmerge.finish(plan, wait=True, reporter=listener))
    waiting.start()
    try:
        while not listener.lines:
            time.sleep(0.01)
        assert listener.lines[0] == f"no task has begun on {output} yet"
        for index in range(SHARDS):
            skillmerge.shard(plan, index=index, of=SHARDS, stats="full")
            seen = len(listener.lines)
            while waiting.is_alive() and len(listener.lines) < seen + 2:
                time.sleep(0.01)
    finally:
        waiting.join(60)
    assert content(output) != wanted, "the tasks measured more"
    assert content(output) == alone(plan, stats="full", overwrite=True)
    lines = [line for line in listener.lines if "/4 shards, " in line]
    assert any(line.startswith("1/4 shards, 2.9 of 8.") for line in lines), lines
    assert any("KB/s" in line or "B/s" in line for line in lines)
    assert listener.events.count("shard_finished") >= SHARDS - 1
    assert listener.events[-1] == "published"


def test_a_wait_has_an_end_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first task, and before the last: what is missing is named, and nothing is lost."""
    plan, output = save_family(tmp_path), tmp_path / "merged"
    wanted, listener = alone(plan), Listener()
    with pytest.raises(TemporaryError, match=r"4 of 4 shards are missing after 0 s: model-00001-of-00004") as caught:
        skillmerge.finish(plan, wait=True, wait_limit=0.2, reporter=listener)
    assert caught.value.fix == "run their tasks again, then the same command; or pass a longer `--wait-limit`"
    assert len(listener.lines) > 2
    assert not staging_of(output).exists()
    run_tasks(plan, output)
    record_of(output, LAST).unlink()
    before = time.monotonic()
    process = run_cli("finish", "plan.json", "--wait-limit", "1.5s", cwd=tmp_path)
    assert (process.returncode, time.monotonic() - before > 1.4) == (75, True)
    assert f"1 of 4 shards is missing after 2 s: {LAST}" in process.stderr
    assert run_tasks(plan, output) == [LAST]
    skillmerge.finish(plan, wait_limit=60)
    assert content(output) == wanted


def test_it_waits_beside_an_output_that_it_is_to_replace(tmp_path: Path) -> None:
    """For tasks that have not begun, and may measure what they are told: it must not take the folder before them."""
    plan, output, listener = save_family(tmp_path), tmp_path / "merged", Listener()
    wanted = alone(plan, stats="full")
    skillmerge.apply(write_recipe(tmp_path, coefficients={"lam": 0.25}))
    options: dict[str, Any] = {"wait_limit": 40, "overwrite": True, "reporter": listener}
    waiting = threading.Thread(target=lambda: skillmerge.finish(plan, **options), daemon=True)
    waiting.start()
    try:
        end = time.monotonic() + 30
        while not listener.lines and waiting.is_alive() and time.monotonic() < end:
            time.sleep(0.01)
        assert listener.lines[:1] == [f"no task has begun on {output} yet"]
        run_tasks(plan, output, stats="full")
    finally:
        waiting.join(60)
    assert content(output) == wanted
    assert skillmerge.finish(plan, wait=True, overwrite=True).already


@pytest.mark.parametrize("text", ["6", "h", "-1h", "0s", "1 h", "6hours", "nan", "1e9d", "9" * 400 + "s", "٣h"])
def test_what_is_no_time_is_refused(tmp_path: Path, text: str) -> None:
    process = run_cli("finish", tmp_path / "plan.json", "--wait-limit", text)
    assert process.returncode == 2
    assert f"`{text}` is not a time; write it like 90s, 30m, 6h or 2d" in process.stderr


@pytest.mark.parametrize(
    ("seconds", "text"), [(89, "89 s"), (1800, "30 min"), (21_600, "6 h"), (9_000, "2.5 h"), (5_000_000, "1388.9 h")]
)
def test_times_are_shown_in_a_fitting_unit(seconds: float, text: str) -> None:
    assert collect._time(seconds) == text


@pytest.mark.parametrize("limit", [0, -1, float("inf"), float("nan"), True, "6h"])
def test_a_limit_that_is_none_is_refused(tmp_path: Path, limit: Any) -> None:
    with pytest.raises(UsageError, match=r"wait_limit .*: seconds, more than 0"):
        skillmerge.finish(tmp_path / "plan.json", wait_limit=limit)


def test_it_says_what_is_slowest(tmp_path: Path) -> None:
    plan, output = save_family(tmp_path), tmp_path / "merged"
    skillmerge.shard(plan, index=0, of=SHARDS)
    for name, host, since in (("a", "n7", 185), ("b", "n8", 20), ("c", "n9", 10**6)):
        folder = staging_of(output) / "attempts" / name
        folder.mkdir()
        shard = LAST if name != "c" else FIRST
        (folder / "task.json").write_text(json.dumps({"host": host, "shards": {shard: time.time() - since}}))
    preview = skillmerge.plan(tmp_path / "recipe.yaml")
    with closing(Staging(output)) as staging:
        text = collect._Progress(preview).text(staging, {LAST: 1})
    assert text.endswith(", 1 task, slowest model-00004-of-00004 (n8, 20 s)"), text


def test_bytes_of_shards_in_the_making_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task notes every few seconds how far it is; one that has fallen silent counts no more."""
    monkeypatch.setattr(news, "EVERY", 0.0)
    plan, output = save_family(tmp_path), tmp_path / "merged"
    document, preview = json.loads(plan.read_text()), skillmerge.plan(tmp_path / "recipe.yaml")
    made = Header(saved.read(plan).digests()[0], conditions(document["versions"], "sampled", False))
    first, second = preview.shards[:2]
    sizes = {shard.file: shard.size for shard in preview.shards}
    with closing(Attempt(output, made)) as one, closing(Attempt(output, made)) as two:
        file, other = one.open_shard(first), two.open_shard(second)
        file.write(memoryview(bytes(1000)), 80)
        progress = collect._Progress(preview)
        with closing(Staging(output)) as staging:
            text = progress.text(staging, sizes)
            assert text.startswith("0/4 shards, 1.0 of 8."), text
            assert "KB, 2 tasks, slowest model-00001" in text
            other.write(memoryview(bytes(500)), 80)
            text = progress.text(staging, sizes)
            assert text.startswith("0/4 shards, 1.5 of 8."), text
            assert "B/s, 2 tasks" in text
            monkeypatch.setattr(collect, "_SILENCE", 0.0)
            assert progress.text(staging, sizes).startswith("0/4 shards, 0 B of 8.")
        file.finish()
        one.record(ShardRecord(first.file, first.size, "", {}))
        assert "written" not in json.loads(record_of(output, first.file).read_text())


def test_a_failed_gate_exits_3_and_drops_the_shards(tmp_path: Path) -> None:
    plan, output = save_family(tmp_path, gates={"norm_ratio": {"max": 0}}), tmp_path / "merged"
    run_tasks(plan, output)
    with pytest.raises(GateFailed):
        skillmerge.finish(plan, keep_failed=True)
    assert (staging_of(output) / "files" / FIRST).exists()
    with pytest.raises(GateFailed):
        skillmerge.finish(plan)
    assert not staging_of(output).exists()
    assert not output.exists()


def test_an_existing_output_is_kept_until_told(tmp_path: Path) -> None:
    plan, output = save_family(tmp_path), tmp_path / "merged"
    output.mkdir()
    (output / "model.safetensors").write_bytes(b"of before")
    run_tasks(plan, output)
    with pytest.raises(UsageError, match="already exists"):
        skillmerge.finish(plan)
    skillmerge.finish(plan, overwrite=True)
    skillmerge.verify(output)
    assert skillmerge.finish(plan).already


def test_a_changed_model_exits_7(tmp_path: Path) -> None:
    """Also one that no task would notice any more."""
    plan, output = save_family(tmp_path), tmp_path / "merged"
    run_tasks(plan, output)
    path = tmp_path / "rl" / FIRST
    path.write_bytes(path.read_bytes())
    with pytest.raises(StalePlan, match="model rl: rewritten since"):
        skillmerge.finish(plan)
    assert record_of(output, FIRST).exists()


def test_what_the_tasks_allow_is_theirs_to_say(tmp_path: Path) -> None:
    """Also where it is said by their output alone: who was killed at the end runs the same command again."""
    plan, output = save_family(tmp_path), tmp_path / "merged"
    run_tasks(plan, output, stats="off", allow_nonfinite=True)
    environment = skillmerge.finish(plan).manifest.environment.conditions
    assert (environment["stats"], environment["allow_nonfinite"]) == ("off", True)
    assert skillmerge.finish(plan).already
    assert skillmerge.finish(plan, wait=True).already


def test_tensors_that_no_task_reads_are_proved(tmp_path: Path) -> None:
    """Integers are in no file of a skill: they must be the same in both models, which `finish` sees to."""
    shapes = tensor_shapes(layers=1)
    for seed, model in enumerate(("rl", "sft")):
        tensors = {**random_tensors(shapes, seed=seed), "positions": random_tensors({"x": (4,)})["x"].short()}
        write_checkpoint(tmp_path / model, tensors, shards=2)
    keys: dict[str, Any] = {"merge": "rl - sft", "coefficients": None, "models": {"rl": "rl", "sft": "sft"}}
    recipe = write_recipe(tmp_path, **keys, output={"path": "merged", "kind": "skill"})
    plan, output = save(recipe), tmp_path / "merged"
    wanted = alone(plan)
    run_tasks(plan, output, tasks=1)
    skillmerge.finish(plan)
    assert content(output) == wanted
    for file in (tmp_path / "rl").glob("*.safetensors"):
        position = file.read_bytes().find(random_tensors({"x": (4,)})["x"].short().numpy().tobytes())
        if b"positions" in file.read_bytes():
            flip(file, -1 if position < 0 else position, keep_times=True)
    run_tasks(plan, tmp_path / "again", tasks=1)
    with pytest.raises(UnusableWeights):
        skillmerge.finish(plan, tmp_path / "again")


def test_it_pushes(hub: HubServer, tmp_path: Path) -> None:
    put_family(hub, tmp_path, shards=SHARDS)
    recipe = write_recipe(tmp_path, output={"path": "merged", "license": "mit"})
    plan = save(recipe)
    run_tasks(plan, tmp_path / "merged")
    result = skillmerge.finish(plan, push="acme/merged")
    assert result.published is not None
    assert hub.content("acme/merged", FIRST) == (tmp_path / "merged" / FIRST).read_bytes()


def test_command_writes_reports(tmp_path: Path) -> None:
    plan, output = save_family(tmp_path), tmp_path / "merged"
    run_tasks(plan, output)
    process = run_cli("finish", "plan.json", "--report", "page.html", "--result-file", "result.json", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "Effect of rounding (sampled)" in process.stdout
    assert json.loads((tmp_path / "result.json").read_text())["already"] is False
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert run_cli("finish", "recipe.yaml", cwd=tmp_path).returncode == 2


def test_a_full_disk_is_no_reason_not_to_finish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shards are there: what is still written is small."""
    plan, output = save_family(tmp_path), tmp_path / "merged"
    run_tasks(plan, output)
    monkeypatch.setattr("skillmerge.plans.budget.free_disk", lambda path: 0)
    skillmerge.finish(plan)
    with pytest.raises(ResourceError):
        skillmerge.shard(plan, tmp_path / "other", index=0, of=1)
