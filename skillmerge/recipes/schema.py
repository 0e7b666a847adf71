"""The shape of a recipe's document: its tables and keys, what is wrong with one in a recipe's words, its JSON Schema.

The pydantic classes describe the text and nothing else; what it means is the business of `parse`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, FiniteFloat, Tag, ValidationError

from skillmerge.errors import RecipeError, did_you_mean
from skillmerge.recipes.foreign.documents import recognised
from skillmerge.recipes.foreign.near_misses import list_meant, shape_meant, unknown_meant
from skillmerge.recipes.foreign.spellings import key_meant, number_meant, word_meant
from skillmerge.recipes.yamltext import Document, Path
from skillmerge.remarks import ACCEPTABLE

# Unions are told apart by the YAML shape of the value, so that an error speaks of the member that was meant.
_PLAIN_OR_LIST = Discriminator(lambda value: "list" if isinstance(value, list) else "plain")
_PLAIN_OR_TABLE = Discriminator(lambda value: "table" if isinstance(value, dict) else "plain")

Kind = Literal["attention", "mlp", "norm", "embedding", "head", "router", "expert"]
Glob = Annotated[str, Field(min_length=1, max_length=1000)]
Globs = Annotated[
    Annotated[Glob, Tag("plain")] | Annotated[list[Glob], Field(min_length=1), Tag("list")], _PLAIN_OR_LIST
]
Kinds = Annotated[
    Annotated[Kind, Tag("plain")] | Annotated[list[Kind], Field(min_length=1), Tag("list")], _PLAIN_OR_LIST
]
Layers = Annotated[
    Annotated[str | int, Tag("plain")] | Annotated[list[str | int], Field(min_length=1), Tag("list")],
    _PLAIN_OR_LIST,
]


def _plain_version(value: object) -> object:
    """`true` and `1.0` equal 1 in Python, and are not it."""
    return value if type(value) in (int, str) else repr(value)


Runtime = Literal["transformers", "vllm"]
Runtimes = Annotated[
    Annotated[bool, Tag("plain")] | Annotated[list[Runtime], Field(min_length=1), Tag("list")], _PLAIN_OR_LIST
]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class RenameTable(_Table):
    from_: Annotated[str, Field(alias="from", max_length=1000, description="how names of its tensors begin")]
    to: Annotated[str, Field(max_length=1000, description="what stands there instead")]


class ModelTable(_Table):
    path: Annotated[
        str | None, Field(min_length=1, description="a folder, or hf://org/name[@revision][/subfolder]")
    ] = None
    skill: Annotated[str | None, Field(min_length=1, description="the same, of a skill that was stored")] = None
    patch: Annotated[str | None, Field(min_length=1, description="the same, of a sparse patch")] = None
    onto: Annotated[str | None, Field(min_length=1, description="the model that the patch is for")] = None
    rename: Annotated[
        list[RenameTable] | None,
        Field(min_length=1, description="other names for its tensors; the first rule that matches wins"),
    ] = None


class RuleTable(_Table):
    layers: Annotated[Layers | None, Field(description="blocks: 7, 0-3, 4- or a list")] = None
    tensors: Annotated[Globs | None, Field(description="globs over whole tensor names")] = None
    modules: Annotated[Kinds | None, Field(description="kinds of module, read from the name")] = None
    value: Annotated[FiniteFloat | None, Field(description="the coefficient of what the rule selects")] = None
    ramp: Annotated[
        list[FiniteFloat] | None,
        Field(min_length=2, max_length=2, description="linear over the blocks selected, both ends included"),
    ] = None


class ScheduleTable(_Table):
    default: Annotated[FiniteFloat, Field(description="where no rule matches")] = 1.0
    rules: Annotated[list[RuleTable], Field(description="the last rule that matches a tensor wins")] = []


class CopyTable(_Table):
    tensors: Globs
    from_: Annotated[str, Field(alias="from", description="the model to take the tensors from, as they are")]


class PushTable(_Table):
    repo: Annotated[str, Field(pattern=r"^[^/\s]+/[^/\s]+$", description="org/name on the Hub")]
    private: Annotated[bool | None, Field(description="of a repository that is made")] = None
    revision: Annotated[str | None, Field(min_length=1, description="the branch to commit to")] = None
    pull_request: Annotated[
        bool | None, Field(description="by default only where the repository has a model already")
    ] = None
    message: Annotated[str | None, Field(min_length=1, description="of the commit")] = None
    tags: Annotated[list[str], Field(description="of the model card")] = []
    new_version: Annotated[str | None, Field(description="the model that supersedes this one")] = None


class OutputTable(_Table):
    keep: Annotated[
        FiniteFloat | None,
        Field(gt=0, le=1, description="of a skill: the top share of each tensor's elements, its norm restored"),
    ] = None
    compression: Annotated[Literal["none", "zstd"], Field(description="of a skill's files")] = "none"
    kind: Annotated[Literal["model", "skill"], Field(description="a model, or a difference to store")] = "model"
    path: Annotated[
        str | None, Field(min_length=1, description="the folder to write, relative to the recipe's own")
    ] = None
    like: Annotated[str | None, Field(description="the donor of names, layout, dtypes and side files")] = None
    dtype: Annotated[Literal["same", "bfloat16", "float16", "float32"], Field(description="of the weights written")] = (
        "same"
    )
    keep_dtype: Annotated[
        list[Glob], Field(description="globs over tensors that keep the donor's dtype all the same")
    ] = []
    rounding: Literal["nearest", "stochastic"] = "nearest"
    seed: Annotated[int, Field(ge=0, lt=1 << 63, description="of stochastic rounding")] = 0
    shard_size: Annotated[str | int, Field(description="same (the donor's layout), or a size such as 5GB")] = "same"
    license: Annotated[str | None, Field(min_length=1, description="of the merge, for its model card")] = None
    card: Annotated[str | None, Field(min_length=1, description="a model card written by hand")] = None
    push: Annotated[PushTable | None, Field(description="where on the Hub to publish")] = None


class RangeTable(_Table):
    min: Annotated[FiniteFloat | None, Field(description="the least that it may be")] = None
    max: Annotated[FiniteFloat | None, Field(description="the most that it may be")] = None
    modules: Annotated[Kinds | None, Field(description="look at each of these kinds of module by itself")] = None


class FigureTable(RangeTable):
    by: Annotated[
        Literal["block"] | None,
        Field(description="block: look at each layer and kind of module by itself; the worst one counts"),
    ] = None


class CosineTable(RangeTable):
    base: Annotated[
        str | None,
        Field(min_length=1, description="what the target was trained from: a model's name, or a place"),
    ] = None


class PerplexityTable(_Table):
    text: Annotated[str, Field(min_length=1, description="the file with the text")]
    max: Annotated[FiniteFloat | None, Field(gt=0, description="the most that it may be")] = None
    max_ratio: Annotated[FiniteFloat | None, Field(gt=0, description="the most of what model `of` has")] = None
    of: Annotated[str | None, Field(description="a model of the recipe; by default the donor")] = None


class CommandTable(_Table):
    run: Annotated[str, Field(min_length=1, description="prints a number; {} stands for the model's folder")]
    name: Annotated[str | None, Field(min_length=1, description="what to call it")] = None
    score: Annotated[str | None, Field(min_length=1, description="which one, where it prints a JSON object")] = None
    min: FiniteFloat | None = None
    max: FiniteFloat | None = None
    timeout: Annotated[FiniteFloat, Field(gt=0, description="seconds")] = 3600.0


class GatesTable(_Table):
    changed: Annotated[FigureTable | None, Field(description="share of elements; by default more than 0")] = None
    vanished: Annotated[FigureTable | None, Field(description="share of the update that rounding took")] = None
    realised: Annotated[FigureTable | None, Field(description="what rounding let through, of what was asked")] = None
    realised_lambda: Annotated[FigureTable | None, Field(description="the coefficient that came out")] = None
    norm_ratio: Annotated[FigureTable | None, Field(description="|y - t| / |t|, of each kind of module")] = None
    cosine_z: Annotated[CosineTable | None, Field(description="between the update and the target's own")] = None
    finite: Annotated[bool, Field(description="no NaN and no Inf in any weight")] = False
    loads: Annotated[
        Runtimes, Field(description="it loads in these runtimes, with its tokenizer; true is transformers")
    ] = False
    finite_logits: Annotated[bool, Field(description="what it computes from a short input is finite")] = False
    perplexity: Annotated[PerplexityTable | None, Field(description="of a text, in itself or beside a parent's")] = None
    commands: Annotated[list[CommandTable], Field(description="whatever prints a number")] = []


ModelEntry = Annotated[
    Annotated[str, Field(min_length=1), Tag("plain")] | Annotated[ModelTable, Tag("table")], _PLAIN_OR_TABLE
]
CoefficientEntry = Annotated[
    Annotated[FiniteFloat, Tag("plain")] | Annotated[ScheduleTable, Tag("table")], _PLAIN_OR_TABLE
]


class RecipeTable(_Table):
    """A skillmerge recipe, format version 1."""

    skillmerge: Annotated[Literal[1], BeforeValidator(_plain_version), Field(description="format version")]
    models: Annotated[dict[str, ModelEntry], Field(min_length=1, description="name -> where it is")]
    coefficients: Annotated[dict[str, CoefficientEntry], Field(description="name -> number or schedule")] = {}
    merge: Annotated[str, Field(min_length=1, description="the arithmetic: target + lam * (rl - sft)")]
    copy_: Annotated[list[CopyTable], Field(alias="copy")] = []
    ignore: Annotated[list[Glob], Field(description="tensors of other models that the output does without")] = []
    accept: Annotated[
        list[Annotated[str, Field(json_schema_extra={"enum": list(ACCEPTABLE)})]],
        Field(description="differences between the models that a person has looked at"),
    ] = []
    output: OutputTable = OutputTable()
    gates: Annotated[GatesTable | None, Field(description="what must hold before the output is published")] = None


class GatesFileTable(_Table):
    """Gates in a file of their own."""

    gates: GatesTable


_Whole = TypeVar("_Whole", RecipeTable, GatesFileTable)


def read_table(document: Document, table: type[_Whole]) -> _Whole:
    """The document as tables. Raises RecipeError for the first thing in it that such a file cannot have; the
    error knows the others."""
    if not isinstance(document.data, dict):
        what = "a recipe" if table is RecipeTable else "a file of gates"
        raise document.error(f"is not {what}: it must be a table of keys", document.place(()))
    if table is RecipeTable and (foreign := recognised(document.data)) is not None:
        raise document.error(f"is {foreign[0]}", document.keys.get((foreign[1],)), foreign[2])
    try:
        return table.model_validate(document.data)
    except ValidationError as error:
        first, *others = _shape_errors(document, error)
        first.others = others
        raise first from error


def schema() -> dict[str, Any]:
    """Return the JSON Schema of recipes, as draft 7, which is what editors understand."""
    made = RecipeTable.model_json_schema(by_alias=True)
    text_moves = {"$defs": "definitions"}

    def rewrite(node: Any) -> Any:
        if isinstance(node, dict):
            return {text_moves.get(key, key): rewrite(value) for key, value in node.items() if key != "discriminator"}
        if isinstance(node, list):
            return [rewrite(item) for item in node]
        return node.replace("#/$defs/", "#/definitions/") if isinstance(node, str) else node

    return {"$schema": "http://json-schema.org/draft-07/schema#", **rewrite(made)}


_EXPECTED = {
    "float_type": "a number",
    "int_type": "a whole number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
}


def _shape_errors(document: Document, error: ValidationError) -> list[RecipeError]:
    """The mistakes in the order of the text, those of missing keys last, in a recipe's words instead of pydantic's."""
    details = error.errors(include_url=False)
    unknown = [str(detail["loc"][-1]) for detail in details if detail["type"] == "extra_forbidden"]
    found: list[tuple[tuple[bool, int, int], RecipeError]] = []
    foreign = None
    for detail in details:
        path, last = _data_path(document.data, detail["loc"]), str(detail["loc"][-1])
        missing = detail["type"] == "missing"
        if missing and did_you_mean(last, unknown):
            continue  # the misspelling is the mistake
        key_place = document.keys.get(path) if detail["type"] == "extra_forbidden" else None
        place = key_place or document.place(path)
        message, fix = _shape_message(document.data, path, detail)
        mistake = document.error(message, place, fix)
        found.append(((missing, place.line if place else 0, place.column if place else 0), mistake))
        if detail["loc"] == ("skillmerge",) and missing:
            foreign = mistake
    mistakes = [mistake for _, mistake in sorted(found, key=lambda item: item[0])]
    # What is no recipe at all is wrong everywhere: one example of that is enough.
    return list(dict.fromkeys([mistakes[0], foreign])) if foreign else mistakes


def _data_path(data: Any, location: tuple[int | str, ...]) -> Path:
    """pydantic's location without the names it gives to the members of unions."""
    path: list[int | str] = []
    for part in location:
        inside = (isinstance(data, dict) and part in data) or (isinstance(data, list) and isinstance(part, int))
        if inside:
            path.append(part)
            data = data[part]
    return tuple(path)


