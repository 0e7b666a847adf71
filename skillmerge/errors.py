"""All expected errors: one class per exit status, with what is wrong and what to do next.

    SkillmergeError
    ├── UsageError           2  the command line or the recipe
    │   └── RecipeError      2  with file, line, column and the line itself
    ├── CheckFailed          3  a verification (or a gate) found a difference
    ├── InputError           4  an input is unsafe, corrupt, or does not fit
    │   └── UnusableWeights  4  found only when the weights were read
    ├── ResourceError        5  not enough disk or memory
    ├── OutputLocked         6  another run is writing the same output
    ├── StalePlan            7  the inputs are no longer those of the plan
    ├── TemporaryError      75  may pass later
    └── Interrupted    130/143  stopped by a signal; the same command continues

The statuses are a contract and are never renumbered. Anything else that escapes is a bug in
skillmerge and exits 1. This module knows nothing about terminals: `cli` prints.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

_NO_MEMORY = re.compile(
    r"can(no|')t allocate memory|can't start new thread|out of memory|bad_alloc|failed to map segment", re.IGNORECASE
)


_MACHINE = (
    errno.EIO, errno.ENOMEM, errno.ENFILE, errno.EMFILE, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENODEV,
    errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENOLCK, errno.EFBIG, errno.EINTR,
)  # fmt: skip
_NO_TEMPORARY = "No usable temporary directory found in"
_MACHINE_WORDS = re.compile(
    "|".join(
        [*(re.escape(os.strerror(number)) for number in _MACHINE), _NO_TEMPORARY, "uid not found", _NO_MEMORY.pattern]
    ),
    re.IGNORECASE,
)
"""Messages of errors whose number was lost in a library or another process."""


class SkillmergeError(Exception):
    """Base of all expected errors: `message` says what and where, `fix` what to do next."""

    exit_status = 1

    def __init__(self, message: str, *, fix: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what another process makes the same error of: no `__init__`, whose arguments differ, is called."""
        return _same_error, (type(self), self.args, self.__dict__)

    def as_dict(self) -> dict[str, Any]:
        """Return the error as plain data, for programs."""
        return {
            "error": type(self).__name__,
            "exit_status": self.exit_status,
            "message": self.message,
            "fix": self.fix,
        }

    def __str__(self) -> str:
        return self.message if self.fix is None else f"{self.message}\n{self.fix}"


def _same_error(kind: type[SkillmergeError], arguments: tuple[Any, ...], fields: dict[str, Any]) -> SkillmergeError:
    error = kind.__new__(kind, *arguments)
    error.__dict__.update(fields)
    return error


class UsageError(SkillmergeError):
    exit_status = 2


@dataclass(frozen=True, slots=True)
class Place:
    """A position in a text: line and column counted from 0, and the width in characters."""

    line: int
    column: int
    width: int = 1


class RecipeError(UsageError):
    """A mistake in a recipe. `message` already carries file, line, column, the line and a marker.

    The same in parts, for those who show it in another way: `what` is wrong, its `place` where it has one, and the
    `excerpt`, the line with its marker. others: mistakes in other parts of the same recipe.
    """

    def __init__(
        self, message: str, *, fix: str | None = None, what: str = "", place: Place | None = None, excerpt: str = ""
    ) -> None:
        super().__init__(message, fix=fix)
        self.what, self.place, self.excerpt = what or message, place, excerpt
        self.others: list[RecipeError] = []


class Mistakes:
    """Collects the mistakes of a recipe's parts, so that one does not hide the others: `with mistakes: …` a part."""

    def __init__(self) -> None:
        self.found: list[RecipeError] = []

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, RecipeError):
            self.found += [error, *error.others]
            error.others = []
        return isinstance(error, RecipeError)

    def refuse(self) -> None:
        """Raise the first of them, which knows the others."""
        if self.found:
            first, *first.others = self.found
            raise first


class CheckFailed(SkillmergeError):
    exit_status = 3


class InputError(SkillmergeError):
    exit_status = 4


class UnusableWeights(InputError):
    """Values that no run of the same plan can get past: nothing of it is kept."""


class ResourceError(SkillmergeError):
    exit_status = 5


class OutputLocked(SkillmergeError):
    exit_status = 6


class StalePlan(SkillmergeError):
    exit_status = 7


class TemporaryError(SkillmergeError):
    exit_status = 75


