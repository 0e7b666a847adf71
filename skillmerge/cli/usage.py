"""Errors of the command line: click's errors in skillmerge's words, and other tools' names for options and commands.

Knows click's errors and the words of other tools; each command says what options it has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import click

from skillmerge.errors import UsageError, did_you_mean, some


@dataclass(frozen=True, slots=True)
class Foreign:
    """Options of other tools that have one meaning here.

    own: the option of ours that does it, which the command must have; "" if no option does. help: what to do.
    commands: where that is true; everywhere by default.
    """

    words: str
    help: str
    own: str = ""
    commands: str = ""


FOREIGN_OPTIONS = (
    Foreign(
        "--force -f --force-overwrite --clobber --exist-ok --yes -y",
        "to replace an existing output, pass `--overwrite`",
        own="--overwrite",
    ),
    Foreign(
        "--dry-run --dryrun --dry_run -n --simulate --no-act --what-if",
        "run `skillmerge plan RECIPE`",
        commands="apply",
    ),
    Foreign(
        "--dry-run --dryrun --dry_run -n --simulate --no-act --what-if",
        "leave it out: `plan` only reads headers",
        commands="plan",
    ),
    Foreign(
        "--dry-run --dryrun --dry_run -n --simulate --no-act --what-if",
        "pass `--check`, which writes nothing",
        own="--check",
    ),
    Foreign(
        "--dryrun --dry_run -n --simulate --no-act --what-if",
        "pass `--dry-run`",
        own="--dry-run",
    ),
    Foreign(
        "-V --version -version",
        "run `skillmerge --version`",
    ),
    Foreign(
        "--out-dir --out_dir --outdir --output-dir --output_dir --output-path --output_path --out --out-path "
        "--dest --destination --save-dir --save-path --save_path --target-dir -d -O",
        "pass `--output`",
        own="--output",
    ),
    Foreign(
        "--out-dir --out_dir --outdir --output-dir --output_dir --output-path --output_path",
        "set `output.path` in the recipe",
        commands="plan",
    ),
    Foreign(
        "--out-dir --out_dir --outdir --output-dir --output_dir --output-path --output_path --out --output -o -O "
        "--dest --destination --dir --folder -d",
        "name the folder without an option: `skillmerge demo FOLDER`",
        commands="demo",
    ),
    Foreign(
        "--out --output --output-file --out-file -O",
        "to write the plan into a file, pass `--save`",
        own="--save",
    ),
    Foreign(
        "--cuda --gpu --gpus --use-gpu --use-cuda --read-to-gpu --gpu-rich --multi-gpu --device-map --device_map "
        "--accelerator --low-cpu-memory",
        "pass `--device cuda`, or `--device auto`",
        own="--device",
    ),
    Foreign(
        "--cpu --no-cuda --no-gpu --cpu-only",
        "pass `--device cpu`",
        own="--device",
    ),
    Foreign(
        "--num-threads --num_threads --num-workers --num_workers --workers --jobs -j --nproc --processes "
        "--parallel --max-workers --cores",
        "pass `--threads`",
        own="--threads",
    ),
    Foreign(
        "--max-memory --max_memory --memory --mem --ram --mem-limit --max-ram",
        "pass `--memory-limit`",
        own="--memory-limit",
    ),
    Foreign(
        "--copy-tokenizer --no-copy-tokenizer --copy_tokenizer --tokenizer-source --tokenizer",
        "leave it out: tokenizer files are copied from the donor, which `output.like` in the recipe names",
        commands="apply plan",
    ),
    Foreign(
        "--lazy-unpickle --lazy-loading --no-lazy-unpickle --low-cpu-mem-usage --low_cpu_mem_usage --async-write "
        "--clone-tensors --safe-serialization --mmap",
        "leave it out: models are always streamed from safetensors",
    ),
    Foreign(
        "--trust-remote-code --trust_remote_code --allow-remote-code",
        "pass `--allow-code`",
        own="--allow-code",
    ),
    Foreign(
        "--allow-crimes",
        "leave it out: name tensors in the recipe under `copy` or `ignore`",
        commands="apply plan",
    ),
    Foreign(
        "--out-shard-size --max-shard-size --max_shard_size --shard-size --shard_size",
        "set `output.shard_size` in the recipe",
        commands="apply plan",
    ),
    Foreign(
        "--dtype --out-dtype --torch-dtype --precision --fp16 --bf16 --fp32 --half",
        "set `output.dtype` in the recipe",
        commands="apply plan",
    ),
    Foreign(
        "--random-seed --random_seed --seed",
        "set `output.seed` in the recipe",
        commands="apply plan",
    ),
    Foreign(
        "--random-seed --random_seed",
        "pass `--seed`",
        own="--seed",
    ),
    Foreign(
        "--lambda --lam --alpha --scale --scaling --weight --weights --coefficient --coef --param --var "
        "--parameter -D -s",
        "pass `--set NAME=NUMBER`, such as `--set lam=0.7`",
        own="--set",
    ),
    Foreign(
        "--lora-merge-cache --transformers-cache --cache-dir --cache_dir --hf-home",
        "set HF_HOME in the environment for the Hub's cache",
    ),
    Foreign(
        "--token --hf-token --hf_token --use-auth-token --api-key --auth",
        "log in with `hf auth login`, or set HF_TOKEN",
    ),
    Foreign(
        "--offline --local-files-only --local_files_only --no-network",
        "set HF_HUB_OFFLINE=1 in the environment",
    ),
    Foreign(
        "--download --no-stream --local",
        "pass `--hub download`",
        own="--hub",
    ),
    Foreign(
        "--push-to-hub --push_to_hub --upload --publish --hub-model-id --repo-id --repo_id --repo",
        "pass `--push ORG/NAME`",
        own="--push",
    ),
    Foreign(
        "--repo-id --repo_id --repo --repository --hub-model-id",
        "name it after the folder: `skillmerge push FOLDER ORG/NAME`",
        commands="push",
    ),
    Foreign(
        "--branch --ref",
        "pass `--revision`",
        own="--revision",
    ),
    Foreign(
        "--commit-message --commit_message -m --msg",
        "pass `--message`",
        own="--message",
    ),
    Foreign(
        "--create-pr --create_pr --pr",
        "pass `--pull-request`",
        own="--pull-request",
    ),
    Foreign(
        "--license --licence",
        "write it in the recipe: `output: {{license: mit}}`",
        commands="apply plan",
    ),
    Foreign(
        "--licence",
        "pass `--license`",
        own="--license",
    ),
    Foreign(
        "--write-model-card --no-write-model-card --model-card",
        "leave it out: `push` writes the card",
        commands="apply",
    ),
    Foreign(
        "--resume --continue --restart --resume-from",
        "leave it out: rerun the same command to resume",
    ),
    Foreign(
        "--debug --verbosity --loud --log-level -vv",
        "pass `--verbose`",
        own="--verbose",
    ),
    Foreign(
        "--silent -s --no-progress --disable-tqdm --no-progress-bar",
        "pass `--quiet`",
        own="--quiet",
    ),
    Foreign(
        "--format --output-format --as-json -j --format=json",
        "pass `--json`",
        own="--json",
    ),
    Foreign(
        "--no-color --no-colour --color --colour",
        "set NO_COLOR=1 in the environment",
    ),
    Foreign(
        "--config --config-file --recipe --yaml -c --file -i --input",
        "give the recipe without an option: `skillmerge {command} recipe.yaml`",
        commands="apply plan sweep inspect lint",
    ),
    Foreign(
        "--model --models --model-path --model_path --base-model --base_model --merge-method --method --adapter --lora",
        "name models and arithmetic in the recipe: `skillmerge init` writes one",
        commands="apply plan",
    ),
    Foreign(
        "--base --sft --without --subtract --before --model-b",
        "pass `--minus`",
        own="--minus",
    ),
    Foreign(
        "--rl --model --plus --after --model-a --tuned --finetuned",
        "pass `--from`",
        own="--from",
    ),
    Foreign(
        "--rank -r --lora-r --lora_rank --max-rank",
        "pass `--lora-rank`",
        own="--lora-rank",
    ),
    Foreign(
        "--validate --check --verify",
        "run `skillmerge verify FOLDER`",
        commands="apply",
    ),
    Foreign(
        "--check --strict --fail-on-warning --Werror",
        "pass `--strict`",
        own="--strict",
    ),
    Foreign(
        "--key --private_key --signing-key",
        "pass `--private-key`",
        own="--private-key",
    ),
    Foreign(
        "--pubkey --public_key --key",
        "pass `--public-key`",
        own="--public-key",
    ),
    Foreign(
        "--password --passphrase",
        "set SKILLMERGE_KEY_PASSWORD, or pass `--password-file`",
        own="--password-file",
    ),
    Foreign(
        "--skip --exclude --ignore-rule --disable",
        "pass `--allow`",
        own="--allow",
    ),
)

FOREIGN_COMMANDS = {
    "diff compare changes": "what changed between two models: `skillmerge inspect BEFORE AFTER`; since a saved plan: "
    "`skillmerge plan RECIPE --diff PLAN`",
    "merge run build make mergekit mergekit-yaml combine fuse soup blend create": "run `skillmerge apply RECIPE`",
    "validate check fmt syntax": "of a recipe: `skillmerge lint RECIPE`; of an output: `skillmerge verify FOLDER`",
    "dry-run dryrun show preview explain": "run `skillmerge plan RECIPE`",
    "mergekit-extract-lora extract-lora lora": "run `skillmerge extract`, then `skillmerge export SKILL --lora-rank R`",
    "subtract cut task-vector taskvector delta": "run `skillmerge extract --from AFTER --minus BEFORE -o SKILL`",
    "test eval evaluate score bench": "run `skillmerge gate FOLDER`, or `skillmerge sweep RECIPE --score COMMAND`",
    "tune search optimize optimise evolve mergekit-evolve grid": "run `skillmerge sweep RECIPE`",
    "upload publish deploy release": "run `skillmerge push FOLDER ORG/NAME`",
    "new create-recipe template starter example": "run `skillmerge init recipe.yaml`",
    "info version about env": "run `skillmerge doctor`, or `skillmerge --version`",
    "stats analyze analyse analysis report": "run `skillmerge inspect RECIPE`",
    "derive": "call `match` or `project` in the recipe: `merge: target + lam * match(rl - sft, to=target - base)`; "
    "`skillmerge methods` explains both",
    "method list-methods list_methods merge-methods algorithms": "run `skillmerge methods`",
    "reproduce replay redo": "run `skillmerge rebuild FOLDER --check`",
    "lock freeze pin": "run `skillmerge plan RECIPE --lock`",
    "convert translate mergekit-import": "run `skillmerge import MERGEKIT.yml`, which prints the recipe",
    "download fetch pull": "models on the Hub are streamed; to keep one: `hf download ORG/NAME`",
    "help": "run `skillmerge --help`, or `skillmerge COMMAND --help`",
}
"""Other tools' names for commands, and the command of skillmerge that does the same."""


