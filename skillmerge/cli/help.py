"""Help screens: commands and options in groups, one line for each, and examples that can be typed.

Knows how help is laid out, not what any command does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import click

from skillmerge.errors import UsageError

MESSAGES = "Messages"
_OTHER = "Options"
_COLUMN = 24
"""Width of the first column; a longer option has a line of its own."""
_KEPT = "\N{NO-BREAK SPACE}"
"""A space at which no line is broken: `[default: 16]` stays together."""
_BRACKETS = re.compile(r"\[[^]]*\]")


class Option(click.Option):
    """An option that belongs to a group of the help screen. once: what to do where it is given twice."""

    def __init__(self, *args: Any, group: str = _OTHER, once: str = "", **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.group, self.once = group, once

    def get_help_extra(self, ctx: click.Context) -> Any:
        """Return what click adds in brackets, without the ranges: errors name those."""
        return {key: value for key, value in super().get_help_extra(ctx).items() if key != "range"}


class Command(click.Command):
    """A command whose help has examples, and its options in groups. examples: what follows `skillmerge`."""

    def __init__(self, *args: Any, examples: Sequence[str] = (), **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.examples = tuple(examples)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the words of a command line. Raises UsageError for a second value of an option that takes one, which
        click would drop."""
        if not ctx.resilient_parsing:
            _, _, order = self.make_parser(ctx).parse_args(args=list(args))
            for parameter in dict.fromkeys(order):
                _refuse_second(parameter, order.count(parameter))
                _refuse_both(parameter, args)
        return super().parse_args(ctx, args)

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        self.format_usage(ctx, formatter)
        self.format_help_text(ctx, formatter)
        _write_examples(formatter, self.examples)
        groups = _records(ctx, self.get_params(ctx))
        if MESSAGES in groups and _OTHER in groups:  # click's own --help
            groups[MESSAGES] += groups.pop(_OTHER)
        _write_groups(formatter, groups)
        self.format_epilog(ctx, formatter)

    def get_help_option(self, ctx: click.Context) -> click.Option | None:
        return _plain_help(super().get_help_option(ctx))


class Commands(click.Group):
    """A group of commands whose help shows them by subject. groups: heading -> names. examples: see `Command`."""

    def __init__(
        self,
        *args: Any,
        groups: Mapping[str, Sequence[str]] = MappingProxyType({}),
        examples: Sequence[str] = (),
        **attributes: Any,
    ) -> None:
        super().__init__(*args, **attributes)
        self.groups, self.examples = groups, examples

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        self.format_usage(ctx, formatter)
        self.format_help_text(ctx, formatter)
        commands = {
            name: [(command, summary(self.commands[command])) for command in commands]
            for name, commands in self.groups.items()
        }
        _write_groups(formatter, commands)
        _write_examples(formatter, self.examples)
        _write_groups(formatter, _records(ctx, self.get_params(ctx)))
        self.format_epilog(ctx, formatter)

    def get_help_option(self, ctx: click.Context) -> click.Option | None:
        return _plain_help(super().get_help_option(ctx))


def summary(command: click.Command) -> str:
    """Return the first line of a command's help, without its period."""
    return (command.help or "").partition("\n")[0].removesuffix(".")


def command(
    *examples: str, cls: type[Command] = Command, name: str | None = None
) -> Callable[[Callable[..., Any]], click.Command]:
    """Return a decorator that makes a command with these examples of a function."""
    return click.command(name, cls=cls, examples=examples)


def option(*names: str, group: str, **attributes: Any) -> Callable[[Any], Any]:
    """Return an option of a group that SKILLMERGE_<NAME> in the environment sets too."""
    long = next(name for name in names if name.startswith("--"))
    variable = "SKILLMERGE_" + long.removeprefix("--").split("/")[0].replace("-", "_").upper()
    return click.option(*names, cls=Option, group=group, envvar=variable, show_envvar=False, **attributes)


def _records(ctx: click.Context, parameters: Sequence[click.Parameter]) -> dict[str, list[tuple[str, str]]]:
    """Options and what they do, by group."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for parameter in parameters:
        record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
        if record is not None:
            groups.setdefault(getattr(parameter, "group", _OTHER), []).append(record)
    return groups


def _write_groups(formatter: click.HelpFormatter, groups: Mapping[str, Sequence[tuple[str, str]]]) -> None:
    """Write lists under their headings, the second columns below each other."""
    names = [name for records in groups.values() for name, _ in records]
    column = min(max(map(len, names)), _COLUMN)
    for group, records in groups.items():
        with formatter.section(group):
            room = formatter.width - formatter.current_indent - column - 2
            rows = [(name.ljust(column), _BRACKETS.sub(partial(_joined, room), text)) for name, text in records]
            formatter.write_dl(rows, col_max=_COLUMN)
    formatter.buffer = [text.replace(_KEPT, " ") for text in formatter.buffer]


def _joined(room: int, found: re.Match[str]) -> str:
    """Keep brackets on one line, if they fit on one: click would break a word otherwise."""
    return found[0].replace(" ", _KEPT) if len(found[0]) <= room else found[0]


def _write_examples(formatter: click.HelpFormatter, examples: Sequence[str]) -> None:
    if examples:
        with formatter.section("Examples"):
            for example in examples:
                formatter.write(f"{'':{formatter.current_indent}}$ skillmerge {example}\n")


def _refuse_second(parameter: click.Parameter, count: int) -> None:
    if isinstance(parameter, Option) and not (parameter.multiple or parameter.is_flag) and count > 1:
        name = next(name for name in parameter.opts if name.startswith("--"))
        raise UsageError(f"`{name}` is given {count} times", fix=parameter.once or f"give `{name}` once")


def _refuse_both(parameter: click.Parameter, args: Sequence[str]) -> None:
    """Raise UsageError for a flag and its opposite, of which click would take the last."""
    words = args[: list(args).index("--")] if "--" in args else args
    given = [next((it for it in words if it in names), None) for names in (parameter.opts, parameter.secondary_opts)]
    if all(given):
        raise UsageError(f"`{given[0]}` and `{given[1]}` exclude each other", fix="leave one of them out")


def _plain_help(found: click.Option | None) -> click.Option | None:
    if found is not None:
        found.help = "Show this help"
    return found
