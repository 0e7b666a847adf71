"""A LoRA adapter: small matrices that PEFT trained beside a model, and what they would add to it.

    adapter_config.json          rank, scale and what was targeted (`config`)
    adapter_model.safetensors    A and B of each module (`parts`)
    NAME/                        the same of a further adapter, in a folder with its name

What is opened here is the files. `views.adapted` puts them onto a model, or makes a difference of them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from skillmerge.checkpoints.checkpoint import Checkpoint, WeightFile
from skillmerge.checkpoints.kinds import dense
from skillmerge.checkpoints.kinds.dense import Dense
from skillmerge.checkpoints.kinds.lora.config import CONFIG_FILE, LoraConfig, read_config
from skillmerge.checkpoints.kinds.lora.parts import Parts, parts_of
from skillmerge.checkpoints.store import Store, read_headers
from skillmerge.errors import NEAR, InputError, did_you_mean, some
from skillmerge.tensors import StoredTensor

WORD, NOUN = "adapter", "a PEFT adapter"
WRITTEN = "{{adapter: {uri}, onto: MODEL}}, or as {{adapter: {uri}}} for its difference"
WEIGHTS, PICKLED = "adapter_model.safetensors", "adapter_model.bin"


class Adapter(Dense):
    """The files of an adapter, whose `tensors` are those that are stored."""

    def __init__(self, opened: Dense, config: LoraConfig, parts: Parts) -> None:
        super().__init__(opened.uri, opened.at, opened.store, {}, opened.tensors, opened.files)
        self.lora, self.parts = config, parts

    @property
    def file(self) -> str:
        """The weight file."""
        return next(iter(self.files))

    @property
    def changed(self) -> list[str]:
        """The tensors that are changed, by its own names, and all parameters that a pair may be for."""
        parameters = (f"{pair.module}.{it}" for pair in self.parts.pairs for it in self.lora.parameters)
        return [*self.parts.names, *parameters]

    def check_unchanged(self, files: Collection[str] | None = None) -> None:
        self.store.check_unchanged([self.file, self.file.replace(WEIGHTS, CONFIG_FILE)])


def claims(store: Store) -> bool:
    """Return whether there is an adapter at the top, and no whole model."""
    return "" in names_in(store) and not dense.claims(store)


def names_in(store: Store) -> list[str]:
    """Return the adapters of a store by name; the one at the top is ""."""
    files = store.list()
    folders = [file.removesuffix(CONFIG_FILE) for file in files if f"/{file}".endswith(f"/{CONFIG_FILE}")]
    return [
        folder.removesuffix("/")
        for folder in folders
        if folder.count("/") < 2 and {f"{folder}{WEIGHTS}", f"{folder}{PICKLED}"} & files.keys()
    ]


def open(uri: str, store: Store, onto: Checkpoint | None = None, name: str = "") -> Adapter:
    """Open the files of an adapter. name: the subfolder of a named one.

    Raises InputError if it is missing, damaged, or not understood.
    """
    files = store.list()
    folder = f"{name}/" if name else ""
    if name not in names_in(store):
        raise _missing(store, name)
    if folder + WEIGHTS not in files:
        raise InputError(
            f"{store.at.path(folder + PICKLED)}: is a pickle, which can run code and is never loaded",
            fix="load the adapter with peft and save it again, which writes safetensors: "
            "`PeftModel.from_pretrained(BASE, FOLDER).save_pretrained(NEW)`",
        )
    config = read_config(store, folder + CONFIG_FILE)
    header = read_headers(store, [folder + WEIGHTS], {folder + WEIGHTS: 1 << 17})[folder + WEIGHTS]
    if not header.tensors:
        raise InputError(f"{store.at.path(folder + WEIGHTS)}: holds no tensors")
    parts = parts_of(header.tensors, config, store.at.path(folder + WEIGHTS))
    listed, stated = files[folder + WEIGHTS], files[folder + CONFIG_FILE]
    file = WeightFile.of(header, listed)
    # What the plan keeps of a header stands for all that says what the tensors are.
    file = replace(file, described=header.raw + config.digest, version=(*listed.version, *stated.version))
    tensors: dict[str, StoredTensor] = {spec.name: spec for spec in header.tensors}
    return Adapter(Dense(uri, store.at, store, {}, tensors, {folder + WEIGHTS: file}), config, parts)


def _missing(store: Store, name: str) -> InputError:
    """Return the error that says why an adapter cannot be opened."""
    names, place = names_in(store), store.at.place
    named = [it for it in names if it]
    if not names:
        if dense.claims(store):
            fix = "write its place alone, without `adapter:`, and subtract the model that it was trained from: rl - sft"
            return InputError(f"{place} is a model, not a PEFT adapter", fix=fix)
        what = f"it has no {CONFIG_FILE} with {WEIGHTS}"
        return InputError(f"{place} is not a PEFT adapter: {what}", fix="name the folder that `save_pretrained` wrote")
    if name:
        fix = did_you_mean(name, named) or (
            f"there are: {some(named, NEAR)}" if named else "leave `name` out: there is only one adapter, at the top"
        )
        return InputError(f"{place} has no adapter named `{name}`", fix=fix)
    return InputError(
        f"{place} has no adapter at the top, but in subfolders: {some(named, NEAR)}",
        fix=f"add its name: `{{adapter: …, name: {named[0]}}}`",
    )
