"""A saved plan's models, opened as far as some tensors of them need it: a few headers, compared with the plan's.

A shard of the output usually has its tensors in files of its own name, so their headers are read first. Only where
they do not hold them all, an index is read. Other kinds than plain weights are small, and opened whole, as are models
that are read in another layout than they are stored in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from skillmerge.checkpoints.checkpoint import INDEX_FILE, Checkpoint, WeightFile
from skillmerge.checkpoints.kinds.dense import Dense, read_index
from skillmerge.checkpoints.place import Local, ModelPlace
from skillmerge.checkpoints.safetensors import Header
from skillmerge.checkpoints.schemes import open_store
from skillmerge.checkpoints.store import Stat, Store, read_headers
from skillmerge.checkpoints.views.renamed import names_as, read_as
from skillmerge.errors import some
from skillmerge.methods.terms import model_of
from skillmerge.plans.aligned import aligned
from skillmerge.plans.models.adapting import as_differences
from skillmerge.plans.opening import Access, as_read, close_all, open_all, refuse_missing
from skillmerge.plans.saved import SavedPlan
from skillmerge.plans.vocabulary.by_token import by_token
from skillmerge.recipes.recipe import Recipe

_HEADER_BYTES = 1 << 17
"""How much of a file is asked for in one request, in which its header usually is."""


def open_parts(
    saved: SavedPlan, needed: Mapping[str, Collection[str]], shards: Sequence[str], access: Access
) -> dict[str, Checkpoint]:
    """Return the models of some shards of a saved plan, open.

    needed: the tensors that are read, by the plan's names of models. Raises StalePlan where a file of them is not the
    planned one; RecipeError, InputError, TemporaryError.
    """
    recipe = saved.recipe
    asked = {model_of(name) for name in needed}
    names = [name for name in recipe.stored_models() if name in asked]
    whole = {name for name in names if name in recipe.skills or name in recipe.patches}
    whole |= {onto for patch, onto in recipe.patches.items()}
    whole |= {*recipe.used_models()} if recipe.by_token else set()  # rows of one model depend on the others' tokens
    if recipe.donor is not None and any(recipe.entries[name].kind == "adapter" for name in names):
        whole.add(recipe.donor)  # whose tensors the differences of adapters have
    if recipe.makes_adapter:
        names = list(recipe.stored_models())  # what one has in the output depends on all of them
        whole |= {*recipe.used_models()}
    if arranged := {name for name in asked if input_of(saved, name).get("layout")}:
        # All of the donor's tensors tell its layout, those that the output does without too.
        whole |= {*arranged, *filter(None, [recipe.donor])}
    whole |= _beneath(recipe, asked | whole)
    places = {name: _at_commit(saved, name) for name in recipe.stored_models() if name in {*names, *whole}}
    refuse_missing(recipe, places, access)
    opened: dict[str, Checkpoint] = {}
    try:
        opened |= open_all(recipe, {it: places[it] for it in places if it in whole}, access)
        opened |= as_differences(recipe, aligned(recipe, as_read(recipe, opened)))
        for name in names:
            if name not in whole:
                opened[name] = _Part(saved, name, places[name], access).open(needed[name], shards)
        opened = by_token(recipe, opened)
        _compare(saved, opened)
        return opened
    except BaseException:
        close_all(opened)
        raise


def _beneath(recipe: Recipe, names: Collection[str]) -> set[str]:
    """Return the models that stacks among these are made of, whose layers can be in any of their files."""
    found: set[str] = set()
    for name, parts in reversed(recipe.stacks.items()):
        if name in names or name in found:
            found |= {part.model for part in parts}
    return found


def _at_commit(saved: SavedPlan, name: str) -> ModelPlace:
    place = saved.recipe.model_place(name)
    return place.at(saved.commits[name]) if place.versioned and name in saved.commits else place


@dataclass(frozen=True, slots=True)
class _Part:
    """A model of plain weights that is opened in part."""

    saved: SavedPlan
    name: str
    place: ModelPlace
    access: Access

    def open(self, needed: Collection[str], shards: Sequence[str]) -> Checkpoint:
        """Open the files that hold these tensors. shards: of the output."""
        files = [row["name"] for row in input_of(self.saved, self.name)["files"]]
        likely = files if len(files) == 1 else [shard for shard in shards if shard in files]
        store = self._store(self._known() if likely else None)
        try:
            headers = self._headers(store, likely, needed)
            if missing := set(needed) - self._names(headers):
                if (full := self._listed(store)) is not store:
                    store.close()
                    store = full
                headers |= self._headers(store, self._files_of(store, missing, files), missing)
            if missing := set(needed) - self._names(headers):
                what = f"model {self.name}: it no longer holds {some(sorted(missing), 3)}"
                raise self.saved.stale([what])
            used = {file: it for file, it in headers.items() if self._names({file: it}) & set(needed)}
            return self._checkpoint(store, used)
        except BaseException:
            store.close()
            raise

    def _known(self) -> Mapping[str, Stat] | None:
        """Return the files of a commit as the plan has them, if it is one; of a folder nothing is known before."""
        if isinstance(self.place, Local):
            return None
        known = {}
        for file, version in self.saved.document["versions"].get(self.name, {}).items():
            with suppress(ValueError, TypeError):
                size, kind, digest = version
                known[file] = Stat(size, tuple(version), (kind, digest))
        return known or None

    def _store(self, known: Mapping[str, Stat] | None) -> Store:
        return open_store(self.place, follow_links=self.access.follow_links, download=self.access.download, known=known)

    def _listed(self, store: Store) -> Store:
        """Return the store with all of its files: the given one, if it has listed them."""
        return store if isinstance(self.place, Local) or INDEX_FILE in store.list() else self._store(None)

    def _headers(self, store: Store, files: Sequence[str], needed: Collection[str]) -> dict[str, Header]:
        """Read the headers of files. Raises StalePlan where one is not there."""
        gone = [file for file in files if file not in store.list()]
        if gone:
            raise self.saved.stale([f"model {self.name}: it no longer has {some(gone)}"])
        size = max(_HEADER_BYTES, 4096 + sum(160 + len(name.encode()) for name in needed))
        return read_headers(store, files, dict.fromkeys(files, size))

    def _files_of(self, store: Store, missing: Collection[str], files: Collection[str]) -> list[str]:
        """Return which of the planned files hold these tensors, by the index."""
        if INDEX_FILE not in store.list():
            return []
        index = read_index(store)
        names = self._read_as(index)
        return sorted({file for stored, file in index.items() if names[stored] in missing and file in files})

    def _read_as(self, stored: Iterable[str]) -> dict[str, str]:
        recipe = self.saved.recipe
        return names_as(stored, recipe.entries[self.name].renames, (recipe.unwrapped or {}).get(self.name, ()))

    def _names(self, headers: Mapping[str, Header]) -> set[str]:
        return set(self._read_as(spec.name for header in headers.values() for spec in header.tensors).values())

    def _checkpoint(self, store: Store, headers: Mapping[str, Header]) -> Checkpoint:
        recipe = self.saved.recipe
        tensors = {spec.name: spec for header in headers.values() for spec in header.tensors}
        files = {file: WeightFile.of(header, store.list()[file]) for file, header in headers.items()}
        found = Dense(recipe.models[self.name], store.at, store, {}, tensors, files)
        return read_as(self.name, found, recipe.entries[self.name].renames, (recipe.unwrapped or {}).get(self.name, ()))


def input_of(saved: SavedPlan, name: str) -> Mapping[str, Any]:
    """Return what the plan has of a model."""
    return next(item for item in saved.document["inputs"] if item["name"] == name)


def _compare(saved: SavedPlan, opened: Mapping[str, Checkpoint]) -> None:
    """Raise StalePlan where a file that was opened is not the one that was planned."""
    changes = []
    for name, checkpoint in opened.items():
        versions = saved.document["versions"].get(name, {})
        again = [file for file, it in checkpoint.files.items() if versions.get(file) != list(it.version)]
        if again:
            changes.append(f"model {name}: rewritten since: {some(sorted(again))}")
        if name == model_of(name):
            planned = {row["name"]: row["header_sha256"] for row in input_of(saved, name)["files"]}
            found = {file: hashlib.sha256(it.described).hexdigest() for file, it in checkpoint.files.items()}
            if other := sorted(file for file in found if planned.get(file) != found[file]):
                what = "tensors, sizes or tokens" if saved.recipe.by_token else "tensors or sizes"
                changes.append(f"model {name}: other {what} in {some(other)}")
    if changes:
        raise saved.stale(changes)
