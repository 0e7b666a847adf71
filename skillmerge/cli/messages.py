"""Messages and progress on stderr: text for people, JSON lines with `--log-format json`; a tqdm bar where it moves."""

from __future__ import annotations

import codecs
import json
import logging
import math
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from itertools import pairwise
from typing import Any, Protocol, TextIO

from skillmerge.errors import SkillmergeError, lines_of, visible
from skillmerge.reporter import Reporter

FORMAT = "SKILLMERGE_LOG_FORMAT"
"""The environment variable that every process of a run sees; `json` or `text`."""

_QUIET_SECONDS = 30
_ERASE = "\r\x1b[K"
"""Back to the beginning of the line, and nothing to its end."""
_PREFIXES = {"info": "", "note": "note: ", "warning": "warning: ", "error": "error: ", "help": "help: "}


def as_json() -> bool:
    return os.environ.get(FORMAT) == "json"


SPELLED = "skillmerge.spelled"
"""How streams treat errors of encoding; see `_spelled`."""
_SIGNS = {
    "λ": "lambda",
    "…": "...",
    "–": "-",
    "·": ".",
    "×": "x",
    "±": "+-",
    **dict(zip("▁▂▃▄▅▆▇█", "12345678", strict=True)),
}
"""Signs in our texts that a terminal without Unicode lacks."""


def _spelled(error: UnicodeError) -> tuple[str, int]:
    """Spell what a stream's encoding lacks: our own signs in ASCII, everything else as escapes."""
    assert isinstance(error, UnicodeEncodeError), "only for writing"
    lacking = error.object[error.start : error.end]
    return "".join(_SIGNS.get(it) or it.encode("ascii", "backslashreplace").decode() for it in lacking), error.end


codecs.register_error(SPELLED, _spelled)


def is_dumb() -> bool:
    """Return whether the terminal shows escape sequences as text."""
    return os.environ.get("TERM") == "dumb"


def as_text(document: Any, stream: TextIO, indent: int | None = None) -> str:
    """Return JSON for a stream, in ASCII unless its encoding has every character."""
    return json.dumps(document, indent=indent, ensure_ascii=not (stream.encoding or "").lower().startswith("utf"))


def log(level: str, message: str, **fields: Any) -> None:
    """Write one message. level: info, help, note, warning or error. fields: more facts, for programs.

    A run continues if stderr cannot be written.
    """
    with suppress(OSError, ValueError):
        clear_status()
        if as_json():
            now = datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
            line = {"time": now, "level": level, "message": message, **fields}
            print(as_text(line, sys.stderr), file=sys.stderr, flush=True)
        else:
            print(_fitting(visible(_PREFIXES[level] + message)), file=sys.stderr)


def log_error(error: SkillmergeError) -> None:
    """Log an error, and what to do about it."""
    if as_json():
        log("error", error.message, fix=error.fix, exit_status=error.exit_status)
        return
    log("error", error.message)
    if error.fix:
        log("help", error.fix)


def _fitting(text: str) -> str:
    """Return text with its lines broken between words, where stderr is a terminal; elsewhere a message's lines stay
    whole."""
    if not sys.stderr.isatty():
        return text
    width = shutil.get_terminal_size().columns
    lines = []
    for line in text.split("\n"):
        places = [0, *lines_of(line, width), len(line)]
        lines += [line[first:last].rstrip() for first, last in pairwise(places)]
    return "\n".join(lines)


_shown = False
"""Whether the terminal's last line is a status."""


def show_status(text: str) -> None:
    """Show the current step on a terminal, on a line that the next message replaces."""
    global _shown
    with suppress(OSError, ValueError):
        if sys.stderr.isatty() and not is_dumb() and not as_json():
            width = os.get_terminal_size(sys.stderr.fileno()).columns
            print(f"{_ERASE}{visible(text)[: width - 2]}…", end="", file=sys.stderr, flush=True)
            _shown = True


def clear_status() -> None:
    """Remove the status line before printing anything else."""
    global _shown
    if _shown:
        _shown = False
        with suppress(OSError, ValueError):
            print(_ERASE, end="", file=sys.stderr, flush=True)


