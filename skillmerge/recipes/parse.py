"""The recipe: YAML (format version 1) -> a frozen `Recipe` that knows where in the text each part is.

`schema` checks its shape, this module what can be known from the text alone, `planner` what needs a model's tensors.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path as FilePath
from typing import Any

from skillmerge.checkpoints.schemes import output_place
from skillmerge.errors import NEAR, Mistakes, RecipeError, UsageError, did_you_mean, some
from skillmerge.recipes import yamltext
from skillmerge.recipes.entries import Entry, check_models, names_of
from skillmerge.recipes.formula.arguments import name_number
from skillmerge.recipes.formula.parser import parse
from skillmerge.recipes.formula.tree import ExpressionError, Node, normalise_name
from skillmerge.recipes.gate_table import Gate, gates_of
from skillmerge.recipes.recipe import CopyRule, Output, Push, Recipe, add_coefficient, expression_error, local_path
from skillmerge.recipes.schedules import Numbers, Rule, Schedule, parse_numbers
from skillmerge.recipes.schema import read_table, refuse_foreign
from skillmerge.recipes.source import SAVED_PLAN, RecipeSource, name_of, text_of
from skillmerge.recipes.tables.gates import GatesTable
from skillmerge.recipes.tables.recipe import (
    GatesFileTable,
    OutputTable,
    PushTable,
    RecipeTable,
)
from skillmerge.recipes.tables.schedules import RuleTable, ScheduleTable
from skillmerge.recipes.yamltext import Document, Path
from skillmerge.remarks import ACCEPTABLE
from skillmerge.tensors import parse_size


def load(source: RecipeSource, overrides: Mapping[str, float] | None = None) -> Recipe:
    """Read and check a recipe; `overrides` (from --set) replace coefficients by numbers.

    Relative paths in a dict, and in what comes from standard input, start at the working folder.
    Raises RecipeError for whatever is wrong with the text, UsageError if there is no such recipe.
    """
    text = text_of(source)
    if isinstance(source, Mapping):
        return parse_recipe(text, name_of(source), FilePath(), overrides or {}, by_hand=False)
    path = FilePath(source)
    if text.startswith(SAVED_PLAN):
        raise UsageError(
            f"{path} is a saved plan, not a recipe", fix="pass it to `skillmerge apply`, or pass the recipe here"
        )
    return parse_recipe(text, str(path), path.parent, overrides or {})


def load_gates(path: str | os.PathLike[str]) -> tuple[Gate, ...]:
    """Return the gates in a file of their own, or of a recipe. Raises RecipeError, UsageError."""
    path = FilePath(path)
    document = yamltext.read(text_of(os.fspath(path)), str(path))
    if isinstance(document.data, dict) and "skillmerge" in document.data:
        return parse_recipe(document.text, str(path), path.parent).gates
    return gates_of(read_table(document, GatesFileTable).gates, document, path.parent)


def _read(text: str, name: str) -> Document:
    """Parse a recipe. Raises RecipeError; also for files of other tools that are several documents, or YAML 1.1."""
    try:
        return yamltext.read(text, name)
    except RecipeError:
        documents: list[Document] = []
        with suppress(RecipeError):
            documents = yamltext.read_old(text, name)
        for document in documents[:1]:
            refuse_foreign(document)
        raise


def parse_recipe(
    text: str, name: str, folder: FilePath, overrides: Mapping[str, float] | None = None, *, by_hand: bool = True
) -> Recipe:
    """Return the recipe in `text`; `name` is its file in messages, `folder` what relative paths start from.

    by_hand: whether a person wrote the text, so that messages show its lines.

    Raises RecipeError for the first mistake, which knows those of the other parts.
    """
    document = _read(text, name)
    document.by_hand = by_hand
    table = read_table(document, RecipeTable)
    models, coefficients = names_of(document, table)
    mistakes = Mistakes()
    schedules = _schedules(document, table, mistakes)
    with mistakes:
        expression = _expression(document, table.merge, list(models), coefficients)
    check_models(document, table, models, mistakes)
    with mistakes:
        _check_kind(document, table)
    with mistakes:
        shard_size = _shard_size(document, table.output.shard_size)
    with mistakes:
        _check_accept(document, table.accept)
    with mistakes:
        gates = _gates(document, table, folder, models)
    mistakes.refuse()
    numbers = _numbers(overrides or {}, schedules, expression)
    return Recipe(
        document=document,
        folder=folder,
        entries=models,
        coefficients={**schedules, **{key: Schedule(value) for key, value in numbers.items()}},
        expression=expression,
        copy=tuple(CopyRule(_as_tuple(rule.tensors), normalise_name(rule.from_)) for rule in table.copy_),
        ignore=tuple(table.ignore),
        accept=frozenset(table.accept),
        by_token=table.vocabulary == "by-token",
        tokens={token: normalise_name(it.from_) for token, it in table.tokens.items()},
        output=_output(document, table.output, folder, shard_size),
        gates=gates,
        overrides=numbers,
        rules_overridden={key: len(schedules[key].rules) for key in numbers},
    )


def recipe_of(models: Mapping[str, Any], merge: str, output: Mapping[str, Any], name: str, **keys: Any) -> Recipe:
    """Return a recipe of a verb that takes its models from the command line; `name` is what it is called in
    messages."""
    document = {"skillmerge": 1, "models": dict(models), "merge": merge, "output": dict(output), **keys}
    text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    return parse_recipe(text, name, FilePath.cwd(), by_hand=False)


def _check_accept(document: Document, names: Sequence[str]) -> None:
    for index, name in enumerate(names):
        if name not in ACCEPTABLE:
            near = did_you_mean(name, list(ACCEPTABLE)) or f"known names: {', '.join(ACCEPTABLE)}"
            raise document.error(
                f"`{name}` is not a difference that can be accepted", document.place(("accept", index)), near
            )


def _gates(document: Document, table: RecipeTable, folder: FilePath, models: Mapping[str, Entry]) -> tuple[Gate, ...]:
    """Return the recipe's gates."""
    given = table.gates
    if given is None and "gates" in table.model_fields_set:
        given = GatesTable()  # every line of it is a comment
    gates = gates_of(given, document, folder)
    place = document.place(("gates",))
    loadable = [name for name, entry in models.items() if entry.kind == "path"]  # the others have no folder to load
    if gates and table.output.kind != "model":
        kind = _KINDS[table.output.kind]
        raise document.error(f"{kind} has no `gates`", place, f"add them to recipes that use the {table.output.kind}")
    for gate in gates:
        if gate.kind == "perplexity" and gate.model is not None and gate.model not in loadable:
            place = document.place(("gates", "perplexity", "of"))
            raise document.error(
                f"`{gate.model}` is not a whole model of this recipe", place, f"there are: {some(loadable, NEAR)}"
            )
    return gates


