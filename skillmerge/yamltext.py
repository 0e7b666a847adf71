"""YAML text -> plain data, and where in the text each piece of it stands.

YAML 1.2 core rules (`1e-3` is a number, `no` a string), without tags or merge keys, and with bounds on size,
nesting and aliases, so that no document can hurt. Knows nothing about recipes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from skillmerge.errors import RecipeError

MAX_BYTES = 256 * 1024
MAX_NESTING = 20
MAX_NODES = 20_000

Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """Where something stands: line and column counted from 0, and how many characters it is wide."""

    line: int
    column: int
    width: int = 1


@dataclass(slots=True)
class Document:
    """A parsed document: `data` is dicts, lists, strings, numbers, booleans and None."""

    name: str
    text: str
    data: Any = None
    keys: dict[Path, Place] = field(default_factory=dict)
    values: dict[Path, Place] = field(default_factory=dict)

    def error(self, message: str, place: Place | None, fix: str | None = None) -> RecipeError:
        """An error that shows the file, the position, the line itself and a marker under it."""
        if place is None:
            return RecipeError(f"{self.name}: {message}", fix=fix)
        lines = self.text.splitlines() or [""]
        line = lines[min(place.line, len(lines) - 1)].rstrip()
        cut = max(0, place.column - 60) if len(line) > 160 else 0
        gutter = f"{place.line + 1:>5} | "
        marker = " " * (len(gutter) - 2) + "| " + _blank(line[cut : place.column])
        width = max(1, min(place.width, 100))
        return RecipeError(
            f"{self.name}:{place.line + 1}:{place.column + 1}: {message}\n"
            f"{gutter}{line[cut : cut + 160]}\n{marker}{'^' * width}",
            fix=fix,
        )

    def place(self, path: Path) -> Place | None:
        """Where the value at `path` stands, or the nearest thing around it."""
        while path and path not in self.values:
            path = path[:-1]
        return self.values.get(path)


def read(text: str, name: str) -> Document:
    """Parse one YAML document. Raises RecipeError with the position of whatever is wrong."""
    document = Document(name, text)
    if len(text.encode(errors="replace")) > MAX_BYTES:
        raise document.error(f"is larger than {MAX_BYTES // 1024} KiB, which no recipe needs", None)
    yaml = YAML(typ="safe", pure=True)
    try:
        _check_bounds(yaml, document)
        node = YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Place(mark.line, mark.column) if mark else None
        problem = " ".join(str(error.problem or error.context).split())
        raise document.error(f"is not valid YAML: {problem}", place, _yaml_advice(document, place)) from error
    except (YAMLError, RecursionError, ValueError) as error:
        raise document.error(f"is not valid YAML: {' '.join(str(error).split())}", None) from error
    if node is None:
        raise document.error("is empty", None, "`skillmerge init` writes a recipe to start from")
    document.data = _Builder(document).build(node, ())
    return document


def _check_bounds(yaml: YAML, document: Document) -> None:
    depth = events = 0
    for event in yaml.parse(document.text):
        events += 1
        if isinstance(event, CollectionStartEvent):
            depth += 1
        elif isinstance(event, CollectionEndEvent):
            depth -= 1
        if depth > MAX_NESTING or events > MAX_NODES:
            what = (
                f"is nested deeper than {MAX_NESTING} levels" if depth > MAX_NESTING else "has too many parts"
            )
            raise document.error(what, Place(event.start_mark.line, event.start_mark.column))
        if isinstance(event, AliasEvent) and depth > MAX_NESTING // 2:
            raise document.error("nests aliases", Place(event.start_mark.line, event.start_mark.column))


class _Builder:
    def __init__(self, document: Document) -> None:
        self.document = document
        self.nodes = 0

    def build(self, node: Node, path: Path) -> Any:
        self.nodes += 1
        place = _place(node)
        self.document.values[path] = place
        if self.nodes > MAX_NODES or len(path) > MAX_NESTING:
            raise self.document.error("expands to too many parts", place, "write it without aliases")
        if isinstance(node, MappingNode):
            return self._mapping(node, path)
        if isinstance(node, SequenceNode):
            return [self.build(item, (*path, index)) for index, item in enumerate(node.value)]
        return self._scalar(node, place)

    def _mapping(self, node: MappingNode, path: Path) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = _place(key_node)
            if not isinstance(key_node, ScalarNode):
                raise self.document.error("keys must be plain words", place)
            key = str(key_node.value)
            if key in table:
                first = self.document.keys[(*path, key)].line + 1
                raise self.document.error(
                    f"duplicate key `{key}`", place, f"it stands on line {first} already: keep one of the two"
                )
            self.document.keys[(*path, key)] = place
            table[key] = self.build(value_node, (*path, key))
        return table

    def _scalar(self, node: ScalarNode, place: Place) -> Any:
        kind = str(node.tag).rsplit(":", 1)[-1]
        text = str(node.value)
        if kind == "int":
            return _integer(text)
        if kind == "float":
            return _float(text)
        if kind == "bool":
            return text.lower() == "true"
        if kind == "null":
            return None
        if kind in ("str", "timestamp"):
            return text
        raise self.document.error(f"tag {node.tag} is not allowed", place, "remove the tag")


def _place(node: Node) -> Place:
    start, end = node.start_mark, node.end_mark
    one_line = start.line == end.line and end.column > start.column
    return Place(start.line, start.column, end.column - start.column if one_line else 1)


def _integer(text: str) -> int | str:
    try:
        return (
            int(text.replace("_", ""), 0) if text.lower().lstrip("+-").startswith(("0x", "0o")) else int(text)
        )
    except ValueError:
        return text


def _float(text: str) -> float | str:
    lowered = text.lower()
    if lowered.lstrip("+-") == ".inf":
        return -math.inf if lowered.startswith("-") else math.inf
    if lowered == ".nan":
        return math.nan
    try:
        return float(text)
    except ValueError:
        return text


def _blank(text: str) -> str:
    """Spaces as wide as `text`, tabs kept, so that a marker stands under its column."""
    return "".join("\t" if character == "\t" else " " for character in text)


def _yaml_advice(document: Document, place: Place | None) -> str | None:
    lines = document.text.splitlines()
    if place is not None and place.line < len(lines) and "\t" in lines[place.line]:
        return "YAML is indented with spaces: replace the tab"
    if place is not None and place.line < len(lines) and "*" in lines[place.line]:
        return 'quote globs: "*.mlp.*"'
    return None