def _shape_message(data: Any, path: Path, detail: Any) -> tuple[str, str | None]:
    kind, value, last = detail["type"], detail["input"], detail["loc"][-1]
    where = f"`{path[-1]}`" if path and isinstance(path[-1], str) else "this"
    if kind == "extra_forbidden":
        known = _known_keys(path[:-1])
        near = unknown_meant(data, path) or did_you_mean(str(last), known) or key_meant(str(last), known)
        return f"unknown key `{last}`", near or f"known keys here: {', '.join(known)}"
    if kind == "missing":
        here = f" in {where}" if path else ""
        fix = "start the recipe with `skillmerge: 1`" if last == "skillmerge" else shape_meant((str(last),), None)
        return f"missing key `{last}`{here}", fix
    if kind == "literal_error":
        if path == ("skillmerge",):
            return (
                f"format version {value!r} is not known to this version of skillmerge",
                "write `skillmerge: 1`",
            )
        expected = detail["ctx"]["expected"].replace("'", "`")
        options = re.findall(r"`([^`]+)`", expected)
        key = next((part for part in reversed(path) if isinstance(part, str)), "")
        fix = word_meant(key, str(value), options) or did_you_mean(str(value), options)
        return f"{where} must be {expected}, not {value!r}", fix
    if kind == "finite_number":
        return f"{where} must be a finite number, not {value}", "write a number, such as 1"
    if kind in ("too_short", "too_long") and last == "ramp":
        return (
            "`ramp` must be two numbers, at the first and the last layer selected",
            "write ramp: [0.5, 1.0]",
        )
    if kind in _EXPECTED:
        fix = _number_advice(path, value) if kind == "float_type" else shape_meant(path, value)
        return f"{where} must be {_EXPECTED[kind]}, not {_describe(value)}", fix
    if kind in ("string_too_short", "too_short"):
        return f"{where} is empty", "write target + lam * (rl - sft)" if path == ("merge",) else shape_meant(
            path, value
        )
    if detail["msg"].startswith("Input should be "):
        what = detail["msg"].removeprefix("Input should be ")
        return f"{where} must be {what}, not {value!r}", shape_meant(path, value)
    said = f" must be org/name, not {value!r}" if kind == "string_pattern_mismatch" else f": {detail['msg'].lower()}"
    return where + said, shape_meant(path, value)


