"""The recipe: YAML (format version 1) -> a frozen `Recipe` that knows where in the text each part stands.

Its shape is checked by `schema`, what can be known from the text alone here, what needs a model's tensors by
`planning`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from skillmerge import yamltext
from skillmerge.checkpoints.location import SCHEME, Location, parse_location
from skillmerge.coefficients import LayerRange, Rule, Schedule, parse_layers
from skillmerge.criteria import Gate, gates_of
from skillmerge.errors import InputError, Mistakes, RecipeError, UsageError, did_you_mean, some
from skillmerge.expression import ExpressionError, Node, names_in, normalise_name, parse
from skillmerge.schema import (
    GatesFileTable,
    GatesTable,
    ModelTable,
    PushTable,
    RecipeTable,
    RuleTable,
    ScheduleTable,
    read_table,
)
from skillmerge.tensors import parse_size
from skillmerge.yamltext import Document, Path, Place

SAVED_PLAN = '{\n "ok":'
"""How a plan that was saved begins, and no recipe."""


@dataclass(frozen=True, slots=True)
class CopyRule:
    tensors: tuple[str, ...]
    model: str


@dataclass(frozen=True, slots=True)
class Push:
    """Where on the Hub a model goes. revision: a branch, or None. pull_request: None leaves it to what is there."""

    repository: str
    private: bool | None = None
    revision: str | None = None
    pull_request: bool | None = None
    message: str | None = None
    tags: tuple[str, ...] = ()
    new_version: str | None = None


@dataclass(frozen=True, slots=True)
class Output:
    kind: str
    compression: str
    keep: float | None
    """Of a skill: the share of each tensor's elements that stays."""
    path: FilePath | None
    like: str | None
    dtype: str
    rounding: str
    seed: int
    shard_size: int | None
    """Bytes per shard, or None for the donor's layout."""
    license: str | None
    card: FilePath | None
    push: Push | None


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe whose text makes sense by itself. `models` maps names to URIs as they are written."""

    document: Document
    folder: FilePath
    models: Mapping[str, str]
    skills: frozenset[str]
    """Those of the models that are stored skills."""
    patches: Mapping[str, str]
    """Those of the models that are sparse patches, and the models that they are for."""
    coefficients: Mapping[str, Schedule]
    expression: Node
    copy: tuple[CopyRule, ...]
    ignore: tuple[str, ...]
    output: Output
    gates: tuple[Gate, ...]
    overrides: Mapping[str, float]
    """Coefficients that were set from outside, in place of the recipe's."""
    rules_overridden: Mapping[str, int]
    """How many rules of the recipe each of them stands in for."""

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.document.text.encode()).hexdigest()

    def used_models(self) -> list[str]:
        """The models that the output depends on, in the order of the recipe."""
        used = {name.name for name in names_in(self.expression) if name.is_model}
        used |= {rule.model for rule in self.copy} | ({self.output.like} if self.output.like else set())
        used |= {onto for name, onto in self.patches.items() if name in used}
        return [name for name in self.models if name in used]

    def error(self, path: Path, message: str, fix: str | None = None) -> RecipeError:
        """An error about the part of the recipe at `path`."""
        return self.document.error(message, self.document.place(path), fix)

    def expression_error(self, error: ExpressionError) -> RecipeError:
        return _expression_error(self.document, error)

    def model_place(self, name: str) -> FilePath | Location:
        """Where the model `name` lies, on this disk or on the Hub. Raises RecipeError for other places."""
        uri = self.models[name]
        if uri.startswith(SCHEME):
            try:
                return parse_location(uri)
            except ValueError as error:
                raise self.error(("models", name), str(error)) from error
        if "://" in uri:
            raise self.error(("models", name), f"`{uri.split('://')[0]}://` is not a place that skillmerge reads")
        return _local_path(self.document, ("models", name), self.folder, uri)