def unknown_command(name: str, commands: list[str]) -> UsageError:
    """Return the error for a command that does not exist."""
    theirs = next((help for words, help in FOREIGN_COMMANDS.items() if name in words.split()), None)
    return UsageError(
        f"no such command `{name}`", fix=theirs or did_you_mean(name, commands) or "run `skillmerge --help`"
    )


def explained(error: click.ClickException, command: click.Command, commands: Mapping[str, click.Command]) -> UsageError:
    """Turn an error of click into one of skillmerge. command: the one that was run, of these `commands`, or the group
    of all."""
    path = f"skillmerge {command.name}" if command.name in commands else "skillmerge"
    see = f"run `{path} --help`"
    if isinstance(error, click.NoSuchOption):
        return _unknown_option(error.option_name, command, commands, see)
    if isinstance(error, click.MissingParameter) and error.param is not None:
        kind = "option" if isinstance(error.param, click.Option) else "argument"
        return UsageError(f"missing {kind} `{_shown(error.param)}`", fix=_usage(path, command))
    if isinstance(error, click.BadParameter):
        what = f"`{_shown(error.param)}`: " if error.param is not None else ""
        choices = getattr(error.param.type, "choices", None) if error.param is not None else None
        given = re.match(r"'([^']*)'", error.message)
        near = did_you_mean(given[1], list(choices)) if choices and given else None
        return UsageError(what + _ours(error.message), fix=near or see)
    if (extra := re.search(r"extra arguments? \((.*)\)", error.format_message())) is not None:
        return UsageError(f"unexpected argument `{extra[1]}`", fix=_usage(path, command))
    return UsageError(_ours(error.format_message()), fix=see)


