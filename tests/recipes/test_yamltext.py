"""YAML 1.2 scalars, where things stand, errors that show the line, and the bounds."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from skillmerge.errors import Place, RecipeError
from skillmerge.recipes.yamltext import MAX_BYTES, MAX_DIGITS, MAX_NESTING, MAX_NODES, Document, read, read_old


def value(scalar: str) -> Any:
    return read(f"key: {scalar}\n", "r.yaml").data["key"]


def message(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        read(text, "r.yaml")
    return str(caught.value)


# Scalars.

SCALARS: list[tuple[str, Any]] = [
    ("1", 1), ("-1", -1), ("+1", 1), ("0", 0), ("012", 12), ("0o17", 15), ("0x1F", 31), ("0xff", 255),
    ("1.0", 1.0), ("1.", 1.0), (".5", 0.5), ("-.5", -0.5), ("1e-3", 0.001), ("1E3", 1000.0), ("1.5e+3", 1500.0),
    ("+.5e1", 5.0), ("1e999", math.inf), (".inf", math.inf), ("+.Inf", math.inf), ("-.INF", -math.inf),
    ("true", True), ("True", True), ("TRUE", True), ("false", False), ("False", False), ("FALSE", False),
    ("~", None), ("", None), ("null", None), ("Null", None), ("NULL", None),
    ("no", "no"), ("yes", "yes"), ("on", "on"), ("off", "off"), ("y", "y"), ("tRUE", "tRUE"), ("nULL", "nULL"),
    ("1_000", "1_000"), ("0b1", "0b1"), ("0o8", "0o8"), ("-0x1", "-0x1"), ("1:30", "1:30"), ("1e", "1e"), (".", "."),
    ("e3", "e3"), ("--1", "--1"), ("1-", "1-"), ("0-3", "0-3"), ("4-", "4-"), ("inf", "inf"), ("nan", "nan"),
    (".iNF", ".iNF"), ("=", "="), ("<<", "<<"), ("2020-01-01", "2020-01-01"), ("2020-01-01T00:00:00Z",) * 2,
    ("'1'", "1"), ('"1e-3"', "1e-3"), ("'no'", "no"), ("''", ""), ('"~"', "~"), ("'it''s'", "it's"),
    ('"a\\tb"', "a\tb"), ('"\\ud83d\\ude00"', "😀"), ('"\\U0001f600"', "😀"),
    ("λ", "λ"), ('"\\u03bb"', "λ"), ("a b  c", "a b  c"), ("a#b", "a#b"), ("a # comment", "a"),
    (">-\n  a\n  b\n", "a b"), ("|\n  1\n", "1\n"), (">-\n  1\n", "1"), ("٣", "٣"), ("１", "１"),
]  # fmt: skip


@pytest.mark.parametrize(("scalar", "expected"), SCALARS)
def test_scalar_means_what_yaml_1_2_says(scalar: str, expected: Any) -> None:
    found = value(scalar)
    assert (type(found), found) == (type(expected), expected)


@pytest.mark.parametrize("scalar", [".nan", ".NaN", ".NAN"])
def test_scalar_that_is_not_a_number_is_one(scalar: str) -> None:
    assert math.isnan(value(scalar))


def test_negative_zero_keeps_its_sign() -> None:
    assert math.copysign(1, value("-0.0")) == -1


def test_keys_are_text_whatever_they_look_like() -> None:
    assert read("1: a\ntrue: b\n~: c\n1e3: d\n'q': e\n", "x").data == {
        "1": "a", "true": "b", "~": "c", "1e3": "d", "q": "e",
    }  # fmt: skip


plain_text = st.text(
    st.characters(blacklist_categories=("Cc", "Cs"), blacklist_characters="\u2028\u2029\ufeff￾￿"), max_size=40
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False)
    | plain_text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(plain_text, inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@settings(deadline=None)
@given(json_values, st.booleans())
def test_json_is_yaml(document: Any, ascii_only: bool) -> None:
    text = json.dumps({"key": document}, ensure_ascii=ascii_only, indent=1)
    assert read(text, "x").data == {"key": document}


# Places and errors.

TEXT = """\
# a comment
models:
  target: ./a   # where
  rl: {path: "./b"}
rules:
  - 0.5
  - [a, bc]
