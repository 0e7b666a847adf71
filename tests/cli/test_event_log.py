"""What a run tells programs: events as JSON lines, messages as JSON, JUnit XML by its published schema."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import run_cli, write_recipe

from skillmerge.cli.event_log import EventLog, JUnit

XSD = Path(sys.prefix) / "schemas" / "junit-4.xsd"
DOCUMENTED = (Path(__file__).parents[2] / "docs" / "files.md").read_text()


def events(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_events_tell_a_run_from_start_to_end(family: Path, tmp_path: Path) -> None:
    recipe, log = write_recipe(tmp_path, gates={"vanished": {"max": 1}}), tmp_path / "events.jsonl"
    assert run_cli("apply", recipe, "--events", log).returncode == 0
    found = events(log)
    names = [event["event"] for event in found]
    work = ["shard_finished", "shard_finished", "checked", "checked"]
    assert names == ["started", "planned", *work, "gate", "gate", "checked", "published"]
    checks = [event["check"] for event in found if event["event"] == "checked"]
    assert checks == ["finite values", "models unchanged since planning", "files, index and headers"]
    assert all(event["version"] == 1 and event["time"].endswith("Z") for event in found)
    by_name = {event["event"]: event for event in found}
    manifest = json.loads((tmp_path / "merged" / "skillmerge.manifest.json").read_text())
    assert by_name["planned"]["plan"] == manifest["plan_digest"]
    digests = {file["name"]: file["sha256"] for file in manifest["files"]}
    shards = [event for event in found if event["event"] == "shard_finished"]
    assert [event["finished"] for event in shards] == [1, 2]
    assert all(digests[event["file"]] == event["sha256"] for event in shards)
    assert by_name["published"]["output"] == str(tmp_path / "merged")
    for event in found:
        for key in event:
            assert f"`{key}`" in DOCUMENTED, key
        assert f"`{event['event']}`" in DOCUMENTED


def test_events_of_later_runs_are_appended_and_tell_failures(family: Path, tmp_path: Path) -> None:
    log = tmp_path / "events.jsonl"
    bad = write_recipe(tmp_path, gates={"changed": {"max": 0}})
    assert run_cli("apply", bad, "--events", log).returncode == 3
    assert run_cli("apply", write_recipe(tmp_path, models={"target": "nowhere"}), "--events", log).returncode != 0
    failed = [event for event in events(log) if event["event"] == "failed"]
    assert failed[0]["exit_status"] == 3
    assert failed[0]["gates"][0]["gate"] == "changed"
    assert len(failed) == 2
    assert all(f"`{key}`" in DOCUMENTED for key in failed[0])


def test_events_go_into_a_pipe_that_somebody_reads(family: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    process = run_cli("apply", family, "--events", pipe)
    assert process.returncode == 2
    assert "no process reads this pipe" in process.stderr
    with open(os.open(pipe, os.O_RDWR)) as stream:  # read and write: it never ends
        names: list[str] = []

        def read() -> None:
            while "published" not in names:
                names.append(json.loads(stream.readline())["event"])

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        assert run_cli("apply", family, "--events", pipe).returncode == 0
        reader.join(20)
        assert not reader.is_alive()
    assert names[0] == "started"


def test_events_that_cannot_be_written_do_not_stop_a_run(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    told: list[str] = []
    log = EventLog(Path("/dev/full"), told.append)
    for _ in range(3):
        log.record("started", {})
    log.close()
    assert len(told) == 1
    assert "logging of events stopped" in told[0]


def test_messages_are_json_lines_where_programs_read_them(family: Path, tmp_path: Path) -> None:
    process = run_cli("apply", family, "--verbose", "--log-format", "json")
    assert process.returncode == 0
    lines = [json.loads(line) for line in process.stderr.splitlines()]
    assert lines
    assert all({"time", "level", "message"} <= line.keys() for line in lines)
    process = run_cli("plan", tmp_path / "absent.yaml", SKILLMERGE_LOG_FORMAT="json")
    (line,) = [json.loads(line) for line in process.stderr.splitlines()]
    assert (line["level"], line["exit_status"]) == ("error", 2)
    assert "init" in line["fix"]


@pytest.mark.skipif(not XSD.exists(), reason="the JUnit schema is not there (`make` fetches it)")
def test_junit_is_valid_by_the_schema_of_jenkins(family: Path, tmp_path: Path) -> None:
    xmlschema = pytest.importorskip("xmlschema")
    schema = xmlschema.XMLSchema(str(XSD))
    junit = tmp_path / "junit.xml"
    recipe = write_recipe(tmp_path, gates={"vanished": {"max": -1}, "commands": [{"run": "echo <&>", "min": 0}]})
    assert run_cli("apply", recipe, "--junit", junit).returncode == 3
    schema.validate(str(junit))
    assert run_cli("apply", write_recipe(tmp_path)).returncode == 0
    assert run_cli("verify", tmp_path / "merged", "--junit", junit).returncode == 0
    schema.validate(str(junit))
    assert junit.read_text().count("<testcase") == 3
    (tmp_path / "merged" / "config.json").write_text("[]")
    assert run_cli("verify", tmp_path / "merged", "--junit", junit).returncode == 3
    schema.validate(str(junit))
    assert "<failure" in junit.read_text()


def cases_of(path: Path) -> dict[str, str]:
    """Test case -> the message of its failure, or nothing."""
    import xml.etree.ElementTree as xml

    found = xml.parse(path).getroot().iter("testcase")
    return {case.attrib["name"]: "".join(it.attrib["message"] for it in case.iter("failure")) for case in found}


def test_junit_of_an_apply_without_gates_has_its_own_checks(family: Path, tmp_path: Path) -> None:
    junit, own = (
        tmp_path / "junit.xml",
        ["finite values", "models unchanged since planning", "files, index and headers"],
    )
    assert run_cli("apply", family, "--junit", junit).returncode == 0
    assert cases_of(junit) == dict.fromkeys(own, "")
    assert run_cli("apply", family, "--junit", junit).returncode == 0
    assert cases_of(junit) == {"output is up to date": ""}
    skill = write_recipe(tmp_path, "rl - sft", coefficients=None, output={"path": "skill", "kind": "skill"})
    assert run_cli("apply", skill, "--junit", junit).returncode == 0
    assert cases_of(junit) == dict.fromkeys(own, "")


def test_junit_of_an_apply_names_the_check_that_failed(family: Path, tmp_path: Path) -> None:
    junit, file = tmp_path / "junit.xml", tmp_path / "rl" / "model-00001-of-00002.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-2] + b"\x80\x7f")  # Inf
    assert run_cli("apply", family, "--junit", junit).returncode == 4
    (name, problem), *rest = cases_of(junit).items()
    assert (name, rest) == ("finite values", [])
    assert "model `rl` holds inf in tensor" in problem
    assert run_cli("apply", family, "--junit", junit, "--allow-nonfinite").returncode == 0
    assert "finite values" not in cases_of(junit)


def test_junit_holds_whatever_a_name_holds(tmp_path: Path) -> None:
    import xml.etree.ElementTree as xml

    junit = JUnit(tmp_path / "j.xml", "suite \x01 \udcff")
    for odd in ("\x00\x1b[31m", "\ud800", "\uffff", "\U0001f600 <&\"'>"):
        junit.record("gate", {"gate": odd, "asked": odd, "measured": None, "passed": False, "detail": odd})
    junit.close()
    assert xml.parse(tmp_path / "j.xml").getroot()[0].attrib["name"] == "suite \ufffd \ufffd"
    names = [case.attrib["name"] for case in xml.parse(tmp_path / "j.xml").getroot().iter("testcase")]
    assert names == ["\ufffd\ufffd[31m", "\ufffd", "\ufffd", "\U0001f600 <&\"'>"]


def test_wrong_options_are_json_lines_too() -> None:
    process = run_cli("apply", "--no-such-option", SKILLMERGE_LOG_FORMAT="json")
    assert process.returncode == 2
    assert [json.loads(line)["level"] for line in process.stderr.splitlines()] == ["error"]