def load(path: str | os.PathLike[str], overrides: Mapping[str, float] | None = None) -> Recipe:
    """Read and check the recipe at `path`; `overrides` (from --set) replace coefficients by numbers.

    Raises RecipeError for whatever is wrong with the text, UsageError where there is no such recipe.
    """
    path = FilePath(path)
    text = _text_of(path)
    if text.startswith(SAVED_PLAN):
        raise UsageError(
            f"{path} is a saved plan, not a recipe", fix="`skillmerge apply` takes it; elsewhere name the recipe"
        )
    return parse_recipe(text, str(path), path.parent, overrides or {})


def load_gates(path: str | os.PathLike[str]) -> tuple[Gate, ...]:
    """The gates in a file of their own, or of a recipe. Raises RecipeError, UsageError."""
    path = FilePath(path)
    document = yamltext.read(_text_of(path), str(path))
    if isinstance(document.data, dict) and "skillmerge" in document.data:
        return parse_recipe(document.text, str(path), path.parent).gates
    return gates_of(read_table(document, GatesFileTable).gates, document, path.parent)


def _text_of(path: FilePath) -> str:
    """What a person wrote, within bounds."""
    try:
        if path.is_dir():
            raise UsageError(
                f"{path} is a folder, not a recipe", fix="name a recipe file: skillmerge apply recipe.yaml"
            )
        if path.exists() and not path.is_file():
            raise UsageError(f"{path} is not a file", fix="save the recipe as a file and name that")
        if path.stat().st_size > yamltext.MAX_BYTES:
            raise RecipeError(f"{path}: is larger than {yamltext.MAX_BYTES // 1024} KiB, which no recipe needs")
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist", fix="`skillmerge init` writes a recipe to start from") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def parse_recipe(text: str, name: str, folder: FilePath, overrides: Mapping[str, float] | None = None) -> Recipe:
    """The recipe in `text`; `name` is its file in messages, `folder` what relative paths start from."""
    document = yamltext.read(text, name)
    table = read_table(document, RecipeTable)
    models, coefficients = _names(document, table)
    mistakes = Mistakes()
    schedules = {
        normalise_name(written): _schedule(document, ("coefficients", written), table.coefficients[written], mistakes)
        for written in table.coefficients
    }
    overridden = {}
    for key, value in (overrides or {}).items():
        key = normalise_name(key)
        if key not in schedules:
            near = did_you_mean(key, list(schedules)) or f"this recipe has: {', '.join(schedules) or 'none'}"
            raise UsageError(f"--set {key}: the recipe has no such coefficient", fix=near)
        if isinstance(value, bool | str) or not math.isfinite(value):
            raise UsageError(f"--set {key}: {value} is not a finite number")
        overridden[key] = len(schedules[key].rules)
        schedules[key] = Schedule(float(value))
    with mistakes:
        try:
            expression = parse(table.merge, list(models), coefficients)
        except ExpressionError as error:
            raise _expression_error(document, error) from error
    skills = frozenset(
        normalise_name(name) for name, entry in table.models.items() if isinstance(entry, ModelTable) and entry.skill
    )
    patches = {
        normalise_name(name): normalise_name(entry.onto)
        for name, entry in table.models.items()
        if isinstance(entry, ModelTable) and entry.patch and entry.onto
    }
    _check_model_names(document, table, list(models), skills, patches, mistakes)
    with mistakes:
        _check_kind(document, table)
    with mistakes:
        shard_size = _shard_size(document, table.output.shard_size)
    with mistakes:
        gates = _gates(document, table, folder, list(models), skills | set(patches))
    mistakes.refuse()
    like = table.output.like
    return Recipe(
        document=document,
        folder=folder,
        models=models,
        skills=skills,
        patches=patches,
        coefficients=schedules,
        expression=expression,
        copy=tuple(CopyRule(_as_tuple(rule.tensors), normalise_name(rule.from_)) for rule in table.copy_),
        ignore=tuple(table.ignore),
        output=Output(
            kind=table.output.kind,
            compression=table.output.compression,
            keep=table.output.keep,
            path=_local_path(document, ("output", "path"), folder, table.output.path) if table.output.path else None,
            like=normalise_name(like) if like else None,
            dtype=table.output.dtype,
            rounding=table.output.rounding,
            seed=table.output.seed,
            shard_size=shard_size,
            license=table.output.license,
            card=_local_path(document, ("output", "card"), folder, table.output.card) if table.output.card else None,
            push=_push(table.output.push) if table.output.push else None,
        ),
        gates=gates,
        overrides={normalise_name(key): float(value) for key, value in (overrides or {}).items()},
        rules_overridden=overridden,
    )


