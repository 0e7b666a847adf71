"""`adapter_config.json`: what PEFT says of an adapter. What would change the meaning of its tensors is refused by key.

Format: `peft.LoraConfig` of PEFT 0.21, whose older versions wrote fewer keys.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from skillmerge.checkpoints.kinds.lora.patterns import Patterns
from skillmerge.checkpoints.store import Store, read_json_object
from skillmerge.errors import InputError, one_line, some

CONFIG_FILE = "adapter_config.json"
MAX_CONFIG_BYTES = 8_000_000
"""Room for a rank of each of 60,000 modules."""
MOST_RANK = 1 << 16
_MOST_PARAMETERS = 64
"""Of `target_parameters`, by the last parts of their names: each may be the one that a pair is for."""

_MERGE = "merge it with the library that made it (peft: `merge_and_unload`), and name that folder as a model"
_CONVERT = (
    "save it as a difference of the unchanged base: `save_pretrained(NEW, "
    "path_initial_model_for_weight_conversion=INITIAL)` in peft"
)
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""How the names of ways to begin start that change the base, so that adapter and base belong to another model."""

_REFUSED = {
    "use_qalora": "QALoRA, whose A works on groups of inputs",
    "use_bdlora": "BD-LoRA, whose matrices are blocks",
    "kasa_config": "KaSA, which changes the base's weights",
    "arrow_config": "Arrow, which routes between adapters",
    "layer_replication": "repeated layers, which the base does not have",
    "alora_invocation_tokens": "aLoRA, which works only after certain tokens",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA, whose weights are random",
}
"""Keys that must not be set, and what they mean."""

_KNOWN = {
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora",
    "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "megatron_config", "megatron_core", "trainable_token_indices", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "use_dora", "qalora_group_size", "runtime_config", "lora_bias", "target_parameters",
    "ensure_weight_tying", "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path",
    "revision", "inference_mode",
}  # fmt: skip
"""Keys that are understood, or do not change what the tensors mean."""


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """The parts of `adapter_config.json` that say what the tensors mean.

    where: the file, in messages. digest: of the file. parameters: the last parts of the names in `target_parameters`.
    weights: those of these names that are of a module's weight. saves: whether modules are saved whole.
    chosen: whether it was told which layers to change. tokens: rows by module, `None` for the input embedding, whatever
    it is called. base: what the adapter says that it was trained on.
    """

    where: str
    digest: bytes
    r: int
    alpha: float
    ranks: Patterns
    alphas: Patterns
    rslora: bool = False
    transposed: bool = False
    parameters: tuple[str, ...] = ()
    weights: frozenset[str] = frozenset()
    dora: bool = False
    biases: bool = False
    saves: bool = False
    chosen: bool = False
    tokens: Mapping[str | None, tuple[int, ...]] = field(default_factory=dict)
    base: str | None = None

    def rank(self, name: str) -> int:
        """Return the rank of a module, or of a parameter of `target_parameters`."""
        found = self.ranks.number(self._key(name))
        return self.r if found is None else int(found)

    def scale(self, name: str) -> float:
        """Return the factor of B A: alpha / r, or alpha / sqrt(r) with rank-stabilized LoRA."""
        found, rank = self.alphas.number(self._key(name)), self.rank(name)
        alpha = self.alpha if found is None else found
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def _key(self, name: str) -> str:
        """Return what patterns call a module's weight: the module, or the parameter if `target_parameters` has it."""
        parts = f"{name}.weight".split(".")
        named = any(".".join(parts[start:]) in self.weights for start in range(len(parts)))
        return f"{name}.weight" if named else name


def read_config(store: Store, file: str) -> LoraConfig:
    """Return what an adapter's configuration says. Raises InputError for what is damaged, or not understood."""
    document, where = read_json_object(store, file, MAX_CONFIG_BYTES), store.at.path(file)
    kind = document.get("peft_type")
    if kind != "LORA":
        raise InputError(f"{where}: `peft_type` is {_shown(kind)}; only LORA can be read as a difference", fix=_MERGE)
    _refuse_keys(document, where)
    rank = document.get("r")
    if not _is_rank(rank):
        raise InputError(f"{where}: `r` is {_shown(rank)}, and a rank is a number from 1 to {MOST_RANK}")
    parameters = _names(document, "target_parameters", where)
    dora = _switch(document, "use_dora", where)
    if dora and parameters:
        raise InputError(f"{where}: sets `use_dora` and `target_parameters`, which do not go together", fix=_MERGE)
    return LoraConfig(
        where=where,
        digest=hashlib.sha256(store.read_small(file, MAX_CONFIG_BYTES)).digest(),
        r=int(rank),  # type: ignore[arg-type]
        alpha=_alpha(document, where),
        ranks=Patterns(f"{where}: `rank_pattern`", _table(document, "rank_pattern", where)),
        alphas=Patterns(f"{where}: `alpha_pattern`", _table(document, "alpha_pattern", where)),
        rslora=_switch(document, "use_rslora", where),
        transposed=_switch(document, "fan_in_fan_out", where),
        dora=dora,
        biases=_switch(document, "lora_bias", where),
        parameters=_endings(parameters, where),
        weights=frozenset(name for name in parameters if name.rpartition(".")[2] == "weight"),
        saves=bool(_names(document, "modules_to_save", where)),
        chosen=document.get("layers_to_transform") is not None,
        tokens=_tokens(document.get("trainable_token_indices"), where),
        base=_base(document),
    )


