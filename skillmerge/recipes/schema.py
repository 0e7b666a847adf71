"""A recipe's document held against its tables: what is wrong with it in a recipe's words, and its JSON Schema.

The tables describe the text and nothing else; what it means is the business of `parse`.
"""

from __future__ import annotations

import json
import re
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from skillmerge.errors import RecipeError, did_you_mean
from skillmerge.recipes.foreign.documents import recognised
from skillmerge.recipes.foreign.near_misses import list_meant, ramp_meant, shape_meant, unknown_meant
from skillmerge.recipes.foreign.spellings import key_meant, number_meant, word_meant
from skillmerge.recipes.tables.gates import CommandTable, CosineTable, FigureTable, GatesTable, PerplexityTable
from skillmerge.recipes.tables.models import ModelTable, RenameTable, StackTable
from skillmerge.recipes.tables.recipe import (
    CopyTable,
    GatesFileTable,
    OutputTable,
    PushTable,
    RecipeTable,
)
from skillmerge.recipes.tables.schedules import RuleTable, ScheduleTable
from skillmerge.recipes.yamltext import Document, Path

_Whole = TypeVar("_Whole", RecipeTable, GatesFileTable)


def read_table(document: Document, table: type[_Whole]) -> _Whole:
    """Return the document as tables. Raises RecipeError for the first thing in it that such a file cannot have; the
    error knows the others."""
    if not isinstance(document.data, dict):
        what = "a recipe" if table is RecipeTable else "a file of gates"
        raise document.error(f"is not {what}: it must be a table of keys", document.place(()))
    if table is RecipeTable:
        refuse_foreign(document)
    try:
        return table.model_validate(document.data)
    except ValidationError as error:
        first, *others = _shape_errors(document, error)
        first.others = others
        raise first from error


def refuse_foreign(document: Document) -> None:
    """Raise RecipeError for a file of another tool, or another one of skillmerge."""
    if (foreign := recognised(document.data, document.name)) is not None:
        raise document.error(f"is {foreign[0]}", document.keys.get((foreign[1],)), foreign[2])


def schema() -> dict[str, Any]:
    """Return the JSON Schema of recipes, as draft 7, which is what editors understand."""
    made = RecipeTable.model_json_schema(by_alias=True)
    tables = made.pop("$defs")
    for table in tables.values():
        del table["description"]  # an editor would show it in place of what a key that has such a table says
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        **_for_editors({**made, "definitions": tables}),
    }


def schema_text() -> str:
    """Return the JSON Schema of recipes as the text of a file."""
    return json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"


def _for_editors(node: Any) -> Any:
    """Return the schema in draft 7, with Markdown for editors, and without what they would show or insert to no use:
    titles made from keys, and defaults that are nothing."""
    if isinstance(node, list):
        return [_for_editors(item) for item in node]
    if not isinstance(node, dict):
        return node
    kept: dict[str, Any] = {}
    for key, value in node.items():
        nothing = key == "default" and (value is None or isinstance(value, dict | list))
        if key in ("properties", "definitions"):  # their keys are names
            kept[key] = {name: _for_editors(each) for name, each in value.items()}
        elif not nothing and key not in ("discriminator", "title"):
            kept[key] = value if key == "examples" else _for_editors(value)
    if "$ref" in kept:
        kept["$ref"] = kept["$ref"].replace("#/$defs/", "#/definitions/")
        if len(kept) > 1:  # draft 7 ignores what is beside a reference
            kept["allOf"] = [{"$ref": kept.pop("$ref")}]
    if "`" in kept.get("description", ""):
        kept["markdownDescription"] = kept["description"]
    return kept


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
    """Return the mistakes in the order of the text, those of missing keys last, in a recipe's words instead of
    pydantic's."""
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
                f"format version {value!r} is unknown to this version of skillmerge",
                "write `skillmerge: 1`",
            )
        expected = detail["ctx"]["expected"].replace("'", "`")
        options = re.findall(r"`([^`]+)`", expected)
        key = next((part for part in reversed(path) if isinstance(part, str)), "")
        fix = word_meant(key, str(value), options) or did_you_mean(str(value), options)
        return f"{where} must be {expected}, not {value!r}", fix
    if kind == "finite_number":
        return f"{where} must be a finite number, not {value}", "write a number, such as 1"
    if kind == "too_short" and last == "ramp":
        return (
            "`ramp` must be two numbers or more, from the first to the last layer selected",
            "write ramp: [0.5, 1.0]",
        )
    if kind == "too_long":
        return f"{where} has {detail['ctx']['actual_length']} entries, and may have {detail['ctx']['max_length']}", None
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
    """Return what to write where a number is wanted."""
    name = str(path[-1]) if path else ""
    if isinstance(value, list) and path[:1] == ("coefficients",) and len(path) == 2:
        return list_meant(name, value)
    if isinstance(value, list) and name == "value":
        return ramp_meant(value)
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
        inner: dict[int | str, type[BaseModel]] = {"rename": RenameTable, "stack": StackTable}
        table = next((inner[part] for part in path[2:] if part in inner), ModelTable)
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
