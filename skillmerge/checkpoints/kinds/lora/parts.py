"""The tensors of an adapter by what they mean: pairs A and B, biases, magnitudes, and tensors and rows that replace.

    M.lora_A.weight [r,in], M.lora_B.weight [out,r]      W + s B A, where W is `M.weight`
    M.lora_A.weight [E r,in], M.lora_B.weight [out,r E]  the same for each of E experts in one parameter of M; A is
                                                         expert-major, B rank-major (`target_parameters`). A second
                                                         parameter of M is `M.base_layer`
    M.lora_embedding_A [r,rows], _B [dim,r]              W + s (B A) transposed
    M.lora_B.bias                                        b + s bias
    M.lora_magnitude_vector                              DoRA: the norms of rows
    M.base_layer.weight                                  a copy of the base's embedding or head, beside a pair for it
    M.base_layer.bias                                    replaces `M.bias`
    M.token_adapter.trainable_tokens_delta [n,dim]       replaces n rows of W, despite its name
    M.token_adapter.base_layer.weight                    a copy of the base's W, beside these rows
    M.modules_to_save.weight                             the same as `M.weight` beside it
    M.original_module.weight                             a copy of what `M.weight` beside it replaces
    any other name                                       replaces that tensor (`modules_to_save`)

Knows names and shapes alone. Every tensor means exactly one of these, or the adapter is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from skillmerge.checkpoints.kinds.lora.config import LoraConfig
from skillmerge.errors import InputError, some
from skillmerge.tensors import DTYPES, StoredTensor

PREFIX = "base_model.model."
_BASE = ".base_layer"
UNLIKE = "weights and configuration are of different adapters: fetch both again"
MERGE = "merge the adapter with peft (`merge_and_unload`), and name that folder as a model"
_AGAIN = "the adapter is incomplete: fetch it again, or save it again with `save_pretrained`"

_ROLES = {
    ".lora_A.weight": "a", ".lora_B.weight": "b", ".lora_B.bias": "bias",
    ".lora_embedding_A": "embedding_a", ".lora_embedding_B": "embedding_b",
    ".lora_magnitude_vector": "magnitude", ".lora_magnitude_vector.weight": "magnitude",
    ".token_adapter.trainable_tokens_delta": "rows", ".token_adapter.base_layer.weight": "rows_copy",
    ".base_layer.weight": "copy", ".base_layer.bias": "replaced_bias",
}  # fmt: skip
_FOREIGN = (".lora_", ".hada_", ".lokr_", ".token_adapter.")
"""Parts of names that only tensors of adapters have. What is not understood of them replaces nothing."""
_OF_STATE = re.compile(r"\.lora_(embedding_)?[AB]\.[^.]+(\.weight)?$")
_SAVE = "a state dict has the adapter's name in its tensors' names: save the adapter with peft's `save_pretrained`"
_SAVED, _ORIGINAL = ".modules_to_save.", ".original_module."
"""What PEFT calls a module of its own and the model's beside it, where it saves an embedding for its new size too."""


@dataclass(frozen=True, slots=True)
class Same:
    """Two tensors of an adapter that have to be the same, or, `turned`, each the transposed other."""

    one: StoredTensor
    other: StoredTensor
    turned: bool = False


@dataclass(frozen=True, slots=True)
class Pair:
    """A and B of one module, `module` without the wrappers in its name, and what belongs to them.

    embedding: their product stands transposed. named: the module as the tensors name it. copies: of the model's own
    matrix, which have to be equal to it. same: what else has to be, for the pair to be for this module.
    """

    module: str
    named: str
    a: StoredTensor
    b: StoredTensor
    embedding: bool = False
    bias: StoredTensor | None = None
    magnitude: StoredTensor | None = None
    copies: tuple[StoredTensor, ...] = ()
    same: tuple[Same, ...] = ()


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a module's weight, and what replaces them. rows: their numbers, each with the row of `values`, in order.
    copies, same: as those of a pair."""

    module: str
    values: StoredTensor
    rows: tuple[tuple[int, int], ...]
    copies: tuple[StoredTensor, ...] = ()
    same: tuple[Same, ...] = ()


@dataclass(frozen=True, slots=True)
class Parts:
    """All that an adapter changes. replaced: by the names of the tensors that they replace. same: what has to be the
    same, by these names."""

    pairs: tuple[Pair, ...] = ()
    rows: tuple[Rows, ...] = ()
    replaced: Mapping[str, StoredTensor] = field(default_factory=dict)
    same: Mapping[str, tuple[Same, ...]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The tensors that are changed, as the adapter calls them."""
        modules = [*(pair.module for pair in self.pairs), *(item.module for item in self.rows)]
        biases = (f"{pair.module}.bias" for pair in self.pairs if pair.bias is not None)
        return [*(f"{module}.weight" for module in modules), *biases, *self.replaced]