def recipe_of(models: Mapping[str, Any], merge: str, output: Mapping[str, Any], name: str, **keys: Any) -> Recipe:
    """A recipe of a verb that takes its models from the command line; `name` is what it is called in messages."""
    document = {"skillmerge": 1, "models": dict(models), "merge": merge, "output": dict(output), **keys}
    return parse_recipe(json.dumps(document, indent=1, ensure_ascii=False) + "\n", name, FilePath.cwd())


def unused_names(recipe: Recipe) -> list[str]:
    """Models and coefficients that stand in the recipe and do nothing: not wrong, but worth a word."""
    named = {name.name for name in names_in(recipe.expression)} | set(recipe.used_models())
    return [name for name in (*recipe.models, *recipe.coefficients) if name not in named]


def _gates(
    document: Document, table: RecipeTable, folder: FilePath, models: list[str], unlike: AbstractSet[str]
) -> tuple[Gate, ...]:
    """The recipe's gates. unlike: those of the models that have no folder of their own to load."""
    given = table.gates
    if given is None and "gates" in table.model_fields_set:
        given = GatesTable()  # every line of it is a comment
    gates = gates_of(given, document, folder)
    place = document.place(("gates",))
    if gates and table.output.kind == "skill":
        raise document.error("a skill has no `gates`", place, "they are for the models that it is put into")
    for gate in gates:
        if gate.kind == "perplexity" and gate.model is not None and gate.model not in set(models) - unlike:
            known = [name for name in models if name not in unlike]
            place = document.place(("gates", "perplexity", "of"))
            raise document.error(
                f"`{gate.model}` is not a whole model of this recipe", place, f"there are: {some(known)}"
            )
    return gates


def _check_kind(document: Document, table: RecipeTable) -> None:
    """What only a model can have, and only a skill."""
    if table.output.kind == "model" and table.output.compression != "none":
        raise document.error(
            "only a skill can be compressed", document.place(("output", "compression")), "models are read as they are"
        )
    if table.output.kind == "model" and table.output.keep is not None:
        raise document.error("only a skill can be pruned", document.place(("output", "keep")), "extract it with --keep")
    if table.output.kind == "skill":
        for path, given in ((("copy",), table.copy_), (("output", "rounding"), table.output.rounding != "nearest")):
            if given:
                raise document.error(f"a skill has no `{path[-1]}`", document.place(path), "leave it out")


def _names(document: Document, table: RecipeTable) -> tuple[dict[str, str], list[str]]:
    """Models and coefficients by normalised name; one name means one thing."""
    models: dict[str, str] = {}
    coefficients: list[str] = []
    for section, written in [
        *(("models", written) for written in table.models),
        *(("coefficients", written) for written in table.coefficients),
    ]:
        name = normalise_name(written)
        if not name.isidentifier():
            raise document.error(
                f"`{written}` cannot be used as a name",
                document.keys[(section, written)],
                "use letters, digits, _",
            )
        if name in models or name in coefficients:
            raise document.error(f"`{written}` already names something else", document.keys[(section, written)])
        if section == "models":
            entry = table.models[written]
            if isinstance(entry, ModelTable):
                given = [value for value in (entry.path, entry.skill, entry.patch) if value is not None]
                place = document.place((section, written))
                if len(given) != 1:
                    what = "more than one" if given else "none"
                    raise document.error(f"`{written}` has {what} of `path`, `skill`, `patch`", place, "give one")
                if (entry.patch is None) != (entry.onto is None):
                    fix = "write {patch: …, onto: …}, the latter a model of this recipe"
                    raise document.error("`patch` and `onto` go together", place, fix)
                entry = given[0]
            models[name] = entry
        else:
            coefficients.append(name)
    return models, coefficients


