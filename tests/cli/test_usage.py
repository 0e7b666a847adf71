"""A command line that was typed wrong: what is said of it, whole."""

from __future__ import annotations

import json
import re

import click
import pytest
from conftest import run_cli

from skillmerge.cli.main import cli
from skillmerge.cli.usage import FOREIGN_COMMANDS, FOREIGN_OPTIONS, options_of

TYPED = {
    "apply r.yaml --force": ("no such option `--force`", "to replace an existing output, pass `--overwrite`"),
    "verify out --force": ("no such option `--force`", "run `skillmerge verify --help`"),
    "apply r.yaml --dry-run": ("no such option `--dry-run`", "run `skillmerge plan RECIPE`"),
    "plan r.yaml --dry-run": ("no such option `--dry-run`", "leave it out: `plan` only reads headers"),
    "rebuild out --dry-run": ("no such option `--dry-run`", "pass `--check`, which writes nothing"),
    "-V": ("no such option `-V`", "run `skillmerge --version`"),
    "apply r.yaml -V": ("no such option `-V`", "run `skillmerge --version`"),
    "apply r.yaml --out-dir x": ("no such option `--out-dir`", "pass `--output`"),
    "plan r.yaml --out-dir x": ("no such option `--out-dir`", "set `output.path` in the recipe"),
    "apply r.yaml --cuda": ("no such option `--cuda`", "pass `--device cuda`, or `--device auto`"),
    "apply r.yaml --copy-tokenizer": (
        "no such option `--copy-tokenizer`",
        "leave it out: tokenizer files are copied from the donor, which `output.like` in the recipe names",
    ),
    "apply r.yaml --lazy-unpickle": (
        "no such option `--lazy-unpickle`", "leave it out: models are always streamed from safetensors"
    ),
    "inspect --recipe r.yaml": (
        "no such option `--recipe`", "give the recipe without an option: `skillmerge inspect recipe.yaml`"
    ),
    "inspect a b --top": ("no such option `--top`", "run `skillmerge inspect --help`"),
    "apply r.yaml --threds 3": ("no such option `--threds`", "did you mean `--threads`?"),
    "plan r.yaml --overwrite": (
        "no such option `--overwrite`",
        "leave it out: it is an option of `apply`, `finish`, `extract`, `sweep` … and 1 more"
    ),
    "diff a b": (
        "no such command `diff`",
        "what changed between two models: `skillmerge inspect BEFORE AFTER`; since a saved plan: "
        "`skillmerge plan RECIPE --diff PLAN`",
    ),
    "merge r.yaml": ("no such command `merge`", "run `skillmerge apply RECIPE`"),
    "validate r.yaml": (
        "no such command `validate`",
        "of a recipe: `skillmerge lint RECIPE`; of an output: `skillmerge verify FOLDER`",
    ),
    "derive r.yaml --choice match": (
        "no such command `derive`",
        "call `match` or `project` in the recipe: `merge: target + lam * match(rl - sft, to=target - base)`; "
        "`skillmerge methods` explains both",
    ),
    "aply r.yaml": ("no such command `aply`", "did you mean `apply`?"),
    "frobnicate": ("no such command `frobnicate`", "run `skillmerge --help`"),
    "apply": ("missing argument `RECIPE`", "write `skillmerge apply RECIPE`"),
    "push out": ("missing argument `ORG/NAME`", "write `skillmerge push FOLDER ORG/NAME`"),
    "extract --from a": (
        "missing option `--minus`", "write `skillmerge extract --from MODEL --minus MODEL --output DIR`"
    ),
    "apply r.yaml other": ("unexpected argument `other`", "write `skillmerge apply RECIPE`"),
    "verify": ("missing argument `FOLDER`", "write `skillmerge verify FOLDER`"),
    "verify a b": ("unexpected argument `b`", "write `skillmerge verify FOLDER`"),
    "apply r.yaml --stats ful": (
        "`--stats`: `ful` is not one of `full`, `sampled`, `off`", "did you mean `full`?"
    ),
    "apply r.yaml --threads many": ("`--threads`: `many` is not a whole number", "run `skillmerge apply --help`"),
    "apply r.yaml --threads 999": ("`--threads`: `999` is not from 1 to 256", "run `skillmerge apply --help`"),
    "apply r.yaml --memory-limit much": (
        "`--memory-limit`: `much` is not a size; write it like 5GB, 700MB or 2GiB", "run `skillmerge apply --help`"
    ),
    "apply r.yaml --set lam": (
        "`--set`: `lam` is not NAME=NUMBER, such as lam=0.7", "run `skillmerge apply --help`"
    ),
    "demo -o x": ("no such option `-o`", "name the folder without an option: `skillmerge demo FOLDER`"),
    "sweep r.yaml --set lam=0,1 --score a --score b": (
        "`--score` is given 2 times",
        "give one `--score`; several numbers come from a command that prints a JSON object",
    ),
    "apply r.yaml -o a --output=b -q -q": ("`--output` is given 2 times", "give `--output` once"),
    "apply r.yaml --device cpu --device cpu": ("`--device` is given 2 times", "give `--device` once"),
    "apply r.yaml --output": ("option `--output` requires an argument", "run `skillmerge apply --help`"),
}  # fmt: skip