def parts_of(tensors: Iterable[StoredTensor], config: LoraConfig, place: str) -> Parts:
    """Return what an adapter's tensors mean. Raises InputError for one that means nothing, or is not alone."""
    modules: dict[str, dict[str, StoredTensor]] = {}
    replaced: dict[str, StoredTensor] = {}
    beside: list[StoredTensor] = []
    for spec in tensors:
        if not spec.name.startswith(PREFIX):
            raise InputError(
                f"{place}: tensor `{spec.name}` does not begin with `{PREFIX}`, as those of PEFT do",
                fix="save the adapter with peft's `save_pretrained`",
            )
        if not DTYPES[spec.dtype].is_float:
            raise InputError(f"{place}: tensor `{spec.name}` holds {spec.dtype}, which is no plain number")
        name = spec.name.removeprefix(PREFIX)
        if _SAVED in name or _ORIGINAL in name:
            beside.append(spec)
            continue
        ending = next((it for it in _ROLES if name.endswith(it)), None)
        if ending is None:
            if any(part in name for part in _FOREIGN):
                fix = _SAVE if _OF_STATE.search(name) else _AGAIN
                raise InputError(f"{place}: what tensor `{spec.name}` means is not known", fix=fix)
            replaced[name] = spec
            continue
        roles = modules.setdefault(name.removesuffix(ending), {})
        if _ROLES[ending] in roles:
            raise InputError(f"{place}: `{roles[_ROLES[ending]].name}` and `{spec.name}` mean the same")
        roles[_ROLES[ending]] = spec
    pairs, rows = [], []
    for named, roles in modules.items():
        if "rows" in roles:
            rows.append(_rows(named, roles.pop("rows"), roles.pop("rows_copy", None), config, place))
        if (bias := roles.pop("replaced_bias", None)) is not None:
            replaced[f"{_plain(named)}.bias"] = bias
        if roles:
            pairs.append(_pair(named, roles, config, place))
    same = _beside(beside, replaced, place)
    for key, said, held in (
        ("modules_to_save", config.saves, bool(replaced)),
        ("trainable_token_indices", any(config.tokens.values()), bool(rows)),
    ):
        if said and not held:
            fix = f"{_AGAIN}; if they were left out on purpose, set it to null"
            raise InputError(f"{place}: has no tensors for `{key}` in {config.where}", fix=fix)
    _refuse_twice(pairs, rows, replaced, config, place)
    return Parts(tuple(pairs), tuple(rows), replaced, same)


def _beside(
    tensors: Iterable[StoredTensor], replaced: Mapping[str, StoredTensor], place: str
) -> dict[str, tuple[Same, ...]]:
    """Return what has to be the same as what replaces a tensor. Raises InputError where nothing does, and for another
    shape."""
    found: dict[str, tuple[Same, ...]] = {}
    for spec in tensors:
        name = spec.name.removeprefix(PREFIX).replace(_SAVED, ".").replace(_ORIGINAL, ".")
        whole = replaced.get(name)
        if whole is None or whole.shape != spec.shape:
            raise InputError(f"{place}: `{spec.name}` has no `{PREFIX}{name}` of its shape beside it", fix=_AGAIN)
        if _SAVED in spec.name:  # what is replaced decides nothing
            found[name] = (*found.get(name, ()), Same(whole, spec))
    return found


def _plain(named: str) -> str:
    """Return a module's name without what peft puts around it."""
    while named.endswith(_BASE):
        named = named.removesuffix(_BASE)
    return named.replace(f"{_BASE}.", ".")


