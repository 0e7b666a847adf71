"""The page on what is compared says what the table of the comparison says.

`python tests/plans/compare/test_compatibility_page.py` writes its tables again.
"""

from __future__ import annotations

import re
from itertools import groupby
from pathlib import Path
from textwrap import fill

from skillmerge.plans.compare.architectures import DEFAULTS, TEXT_OF
from skillmerge.plans.compare.table import ROWS
from skillmerge.remarks import ACCEPTABLE

DOCS = Path(__file__).parents[3] / "docs"
PAGE = DOCS / "compatibility.md"


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)) + "\n"


def code(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def rows_of_configurations() -> str:
    """One line for the rows of one name and one reason."""
    rows = []
    for (name, level, follows), group in groupby(ROWS, lambda row: (row.name, row.level, row.follows)):
        what = [
            f"{row.what} ({code(row.keys)})" if row.keys and row.keys != (row.what,) else
            f"`{row.what}`" if row.keys else row.what
            for row in group
        ]  # fmt: skip
        rows.append([", ".join(what), level, f"`{name}`" if name else "-", follows])
    return table(["difference", "level", "name for `accept`", "what follows"], rows)


def names_to_accept() -> str:
    return table(["name", "what is accepted"], [[f"`{name}`", meaning] for name, meaning in ACCEPTABLE.items()])


def architectures() -> str:
    held = ", ".join(f"`{kind}` in `{outer}`" for outer, kind in TEXT_OF.items())
    paragraphs = (f"Defaults are known of {code(sorted(DEFAULTS))}.", f"The same language model: {held}.")
    return "\n\n".join(fill(text, 118, break_on_hyphens=False) for text in paragraphs) + "\n"


PARTS = {"configurations": rows_of_configurations, "names": names_to_accept, "architectures": architectures}


def written(page: str) -> str:
    """The page with its tables made again."""
    for part, make in PARTS.items():
        begin, end = f"<!-- {part} -->\n", f"<!-- end of {part} -->"
        head, rest = page.split(begin)
        page = head + begin + make() + end + rest.split(end)[1]
    return page


def test_page_has_the_table_of_today() -> None:
    assert PAGE.read_text() == written(PAGE.read_text())


def test_pages_link_to_it_and_its_links_lead_somewhere() -> None:
    assert "(compatibility.md" in (DOCS / "recipe.md").read_text()
    readme = (DOCS.parent / "README.md").read_text()
    assert "(docs/compatibility.md)" in readme
    assert "(docs/troubleshooting.md)" in readme
    for page in (PAGE, DOCS / "troubleshooting.md"):
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            assert (DOCS / target).exists(), target


def test_troubleshooting_knows_every_name_that_can_be_accepted() -> None:
    text = (DOCS / "troubleshooting.md").read_text()
    assert [name for name in ACCEPTABLE if f"`{name}`" not in text] == []


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
