"""The report in Chromium: what axe-core finds, at which widths it fits, and what stays in sight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from browser import AXE, CHROMIUM, SCHEMES, WIDTHS, Browser, browser
from sample_pages import sample_pages

pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here"), pytest.mark.xdist_group("look")]

UNFOLD = "document.querySelectorAll('details').forEach((one) => { one.open = true; })"
CUT_OFF = """[...document.querySelectorAll("section:not(:has(.sortable)) > :is(.scroll, .maps > .scroll)")]
  .filter((box) => box.scrollWidth > box.clientWidth).map((box) => box.textContent.slice(0, 60))"""
STICKY = """(() => {
  const box = document.querySelector(".sortable").closest(".scroll"), cell = box.querySelector("tbody th");
  const before = cell.getBoundingClientRect().left;
  box.scrollLeft = 200;
  return [box.scrollLeft, cell.getBoundingClientRect().left - before];
})()"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    folder = tmp_path_factory.mktemp("look")
    found = {}
    for name, text in sample_pages(folder, layers=12).items():
        found[name] = folder / f"{name}.html"
        found[name].write_text(text, encoding="utf-8")
    return found


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as found:
        yield found


@pytest.mark.skipif(not AXE.exists(), reason="no axe-core here: `make .venv/axe`")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["plan", "refused", "skill", "inspect-small", "sweep"])
def test_axe_finds_nothing_serious(pages: Mapping[str, Path], chromium: Browser, name: str, scheme: str) -> None:
    chromium.open(pages[name], WIDTHS[SCHEMES.index(scheme)], scheme)
    assert chromium.serious() == []


@pytest.mark.parametrize("width", WIDTHS)
def test_pages_fit_and_nothing_is_cut_off(pages: Mapping[str, Path], chromium: Browser, width: int) -> None:
    """On a phone, figures by seven kinds of module and more scroll beside their names."""
    for name, page in pages.items():
        chromium.open(page, width, "light")
        assert chromium.run("document.documentElement.scrollWidth - innerWidth") <= 0, name
        cut = chromium.run(CUT_OFF)
        assert [text for text in cut if width > WIDTHS[0] or not text.startswith("figure")] == [], name
        chromium.run(UNFOLD)
        assert chromium.run("document.documentElement.scrollWidth - innerWidth") <= 0, name


def test_the_first_column_stays_in_sight(pages: Mapping[str, Path], chromium: Browser) -> None:
    chromium.open(pages["inspect-small"], 400, "light")
    chromium.run(UNFOLD)
    scrolled, moved = chromium.run(STICKY)
    assert scrolled == 200
    assert moved == pytest.approx(0, abs=1)


def test_a_wide_screen_is_used(pages: Mapping[str, Path], chromium: Browser) -> None:
    """Maps are beside each other, and so are the last tables."""
    chromium.open(pages["inspect-small"], 1920, "light")
    tops = "[...document.querySelectorAll('.maps > .scroll')].map((map) => map.getBoundingClientRect().top)"
    assert len(set(chromium.run(tops))) == 1
    chromium.open(pages["inspect-small"], 400, "light")
    assert len(set(chromium.run(tops))) == 4
