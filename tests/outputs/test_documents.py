"""Documents beside the weights: what is read is written again to the byte, today's and what version 0.1.0 left."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import write_family, write_recipe

import skillmerge
from skillmerge.engine.destination import ShardRecord
from skillmerge.engine.measures.skill_statistics import SkillStatistics
from skillmerge.engine.rounding_statistics import Statistics
from skillmerge.errors import CheckFailed, UsageError
from skillmerge.outputs import manifest
from skillmerge.outputs.journal import Header, Journal, Placing, Sealed
from skillmerge.outputs.output import Outcome, Output, RunLog
from skillmerge.outputs.staging import MANIFEST_FILE

ARTEFACTS = Path(__file__).parent.parent / "golden" / "artefacts.tar.gz"


def left_behind(name: str) -> list[tuple[str, bytes]]:
    """The files of that name that version 0.1.0 left."""
    with tarfile.open(ARTEFACTS) as archive:
        members = [member for member in archive.getmembers() if Path(member.name).name == name]
        return [(member.name, stream.read()) for member in members if (stream := archive.extractfile(member))]


def read_again(content: bytes) -> bytes:
    return manifest.parse(content, "manifest").to_bytes()


@pytest.mark.parametrize("stats", ["full", "sampled", "off"])
@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": "float32", "rounding": "stochastic", "seed": 3}, {"kind": "skill"}, {"kind": "skill", "keep": 0.3}],
    ids=["model", "cast", "skill", "kept"],
)
def test_a_manifest_is_what_its_bytes_say(tmp_path: Path, options: dict[str, Any], stats: str) -> None:
    write_family(tmp_path)
    skill = "kind" in options
    merge = "rl - sft" if skill else "target + lam * (rl - sft)"
    recipe = write_recipe(
        tmp_path, merge, output={"path": "made", **options}, coefficients=None if skill else {"lam": 0.4}
    )
    result = skillmerge.apply(recipe, stats=stats, hash_inputs=stats == "full")
    content = (result.output / MANIFEST_FILE).read_bytes()
    assert result.manifest.to_bytes() == content
    found = Output.open(result.output).manifest
    assert found == result.manifest
    assert found.to_bytes() == content
    assert found.as_dict() == json.loads(content)
    assert isinstance(found.statistics, SkillStatistics if skill else Statistics)


def test_manifests_of_version_0_1_0_are_read_to_the_byte() -> None:
    found = left_behind(MANIFEST_FILE)
    assert len(found) > 1
    for name, content in found:
        assert read_again(content) == content, name


def test_journals_of_version_0_1_0_are_read_to_the_byte(tmp_path: Path) -> None:
    found = left_behind("journal.jsonl")
    found = [(name, content) for name, content in found if b'"plan"' in content]  # those of sweeps are others'
    assert found
    for name, content in found:
        (tmp_path / "journal.jsonl").write_bytes(content)
        rows = Journal(tmp_path / "journal.jsonl", "0").read()
        assert isinstance(rows[0], Header)
        assert any(isinstance(row, ShardRecord) for row in rows), name
        Journal(tmp_path / "again.jsonl", "0").start(rows)
        assert (tmp_path / "again.jsonl").read_bytes() == content, name


def test_run_logs_of_version_0_1_0_are_read_to_the_byte(tmp_path: Path) -> None:
    found = left_behind(manifest.RUN_LOG_FILE)
    assert found
    for name, content in found:
        (tmp_path / manifest.RUN_LOG_FILE).write_bytes(content)
        assert RunLog.read(tmp_path).to_bytes() == content, name


def test_every_row_of_a_journal_is_read_as_it_was_written(tmp_path: Path) -> None:
    rows = [
        Header("plan", {"inputs": {"rl": {"model.safetensors": [1, 2]}}, "stats": "full", "only_on": "acme/merged"}),
        ShardRecord("a", 3, "digest", {}, {"weight": {"shape": [2]}}),
        ShardRecord("a", 3, "digest", {}, None, uploaded=True),
        Sealed("plan"),
        Placing("digest"),
        Placing(None),
    ]
    journal = Journal(tmp_path / "journal.jsonl", "0")
    assert journal.read() == []
    journal.start(rows[:2])
    for row in rows[2:]:
        journal.append(row)
    assert journal.read() == rows


@pytest.mark.parametrize(
    "tail", [b'{"shard": "b"', b'{"shard": "b"}\n', b"[]\n\xff\n", b"7\n", b'"plan"\n', b"nothing\n"]
)
def test_a_journal_is_read_as_far_as_it_is_whole(tmp_path: Path, tail: bytes) -> None:
    journal = Journal(tmp_path / "journal.jsonl", "0")
    journal.start([Header("plan", {})])
    with open(journal.path, "ab") as stream:
        stream.write(tail)
    journal.append(Sealed("plan"))
    assert journal.read() == [Header("plan", {})]


def test_an_outcome_is_read_from_a_log_that_anybody_wrote(tmp_path: Path) -> None:
    outcome = Outcome("changed mlp", "more than 0", 0.25, True, "")
    assert Outcome.from_dict(json.loads(json.dumps(outcome.as_dict()))) == outcome
    rows = [{}, {"gate": 3, "measured": "much", "passed": "yes"}, 7, None]
    (tmp_path / manifest.RUN_LOG_FILE).write_text(json.dumps({"gates": rows}))
    first, second = RunLog.read(tmp_path).gates
    assert (first.passed, first.measured) == (False, None)
    assert (second.gate, second.passed, second.measured) == ("3", True, None)
    for content in ("", "[]", '{"gates": 7}', "\xff"):
        (tmp_path / manifest.RUN_LOG_FILE).write_text(content, encoding="latin-1")
        assert RunLog.read(tmp_path).gates == ()
    assert RunLog.read(tmp_path / "nowhere").gates == ()


def test_an_output_that_its_gates_refused_is_nobodys_release(tmp_path: Path) -> None:
    output = Output.open(skillmerge.apply(write_family(tmp_path)).output)
    output.refuse_failed()
    log = RunLog("2026-01-01T00:00:00Z", 1.0, (Outcome("loads", "yes", None, False),))
    (output.folder / manifest.RUN_LOG_FILE).write_bytes(log.to_bytes())
    with pytest.raises(CheckFailed, match="failed its gates: loads"):
        output.refuse_failed()


def test_only_a_folder_with_a_manifest_is_an_output(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for place in ("file", "nowhere"):
        with pytest.raises(UsageError, match=r"is not a folder|does not exist"):
            Output.open(tmp_path / place)
    with pytest.raises(CheckFailed, match=r"has no readable skillmerge\.manifest\.json"):
        Output.open(tmp_path)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda it: it["output"].update(kind="skill", compression="none"),
        lambda it: it["tensors"][0].update(statistics={"total": 1}),
        lambda it: it["tensors"][0].update(coefficients=["much"]),
        lambda it: it["statistics"]["all"].update(merged="all"),
        lambda it: it["environment"].update(run_log={"name": "other.json", "sha256": ""}),
    ],
)
def test_a_manifest_of_another_shape_is_refused(tmp_path: Path, spoil: Callable[[dict[str, Any]], Any]) -> None:
    document = skillmerge.apply(write_family(tmp_path)).manifest.as_dict()
    del document["digest"]
    spoil(document)
    text = json.dumps(document, ensure_ascii=False, separators=(", ", ": "))
    document["digest"] = hashlib.sha256(text.encode()).hexdigest()
    with pytest.raises(CheckFailed, match="was changed after it was written"):
        manifest.parse(manifest.to_bytes(document), "manifest")
