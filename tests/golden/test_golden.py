"""Everything that version 0.1.0 showed of its behavior is shown by the code of today: bytes, figures, words, statuses.

`record.py` made the recording. A scenario is played once, whichever of its steps are tested, also with several workers.
Where a change of behavior is meant, record again and read the diff.
"""

from __future__ import annotations

import difflib
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playing import Server, play
from record import read_recorded
from scenarios import SCENARIOS

RECORDED = read_recorded()
STEPS = [(scenario, number) for scenario, steps in RECORDED.items() for number in range(len(steps))]
Played = Callable[[str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Played]:
    """Results of a scenario by its name. Workers share a folder: who asks first plays it."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    servers: list[Server] = []

    def results(scenario: str) -> list[dict[str, Any]]:
        path = shared / f"golden {scenario}.json"
        with open(path, "a+", encoding="utf-8") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            stream.seek(0)
            if text := stream.read():
                return list(json.loads(text))
            if not servers:
                servers.append(Server())
            found = play(SCENARIOS[scenario], servers[0])
            stream.write(json.dumps(found))
        return found

    yield results
    for server in servers:
        server.close()


def test_recording_is_of_these_scenarios() -> None:
    """A step that is not recorded is not tested: `record.py --only` adds it."""
    names = {name: [step.name for step in scenario.steps] for name, scenario in SCENARIOS.items()}
    assert {name: [step["step"] for step in steps] for name, steps in RECORDED.items()} == names


@pytest.mark.parametrize(
    ("scenario", "number"), STEPS, ids=[f"{name}: {RECORDED[name][number]['step']}" for name, number in STEPS]
)
def test_step_is_as_recorded(played: Played, scenario: str, number: int) -> None:
    differences = list(compare(RECORDED[scenario][number], played(scenario)[number]))
    if differences:
        pytest.fail("\n".join([f"{scenario}: {RECORDED[scenario][number]['step']}", *differences]), pytrace=False)


def compare(recorded: dict[str, Any], found: dict[str, Any]) -> Iterator[str]:
    """A readable difference for each piece of a step that is not as recorded."""
    if recorded["status"] != found["status"]:
        yield f"exit status: {recorded['status']} recorded, {found['status']} now"
    for piece in ("stdout", "stderr"):
        yield from changed(piece, recorded[piece], found[piece])
    for name in sorted({*recorded["files"], *found["files"]}):
        before, after = recorded["files"].get(name), found["files"].get(name)
        if before is None or after is None:
            yield f"file {name}: {'not written' if after is None else 'written, and was not before'}"
        else:
            yield from changed(f"file {name}", before, after)


def changed(piece: str, before: str, after: str) -> Iterator[str]:
    """The lines of a text that differ."""
    if before != after:
        lines = difflib.unified_diff(
            readable(before), readable(after), f"{piece}, recorded", f"{piece}, now", n=1, lineterm=""
        )
        yield "\n".join(line[:300] for line in list(lines)[:60])


def readable(text: str) -> list[str]:
    """Lines to compare; JSON in one line has one for each entry."""
    lines: list[str] = []
    for line in text.split("\n"):
        try:
            document = json.loads(line) if line.startswith(("{", "[")) and len(line) > 200 else None
        except ValueError:
            document = None
        lines += [line] if document is None else json.dumps(document, indent=1, ensure_ascii=False).split("\n")
    return lines