def _unknown_option(name: str, command: click.Command, commands: Mapping[str, click.Command], see: str) -> UsageError:
    own, called = options_of(command), command.name or ""
    for foreign in FOREIGN_OPTIONS:
        here = not foreign.commands or called in foreign.commands.split()
        if name in foreign.words.split() and here and (not foreign.own or foreign.own in own):
            return UsageError(f"no such option `{name}`", fix=foreign.help.format(command=called))
    others = [f"`{other}`" for other, it in commands.items() if name in options_of(it)]
    elsewhere = f"leave it out: it is an option of {some(others, 4)}" if others and called in commands else None
    return UsageError(f"no such option `{name}`", fix=elsewhere or _near_option(name, own) or see)


def _near_option(name: str, own: list[str]) -> str | None:
    """Return a suggestion for a misspelled option. Dashes, which all have, make no two options alike."""
    near = did_you_mean(name.lstrip("-"), [option[2:] for option in own if option.startswith("--")])
    return near and near.replace("`", "`--", 1)


def options_of(command: click.Command) -> list[str]:
    """Return every option that a command has, as it is written."""
    own = [name for parameter in command.params if isinstance(parameter, click.Option)
           for name in (*parameter.opts, *parameter.secondary_opts)]  # fmt: skip
    return [*own, "--help", "-h"]