class Interrupted(SkillmergeError):
    """Stopped by SIGINT (2) or SIGTERM (15); the exit status is 128 plus the signal's number."""

    def __init__(self, signal_number: int, message: str = "interrupted", *, fix: str | None = None) -> None:
        super().__init__(message, fix=fix)
        self.signal_number = signal_number
        self.exit_status = 128 + signal_number


class Terminated(KeyboardInterrupt):
    """SIGTERM, as something that no `except Exception` on its way swallows."""


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn errors of Python, torch and the loader about memory or threads into a ResourceError."""
    try:
        yield
    except (MemoryError, RuntimeError, ImportError, OSError) as error:
        if not isinstance(error, MemoryError) and not _NO_MEMORY.search(str(error)):
            raise
        detail = str(error).strip().partition("\n")[0]
        raise ResourceError(
            f"not enough memory or threads{detail and ': '}{detail}",
            fix="free memory, or pass a lower `--threads`, then rerun",
        ) from error


@contextmanager
def machine_errors() -> Iterator[None]:
    """Turn faults of the machine that nothing below has put into words into errors.

    Raises ResourceError for memory, threads and disks, UsageError for a locale that cannot name a file.
    """
    try:
        with memory_errors():
            yield
    except UnicodeEncodeError as error:
        encoding = sys.getfilesystemencoding()
        if encoding == "utf-8":
            raise
        name = next((os.environ[key] for key in ("LC_ALL", "LC_CTYPE", "LANG") if os.environ.get(key)), "C")
        raise UsageError(
            f"the locale `{name}` ({encoding}) cannot name the file `{error.object}`",
            fix="set LC_ALL=C.UTF-8, or PYTHONUTF8=1",
        ) from error
    except OSError as error:
        if not (is_machine(error) and error.filename):
            raise
        raise unusable(os.fsdecode(error.filename), error) from error


def is_machine(error: object) -> bool:
    """Return whether an error, or the text of one, is of a machine that lacks something, not of what it works on."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _MACHINE or str(error.strerror).startswith(_NO_TEMPORARY)
    return isinstance(error, MemoryError) or bool(_MACHINE_WORDS.search(str(error)))


def unusable(path: str, error: OSError) -> ResourceError:
    """Return the error for a file or folder that this machine refuses to use."""
    doctor = f"skillmerge doctor {shlex.quote(path)}"
    return ResourceError(
        f"{path}: {error.strerror or error}", fix=f"check it with `{doctor}`, then run the same command again"
    )


def unreadable(what: object, error: OSError, how: str = "read") -> SkillmergeError:
    """Return the error for an input that cannot be read: InputError, or ResourceError where the machine is at fault."""
    return unusable(str(what), error) if is_machine(error) else InputError(f"{what}: cannot be {how}: {error.strerror}")


_TURNS = re.compile("[\u2028-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """Return text that is safe for a terminal: control characters, which a file name may hold, are escaped, and so is
    what ends a line or turns its direction."""
    return "".join(
        repr(character)[1:-1]
        if (unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t") or _TURNS.match(character)
        else character
        for character in text
    )


def one_line(text: str) -> str:
    """Return text from a model's files for a message. It cannot begin a new line."""
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")


def lines_of(line: str, width: int) -> list[int]:
    """Return where to break a line that is too wide for a terminal: between words, and never in what backticks quote.

    What begins with a space is to be pasted, or has a marker under it: it stays whole, as does what is too long anyway.
    """
    breaks: list[int] = []
    start = 0
    for word in re.finditer(r"(?:`[^`]*`|\S)+", line) if not line.startswith(" ") else ():
        if word.start() > start and _columns(line[start : word.end()]) > width:
            start = word.start()
            breaks.append(start)
    return breaks


def _columns(text: str) -> int:
    return len(text) + sum(unicodedata.east_asian_width(character) in "WF" for character in text)


def did_you_mean(word: str, candidates: list[str]) -> str | None:
    """Return a suggestion for a misspelled word, or None if nothing is near."""
    import difflib

    near = difflib.get_close_matches(word, candidates, n=1, cutoff=0.6)
    return f"did you mean `{near[0]}`?" if near else None


NEAR = 5
"""How many names a suggestion lists."""


def some(names: list[str], limit: int = 8) -> str:
    """Return the first names of a long list, and how many are left out."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} … and {len(names) - limit} more"
