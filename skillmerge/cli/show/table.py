"""Tables that fit a terminal: text and headings wrap; columns that still do not fit are left out and named.

Numbers are never truncated. Knows widths and columns, not what the figures mean.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table as RichTable
from rich.text import Text as RichText

from skillmerge.cli.console import Text
from skillmerge.cli.messages import SPELLED

_APART = 3
"""Blanks that rich puts around a column: one before it, two after it."""
_WORDS = re.compile(r"\S*\s*")
_PIECE = re.compile(r"[^\s./_-]*[./_-]+")
_WORD = 16
"""A column of text is never narrower than its longest word, or than this many characters."""


@dataclass(frozen=True, slots=True, eq=False)
class _Column:
    """head: its heading. numeric: aligned right, and never wrapped. cells: one for each row."""

    head: str
    numeric: bool
    cells: Sequence[RichText]

    @property
    def natural(self) -> int:
        """Width without wrapping."""
        return max(len(self.head), *(cell.cell_len for cell in self.cells), 0)

    @property
    def least(self) -> int:
        """Width below which a number or a word would be cut."""
        words = max(map(len, self.head.split()), default=0)
        if self.numeric:
            return max(words, *(cell.cell_len for cell in self.cells), 0)
        longest = max((len(word) for cell in self.cells for word in cell.plain.split()), default=0)
        return max(words, min(longest, _WORD))


class Table:
    """Rows under headings, laid out for the available width when printed.

    head: one heading a column. text: the headings of columns with text; the others hold numbers. None: all are text.
    drop: headings of columns in the order in which they may be left out; the others follow, from the right. The first
    column and those without a heading always stay. What was left out is named below the table.
    """

    def __init__(
        self,
        head: Sequence[str],
        title: str | None = None,
        text: Collection[str] | None = None,
        drop: Sequence[str] = (),
    ) -> None:
        self.head, self.title, self.drop = tuple(head), title, tuple(drop)
        self._text = set(head) if text is None else set(text)
        self._rows: list[tuple[RichText, ...]] = []

    def add_row(self, *cells: str | RichText) -> None:
        """Add a row; raises ValueError unless there is one cell a column."""
        if len(cells) != len(self.head):
            raise ValueError(f"{len(cells)} cells for {len(self.head)} columns")
        self._rows.append(tuple(Text(cell) if isinstance(cell, str) else cell for cell in cells))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = [
            _Column(
                _spelled(Text(head), options).plain,
                head not in self._text,
                [_spelled(row[index], options) for row in self._rows],
            )
            for index, head in enumerate(self.head)
        ]
        room = options.max_width - 2 * options.ascii_only  # rich's table in ASCII has edges
        kept = _fitting(columns, self._leaving_order(columns), room)
        widths = _widths(kept, room)
        title = Text(self.title, style="bold") if self.title is not None else None
        table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left", title_style="")
        for column, width in zip(kept, widths, strict=True):
            table.add_column(
                Text(column.head), justify="right" if column.numeric else "left", width=width, overflow="fold"
            )
        for row in zip(*(column.cells for column in kept), strict=True):
            table.add_row(*(_wrapped(cell, width) for cell, width in zip(row, widths, strict=True)))
        yield table
        left_out = [column.head for column in columns if column not in kept]
        if left_out:
            yield Text(f"no room for: {', '.join(left_out)} (widen the terminal, or use --json)", style="dim")

    def _leaving_order(self, columns: Sequence[_Column]) -> list[_Column]:
        named = [column for drop in self.drop for head, column in zip(self.head, columns, strict=True) if head == drop]
        others = [column for column in reversed(columns[1:]) if column.head and column not in named]
        return [*named, *others]


def _spelled(text: RichText, options: ConsoleOptions) -> RichText:
    """Return text as the stream writes it, if that has another width: `λ` is `lambda` where only ASCII can be shown."""
    written = text.plain.encode(options.encoding, SPELLED).decode(options.encoding)
    return text if len(written) == len(text.plain) else RichText(written, style=text.style)


def _fitting(columns: Sequence[_Column], order: Iterable[_Column], room: int) -> list[_Column]:
    """Return the columns that fit side by side at their least widths."""
    kept = list(columns)
    for column in order:
        if _sum(one.least for one in kept) <= room:
            break
        kept.remove(column)
    return kept


def _widths(columns: Sequence[_Column], room: int) -> list[int]:
    """Return each column's width: its natural one, or for all the widest common bound at which they fit."""
    for bound in range(max((column.natural for column in columns), default=0), 0, -1):
        widths = [max(column.least, min(column.natural, bound)) for column in columns]
        if _sum(widths) <= room:
            return widths
    return [min(column.least, room) for column in columns]


def _wrapped(cell: RichText, width: int) -> RichText:
    """Return a cell with its lines broken between words; within a word after a mark, if the word alone is too long."""
    places, start, last = [], 0, 0
    for end in _ends(cell.plain, width):
        if len(cell.plain[start:end].rstrip()) > width and last > start:
            places.append(last)
            start = last
        last = end
    return RichText("\n").join(cell.divide(places)) if places else cell


def _ends(text: str, width: int) -> Iterator[int]:
    """Yield where a line may end: after each word, and after the parts of a word that is wider than a line."""
    for word in _WORDS.finditer(text):
        if len(word[0].rstrip()) > width:
            yield from (part.end() for part in _PIECE.finditer(text, word.start(), word.end()))
        yield word.end()


def _sum(widths: Iterable[int]) -> int:
    """Return how wide columns are side by side. Their first and last blank are not printed."""
    widths = list(widths)
    return sum(widths) + _APART * max(len(widths) - 1, 0) + 2
