"""YAML text -> plain data, and where in the text each part of it is.

YAML 1.2 core rules (`1e-3` is a number, `no` a string), without tags or merge keys, and with bounds on size,
nesting and aliases, so that no document can hurt. Files of other tools are read by YAML 1.1, as PyYAML reads them.
Knows nothing about recipes.

ruamel finds the structure; what a plain word means is decided here, so that no directive changes it.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    CollectionEndEvent,
    CollectionStartEvent,
    DocumentStartEvent,
    Event,
    ScalarEvent,
)
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from skillmerge.errors import Place as Place
from skillmerge.errors import RecipeError

MAX_BYTES = 256 * 1024
MAX_NESTING = 20
MAX_NODES = 20_000
MAX_DIGITS = 300
"""Most digits of a whole number, as many as a finite coefficient can have."""

_LINE_END = re.compile(r"\r\n|\n|\r")
"""Line ends of YAML 1.2; `splitlines` knows more."""

_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]")
"""Control characters and halves of characters, which escapes can spell and no path or terminal can take."""

_PAIR = re.compile(r"[\ud800-\udbff][\udc00-\udfff]")
"""Two halves of one character, as JSON spells what lies past U+FFFF."""

_NULL = re.compile(r"null|Null|NULL|~|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITY = re.compile(r"[-+]?\.(inf|Inf|INF)")
_NAN = re.compile(r"\.(nan|NaN|NAN)")
_OLD_BOOL = re.compile(r"true|True|TRUE|yes|Yes|YES|on|On|ON|false|False|FALSE|no|No|NO|off|Off|OFF")
_OLD_INTEGER = re.compile(r"[-+]?(0b_*[01][01_]*|0x_*[0-9a-fA-F][0-9a-fA-F_]*|0[0-7_]*|[1-9][0-9_]*)")
_OLD_FLOAT = re.compile(r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+][0-9]+)?")
"""Plain words of YAML 1.1. `1e-5` is text in it: a float has a point, and its exponent a sign."""

_LONGEST_MESSAGE = 600
_MOST_ADVICE = 50
"""Lines of advice: room for a recipe."""

Path = tuple[str | int, ...]


@dataclass(slots=True)
class Document:
    """A parsed document: `data` is dicts, lists, strings, numbers, booleans and None."""

    name: str
    text: str
    data: Any = None
    keys: dict[Path, Place] = field(default_factory=dict)
    values: dict[Path, Place] = field(default_factory=dict)
    by_hand: bool = True
    """Whether a person wrote the text, so that messages show its lines."""
    repeated: list[tuple[Path, Place]] = field(default_factory=list)
    """Keys that were written again with the same value, in YAML 1.1."""

    def error(self, message: str, place: Place | None, fix: str | None = None) -> RecipeError:
        """Return an error that shows the file, the position, the line itself and a marker under it."""
        # A name may hold line ends, and what begins a line means something to those who read logs.
        message, fix = (
            _shortened(message).replace("\n", "\\n"),
            fix and "\n".join(_shortened(line) for line in fix.split("\n")[:_MOST_ADVICE]),
        )
        if place is None or not self.by_hand:
            return RecipeError(f"{self.name}: {message}" if self.by_hand else message, fix=fix, what=message)
        excerpt = self.excerpt(place)
        text = f"{self.name}:{place.line + 1}:{place.column + 1}: {message}\n{excerpt}"
        return RecipeError(text, fix=fix, what=message, place=place, excerpt=excerpt)

    def excerpt(self, place: Place) -> str:
        """Return the line of a place, and a marker under it."""
        line = self.line(place.line).rstrip()
        cut = max(0, place.column - 60) if len(line) > 160 else 0
        gutter = f"{place.line + 1:>5} | "
        marker = " " * (len(gutter) - 2) + "| " + _blank(line[cut : place.column])
        return f"{gutter}{line[cut : cut + 160]}\n{marker}{'^' * max(1, min(place.width, 100))}"

    def line(self, number: int) -> str:
        """Return a line of the text, counted from 0 as places are; the last one where there is no such line."""
        lines = _LINE_END.split(self.text)
        return lines[min(number, len(lines) - 1)]

    def offset(self, place: Place) -> int:
        """Return where in the text a place is, in characters."""
        ends = [match.end() for match in _LINE_END.finditer(self.text)]
        return ([0, *ends])[place.line] + place.column

    def place(self, path: Path) -> Place | None:
        """Return where the value at `path` stands, or the nearest thing around it."""
        while path and path not in self.values:
            path = path[:-1]
        return self.values.get(path)


def dump(data: Any) -> str:
    """Plain data as YAML: tables in blocks, those of plain values in a list each on one line."""
    yaml = YAML(pure=True)
    yaml.width = 1 << 16
    yaml.indent(mapping=2, sequence=4, offset=2)
    stream = io.StringIO()
    yaml.dump(_styled(data), stream)
    return stream.getvalue()


def _styled(data: Any, in_list: bool = False) -> Any:
    if isinstance(data, dict):
        table = CommentedMap((key, _styled(value)) for key, value in data.items())
        if in_list and not any(isinstance(value, dict | list) for value in data.values()):
            table.fa.set_flow_style()
        return table
    return [_styled(item, in_list=True) for item in data] if isinstance(data, list) else data


def read(text: str, name: str) -> Document:
    """Parse one YAML document. Raises RecipeError with the position of whatever is wrong."""
    document = Document(name, text)
    if len(text.encode(errors="replace")) > MAX_BYTES:
        raise document.error(f"is larger than {MAX_BYTES // 1024} KiB, which no recipe needs", None)
    with _as_recipe_errors(document):
        _check_bounds(YAML(typ="safe", pure=True), document)
        node = YAML(typ="safe", pure=True).compose(text)
    if node is None:
        raise document.error("is empty", None, "`skillmerge init` writes a recipe to start from")
    document.data = _Builder(document).build(node, ())
    return document


def read_old(text: str, name: str) -> list[Document]:
    """Parse the documents of a YAML 1.1 file, as PyYAML reads them. Raises RecipeError.

    A key that is written twice is an error where the values differ: PyYAML silently takes the last.
    """
    whole = Document(name, text)
    if len(text.encode(errors="replace")) > MAX_BYTES:
        raise whole.error(f"is larger than {MAX_BYTES // 1024} KiB, which no recipe needs", None)
    with _as_recipe_errors(whole):
        _check_bounds(YAML(typ="safe", pure=True), whole, versions=(None, (1, 1), (1, 2)))
        nodes = [node for node in YAML(typ="safe", pure=True).compose_all(text) if node is not None]
    documents = []
    for node in nodes:
        document = Document(name, text)
        document.data = _OldBuilder(document).build(node, ())
        if document.data is not None:
            documents.append(document)
    return documents


@contextmanager
def _as_recipe_errors(document: Document) -> Iterator[None]:
    """Turn errors of the YAML library into errors with their place."""
    try:
        yield
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Place(mark.line, mark.column) if mark else None
        problem = " ".join(str(error.problem or error.context).split())
        raise document.error(f"is not valid YAML: {problem}", place, _yaml_advice(document, place)) from error
    except (YAMLError, RecursionError, ValueError, OverflowError, AssertionError) as error:
        # The last is what ruamel says of a version of YAML that it does not know.
        raise document.error(f"is not valid YAML: {' '.join(str(error).split())}", None) from error


def _check_bounds(yaml: YAML, document: Document, versions: tuple[object, ...] = (None, (1, 2))) -> None:
    """Walk the events, which cost little, before anything is built from them."""
    depth = 0
    anchors: set[str] = set()
    for count, event in enumerate(yaml.parse(document.text), 1):
        if isinstance(event, CollectionStartEvent):
            depth += 1
        elif isinstance(event, CollectionEndEvent):
            depth -= 1
        problem, fix = _problem(event, depth, count, anchors)
        if isinstance(event, DocumentStartEvent):
            anchors.clear()
            if event.version not in versions:
                problem, fix = _other_version(event)
        if problem is not None:
            mark = event.start_mark
            raise document.error(problem, Place(mark.line, mark.column), fix)
        if isinstance(event, ScalarEvent | CollectionStartEvent) and event.anchor:
            anchors.add(event.anchor)


def _problem(event: Event, depth: int, count: int, anchors: set[str]) -> tuple[str | None, str | None]:
    """Return what is wrong with an event, and what to do."""
    if depth > MAX_NESTING:
        return f"is nested deeper than {MAX_NESTING} levels", None
    if count > MAX_NODES:
        return "has too many parts", None
    if isinstance(event, AliasEvent):
        return ("nests aliases" if depth > MAX_NESTING // 2 else None), None
    if isinstance(event, ScalarEvent | CollectionStartEvent):
        if event.ctag is not None:
            return f"tag {event.ctag} is not allowed", "remove the tag"
        if event.anchor in anchors:
            return f"anchor `{event.anchor}` is defined twice", "give each its own name"
    return None, None


def _other_version(event: DocumentStartEvent) -> tuple[str, str]:
    version = ".".join(map(str, event.version))
    return f"says that it is YAML {version}; recipes are YAML 1.2", "remove the `%YAML` line"


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
        assert isinstance(node, ScalarNode), "YAML has no other kind of node"
        return self._scalar(node, place)

    def _mapping(self, node: MappingNode, path: Path) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = _place(key_node)
            if not isinstance(key_node, ScalarNode):
                raise self.document.error("keys must be plain words", place)
            key = self._text(key_node, place)
            here: Path = (*path, key)
            if key in table:
                first = self.document.keys[here].line + 1
                raise self.document.error(
                    f"duplicate key `{key}`", place, f"remove one of the two; the first is on line {first}"
                )
            self.document.keys[here] = place
            table[key] = self.build(value_node, here)
        return table

    def _scalar(self, node: ScalarNode, place: Place) -> Any:
        text = self._text(node, place)
        return text if node.style is not None else self._plain(text, place)

    def _plain(self, text: str, place: Place) -> Any:
        """Return what a word without quotes means."""
        if _NULL.fullmatch(text):
            return None
        if _BOOL.fullmatch(text):
            return text.lower() == "true"
        if _INTEGER.fullmatch(text):
            if len(text) > MAX_DIGITS:
                raise self.document.error(f"this number has more than {MAX_DIGITS} digits", place)
            return int(text, 0) if text.startswith(("0x", "0o")) else int(text)
        if _FLOAT.fullmatch(text):
            return float(text)
        if _INFINITY.fullmatch(text):
            return -math.inf if text.startswith("-") else math.inf
        return math.nan if _NAN.fullmatch(text) else text

    def _text(self, node: ScalarNode, place: Place) -> str:
        text = _PAIR.sub(lambda pair: pair[0].encode("utf-16", "surrogatepass").decode("utf-16"), str(node.value))
        if (found := _UNSEEN.search(text)) is not None:
            raise self.document.error(f"holds the control character {found.group()!r}", place)
        return text


class _OldBuilder(_Builder):
    """YAML 1.1: other plain words, merge keys, and keys that are written twice."""

    def _mapping(self, node: MappingNode, path: Path) -> dict[str, Any]:
        table: dict[str, Any] = {}
        merged: list[Node] = []
        for key_node, value_node in node.value:
            place = _place(key_node)
            if not isinstance(key_node, ScalarNode):
                raise self.document.error("keys must be plain words", place)
            key = self._text(key_node, place)
            if key == "<<" and key_node.style is None:
                merged += value_node.value if isinstance(value_node, SequenceNode) else [value_node]
                continue
            here: Path = (*path, key)
            value = self.build(value_node, here)
            if key in table:
                if repr(table[key]) != repr(value):
                    first = self.document.keys[here].line + 1
                    fix = f"remove one of the two; the first is on line {first}"
                    raise self.document.error(f"duplicate key `{key}` with another value", place, fix)
                self.document.repeated.append((here, place))
            self.document.keys[here] = place
            table[key] = value
        for other in merged:
            if not isinstance(other, MappingNode):
                raise self.document.error("`<<` merges a table, and this is none", _place(other))
            for key, value in self._others(other, path, table):
                table.setdefault(key, value)
        return table

    def _others(self, node: MappingNode, path: Path, table: dict[str, Any]) -> list[tuple[str, Any]]:
        """Return what a merged table adds to what is written already, whose places stay."""
        keys, values = dict(self.document.keys), dict(self.document.values)
        found = self._mapping(node, path)
        own = {(*path, key) for key in table}
        for places, before in ((self.document.keys, keys), (self.document.values, values)):
            places.update({at: place for at, place in before.items() if at[: len(path) + 1] in own})
        return [*found.items()]

    def _plain(self, text: str, place: Place) -> Any:
        if _NULL.fullmatch(text):
            return None
        if _OLD_BOOL.fullmatch(text):
            return text.lower() in ("true", "yes", "on")
        digits = text.replace("_", "")
        if _OLD_INTEGER.fullmatch(text) and len(text) <= MAX_DIGITS:
            octal = re.fullmatch(r"[-+]?0[0-7]+", digits)
            return int(digits, 8) if octal else int(digits, 0)
        if _OLD_FLOAT.fullmatch(text):
            return float(digits)
        if _INFINITY.fullmatch(text):
            return -math.inf if text.startswith("-") else math.inf
        return math.nan if _NAN.fullmatch(text) else text


def _place(node: Node) -> Place:
    start, end = node.start_mark, node.end_mark
    one_line = start.line == end.line and end.column > start.column
    return Place(start.line, start.column, end.column - start.column if one_line else 1)


def _shortened(message: str) -> str:
    """Return a message that quotes the text, without flooding the terminal."""
    if len(message) <= _LONGEST_MESSAGE:
        return message
    return f"{message[: _LONGEST_MESSAGE - 100]} … {message[-100:]}"


def _blank(text: str) -> str:
    """Spaces as wide as `text`, tabs kept, so that a marker stands under its column."""
    return "".join("\t" if character == "\t" else " " for character in text)


def _yaml_advice(document: Document, place: Place | None) -> str | None:
    line = document.line(place.line) if place is not None else ""
    if "\t" in line:
        return "YAML is indented with spaces: replace the tab"
    return 'quote globs: "*.mlp.*"' if "*" in line else None