"""


def test_places_of_keys_and_values() -> None:
    document = read(TEXT, "r.yaml")
    assert document.keys[("models",)] == Place(1, 0, 6)
    assert document.keys[("models", "rl", "path")] == Place(3, 7, 4)
    assert document.values[("models", "target")] == Place(2, 10, 3)
    assert document.values[("models", "rl", "path")] == Place(3, 13, 5)
    assert document.values[("rules", 0)] == Place(5, 4, 3)
    assert document.values[("rules", 1, 1)] == Place(6, 8, 2)
    assert document.place(("rules", 1, 7, "x")) == document.values[("rules", 1)]
    assert document.place(("nowhere",)) == document.values[()]


def test_error_shows_the_line_and_a_marker_under_it() -> None:
    document = read(TEXT, "r.yaml")
    error = document.error("is wrong", document.place(("models", "rl", "path")), "right it")
    assert str(error) == (
        "r.yaml:4:14: is wrong\n"
        '    4 |   rl: {path: "./b"}\n'
        "      |              ^^^^^\n"
        "right it"
    )  # fmt: skip
    assert error.exit_status == 2


def test_error_without_a_place_names_the_file() -> None:
    assert str(Document("r.yaml", "").error("is wrong", None)) == "r.yaml: is wrong"


def test_marker_stands_under_its_word_after_tabs() -> None:
    error = Document("r.yaml", "a:\tb").error("x", Place(0, 3))
    assert error.message.splitlines()[1:] == ["    1 | a:\tb", "      |   \t^"]


def test_marker_stands_under_its_word_in_a_long_line() -> None:
    error = Document("r.yaml", "x" * 500 + "HERE" + "y" * 500).error("x", Place(0, 500, 4))
    _, line, marker = error.message.splitlines()
    assert line[marker.index("^") : marker.rindex("^") + 1] == "HERE"
    assert len(line) < 180


@pytest.mark.parametrize(("end", "line"), [("\n", 3), ("\r\n", 3), ("\r", 3), ("\x85", 2), ("\u2028", 2)])
def test_lines_are_counted_alike_by_parser_and_message(end: str, line: int) -> None:
    text = f'a: "x{end}  y"\nc: !bad 3'
    assert message(text).split("\n")[:2] == [f"r.yaml:{line}:4: tag !bad is not allowed", f"    {line} | c: !bad 3"]


def test_message_does_not_repeat_a_long_text() -> None:
    error = Document("r.yaml", "a").error("k" * 100_000, Place(0, 0), "f" * 100_000)
    assert len(str(error)) < 2_000
    assert error.message.startswith("r.yaml:1:1: kkk")


# What is refused.

REFUSED = [
    ("a: 1\na: 2\n", "r.yaml:2:1: duplicate key `a`"),
    ("a: 1\n'a': 2\n", "remove one of the two; the first is on line 1"),
    ("{a: {b: 1, b: 2}}", "r.yaml:1:12: duplicate key `b`"),
    ("1: a\n'1': b\n", "duplicate key `1`"),
    ("? [a]\n: 1\n", "keys must be plain words"),
    ("? {a: b}\n: 1\n", "keys must be plain words"),
    ("a: !!str 1", "tag tag:yaml.org,2002:str is not allowed"),
    ("a: ! 1", "tag ! is not allowed"),
    ("a: !!seq [1]", "tag tag:yaml.org,2002:seq is not allowed"),
    ("a: !!map {b: 1}", "tag tag:yaml.org,2002:map is not allowed"),
    ("!!binary a: 1", "tag tag:yaml.org,2002:binary is not allowed"),
    ("%TAG !e! tag:evil,2020:\n---\na: !e!x 1", "tag tag:evil,2020:x is not allowed"),
    ("%YAML 1.1\n---\na: no", "says that it is YAML 1.1"),
    ("%YAML 2.0\n---\na: no", "YAML"),
    ("%YAML 1.3\n---\na: no", "YAML"),  # found by fuzzing: an assertion of the parser's
    ("a: &x 1\nb: &x 2", "r.yaml:2:4: anchor `x` is defined twice"),
    ("a: *x", "undefined alias"),
    ("a: [1", "r.yaml:1:6: is not valid YAML"),
    ("a: b: c", "mapping values are not allowed"),
    ("a:\n\t- 1", "replace the tab"),
    ("a: *.mlp.*", 'quote globs: "*.mlp.*"'),
    ("a: 1\n---\nb: 2", "is not valid YAML"),
    ("", "r.yaml: is empty"),
    ("# nothing\n\n", "r.yaml: is empty"),
    ('a: "\\0"', "r.yaml:1:4: holds the control character '\\x00'"),
    ('"\\e[2J": 1', "holds the control character '\\x1b'"),
    ('a: ["\\x9b"]', "holds the control character '\\x9b'"),
    ('a: "\\uDE00\\uD83D"', "holds the control character '\\ude00'"),
    ('a: "\\UFFFFFFFF"', "is not valid YAML"),
    ("a: \x00", "is not valid YAML"),
    ("a: \x07", "is not valid YAML"),
    ("a: \ud800", "is not valid YAML"),
]


@pytest.mark.parametrize(("text", "expected"), REFUSED)
def test_text_is_refused_with_the_reason(text: str, expected: str) -> None:
    assert expected in message(text)


def test_yaml_1_2_may_say_so() -> None:
    assert read("%YAML 1.2\n---\na: no\n...\n", "x").data == {"a": "no"}


def test_aliases_are_expanded_where_they_stand() -> None:
    document = read("base: &b {x: 1}\ncopy: *b\nlist: [*b, *b]\n", "x")
    assert document.data == {"base": {"x": 1}, "copy": {"x": 1}, "list": [{"x": 1}, {"x": 1}]}
    assert document.values[("list", 1, "x")] == document.values[("base", "x")]
    assert document.keys[("copy", "x")].line == 0


def test_folded_text_is_plain_text() -> None:
    assert read("a: >-\n  target +\n  lam * (rl - sft)\n", "x").data["a"] == "target + lam * (rl - sft)"


def test_bounds_are_where_they_are_said_to_be() -> None:
    assert read("a: 1 #".ljust(MAX_BYTES, "x"), "x").data == {"a": 1}
    assert "larger than 256 KiB" in message("a: 1 #".ljust(MAX_BYTES + 1, "x"))
    assert "larger than 256 KiB" in message("a: 1 #" + "é" * (MAX_BYTES // 2))
    assert read("[" * MAX_NESTING + "]" * MAX_NESTING, "x").data
    assert "nested deeper than 20" in message("[" * (MAX_NESTING + 1) + "]" * (MAX_NESTING + 1))
    assert value("9" * MAX_DIGITS) == 10**MAX_DIGITS - 1
    assert f"more than {MAX_DIGITS} digits" in message("key: " + "9" * (MAX_DIGITS + 1))
    assert len(read("- a\n" * (MAX_NODES - 10), "x").data) == MAX_NODES - 10
    assert "too many parts" in message("- a\n" * (MAX_NODES + 1))


def test_aliases_that_multiply_are_bounded() -> None:
    tens = "\n".join(["a0: &a0 [x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 4)])
    assert len(read(tens, "x").data["a3"]) == 10
    assert "too many parts" in message(tens + f"\nmore: [{', '.join(['*a3'] * 20)}]")


@pytest.mark.parametrize("text", ["&a [*a]", "a: &a {b: *a}", "&a [&b [*a], *b]"])
def test_alias_of_what_it_stands_in_is_refused(text: str) -> None:
    assert "too many parts" in message(text)


# Fuzzing: a document or an error, nothing else.

PIECES = [
    *("a", "b: ", ": ", "- ", "\n", "\n  ", "? ", "[", "]", "{", "}", ",", "&x ", "*x", "!t ", "!!int ", "|", ">", "#"),
    *(
        "'",
        '"',
        "\\",
        "%YAML 1.2\n",
        "%TAG ! !\n",
        "---\n",
        "...\n",
        "\t",
        "~",
        "1",
        ".",
        "@",
        "`",
        "\r",
        "\ufeff",
        "\x85",
    ),
    *("é", "\\x0", "\\U0011", "<<: ", "=", "0x", "1e", "2020-01-01", "|2-\n", ">+\n"),
]


@settings(max_examples=1000, deadline=None)
@given(st.one_of(st.text(max_size=40), st.lists(st.sampled_from(PIECES), max_size=25).map("".join)))
@example("%YAML 1.2.3\n")
@example("a: |9\n b")
def test_any_text_is_a_document_or_refused(text: str) -> None:
    with suppress(RecipeError):
        read(text, "r.yaml")


# ------------------------------------------------------------------------------------------------ YAML 1.1


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("yes", True), ("On", True), ("TRUE", True), ("no", False), ("off", False), ("False", False), ("y", "y"),
        ("1e-5", "1e-5"), ("1.0e-5", 1e-5), ("1.5e5", "1.5e5"), (".5", 0.5), ("1.", 1.0), ("-0.5", -0.5),
        ("1_000", 1000), ("010", 8), ("0x1F", 31), ("0b11", 3), ("12", 12), ("~", None),
        ("1_0.5", 10.5), ("09", "09"), (".inf", float("inf")), ("'yes'", "yes"),
    ],
)  # fmt: skip
def test_old_plain_words_mean_what_pyyaml_reads(text: str, data: object) -> None:
    (document,) = read_old(f"key: {text}\n", "f.yml")
    assert document.data == {"key": data}
    assert type(document.data["key"]) is type(data)


def test_old_documents_are_read_one_by_one() -> None:
    documents = read_old("%YAML 1.1\n---\na: &x 1\n---\nb: &x 2\n---\n", "f.yml")
    assert [document.data for document in documents] == [{"a": 1}, {"b": 2}]
    assert documents[1].keys[("b",)].line == 4


def test_old_merge_keys_fill_in_what_is_not_written() -> None:
    (document,) = read_old("x: &x {p: 1, q: 2}\ny: &y {p: 3, r: 4}\nz:\n  <<: [*x, *y]\n  q: 5\n", "f.yml")
    assert document.data["z"] == {"q": 5, "p": 1, "r": 4}
    assert document.keys[("z", "q")].line == 4
    with pytest.raises(RecipeError, match="`<<` merges a table, and this is none"):
        read_old("a: {<<: 5}\n", "f.yml")


def test_old_key_written_twice_has_to_have_the_same_value() -> None:
    (document,) = read_old("a: {b: 1, b: 1}\n", "f.yml")
    assert (document.data, [path for path, _ in document.repeated]) == ({"a": {"b": 1}}, [("a", "b")])
    for other in ("2", "true", "1.0"):
        with pytest.raises(RecipeError, match="1:11: duplicate key `b` with another value"):
            read_old(f"a: {{b: 1, b: {other}}}\n", "f.yml")
