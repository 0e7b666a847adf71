"""The entries of `models:`: what each names (a checkpoint, a stored skill, a sparse patch), and how it is read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from skillmerge.errors import Mistakes, did_you_mean
from skillmerge.recipes.formula.tree import normalise_name
from skillmerge.recipes.tables.recipe import ModelTable, RecipeTable
from skillmerge.recipes.yamltext import Document, Path

KINDS = ("path", "skill", "patch")
"""The keys of an entry that say what is there. Every entry has one of them."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What one name of `models:` stands for."""

    place: str
    """Where it is, as it is written."""
    kind: str = "path"
    """One of KINDS."""
    onto: str | None = None
    """For a patch: the model of the recipe that it is for."""
    renames: tuple[tuple[str, str], ...] = ()
    """Prefixes of the names of its tensors, and their replacements."""


def names_of(document: Document, table: RecipeTable) -> tuple[dict[str, Entry], list[str]]:
    """Return models and coefficients by normalized name; one name means one thing."""
    models: dict[str, Entry] = {}
    coefficients: list[str] = []
    sections = {"models": list(table.models), "coefficients": list(table.coefficients)}
    for section, written in ((section, name) for section, names in sections.items() for name in names):
        path, name = (section, written), normalise_name(written)
        if not name.isidentifier():
            message = f"`{written}` cannot be used as a name"
            fitting = re.sub(r"\W", "_", name)
            fix = f"write `{fitting}`" if fitting.isidentifier() else "use letters, digits, _, and begin with a letter"
            raise document.error(message, document.keys[path], fix)
        if name in models or name in coefficients:
            raise document.error(f"`{written}` already names something else", document.keys[path])
        if section == "models":
            models[name] = _entry(document, path, table.models[written])
        else:
            coefficients.append(name)
    return models, coefficients


def _entry(document: Document, path: tuple[str, str], written: str | ModelTable) -> Entry:
    if isinstance(written, str):
        return Entry(written)
    given = [(kind, value) for kind in KINDS if (value := getattr(written, kind)) is not None]
    place = document.place(path)
    if len(given) != 1:
        what = "more than one" if given else "none"
        kinds = ", ".join(f"`{kind}`" for kind in KINDS)
        raise document.error(f"`{path[1]}` has {what} of {kinds}", place, "keep one of them")
    if (written.patch is None) != (written.onto is None):
        fix = "write {patch: …, onto: …}, the latter a model of this recipe"
        raise document.error("`patch` and `onto` go together", place, fix)
    [(kind, where)] = given
    return Entry(
        place=where,
        kind=kind,
        onto=normalise_name(written.onto) if written.onto else None,
        renames=tuple((rule.from_, rule.to) for rule in written.rename or ()),
    )


def check_models(document: Document, table: RecipeTable, models: Mapping[str, Entry], mistakes: Mistakes) -> None:
    """Check that every name of a model is one, of the kind that is needed there."""
    for path, written, whole in _uses(table):
        entry, place = models.get(normalise_name(written)), document.place(path)
        with mistakes:
            if entry is None:
                fix = did_you_mean(written, list(models)) or f"models of this recipe: {', '.join(models)}"
                raise document.error(f"`{written}` is not a model of this recipe", place, fix)
            if whole and entry.kind == "skill":
                raise document.error(f"`{written}` is a skill, which has no tensors to take", place)
            if path[0] == "models" and entry.kind == "patch":
                raise document.error(f"`{written}` is a patch itself", place, "name a whole model")


def _uses(table: RecipeTable) -> Iterator[tuple[Path, str, bool]]:
    """Yield where the recipe names a model, and whether it has to be one with all its tensors."""
    for index, rule in enumerate(table.copy_):
        yield ("copy", index, "from"), rule.from_, True
    for name, entry in table.models.items():
        if isinstance(entry, ModelTable) and entry.onto:
            yield ("models", name, "onto"), entry.onto, True
    if table.output.like is not None:
        yield ("output", "like"), table.output.like, table.output.kind == "model"
