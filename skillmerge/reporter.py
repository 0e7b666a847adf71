"""The reporter of a run: warnings, notes, progress, and events for programs.

The one here is silent; `messages` has those for terminals, logs and notebooks. Knows nothing about the content.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Reporter:
    """A reporter that prints nothing and keeps warnings. Its methods may be called from any thread."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        """The warnings so far, each once."""

    def say(self, message: str) -> None:
        """Report a step of the work."""

    def waiting(self, message: str) -> None:
        """Report how far others are, a few times a second."""

    def note(self, message: str) -> None:
        """Report information."""

    def warn(self, message: str, fix: str | None = None) -> None:
        """Report a warning, once."""
        if message not in self.warnings:
            self.warnings.append(message)
            self.event("warning", message=message, fix=fix)
            self.show_warning(message, fix)

    def show_warning(self, message: str, fix: str | None) -> None:
        """Show a new warning."""

    def event(self, name: str, **what: Any) -> None:
        """Report an event as plain data; docs/files.md lists them."""

    @contextmanager
    def bar(self, total: int, doing: str | None = None) -> Iterator[Callable[[int], None]]:
        """Show progress through `total` bytes; what is yielded takes how many are finished, from any thread.

        doing: what is being done, where that is not what the whole run does.
        """
        yield lambda done: None


def default_reporter(doing: str = "merging", unit: str = "B") -> Reporter:
    """Return the reporter of a call that names none: progress and messages in a notebook, nothing in a script.

    doing, unit: of the bar, as in `TerminalReporter`.
    """
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if type(shell).__name__ != "ZMQInteractiveShell":
        return Reporter()
    made: Reporter = importlib.import_module("skillmerge.cli.messages").NotebookReporter(doing, unit)
    return made