def _number_advice(path: Path, value: Any) -> str | None:
    """What to write where a number is wanted."""
    name = str(path[-1]) if path else ""
    if isinstance(value, list) and path[:1] == ("coefficients",) and len(path) == 2:
        return list_meant(name, value)
    if isinstance(value, str):
        if _is_number(value) and "_" not in value:
            return f"remove the quotes: {value}"
        return number_meant(value) or "coefficients are numbers or schedules"
    if value is None and name.isdecimal():
        return "write decimals with a point, such as 0.5"
    return "write a number, such as 1" if path[:1] == ("coefficients",) and not isinstance(value, dict) else None


_GATES: dict[int | str, type[BaseModel]] = {
    "cosine_z": CosineTable,
    "perplexity": PerplexityTable,
    "commands": CommandTable,
}


def _known_keys(path: Path) -> list[str]:
    table: type[BaseModel] = RecipeTable
    if path[:1] == ("models",):
        table = RenameTable if "rename" in path[2:] else ModelTable
    elif path[:1] == ("coefficients",):
        table = RuleTable if "rules" in path[2:] else ScheduleTable
    elif path[:1] == ("copy",):
        table = CopyTable
    elif path[:2] == ("output", "push"):
        table = PushTable
    elif path[:1] == ("output",):
        table = OutputTable
    elif path[:1] == ("gates",):
        table = _GATES.get(path[1], FigureTable) if path[1:] else GatesTable
    return [field.alias or name for name, field in table.model_fields.items()]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _describe(value: Any) -> str:
    if value is None:
        return "empty"
    if isinstance(value, dict | list):
        return "a table" if isinstance(value, dict) else "a list"
    return f"the text {value!r}" if isinstance(value, str) else repr(value).lower()
