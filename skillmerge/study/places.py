"""What the places that a command names hold: a stored skill, an adapter, or a model."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

from skillmerge.checkpoints.kinds.lora import adapter
from skillmerge.checkpoints.kinds.lora.config import CONFIG_FILE
from skillmerge.checkpoints.kinds.skill import SKILL_FILE
from skillmerge.checkpoints.schemes import is_path, open_store, parse_place
from skillmerge.checkpoints.store import Store
from skillmerge.checkpoints.stores.folder import Folder
from skillmerge.errors import NEAR, UsageError, some
from skillmerge.plans.opening import Access
from skillmerge.recipes.source import RECIPE_SUFFIXES, STANDARD_INPUT, RecipeSource

OF_TWO = "`vocabulary` applies to two models, before and after"


def check_alone(places: Sequence[str], vocabulary: str) -> None:
    """Raise UsageError for what does not go with a recipe."""
    if len(places) > 1 and Path(places[0]).suffix not in RECIPE_SUFFIXES:
        folder = shlex.quote(str(Path(places[0]).parent))
        raise UsageError(f"`{places[0]}` is a file, not a folder", fix=f"name the model's folder: `{folder}`")
    if len(places) > 1:
        raise UsageError(f"{places[0]} is a recipe, which must be the only argument", fix=f"leave {places[1]} out")
    if vocabulary != "by-id":
        raise UsageError(OF_TWO, fix="write it into the recipe: `vocabulary: by-token`")


def is_recipe(source: RecipeSource, alone: bool) -> bool:
    """Return whether a recipe is meant. alone: whether nothing else is named."""
    if isinstance(source, Mapping) or source == STANDARD_INPUT or Path(source).is_file():
        return True
    return alone and is_path(os.fspath(source)) and not Path(source).is_dir() and Path(source).suffix in RECIPE_SUFFIXES


def refuse_alone(uri: str, access: Access) -> None:
    """Raise UsageError for a place that is no update in itself."""
    path = Path(uri)
    if path.is_dir() and not (path / SKILL_FILE).exists() and not adapter.claims(Folder(path)):
        named = [str(path / name) for name in adapter.names_in(Folder(path)) if name]
        raise UsageError(
            f"{path} is a folder, but not a skill",
            fix=f"pass one of its adapters: {some(named, NEAR)}"
            if named
            else "pass two models, before and after, or a recipe, or skills",
        )
    if is_adapter(uri, access) and not is_difference(uri, access):
        raise UsageError(
            f"{uri} replaces parts of its model, so that alone it is no update",
            fix=f"pass its model first: `skillmerge inspect MODEL {uri}`",
        )


def is_skill(uri: str, access: Access) -> bool:
    """Return whether a place holds a stored skill. Raises InputError, TemporaryError if a remote one cannot be
    listed."""
    if is_path(uri):
        return (Path(uri) / SKILL_FILE).is_file()
    store = _remote(uri, access)
    return store is not None and SKILL_FILE in store.list()


def is_adapter(uri: str, access: Access) -> bool:
    """Return whether a place holds an adapter, and no whole model. Raises as `is_skill` does."""
    if is_path(uri):
        return (Path(uri) / CONFIG_FILE).is_file() and adapter.claims(Folder(Path(uri)))
    store = _remote(uri, access)
    return store is not None and adapter.claims(store)


def is_difference(uri: str, access: Access) -> bool:
    """Return whether an adapter adds the same to every model: it replaces nothing, and is no DoRA. Raises as opening it
    does."""
    store = Folder(Path(uri), follow_links=access.follow_links) if is_path(uri) else _remote(uri, access)
    assert store is not None
    with closing(store):
        parts = adapter.open(uri, store).parts
    return not (parts.rows or parts.replaced or any(pair.magnitude for pair in parts.pairs))


def _remote(uri: str, access: Access) -> Store | None:
    """Return the store of a place, or None if opening it says what is wrong with it."""
    try:
        place = parse_place(uri)
    except ValueError:
        return None
    return open_store(place, download=access.download) if place is not None else None