_KINDS = {"skill": "a skill", "adapter": "an adapter"}


def _check_kind(document: Document, table: RecipeTable) -> None:
    """Check keys that only some kinds of output can have."""
    if table.output.kind != "skill" and table.output.compression != "none":
        raise document.error(
            "only a skill can be compressed", document.place(("output", "compression")), "models are read as they are"
        )
    if table.output.kind != "skill" and table.output.keep is not None:
        raise document.error(
            "only a skill can be pruned",
            document.place(("output", "keep")),
            "`skillmerge extract … --keep SHARE` prunes one",
        )
    if table.tokens and table.vocabulary != "by-token":
        raise document.error(
            "`tokens` takes rows by token", document.place(("tokens",)), "add to the recipe: vocabulary: by-token"
        )
    of_models = {
        ("copy",): bool(table.copy_),
        ("tokens",): bool(table.tokens),
        ("output", "rounding"): table.output.rounding != "nearest",
        ("output", "keep_dtype"): bool(table.output.keep_dtype),
    }
    of_skills = {
        ("vocabulary",): table.vocabulary == "by-token",
        ("output", "like"): table.output.like is not None,
        ("output", "shard_size"): table.output.shard_size != "same",
    }
    not_of = {"model": {}, "skill": of_models, "adapter": of_models | of_skills}
    for path, given in not_of[table.output.kind].items():
        if given:
            raise document.error(
                f"{_KINDS[table.output.kind]} has no `{path[-1]}`", document.place(path), "leave it out"
            )
    if table.output.kind == "adapter" and table.output.dtype not in ("same", "float32"):
        what = f"an adapter is written as float32, not {table.output.dtype}: so nothing of it is rounded away"
        raise document.error(what, document.place(("output", "dtype")), "leave it out")


def _schedules(document: Document, table: RecipeTable, mistakes: Mistakes) -> dict[str, Schedule]:
    return {
        normalise_name(written): _schedule(document, ("coefficients", written), entry, mistakes)
        for written, entry in table.coefficients.items()
    }


