"""Commands that need no output: init, lint, schema, doctor, demo."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click

from skillmerge.cli import flags
from skillmerge.cli.flags import option
from skillmerge.cli.messages import TerminalReporter, tell
from skillmerge.cli.results import check_places, print_json, write_text
from skillmerge.errors import UsageError


@click.command()
@click.argument("path", type=click.Path(), default="recipe.yaml")
def init(path: str) -> None:
    """Write a commented recipe to start from (default: recipe.yaml; - for stdout)."""
    from importlib.resources import files

    recipe = (files("skillmerge.recipes") / "starter.yaml").read_text(encoding="utf-8")
    if path == "-":
        click.echo(recipe, nl=False)
        return
    if Path(path).exists():
        raise UsageError(f"{path} exists already", fix="name another file: skillmerge init my-recipe.yaml")
    write_text(Path(path), recipe)
    click.echo(f"wrote {path}: fill in the models, then `skillmerge plan {path}`")


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
    from skillmerge.cli.show import terminal
    from skillmerge.cli.show.sarif import document
    from skillmerge.recipes.lint import lint as run

    check_places(sarif=sarif_file)
    found = run(recipes, allow=allow)
    failed = bool(found.count("error") or (strict and found.findings))
    if sarif_file is not None:
        write_text(Path(sarif_file), json.dumps(document(found), indent=1) + "\n")
    if as_json:
        print_json({"ok": not failed, **found.as_dict()})
    else:
        terminal.show_lint(found, terminal.console())
    return UsageError.exit_status if failed else 0


@click.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from skillmerge.recipes.schema import json_schema

    print_json(json_schema(), indent=2)


@click.command()
@click.argument("path", type=click.Path(), required=False)
@flags.as_json
def doctor(path: str | None, as_json: bool) -> None:
    """Print what a bug report needs: versions, devices, memory, the disk of PATH, the Hub. No secret is shown."""
    from skillmerge.cli.doctor import doctor as run
    from skillmerge.cli.show import terminal

    found = run(path)
    if as_json:
        print_json({"ok": True, **found.as_dict()})
    else:
        terminal.show_diagnosis(found, terminal.console())


@click.command()
@click.argument("folder", type=click.Path(), default="skillmerge-demo")
def demo(folder: str) -> None:
    """Put four small trained models into FOLDER, transfer a skill between them, and let them answer questions."""
    from skillmerge.cli.show import terminal
    from skillmerge.durable import disk_errors
    from skillmerge.verbs.apply import apply as merge
    from skillmerge.verbs.demo import SENTENCE, examples, run, write_family
    from skillmerge.verbs.verify import verify as check

    root = Path(folder)
    if root.exists() and not (root.is_dir() and not any(root.iterdir())):
        raise UsageError(f"{folder} exists already", fix="name another folder: skillmerge demo my-demo")
    out = terminal.console()
    with disk_errors(root):
        recipe, control = write_family(root)
    click.echo(f"Four small trained models are in {folder}: base, source-sft, source-rl, target-sft.\n")
    click.echo(f"$ cat {recipe}\n{recipe.read_text(encoding='utf-8')}")
    click.echo(f"$ skillmerge apply {recipe}")
    result = merge(recipe, reporter=TerminalReporter(quiet=False, verbose=False), stats="full")
    terminal.show_result(result, out)
    for warning in terminal.result_warnings(result):
        tell("warning", warning)
    click.echo(f"\n$ skillmerge verify {os.path.relpath(result.output)}")
    terminal.show_verdict(check(result.output), out)
    shuffled = merge(control).output
    click.echo("")
    shown = [
        run("target-sft, before", root / "target-sft"),
        run("with the skill's elements shuffled", shuffled),
        run("merged, with the skill", result.output),
    ]
    terminal.show_answers(shown, examples(shown[0], shown[-1]), out)
    click.echo(f"{SENTENCE}\n")
    click.echo(f"Now change lam in {recipe} and run: skillmerge apply {recipe} --overwrite")