def _schedule(document: Document, path: Path, entry: float | ScheduleTable, mistakes: Mistakes) -> Schedule:
    if not isinstance(entry, ScheduleTable):
        return Schedule(float(entry))
    rules: list[Rule] = []
    for index, rule in enumerate(entry.rules):
        with mistakes:
            rules.append(_rule(document, (*path, "rules", index), rule))
    return Schedule(float(entry.default), tuple(rules))


def _rule(document: Document, path: Path, table: RuleTable) -> Rule:
    place = document.place(path)
    if (table.value is None) == (table.ramp is None):
        what = "has both `value` and `ramp`" if table.value is not None else "has neither `value` nor `ramp`"
        raise document.error(f"this rule {what}", place, "give exactly one of the two")
    if table.layers is None and table.tensors is None and table.modules is None:
        raise document.error("this rule selects nothing", place, "add layers, tensors or modules, or use `default`")
    layers: list[LayerRange] = []
    for part in table.layers if isinstance(table.layers, list) else [table.layers]:
        try:
            layers += parse_layers(str(part)) if part is not None else ()
        except ValueError as error:
            raise document.error(str(error), document.place((*path, "layers"))) from error
    return Rule(
        layers=tuple(layers),
        tensors=_as_tuple(table.tensors),
        modules=_as_tuple(table.modules),
        value=float(table.value or 0.0),
        ramp=(float(table.ramp[0]), float(table.ramp[1])) if table.ramp else None,
    )


def _as_tuple(value: str | Sequence[str] | None) -> tuple[str, ...]:
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)


def _shard_size(document: Document, value: str | int) -> int | None:
    if value == "same":
        return None
    try:
        return parse_size(str(value))
    except ValueError as error:
        raise document.error(str(error), document.place(("output", "shard_size")), "or `same`") from error


def _push(table: PushTable) -> Push:
    return Push(
        table.repo,
        table.private,
        table.revision,
        table.pull_request,
        table.message,
        tuple(table.tags),
        table.new_version,
    )


def _local_path(document: Document, path: Path, folder: FilePath, written: str) -> FilePath:
    try:
        return folder / FilePath(written).expanduser()
    except RuntimeError as error:
        raise document.error(f"`{written}` starts at a home that does not exist", document.place(path)) from error


def _check_model_names(
    document: Document,
    table: RecipeTable,
    models: list[str],
    skills: frozenset[str],
    patches: Mapping[str, str],
    mistakes: Mistakes,
) -> None:
    uses: list[tuple[Path, str | None]] = [
        (("copy", index, "from"), rule.from_) for index, rule in enumerate(table.copy_)
    ]
    uses += [
        (("models", name, "onto"), entry.onto)
        for name, entry in table.models.items()
        if isinstance(entry, ModelTable) and entry.onto
    ]
    for path, name in [*uses, (("output", "like"), table.output.like)]:
        with mistakes:
            if name is not None and normalise_name(name) not in models:
                fix = did_you_mean(name, models) or f"models of this recipe: {', '.join(models)}"
                raise document.error(f"`{name}` is not a model of this recipe", document.place(path), fix)
            whole = path[0] in ("copy", "models") or table.output.kind == "model"
            if name is not None and normalise_name(name) in skills and whole:
                raise document.error(f"`{name}` is a skill, which has no tensors to take", document.place(path))
            if path[0] == "models" and name is not None and normalise_name(name) in patches:
                raise document.error(f"`{name}` is a patch itself", document.place(path), "name a whole model")


def _expression_error(document: Document, error: ExpressionError) -> RecipeError:
    """Point into the expression where it stands on one line as it is; else at its start."""
    place = document.place(("merge",))
    if place is not None:
        line = document.line(place.line)
        written = str(document.data["merge"])
        offset = line.find(written, place.column)
        if offset >= 0:
            place = Place(place.line, offset + error.position, error.width)
    return document.error(f"the expression {error}", place, error.fix)
