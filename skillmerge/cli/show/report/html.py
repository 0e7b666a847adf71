"""Text and figures as HTML, escaped and without paths of the machine; tables; the one cell that a tensor belongs to."""

from __future__ import annotations

import html
import re
from collections.abc import Collection, Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from skillmerge.cli.show.figures import Figure
from skillmerge.naming import layer_label, module_kind

_QUOTED_PATH = re.compile(r"""(['"`])(?:file://)?~?/[^'"`\n]*/([^'"`\n/]+)/?(?=\1)""")
_PART = r"""[^\s'"`,;:()\[\]{}<>/]+"""
_PATH = re.compile(rf"""(?<![^\s'"`(=,;:\[{{<>])(?:file://)?~?/(?:{_PART}/)+({_PART})/?""")
_CODE = re.compile(r"`([^`]+)`")


def without_paths(text: str) -> str:
    """Return the text with only the last part of each absolute path: pages are passed on, the machine is private."""
    if "/" not in text:
        return text
    if (home := str(Path.home())) != "/":
        text = text.replace(home, "~")
    return _PATH.sub(r"…/\1", _QUOTED_PATH.sub(r"\1…/\2", text))


def escaped(value: Any) -> str:
    return html.escape(without_paths(str(value)), quote=True)


def prose(message: str) -> str:
    """Return a message as HTML: what is in backticks becomes code."""
    return _CODE.sub(r"<code>\1</code>", escaped(message)).replace("`", "&#96;").replace("\n", "<br>")


def abbreviated(figure: Figure) -> str:
    told = f"{figure.formula}\n{figure.meaning}" + (f"\n{figure.source}" if figure.source else "")
    return f'<abbr title="{escaped(told)}">{escaped(figure.label)}</abbr>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], texts: Collection[int] = (0,), caption: str = "") -> str:
    """Return a table of HTML cells in a box that scrolls; empty where there is no row.

    The first cell of a row names it. texts: the columns that are words, which are set to the left and may wrap.
    """
    body = "".join(f"<tr>{_cells(row, texts)}" for row in rows)
    if not body:
        return ""
    columns = "".join(f"<th scope=col{_kind(index, texts)}>{name}" for index, name in enumerate(head))
    told = f"<caption>{caption}</caption>" if caption else ""
    return scrolling(f"<table>{told}<thead><tr>{columns}<tbody>{body}</table>")


def scrolling(inner: str, kind: str = "") -> str:
    """Return a box that scrolls where it has to, also with the keyboard."""
    return f'<div class="scroll{kind}" tabindex="0">{inner}</div>'


def collapsed(summary: str, inner: str) -> str:
    return f"<details><summary>{summary}</summary>{inner}</details>" if inner else ""


def read(name: str) -> str:
    """Return a file of this package."""
    return (files("skillmerge.cli.show.report") / name).read_text(encoding="utf-8")


def cell_of(name: str) -> tuple[str, str]:
    return layer_label(name), module_kind(name)


def _cells(row: Sequence[str], texts: Collection[int]) -> str:
    first, *others = row
    cells = "".join(f"<td{_kind(index, texts)}>{cell}" for index, cell in enumerate(others, 1))
    return f"<th scope=row>{first}{cells}"


def _kind(index: int, texts: Collection[int]) -> str:
    return " class=text" if index in texts else ""