class Recorder(Protocol):
    """A file that keeps a run's events."""

    def record(self, name: str, what: dict[str, Any]) -> None: ...

    def close(self) -> None:
        """Finish the file. Raises OSError."""


class _Forward(logging.Handler):
    """Shows what is logged where no reporter is near: waits as a status, and from `warning` on notes."""

    def __init__(self, reporter: TerminalReporter) -> None:
        super().__init__()
        self._reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            self._reporter.note(record.getMessage())
        elif not self._reporter.quiet:
            show_status(record.getMessage())


class TerminalReporter(Reporter):
    """Messages and progress on stderr: a bar on a terminal, else a line every 30 seconds. Events go to `recorders`."""

    def __init__(self, quiet: bool, verbose: bool, doing: str = "merging", unit: str = "B") -> None:
        super().__init__()
        self.quiet, self.verbose, self.doing, self.unit = quiet, verbose, doing, unit
        self.recorders: list[Recorder] = []
        self._waited = -math.inf
        logger = logging.getLogger("skillmerge")
        logger.handlers = [it for it in logger.handlers if not isinstance(it, _Forward)] + [_Forward(self)]
        logger.setLevel(logging.INFO)
        if not quiet:
            show_status("reading")

    def say(self, message: str) -> None:
        if self.verbose and not self.quiet:
            log("info", message)
        elif not self.quiet:
            show_status(message)

    def waiting(self, message: str) -> None:
        if self.quiet:
            return
        if sys.stderr.isatty() and not as_json():
            show_status(message)
        elif time.monotonic() - self._waited >= _QUIET_SECONDS:
            self._waited = time.monotonic()
            log("info", message)

    def note(self, message: str) -> None:
        if not self.quiet:
            log("note", message)

    def show_warning(self, message: str, fix: str | None) -> None:
        log("warning", message, **({"fix": fix} if fix and as_json() else {}))
        if fix and not as_json():
            log("help", fix)

    def event(self, name: str, **what: Any) -> None:
        for recorder in self.recorders:
            recorder.record(name, what)

    @contextmanager
    def bar(self, total: int, doing: str | None = None) -> Iterator[Callable[[int], None]]:
        doing = doing or self.doing
        if self.quiet:
            yield lambda done: None
        elif sys.stderr.isatty() and not as_json():
            clear_status()
            with self._tqdm(total, doing) as show:
                yield show
        else:
            yield _line_progress(total, doing, self.unit)

    @contextmanager
    def _tqdm(self, total: int, doing: str) -> Iterator[Callable[[int], None]]:
        with warnings.catch_warnings():  # a notebook without widgets has a bar of text
            warnings.simplefilter("ignore")
            from tqdm.auto import tqdm

        scale, unit = self.unit == "B", self.unit if self.unit == "B" else f" {self.unit}"
        with tqdm(total=total, unit=unit, unit_scale=scale, desc=doing, file=sys.stderr, leave=False) as bar:

            def show(done: int) -> None:
                bar.update(done - bar.n)

            yield show


class NotebookReporter(TerminalReporter):
    """Messages below a cell, and a bar that moves, with widgets where there are any."""

    def __init__(self, doing: str = "merging", unit: str = "B") -> None:
        super().__init__(quiet=False, verbose=False, doing=doing, unit=unit)

    @contextmanager
    def bar(self, total: int, doing: str | None = None) -> Iterator[Callable[[int], None]]:
        with self._tqdm(total, doing or self.doing) as show:
            yield show


def _line_progress(total: int, doing: str, unit: str) -> Callable[[int], None]:
    started = last = time.monotonic()

    def size(count: float) -> str:
        from skillmerge.tensors import format_bytes

        return format_bytes(int(count)) if unit == "B" else f"{count:.3g} {unit}"

    def show(done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < _QUIET_SECONDS:
            return
        last = now
        speed = done / (now - started)
        left = f", {(total - done) / speed:.0f} s left" if speed else ""
        log("info", f"{doing}: {size(done)} of {size(total)}, {size(speed)}/s{left}", done=done, total=total)

    return show