def _numbers(overrides: Mapping[str, float], schedules: Mapping[str, Schedule], expression: Node) -> dict[str, float]:
    """Return the numbers that replace schedules, by normalized name. Raises UsageError for what cannot replace one."""
    numbers = {}
    for written, value in overrides.items():
        name = normalise_name(written)
        if name not in schedules:
            known = f"this recipe has: {', '.join(schedules)}" if schedules else add_coefficient(name)
            near = did_you_mean(name, list(schedules)) or name_number(name, expression) or known
            raise UsageError(f"--set {name}: the recipe has no such coefficient", fix=near)
        if isinstance(value, bool | str) or not math.isfinite(value):
            raise UsageError(f"--set {name}: {value} is not a finite number")
        numbers[name] = float(value)
    return numbers


def _expression(document: Document, text: str, models: list[str], coefficients: list[str]) -> Node:
    try:
        return parse(text, models, coefficients)
    except ExpressionError as error:
        raise expression_error(document, error) from error


def _schedule(document: Document, path: Path, entry: float | ScheduleTable, mistakes: Mistakes) -> Schedule:
    if not isinstance(entry, ScheduleTable):
        return Schedule(float(entry))
    rules: list[Rule] = []
    for index, rule in enumerate(entry.rules):
        with mistakes:
            rules.append(_rule(document, (*path, "rules", index), rule))
    return Schedule(float(entry.default), tuple(rules))


_ALL_LAYERS = "for all layers, write `layers: 0-`"
_EVERYTHING = ("all", "every", "any", "*")


def _rule(document: Document, path: Path, table: RuleTable) -> Rule:
    place = document.place(path)
    if (table.value is None) == (table.ramp is None):
        what = "has both `value` and `ramp`" if table.value is not None else "has neither `value` nor `ramp`"
        raise document.error(f"this rule {what}", place, "write exactly one of them")
    if all(it is None for it in (table.layers, table.experts, table.tensors, table.modules)):
        fix = _ALL_LAYERS if table.ramp is not None else "add layers, experts, tensors or modules, or use `default`"
        raise document.error("this rule selects nothing", place, fix)
    return Rule(
        layers=_numbers_in(document, path, "layers", table.layers),
        experts=_numbers_in(document, path, "experts", table.experts),
        tensors=_as_tuple(table.tensors),
        modules=_as_tuple(table.modules),
        value=float(table.value or 0.0),
        ramp=tuple(map(float, table.ramp)) if table.ramp else None,
    )


def _numbers_in(
    document: Document, path: Path, key: str, given: str | int | list[str | int] | None
) -> tuple[Numbers, ...]:
    """Return what `layers` or `experts` of a rule name."""
    found: list[Numbers] = []
    for part in given if isinstance(given, list) else [given]:
        try:
            found += parse_numbers(str(part), key) if part is not None else ()
        except ValueError as error:
            what, _, fix = str(error).partition("; ")
            everything = _ALL_LAYERS.replace("layers", key)
            meant = everything if str(part).strip().lower() in _EVERYTHING else fix or None
            raise document.error(what, document.place((*path, key)), meant) from error
    return tuple(found)


def _as_tuple(value: str | Sequence[str] | None) -> tuple[str, ...]:
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)


def _shard_size(document: Document, value: str | int) -> int | None:
    if value == "same":
        return None
    try:
        return parse_size(str(value))
    except ValueError as error:
        raise document.error(str(error), document.place(("output", "shard_size")), "or `same`") from error


def _output(document: Document, table: OutputTable, folder: FilePath, shard_size: int | None) -> Output:
    try:
        bucket = output_place(table.path or "")
    except UsageError as error:
        raise document.error(error.message, document.place(("output", "path")), error.fix) from error
    return Output(
        kind=table.kind,
        compression=table.compression,
        keep=table.keep,
        path=local_path(document, ("output", "path"), folder, table.path) if table.path and bucket is None else None,
        bucket=bucket,
        like=normalise_name(table.like) if table.like else None,
        dtype=table.dtype,
        keep_dtype=tuple(table.keep_dtype),
        rounding=table.rounding,
        seed=table.seed,
        shard_size=shard_size,
        license=table.license,
        card=local_path(document, ("output", "card"), folder, table.card) if table.card else None,
        push=_push(table.push) if table.push else None,
    )


def _push(table: PushTable) -> Push:
    return Push(
        table.repo, table.private, table.revision, table.pull_request, table.message, tuple(table.tags),
        table.new_version,
    )  # fmt: skip
