"""The layers of a stack in their order, and what each model's `config.json` says of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from skillmerge.checkpoints.model_config import sections
from skillmerge.naming import part_of
from skillmerge.plans.stacks.keys import ALWAYS, LISTED


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer of a stack: the entry of the recipe that asks for it, its model there, and its number in that."""

    entry: int
    model: str
    number: int


class Unsayable(Exception):
    """Something that no configuration can say. entry: of the recipe's stack. fix: what to do."""

    def __init__(self, message: str, entry: int, fix: str | None = None) -> None:
        super().__init__(message)
        self.entry, self.fix = entry, fix


class Order:
    """The layers of a stack. configs, counts: of each of its models; first: that whose configuration it is."""

    def __init__(
        self, layers: Sequence[Layer], configs: Mapping[str, Mapping[str, Any]], counts: Mapping[str, int], first: str
    ) -> None:
        self.layers, self.configs, self.counts, self.first = layers, configs, counts, first
        self._said = {model: said_of(config) for model, config in configs.items()}
        self._numbers: dict[tuple[str, str], set[int]] = {}

    def said(self, model: str, key: str) -> Any:
        """Return what a model's configuration says of its language model, or None."""
        return self._said[model].get(key)

    def everything(self, model: str) -> Mapping[str, Any]:
        """Return all that a model's configuration says of its language model."""
        return self._said[model]

    def numbers(self, model: str, key: str) -> set[int]:
        """Return a list of a model's layers."""
        if (model, key) not in self._numbers:
            said = self.said(model, key)
            self._numbers[model, key] = {it for it in said if type(it) is int} if isinstance(said, list) else set()
        return self._numbers[model, key]

    def table(self, model: str, key: str) -> Mapping[str, Any]:
        """Return a table of a model's layers."""
        said = self.said(model, key)
        return said if isinstance(said, dict) else {}

    def listed(self, key: str) -> bool:
        """Return whether a list replaces a rule, in all models. An empty list with entries for layers is none."""
        lists = [self.said(model, LISTED[key]) for model in self.counts] if key in LISTED else []
        return bool(lists) and all(isinstance(it, list) and (it or LISTED[key] not in ALWAYS) for it in lists)

    def entry(self, model: str) -> int:
        """Return the first entry of the recipe that asks for layers of a model."""
        return next(layer.entry for layer in self.layers if layer.model == model)

    def moved(self) -> Layer | None:
        """Return the first layer that gets another number."""
        return next((layer for place, layer in enumerate(self.layers) if layer.number != place), None)


def said_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a configuration says of its language model; of several values the outermost."""
    found: dict[str, Any] = {}
    for _, section in text_sections(config):
        found = {**section, **found}
    return found


def text_sections(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the sections of a configuration that may be of its language model."""
    return ((where, section) for where, section in sections(config) if part_of(where) == "text")
