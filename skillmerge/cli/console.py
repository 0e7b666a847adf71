"""Text for people on stdout, on a terminal and off one.

Knows rich, and nothing about what is printed.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from rich.console import Console
from rich.text import Text as RichText

from skillmerge.cli.messages import clear_status
from skillmerge.errors import lines_of, visible


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
    """Return a console for results, on stdout. Off a terminal it is as wide as COLUMNS says, or 120 columns."""
    clear_status()
    given = os.environ.get("COLUMNS", "")
    width = None if sys.stdout.isatty() else int(given) if given.isdecimal() and int(given) else 120
    return _Console(file=sys.stdout, width=width, highlight=False, soft_wrap=False)


def Text(text: str, style: str = "") -> RichText:
    """Return text as it is: no markup in it, no control characters."""
    return RichText(visible(text), style=style)
