"""Runs a composite GitHub Action as the runner does, as far as this project's action goes.

Steps in order with `bash --noprofile --norc -eo pipefail`; `if:`, `env:`, `with:` and outputs evaluated in the
expression language (contexts, strings, == != && || !, the status functions); GITHUB_OUTPUT and
GITHUB_STEP_SUMMARY; a step that fails stops those whose `if:` asks for no status. `uses:` steps are only recorded.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

_TOKEN = re.compile(
    r"\s*(?:(?P<string>'(?:[^']|'')*')|(?P<name>[A-Za-z_][\w.-]*)(?P<call>\(\))?|(?P<op>==|!=|&&|\|\||[!()]))"
)


def load_yaml(text: str) -> Any:
    return YAML(typ="safe", pure=True).load(text)


@dataclass
class Step:
    name: str
    outcome: str
    output: str = ""
    uses: str | None = None
    inputs: dict[str, str] = field(default_factory=dict)


@dataclass
class Run:
    """What happened: steps that ran or were recorded, the action's outputs, the job's summary."""

    steps: list[Step]
    outputs: dict[str, str]
    summary: str

    @property
    def failed(self) -> bool:
        return any(step.outcome == "failure" for step in self.steps)

    @property
    def log(self) -> str:
        return "".join(step.output for step in self.steps)

    def outcome(self, name: str) -> str:
        return next(step.outcome for step in self.steps if step.name == name)


def run_action(path: Path, work: Path, temp: Path, environment: dict[str, str], **inputs: str) -> Run:
    """Run the action in the folder `work` with these inputs (`fail_on` is `fail-on`)."""
    action = load_yaml(path.read_text())
    given = {name.replace("_", "-"): value for name, value in inputs.items()}
    assert set(given) <= set(action["inputs"]), "an input that the action does not have"
    values = {name: given.get(name, str(spec.get("default", ""))) for name, spec in action["inputs"].items()}
    temp.mkdir(exist_ok=True)
    summary = temp / "summary.md"
    summary.touch()
    context: dict[str, Any] = {
        "inputs": values, "steps": {}, "github": {"action_path": str(path.parent)}, "runner": {"temp": str(temp)}
    }  # fmt: skip
    base = {**os.environ, **environment, "RUNNER_TEMP": str(temp), "GITHUB_STEP_SUMMARY": str(summary)}
    steps: list[Step] = []
    failed = False
    for number, spec in enumerate(action["runs"]["steps"]):
        condition = str(spec.get("if", "success()"))
        if not re.search(r"\b(always|success|failure|cancelled)\(\)", condition):
            condition = f"success() && ({_inner(condition)})"
        if not _truthy(_Expression(_inner(condition), context, failed).value()):
            steps.append(Step(spec["name"], "skipped"))
            continue
        if "uses" in spec:
            inputs_of = {key: expand(str(value), context) for key, value in spec.get("with", {}).items()}
            steps.append(Step(spec["name"], "success", uses=spec["uses"], inputs=inputs_of))
            continue
        assert spec["shell"] == "bash", "composite steps name their shell"
        script, outputs = temp / f"{number}.sh", temp / f"{number}.out"
        script.write_text(expand(spec["run"], context))
        outputs.touch()
        variables = {key: expand(str(value), context) for key, value in spec.get("env", {}).items()}
        process = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)],
            cwd=work, env={**base, **variables, "GITHUB_OUTPUT": str(outputs)}, text=True, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        outcome = "success" if process.returncode == 0 else "failure"
        failed = failed or outcome == "failure"
        steps.append(Step(spec["name"], outcome, process.stdout))
        if "id" in spec:
            context["steps"][spec["id"]] = {"outputs": read_outputs(outputs.read_text()), "outcome": outcome}
    results = {name: expand(spec["value"], context) for name, spec in action["outputs"].items()}
    return Run(steps, results, summary.read_text())


def read_outputs(text: str) -> dict[str, str]:
    """`name=value` lines, and values of several lines between delimiters."""
    found, lines = {}, iter(text.splitlines())
    for line in lines:
        if match := re.match(r"([\w-]+)<<(.+)", line):
            value = []
            while (line := next(lines)) != match[2]:
                value.append(line)
            found[match[1]] = "\n".join(value)
        else:
            name, equals, rest = line.partition("=")
            assert equals, f"GITHUB_OUTPUT refuses {line!r}"
            found[name] = rest
    return found


def expand(text: str, context: dict[str, Any]) -> str:
    return re.sub(r"\$\{\{(.*?)\}\}", lambda match: _text(_Expression(match[1], context, False).value()), text)


def _inner(text: str) -> str:
    match = re.fullmatch(r"\s*\$\{\{(.*)\}\}\s*", text)
    return match[1] if match else text


def _truthy(value: Any) -> bool:
    return value not in ("", None, False, 0)


def _text(value: Any) -> str:
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


class _Expression:
    """Recursive descent: or, and, comparison, not, primary."""

    def __init__(self, text: str, context: dict[str, Any], failed: bool) -> None:
        self.context, self.failed = context, failed
        self.tokens, position = [], 0
        text = text.strip()
        while position < len(text):
            match = _TOKEN.match(text, position)
            assert match, f"not understood: {text[position:]!r}"
            self.tokens.append(match)
            position = match.end()
        self.index = 0

    def value(self) -> Any:
        found = self._or()
        assert self.index == len(self.tokens), "something is left over"
        return found

    def _next(self, *operators: str) -> str | None:
        if self.index < len(self.tokens) and self.tokens[self.index]["op"] in operators:
            self.index += 1
            return str(self.tokens[self.index - 1]["op"])
        return None

    def _or(self) -> Any:
        left = self._and()
        while self._next("||"):
            right = self._and()
            left = left if _truthy(left) else right
        return left

    def _and(self) -> Any:
        left = self._comparison()
        while self._next("&&"):
            right = self._comparison()
            left = right if _truthy(left) else left
        return left

    def _comparison(self) -> Any:
        left = self._not()
        while operator := self._next("==", "!="):
            same = _text(left).lower() == _text(self._not()).lower()
            left = same == (operator == "==")
        return left

    def _not(self) -> Any:
        return not _truthy(self._not()) if self._next("!") else self._primary()

    def _primary(self) -> Any:
        if self._next("("):
            found = self._or()
            assert self._next(")")
            return found
        token = self.tokens[self.index]
        self.index += 1
        if token["string"]:
            return token["string"][1:-1].replace("''", "'")
        if token["call"]:
            return {"always": True, "success": not self.failed, "failure": self.failed}[token["name"]]
        found = self.context
        for part in token["name"].split("."):
            found = found.get(part) if isinstance(found, dict) else None
        return found
