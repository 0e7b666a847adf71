"""Text for people on stdout, on a terminal and off one.

Knows rich, and nothing about what is printed.
"""

from __future__ import annotations

import os
import stat
import sys
from typing import Any

from rich.console import Console
from rich.text import Text as RichText

from skillmerge.cli.messages import clear_status
from skillmerge.errors import lines_of, visible

_WIDTH = 120
"""Columns where no terminal says how many there are."""


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave a broken pipe to the caller: rich would end the process."""
        raise

    def print(self, *objects: Any, **how: Any) -> None:
        """Print. On a terminal, text breaks between words, never inside backticks."""
        if self.is_terminal and objects and isinstance(objects[0], RichText):
            lines = objects[0].split("\n", allow_blank=True)
            parts = [part for line in lines for part in line.divide(lines_of(line.plain, self.width))]
            for part in parts:
                part.rstrip()
            objects, how["soft_wrap"] = (RichText("\n").join(parts),), True
        super().print(*objects, **how)


def console() -> Console:
    """Return a console for results, on stdout. Off a terminal it is as wide as COLUMNS says, or 120 columns; in a pipe
    (`| tail`) no wider than the terminal that still has stderr, which the pipe probably leads to."""
    clear_status()
    given = os.environ.get("COLUMNS", "")
    width = None if sys.stdout.isatty() else int(given) if given.isdecimal() and int(given) else _piped_width()
    return _Console(file=sys.stdout, width=width, highlight=False, soft_wrap=False)


def _piped_width() -> int:
    try:
        if stat.S_ISFIFO(os.fstat(sys.stdout.fileno()).st_mode):
            return min(_WIDTH, os.get_terminal_size(sys.stderr.fileno()).columns or _WIDTH)
    except (OSError, ValueError):  # stderr is no terminal, or one of them is no file
        pass
    return _WIDTH


def Text(text: str, style: str = "") -> RichText:
    """Return text as it is: no markup in it, no control characters."""
    return RichText(visible(text), style=style)
