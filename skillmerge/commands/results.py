"""What commands have in common: files that they write for others, JSON on stdout, the result of a merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from skillmerge.errors import UsageError
from skillmerge.messages import tell

if TYPE_CHECKING:
    from skillmerge.merge import Result


def check_report(path: str | None) -> None:
    """Before any work: a report replaces a file of its own kind, and nothing else; and it can be written."""
    if path is None:
        return
    from skillmerge.writer import MANIFEST_FILE

    target = Path(path).absolute()
    try:
        if target.exists():
            start = b""
            if target.is_file():
                with open(target, "rb") as stream:
                    start = stream.read(15)
            if start != b"<!doctype html>":
                raise UsageError(
                    f"{path} exists already and is not a report", fix="name another file: --report report.html"
                )
        if not target.parent.is_dir():
            raise UsageError(f"{target.parent} is no folder", fix="make it first, or name another --report")
        if any((folder / MANIFEST_FILE).exists() for folder in target.parents):
            raise UsageError(f"{path} is inside an output, which would not be sound then", fix="name another --report")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}", fix="name another --report") from error
    check_room(path, "--report")


def check_room(name: str | None, option: str) -> None:
    """Before any work: a file can be written there. Raises UsageError."""
    if name is None:
        return
    import tempfile

    path = Path(name)
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"{path} is not a file", fix=f"name another {option}")
        tempfile.TemporaryFile(dir=path.absolute().parent).close()
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}", fix=f"name another {option}") from error


def write_report(path: str | None, **parts: Any) -> None:
    if path is None:
        return
    from skillmerge.page import build

    try:
        Path(path).write_text(build(**parts), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}", fix="name another --report") from error
    tell("info", f"wrote {path}")


def describe_merge(result: Result) -> dict[str, Any]:
    from skillmerge import report

    return {
        "ok": True,
        "output": str(result.output),
        "already": result.already,
        "seconds": round(result.seconds, 3),
        "plan_digest": result.manifest["plan_digest"],
        "statistics": result.manifest["statistics"],
        "warnings": report.result_warnings(result),
        "gates": list(result.gates),
        "published": result.published.as_dict() if result.published else None,
        "files": result.manifest["files"],
    }


def show_merge(result: Result, as_json: bool, quiet: bool) -> None:
    from skillmerge import report

    if as_json:
        print_json(describe_merge(result))
        return
    if not quiet:
        report.show_result(result, report.console())
    for warning in report.result_warnings(result):
        tell("warning", warning)


def write_plan(path: Path, text: str) -> None:
    """Saved plans replace saved plans, and nothing else."""
    start = text[:12].encode()
    if path.exists() and not (path.is_file() and path.read_bytes()[: len(start)] == start):
        raise UsageError(f"{path} exists already and is not a plan", fix="name another file: plan RECIPE -o plan.json")
    write_text(path, text)


def write_text(path: Path, text: str) -> None:
    from skillmerge.writer import disk_errors

    with disk_errors(path):
        path.write_text(text, encoding="utf-8")


def print_json(document: Any, indent: int | None = None) -> None:
    click.echo(json.dumps(document, indent=indent, ensure_ascii=False))
