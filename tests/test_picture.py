"""The README's picture shows what the demo prints now."""

from __future__ import annotations

import runpy
from pathlib import Path

PICTURE = Path(__file__).parent.parent / "docs" / "picture.py"


def test_picture_of_the_demo_is_up_to_date() -> None:
    """Written again by `python docs/picture.py`."""
    found = runpy.run_path(str(PICTURE))["picture"]()
    assert found == PICTURE.with_name("demo.svg").read_text()
    assert "@font-face" not in found
