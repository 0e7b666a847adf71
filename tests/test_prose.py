"""How the documentation reads: short lines, and the words of the glossary."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINE = 120
AVOIDED = {
    r"skill artefacts?": "skill",
    r"cut out|cuts out|was cut|were cut": "extract",
    r"template model": "donor",
    r"asked lambda": "requested lambda",
    r"reali[sz]ed lambda": "effective lambda",
    r"vanished|let through": "lost",
    r"remarks?": "problem, warning, note",
    r"tells?|told": "prints, reports, shows",
    r"to be had|at hand": "available",
    r"stands? in for": "replaces",
    r"lies in|stands in": "is in",
    r"mend|mended|cures?|way out": "fix, help",
    r"anew": "again",
    r"rightly": "correctly",
    r"whoever": "the person's role",
    r"licences?": "license",
    r"behaviour|colour|defence|honoured|organisation|optimiser|randomised|practised": "American spelling",
}
"""A pattern -> what to write. Code is not prose: keys and flags keep their names."""


def prose(path: Path) -> list[tuple[int, str]]:
    """The lines of a page without code blocks, drawings, tables' markup and inline code, with their numbers."""
    found, skipped = [], False
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.startswith(("```", "<svg", "</svg")):
            skipped = not skipped
        elif not skipped:
            found.append((number, line))
    return found


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_lines_of_prose_are_short(path: Path) -> None:
    long = [number for number, line in prose(path) if len(line) > LINE and not line.startswith("|")]
    assert long == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_words_are_those_of_the_glossary(path: Path) -> None:
    found = []
    for number, line in prose(path):
        text = re.sub(r"`[^`]*`|\]\([^)]*\)|<!--.*?-->", "", line)
        for pattern, better in AVOIDED.items():
            if match := re.search(rf"\b(?:{pattern})\b", text, re.I):
                found.append(f"{number}: {match[0]} -> {better}")
    assert found == []


def test_the_checks_see_what_is_wrong(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"{'long ' * 30}\n```\n{'code ' * 30}\n```\nThe vanished share, `vanished`.\n")
    with pytest.raises(AssertionError, match=r"\[1\] == "):
        test_lines_of_prose_are_short(page)
    with pytest.raises(AssertionError, match="5: vanished -> lost"):
        test_words_are_those_of_the_glossary(page)
