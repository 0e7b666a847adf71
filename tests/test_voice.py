"""The package's texts use the words of its glossary; those that it avoids are here, with their reason."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "skillmerge"

AVOIDED = {
    r"\brealised (lambda|λ|share)\b": "say `effective`; only the manifest's key is `realised`",
    r"\basked (lambda|λ)\b|\(asked: |\basked: ": "say `requested` of lambda, `required` of gates",
    r"\bvanished (share|lambda)\b": "say `lost`; only the manifest's key is `vanished`",
    r"\bskill artefact": "say `skill`",
    r"\bcut (out|from) (of|a|one|the)\b|\bwas cut\b|\bcut skill\b": "say `extract`",
    r"\banew\b": "say `again`, or `recreate`",
    r"\bwhoever\b|\bwhosoever\b": "name who acts",
    r"\bstands? in for\b|\bstands in (their|its) place\b": "say `replaces`",
    r"\b(to|can|could) be had\b|\bat hand\b": "say `available`, or `enough`",
    r"\bmend(s|ed|ing)?\b|\bway out\b": "say `fix`",
    r"\baright\b|\brightly\b": "say `correctly`",
    r"\bgoes? on (from|with|where)\b|\bgoing on with\b": "say `continue`",
    r"\bnothing says\b|\bsay what to do\b": "name the option to pass",
    r"\balready exists already\b|\bexists already\b": "say `already exists`",
    r"\bname another --": "say ``choose another file with `--option` ``",
    r"(?<!there )\bis no (folder|file|sweep|skill|text|number)\b": "say `is not a`",
    r"\blicence(?!\*)": "American spelling: license",
    r"\bcolour|\bneighbour|\boptimiser|\brandomised\b|\bquantisation\b|\blearnt\b|\bspelt\b": "American spelling",
}
EXEMPT = {"realised", "vanished", "asked", "minimise", "quantised"}
"""Words of the contracts: keys of JSON documents and values that code compares."""
OTHER_WORDS = {"recipes/foreign/spellings.py", "cli/usage.py"}
"""What other tools and people write."""


@cache
def texts(path: Path) -> list[tuple[int, str]]:
    """String literals of a module with the numbers of their lines; parts of f-strings apart, keys left out."""
    nodes = ast.walk(ast.parse(path.read_text()))
    found = [(node.lineno, node.value) for node in nodes if isinstance(node, ast.Constant)]
    return [(line, text) for line, text in found if isinstance(text, str) and text not in EXEMPT]


@pytest.mark.parametrize("avoided", AVOIDED)
def test_texts_use_the_words_of_the_glossary(avoided: str) -> None:
    pattern = re.compile(avoided, re.IGNORECASE)
    found = [
        f"{path.relative_to(PACKAGE)}:{line}: {match.group()}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.relative_to(PACKAGE).as_posix() not in OTHER_WORDS
        for line, text in texts(path)
        if (match := pattern.search(text))
    ]
    assert not found, AVOIDED[avoided]
