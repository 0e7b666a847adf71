"""The command line: parse, call, report; nothing else.

Results go to stdout, everything else to stderr. One place turns errors into messages and exit statuses.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from skillmerge import __version__, flags
from skillmerge.errors import (
    InputError,
    Interrupted,
    ResourceError,
    SkillmergeError,
    Terminated,
    UsageError,
    memory_errors,
    visible,
)
from skillmerge.flags import option
from skillmerge.messages import TerminalReporter, as_json, tell

if TYPE_CHECKING:
    from skillmerge.exporting import Exported
    from skillmerge.merge import Result
    from skillmerge.patching import Patch

_EXIT_STATUSES = """\b
Exit statuses:
  0 done                          5 not enough disk or memory
  1 a bug in skillmerge           6 another run is writing the output
  2 usage or recipe               7 the inputs changed since the plan
  3 a gate or verification       75 temporary, try again
    failed
  4 an input is unsafe, corrupt,  130/143 interrupted: the same
    or does not fit                 command continues"""


class _OutputClosed(Exception):
    """Whoever read the results has heard enough."""


class _Commands(click.Group):
    """Commands whose results may not arrive: click itself would call that an error of ours."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with memory_errors():
                return super().invoke(ctx)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise _OutputClosed from error
            if error.errno == errno.ENOSPC and error.filename is None:
                raise ResourceError("the results could not be written: no space left where they go") from error
            raise


@click.group(cls=_Commands, epilog=_EXIT_STATUSES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="skillmerge")
def cli() -> None:
    """Merge model checkpoints as a recipe says: streaming, at copy speed, with proof.

    Start with `skillmerge demo`, or `skillmerge init` for a recipe of your own.
    """


@cli.command()
@click.argument("recipe", type=click.Path())
@flags.output
@option("--device", type=flags.Device(), default="auto", show_default=True, help="Where to compute.")
@flags.set
@option("--overwrite", is_flag=True, help="Replace an existing output, at the end.")
@option("--full", is_flag=True, help="Read an output that is there already again, every byte of it.")
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
    from skillmerge.events import heard
    from skillmerge.merge import apply as run

    _check_report(report_file)
    _check_room(result_file, "--result-file")
    _check_room(junit_file, "--junit")
    reporter = TerminalReporter(quiet, verbose)
    with heard(reporter, events_file, junit_file, f"skillmerge apply {recipe}"):
        result = run(recipe, coefficients=dict(coefficients), reporter=reporter, **options)
    _show(result, as_json, quiet)
    _write_report(report_file, title=str(result.output), plan=result.plan, manifest=result.manifest)
    if result_file is not None:
        from skillmerge.writer import disk_errors, write_whole

        with disk_errors(Path(result_file)):
            write_whole(Path(result_file).absolute(), (json.dumps(_as_document(result), indent=1) + "\n").encode())


def _check_report(path: str | None) -> None:
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
    _check_room(path, "--report")


def _check_room(name: str | None, option: str) -> None:
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


def _write_report(path: str | None, **parts: Any) -> None:
    if path is None:
        return
    from skillmerge.page import build

    try:
        Path(path).write_text(build(**parts), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}", fix="name another --report") from error
    tell("info", f"wrote {path}")


def _as_document(result: Result) -> dict[str, Any]:
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


def _show(result: Result, as_json: bool, quiet: bool) -> None:
    from skillmerge import report

    if as_json:
        _print_json(_as_document(result))
        return
    if not quiet:
        report.show_result(result, report.console())
    for warning in report.result_warnings(result):
        tell("warning", warning)


