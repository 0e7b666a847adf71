"""Commands about updates: extract, export, inspect, sweep."""

from __future__ import annotations

import json
import os
from typing import Any

import click

from skillmerge.cli import flags
from skillmerge.cli.help import command, option
from skillmerge.cli.messages import TerminalReporter
from skillmerge.cli.results import (
    check_places,
    print_result,
    refuse_standard_output,
    show_merge,
    suggest,
    write_report,
)
from skillmerge.remarks import ACCEPTABLE


@command("extract --from source-rl --minus source-sft -o math-skill")
@option("--from", "rl", group=flags.MERGE, required=True, metavar="MODEL", help="Model or adapter that has the skill")
@option("--minus", "sft", group=flags.MERGE, required=True, metavar="MODEL", help="The same model before it had it")
@option(
    "--dtype", group=flags.MERGE, type=click.Choice(["same", "bfloat16", "float16", "float32"]), default="same",
    metavar="DTYPE", help="same is exact; bfloat16, float16 or float32 round once  [default: same]",
)  # fmt: skip
@option(
    "--keep", group=flags.MERGE, type=click.FloatRange(0, 1, min_open=True), metavar="SHARE",
    help="Keep only the largest elements, rescaled to the tensor's norm",
)  # fmt: skip
@option("--ignore", group=flags.MERGE, multiple=True, metavar="GLOB", help="Leave these tensors out; repeatable")
@option(
    "--accept", group=flags.MERGE, multiple=True, metavar="NAME", type=click.Choice(list(ACCEPTABLE)),
    help="Accept a difference between the models; repeatable",
)  # fmt: skip
@flags.vocabulary
@flags.threads
@flags.memory
@flags.hub
@flags.hash_inputs
@flags.links
@flags.new_output
@option("--zstd", group=flags.OUTPUT, is_flag=True, help="Compress the files (needs zstandard)")
@flags.overwrite
@flags.as_json
@flags.quiet
@flags.verbose
def extract(rl: str, sft: str, as_json: bool, quiet: bool, verbose: bool, **options: Any) -> None:
    """Store the difference of two models as a skill.

    The skill is exact and small. Use it in a recipe like a model: `models: {math: {skill: ./math-skill}}`,
    `merge: target + 0.7 * math`. Rerun to resume.
    """
    from skillmerge.verbs.extract import extract as run

    made = run(rl, sft, reporter=TerminalReporter(quiet, verbose), **options)
    show_merge(made, as_json, quiet)
    if not quiet and not as_json:
        place = made.place or min(str(made.output), f"./{os.path.relpath(made.output)}", key=len)
        suggest(f"in a recipe, under `models`: skill: {{skill: {json.dumps(place)}}}")


