"""Commands that make a model: apply, plan, and what they write beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from skillmerge.cli import flags
from skillmerge.cli.flags import option
from skillmerge.cli.messages import TerminalReporter, log
from skillmerge.cli.results import check_places, document_of, print_result, show_merge, write_report, write_text
from skillmerge.errors import InputError
from skillmerge.remarks import count_of

if TYPE_CHECKING:
    from skillmerge.verbs.plan import Preview


@click.command()
@click.argument("recipe", type=click.Path())
@flags.output
@option("--device", type=flags.Device(), default="auto", show_default=True, help="Where to compute.")
@flags.set
@option("--overwrite", is_flag=True, help="Replace an existing output, at the end.")
@option("--full", is_flag=True, help="Read an output that is there already again, every byte of it.")
@flags.strict
@option("--keep-failed", is_flag=True, help="Keep an output that a gate refuses, beside its place, for inspection.")
@option(
    "--result-file", type=click.Path(dir_okay=False), help="Write what --json prints into this file, at the very end."
)
@flags.threads
@flags.memory
@option(
    "--stats", type=click.Choice(["full", "sampled", "off"]), default="sampled", show_default=True,
    help="How much of the rounding to measure.",
)  # fmt: skip
@option("--hash-inputs", is_flag=True, help="Put the sha256 of every input file into the manifest.")
@flags.locked
@flags.hub
@option("--push", metavar="ORG/NAME", help="Publish it on the Hub too, in place of the recipe's output.push.")
@option("--no-local", is_flag=True, help="Keep it on the Hub only: shards are sent as they are finished, and removed.")
@flags.private
@flags.revision
@flags.pull_request
@flags.message
@flags.nonfinite
@flags.code
@flags.links
@flags.report
@flags.events
@flags.junit
@flags.as_json
@option("--quiet", "-q", is_flag=True, help="Only results and errors.")
@option("--verbose", "-v", is_flag=True, help="Say what is being done.")
def apply(
    recipe: str,
    report_file: str | None,
    result_file: str | None,
    events_file: str | None,
    junit_file: str | None,
    coefficients: tuple[tuple[str, float], ...],
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Plan, merge, verify, and publish into the output folder. RECIPE may be a plan that was saved.

    A run that was interrupted is continued by the same command. An output that is this recipe's already is
    left as it is.
    """
    from skillmerge.cli.event_log import recorded
    from skillmerge.study.gates import GateFailed
    from skillmerge.verbs.apply import apply as run

    check_places(report=report_file, result_file=result_file, junit=junit_file, events=events_file)
    reporter = TerminalReporter(quiet, verbose)
    with recorded(reporter, events_file, junit_file, f"skillmerge apply {recipe}"):
        try:
            result = run(recipe, coefficients=dict(coefficients), reporter=reporter, **options)
        except GateFailed as error:
            title = f"{recipe}: refused"
            write_report(report_file, title=title, plan=error.plan, manifest=error.body, gates=error.outcomes)
            raise
    show_merge(result, as_json, quiet)
    title = str(result.output)
    write_report(report_file, title=title, plan=result.plan, manifest=result.manifest, gates=result.gates)
    if result_file is not None:
        from skillmerge.durable import disk_errors, write_whole

        with disk_errors(Path(result_file)):
            write_whole(Path(result_file).absolute(), (json.dumps(document_of(result), indent=1) + "\n").encode())


@click.command()
@click.argument("recipe", type=click.Path())
@option("-o", "--save", type=click.Path(dir_okay=False), help="Write the plan as JSON into this file.")
@option("--diff", metavar="PLAN", type=click.Path(), help="Show what changed since this saved plan instead.")
@option(
    "--detailed-exitcode", "detailed", is_flag=True,
    help="Exit with 0 where the output is this plan's already, every byte of it, and with 10 where there is work.",
)  # fmt: skip
@option(
    "--markdown", "markdown_file", type=click.Path(dir_okay=False),
    help="Also write it as Markdown into this file, for a job's summary or a pull request.",
)  # fmt: skip
@option("--lock", is_flag=True, help="Write the commits and files of models on the Hub into a lock file.")
@flags.strict
@flags.locked
@flags.set
@flags.threads
@flags.memory
@flags.code
@flags.links
@flags.report
@flags.as_json
@option("--quiet", "-q", is_flag=True, help="Only warnings, problems and the plan's digest.")
def plan(
    recipe: str,
    report_file: str | None,
    save: str | None,
    diff: str | None,
    markdown_file: str | None,
    detailed: bool,
    coefficients: tuple[tuple[str, float], ...],
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> int:
    """Show all that apply would do, from headers alone."""
    from skillmerge.verbs.plan import plan as run

    check_places(report=report_file, save=save, markdown=markdown_file)
    reporter = TerminalReporter(quiet, verbose=True)
    made = run(recipe, coefficients=dict(coefficients), save=save, diff=diff, reporter=reporter, **options)
    if as_json:
        print_result(made)
    else:
        _show_plan(made, diff, quiet)
    write_report(report_file, title=f"plan of {recipe}", plan=made)
    if markdown_file is not None:
        from skillmerge.cli.show.markdown import plan_page

        page = plan_page(made, made.needs, _output_of(made), made.disk_free, made.changes, diff)
        write_text(Path(markdown_file), page)
    if not made.problems and not made.ok:  # the warnings are shown already
        log("error", f"{count_of(made.warnings)} under --strict", exit_status=made.strict_error.exit_status)
        return made.strict_error.exit_status
    if not made.ok:
        return InputError.exit_status
    return 10 if detailed and not made.done else 0


def _show_plan(made: Preview, diff: str | None, quiet: bool) -> None:
    from skillmerge.cli.show import terminal

    if made.changes is not None:
        terminal.show_changes(made.changes, str(diff), terminal.console())
        terminal.show_remarks(made, terminal.console())
    elif quiet:
        terminal.show_remarks(made, terminal.console())
        terminal.show_digest(made, terminal.console())
    else:
        terminal.show_plan(made, made.needs, _output_of(made), made.disk_free, terminal.console())


def _output_of(made: Preview) -> str | None:
    where = made.recipe.output.path
    return str(where) if where else None
