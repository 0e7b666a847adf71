"""A checkpoint read under other names: prefixes that a recipe replaces, and parts that training libraries leave.

    torch.compile                      model._orig_mod.layers.0…
    FullyShardedDataParallel           _fsdp_wrapped_module.model.layers.0._fsdp_wrapped_module…
    activation checkpointing           model.layers.0._checkpoint_wrapped_module…
    Fabric, DistributedDataParallel    _forward_module.model…, module.model…

Such a part holds nothing: with it or without, the tensor is the same. A wrapper that computes something of its own
(`base_layer`, `parametrizations`) is none of these, and its name stays.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches

from skillmerge.checkpoints.checkpoint import Checkpoint, Naming, Piece, View
from skillmerge.checkpoints.safetensors import printable
from skillmerge.checkpoints.store import Wait
from skillmerge.errors import InputError

WRAPPERS = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FullyShardedDataParallel",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_forward_module": "Lightning Fabric",
    "module": "DistributedDataParallel or DeepSpeed",
}
"""A part of a name -> what adds it. No architecture uses these names for its modules, except the last, which counts
only where all names begin with it."""

_OUTERMOST = "module"
_MOST = 2000
"""Names that are compared with one that is not there."""


class Renamed(View):
    """A checkpoint whose tensors have other names."""

    def __init__(self, checkpoint: Checkpoint, names: Mapping[str, str], naming: Naming) -> None:
        """names: by the stored ones."""
        tensors = {names[name]: replace(spec, name=names[name]) for name, spec in checkpoint.tensors.items()}
        files = {
            file: replace(item, tensors=tuple(names[name] for name in item.tensors))
            for file, item in checkpoint.files.items()
        }
        super().__init__(checkpoint, tensors, files)
        self.naming = naming
        self._stored = {name: stored for stored, name in names.items()}

    def read(self, pieces: Sequence[Piece]) -> Wait:
        stored = self._stored
        return self._checkpoint.read(
            [Piece(stored[it.tensor], it.first, it.count, it.buffer, it.start) for it in pieces]
        )

    def hint(self, tensor: str, first: int, count: int) -> None:
        self._checkpoint.hint(self._stored[tensor], first, count)

    def cost(self, tensor: str) -> int:
        return self._checkpoint.cost(self._stored[tensor])

    def written_dtype(self, tensor: str) -> str:
        return self._checkpoint.written_dtype(self._stored[tensor])

    def costs(self, tensor: str) -> Mapping[str, int]:
        return self._checkpoint.costs(self._stored[tensor])


def read_as(
    name: str, checkpoint: Checkpoint, rename: Sequence[tuple[str, str]], unwrapped: Sequence[str]
) -> Checkpoint:
    """Return the model `name` under other names: without the wrappers, and then with other prefixes, the first rule
    that matches a name winning. Itself where no name changes.

    Raises InputError if two tensors would get the same name, or one a name that no file can hold.
    """
    names = names_as(checkpoint.tensors, rename, unwrapped)
    if all(stored == new for stored, new in names.items()):
        return checkpoint
    taken: dict[str, str] = {}
    for stored, new in names.items():
        if not printable(new):
            raise InputError(f"model `{name}`: `{stored}` would be read as {new[:80]!r}, which is no name for a tensor")
        if (other := taken.setdefault(new, stored)) != stored:
            raise InputError(
                f"model `{name}` ({checkpoint.place}): `{other}` and `{stored}` would both be read as `{new}`",
                fix=f"change the `rename` of model `{name}`" if rename
                else "it holds the same weights twice: save it again from the model inside its wrappers",
            )  # fmt: skip
    return Renamed(checkpoint, names, Naming(tuple(rename), tuple(unwrapped)))


def names_as(stored: Iterable[str], rename: Sequence[tuple[str, str]], unwrapped: Sequence[str]) -> dict[str, str]:
    """Return the names that stored ones are read under."""
    rules = [(_without(old, unwrapped), _without(new, unwrapped)) for old, new in rename]
    return {name: replaced(_without(name, unwrapped), rules) for name in stored}


def wrappers_of(names: Iterable[str]) -> tuple[str, ...]:
    """Return the wrappers that names carry, those of WRAPPERS."""
    names = list(names)
    present = {part for name in names for part in name.split(".")[:-1]} & WRAPPERS.keys() - {_OUTERMOST}
    found = tuple(part for part in WRAPPERS if part in present)
    first = {_without(name, found).partition(".")[0] for name in names}
    return (*found, _OUTERMOST) if first == {_OUTERMOST} else found


def idle_rule(names: Iterable[str], rename: Sequence[tuple[str, str]], unwrapped: Sequence[str]) -> int | None:
    """Return the first rule that decides no tensor's name, or None."""
    prefixes = [_without(old, unwrapped) for old, _ in rename]
    busy = {
        next((index for index, prefix in enumerate(prefixes) if name.startswith(prefix)), None)
        for name in (_without(stored, unwrapped) for stored in names)
    } if rename else set()  # fmt: skip
    return next((index for index in range(len(rename)) if index not in busy), None)


def prefixes_of(names: Iterable[str], unwrapped: Sequence[str]) -> list[str]:
    """Return how names begin, up to the number of a layer."""
    found: dict[str, None] = {}
    for name in names:
        parts = _without(name, unwrapped).split(".")[:-1]
        for count in range(1, len(parts) + 1):
            if parts[count - 1].isdigit():
                break
            found[".".join(parts[:count]) + "."] = None
    return list(found)


def replaced(name: str, rules: Sequence[tuple[str, str]]) -> str:
    """Return the name with another prefix, that of the first rule that matches it."""
    for old, new in rules:
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def _without(name: str, wrappers: Sequence[str]) -> str:
    """Return the name without these parts; the outermost only where it begins with it."""
    if not wrappers:
        return name
    inner = [part for part in name.split(".") if part not in wrappers or part == _OUTERMOST]
    return ".".join(inner[1:] if _OUTERMOST in wrappers and inner[:1] == [_OUTERMOST] else inner)


def nearest(name: str, names: Collection[str]) -> tuple[str, tuple[str, str] | None] | None:
    """Return the name that is most like one that is not there, and the prefixes to replace if the rest is the same."""
    parts = name.split(".")
    for start in range(max(1, len(parts) - 2)):
        ending = "." + ".".join(parts[start:])
        ends = [other for other in names if f".{other}".endswith(ending)]
        if ends:
            # In a model with several towers other names end so too.
            near = ends[0] if len(ends) == 1 else get_close_matches(name, ends[:_MOST], n=1, cutoff=0)[0]
            return near, (name.removesuffix(ending[1:]), near.removesuffix(ending[1:]))
    alike = [other for other in names if other.count(".") == name.count(".")]
    found = get_close_matches(name, alike[:_MOST], n=1, cutoff=0.8)
    return (found[0], None) if found else None
