"""Results of commands: files, JSON on stdout, and the view of a merge."""

from __future__ import annotations

import json
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import click

from skillmerge.cli.messages import TerminalReporter, as_text, clear_status, is_dumb, log
from skillmerge.errors import Interrupted, SkillmergeError, Terminated, UsageError, visible

if TYPE_CHECKING:
    from skillmerge.verbs.result import Result


STANDARD_OUTPUT = "-"
NO_TABLE = "no_table"
"""What marks an error whose gates are not to be shown as a table."""

OURS = {
    "--report": ("<!doctype html>",),
    "--result-file": ('{\n "ok": true,\n "output"', '{\n "ok": false,\n "error"'),
    "--junit": ("<?xml version='1.0' encoding='utf-8'?>\n<testsuites",),
    "--events": ('{"version": 1, "time"',),
    "--save": ('{\n "ok": true,\n "version"', '{\n "ok": false,\n "version"'),
    "--markdown": ("<!-- skillmerge plan -->",),
    "--sarif": ('{\n "$schema"',),
}
"""How the files of each option begin. An option replaces only such a file."""


def check_places(**files: str | bool | None) -> bool:
    """Check before any work that each file can be written, and return whether standard output is one of them.

    The keywords are the options, with `_` for `-`; a flag that is True writes to standard output, as `-` does. Nothing
    else may be printed there then.
    Raises UsageError for a file of another kind, one inside an output or its staging folder, and one named twice.
    """
    seen: dict[Path, str] = {}
    printed: list[str] = []
    for name, path in files.items():
        option = f"--{name.replace('_', '-')}"
        if path is None or path is False:
            continue
        if path is True or path == STANDARD_OUTPUT:
            printed.append(option)
            continue
        if (other := seen.setdefault(Path(path).absolute(), option)) != option:
            raise UsageError(f"{other} and {option} both name `{path}`", fix=f"choose another file with `{option}`")
        try:
            _check_place(path, option)
        except OSError as error:
            raise UsageError(
                f"{path} cannot be written: {error.strerror}", fix=f"choose another file with `{option}`"
            ) from error
    if len(printed) > 1:
        fix = f"name a file for {printed[-1]}" if printed[-1] != "--json" else f"name a file for {printed[0]}"
        raise UsageError(f"{' and '.join(printed)} both write to standard output", fix=fix)
    return bool(printed)


def _check_place(name: str, option: str) -> None:
    import tempfile

    from skillmerge.outputs.attempts import TASKS_FILE
    from skillmerge.outputs.staging import MANIFEST_FILE

    path = Path(name).absolute()
    if not path.parent.is_dir():
        raise UsageError(
            f"{path.parent} is not a folder", fix=f"create it first, or choose another file with `{option}`"
        )
    if any(
        (folder / file).exists() for folder in path.parents for file in (MANIFEST_FILE, "journal.jsonl", TASKS_FILE)
    ):
        raise UsageError(
            f"{name} is inside an output, and would make it invalid", fix=f"choose another file with `{option}`"
        )
    if option == "--events" and path.exists() and not path.is_file() and not path.is_dir():
        return  # a pipe or a device
    if path.exists() and not path.is_file():
        raise UsageError(f"{name} is not a file", fix=f"choose another file with `{option}`")
    if path.exists():
        with open(path, "rb") as stream:
            start = stream.read(80)
        if start and not any(start.startswith(begin.encode()) for begin in OURS[option]):
            raise UsageError(
                f"{name} already exists and is not what {option} writes", fix=f"choose another file with `{option}`"
            )
    tempfile.TemporaryFile(dir=path.parent).close()


def write_report(path: str | None, **parts: Any) -> None:
    """Write the HTML report if there is a `path`. The keywords are those of `build`. Raises ResourceError,
    UsageError."""
    if path is None:
        return
    from skillmerge.cli.show.report.page import build

    write_text(path, build(**parts))
    if path != STANDARD_OUTPUT:
        log("info", f"wrote {path}")


class Documented(Protocol):
    """A result of a verb."""

    def as_dict(self) -> dict[str, Any]: ...


def document_of(result: Documented) -> dict[str, Any]:
    """Return what `--json` prints of a result: whether all is well, and its fields."""
    return {"ok": getattr(result, "ok", True), **result.as_dict()}


def print_result(result: Documented) -> None:
    print_json(document_of(result))


