"""Commands that need no output: init, import, methods, lint, schema, doctor, demo."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from skillmerge.cli import flags
from skillmerge.cli.help import command, option
from skillmerge.cli.messages import TerminalReporter, log
from skillmerge.cli.results import (
    STANDARD_OUTPUT,
    check_places,
    print_line,
    print_result,
    show_merge,
    suggest,
    write_text,
)
from skillmerge.errors import UsageError
from skillmerge.remarks import count_of

if TYPE_CHECKING:
    from skillmerge.verbs.result import Result


@command("init recipe.yaml", "init past-ramp.yaml --from past-ramp", "init recipe.yaml --from mergekit.yml")
@click.argument("path", type=click.Path(), default="recipe.yaml")
@option(
    "--from",
    "source",
    group="Recipe",
    metavar="NAME|FILE",
    help="Write this recipe, or the translation of a mergekit FILE",
)
@option("--list", "names", group="Recipe", is_flag=True, help="List the recipes for --from, and write nothing")
@flags.quiet
def init(path: str, source: str | None, names: bool, quiet: bool) -> None:
    """Write a starter recipe.

    PATH is recipe.yaml by default; - writes to standard output. The schema that is written beside a recipe lets
    editors complete and explain its keys.

    Recipes for --from: adapter, adapter-difference, attention-only, average, blend-skills, chat-vector, dare, della,
    dots, five-experts, frozen-embeddings-and-norms, hub-to-hub, keep-router, lines, merge-router, mlp-only,
    model-stock, past, past-ramp, ram, refine, sce, skill-removal, slerp, some-experts, stored-skill, ties,
    tokens-by-name, two-adapters-as-one, two-skills, upscaled.
    """
    from skillmerge.recipes.starter import SCHEMA_FILE, gallery, is_file_name, recipe_text
    from skillmerge.recipes.starter import init as run

    if names:
        recipes = gallery()
        width = max(map(len, recipes))
        click.echo("\n".join(f"{name:{width}}  {summary}" for name, summary in recipes.items()))
        return
    if path == STANDARD_OUTPUT:
        write_text(path, recipe_text(source))
        return
    run(path, source)
    if not quiet:
        to_do = "" if source is not None and is_file_name(source) else ": fill in the models"
        print_line(f"wrote {path}, and {SCHEMA_FILE} beside it for editors{to_do}")
        suggest(f"skillmerge plan {shlex.quote(path)}")


@command("import mergekit.yml -o recipe.yaml", "import mergekit.yml --document stage1", name="import")
@click.argument("file", type=click.Path())
@option(
    "--output", "-o", group=flags.OUTPUT, type=click.Path(dir_okay=False), metavar="FILE",
    help="Write the recipe to FILE; - for standard output  [default: -]",
)  # fmt: skip
@option("--overwrite", group=flags.OUTPUT, is_flag=True, help="Replace an existing file")
@option("--document", group="Input", metavar="NAME", help="Which of several merges in the file")
@option(
    "--layers", group="Input", type=click.IntRange(1), metavar="N",
    help="How many layers the models have  [default: read from a local model]",
)  # fmt: skip
@option("--strict", group="Checks", is_flag=True, help="Write nothing if the output can differ from mergekit's")
@flags.as_json
@flags.quiet
def import_(file: str, as_json: bool, quiet: bool, **options: Any) -> int:
    """Translate a mergekit configuration into a recipe.

    Reads no weights and no network. Warnings say what can differ from mergekit's output, and are comments in the
    recipe too. What no recipe says is refused.
    """
    from skillmerge.recipes.mergekit.importing import import_recipe as run

    made = run(file, **options)
    for remark in made.remarks:
        if remark.level == "warning" or not quiet:
            log(remark.level, remark.message)
    if as_json:
        print_result(made)
    if not made.ok:
        log("error", f"{count_of(made.warnings)} under --strict", exit_status=UsageError.exit_status)
        return UsageError.exit_status
    if made.output is None and not as_json:
        write_text(STANDARD_OUTPUT, made.text)
    elif made.output is not None and not as_json and not quiet:
        print_line(f"wrote {made.output}")
        suggest(f"skillmerge plan {shlex.quote(str(made.output))}")
    return 0


@command("methods", "methods ties")
@click.argument("name", required=False)
@flags.as_json
@flags.quiet
def methods(name: str | None, as_json: bool, quiet: bool) -> None:
    """List the merge methods, or explain one.

    Methods are called in a recipe: `merge: base + lam * ties(a - base, b - base, density=0.3)`.
    """
    from skillmerge.cli.console import console
    from skillmerge.cli.show.starting import show_method, show_methods
    from skillmerge.recipes.formula.catalog import list_methods

    found = list_methods(name)
    if as_json:
        print_result(found)
    elif name is not None:
        show_method(found.methods[name], console())
    else:
        show_methods(found, console())
        if not quiet:
            suggest("skillmerge methods ties")


@command("lint recipes/*.yaml", "lint recipe.yaml --strict --sarif lint.sarif")
@click.argument("recipes", metavar="RECIPE...", nargs=-1, required=True, type=click.Path())
@option("--strict", group="Checks", is_flag=True, help="Fail on warnings too")
@option("--allow", group="Checks", multiple=True, metavar="RULE", help="Do not check this rule; repeatable")
@option(
    "--sarif", "sarif_file", group=flags.REPORTS, type=click.Path(dir_okay=False), metavar="FILE",
    help="Write the findings as SARIF",
)  # fmt: skip
@flags.as_json
@flags.quiet
def lint(
    recipes: tuple[str, ...],
    strict: bool,
    allow: tuple[str, ...],
    sarif_file: str | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Check recipes without opening models.

    Reports every mistake, not only the first.
    """
    from skillmerge.cli.console import console
    from skillmerge.cli.show.sarif import document
    from skillmerge.cli.show.starting import show_lint
    from skillmerge.recipes.lint import lint as run

    printed = check_places(json=as_json, sarif=sarif_file)
    found = run(recipes, strict=strict, allow=allow)
    if sarif_file is not None:
        write_text(sarif_file, json.dumps(document(found), indent=1) + "\n")
    if as_json:
        print_result(found)
    elif not printed and not (quiet and found.ok):
        show_lint(found, console())
    return 0 if found.ok else UsageError.exit_status


