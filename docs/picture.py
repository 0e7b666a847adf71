"""Draw the picture of the README: what `skillmerge demo` prints at its end, as an SVG without fonts of a network.

python docs/picture.py
"""

from __future__ import annotations

import io
import re
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

from skillmerge.cli.show.starting import show_answers
from skillmerge.verbs.demo.demo import demo, examples

PICTURE = Path(__file__).parent / "demo.svg"
WIDTH = 64
_FONTS = re.compile(r"@font-face \{.*?\}\s*", re.S)
_FAMILY = re.compile(r"font-family: Fira Code, monospace")


def picture() -> str:
    """Run the demo in a folder of its own, and return the picture of its end."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, highlight=False)
    with tempfile.TemporaryDirectory() as folder:
        done = demo(str(Path(folder) / "demo"))
        console.print(Text("$ skillmerge demo", style="bold"))
        show_answers(done.answers, examples(done.answers[0], done.answers[-1]), console)
    svg = console.export_svg(title="skillmerge demo", unique_id="demo")
    return _FAMILY.sub("font-family: ui-monospace, Menlo, Consolas, monospace", _FONTS.sub("", svg))


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
    print(f"wrote {PICTURE}")
