"""What the methods of mergekit are put together from: parameters as texts of an expression, and the coefficients."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from skillmerge.errors import did_you_mean
from skillmerge.recipes.mergekit.config import Config
from skillmerge.recipes.mergekit.notes import Notes, Refused
from skillmerge.recipes.mergekit.settings import Cell, Choice, Varying, cells, choices, value_in, varying

_SILENT = {"int8_mask"}
_WORDS = {"yes": True, "on": True, "true": True, "1": True, "no": False, "off": False, "false": False, "0": False}
_LARGEST = 1e30
"""Above it, products and sums of parameters are not finite numbers everywhere."""
Check = Callable[[float], float]


class Translation:
    """A document while it is translated: its config, names for its models, and the coefficients that are found.

    taken: further names that the recipe has. used: the parameters that count, and whether for each model by itself.
    """

    def __init__(self, config: Config, names: dict[str, str], notes: Notes, taken: frozenset[str]) -> None:
        self.config, self.names, self.notes = config, names, notes
        self.taken = taken | {*names.values()}
        self.coefficients: dict[str, Varying] = {}
        self.used: set[tuple[str, bool]] = set()

    def name(self, model: str | None) -> str:
        """Return a model's name in the recipe."""
        assert model is not None
        return self.names[model]

    @property
    def base(self) -> str:
        """The base's name. Raises Refused if there is none."""
        if self.config.base is None:
            raise Refused(f"`{self.config.method}` needs a `base_model`", "merge_method", fix="add `base_model`")
        return self.names[self.config.base]

    def setting(
        self, key: str, model: str | None = None, default: Any = None, check: Check | None = None
    ) -> list[tuple[Choice, ...]]:
        """Return what counts for a parameter in each region. check: returns a number as it counts, or raises
        ValueError."""
        self.used.add((key, model is not None))

        def number(value: Any, *path: str | int) -> float:
            found = number_of(value, key, *path)
            try:
                return found if check is None else check(found)
            except ValueError as error:
                raise Refused(f"`{key}` is {error}, and this is {value}", *path) from None

        try:
            return [choices(region.levels_of(model), key, default, number) for region in self.config.regions]
        except Refused as error:
            if model is None or error.path:
                raise
            raise Refused(f"{error} for `{self.names[model]}`", *self._entry(model), fix=error.fix) from None

    def number(self, key: str, model: str | None = None, default: Any = None, **how: Any) -> str:
        """Return a parameter as the text of an expression: a number, or the name of a coefficient."""
        found = varying(self.config.regions, self.setting(key, model, default, **how))
        if not isinstance(found, Varying):
            return written(found)
        called = {"lambda": "lam"}.get(key, key)
        if model is not None and not self._alike(key, default, how):
            called = f"{called}_{self.names[model]}"
        return self._named(called, found)

    def _named(self, name: str, found: Varying) -> str:
        while name in self.taken:
            name += "_"
        self.coefficients[name] = found
        return name

    def flag(self, key: str, default: bool) -> bool:
        """Return a parameter that is yes or no, everywhere the same. Raises Refused."""
        found = varying(self.config.regions, self.setting(key, None, float(default)))
        if isinstance(found, Varying):
            raise Refused(f"a `{key}` that varies has no counterpart", *found.path, fix="give it one value")
        return bool(found)

    def share(self, model: str) -> str:
        """Return a coefficient that is 1 in the slices that have a model, and 0 elsewhere."""
        parts = [(Choice(None, (float(model in region.sources),)),) for region in self.config.regions]
        found = varying(self.config.regions, parts)
        assert isinstance(found, Varying), "every model is in some slices and not in others"
        return self._named(f"layers_of_{self.names[model]}", found)

    def sums(self, key: str) -> list[tuple[Cell, float]]:
        """Return what a parameter of all models but the base, or of all that have it, adds up to everywhere."""
        models = self.config.models if self.config.method == "linear" else self.config.others
        settings = [self.setting(key, model) for model in models]
        return [
            (cell, math.fsum(value_in(setting, cell) for setting in settings))
            for cell in cells(self.config.regions, settings)
        ]

    def note_unused(self) -> None:
        """Add notes on parameters that do nothing."""
        known = {key for key, _ in self.used}
        for region in self.config.regions:
            for model, level in region.sources.items():
                for key in level.table:
                    self._note_own(key, model, (*level.path, key), known)
            for level in region.levels:
                for key in level.table:
                    if key not in known and key not in _SILENT:
                        self._note_unknown(key, (*level.path, key), known)

    def _note_own(self, key: str, model: str, path: tuple[str | int, ...], known: set[str]) -> None:
        value = self.config.document.data
        for part in path:
            value = value[part]
        if key in _SILENT:
            return
        if (key, True) in self.used:
            if model == self.config.base and self.config.method != "linear":
                self.notes.note(f"`{key}` of the base does nothing in mergekit", *path)
        elif key in known:
            shown = f" {value}" if isinstance(value, int | float) and not isinstance(value, bool) else ""
            what = f"`{key}`{shown} under `{path[0]}` does nothing in mergekit; move it if it was meant"
            self.notes.note(what, *path)
        else:
            self._note_unknown(key, path, known)

    def _note_unknown(self, key: str, path: tuple[str | int, ...], known: set[str]) -> None:
        near = did_you_mean(str(key), sorted(known))
        what = f"`{key}` does nothing in mergekit's `{self.config.method}`"
        self.notes.note(f"{what}{f'; {near}' if near else ''}", *path)

    def _alike(self, key: str, default: Any, how: dict[str, Any]) -> bool:
        """Return whether a parameter is the same for all models."""
        models = [model for model in self.config.models if model != self.config.base or self.config.method == "linear"]
        found = [varying(self.config.regions, self.setting(key, model, default, **how)) for model in models]
        rules = [(each.default, each.rules) if isinstance(each, Varying) else each for each in found]
        return all(each == rules[0] for each in rules)

    def _entry(self, model: str) -> tuple[str | int, ...]:
        level = self.config.regions[0].sources.get(model)
        return level.path[:-1] if level is not None else ("base_model",)


def number_of(value: Any, key: str, *path: str | int) -> float:
    """Return the number that a scalar means to mergekit, whose YAML reads `1e-5` as text. Raises Refused."""
    if isinstance(value, str):
        word = _WORDS.get(value.strip().lower())
        if word is not None:
            return float(word)
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise Refused(f"`{key}` is not a number: {value!r}"[:80], *path, fix="write a number, such as 0.5")
    if abs(found) > _LARGEST:
        raise Refused(f"`{key}` is too large: {found:g}", *path, fix="write a number, such as 0.5")
    return found


def written(value: float) -> str:
    """Return a number as a recipe writes it, with all its digits."""
    text = f"{value:g}"
    return text if float(text) == value else repr(value)


def times(factor: str, what: str) -> str:
    return what if factor == "1" else f"{factor} * {what}"


def total(terms: Sequence[str]) -> str:
    """Return a sum."""
    first, *others = terms
    return first + "".join(f" - {term[1:]}" if re.match(r"-[\d.]", term) else f" + {term}" for term in others)