@cli.command()
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
@flags.locked
@flags.set
@flags.threads
@flags.memory
@flags.code
@flags.links
@flags.report
@flags.as_json
def plan(
    recipe: str,
    report_file: str | None,
    save: str | None,
    diff: str | None,
    markdown_file: str | None,
    detailed: bool,
    coefficients: tuple[tuple[str, float], ...],
    threads: int | None,
    memory_limit: int | None,
    as_json: bool,
    lock: bool,
    **access: bool,
) -> int:
    """Show all that apply would do, from headers alone."""
    from skillmerge import report
    from skillmerge.merge import is_done, make_plan
    from skillmerge.resources import budget, check_disk, free_disk
    from skillmerge.savedplan import describe, read

    _check_report(report_file)
    before = read(diff) if diff is not None else None
    reporter = TerminalReporter(quiet=False, verbose=True)
    made = make_plan(recipe, coefficients=dict(coefficients), lock=lock, reporter=reporter, **access)
    needs = budget(made, threads=threads, memory_limit=memory_limit)
    where = made.recipe.output.path
    free = free_disk(where) if where is not None else None
    if where is not None and not made.problems and not made.makes_skill:
        check_disk(where, made.bytes_written, "the output")
    document = {
        "ok": not made.problems,
        **describe(made),
        "memory": needs.memory,
        "threads": needs.threads,
        "disk_free": free,
    }
    if save is not None:
        _write_plan(Path(save), json.dumps(document, indent=1) + "\n")
    if before is not None:
        document["changes"] = before.changes(json.loads(json.dumps(document)))
    if as_json:
        _print_json(document)
    elif before is not None:
        report.show_changes(document["changes"], str(diff), report.console())
    else:
        report.show_plan(made, needs, str(where) if where else None, free, report.console())
    _write_report(report_file, title=f"plan of {recipe}", plan=made)
    if markdown_file is not None:
        from skillmerge.markdown import plan_page

        page = plan_page(made, needs, str(where) if where else None, free, document.get("changes"), diff)
        _write(Path(markdown_file), page)
    if made.problems:
        return InputError.exit_status
    return 10 if detailed and not is_done(made, output=None) else 0


@cli.command()
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
    from skillmerge.extraction import extract as run

    _show(run(rl, sft, reporter=TerminalReporter(quiet, verbose), **options), as_json, quiet)