@command("export math-skill --lora-rank 64 -o adapter", "export math-skill --onto source-sft -o patch")
@click.argument("skill", type=click.Path())
@option(
    "--lora-rank",
    group=flags.MERGE,
    type=click.IntRange(1, 4096),
    metavar="RANK",
    help="Write the best LoRA adapter of this rank",
)
@option("--onto", group=flags.MERGE, metavar="MODEL", help="Write a sparse patch of this model, the skill's parent")
@option("--base", group=flags.MERGE, metavar="MODEL", help="Base model of the adapter  [default: the skill's parent]")
@option(
    "--seed",
    group=flags.MERGE,
    type=click.IntRange(0),
    default=0,
    metavar="N",
    help="Seed of the randomized decomposition  [default: 0]",
)
@flags.links
@flags.new_output
@flags.as_json
@flags.quiet
def export(skill: str, output: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Convert a skill to a LoRA adapter or a sparse patch.

    An adapter leaves out norms, embeddings, biases, heads and routers, and reports how much that is. A patch is
    exact: it stores the positions and new values of every changed element.
    """
    from skillmerge.cli.console import console
    from skillmerge.cli.show.studying import show_exported
    from skillmerge.verbs.export.export import export as run

    exported = run(skill, output, reporter=TerminalReporter(quiet, verbose=False, doing="exporting"), **options)
    if as_json:
        print_result(exported)
    elif not quiet:
        show_exported(exported, console())


@command(
    "inspect before after",
    "inspect source-sft rl-adapter",
    "inspect recipe.yaml --base base --details",
    "inspect math-skill code-skill",
)
@click.argument("source", type=click.Path())
@click.argument("other", type=click.Path(), required=False)
@click.argument("more", type=click.Path(), nargs=-1)
@option("--base", group=flags.MERGE, metavar="MODEL", help="Model that a recipe's target was trained from")
@flags.set
@flags.stats
@option(
    "--spectral", group=flags.MERGE, type=click.IntRange(1, 64), metavar="RANK",
    help="Also measure this many singular directions",
)  # fmt: skip
@flags.vocabulary
@flags.threads
@flags.hub
@flags.locked
@flags.links
@option("--details", group=flags.REPORTS, is_flag=True, help="Show every figure, also by layer")
@flags.report
@flags.as_json
@flags.quiet
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
    """Show what changed between models.

    SOURCE is a recipe, a stored skill, an adapter, or the model before; OTHER is the model or the adapter after.
    Several skills or adapters are compared with one another. Nothing is written: rounding is computed for every lambda.
    """
    from skillmerge.cli.console import console
    from skillmerge.cli.show.inspection import show_inspection
    from skillmerge.study.inspect import inspect as run

    printed = check_places(json=as_json, report=report_file)
    reporter = TerminalReporter(quiet, verbose=False, doing="inspecting")
    found = run(source, other, *more, coefficients=dict(coefficients), reporter=reporter, **options)
    if as_json:
        print_result(found)
    elif not printed:
        show_inspection(found, console(), details)
    write_report(report_file, plan=found.plan, inspection=found)


@command(
    "sweep recipe.yaml --set lam=0:2:0.25 --score 'python eval.py {}'",
    "sweep recipe.yaml --set lam=0.5,1,1.5 --score qa:questions.jsonl",
)
@click.argument("recipe", type=click.Path())
@option(
    "--set", "axes", group="Search", multiple=True, metavar="NAME=VALUES", required=True,
    help="Values to try: lam=0:2:0.25, lam=0.5,1,2; lam=0:2 for a search",
)  # fmt: skip
@option(
    "--score", group="Search", required=True, metavar="SCORE",
    help="COMMAND with {}, MODULE:FUNCTION, qa:FILE, perplexity:FILE or lm-eval:TASKS",
    once="give one `--score`; several numbers come from a command that prints a JSON object",
)  # fmt: skip
@option("--by", group="Search", metavar="NAME", help="Score that decides  [default: the first]")
@option(
    "--minimise/--maximise",
    "--minimize/--maximize", group="Search", default=None,
    help="Which way is better  [default: minimize perplexity, maximize the rest]",
)  # fmt: skip
@option(
    "--repeats", group="Search", type=click.IntRange(1), default=1, metavar="N",
    help="Score each candidate N times, to see the noise  [default: 1]",
)  # fmt: skip
@option(
    "--search", group="Search", type=click.Choice(["tpe", "cmaes", "random"]), metavar="METHOD",
    help="Search with Optuna: tpe, cmaes or random",
)  # fmt: skip
@option(
    "--trials", group="Search", type=click.IntRange(1), default=30, metavar="N",
    help="Candidates of a search  [default: 30]",
)  # fmt: skip
@option(
    "--seed", group="Search", type=click.IntRange(0), default=0, metavar="N",
    help="Seed of the search and of the scores  [default: 0]",
)  # fmt: skip
@flags.device
@flags.on
@flags.hub
@flags.locked
@flags.links
@option(
    "--output", "-o", group=flags.OUTPUT, type=click.Path(), metavar="DIR", help="Sweep folder  [default: RECIPE.sweep]"
)
@option("--overwrite", group=flags.OUTPUT, is_flag=True, help="Start over in a folder with another sweep")
@flags.report
@flags.as_json
@flags.quiet
def sweep(recipe: str, score: str, report_file: str | None, as_json: bool, quiet: bool, **options: Any) -> None:
    """Try many coefficients and keep the best.

    Writes a recipe with the best ones. Rerun to resume; no candidate is scored twice.
    """
    from skillmerge.cli.console import console
    from skillmerge.cli.show.studying import apply_best, show_sweep
    from skillmerge.verbs.sweep.sweep import sweep as run

    refuse_standard_output(output=options["output"])
    printed = check_places(json=as_json, report=report_file)
    reporter = TerminalReporter(quiet, verbose=False, doing="sweeping", unit="candidates")
    found = run(recipe, options.pop("axes"), score, reporter=reporter, **options)
    if as_json:
        print_result(found)
    elif not printed:
        show_sweep(found, console())
        if not quiet:
            suggest(apply_best(found))
    write_report(report_file, sweep=found)
