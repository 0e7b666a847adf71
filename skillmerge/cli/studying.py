"""Commands about updates: extract, export, inspect, derive, sweep."""

from __future__ import annotations

from typing import Any

import click

from skillmerge.cli import flags
from skillmerge.cli.flags import option
from skillmerge.cli.messages import TerminalReporter
from skillmerge.cli.results import check_places, print_result, show_merge, write_report
from skillmerge.remarks import ACCEPTABLE


@click.command()
@option("--from", "rl", required=True, metavar="MODEL", help="What has the skill: a folder, or hf://org/name.")
@option("--minus", "sft", required=True, metavar="MODEL", help="The same model before it had the skill.")
@option("--output", "-o", type=click.Path(), required=True, help="The folder to write.")
@option(
    "--dtype", type=click.Choice(["same", "bfloat16", "float16", "float32"]), default="same", show_default=True,
    help="`same` is exact; the others round each difference once.",
)  # fmt: skip
@option("--zstd", is_flag=True, help="Compress its files (needs the package zstandard).")
@option(
    "--keep", type=click.FloatRange(0, 1, min_open=True), metavar="SHARE",
    help="Only the largest elements of each tensor, multiplied by what restores its norm.",
)  # fmt: skip
@option("--ignore", multiple=True, metavar="GLOB", help="Tensors that the skill does without; may be given again.")
@option(
    "--accept", multiple=True, metavar="NAME", type=click.Choice(list(ACCEPTABLE)),
    help="A difference between the models that is meant; may be given again.",
)  # fmt: skip
@option("--overwrite", is_flag=True, help="Replace an existing output, at the end.")
@flags.threads
@flags.memory
@option("--hash-inputs", is_flag=True, help="Put the sha256 of every input file into the manifest.")
@flags.hub
@flags.links
@flags.as_json
@option("--quiet", "-q", is_flag=True, help="Only results and errors.")
@option("--verbose", "-v", is_flag=True, help="Say what is being done.")
def extract(rl: str, sft: str, as_json: bool, quiet: bool, verbose: bool, **options: Any) -> None:
    """Store the difference of two models, exactly and small, for recipes to use.

    In a recipe it stands like a model: `models: {math: {skill: ./math-skill}}`, `merge: target + 0.7 * math`.
    """
    from skillmerge.verbs.extract import extract as run

    show_merge(run(rl, sft, reporter=TerminalReporter(quiet, verbose), **options), as_json, quiet)


