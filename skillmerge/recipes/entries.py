"""The entries of `models:`: what each names (a checkpoint, a stored skill, a patch, an adapter, a stack of layers), and
how it is read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from skillmerge.errors import Mistakes, did_you_mean, some
from skillmerge.recipes.formula.tree import normalise_name
from skillmerge.recipes.schedules import Numbers, parse_numbers
from skillmerge.recipes.tables.models import ModelTable
from skillmerge.recipes.tables.recipe import RecipeTable
from skillmerge.recipes.yamltext import Document, Path

KINDS = ("path", "skill", "patch", "adapter", "stack")
"""The keys of an entry that say what is there. Every entry has one of them."""

_SHOWN = 5
"""Most stacks of a circle, and most ranges of layers, that are named."""


@dataclass(frozen=True, slots=True)
class Part:
    """Layers of one model of the recipe, which come next in a stack."""

    model: str
    layers: tuple[Numbers, ...]

    def __str__(self) -> str:
        layers = ",".join(map(str, self.layers[:_SHOWN])) + ("…" if len(self.layers) > _SHOWN else "")
        return " ".join([self.model, *([layers] if self.layers != _ALL else ())])


_ALL = (Numbers(0, None),)


@dataclass(frozen=True, slots=True)
class Entry:
    """What one name of `models:` stands for."""

    place: str
    """Where it is, as it is written; of a stack, what it is made of."""
    kind: str = "path"
    """One of KINDS."""
    onto: str | None = None
    """For a patch, and an adapter that is read as a model: the model of the recipe that it is put onto."""
    renames: tuple[tuple[str, str], ...] = ()
    """Prefixes of the names of its tensors, and their replacements."""
    adapter: str | None = None
    """For an adapter: its name, where it is not the one at the top."""
    stack: tuple[Part, ...] = ()
    """For a stack: its layers, from the first."""

    @property
    def is_difference(self) -> bool:
        """Whether it is no model: a stored skill, or an adapter alone."""
        return self.kind == "skill" or (self.kind == "adapter" and self.onto is None)

    @property
    def is_made(self) -> bool:
        """Whether it is made of other models of the recipe, so that to write it out alone is no copy."""
        return self.onto is not None or bool(self.stack)


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
        both = {kind for kind, _ in given} == {"path", "adapter"}
        fix = "keep one of them" if given else "write where it is: `path: ./folder`, or the key of what lies there"
        fix = "name the model in `onto`: `{adapter: …, onto: NAME}`" if both else fix
        raise document.error(f"`{path[1]}` has {what} of {kinds}", place, fix)
    [(kind, where)] = given
    if (kind == "patch") != (written.onto is not None) and kind != "adapter":
        fix = "write {patch: …, onto: …}, the latter a model of this recipe"
        raise document.error("`patch` and `onto` go together", place, fix)
    if written.name is not None and kind != "adapter":
        raise document.error("only an adapter has a `name`", document.place((*path, "name")), "leave it out")
    stack = _stack(document, path, written)
    return Entry(
        place=f"stack of {some([str(part) for part in stack], 6)}" if stack else where,
        kind=kind,
        onto=normalise_name(written.onto) if written.onto else None,
        renames=tuple((rule.from_, rule.to) for rule in written.rename or ()),
        adapter=written.name,
        stack=stack,
    )


def _stack(document: Document, path: tuple[str, str], written: ModelTable) -> tuple[Part, ...]:
    """Return the parts of a stack."""
    if written.stack and written.rename:
        fix = "give it to the models that the stack is made of"
        raise document.error("a stack has no `rename`", document.place((*path, "rename")), fix)
    found = []
    for index, part in enumerate(written.stack or ()):
        ranges: list[Numbers] = []
        for text in part.layers if isinstance(part.layers, list) else [part.layers]:
            try:
                ranges += parse_numbers(str(text)) if text is not None else _ALL
            except ValueError as error:
                what, _, fix = str(error).partition("; ")
                place = document.place((*path, "stack", index, "layers"))
                raise document.error(what, place, fix or "for all layers, leave `layers` out") from error
        found.append(Part(normalise_name(part.from_), tuple(ranges)))
    return tuple(found)


def check_models(document: Document, table: RecipeTable, models: Mapping[str, Entry], mistakes: Mistakes) -> None:
    """Check that every name of a model is one, of the kind that is needed there."""
    for path, written, whole in _uses(table):
        entry, place = models.get(normalise_name(written)), document.place(path)
        with mistakes:
            if entry is None:
                fix = did_you_mean(written, list(models)) or _named_first(written, path, models)
                raise document.error(f"`{written}` is not a model of this recipe", place, fix)
            if whole and entry.is_difference:
                kind = "an adapter" if entry.kind == "adapter" else "a skill"
                advice = "give it `onto:`, a model" if entry.kind == "adapter" else None
                raise document.error(f"`{written}` is {kind}, which has no tensors to take", place, advice)
            if path[-1] == "onto" and entry.kind in ("patch", "stack"):
                onto = "the models that it is made of" if entry.kind == "stack" else "a whole model"
                raise document.error(f"`{written}` is a {entry.kind} itself", place, f"put it onto {onto}")
    with mistakes:
        _refuse_circles(document, table, models)
    with mistakes:
        _refuse_circular_stacks(document, table, models)


def _named_first(written: str, path: Path, models: Mapping[str, Entry]) -> str:
    """Return what to do about a name that no model has."""
    named = next((name for name, entry in models.items() if entry.place == written), None)
    if named is not None:
        return f"write its name: `{path[-1]}: {named}`"
    others = ", ".join(name for name in models if name not in path)
    if "/" not in written:
        return f"models of this recipe: {others}"
    return f"give it a name: add `NAME: {written}` under `models`, and write `{path[-1]}: NAME`"


def _refuse_circles(document: Document, table: RecipeTable, models: Mapping[str, Entry]) -> None:
    """Raise RecipeError for an adapter that is put onto itself, by way of others or not."""
    for written in table.models:
        seen: list[str] = []
        name: str | None = normalise_name(written)
        while name is not None and name in models and name not in seen:
            seen.append(name)
            name = models[name].onto
        if name == normalise_name(written):
            way = " onto ".join(f"`{it}`" for it in (*seen, name))
            raise document.error(f"{way}: a circle", document.place(("models", written, "onto")), "name a whole model")


def stacks_in_order(models: Mapping[str, Entry]) -> dict[str, tuple[Part, ...]]:
    """Return the stacks, each behind those that it is made of; without those that are made of themselves."""
    left = {name: {part.model for part in entry.stack} for name, entry in models.items() if entry.stack}
    above: dict[str, list[str]] = {}
    for name, parts in left.items():
        for part in parts & left.keys():
            above.setdefault(part, []).append(name)
    waits = {name: len(parts & left.keys()) for name, parts in left.items()}
    ready = [name for name, count in waits.items() if not count]
    for name in ready:  # which grows
        for other in above.get(name, ()):
            waits[other] -= 1
            ready += [other] if not waits[other] else []
    return {name: models[name].stack for name in ready}


def _refuse_circular_stacks(document: Document, table: RecipeTable, models: Mapping[str, Entry]) -> None:
    """Refuse a stack that is made of itself, whatever is between."""
    ordered = stacks_in_order(models)
    left = {name: entry.stack for name, entry in models.items() if entry.stack and name not in ordered}
    if not left:
        return
    seen: list[str] = [next(iter(left))]
    while seen[-1] not in seen[:-1]:
        seen.append(next(part.model for part in left[seen[-1]] if part.model in left))
    circle = seen[seen.index(seen[-1]) :]
    index = next(index for index, part in enumerate(left[circle[0]]) if part.model == circle[1])
    written = next(name for name in table.models if normalise_name(name) == circle[0])
    way = (
        " is made of ".join(f"`{name}`" for name in circle)
        if len(circle) <= _SHOWN
        else f"`{circle[0]}` is made of itself"
    )
    place = document.place(("models", written, "stack", index, "from"))
    raise document.error(f"a stack cannot be made of itself: {way}", place, "make it of other models of the recipe")


def _uses(table: RecipeTable) -> Iterator[tuple[Path, str, bool]]:
    """Yield where the recipe names a model, and whether it has to be one with all its tensors."""
    for index, rule in enumerate(table.copy_):
        yield ("copy", index, "from"), rule.from_, True
    for token, row in table.tokens.items():
        yield ("tokens", token, "from"), row.from_, True
    for name, entry in table.models.items():
        if isinstance(entry, ModelTable) and entry.onto:
            yield ("models", name, "onto"), entry.onto, True
        if isinstance(entry, ModelTable):
            for index, part in enumerate(entry.stack or ()):
                yield ("models", name, "stack", index, "from"), part.from_, True
    if table.output.like is not None:
        yield ("output", "like"), table.output.like, table.output.kind == "model"
