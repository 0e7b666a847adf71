"""What a translation says: what it refuses, and the warnings and notes it leaves. Knows places in documents only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from skillmerge.errors import RecipeError
from skillmerge.recipes.yamltext import Document, Path
from skillmerge.remarks import Remark


class Refused(Exception):
    """Something that no recipe says. path: the keys that lead to it. fix: what to do."""

    def __init__(self, message: str, *path: str | int, fix: str | None = None) -> None:
        super().__init__(message)
        self.path, self.fix = path, fix


class Notes:
    """Collects the warnings and notes of one document, each once."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.found: list[Remark] = []

    def warn(self, message: str, *path: str | int) -> None:
        """Add what can change the result."""
        self._add("warning", message, path)

    def note(self, message: str, *path: str | int) -> None:
        """Add what is good to know."""
        self._add("note", message, path)

    def _add(self, level: str, message: str, path: Path) -> None:
        place = self.document.keys.get(path) or self.document.values.get(path)
        where = f" (line {place.line + 1})" if place is not None and path else ""
        remark = Remark(level, message + where, of_recipe=True)
        if remark not in self.found:
            self.found.append(remark)

    def error(self, refused: Refused) -> RecipeError:
        """Return the error for something that was refused, with its place."""
        path = refused.path or ("merge_method",)
        place = self.document.keys.get(path) or self.document.place(path)
        return self.document.error(str(refused), place, refused.fix)


def table(data: Any, what: str, *path: str | int) -> Mapping[str, Any]:
    """Return a table; an absent one is empty. Raises Refused."""
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise Refused(f"`{what}` is not a table", *path)
    return data