@cli.command()
@click.argument("skill", type=click.Path())
@option("--output", "-o", type=click.Path(), required=True, help="The folder to write.")
@option("--lora-rank", type=click.IntRange(1, 4096), help="Write the best LoRA adapter of this rank.")
@option("--onto", metavar="MODEL", help="Write a sparse patch of this model, which the skill was cut from.")
@option("--base", metavar="MODEL", help="The model that the adapter is for, in place of the skill's own parent.")
@option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the randomised decomposition.")
@flags.links
@flags.as_json
@option("--quiet", "-q", is_flag=True, help="Only results and errors.")
def export(
    skill: str,
    output: str,
    lora_rank: int | None,
    onto: str | None,
    base: str | None,
    seed: int,
    follow_links: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write a stored skill in a format of others: a LoRA adapter for PEFT, or a sparse patch.

    What an adapter cannot hold (norms, embeddings, biases, heads, routers) is left out, and counted. A patch has
    the places and the new elements, exactly, of what changed in the model that was subtracted.
    """
    from skillmerge import report

    reporter = TerminalReporter(quiet, verbose=False, doing="exporting")
    common: dict[str, Any] = {"follow_links": follow_links, "reporter": reporter}
    if (lora_rank is None) == (onto is None):
        raise UsageError("say what to write", fix="give --lora-rank R (an adapter) or --onto SFT (a sparse patch)")
    exported: Exported | Patch
    if lora_rank is not None:
        from skillmerge.exporting import export as adapter

        exported = adapter(skill, output, lora_rank=lora_rank, base=base, seed=seed, **common)
    else:
        from skillmerge.patching import export_patch

        if base is not None:
            raise UsageError("--base is of an adapter", fix="leave it out: a patch is for the model of --onto")
        exported = export_patch(skill, output, onto=str(onto), **common)
    if as_json:
        _print_json({"ok": True, **exported.as_dict()})
    elif not quiet:
        report.show_exported(exported, report.console())


@cli.command()
@click.argument("source", type=click.Path())
@click.argument("other", type=click.Path(), required=False)
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
    report_file: str | None,
    coefficients: tuple[tuple[str, float], ...],
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Show what changed from model SOURCE to OTHER; or the updates that a recipe merges; or a stored skill.

    Shares, norms, units in the last place, how two updates lie to each other, and what rounding will do with them
    for every lambda, before anything is written.
    """
    from skillmerge import report
    from skillmerge.inspection import inspect as run

    _check_report(report_file)
    reporter = TerminalReporter(quiet, verbose=False, doing="inspecting")
    found = run(source, other, coefficients=dict(coefficients), reporter=reporter, **options)
    if as_json:
        _print_json({"ok": True, **found.as_dict()})
    else:
        report.show_inspection(found, report.console())
    _write_report(report_file, title=found.title, plan=found.plan, inspection=found)


@cli.command()
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
    from skillmerge import report
    from skillmerge.deriving import derive as run

    derived = run(recipe, choice, reporter=TerminalReporter(quiet, False, doing="measuring"), **options)
    if as_json:
        _print_json({"ok": True, **derived.as_dict()})
    elif not quiet:
        report.show_derived(derived, report.console())


@cli.command()
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
    from skillmerge import report
    from skillmerge.sweep import sweep as run

    _check_report(report_file)
    reporter = TerminalReporter(quiet, verbose=False, doing="sweeping", unit="candidates")
    found = run(recipe, options.pop("axes"), score, reporter=reporter, **options)
    if as_json:
        _print_json({"ok": True, **found.as_dict()})
    else:
        report.show_sweep(found, report.console())
    _write_report(report_file, title=f"sweep of {recipe}", sweep=found)


@cli.command()
@click.argument("folder", type=click.Path())
@option("--load", is_flag=True, help="Also load it with transformers, in a separate process, and run it once.")
@option("--parent", metavar="MODEL", help="Of a skill: prove that it was cut from this model.")
@option(
    "--signature", is_flag=False, flag_value="", metavar="[FILE]",
    help="Demand a signature that holds: its own model.sig, or this file.",
)  # fmt: skip
@option("--public-key", type=click.Path(), help="Of the key that has to have signed it.")
@flags.certificate_chain
@flags.nonfinite
@flags.links
@flags.junit
@flags.as_json
@option("--quiet", "-q", is_flag=True, help="Only errors.")
def verify(
    folder: str,
    load: bool,
    parent: str | None,
    signature: str | None,
    public_key: str | None,
    certificate_chain: tuple[str, ...],
    allow_nonfinite: bool,
    follow_links: bool,
    junit_file: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Check an output against its manifest, every byte of it; with --signature, also who signed it."""
    from skillmerge.events import heard

    _check_room(junit_file, "--junit")
    reporter, signed, model = TerminalReporter(quiet, verbose=False), None, None
    common: dict[str, Any] = {"load": load, "allow_nonfinite": allow_nonfinite, "reporter": reporter}
    with heard(reporter, junit=junit_file, suite=f"skillmerge verify {folder}"):
        if signature is not None or public_key is not None or certificate_chain:
            from skillmerge.signing import verify_signed

            trusted: dict[str, Any] = {"public_key": public_key, "certificate_chain": certificate_chain}
            signed = verify_signed(folder, signature or None, **trusted, **common)
            verdict = signed.verdict
        else:
            from skillmerge.verification import verify as run

            verdict = run(folder, **common)
        if parent is not None:
            from skillmerge.extraction import check_parent

            model = check_parent(folder, parent, follow_links=follow_links)
    if as_json:
        _print_json(
            {
                "ok": True,
                "folder": str(verdict.folder),
                "files": verdict.files,
                "tensors": verdict.tensors,
                "bytes": verdict.bytes,
                "load": verdict.load,
                "parent": model,
                "signature": signed.as_dict() if signed else None,
            }
        )
    elif not quiet:
        from skillmerge import report

        report.show_verdict(verdict, report.console())
        if signed is not None:
            click.echo(visible(f"signed by {signed.signer}: {signed.files} files, as they are"))
        if parent is not None and model is not None:
            report.show_parent(parent, model, report.console())


@cli.command()
@click.argument("folder", type=click.Path())
@option("--gates", "gates_file", type=click.Path(), help="A file with `gates:`, in place of those of the recipe.")
@flags.base_folder
@flags.links
@flags.events
@flags.junit
@flags.as_json
@option("--quiet", "-q", is_flag=True, help="Only errors.")
def gate(
    folder: str,
    gates_file: str | None,
    base_folder: str | None,
    follow_links: bool,
    events_file: str | None,
    junit_file: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Hold a finished output against gates: exit 3 where one does not hold."""
    from skillmerge import report
    from skillmerge.events import heard
    from skillmerge.gates import GateFailed
    from skillmerge.gating import gate as run

    _check_room(junit_file, "--junit")
    reporter = TerminalReporter(quiet, verbose=False)
    with heard(reporter, events_file, junit_file, f"skillmerge gate {folder}"):
        outcomes = run(folder, gates_file, base=base_folder, follow_links=follow_links, reporter=reporter)
        if not all(outcome.passed for outcome in outcomes):
            raise GateFailed(outcomes)
    rows = [outcome.as_dict() for outcome in outcomes]
    if as_json:
        _print_json({"ok": True, "folder": folder, "gates": rows})
    elif not quiet:
        report.show_gates(rows, report.console())


@cli.command()
@click.argument("folder", type=click.Path())
@option("--check", is_flag=True, help="Write nothing: compare with the bytes that are there.")
@option("--sample", type=flags.Share(), default="100%", show_default=True, help="How many of the tensors to check.")
@option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the choice of these tensors.")
@flags.output
@flags.base_folder
@option("--device", type=flags.Device(), default="auto", show_default=True, help="Where to compute.")
@flags.threads
@flags.memory
@flags.hub
@flags.links
@flags.as_json
@option("--quiet", "-q", is_flag=True, help="Only errors.")
def rebuild(
    folder: str,
    check: bool,
    sample: float,
    seed: int,
    output: str | None,
    base_folder: str | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Build an output again from its manifest and the models that this names, or check that it would be the same.

    A difference is exit 3, models that have changed since are exit 7.
    """
    from skillmerge import report
    from skillmerge.rebuilding import How, check_rebuild
    from skillmerge.rebuilding import rebuild as run

    if check == (output is not None):
        raise UsageError("say what to do", fix="give --check (compare, write nothing) or --output NEW (build it again)")
    reporter = TerminalReporter(quiet, verbose=False, doing="rebuilding")
    how = How(base=Path(base_folder) if base_folder is not None else None, reporter=reporter, **options)
    made = run(folder, output, how) if output is not None else check_rebuild(folder, sample=sample, seed=seed, how=how)
    if as_json:
        _print_json({"ok": True, **made.as_dict()})
    elif not quiet:
        report.show_rebuilt(made, report.console())


@cli.command()
@click.argument("folder", type=click.Path())
@click.argument("repository", metavar="ORG/NAME")
@flags.private
@flags.revision
@flags.pull_request
@flags.message
@option("--tag", "tags", multiple=True, help="Of the model card; may be given again.")
@option("--license", help="Of the merge, for its model card, in place of the recipe's.")
@option("--card", type=click.Path(), help="A model card written by hand.")
@flags.nonfinite
@flags.as_json
@option("--quiet", "-q", is_flag=True, help="Only errors.")
def push(folder: str, repository: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Verify an output and publish it on the Hugging Face Hub, in one commit.

    A repository that has a model already gets a pull request. An interrupted push is continued by the same
    command.
    """
    from skillmerge.pushing import push as run

    published = run(folder, repository, **options)
    if as_json:
        _print_json({"ok": True, **published.as_dict()})
    elif not quiet:
        from skillmerge import report

        report.show_published(published, report.console())


@cli.command()
@click.argument("folder", type=click.Path())
@flags.private_key
@flags.password_file
@option("--signing-certificate", type=click.Path(), help="Of that key, where it has one.")
@flags.certificate_chain
@option("--signature", type=click.Path(), metavar="FILE", help="Where to write it. Default: model.sig in the folder.")
@flags.nonfinite
@flags.as_json
@option("--quiet", "-q", is_flag=True, help="Only errors.")
def sign(
    folder: str, private_key: str | None, password_file: str | None, as_json: bool, quiet: bool, **options: Any
) -> None:
    """Verify an output and sign every file of it, for OpenSSF Model Signing.

    Nothing is asked of a network. An encrypted key's password is read from SKILLMERGE_KEY_PASSWORD or from a file.
    """
    from skillmerge.signing import sign as run

    if private_key is None:
        raise UsageError("a signature is made with a key", fix="give --private-key KEY")
    signed = run(folder, private_key=private_key, password=flags.password(password_file), **options)
    if as_json:
        _print_json({"ok": True, "folder": folder, **signed.as_dict()})
    elif not quiet:
        click.echo(visible(f"signed {signed.files} files as {signed.signer}\nwrote {signed.path}"))


@cli.command()
@click.argument("folder", type=click.Path())
@option("--output", "-o", type=click.Path(), metavar="FILE", help="Default: NAME.intoto.json beside the folder.")
@option("--bom", "bom_file", type=click.Path(), metavar="FILE", help="Also write a CycloneDX bill of materials.")
@option("--builder-id", metavar="URI", help="Who is trusted to have run the merge, such as a pipeline's address.")
@option("--invocation-id", metavar="ID", help="The run of the merge, in the builder's words.")
@flags.private_key
@flags.password_file
@flags.nonfinite
@flags.as_json
@option("--quiet", "-q", is_flag=True, help="Only errors.")
def attest(folder: str, password_file: str | None, as_json: bool, quiet: bool, **options: Any) -> None:
    """Verify an output and write where it came from, as an in-toto attestation with SLSA provenance.

    With --private-key it is signed, as a DSSE envelope. Nothing is asked of a network.
    """
    from skillmerge.attestation import attest as run

    given = {name: value for name, value in options.items() if value is not None}
    attested = run(folder, password=flags.password(password_file), **given)
    if as_json:
        _print_json({"ok": True, "folder": folder, **attested.as_dict()})
    elif not quiet:
        for path in (attested.attestation, attested.bom):
            if path is not None:
                click.echo(visible(f"wrote {path}"))
    if attested.unpinned and not quiet:
        names = ", ".join(attested.unpinned)
        tell("note", f"no digests of these inputs are known (apply --hash-inputs): {names}")


@cli.command()
@click.argument("path", type=click.Path(), default="recipe.yaml")
def init(path: str) -> None:
    """Write a commented recipe to start from (default: recipe.yaml; - for stdout)."""
    from skillmerge.starter import RECIPE

    if path == "-":
        click.echo(RECIPE, nl=False)
        return
    if Path(path).exists():
        raise UsageError(f"{path} exists already", fix="name another file: skillmerge init my-recipe.yaml")
    _write(Path(path), RECIPE)
    click.echo(f"wrote {path}: fill in the models, then `skillmerge plan {path}`")


@cli.command()
@click.argument("recipes", metavar="RECIPE...", nargs=-1, required=True, type=click.Path())
@option("--strict", is_flag=True, help="Warnings fail too.")
@option("--allow", multiple=True, metavar="RULE", help="A warning that is not looked for; may be given again.")
@option(
    "--sarif", "sarif_file", type=click.Path(dir_okay=False), help="Also write the findings as SARIF into this file."
)
@flags.as_json
def lint(recipes: tuple[str, ...], strict: bool, allow: tuple[str, ...], sarif_file: str | None, as_json: bool) -> int:
    """Check recipes from their text alone, every one of them, and tell all that is wrong. Opens no model."""
    from skillmerge import report
    from skillmerge.linting import lint as run
    from skillmerge.sarif import document

    found = run(recipes, allow=allow)
    failed = bool(found.count("error") or (strict and found.findings))
    if sarif_file is not None:
        _write(Path(sarif_file), json.dumps(document(found), indent=1) + "\n")
    if as_json:
        _print_json({"ok": not failed, **found.as_dict()})
    else:
        report.show_lint(found, report.console())
    return UsageError.exit_status if failed else 0


@cli.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from skillmerge.schema import json_schema

    _print_json(json_schema(), indent=2)


@cli.command()
@click.argument("path", type=click.Path(), required=False)
@flags.as_json
def doctor(path: str | None, as_json: bool) -> None:
    """Print what a bug report needs: versions, devices, memory, the disk of PATH, the Hub. No secret is shown."""
    from skillmerge import report
    from skillmerge.doctor import doctor as run

    found = run(path)
    if as_json:
        _print_json({"ok": True, **found.as_dict()})
    else:
        report.show_diagnosis(found, report.console())


@cli.command()
@click.argument("folder", type=click.Path(), default="skillmerge-demo")
def demo(folder: str) -> None:
    """Put four small trained models into FOLDER, transfer a skill between them, and let them answer questions."""
    from skillmerge import report
    from skillmerge.demo import SENTENCE, examples, run, write_family
    from skillmerge.merge import apply as merge
    from skillmerge.verification import verify as check
    from skillmerge.writer import disk_errors

    root = Path(folder)
    if root.exists() and not (root.is_dir() and not any(root.iterdir())):
        raise UsageError(f"{folder} exists already", fix="name another folder: skillmerge demo my-demo")
    out = report.console()
    with disk_errors(root):
        recipe, control = write_family(root)
    click.echo(f"Four small trained models are in {folder}: base, source-sft, source-rl, target-sft.\n")
    click.echo(f"$ cat {recipe}\n{recipe.read_text(encoding='utf-8')}")
    click.echo(f"$ skillmerge apply {recipe}")
    result = merge(recipe, reporter=TerminalReporter(quiet=False, verbose=False), stats="full")
    report.show_result(result, out)
    for warning in report.result_warnings(result):
        tell("warning", warning)
    click.echo(f"\n$ skillmerge verify {os.path.relpath(result.output)}")
    report.show_verdict(check(result.output), out)
    shuffled = merge(control).output
    click.echo("")
    shown = [
        run("target-sft, before", root / "target-sft"),
        run("with the skill's elements shuffled", shuffled),
        run("merged, with the skill", result.output),
    ]
    report.show_answers(shown, examples(shown[0], shown[-1]), out)
    click.echo(f"{SENTENCE}\n")
    click.echo(f"Now change lam in {recipe} and run: skillmerge apply {recipe} --overwrite")


for _command in cli.commands.values():
    flags.log_format(_command)


def _write_plan(path: Path, text: str) -> None:
    """Saved plans replace saved plans, and nothing else."""
    start = text[:12].encode()
    if path.exists() and not (path.is_file() and path.read_bytes()[: len(start)] == start):
        raise UsageError(f"{path} exists already and is not a plan", fix="name another file: plan RECIPE -o plan.json")
    _write(path, text)


def _write(path: Path, text: str) -> None:
    from skillmerge.writer import disk_errors

    with disk_errors(path):
        path.write_text(text, encoding="utf-8")


def _print_json(document: Any, indent: int | None = None) -> None:
    click.echo(json.dumps(document, indent=indent, ensure_ascii=False))


def _terminate(number: int, frame: Any) -> NoReturn:
    raise Terminated


def main() -> NoReturn:
    """Entry point: run a command, turn errors into a message and an exit status."""
    signal.signal(signal.SIGTERM, _terminate)
    # A short life with few cycles: collecting them costs a tenth of a plan and of torch's import.
    gc.disable()
    _prepare_streams()
    # The Hub's client has bars and a log of its own, which shows addresses; what matters of it is in our errors.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "critical")
    try:
        status = cli.main(standalone_mode=False)
        sys.stdout.flush()
    except (click.exceptions.Abort, KeyboardInterrupt) as error:
        terminated = isinstance(error.__cause__ or error, Terminated)
        _fail(_interrupted(signal.SIGTERM if terminated else signal.SIGINT))
    except SkillmergeError as error:
        _fail(error)
    except click.ClickException as error:
        if not _wants_json():
            error.show()
            _leave(error.exit_code)
        _fail(UsageError(error.format_message()))
    except (_OutputClosed, BrokenPipeError):
        _leave(0)
    except Exception:
        import traceback

        traceback.print_exc()
        tell("error", "this is a bug in skillmerge; please report it with the lines above", exit_status=1)
        _leave(1)
    _leave(status if isinstance(status, int) else 0)


def _prepare_streams() -> None:
    """Results and messages go out whatever they are written to: nothing, ASCII, a name that is no text."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - to the end
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _wants_json() -> bool:
    return "--json" in sys.argv or os.environ.get("SKILLMERGE_JSON", "").lower() in ("1", "true", "yes", "on", "t", "y")


def _leave(status: int) -> NoReturn:
    """At once: taking torch's modules apart would cost another quarter of a second, and an interrupt can leave
    Python thinking that it has to die of the signal itself."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def _interrupted(number: int) -> Interrupted:
    kept = "candidates that were scored" if sys.argv[1:2] == ["sweep"] else "finished shards"
    continues = f"{kept} are kept: run the same command again to continue"
    return Interrupted(
        number,
        f"interrupted by {signal.Signals(number).name}",
        fix=continues if sys.argv[1:2] in (["apply"], ["extract"], ["sweep"]) else None,
    )


def _fail(error: SkillmergeError) -> NoReturn:
    with suppress(OSError):
        if _wants_json():
            _print_json({"ok": False, **error.as_dict()})
        elif outcomes := error.as_dict().get("gates"):
            from skillmerge import report

            report.show_gates(outcomes, report.console())
    _tell_error(error)
    _leave(error.exit_status)


def _tell_error(error: SkillmergeError) -> None:
    if as_json():
        tell("error", error.message, fix=error.fix, exit_status=error.exit_status)
        return
    tell("error", error.message)
    if error.fix:
        tell("info", error.fix)


if __name__ == "__main__":
    main()
