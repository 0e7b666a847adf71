"""Options of commands: their environment variables, their types, and the options that several commands have."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from skillmerge.cli.messages import FORMAT
from skillmerge.errors import UsageError


def option(*names: str, **attributes: Any) -> Callable[[Any], Any]:
    """Return a click option that SKILLMERGE_<NAME> in the environment sets too."""
    long = next(name for name in names if name.startswith("--"))
    variable = "SKILLMERGE_" + long.removeprefix("--").split("/")[0].replace("-", "_").upper()
    return click.option(*names, envvar=variable, show_envvar=False, **attributes)


_FEW_BYTES = 1_000_000
"""A plain number below this was hardly meant in bytes."""


class Size(click.ParamType):  # type: ignore[type-arg]
    """A size such as 5GB, as bytes."""

    name = "size"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        from skillmerge.tensors import parse_size

        try:
            size = value if isinstance(value, int) else parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if isinstance(value, str) and value.strip().isdecimal() and size < _FEW_BYTES:
            self.fail(f"`{value}` is {size} bytes; write it like {size}GB", param, ctx)
        return size


class Device(click.ParamType):  # type: ignore[type-arg]
    name = "auto|cpu|cuda[:N]"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        kind, _, number = value.partition(":")
        if value in ("auto", "cpu", "cuda") or (kind == "cuda" and number.isascii() and number.isdecimal()):
            return str(value)
        self.fail(f"`{value}` is not a device; choose auto, cpu, cuda or cuda:N", param, ctx)


class Share(click.ParamType):  # type: ignore[type-arg]
    """5% or 0.05, as a number above 0 and up to 1."""

    name = "share"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        text = str(value).strip()
        try:
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            share = math.nan
        if not 0 < share <= 1:
            self.fail(f"`{value}` is not a share such as 5%", param, ctx)
        return share


class Runtime(click.ParamType):  # type: ignore[type-arg]
    """A runtime that loads models; yes stands for transformers, and no for none."""

    name = "transformers|vllm"

    def convert(self, value: Any, param: Any, ctx: Any) -> str | None:
        from skillmerge.study.loads.loading import RUNTIMES

        word = {"1": "transformers", "0": ""}.get(value, value).lower()
        if word in ("", "false", "no", "off", "f", "n"):
            return None
        if word in ("true", "yes", "on", "t", "y"):
            return "transformers"
        if word not in RUNTIMES:
            self.fail(f"`{value}` is not a runtime; choose transformers or vllm", param, ctx)
        return str(word)


class LoadCommand(click.Command):
    """A command whose `--load` may stand without a value, in front of anything but the name of a runtime."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        from skillmerge.study.loads.loading import RUNTIMES

        end = args.index("--") if "--" in args else len(args)
        following = [*args[1:end], ""][:end]
        plain = [
            "--load=transformers" if arg == "--load" and other not in RUNTIMES else arg
            for arg, other in zip(args[:end], following, strict=True)
        ]
        return super().parse_args(ctx, plain + args[end:])


class Coefficient(click.ParamType):  # type: ignore[type-arg]
    name = "name=number"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, float]:
        if isinstance(value, tuple):
            return value
        name, equals, text = value.partition("=")
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not equals or not math.isfinite(number):
            self.fail(f"`{value}` is not NAME=NUMBER, such as lam=0.7", param, ctx)
        return name.strip(), number


set = option(
    "--set",
    "coefficients",
    multiple=True,
    type=Coefficient(),
    help="A coefficient in place of the recipe's, its rules included.",
)
output = option("--output", "-o", type=click.Path(), help="The folder to write, in place of the recipe's.")
threads = option(
    "--threads", type=click.IntRange(1, 256), help="Workers. Default: as many as there are cores, at most 16."
)
memory = option("--memory-limit", type=Size(), help="Bound on resident memory, such as 2GB.")
as_json = option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
code = option("--allow-code", is_flag=True, help="Accept a config whose auto_map runs code, and carry *.py files.")
links = option("--follow-links", is_flag=True, help="Accept links that lead out of a checkpoint's folder.")
strict = option("--strict", is_flag=True, help="Refuse what would be a warning.")
locked = option("--locked", is_flag=True, help="Refuse revisions that can change and are not in the lock file.")
private = option("--private/--public", default=None, help="Of a repository that is made.")
revision = option("--revision", help="The branch of the Hub's repository to commit to.")
pull_request = option(
    "--pull-request/--no-pull-request", default=None, help="By default only where a model is there already."
)
message = option("--message", help="Of the commit.")
hub = option(
    "--hub", type=click.Choice(["stream", "download"]), default="stream", show_default=True,
    help="Stream models on the Hub, or put them into its local cache first.",
)  # fmt: skip
report = option(
    "--report", "report_file", type=click.Path(dir_okay=False), help="Also write it as one HTML page into this file."
)
nonfinite = option("--allow-nonfinite", is_flag=True, help="Accept NaN and Inf in weights.")
certificate_chain = option(
    "--certificate-chain", type=click.Path(), multiple=True,
    help="Certificates up to a root, in PEM form: those to send along, or those to trust. May be given again.",
)  # fmt: skip
private_key = option("--private-key", type=click.Path(), metavar="KEY", help="The EC key to sign with, in PEM form.")
password_file = option(
    "--password-file", type=click.Path(),
    help="Holds the password of an encrypted key, in place of SKILLMERGE_KEY_PASSWORD.",
)  # fmt: skip


def password(file: str | None) -> str | None:
    """Return a key's password. Raises UsageError.

    It is never an argument: every user of the machine can read those.
    """
    if file is None:
        return os.environ.get("SKILLMERGE_KEY_PASSWORD")
    try:
        return Path(file).read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the password file {file} cannot be read") from error


base_folder = option(
    "--base-folder", type=click.Path(), help="What relative paths of the recipe start from, if it was moved."
)
events = option("--events", "events_file", type=click.Path(), help="Append what happens to this file, as JSON lines.")
junit = option("--junit", "junit_file", type=click.Path(dir_okay=False), help="Write gates and checks as JUnit XML.")


def _use_log_format(context: click.Context, parameter: click.Parameter, value: str) -> None:
    os.environ[FORMAT] = value


log_format = option(
    "--log-format", type=click.Choice(["text", "json"]), default="text", is_eager=True, expose_value=False,
    callback=_use_log_format, help="Of messages and progress on stderr.",
)  # fmt: skip
"""Every command has it."""