@pytest.mark.parametrize("line", TYPED)
def test_usage_errors_say_what_and_what_to_do(line: str) -> None:
    process = run_cli(*line.split())
    message, fix = TYPED[line]
    assert (process.returncode, process.stdout, process.stderr) == (2, "", f"error: {message}\nhelp: {fix}\n")


def test_usage_errors_keep_their_keys_as_json() -> None:
    process = run_cli("apply", "r.yaml", "--force", "--json")
    assert json.loads(process.stdout) == {
        "ok": False,
        "error": "UsageError",
        "exit_status": 2,
        "message": "no such option `--force`",
        "fix": "to replace an existing output, pass `--overwrite`",
    }
    logged = json.loads(run_cli("apply", "--log-format", "json").stderr)
    assert (logged["level"], logged["message"]) == ("error", "missing argument `RECIPE`")


def test_usage_without_a_command_is_the_help() -> None:
    process = run_cli()
    assert (process.returncode, process.stderr[:6], "Inspect and reuse:" in process.stderr) == (2, "Usage:", True)


@pytest.mark.parametrize("command", list(cli.commands))
def test_usage_answers_every_foreign_option_in_the_words_of_the_command(command: str) -> None:
    """None of the answers names an option that the command lacks, but in a command line of its own."""
    own = options_of(cli.commands[command])
    for foreign in FOREIGN_OPTIONS:
        for word in foreign.words.split():
            if word in own:
                continue
            fix = run_cli(command, word).stderr.partition("help: ")[2]
            named = re.findall(r"(?<![\w-])--?[a-z][\w-]*", re.sub(r"`skillmerge [^`]*`", "", fix))
            assert not {*named} - {*own}, f"{command} {word}: {fix}"


def test_usage_names_only_commands_and_options_that_exist() -> None:
    every = {name for command in cli.commands.values() for name in options_of(command)}
    assert {foreign.own for foreign in FOREIGN_OPTIONS} - {""} <= every
    assert {name for foreign in FOREIGN_OPTIONS for name in foreign.commands.split()} <= set(cli.commands)
    lines = [*FOREIGN_COMMANDS.values(), *(foreign.help for foreign in FOREIGN_OPTIONS)]
    for line in (found for text in lines for found in re.findall(r"`skillmerge ([^`]*)`", text)):
        name, *words = line.split()
        command: click.Command = cli.commands.get(name, cli)
        if name not in ("{command}", "COMMAND"):
            assert not {word for word in words if word.startswith("-")} - {*options_of(command)}, line
    assert not {word for words in FOREIGN_COMMANDS for word in words.split()} & set(cli.commands)
