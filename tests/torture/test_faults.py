"""The n-th call of the system fails, for every n until a run meets no failure: beneath Python, in libc's place.

After each failure the exit status is a documented one, nothing half-made is visible, and the same command
without it ends in the same bytes. What fails is `faults.c`'s business, how a merge runs `merge_server.py`'s.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import write_family, write_recipe
from observing import (
    Content,
    MergeServer,
    assert_finished,
    discard,
    finished_shards,
    identities,
    put_previous,
    reference,
    staging_of,
    visible,
    wide_shapes,
)
from preloading import built

import skillmerge

pytestmark = [
    pytest.mark.timeout(7200),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="LD_PRELOAD and /proc are Linux's"),
]

KINDS = ["read", "write", "sync", "rename", "allocate", "open", "remove"]
"""As `enum kind` has them, from 1."""

SHORT = 0
"""In an errno's place: the call does half of what it was asked for."""

_DISK = [(errno.ENOSPC, False), (errno.EIO, True), (errno.EDQUOT, False), (errno.ENOSPC, True), (errno.EIO, False)]
# Python itself repeats what was interrupted, so an EINTR for ever would be an endless loop of its own.
FAILURES: dict[str, list[tuple[int, bool]]] = {
    "read": [(errno.EIO, False), (SHORT, False), (errno.EIO, True), (SHORT, True), (errno.EINTR, False)],
    "write": [*_DISK, (errno.EDQUOT, True), (SHORT, False), (SHORT, True), (errno.EINTR, False)],
    "sync": [*_DISK, (errno.EDQUOT, True), (errno.EINTR, False)],
    "rename": [*_DISK, (errno.EDQUOT, True), (errno.EINTR, False), (errno.EINTR, True)],
    "allocate": [*_DISK, (errno.EDQUOT, True), (errno.EINTR, False)],
    "open": [(errno.EIO, False), (errno.EMFILE, True), (errno.ENOSPC, False), (errno.EIO, True), (errno.EINTR, False)],
    "remove": [(errno.EIO, False), (errno.EIO, True), (errno.EINTR, False)],
}
DOCUMENTED = {0, 2, 3, 4, 5, 7, 75}
HANG = 60.0


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MergeServer]:
    """A server with `faults.c` beneath it."""
    library = built("faults", tmp_path_factory.mktemp("faults"))
    server = MergeServer(LD_PRELOAD=str(library))
    yield server
    server.close()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("family"), wide_shapes(2, 1024), shards=2)


@pytest.fixture
def recipe(base: Path, tmp_path: Path) -> Path:
    """Of a family of two small shards, with a side file."""
    shutil.copytree(base.parent, tmp_path, dirs_exist_ok=True)
    (tmp_path / "target" / "tokenizer.json").write_text("{}")
    return tmp_path / "recipe.yaml"


WAYS: dict[str, dict[str, Any]] = {
    "fresh": {"threads": 1},
    "overwrite": {"threads": 1, "overwrite": True},
    "direct": {"threads": 1, "direct": True},
    "skill": {"threads": 1},
    "hashed": {"threads": 1, "hash_inputs": True},
}
CASES = [
    *[(kind, "fresh", "quick") for kind in KINDS],
    *[(kind, "overwrite", "quick") for kind in ("sync", "rename", "allocate", "remove")],
    *[(kind, "skill", "quick") for kind in ("write", "sync")],
    ("write", "direct", "quick"),
    *[(kind, "skill", "long") for kind in ("read", "rename", "allocate", "open", "remove")],
    *[(kind, "direct", "long") for kind in ("sync", "allocate", "open")],
    ("write", "overwrite", "long"),
    ("read", "hashed", "long"),
]