@command("schema > skillmerge.schema.json")
@flags.quiet
def schema(quiet: bool) -> None:
    """Print the JSON Schema of recipes.

    Editors complete and check recipes with it; `skillmerge init` writes it beside a recipe.
    """
    from skillmerge.recipes.schema import schema_text

    write_text(STANDARD_OUTPUT, schema_text())


@command("doctor", "doctor /data/models")
@click.argument("path", type=click.Path(), required=False)
@flags.as_json
@flags.quiet
def doctor(path: str | None, as_json: bool, quiet: bool) -> None:
    """Print system details for a bug report.

    Shows versions, devices, memory and Hub access, and no secret. With PATH, tries what a merge does in that folder.
    """
    from skillmerge.cli.console import console
    from skillmerge.cli.doctor import doctor as run
    from skillmerge.cli.show.starting import show_diagnosis

    found = run(path)
    if as_json:
        print_result(found)
    else:
        show_diagnosis(found, console())


@command("demo")
@click.argument("folder", type=click.Path(), default="skillmerge-demo")
@flags.quiet
def demo(folder: str, quiet: bool) -> None:
    """Transfer a skill between four small models.

    Writes the models, their recipe, the merged model, and questions for a sweep into FOLDER, and lets the models
    answer questions.
    """
    from skillmerge.cli.console import console
    from skillmerge.cli.show.proving import show_verdict
    from skillmerge.cli.show.starting import show_answers
    from skillmerge.outputs.verify import Verdict
    from skillmerge.verbs.demo.demo import SENTENCE, examples
    from skillmerge.verbs.demo.demo import demo as run

    def show(part: Path | Result | Verdict) -> None:
        if isinstance(part, Path):
            _show_family(folder, part)
        elif isinstance(part, Verdict):
            show_verdict(part, console())
        else:
            show_merge(part, as_json=False, quiet=False)
            print_line(f"\n$ skillmerge verify {os.path.relpath(part.output)}")

    done = run(folder, reporter=TerminalReporter(quiet, verbose=False), finished=show)
    print_line("")
    show_answers(done.answers, examples(done.answers[0], done.answers[-1]), console())
    print_line(f"{SENTENCE}\n")
    print_line(f"Now change lam in {done.recipe} and run: skillmerge apply {done.recipe} --overwrite")
    questions = done.recipe.with_name("questions.jsonl")
    print_line(f"Or try several: skillmerge sweep {done.recipe} --set lam=0:2:0.5 --score qa:{questions}")


def _show_family(folder: str, recipe: Path) -> None:
    print_line(f"Four small trained models are in {folder}: base, source-sft, source-rl, target-sft.\n")
    print_line(f"$ cat {recipe}\n{recipe.read_text(encoding='utf-8')}")
    print_line(f"$ skillmerge apply {recipe}")
