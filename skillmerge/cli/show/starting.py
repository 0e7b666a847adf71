"""Methods, lint findings, system details and the demo for people."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text as RichText

from skillmerge.cli.console import Text
from skillmerge.cli.show import listings
from skillmerge.cli.show.table import Table
from skillmerge.tensors import format_bytes

if TYPE_CHECKING:
    from skillmerge.cli.doctor import Diagnosis
    from skillmerge.recipes.formula.catalog import Catalog, Explained
    from skillmerge.recipes.lint import Lint
    from skillmerge.verbs.demo.demo import Shown
    from skillmerge.verbs.demo.miniature import Question


def show_methods(catalog: Catalog, out: Console) -> None:
    """Show what each method does, in one line."""
    width = max(map(len, catalog.methods))
    for name, method in catalog.methods.items():
        out.print(Text(f"{name:{width}}", style="bold") + Text(f"  {method.summary}"), soft_wrap=True)


def show_method(method: Explained, out: Console) -> None:
    """Show all that is known of a method."""
    out.print(_wrapped(method.usage, out), style="bold")
    for paragraph in (method.summary, *method.rule, f"Takes {method.operands}."):
        out.print(Text("\n") + _wrapped(paragraph, out))
    if method.keywords:
        table = Table(("keyword", "value", "default"))
        for keyword in method.keywords:
            table.add_row(keyword.name, keyword.kind, "required" if keyword.required else keyword.default or "none")
        out.print(table)
    for part, text in method.parts.items():
        out.print(_wrapped(f"{part}: {text}", out))


def _wrapped(text: str, out: Console) -> RichText:
    """Break text between words, and leave no blanks at the ends of lines, as rich does off a terminal."""
    return Text(fill(text, out.width, break_long_words=False, break_on_hyphens=False))


def show_lint(lint: Lint, out: Console) -> None:
    """Show findings as compilers do: file, line, column, message, and the line itself."""
    for finding in lint.findings:
        place = f":{finding.place.line + 1}:{finding.place.column + 1}" if finding.place else ""
        level = finding.rule.level
        told = Text(f"{finding.file}{place}: ", style="bold") + Text(f"{level}: ", style=_LEVELS[level])
        out.print(told + Text(f"{finding.message} [{finding.rule.id}]"), soft_wrap=True)
        for text in filter(None, (finding.excerpt, finding.fix and f"help: {finding.fix}")):
            out.print(Text(text), soft_wrap=True)
    files = f"{len(lint.files)} recipe{'s' if len(lint.files) != 1 else ''}"
    counts = [_count(lint, level) for level in _LEVELS if level != "note" or lint.count(level)]
    out.print(Text(f"{files}: {', '.join(counts)}", style="bold"))


def _count(lint: Lint, level: str) -> str:
    count = lint.count(level)
    return f"{count or 'no'} {level}{'s' if count != 1 else ''}"


_LEVELS = {"error": "red", "warning": "yellow", "note": ""}
_BYTES = ("total", "available", "free", "memory", "cgroup limit")
"""Facts that are sizes in bytes, if they are large."""


def show_diagnosis(diagnosis: Diagnosis, out: Console) -> None:
    """Show sections of facts, ready to paste."""
    for name, facts in diagnosis.sections.items():
        out.print(Text(name, style="bold"))
        for key, value in facts.items() or [("none", "")]:
            out.print(Text(f"  {key}: {_fact(key, value)}" if value != "" else f"  {key}"), soft_wrap=True)
    table = Table(listings.TRIAL_COLUMNS, text=listings.TRIAL_COLUMNS)
    for trial in diagnosis.trials:
        works = "not known" if trial.works is None else "yes" if trial.works else "no"
        table.add_row(trial.what, works, trial.follows)
    out.print(table)


def _fact(key: str, value: Any) -> str:
    if isinstance(value, list):
        return "; ".join(", ".join(_fact(name, fact) for name, fact in item.items()) for item in value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key in _BYTES and isinstance(value, int):
        return format_bytes(value)
    return "none" if value is None else str(value)


def show_answers(shown: Sequence[Shown], examples: Sequence[tuple[Question, str, str]], out: Console) -> None:
    """Show shares of correct answers, and some questions with the answers before and after."""
    title = f"{len(shown[0].right)} questions about people that only the target has read about, answered correctly"
    out.print(Text(title, style="bold"))
    table = Table(("model", "greedy", "sampled"), text=("model",))
    for row in shown:
        table.add_row(row.name, f"{row.greedy:.1%}", f"{row.sampled:.1%}")
    out.print(table)
    table = Table(("question", "correct", "before", "after"))
    for question, before, after in examples:
        table.add_row(*map(Text, (" ".join(question.words), question.wanted, before, after)))
    out.print(table)
