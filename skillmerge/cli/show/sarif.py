"""Findings of lint as SARIF 2.1.0 (OASIS), which code hosts and editors show beside the lines.

Knows the format and nothing about recipes. Files are named relative to the working folder, which is taken to be the
root of the sources (`%SRCROOT%`); a file outside of it by its whole address.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

from skillmerge.recipes.lint import Finding, Lint
from skillmerge.recipes.lint_rules import RULES, LintRule
from skillmerge.version import __version__

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"


def document(lint: Lint) -> dict[str, Any]:
    """Return a SARIF log of one run."""
    rules = list(RULES.values())
    driver = {
        "name": "skillmerge",
        "semanticVersion": __version__,
        "rules": [_rule(rule) for rule in rules],
    }
    return {
        "$schema": SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {"driver": driver},
                "columnKind": "unicodeCodePoints",
                "artifacts": [{"location": _location(file)} for file in dict.fromkeys(lint.files)],
                "results": [_result(finding, rules.index(finding.rule)) for finding in lint.findings],
            }
        ],
    }


def _rule(rule: LintRule) -> dict[str, Any]:
    return {
        "id": rule.id,
        "name": "".join(word.capitalize() for word in rule.id.split("-")),
        "shortDescription": {"text": rule.title},
        "fullDescription": {"text": rule.help},
        "help": {"text": rule.help, "markdown": rule.help},
        "defaultConfiguration": {"level": rule.level},
    }


def _result(finding: Finding, index: int) -> dict[str, Any]:
    place = finding.place
    region = {"startLine": 1}  # the file as a whole: some readers refuse a result without a line
    if place is not None:
        start = place.column + 1
        region = {"startLine": place.line + 1, "startColumn": start, "endColumn": start + place.width}
    text = finding.message if finding.fix is None else f"{finding.message}\n{finding.fix}"
    return {
        "ruleId": finding.rule.id,
        "ruleIndex": index,
        "level": finding.rule.level,
        "message": {"text": text},
        "locations": [{"physicalLocation": {"artifactLocation": _location(finding.file), "region": region}}],
    }


def _location(file: str) -> dict[str, str]:
    path = Path(os.path.abspath(file))
    if path.is_relative_to(Path.cwd()):
        return {"uri": quote(os.fsencode(path.relative_to(Path.cwd()).as_posix())), "uriBaseId": "%SRCROOT%"}
    return {"uri": path.as_uri()}
