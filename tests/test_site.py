"""The documentation's site: it builds, its links lead somewhere, and reading it needs no network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.xdist_group("site")  # it is built once
LOADING = {("link", "href"), ("script", "src"), ("img", "src"), ("source", "src"), ("iframe", "src"), ("use", "href")}
"""Attributes whose address a browser loads by itself; of `link`, those with a `rel` that loads."""


class Page(HTMLParser):
    """The ids, links and loaded addresses of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.ids |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if values.get("rel") in ("canonical", "next", "prev"):
            return
        self.loaded += [value for name, value in values.items() if (tag, name) in LOADING]
        self.loaded += re.findall(r"url\(['\"]?([^'\")]+)", values.get("style", ""))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="needs the extra `docs`")
    pytest.importorskip("mkdocstrings", reason="needs the extra `docs`")
    folder = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--site-dir",
        folder,
    ]  # --quiet would hide the warnings
    variables = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    built = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path.read_text()) for path in site.rglob("*.html") if path.name != "404.html"}


def broken(pages: dict[Path, Page]) -> list[str]:
    """The links that lead nowhere, as `page: link`."""
    found = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            known = target not in pages or not parts.fragment or unquote(parts.fragment) in pages[target].ids
            if not target.exists() or not known:
                found.append(f"{path.name}: {link}")
    return found


def foreign(pages: dict[Path, Page]) -> list[str]:
    """What pages would load from a network, as `page: address`."""
    return [
        f"{path.name}: {address}"
        for path, page in pages.items()
        for address in page.loaded
        if urlsplit(address).netloc or urlsplit(address).scheme not in ("", "data")
    ]


def test_links_lead_to_pages_and_anchors(pages: dict[Path, Page]) -> None:
    assert len(pages) >= 30
    assert broken(pages) == []


def test_pages_load_nothing_from_a_network(site: Path, pages: dict[Path, Page]) -> None:
    assert foreign(pages) == []
    for sheet in site.rglob("*.css"):
        assert re.findall(r"(?:url\(['\"]?|@import ['\"])(https?:|//)[^)]*", sheet.read_text()) == [], sheet.name


def test_the_checks_see_what_is_wrong(tmp_path: Path) -> None:
    page = tmp_path / "a.html"
    page.write_text("<a href='b.html'>b</a><a href='#there'></a><a href='#here' id=here></a><img src=https://a.b/c>")
    pages = {page: Page(page.read_text())}
    assert broken(pages) == ["a.html: b.html", "a.html: #there"]
    assert foreign(pages) == ["a.html: https://a.b/c"]


def test_links_of_the_repository_lead_to_files() -> None:
    """Read as files, without the site, the pages' links work too."""
    sources = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    for source in sources:
        text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", source.read_text(), flags=re.M | re.S)
        for target in re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", text):
            assert (source.parent / target).exists(), f"{source.name}: {target}"
