"""The command line: its commands, and the one place where errors become messages and exit statuses.

Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import errno
import gc
import os
import signal
import sys
from contextlib import suppress
from typing import Any, NoReturn

import click

from skillmerge.cli import flags, usage
from skillmerge.cli.commands import clusters, merging, proving, starting, studying
from skillmerge.cli.help import Commands
from skillmerge.cli.messages import SPELLED, clear_status, log, log_error
from skillmerge.cli.results import NO_TABLE, interrupted, print_json
from skillmerge.errors import ResourceError, SkillmergeError, Terminated, UsageError, machine_errors
from skillmerge.version import __version__

_EXIT_STATUSES = """\b
Exit statuses:
  0 done                          5 not enough disk or memory
  1 a bug in skillmerge           6 another run is writing the output
  2 usage or recipe               7 the inputs changed since the plan
  3 a gate or verification       75 temporary, try again
    failed
  4 an input is unsafe, corrupt,  130/143 interrupted: the same
    or does not fit                 command continues"""


_GROUPS = {
    "Start": ("demo", "init", "import", "methods", "schema", "doctor"),
    "Merge": ("lint", "plan", "apply", "sweep"),
    "On a cluster": ("shard", "finish"),
    "Inspect and reuse": ("inspect", "extract", "export"),
    "Verify and publish": ("verify", "gate", "rebuild", "sign", "attest", "push"),
}


class _OutputClosed(Exception):
    """Raised when the reader closes stdout."""


class _Commands(Commands):
    """The group of commands. click would report a closed or full stdout as a bug."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
        found = super().get_command(ctx, cmd_name)
        if found is None:
            raise usage.unknown_command(cmd_name, self.list_commands(ctx))
        return found

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with machine_errors():
                return super().invoke(ctx)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise _OutputClosed from error
            if error.errno == errno.ENOSPC and error.filename is None:
                raise ResourceError("results could not be written: no space left on the disk") from error
            if error.errno == errno.ENOENT and error.filename is None:
                raise UsageError("the current folder no longer exists", fix="change to another folder") from error
            raise


def _install_completion(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        from skillmerge.cli.completion import install

        for line in install(cli):
            click.echo(line)
        context.exit()


@click.group(
    cls=_Commands,
    groups=_GROUPS,
    examples=("init recipe.yaml", "apply recipe.yaml --set lam=0.7"),
    epilog=_EXIT_STATUSES,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option(
    "--install-completion",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_install_completion,
    help="Complete commands and options in your shell",
)
@click.version_option(__version__, prog_name="skillmerge", help="Show the version")
def cli() -> None:
    """Merge model checkpoints from disk or the Hugging Face Hub."""


for _command in (
    merging.apply, merging.plan, clusters.shard, clusters.finish,
    studying.extract, studying.export, studying.inspect, studying.sweep,
    proving.verify, proving.gate, proving.rebuild, proving.sign, proving.attest, proving.push,
    starting.init, starting.import_, starting.methods, starting.lint, starting.schema, starting.doctor,
    starting.demo,
):  # fmt: skip
    cli.add_command(flags.log_format(_command))


def _terminate(number: int, frame: Any) -> NoReturn:
    raise Terminated


def main() -> NoReturn:
    """Run a command, and end the process with its exit status."""
    signal.signal(signal.SIGTERM, _terminate)
    # The process is short-lived and makes few cycles: collecting them takes a tenth of a plan and of torch's import.
    gc.disable()
    _prepare_streams()
    # The Hub's client has progress bars and a log of its own, which shows addresses. Our errors say what matters.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "critical")
    # Ray prints what happens to nodes and tasks on stdout, where results go.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "^")
    _leave(run())


def run() -> int:
    """Run the command of `sys.argv`, turn errors into a message, and return the exit status."""
    try:
        status = cli.main(prog_name="skillmerge", standalone_mode=False)
        sys.stdout.flush()
    except (click.exceptions.Abort, KeyboardInterrupt) as error:
        return _failed(interrupted(error.__cause__ or error))
    except SkillmergeError as error:
        return _failed(error)
    except click.ClickException as error:
        if isinstance(error, click.exceptions.NoArgsIsHelpError):
            error.show()
            return error.exit_code
        return _failed(usage.explained(error, _command_run(), cli.commands))
    except (_OutputClosed, BrokenPipeError):
        return 0
    except Exception:
        import traceback

        traceback.print_exc()
        log("error", "this is a bug in skillmerge; please report it with the lines above", exit_status=1)
        return 1
    return status if isinstance(status, int) else 0


def _command_run() -> click.Command:
    """The command that was typed; without one, all of them."""
    return next((cli.commands[word] for word in sys.argv[1:] if word in cli.commands), cli)


def _prepare_streams() -> None:
    """Make both streams writable for any text: closed streams, ASCII terminals, names that are not text."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - to the end
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=SPELLED)


def _wants_json() -> bool:
    return "--json" in sys.argv or os.environ.get("SKILLMERGE_JSON", "").lower() in ("1", "true", "yes", "on", "t", "y")


def _leave(status: int) -> NoReturn:
    """Exit at once: unloading torch takes a quarter of a second, and after an interrupt Python may end with the
    signal's own status."""
    clear_status()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def _failed(error: SkillmergeError) -> int:
    """Log an error, and return its exit status."""
    with suppress(OSError):
        if _wants_json():
            print_json({"ok": False, **error.as_dict()})
        elif (outcomes := getattr(error, "outcomes", ())) and not getattr(error, NO_TABLE, False):  # of gates
            from skillmerge.cli.console import console
            from skillmerge.cli.show.proving import show_gates

            show_gates(outcomes, console())
    log_error(error)
    return error.exit_status
