"""The files that record a run for programs: JSON lines (docs/files.md), and JUnit XML of gates and checks.

Both get the events of a `TerminalReporter`. Neither stops a run: a file that cannot be written is one note.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import threading
import xml.etree.ElementTree as xml
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from skillmerge.cli.messages import TerminalReporter
from skillmerge.errors import Interrupted, SkillmergeError, Terminated, UsageError

VERSION = 1
_STANDARD_OUTPUT = Path("-")


@contextmanager
def recorded(
    reporter: TerminalReporter, events: str | None = None, junit: str | None = None, suite: str = ""
) -> Iterator[None]:
    """Record the events of the body, including its failure, in these files. Raises UsageError before the body runs."""
    if junit is not None:
        reporter.recorders.append(JUnit(Path(junit), suite))
    if events is not None:
        reporter.recorders.append(EventLog(Path(events), reporter.note))
    try:
        yield
    except SkillmergeError as error:
        reporter.event("failed", **error.as_dict())
        raise
    except KeyboardInterrupt as error:
        number = signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
        reporter.event("failed", **Interrupted(number, f"interrupted by {number.name}").as_dict())
        raise
    except BaseException as error:
        reporter.event("failed", **SkillmergeError(f"{type(error).__name__}: {error}").as_dict())
        raise
    finally:
        for recorder in reporter.recorders:
            try:
                recorder.close()
            except OSError as error:
                reporter.note(f"{error.filename or 'standard output'}: cannot be written: {error.strerror}")


class EventLog:
    """A file, a device, a pipe with a reader, or standard output, to which events are appended. Safe to call from any
    thread."""

    def __init__(self, path: Path, complain: Callable[[str], None]) -> None:
        """Open the file. Raises UsageError if it cannot be written."""
        self._path, self._complain = path, complain
        self._lock = threading.Lock()
        try:
            # Opening a pipe that nobody reads would block; with O_NONBLOCK it fails instead.
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
            self._descriptor = os.dup(1) if path == _STANDARD_OUTPUT else os.open(path, flags, 0o666)
            if stat.S_ISFIFO(os.fstat(self._descriptor).st_mode):
                os.set_blocking(self._descriptor, True)
        except OSError as error:
            why = "no process reads this pipe" if error.errno == errno.ENXIO else error.strerror
            raise UsageError(f"{path} cannot be written: {why}", fix="choose another file with `--events`") from error

    def record(self, name: str, what: dict[str, Any]) -> None:
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = json.dumps({"version": VERSION, "time": now, "event": name, **what}, ensure_ascii=False) + "\n"
        with self._lock:
            if self._descriptor < 0:
                return
            try:
                data = memoryview(line.encode(errors="backslashreplace"))
                while data:
                    data = data[os.write(self._descriptor, data) :]
            except OSError as error:
                os.close(self._descriptor)
                self._descriptor = -1
                self._complain(f"{self._path}: logging of events stopped: {error.strerror}")

    def close(self) -> None:
        with self._lock:
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1


class JUnit:
    """A JUnit XML file with gates and checks as test cases."""

    def __init__(self, path: Path, suite: str) -> None:
        self._path, self._suite = path, _text(suite)
        self._cases: list[tuple[str, str, str]] = []
        """Name, problem ("" if it passed), and details."""
        self._warnings: list[str] = []

    def record(self, name: str, what: dict[str, Any]) -> None:
        if name == "gate":
            measured = "" if what["measured"] is None else f"measured {what['measured']:.6g}, "
            detail = f"{measured}required: {what['asked']}" + (f"\n{what['detail']}" if what["detail"] else "")
            self._cases.append((what["gate"], "" if what["passed"] else f"{what['gate']} failed", detail))
        elif name == "warning":
            self._warnings.append(f"warning: {what['message']}" + (f"\nhelp: {what['fix']}" if what["fix"] else ""))
        elif name == "checked":
            self._cases.append((what["check"], what["problem"], what["problem"]))
        elif name == "published" and what["already"]:
            self._cases.append(("output is up to date", "", ""))
        elif name == "failed" and not any(problem for _, problem, _ in self._cases):
            self._cases.append((self._suite, what["message"], what["message"]))

    def close(self) -> None:
        """Write the file in one step. Raises OSError."""
        from skillmerge.durable import write_whole

        failures = sum(bool(problem) for _, problem, _ in self._cases)
        counts = {"tests": str(len(self._cases)), "failures": str(failures), "errors": "0"}
        suites = xml.Element("testsuites", counts)
        suite = xml.SubElement(suites, "testsuite", {"name": self._suite, **counts, "skipped": "0"})
        for name, problem, detail in self._cases:
            case = xml.SubElement(suite, "testcase", {"name": _text(name), "classname": "skillmerge"})
            if problem:
                xml.SubElement(case, "failure", {"message": _text(problem)}).text = _text(detail)
            elif detail:
                xml.SubElement(case, "system-out").text = _text(detail)
        if self._warnings:
            xml.SubElement(suite, "system-out").text = _text("\n".join(self._warnings))
        xml.indent(suites)
        content = xml.tostring(suites, encoding="utf-8", xml_declaration=True) + b"\n"
        if self._path == _STANDARD_OUTPUT:
            with os.fdopen(os.dup(1), "wb") as stream:
                stream.write(content)
        else:
            write_whole(self._path.absolute(), content)


def _text(text: str) -> str:
    """Replace what XML 1.0 cannot hold: control characters, and halves of surrogate pairs."""
    return "".join(
        character
        if character in "\n\t" or (character >= " " and not "\ud800" <= character <= "\udfff" and character < "\ufffe")
        or character > "\uffff"
        else "\ufffd"
        for character in text
    )  # fmt: skip