def _pair(named: str, roles: Mapping[str, StoredTensor], config: LoraConfig, place: str) -> Pair:
    """Return a module's A and B. Raises InputError where they do not fit each other, or the configuration."""
    kinds = ("embedding_a", "embedding_b") if "embedding_a" in roles or "embedding_b" in roles else ("a", "b")
    a, b = (roles.get(kind) for kind in kinds)
    if a is None or b is None or {"a", "embedding_a"} <= roles.keys() or {"b", "embedding_b"} <= roles.keys():
        raise InputError(f"{place}: module `{named}` has {_listed(roles.values())} and no pair of A and B", fix=_AGAIN)
    if len(a.shape) != 2 or len(b.shape) != 2:
        if 0 in (*a.shape, *b.shape) or 1 in (len(a.shape), len(b.shape)):
            raise InputError(
                f"{place}: `{a.name}` {list(a.shape)} and `{b.name}` {list(b.shape)} are parts of matrices: they were "
                "saved without being gathered (FSDP, ZeRO 3)",
                fix="save the adapter again, with its parameters gathered",
            )
        raise InputError(f"{place}: `{a.name}` {list(a.shape)} is of a convolution, which is not read", fix=MERGE)
    if a.shape[0] != b.shape[1] or 0 in (*a.shape, *b.shape):
        raise InputError(
            f"{place}: the ranks of `{a.name}` {list(a.shape)} and `{b.name}` {list(b.shape)} contradict each other",
            fix=_AGAIN,
        )
    for kind, key, said in (("magnitude", "use_dora", config.dora), ("bias", "lora_bias", config.biases)):
        vector = roles.get(kind)
        if (vector is not None) != said:
            has = f"has `{vector.name}`" if vector is not None else f"has nothing but {_listed(roles.values())}"
            sets = "sets" if said else "does not set"
            raise InputError(f"{place}: module `{named}` {has}, and {config.where} {sets} `{key}`", fix=UNLIKE)
        if vector is not None and vector.elements != b.shape[0]:
            raise InputError(
                f"{place}: `{vector.name}` {list(vector.shape)} does not fit `{b.name}` {list(b.shape)}", fix=_AGAIN
            )
    copies = (roles["copy"],) if "copy" in roles else ()
    return Pair(_plain(named), named, a, b, kinds[0] != "a", roles.get("bias"), roles.get("magnitude"), copies)


def _rows(named: str, values: StoredTensor, copy: StoredTensor | None, config: LoraConfig, place: str) -> Rows:
    """Return the rows that a module's tokens replace. Raises InputError where the configuration has others."""
    module = _plain(named)
    parts = module.split(".")
    keys = [None, *(".".join(parts[start:]) for start in range(len(parts)))]
    found = [config.tokens[key] for key in keys if key in config.tokens]
    if len(found) != 1:
        raise InputError(f"{config.where}: `trainable_token_indices` does not say which rows `{values.name}` replaces")
    if len(values.shape) != 2 or values.shape[0] != len(found[0]):
        raise InputError(
            f"{place}: `{values.name}` has shape {list(values.shape)}, and `trainable_token_indices` names "
            f"{len(found[0])} rows"
        )
    rows = tuple(sorted((row, index) for index, row in enumerate(found[0])))
    return Rows(module, values, rows, (copy,) if copy is not None else ())


def _refuse_twice(
    pairs: Sequence[Pair], rows: Sequence[Rows], replaced: Mapping[str, StoredTensor], config: LoraConfig, place: str
) -> None:
    """Raise InputError where two parts change one tensor in ways that do not go together."""
    once: dict[str, str] = {}
    for module, name in [
        *((pair.module, pair.a.name) for pair in pairs if not (config.parameters and pair.named != pair.module)),
        *((item.module, item.values.name) for item in rows),
        *((name.removesuffix(".weight"), spec.name) for name, spec in replaced.items() if name.endswith(".weight")),
    ]:
        if module in once:
            raise InputError(f"{place}: `{once[module]}` and `{name}` both change `{module}.weight`")
        once[module] = name
    biases = [pair.module for pair in pairs if pair.bias is not None and f"{pair.module}.bias" in replaced]
    if biases:
        raise InputError(f"{place}: two tensors change {some([f'`{module}.bias`' for module in biases])}")


def _listed(tensors: Iterable[StoredTensor]) -> str:
    return some([f"`{spec.name}`" for spec in tensors], 3)


def weight_of(stored: str) -> str:
    """Return the weight that a stored part of a pair is for, unless it is for another parameter of a module."""
    return f"{_plain(stored.removeprefix(PREFIX).rpartition('.lora_')[0])}.weight"
