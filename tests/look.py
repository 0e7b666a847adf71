"""`make look`: pictures of every kind of report, at three widths and in both color schemes, and what axe-core finds."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from browser import AXE, CHROMIUM, SCHEMES, WIDTHS, browser
from sample_pages import sample_pages


def main(folder: Path) -> int:
    if CHROMIUM is None or not AXE.exists():
        print("Chromium or axe-core is missing", file=sys.stderr)
        return 1
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        pages = sample_pages(Path(scratch))
    failed = 0
    with browser() as chromium:
        for name, text in pages.items():
            page = folder / f"{name}.html"
            page.write_text(text, encoding="utf-8")
            for width in WIDTHS:
                for scheme in SCHEMES:
                    chromium.open(page, width, scheme)
                    if width < WIDTHS[-1]:  # what axe finds depends on the scheme, and on what fits
                        found = chromium.serious()
                        failed += len(found)
                        print(f"{name} at {width} pixels, {scheme}: {'; '.join(found) or 'nothing serious'}")
                    chromium.open(page, width, scheme)
                    chromium.picture(folder / f"{name}-{width}-{scheme}.png")
    print(
        f"{len(pages) * len(WIDTHS) * len(SCHEMES)} pictures in {folder}; axe-core finds {failed or 'nothing'} serious"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
