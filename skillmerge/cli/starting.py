"""Commands that need no output: init, lint, schema, doctor, demo."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from skillmerge.cli import flags
from skillmerge.cli.flags import option
from skillmerge.cli.messages import TerminalReporter
from skillmerge.cli.results import check_places, print_result, show_merge, write_text
from skillmerge.errors import UsageError

if TYPE_CHECKING:
    from skillmerge.verbs.result import Result


@click.command()
@click.argument("path", type=click.Path(), default="recipe.yaml")
@option("--from", "source", metavar="NAME", help="Write this recipe instead of the starter.")
@option("--list", "names", is_flag=True, help="List the recipes for --from, and write nothing.")
def init(path: str, source: str | None, names: bool) -> None:
    """Write a starter recipe.

    PATH is recipe.yaml by default; - writes to standard output. A schema beside the recipe lets editors complete its
    keys.

    Recipes for --from: attention-only, average, blend-skills, chat-vector, frozen-embeddings-and-norms, hub-to-hub,
    mlp-only, past, past-ramp, refine, skill-removal, stored-skill, two-skills.
    """
    from skillmerge.recipes.starter import SCHEMA_FILE, gallery, recipe_text
    from skillmerge.recipes.starter import init as run

    if names:
        recipes = gallery()
        width = max(map(len, recipes))
        click.echo("\n".join(f"{name:{width}}  {summary}" for name, summary in recipes.items()))
    elif path == "-":
        click.echo(recipe_text(source), nl=False)
    else:
        run(path, source)
        click.echo(f"wrote {path}, and {SCHEMA_FILE} beside it for editors")
        click.echo(f"next: fill in the models, then run `skillmerge plan {shlex.quote(path)}`")


@click.command()
@click.argument("recipes", metavar="RECIPE...", nargs=-1, required=True, type=click.Path())
@option("--strict", is_flag=True, help="Warnings fail too.")
@option("--allow", multiple=True, metavar="RULE", help="A warning that is not looked for; may be given again.")
@option(
    "--sarif", "sarif_file", type=click.Path(dir_okay=False), help="Also write the findings as SARIF into this file."
)
@flags.as_json
def lint(recipes: tuple[str, ...], strict: bool, allow: tuple[str, ...], sarif_file: str | None, as_json: bool) -> int:
    """Check recipes from their text alone, every one of them, and tell all that is wrong. Opens no model."""
    from skillmerge.cli.show.sarif import document
    from skillmerge.cli.show.starting import show_lint
    from skillmerge.cli.show.table import console
    from skillmerge.recipes.lint import lint as run

    check_places(sarif=sarif_file)
    found = run(recipes, strict=strict, allow=allow)
    if sarif_file is not None:
        write_text(Path(sarif_file), json.dumps(document(found), indent=1) + "\n")
    if as_json:
        print_result(found)
    else:
        show_lint(found, console())
    return 0 if found.ok else UsageError.exit_status


@click.command()
def schema() -> None:
    """Print the JSON Schema of recipes.

    Editors complete and check recipes with it; `skillmerge init` writes it beside a recipe.
    """
    from skillmerge.recipes.schema import schema_text

    click.echo(schema_text(), nl=False)


@click.command()
@click.argument("path", type=click.Path(), required=False)
@flags.as_json
def doctor(path: str | None, as_json: bool) -> None:
    """Try what a run will do in PATH, and print what a bug report needs (versions, devices, memory, Hub; no secret)."""
    from skillmerge.cli.doctor import doctor as run
    from skillmerge.cli.show.starting import show_diagnosis
    from skillmerge.cli.show.table import console

    found = run(path)
    if as_json:
        print_result(found)
    else:
        show_diagnosis(found, console())


@click.command()
@click.argument("folder", type=click.Path(), default="skillmerge-demo")
def demo(folder: str) -> None:
    """Put four small trained models into FOLDER, transfer a skill between them, and let them answer questions."""
    from skillmerge.cli.show.proving import show_verdict
    from skillmerge.cli.show.starting import show_answers
    from skillmerge.cli.show.table import console
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
            click.echo(f"\n$ skillmerge verify {os.path.relpath(part.output)}")

    done = run(folder, reporter=TerminalReporter(quiet=False, verbose=False), finished=show)
    click.echo("")
    show_answers(done.answers, examples(done.answers[0], done.answers[-1]), console())
    click.echo(f"{SENTENCE}\n")
    click.echo(f"Now change lam in {done.recipe} and run: skillmerge apply {done.recipe} --overwrite")


def _show_family(folder: str, recipe: Path) -> None:
    click.echo(f"Four small trained models are in {folder}: base, source-sft, source-rl, target-sft.\n")
    click.echo(f"$ cat {recipe}\n{recipe.read_text(encoding='utf-8')}")
    click.echo(f"$ skillmerge apply {recipe}")
