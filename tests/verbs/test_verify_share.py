"""`verify --shard I/N`: the parts of an output, each checked by one task, are the whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import flip, run_cli, write_family

import skillmerge
from skillmerge.errors import CheckFailed, UsageError
from skillmerge.outputs import verify


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    return skillmerge.apply(write_family(tmp_path, shards=4)).output


@pytest.mark.parametrize("parts", [1, 3, 40])
def test_parts_are_the_whole(merged: Path, monkeypatch: pytest.MonkeyPatch, parts: int) -> None:
    read: list[str] = []
    scan = verify._digest_and_scan

    def watched(path: Path, *given: Any) -> str:
        read.append(path.name)
        return scan(path, *given)

    monkeypatch.setattr(verify, "_digest_and_scan", watched)
    found = [skillmerge.verify(merged, shard=(index, parts)) for index in range(parts)]
    assert len(read) == len(set(read)) == found[0].files - 2, "all but the manifest and the run log"
    shares = [verdict.as_dict()["share"] for verdict in found]
    assert [(share["index"], share["of"]) for share in shares] == [(index, parts) for index in range(parts)]
    assert sum(share["files"] for share in shares) == len(read)
    assert sum(share["bytes"] for share in shares) == found[0].bytes
    assert "share" not in skillmerge.verify(merged).as_dict()


def test_the_part_with_the_difference_exits_3(merged: Path) -> None:
    flip(merged / "model-00003-of-00004.safetensors")
    ends = [run_cli("verify", merged, "--shard", f"{index}/4", "--json") for index in range(4)]
    assert sorted(end.returncode for end in ends) == [0, 0, 0, 3]
    (bad,) = [end for end in ends if end.returncode]
    assert "model-00003-of-00004.safetensors: its bytes are not those that were written" in bad.stderr
    good = next(end for end in ends if not end.returncode)
    assert json.loads(good.stdout)["share"]["of"] == 4


def test_what_is_missing_every_part_notices(merged: Path) -> None:
    (merged / "model-00003-of-00004.safetensors").unlink()
    for index in range(3):
        with pytest.raises(CheckFailed, match="files are missing"):
            skillmerge.verify(merged, shard=(index, 3))


def test_a_part_says_what_it_has_read(merged: Path) -> None:
    process = run_cli("verify", merged, "--shard", "1/2")
    assert ": verified: part 1 of 2, " in process.stdout
    assert " of 8 files, " in process.stdout
    assert ": their digests and values; of all files index, headers, shapes, dtypes" in process.stdout


@pytest.mark.parametrize("text", ["2/2", "1", "1/", "/2", "-1/2", "1/2/3", "a/b", "1.0/2", "0/0", "0/" + "9" * 5000])
def test_what_is_no_part_is_refused(merged: Path, text: str) -> None:
    process = run_cli("verify", merged, "--shard", text)
    assert process.returncode == 2
    assert "is not a part; write it like 0/64" in process.stderr


@pytest.mark.parametrize("shard", [(2, 2), (-1, 2), (0, 0), ("0", 2)])
def test_numbers_that_are_no_part_are_refused(merged: Path, shard: Any) -> None:
    with pytest.raises(UsageError, match=r"no part 2 of 2|a number from"):
        skillmerge.verify(merged, shard=shard)


@pytest.mark.parametrize("more", [{"load": True}, {"signature": True}, {"parent": "rl"}, {"public_key": "key.pem"}])
def test_a_part_checks_nothing_else(merged: Path, more: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="reads a part of the bytes"):
        skillmerge.verify(merged, shard=(0, 2), **more)
