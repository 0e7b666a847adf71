"""What stands at the output already, and the second time: nothing is lost, nothing is done twice."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_cli, write_family, write_recipe
from observing import (
    MergeServer,
    assert_finished,
    content,
    discard,
    finished_shards,
    identities,
    put_previous,
    reference,
    staging_of,
)

import skillmerge
from skillmerge.errors import CheckFailed, UsageError
from skillmerge.reporter import Reporter

# ----------------------------------------------------------------------------------- what stands at the output


def test_output_in_a_folder_that_does_not_exist_is_made(small: Path) -> None:
    output = small.parent / "new" / "and deeper" / "merged"
    skillmerge.apply(small, output)
    skillmerge.verify(output)


def test_output_that_is_an_empty_folder_is_filled(small: Path) -> None:
    (small.parent / "merged").mkdir()
    skillmerge.apply(small)
    skillmerge.verify(small.parent / "merged")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["file", "link to a folder", "dangling link"])
def test_output_that_is_no_folder_is_refused(small: Path, tmp_path: Path, kind: str, overwrite: bool) -> None:
    output, elsewhere = tmp_path / "merged", tmp_path / "elsewhere"
    if kind == "file":
        output.write_text("precious")
    else:
        output.symlink_to(elsewhere)
    if kind == "link to a folder":
        elsewhere.mkdir()
        (elsewhere / "precious").write_text("precious")
    before = output.lstat()
    with pytest.raises(UsageError, match="not a folder") as caught:
        skillmerge.apply(small, overwrite=overwrite)
    assert caught.value.exit_status == 2
    assert (output.lstat().st_ino, output.lstat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert not staging_of(output).exists()


def test_output_that_exists_is_only_replaced_when_asked(server: MergeServer, small: Path) -> None:
    output, wanted = small.parent / "merged", reference(server, small)
    previous = put_previous(output)
    refused = run_cli("apply", small)
    assert refused.returncode == 2
    assert "--overwrite" in refused.stderr
    assert content(output) == previous
    assert not staging_of(output).exists()
    skillmerge.apply(small, overwrite=True)
    assert_finished(output, wanted)


def test_output_that_appears_during_the_run_is_not_touched(server: MergeServer, small: Path) -> None:
    output, wanted = small.parent / "merged", reference(server, small)

    class Intruder(Reporter):
        def bar(self, total: int) -> Any:
            put_previous(output)
            return super().bar(total)

    with pytest.raises(UsageError):
        skillmerge.apply(small, reporter=Intruder())
    assert set(content(output)) == {"config.json", "model.safetensors"}
    with pytest.raises(UsageError, match="already exists"):
        skillmerge.apply(small)
    assert set(content(output)) == {"config.json", "model.safetensors"}
    done = identities(staging_of(output) / "complete")
    discard(output)
    skillmerge.apply(small)
    assert_finished(output, wanted)
    assert identities(output) == done, "the finished work was done again"


def test_output_that_is_a_mount_point_is_refused_before_work(small: Path, mount_disk: Callable[..., Path]) -> None:
    disk = mount_disk("size=4m")
    with pytest.raises(UsageError, match="mount point"):
        skillmerge.apply(small, disk)
    assert not staging_of(disk).exists()


def test_output_on_a_disk_that_cannot_be_written_is_refused(small: Path, mount_disk: Callable[..., Path]) -> None:
    disk = mount_disk("size=4m,ro")
    refused = run_cli("apply", small, "--output", disk / "merged")
    assert refused.returncode == 2
    assert "Read-only" in refused.stderr
    assert "--output" in refused.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_output_in_a_folder_without_permission_is_refused(small: Path, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    with pytest.raises(UsageError, match="Permission"):
        skillmerge.apply(small, closed / "merged")


def test_output_whose_staging_folder_is_a_file_is_refused(small: Path) -> None:
    staging_of(small.parent / "merged").write_text("precious")
    with pytest.raises(UsageError, match=r"merged\.partial"):
        skillmerge.apply(small)


# -------------------------------------------------------------------------------------------- the second time


def test_finished_output_is_left_as_it_is(small: Path) -> None:
    output = small.parent / "merged"
    skillmerge.apply(small)
    before = identities(output), output.stat().st_mtime_ns
    again = run_cli("apply", small)
    assert again.returncode == 0
    assert "nothing to do" in again.stdout
    assert (identities(output), output.stat().st_mtime_ns) == before
    assert not staging_of(output).exists()


def test_finished_output_of_other_inputs_is_not_taken_for_this_one(small: Path) -> None:
    output = small.parent / "merged"
    skillmerge.apply(small)
    before = content(output)
    changed = small.parent / "rl" / "model-00002-of-00003.safetensors"
    data = changed.read_bytes()
    changed.write_bytes(data[:-2] + bytes(byte ^ 1 for byte in data[-2:]))
    refused = run_cli("apply", small)
    assert refused.returncode == 2
    assert "--overwrite" in refused.stderr
    assert content(output) == before
    skillmerge.apply(small, overwrite=True)
    assert content(output) != before


def test_input_changed_between_two_attempts_is_noticed(server: MergeServer, wide: Path) -> None:
    steps = server.run(wide)["steps"]
    discard(wide.parent / "merged")
    assert server.run(wide, kill_at=steps // 2)["status"] == -signal.SIGKILL
    assert finished_shards(wide.parent / "merged")
    for path in sorted((wide.parent / "rl").glob("*.safetensors")):
        data = path.read_bytes()
        path.write_bytes(data[:-2] + bytes(byte ^ 1 for byte in data[-2:]))
    wanted = reference(server, wide)
    answer = server.run(wide)
    assert any("dropped" in remark for remark in answer["said"])
    assert_finished(wide.parent / "merged", wanted)


@pytest.mark.parametrize(
    ("was", "now"),
    [("0.7", "0.25"), ("+ lam * (rl", "- lam * (rl"), ("lam * (rl - sft)", "0.7 * lam * (rl - sft)")],
    ids=["coefficient", "sign", "literal"],
)
def test_leftovers_of_another_recipe_are_dropped_and_said_so(
    server: MergeServer, wide: Path, was: str, now: str
) -> None:
    steps = server.run(wide)["steps"]
    discard(wide.parent / "merged")
    assert server.run(wide, kill_at=steps // 2)["status"] == -signal.SIGKILL
    assert finished_shards(wide.parent / "merged")
    other = wide.with_name("other.yaml")
    assert was in wide.read_text()
    other.write_text(wide.read_text().replace(was, now))
    wanted = reference(server, other)
    done = run_cli("apply", other)
    assert done.returncode == 0
    assert "dropped an unfinished run of another plan" in done.stderr
    assert_finished(wide.parent / "merged", wanted)


def test_torch_is_left_with_the_threads_it_had(small: Path) -> None:
    before = torch.get_num_threads()
    skillmerge.apply(small)
    assert torch.get_num_threads() == before


def test_donor_that_the_recipe_changes_drops_what_was_unfinished(tmp_path: Path) -> None:
    """Found by a review: it was refused as if an earlier version had chosen the donor."""
    write_family(tmp_path)
    recipe = write_recipe(tmp_path, gates={"norm_ratio": {"max": 0}})
    with pytest.raises(CheckFailed):
        skillmerge.apply(recipe, keep_failed=True)
    assert any((staging_of(tmp_path / "merged") / "files").iterdir())
    changed = write_recipe(tmp_path, output={"path": "merged", "like": "sft"})
    applied = run_cli("apply", changed)
    assert applied.returncode == 0
    assert "note: dropped an unfinished run of another plan\n" in applied.stderr
