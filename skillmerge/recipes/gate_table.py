"""The table `gates:` of a recipe or a separate file -> the checks that an output must pass.

Text only: `study.gates` measures.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path as FilePath

from skillmerge.recipes.formula.tree import normalise_name
from skillmerge.recipes.tables.gates import CosineTable, FigureTable, GatesTable, RangeTable
from skillmerge.recipes.yamltext import Document

GATE_FIGURES = ("changed", "vanished", "realised", "realised_lambda", "norm_ratio")
"""Gates on what `apply` has measured; the manifest holds it."""
PROOFS = ("finite", "loads", "finite_logits")
"""Gates that hold or do not."""


@dataclass(frozen=True, slots=True)
class Gate:
    """The required range of one figure of an output.

    kind: a key of `gates:`. minimum, maximum: both ends included, except that a default `changed` is more than 0.
    modules: kinds of module, each by itself; empty for the whole model. by: `block` where each layer and kind of module
    has to hold. name, run, score, timeout (seconds): of a command; name also of a runtime other than transformers.
    text: the file of a perplexity. model: what it is compared with, a name of the recipe or a place. folder: what
    relative paths start from, and where commands run.
    """

    kind: str
    folder: FilePath
    minimum: float | None = None
    maximum: float | None = None
    modules: tuple[str, ...] = ()
    by: str = ""
    is_default: bool = False
    is_ratio: bool = False
    name: str = ""
    run: str = ""
    score: str | None = None
    timeout: float = 3600.0
    text: FilePath | None = None
    model: str | None = None

    @property
    def asked(self) -> str:
        """In words: `0.9 to 1.1`, `at most 0.3`."""
        if self.kind in PROOFS:
            return "yes"
        if self.is_default:
            return "more than 0"
        of = f" of {self.model or 'the donor'}'s" if self.is_ratio else ""
        if self.minimum is not None and self.maximum is not None:
            return f"{self.minimum:g} to {self.maximum:g}{of}"
        return f"at least {self.minimum:g}{of}" if self.minimum is not None else f"at most {self.maximum:g}{of}"

    @property
    def told(self) -> str:
        """The gate in one line, with the command that it runs."""
        where = (f" by {self.by}" if self.by else "") + (f" of {', '.join(self.modules)}" if self.modules else "")
        what = (
            f" {self.name}" + (f", which runs `{' '.join(self.run.split())}`" if self.run else "") if self.name else ""
        )
        return f"{self.kind}{where}{what}: {self.asked}"

    def excess(self, measured: float) -> float:
        """Return how far outside of what is asked a figure is; less than 0 inside."""
        below = self.minimum - measured if self.minimum is not None else -math.inf
        above = measured - self.maximum if self.maximum is not None else -math.inf
        return max(below, above)

    def holds(self, measured: float) -> bool:
        if self.is_default:
            return measured > 0
        return (self.minimum is None or measured >= self.minimum) and (self.maximum is None or measured <= self.maximum)


def gates_of(table: GatesTable | None, document: Document, folder: FilePath) -> tuple[Gate, ...]:
    """Return the gates of a table; none without one. Raises RecipeError for gates that ask for nothing."""
    if table is None:
        return ()
    return tuple(_gates_of(table, document, folder))


def _gates_of(table: GatesTable, document: Document, folder: FilePath) -> Iterable[Gate]:
    # A recipe with gates should not pass if the merge did nothing.
    if table.changed is None:
        yield Gate("changed", folder, is_default=True)
    for kind in (*GATE_FIGURES, "cosine_z"):
        given: RangeTable | None = getattr(table, kind)
        if given is not None:
            _check_range(document, (kind,), given.min, given.max)
            model = given.base if isinstance(given, CosineTable) else None
            if model is not None:
                _expanded(document, (kind, "base"), model)
            modules = (given.modules,) if isinstance(given.modules, str) else tuple(given.modules or ())
            by = given.by or "" if isinstance(given, FigureTable) else ""
            yield Gate(kind, folder, given.min, given.max, modules, by, model=model)
    for kind in PROOFS:
        asked: bool | list[str] = getattr(table, kind)
        runtimes = ["transformers"] * asked if isinstance(asked, bool) else list(dict.fromkeys(asked))
        for name in runtimes:
            yield Gate(kind, folder, name="" if name == "transformers" else name)
    if (given_text := table.perplexity) is not None:
        if given_text.max is None and given_text.max_ratio is None:
            _refuse(document, ("perplexity",), "requires nothing", "add `max` or `max_ratio`")
        text = folder / _expanded(document, ("perplexity", "text"), given_text.text)
        model = normalise_name(given_text.of) if given_text.of else None
        for most, is_ratio in ((given_text.max, False), (given_text.max_ratio, True)):
            if most is not None:
                yield Gate("perplexity", folder, maximum=most, is_ratio=is_ratio, text=text, model=model)
    for index, command in enumerate(table.commands):
        _check_range(document, ("commands", index), command.min, command.max)
        name = " ".join((command.name or command.run).split())
        yield Gate(
            "command", folder, command.min, command.max,
            name=name, run=command.run, score=command.score, timeout=command.timeout,
        )  # fmt: skip


def _expanded(document: Document, path: tuple[int | str, ...], written: str) -> FilePath:
    try:
        return FilePath(written).expanduser()
    except RuntimeError as error:
        place = document.place(("gates", *path))
        raise document.error(f"`{written}` is in a home folder that does not exist", place) from error


def _check_range(document: Document, path: tuple[int | str, ...], low: float | None, high: float | None) -> None:
    if low is None and high is None:
        _refuse(document, path, "requires nothing", "add `min`, `max`, or both")
    if low is not None and high is not None and low > high:
        _refuse(document, path, f"can never pass: min {low:g} is more than max {high:g}", None)


def _refuse(document: Document, path: tuple[int | str, ...], message: str, fix: str | None) -> None:
    what = f"`{path[0]}`" if len(path) == 1 else "this command"
    raise document.error(f"the gate {what} {message}", document.place(("gates", *path)), fix)
