"""Commands that make a model: apply, plan, and what they write beside it."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import click

from skillmerge.cli import flags, results
from skillmerge.cli.help import command, option
from skillmerge.cli.messages import TerminalReporter, log
from skillmerge.cli.results import (
    STANDARD_OUTPUT,
    check_places,
    document_of,
    print_json,
    suggest,
    write_report,
    write_text,
)  # fmt: skip
from skillmerge.errors import InputError, SkillmergeError
from skillmerge.remarks import count_of

if TYPE_CHECKING:
    from skillmerge.verbs.plan import Preview


@command("apply recipe.yaml -o merged", "apply plan.json --push org/name --private")
@click.argument("recipe", type=click.Path())
@flags.set
@flags.device
@flags.threads
@flags.memory
@flags.on
@flags.stats
@flags.strict
@flags.hub
@flags.locked
@flags.hash_inputs
@flags.links
@flags.code
@flags.nonfinite
@flags.output
@flags.overwrite
@option("--full", group=flags.OUTPUT, is_flag=True, help="Reread an existing output before reusing it")
@flags.keep_failed
@flags.push
@flags.no_local
@flags.private
@flags.revision
@flags.pull_request
@flags.message
@flags.report
@flags.result_file
@flags.events
@flags.junit
@flags.as_json
@flags.quiet
@flags.verbose
def apply(recipe: str, coefficients: tuple[tuple[str, float], ...], **options: Any) -> None:
    """Merge models and write the output.

    RECIPE may be a saved plan, or - for standard input. Rerun to resume an interrupted merge.
    """
    from skillmerge.verbs.apply import apply as run

    results.merge(run, recipe, "apply", {"coefficients": dict(coefficients), **options})


@command("plan recipe.yaml", "plan recipe.yaml -o plan.json", "plan recipe.yaml --diff plan.json")
@click.argument("recipe", type=click.Path())
@flags.set
@flags.threads
@flags.memory
@flags.strict
@flags.locked
@flags.links
@flags.code
@option(
    "--save",
    "-o",
    group=flags.OUTPUT,
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Save the plan as JSON; - for standard output",
)
@option("--lock", group=flags.OUTPUT, is_flag=True, help="Write Hub commits and files into a lock file")
@option("--diff", group=flags.REPORTS, type=click.Path(), metavar="PLAN", help="Show what changed since a saved plan")
@option(
    "--detailed-exitcode", "detailed", group=flags.REPORTS, is_flag=True,
    help="Exit 0 if the output is up to date, 10 if there is work",
)  # fmt: skip
@flags.report
@option(
    "--markdown", "markdown_file", group=flags.REPORTS, type=click.Path(dir_okay=False), metavar="FILE",
    help="Write a summary for pull requests",
)  # fmt: skip
@flags.as_json
@flags.quiet
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
    """Show what apply would do, reading only headers.

    RECIPE may be - for standard input. Problems exit 4.
    """
    from skillmerge.verbs.plan import plan as run

    printed = check_places(json=as_json, report=report_file, save=save, markdown=markdown_file)
    reporter = TerminalReporter(quiet, verbose=True)
    file = None if save == STANDARD_OUTPUT else save
    made = run(recipe, coefficients=dict(coefficients), save=file, diff=diff, reporter=reporter, **options)
    if as_json:
        print_json({**document_of(made), **_refusal(made)})
    elif not printed:
        _show_plan(made, diff, quiet)
    if save == STANDARD_OUTPUT:
        write_text(save, made.as_text())
    write_report(report_file, plan=made)
    if markdown_file is not None:
        from skillmerge.cli.show.markdown import plan_page

        page = plan_page(made, made.needs, _output_of(made), made.disk_free, made.changes, diff)
        write_text(markdown_file, page)
    if not made.problems and not made.ok:  # the warnings are shown already
        log("error", f"{count_of(made.warnings)} under --strict", exit_status=made.strict_error.exit_status)
        return made.strict_error.exit_status
    if not made.ok:
        return InputError.exit_status
    if diff is None and not printed and not quiet and (save or recipe != STANDARD_OUTPUT):
        suggest(f"skillmerge apply {shlex.quote(save)}" if save else made.recipe.command("apply"))
    return 10 if detailed and not made.done else 0


def _refusal(made: Preview) -> dict[str, Any]:
    """Return the error that `apply` would end with, as every JSON document of a failure has it."""
    try:
        made.refuse_problems()
        if not made.ok:
            made.refuse_warnings()
    except SkillmergeError as error:
        return error.as_dict()
    return {}


def _show_plan(made: Preview, diff: str | None, quiet: bool) -> None:
    from skillmerge.cli.console import console
    from skillmerge.cli.show.merging import show_changes, show_digest, show_plan, show_remarks

    if made.changes is not None:
        show_changes(made.changes, str(diff), console())
        show_remarks(made, console())
    elif quiet:
        show_remarks(made, console())
        show_digest(made, console())
    else:
        show_plan(made, made.needs, _output_of(made), made.disk_free, console())


def _output_of(made: Preview) -> str | None:
    where = made.recipe.output.path or made.recipe.output.bucket
    return str(where) if where else None