@click.command()
@click.argument("skill", type=click.Path())
@option("--output", "-o", type=click.Path(), required=True, help="The folder to write.")
@option("--lora-rank", type=click.IntRange(1, 4096), help="Write the best LoRA adapter of this rank.")
@option("--onto", metavar="MODEL", help="Write a sparse patch of this model, which the skill was cut from.")
@option("--base", metavar="MODEL", help="The model that the adapter is for, in place of the skill's own parent.")
@option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the randomised decomposition.")
@flags.links
@flags.as_json
@option("--quiet", "-q", is_flag=True, help="Only results and errors.")
def export(skill: str, output: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Write a stored skill in a format of others: a LoRA adapter for PEFT, or a sparse patch.

    What an adapter cannot hold (norms, embeddings, biases, heads, routers) is left out, and counted. A patch has
    the places and the new elements, exactly, of what changed in the model that was subtracted.
    """
    from skillmerge.cli.show.studying import show_exported
    from skillmerge.cli.show.table import console
    from skillmerge.verbs.export.export import export as run

    exported = run(skill, output, reporter=TerminalReporter(quiet, verbose=False, doing="exporting"), **options)
    if as_json:
        print_result(exported)
    elif not quiet:
        show_exported(exported, console())


@click.command()
@click.argument("source", type=click.Path())
@click.argument("other", type=click.Path(), required=False)
@click.argument("more", type=click.Path(), nargs=-1)
@option("--base", metavar="MODEL", help="Of a recipe: what its target was trained from.")
@flags.set
@option(
    "--stats", type=click.Choice(["full", "sampled", "off"]), default="sampled", show_default=True,
    help="How much of the rounding to forecast.",
)  # fmt: skip
@option(
    "--spectral", type=click.IntRange(1, 64), metavar="RANK",
    help="Also how matrices' updates spread over so many directions.",
)  # fmt: skip
@option("--details", is_flag=True, help="Every figure, also by layer.")
@flags.threads
@flags.hub
@flags.locked
@flags.links
@flags.report
@flags.as_json
@option("--quiet", "-q", is_flag=True, help="Only results and errors.")
def inspect(
    source: str,
    other: str | None,
    more: tuple[str, ...],
    report_file: str | None,
    coefficients: tuple[tuple[str, float], ...],
    details: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Show what changed from model SOURCE to OTHER; or the updates that a recipe merges; or stored skills.

    Several skills, named alone or added up by a recipe, are shown each by itself and each beside every other one.

    Shares, norms, units in the last place, how two updates lie to each other, and what rounding will do with them
    for every lambda, before anything is written.
    """
    from skillmerge.cli.show.inspection import show_inspection
    from skillmerge.cli.show.table import console
    from skillmerge.study.inspect import inspect as run

    check_places(report=report_file)
    reporter = TerminalReporter(quiet, verbose=False, doing="inspecting")
    found = run(source, other, *more, coefficients=dict(coefficients), reporter=reporter, **options)
    if as_json:
        print_result(found)
    else:
        show_inspection(found, console(), details)
    write_report(report_file, title=found.title, plan=found.plan, inspection=found)


@click.command()
@click.argument("recipe", type=click.Path())
@option(
    "--choice", type=click.Choice(["match", "project"]), required=True,
    help="match: as long as the target's own update; project: without what it shares with that.",
)  # fmt: skip
@option("--base", metavar="MODEL", required=True, help="What the recipe's target was trained from.")
@option("--output", "-o", type=click.Path(dir_okay=False), required=True, help="The recipe to write, beside RECIPE.")
@flags.threads
@flags.hub
@flags.locked
@flags.links
@flags.as_json
@option("--quiet", "-q", is_flag=True, help="Only results and errors.")
def derive(recipe: str, choice: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Write a recipe whose coefficients, by layer and kind of module, follow from the weights alone."""
    from skillmerge.cli.show.studying import show_derived
    from skillmerge.cli.show.table import console
    from skillmerge.verbs.derive import derive as run

    derived = run(recipe, choice, reporter=TerminalReporter(quiet, False, doing="measuring"), **options)
    if as_json:
        print_result(derived)
    elif not quiet:
        show_derived(derived, console())


@click.command()
@click.argument("recipe", type=click.Path())
@option(
    "--set", "axes", multiple=True, metavar="NAME=START:STOP:STEP", required=True,
    help="A number to try: lam=0:2:0.25, lam=0.5,1,2, or for a search lam=0:2; lam.rules.0.value, lam.default.",
)  # fmt: skip
@option(
    "--score", required=True, metavar="COMMAND|MODULE:FUNCTION|qa:FILE|perplexity:FILE|lm-eval:TASKS",
    help="What tells how good a merge is. A command gets the folder for {} and prints a number or a JSON object.",
)  # fmt: skip
@option("--output", "-o", type=click.Path(), help="The sweep's folder. Default: recipe.sweep beside the recipe.")
@option("--by", metavar="NAME", help="Of several scores the one that decides. Default: the first.")
@option("--minimise/--maximise", default=None, help="Whether less is better. Default: only of perplexity.")
@option(
    "--repeats", type=click.IntRange(1), default=1, show_default=True, help="Score each so often, to see the noise."
)
@option("--search", type=click.Choice(["tpe", "cmaes", "random"]), help="Search with Optuna instead of a grid.")
@option("--trials", type=click.IntRange(1), default=30, show_default=True, help="Of a search.")
@option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the search and of the scores.")
@option("--device", type=flags.Device(), default="auto", show_default=True, help="Where models are merged and run.")
@option("--overwrite", is_flag=True, help="Begin anew where the folder holds another sweep.")
@flags.locked
@flags.hub
@flags.links
@flags.report
@flags.as_json
@option("--quiet", "-q", is_flag=True, help="Only results and errors.")
def sweep(recipe: str, score: str, report_file: str | None, as_json: bool, quiet: bool, **options: Any) -> None:
    """Score a recipe with many numbers in it, and write the best one.

    An interrupted sweep is continued by the same command; no candidate is scored twice.
    """
    from skillmerge.cli.show.studying import show_sweep
    from skillmerge.cli.show.table import console
    from skillmerge.verbs.sweep.sweep import sweep as run

    check_places(report=report_file)
    reporter = TerminalReporter(quiet, verbose=False, doing="sweeping", unit="candidates")
    found = run(recipe, options.pop("axes"), score, reporter=reporter, **options)
    if as_json:
        print_result(found)
    else:
        show_sweep(found, console())
    write_report(report_file, title=f"sweep of {recipe}", sweep=found)