@pytest.mark.parametrize(("kind", "way", "form"), CASES)
def test_failing_call_is_told_and_loses_nothing(
    faulty: MergeServer,
    recipe: Path,
    kind: str,
    way: str,
    form: str,
    request: pytest.FixtureRequest,
    tally: Callable[..., None],
) -> None:
    """Quick: each call (of reads and opens every other) fails in one of the ways in turn; long: in all of them."""
    is_long = request.config.getoption("--long")
    if form == "long" and not is_long:
        pytest.skip("only in the long form")
    if way == "skill":
        write_recipe(recipe.parent, "rl - sft", models={"rl": "rl", "sft": "sft"}, coefficients=None,
                     output={"path": "merged", "kind": "skill"})  # fmt: skip
    wanted = reference(faulty, recipe, hash_inputs=way == "hashed")
    met, statuses = 0, dict.fromkeys(sorted(DOCUMENTED), 0)
    for nth in range(1, 2000, 1 if is_long or kind not in ("read", "open") else 2):
        cases = FAILURES[kind] if is_long else [FAILURES[kind][nth % len(FAILURES[kind])]]
        answers = [_suffer(faulty, recipe, WAYS[way], wanted, (kind, nth, *case)) for case in cases]
        hits = [answer for answer in answers if answer["calls"] >= nth]
        for answer in hits:
            statuses[answer["status"]] += 1
        met += len(hits)
        if not hits:
            break
    else:
        raise AssertionError("a run without failures never came")
    assert met > 1, "the failures were never met"
    tally(failures=met, **{f"exits_{status}": count for status, count in statuses.items() if count})


def _suffer(
    server: MergeServer, recipe: Path, way: dict[str, Any], wanted: Content, failure: tuple[str, int, int, bool]
) -> dict[str, Any]:
    """One run with one failure, and the run that makes up for it. How the first one ended."""
    kind, nth, number, sticky = failure
    output = recipe.parent / "merged"
    previous = put_previous(output) if way.get("overwrite") else None
    fault = [recipe.parent, KINDS.index(kind) + 1, nth, number, int(sticky)]
    answer = server.run(recipe, fault=fault, kill_after=HANG, **way)
    what = (*failure, os.strerror(number), answer)
    assert answer["status"] in DOCUMENTED, what
    assert visible(output) in (previous, wanted), what
    assert answer["status"] != 0 or visible(output) == wanted, what
    if answer["calls"] >= nth and (number == SHORT or (number == errno.EINTR and kind in ("read", "write", "sync"))):
        assert answer["status"] == 0, ("less than was requested is no failure", what)
    left = {path.name for path in recipe.parent.iterdir()} - {"merged", staging_of(output).name}
    assert left == {"recipe.yaml", "target", "rl", "sft"}, what
    before = finished_shards(output)
    if "direct" in way:
        again = server.run(recipe, **way)
        assert again["status"] == 0, (what, again)
    else:
        skillmerge.apply(recipe, **way)
    assert_finished(output, wanted)
    assert {name: identities(output)[name] for name in before} == before, what
    discard(output)
    return answer


@pytest.mark.parametrize("kind", ["read", "open"])
def test_failing_call_never_passes_for_a_verified_output(
    faulty: MergeServer, recipe: Path, kind: str, request: pytest.FixtureRequest, tally: Callable[..., None]
) -> None:
    assert faulty.run(recipe)["status"] == 0
    output, met = recipe.parent / "merged", 0
    step = 1 if request.config.getoption("--long") else 4
    for nth in range(1, 2000, step):
        answers = []
        for number, sticky in FAILURES[kind]:
            fault = [recipe.parent, KINDS.index(kind) + 1, nth, number, int(sticky)]
            answer = faulty.run(None, verify=output, fault=fault, kill_after=HANG)
            assert answer["status"] in (0, 5), (kind, nth, number, sticky, answer)
            if answer["calls"] < nth or number == SHORT:
                assert answer["status"] == 0, (kind, nth, number, sticky, answer)
            elif number != errno.EINTR:  # which Python repeats, and others do not
                assert answer["status"] == 5, (kind, nth, number, sticky, answer)
            answers.append(answer["calls"] >= nth)
        met += sum(answers)
        if not any(answers):
            break
    tally(failures=met)
    assert met > 10
