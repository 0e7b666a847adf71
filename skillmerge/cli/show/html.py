"""Text and figures as HTML, escaped; the one cell that a tensor belongs to."""

from __future__ import annotations

import html
import re
from typing import Any

from skillmerge.cli.show.figures import Figure
from skillmerge.naming import layer_label, module_kind


def escaped(value: Any) -> str:
    return html.escape(str(value), quote=True)


def prose(value: Any) -> str:
    """A message: what stands in backticks is code."""
    return re.sub(r"`([^`\n]+)`", r"<code>\1</code>", escaped(value))


def abbreviated(figure: Figure) -> str:
    told = f"{figure.formula}\n{figure.meaning}" + (f"\n{figure.source}" if figure.source else "")
    return f'<abbr title="{escaped(told)}">{escaped(figure.label)}</abbr>'


def cell_of(name: str) -> tuple[str, str]:
    return layer_label(name), module_kind(name)
