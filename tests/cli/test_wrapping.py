"""Messages on a terminal: lines break between words, and what backticks quote stays whole."""

from __future__ import annotations

import io
import sys

import pytest

from skillmerge.cli.console import Text
from skillmerge.cli.console import console as plain_console
from skillmerge.cli.messages import log
from skillmerge.errors import lines_of

PATH = "/data/models/" + "long-folder/" * 8 + "model"
LONG = f"the folder `{PATH}` is not there, and `two quoted words` and ordinary words that go on for a while follow it"
LINES = [
    "warning: the folder",
    f"`{PATH}`",
    "is not there, and `two quoted words` and ordinary words that go on for a while",
    "follow it",
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    terminal = Terminal()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, terminal)
    for name, value in {"COLUMNS": "80", "TERM": "xterm", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    return terminal


def test_message_on_a_terminal_breaks_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    eighty = eighty_columns(monkeypatch)
    log("warning", LONG)
    assert eighty.getvalue().splitlines() == LINES


def test_text_on_a_terminal_breaks_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    eighty = eighty_columns(monkeypatch)
    plain_console().print(Text(f"warning: {LONG}"), soft_wrap=True)
    plain_console().print(Text(f"warning: {LONG}"))
    assert eighty.getvalue().splitlines() == LINES * 2


def test_lines_to_paste_and_lines_with_markers_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    eighty = eighty_columns(monkeypatch)
    pasted = '  - {tensors: "' + "x" * 60 + '", from: target, and: more words than fit into a line}'
    log("help", f"add to the recipe:\ncopy:\n{pasted}")
    plain_console().print(Text(pasted), soft_wrap=True)
    assert eighty.getvalue().splitlines() == ["help: add to the recipe:", "copy:", pasted, pasted]


def test_message_off_a_terminal_stays_on_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    log("warning", LONG)
    assert sys.stderr.getvalue() == f"warning: {LONG}\n"  # type: ignore[attr-defined]


def test_wide_characters_count_twice() -> None:
    assert lines_of("模型 " * 20, 80) == [48]
