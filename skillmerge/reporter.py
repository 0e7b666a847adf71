"""What a run tells while it works, to whoever listens: remarks, warnings, progress, and events for programs.

This one keeps quiet; `messages` has the one for terminals and logs. Knows nothing about what is told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Reporter:
    """A listener that keeps quiet."""

    def say(self, message: str) -> None:
        """A remark."""

    def warn(self, message: str) -> None:
        """Something that a person should know."""

    def event(self, name: str, **what: Any) -> None:
        """Something that happened, as plain data; docs/events.md names them."""

    @contextmanager
    def bar(self, total: int) -> Iterator[Callable[[int], None]]:
        """A progress display for `total` bytes of output; it is told how many are finished."""
        yield lambda done: None
