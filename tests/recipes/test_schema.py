"""The JSON Schema of recipes: what editors show of every key, and that a real language server shows it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from schemas import validator

import skillmerge
from skillmerge.recipes.tables.recipe import OutputTable
from skillmerge.remarks import ACCEPTABLE

SERVER = Path(sys.prefix, "yaml-language-server/node_modules/yaml-language-server/bin/yaml-language-server")
START = "skillmerge: 1\nmodels:\n  target: ./a\nmerge: target\n"


def keys(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every key of every table, and the names that a recipe chooses itself."""
    for name, table in {"recipe": schema, **schema["definitions"]}.items():
        for key, node in table["properties"].items():
            yield f"{name}.{key}", node
            if isinstance(node.get("additionalProperties"), dict):
                yield f"{name}.{key}.*", node["additionalProperties"]


def test_every_key_has_a_description_and_examples_that_it_takes() -> None:
    schema = skillmerge.schema()
    found = dict(keys(schema))
    assert len(found) > 55
    assert {"recipe.models.*", "ScheduleTable.default", "PushTable.repo", "FigureTable.by"} <= set(found)
    for name, node in found.items():
        text = node.get("description", "")
        assert text.endswith("."), name
        assert text[0].isupper() or text[0] == "`", name
        assert node.get("markdownDescription", text) == text, name
        assert ("markdownDescription" in node) == ("`" in text), name
        assert node["examples"], name
        own = validator({**node, "definitions": schema["definitions"]})
        for example in node["examples"]:
            own.validate(example)
    assert not [node for node in found.values() if {"$ref", "title", "discriminator"} & set(node)]


def test_defaults_are_those_of_the_recipe_and_never_nothing() -> None:
    nodes = skillmerge.schema()["definitions"]["OutputTable"]["properties"]
    assert {key: node["default"] for key, node in nodes.items() if "default" in node} == {
        key: field.default for key, field in OutputTable.model_fields.items() if field.default not in (None, [])
    }
    assert nodes["rounding"]["default"] == "nearest"


def test_names_to_accept_say_what_they_mean() -> None:
    names = skillmerge.schema()["properties"]["accept"]["items"]
    meanings = dict(zip(names["enum"], names["enumDescriptions"], strict=True))
    assert meanings.keys() == ACCEPTABLE.keys()
    assert meanings["window"] == "Another sliding window."


class Editor:
    """A client of a language server, over its standard input and output. folder: where its documents are said to be."""

    def __init__(self, command: list[str], folder: Path) -> None:
        self.folder, self.sent = folder, 0
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.diagnostics: dict[str, list[str]] = {}
        snippets = {"completionItem": {"documentationFormat": ["markdown"]}}
        capabilities = {"textDocument": {"completion": snippets, "hover": {"contentFormat": ["markdown"]}}}
        self.ask("initialize", processId=None, rootUri=folder.as_uri(), capabilities=capabilities)
        self._send(method="initialized", params={})

    def _send(self, **message: Any) -> None:
        assert self.process.stdin is not None
        body = json.dumps({"jsonrpc": "2.0", **message}).encode()
        self.process.stdin.write(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        self.process.stdin.flush()

    def _receive(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        length = 0
        while line := self.process.stdout.readline().strip():
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        message: dict[str, Any] = json.loads(self.process.stdout.read(length))
        if message.get("method") == "textDocument/publishDiagnostics":
            found = message["params"]["diagnostics"]
            self.diagnostics[message["params"]["uri"]] = [each["message"] for each in found]
        elif "method" in message and "id" in message:
            items = message["params"].get("items", []) if message.get("params") else []
            self._send(id=message["id"], result=[{} for _ in items])
        return message

    def ask(self, method: str, **params: Any) -> Any:
        self.sent += 1
        number = self.sent
        self._send(id=number, method=method, params=params)
        while (message := self._receive()).get("id") != number or "method" in message:
            pass
        return message["result"]

    def open(self, text: str) -> str:
        self.sent += 1
        uri = (self.folder / f"{self.sent}.yaml").as_uri()
        text = f"# yaml-language-server: $schema=skillmerge.schema.json\n{text}"
        document = {"uri": uri, "languageId": "yaml", "version": 1, "text": text}
        self._send(method="textDocument/didOpen", params={"textDocument": document})
        return uri

    def _at(self, method: str, text: str) -> Any:
        """The answer at the place of `|` in the text."""
        before, after = text.split("|")
        place = {"line": 1 + before.count("\n"), "character": len(before.split("\n")[-1])}
        return self.ask(f"textDocument/{method}", textDocument={"uri": self.open(before + after)}, position=place)

    def complete(self, text: str) -> dict[str, Any]:
        """What can be written there, and what the editor says of each."""
        return {item["label"]: item.get("documentation") for item in self._at("completion", text)["items"]}

    def hover(self, text: str) -> str:
        return str(self._at("hover", text)["contents"]["value"])

    def mistakes(self, text: str) -> list[str]:
        uri = self.open(text)
        while uri not in self.diagnostics:
            self._receive()
        return self.diagnostics[uri]


@pytest.fixture
def editor(tmp_path: Path) -> Iterator[Editor]:
    if not SERVER.exists() or shutil.which("node") is None:
        pytest.skip("the YAML language server is not here: `make editors` installs it")
    skillmerge.init(tmp_path / "recipe.yaml")
    editor = Editor(["node", str(SERVER), "--stdio"], tmp_path)
    yield editor
    editor.process.kill()
    editor.process.communicate()


def test_yaml_language_server_completes_explains_and_checks(editor: Editor) -> None:
    assert {"dtype", "rounding", "push"} <= set(editor.complete(START + "output:\n  path: ./m\n  |"))
    assert list(editor.complete(START + "output:\n  dtype: |")) == ["same", "bfloat16", "float16", "float32"]
    assert editor.complete(START + "accept: [|]\n")["window"] == "Another sliding window."
    assert "run" in editor.complete(START + "gates:\n  commands:\n    - |")
    assert {"layers", "modules", "ramp"} <= set(editor.complete(START + "coefficients:\n  lam:\n    rules:\n      - |"))
    assert {"skill", "patch", "rename"} <= set(editor.complete("skillmerge: 1\nmodels:\n  a:\n    |\nmerge: a\n"))
    output = skillmerge.schema()["definitions"]["OutputTable"]["properties"]
    gates = skillmerge.schema()["definitions"]["GatesTable"]["properties"]
    assert output["rounding"]["description"] in editor.hover(START + "output:\n  roun|ding: nearest\n")
    assert gates["vanished"]["description"] in editor.hover(START + "gates:\n  van|ished: {max: 0.2}\n")
    assert editor.mistakes(START) == []
    assert editor.mistakes(START + "output: {pth: ./m}\n") == ["Property pth is not allowed."]
    assert editor.mistakes(START + "output: {dtype: bf16}\n") == [
        'Value is not accepted. Valid values: "same", "bfloat16", "float16", "float32".'
    ]
