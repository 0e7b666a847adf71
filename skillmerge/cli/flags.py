"""Options that several commands have, in their groups, and the types of options."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import click

from skillmerge.cli.help import MESSAGES, Command, option
from skillmerge.cli.messages import FORMAT
from skillmerge.errors import UsageError

MERGE, INPUTS, OUTPUT, PUBLISH = "Merge", "Inputs", "Output", "Publish"
SIGNATURE, REPORTS = "Signature", "Reports"
"""Groups of options on help screens."""


_FEW_BYTES = 1_000_000
"""A plain number below this is probably not meant in bytes."""


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

    def shell_complete(self, ctx: Any, param: Any, incomplete: str) -> list[Any]:
        from click.shell_completion import CompletionItem

        return [CompletionItem(word) for word in ("auto", "cpu", "cuda") if word.startswith(incomplete)]


class Share(click.ParamType):  # type: ignore[type-arg]
    """A share: 5% or 0.05, as a number above 0 and up to 1."""

    name = "share"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        text = str(value).strip()
        try:
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            share = math.nan
        if not 0 < share <= 1:
            self.fail(f"`{value}` is not a share; write it like 5% or 0.05", param, ctx)
        return share


class Part(click.ParamType):  # type: ignore[type-arg]
    """One of several parts, counted from 0: 0/64, as two numbers."""

    name = "I/N"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, int]:
        first, _, last = str(value).partition("/")
        numbers = [int(text) for text in (first, last) if text.isascii() and text.isdecimal() and len(text) <= 18]
        if len(numbers) != 2 or not numbers[0] < numbers[1]:
            self.fail(f"`{value}` is not a part; write it like 0/64, where parts count from 0 to 63", param, ctx)
        return numbers[0], numbers[1]


class Duration(click.ParamType):  # type: ignore[type-arg]
    """A time such as 90s, 30m, 6h or 2d, as seconds."""

    name = "duration"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smhd])", str(value).strip())
        seconds = float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86_400}[found[2]] if found else 0.0
        if not seconds:
            self.fail(f"`{value}` is not a time; write it like 90s, 30m, 6h or 2d", param, ctx)
        return seconds


class Runtime(click.ParamType):  # type: ignore[type-arg]
    """A runtime that loads models; `yes` means transformers, `no` means none."""

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


class LoadCommand(Command):
    """A command whose `--load` needs no value, except in front of the name of a runtime."""

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
    "--set", "coefficients", group=MERGE, multiple=True, type=Coefficient(), metavar="NAME=NUMBER",
    help="Override a coefficient, including its rules",
)  # fmt: skip
device = option(
    "--device", group=MERGE, type=Device(), default="auto", metavar="DEVICE",
    help="auto, cpu, cuda or cuda:N  [default: auto]",
)  # fmt: skip
threads = option(
    "--threads", group=MERGE, type=click.IntRange(1, 256), metavar="N",
    help="Worker threads  [default: one per core, max 16]",
)  # fmt: skip
memory = option("--memory-limit", group=MERGE, type=Size(), metavar="SIZE", help="Memory limit, such as 2GB")
on = option("--on", group=MERGE, metavar="CLUSTER", help="Compute on a Ray cluster: ray, or ray://HOST:PORT")
stats = option(
    "--stats", group=MERGE, type=click.Choice(["full", "sampled", "off"]), default="sampled", metavar="MODE",
    help="Rounding statistics: full, sampled or off  [default: sampled]",
)  # fmt: skip
vocabulary = option(
    "--vocabulary", group=INPUTS, type=click.Choice(["by-id", "by-token"]), default="by-id", metavar="MODE",
    help="Match rows of embedding and head by-id or by-token  [default: by-id]",
)  # fmt: skip
strict = option("--strict", group=MERGE, is_flag=True, help="Treat warnings as problems")
hub = option(
    "--hub", group=INPUTS, type=click.Choice(["stream", "download"]), default="stream", metavar="MODE",
    help="stream Hub models, or download them first  [default: stream]",
)  # fmt: skip
locked = option("--locked", group=INPUTS, is_flag=True, help="Require pinned Hub revisions")
hash_inputs = option("--hash-inputs", group=INPUTS, is_flag=True, help="Record the SHA-256 of input files")
links = option("--follow-links", group=INPUTS, is_flag=True, help="Allow links that leave a checkpoint folder")
code = option("--allow-code", group=INPUTS, is_flag=True, help="Allow custom model code, and copy *.py files")
nonfinite = option("--allow-nonfinite", group=INPUTS, is_flag=True, help="Allow NaN and Inf in weights")
base_folder = option(
    "--base-folder", group=INPUTS, type=click.Path(), metavar="DIR",
    help="Folder that the recipe's relative paths start from  [default: the recorded one]",
)  # fmt: skip
output = option(
    "--output", "-o", group=OUTPUT, type=click.Path(), metavar="DIR", help="Output folder  [default: the recipe's]"
)
new_output = option(
    "--output", "-o", group=OUTPUT, type=click.Path(), required=True, metavar="DIR", help="Output folder"
)
overwrite = option("--overwrite", group=OUTPUT, is_flag=True, help="Replace an existing output")
keep_failed = option("--keep-failed", group=OUTPUT, is_flag=True, help="Keep an output that fails a gate")
push = option("--push", group=PUBLISH, metavar="ORG/NAME", help="Publish on the Hub  [default: the recipe's]")
no_local = option("--no-local", group=PUBLISH, is_flag=True, help="Upload shards as they finish; keep no copy")
private = option(
    "--private/--public", group=PUBLISH, default=None,
    help="Visibility of a new repository  [default: your account's, usually public]",
)  # fmt: skip
revision = option("--revision", group=PUBLISH, metavar="BRANCH", help="Branch to commit to  [default: main]")
pull_request = option(
    "--pull-request/--no-pull-request", group=PUBLISH, default=None,
    help="Open a pull request  [default: if a model exists]",
)  # fmt: skip
dry_run = option("--dry-run", group=PUBLISH, is_flag=True, help="Show what would be published or refused; send nothing")
message = option("--message", group=PUBLISH, metavar="TEXT", help="Commit message")
report = option(
    "--report", "report_file", group=REPORTS, type=click.Path(dir_okay=False), metavar="FILE",
    help="Write an HTML report",
)  # fmt: skip
result_file = option(
    "--result-file", group=REPORTS, type=click.Path(dir_okay=False), metavar="FILE", help="Write the JSON result"
)
events = option(
    "--events", "events_file", group=REPORTS, type=click.Path(), metavar="FILE", help="Append events as JSON lines"
)
junit = option(
    "--junit", "junit_file", group=REPORTS, type=click.Path(dir_okay=False), metavar="FILE",
    help="Write checks as JUnit XML",
)  # fmt: skip
as_json = option("--json", "as_json", group=REPORTS, is_flag=True, help="Print the JSON result")
quiet = option("--quiet", "-q", group=MESSAGES, is_flag=True, help="Print only results, warnings and errors")
verbose = option("--verbose", "-v", group=MESSAGES, is_flag=True, help="Print each step")
certificate_chain = option(
    "--certificate-chain", group=SIGNATURE, type=click.Path(), multiple=True, metavar="FILE",
    help="PEM certificates up to a root; repeatable",
)  # fmt: skip
private_key = option(
    "--private-key", group=SIGNATURE, type=click.Path(), metavar="FILE", help="PEM file with the EC key to sign with"
)
password_file = option(
    "--password-file", group=SIGNATURE, type=click.Path(), metavar="FILE",
    help="File with the key's password  [default: SKILLMERGE_KEY_PASSWORD]",
)  # fmt: skip


def password(file: str | None) -> str | None:
    """Return a key's password. Raises UsageError.

    A password is never an argument: every user of the machine can read those.
    """
    if file is None:
        return os.environ.get("SKILLMERGE_KEY_PASSWORD")
    try:
        return Path(file).read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the password file {file} cannot be read") from error


def _use_log_format(context: click.Context, parameter: click.Parameter, value: str) -> None:
    os.environ[FORMAT] = value


log_format = option(
    "--log-format", group=MESSAGES, type=click.Choice(["text", "json"]), default="text", is_eager=True,
    expose_value=False, callback=_use_log_format, metavar="FORMAT",
    help="text or json messages on stderr  [default: text]",
)  # fmt: skip
"""Every command has it."""