def _usage(path: str, command: click.Command) -> str:
    """Return how to write a command with its required arguments."""
    words = [path]
    for parameter in command.params:
        if isinstance(parameter, click.Argument) and (parameter.required or parameter.nargs == 1):
            words.append(_shown(parameter) if parameter.required else f"[{_shown(parameter)}]")
        elif parameter.required:
            words.append(f"{_shown(parameter)} {parameter.metavar or parameter.type.name.upper()}")
    return f"write `{' '.join(words)}`"


def _shown(parameter: click.Parameter) -> str:
    if isinstance(parameter, click.Option):
        return next((name for name in parameter.opts if name.startswith("--")), parameter.opts[0])
    return parameter.metavar or str(parameter.name).upper()


def _ours(message: str) -> str:
    """click's sentence as we write: lower case, values in backticks, no period."""
    text = re.sub(r"'([^']*)'", r"`\1`", " ".join(message.split())).rstrip(".")
    text = re.sub(r"^(\S+) is not in the range (\S+?)<=x<=(\S+)$", r"`\1` is not from \2 to \3", text)
    text = text.replace("a valid integer range", "a whole number").replace("a valid integer", "a whole number")
    text = text.replace("a valid float range", "a number").replace("a valid float", "a number")
    return text[:1].lower() + text[1:]