def _refuse_keys(document: Mapping[str, Any], where: str) -> None:
    for key, what in _REFUSED.items():
        if document.get(key):
            raise InputError(f"{where}: `{key}` is set, which means {what}: that cannot be read", fix=_MERGE)
    begun = document.get("init_lora_weights", True)
    if isinstance(begun, str) and begun.lower().startswith(_CHANGES_BASE):
        raise InputError(
            f"{where}: `init_lora_weights` is `{one_line(begun)}`, which changed the base's weights before training",
            fix=_CONVERT,
        )
    unknown = [f"`{one_line(key)}`" for key, value in document.items() if key not in {*_KNOWN, *_REFUSED} and value]
    if unknown:
        raise InputError(f"{where}: sets {some(unknown)}, which this version does not know", fix=_MERGE)


def _table(document: Mapping[str, Any], key: str, where: str) -> dict[str, float]:
    """Return the numbers of a table of patterns."""
    table = document.get(key) or {}
    if not isinstance(table, dict):
        raise InputError(f"{where}: `{key}` is {_shown(table)}, not a table of numbers")
    for name, value in table.items():
        if key == "rank_pattern" and not _is_rank(value):
            raise InputError(f"{where}: `{key}` gives {name[:80]!r} the rank {_shown(value)}")
        _number(value, f"{key}.{name[:80]}", where)
    return {name: float(value) for name, value in table.items()}


def _number(value: Any, key: str, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e30:
        raise InputError(f"{where}: `{one_line(key)}` is {_shown(value)}, not a number")
    return float(value)


def _alpha(document: Mapping[str, Any], where: str) -> float:
    alpha = _number(document.get("lora_alpha", 8), "lora_alpha", where)
    if alpha == 0:
        raise InputError(
            f"{where}: `lora_alpha` is 0, with which the adapter would add nothing",
            fix="write the `lora_alpha` of the training run into the file; verl's merger leaves 0 there",
        )
    return alpha


def _switch(document: Mapping[str, Any], key: str, where: str) -> bool:
    value = document.get(key)
    if value is not None and not isinstance(value, bool):
        raise InputError(f"{where}: `{key}` is {_shown(value)}, not true or false")
    return value is True


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MOST_RANK


def _names(document: Mapping[str, Any], key: str, where: str) -> list[str]:
    names = document.get(key) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{where}: `{key}` is {_shown(names)}, not a list of names")
    return names


def _endings(names: list[str], where: str) -> tuple[str, ...]:
    """Return the parameters of modules that names end with, each once."""
    endings = tuple(dict.fromkeys(name.rpartition(".")[2] for name in names))
    if len(endings) > _MOST_PARAMETERS:
        raise InputError(
            f"{where}: `target_parameters` names {len(endings)} parameters of modules; the most accepted is "
            f"{_MOST_PARAMETERS}"
        )
    return endings


def _tokens(value: Any, where: str) -> dict[str | None, tuple[int, ...]]:
    """Return the rows of `trainable_token_indices`: a list for the input embedding, or lists by module."""
    tables = {None: value} if isinstance(value, list) else value if isinstance(value, dict) else {}
    if (value and not tables) or not all(
        isinstance(rows, list) and all(type(row) is int and row >= 0 for row in rows) and len(set(rows)) == len(rows)
        for rows in tables.values()
    ):
        raise InputError(f"{where}: `trainable_token_indices` is not a list of rows, each once, or a table of such")
    return {name: tuple(rows) for name, rows in tables.items()}


def _base(document: Mapping[str, Any]) -> str | None:
    base = document.get("base_model_name_or_path")
    return one_line(base) if isinstance(base, str) and base else None


def _shown(value: Any) -> str:
    return one_line(repr(value)[:60])
