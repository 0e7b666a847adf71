"""Which kind of weights a place holds: the table of all kinds, and the one that claims a place's files.

A recipe says whether a place is a model, a skill, a patch or an adapter; which kind of model it is, its files say.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from skillmerge.checkpoints.checkpoint import INDEX_FILE, Checkpoint, Difference, Kind
from skillmerge.checkpoints.foreign import PICKLES, SAVE, recognised
from skillmerge.checkpoints.kinds import dense, patch, skill
from skillmerge.checkpoints.kinds.lora import adapter
from skillmerge.checkpoints.kinds.lora.config import CONFIG_FILE
from skillmerge.checkpoints.store import Store
from skillmerge.checkpoints.stores.folder import Folder
from skillmerge.errors import NEAR, InputError, some

MARKED: tuple[Kind, ...] = (skill, patch, adapter)
"""Kinds that a file of their own marks. A mark goes before plain weights: parts of a skill are weight files too."""

PLAIN: Kind = dense


def open_as(
    word: str, uri: str, store: Store, onto: Checkpoint | None = None, *, name: str | None = None
) -> Checkpoint | Difference:
    """Open what the recipe calls a `model`, `skill`, `patch` (for the model `onto`) or `adapter` (the one with this
    `name`, if it has one). Of an adapter these are its files; `views.adapted` makes weights of them.

    Raises InputError if it is missing, unsafe, damaged, or something else.
    """
    if word == adapter.WORD:
        return adapter.open(uri, store, name=name or "")
    if word != "model":
        return next(kind for kind in MARKED if word == kind.WORD).open(uri, store, onto)
    kind = claimant(store, (*MARKED, PLAIN))
    if word != kind.WORD:
        raise InputError(
            f"{store.at.place} is {kind.NOUN}, not a model",
            fix=f"in a recipe write it as {kind.WRITTEN.format(uri=uri)}",
        )
    return kind.open(uri, store, onto)


def claimant(store: Store, kinds: Sequence[Kind]) -> Kind:
    """Return the one kind that claims a store's files. Raises InputError if there is none, or more than one."""
    claiming = [kind for kind in kinds if kind.claims(store)]
    if len(claiming) > 1 and claiming[-1] is PLAIN:
        claiming.pop()
    if len(claiming) > 1:
        raise InputError(
            f"{store.at.place} is {' and '.join(kind.NOUN for kind in claiming)} at once",
            fix="move the files of one of them away, so that it is clear which is meant",
        )
    if not claiming:
        raise _no_weights(store)
    return claiming[0]


def open_folder(uri: str, root: Path, *, follow_links: bool = False) -> Checkpoint:
    """Open the model in folder `root`. Raises InputError as `open_as` does."""
    opened = open_as("model", uri, Folder(root, follow_links=follow_links))
    assert isinstance(opened, Checkpoint)
    return opened


def _no_weights(store: Store) -> InputError:
    """Return the error that says why nothing in a store can be opened."""
    dense.check_weight_names(store)
    names, place = store.list(), store.at.place
    weights = dense.weight_names(names)
    if not weights and CONFIG_FILE in names:
        return InputError(f"{place} is a PEFT adapter without {adapter.WEIGHTS}", fix="fetch it again")
    # Beside shards without an index only another index tells what they are.
    telling = [name for name in names if name.endswith(".index.json")] if weights else names
    if (known := recognised(telling, place, store.at.root is not None)) is not None:
        return InputError(f"{place} holds {known[0]}, not a model in safetensors", fix=known[1])
    if weights:
        return InputError(
            f"{place} has {len(weights)} *.safetensors files but no {INDEX_FILE}: {some(weights)}",
            fix="the checkpoint is incomplete: fetch its index too",
        )
    pickles = [name for name in names if name.endswith(PICKLES) and "/" not in name]
    if pickles:
        return InputError(
            f"{place} has no *.safetensors, only {some(pickles)}",
            fix=SAVE,
        )
    inner = sorted({name.split("/")[0] for name in names if name.endswith(".safetensors")})
    return InputError(
        f"{place} has no *.safetensors",
        fix=f"did you mean one of its folders: {some(inner, NEAR)}?" if inner else "name a folder that holds a model",
    )
