"""The tests' own house: short files, folders that mirror the rooms, and few interpreters that are started."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType

import pytest
from conftest import run_process

HERE = Path(__file__).parent
LINES, INTERPRETERS = 500, 58
OTHERS = {"evidence", "golden", "hostile", "runtimes", "slurm", "torture"}
"""Folders of tests that go through all rooms, and of those of the experiments."""


def test_files_are_short() -> None:
    long = {path.name: lines for path in HERE.rglob("*.py") if (lines := len(path.read_text().splitlines())) > LINES}
    assert not long


def test_folders_mirror_the_rooms() -> None:
    rooms = {path.parent.name for path in (HERE.parent / "skillmerge").glob("*/__init__.py")} | {"ground"}
    folders = {path.parent.name for path in HERE.glob("*/test_*.py")}
    assert folders == rooms | OTHERS


def code_of(code: CodeType) -> Iterator[CodeType]:
    """A function's code, with that of the functions and classes inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from code_of(constant)


def starts_an_interpreter(function: FunctionType, seen: frozenset[str] = frozenset()) -> bool:
    """Whether a test, or a function of its module that it calls, has `run_process` or `sys.executable` in it."""
    names = {name for code in code_of(function.__code__) for name in code.co_names} - seen
    if "run_process" in names or "executable" in names:
        return True
    called = (function.__globals__.get(name) for name in names)
    return any(
        starts_an_interpreter(other, seen | names)
        for other in called
        if isinstance(other, FunctionType) and other.__module__ == function.__module__
    )


def test_few_tests_start_an_interpreter(request: pytest.FixtureRequest) -> None:
    """Messages are tested in the process, by `run_cli`; `run_process` is for what is about processes."""
    found = [
        item.nodeid
        for item in request.session.items
        if isinstance(item, pytest.Function)
        and item.module.__name__ != __name__
        and (
            starts_an_interpreter(item.function)
            or (hasattr(item, "callspec") and run_process in item.callspec.params.values())
        )
    ]
    assert len(found) <= INTERPRETERS, "\n".join(found)


def test_the_check_for_interpreters_sees_them() -> None:
    def one() -> object:
        return [lambda: sys.executable]

    def none() -> object:
        return sys.version

    assert starts_an_interpreter(one)
    assert not starts_an_interpreter(none)