def merge(run: Callable[..., Result], recipe: str, command: str, options: dict[str, Any]) -> None:
    """Run a command that makes an output. options: as click gives them; those about files and messages are taken out,
    the others are the verb's."""
    from skillmerge.cli.event_log import recorded
    from skillmerge.study.gates import GateFailed

    report, result_path, events, junit = (
        options.pop(f"{name}_file") for name in ("report", "result", "events", "junit")
    )
    as_json, quiet, verbose = (options.pop(name) for name in ("as_json", "quiet", "verbose"))
    with result_file(result_path) as write_result:
        printed = check_places(json=as_json, report=report, result_file=result_path, junit=junit, events=events)
        reporter = TerminalReporter(quiet, verbose)
        with reserved(printed), recorded(reporter, events, junit, f"skillmerge {command} {recipe}"):
            try:
                result = run(recipe, reporter=reporter, **options)
            except GateFailed as error:
                write_report(report, plan=error.plan, manifest=error.body, gates=error.outcomes)
                raise
        show_merge(result, as_json, quiet or printed)
        write_report(report, plan=result.plan, manifest=result.manifest, gates=result.gates)
        write_result(result)
    if result.is_kept and not quiet and not printed:
        load = " --load" if result.manifest.output.kind != "adapter" else ""  # which has no model to load
        suggest(f"skillmerge verify {shlex.quote(result.shown)}{load}")


def show_merge(result: Result, as_json: bool, quiet: bool) -> None:
    if as_json:
        print_result(result)
        return
    if not quiet:
        from skillmerge.cli.console import console
        from skillmerge.cli.show.merging import show_result

        show_result(result, console())


def write_text(path: str, text: str) -> None:
    """Write a file, or standard output. Raises ResourceError, UsageError."""
    data = text.encode("utf-8", errors="backslashreplace")
    if path == STANDARD_OUTPUT:  # as a file, whatever the terminal's encoding is
        clear_status()
        click.echo(data, nl=False)
        return
    from skillmerge.durable import disk_errors

    with disk_errors(Path(path)):
        Path(path).write_bytes(data)


def print_line(text: str) -> None:
    """Print a result that is text, on standard output."""
    clear_status()
    click.echo(visible(text))


@contextmanager
def result_file(path: str | None) -> Iterator[Callable[[Documented], None]]:
    """Yield what writes a result into the file. An older file is removed first, and a failure is written instead.

    Raises UsageError before that if the file cannot be this option's.
    """
    check_places(result_file=path)
    if path is not None and path != STANDARD_OUTPUT:
        Path(path).unlink(missing_ok=True)
    try:
        yield lambda result: _write_result(path, document_of(result))
    except BrokenPipeError:  # the reader closed stdout, which is no failure of the run
        raise
    except BaseException as raised:
        error = interrupted(raised) if isinstance(raised, KeyboardInterrupt) else raised
        if not isinstance(error, SkillmergeError):
            error = SkillmergeError(f"{type(error).__name__}: {error}")
        with suppress(SkillmergeError):  # the first error counts
            _write_result(path, {"ok": False, **error.as_dict()})
        raise


@contextmanager
def reserved(printed: bool) -> Iterator[None]:
    """Keep the table of failed gates off standard output if a document is printed there."""
    try:
        yield
    except SkillmergeError as error:
        error.__dict__[NO_TABLE] = printed
        raise


def refuse_standard_output(**files: str | None) -> None:
    """Raise UsageError for an option (with `_` for `-`) that can only write a file."""
    for name, path in files.items():
        if path == STANDARD_OUTPUT:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} cannot write to standard output", fix=f"name a file with `{option}`")


def _write_result(path: str | None, document: Any) -> None:
    """Write the file in one step: a pipeline may be waiting for it."""
    from skillmerge.durable import disk_errors, write_whole

    text = json.dumps(document, indent=1) + "\n"
    if path == STANDARD_OUTPUT:
        write_text(path, text)
    elif path is not None:
        with disk_errors(Path(path)):
            write_whole(Path(path).absolute(), text.encode())


def interrupted(error: BaseException) -> Interrupted:
    """Return the error of a run that a signal ended. The arguments of `error` say what is kept."""
    number = signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
    kept = "finished candidates" if sys.argv[1:2] == ["sweep"] else next(iter(error.args), None)
    continues = (f"{kept} are kept; " if kept else "") + "rerun to continue"
    return Interrupted(
        number,
        f"interrupted by {number.name}",
        fix=continues if sys.argv[1:2] in (["apply"], ["extract"], ["sweep"], ["shard"], ["finish"]) else None,
    )


def suggest(command: str) -> None:
    """Print the command that comes next, for a person at a terminal."""
    if sys.stdout.isatty():
        line = f"next: {command}"
        click.echo(line if is_dumb() else click.style(line, dim=True))


def print_json(document: Any, indent: int | None = None) -> None:
    clear_status()
    click.echo(as_text(document, sys.stdout, indent))
