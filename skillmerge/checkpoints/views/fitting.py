"""An adapter's parts on a model's tensors: which tensor each changes, and how. Knows names and shapes alone.

Every part finds exactly one tensor (and a tied head beside it), or the adapter is not for this model.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.checkpoints.kinds.lora.adapter import Adapter
from skillmerge.checkpoints.kinds.lora.parts import Pair, Rows
from skillmerge.checkpoints.model_config import ties_embeddings
from skillmerge.checkpoints.views.renamed import replaced
from skillmerge.errors import InputError, some
from skillmerge.naming import module_kind
from skillmerge.tensors import DTYPES, StoredTensor, TensorSpec

_MOST_ELEMENTS = 1 << 36
"""Of one tensor that only an adapter describes: more than any model has."""
_OTHER = "name the model that the adapter was trained on, or read its modules under other names with `rename`"


@dataclass(frozen=True, slots=True)
class Product:
    """s B A, of one matrix or of each expert in a stack of them: [experts, rows, columns] in the order of the tensor.

    transposed: rows are A's inputs, and columns B's outputs.
    """

    pair: Pair
    scale: float
    experts: int
    rows: int
    columns: int
    transposed: bool

    @property
    def rank(self) -> int:
        return self.pair.a.shape[0] // self.experts


@dataclass(frozen=True, slots=True)
class Change:
    """What an adapter does to one tensor. Exactly one of its parts is not None.

    product: is added; with a magnitude, rows are scaled after that. arranged: what is added, in float64 and under the
    tensor's name, where the adapter has it in another layout. bias: is added, times `scale`. whole: replaces the
    tensor. rows: replace some of its rows.
    """

    product: Product | None = None
    arranged: Checkpoint | None = None
    bias: StoredTensor | None = None
    scale: float = 1.0
    whole: StoredTensor | None = None
    rows: Rows | None = None

    @property
    def stored(self) -> list[StoredTensor]:
        """The adapter's tensors that it is made of."""
        if self.product is not None:
            pair = self.product.pair
            return [it for it in (pair.a, pair.b, pair.magnitude) if it is not None]
        if self.rows is not None:
            return [self.rows.values]
        return [it for it in (self.bias, self.whole) if it is not None]


@dataclass(frozen=True, slots=True)
class Model:
    """What an adapter is fitted to. said: what messages call it."""

    said: str
    tensors: Mapping[str, TensorSpec]
    config: Mapping[str, Any]


def own_tensors(adapter: Adapter, rename: Sequence[tuple[str, str]]) -> dict[str, TensorSpec]:
    """Return the tensors that an adapter alone describes: those that it changes. Raises InputError for one that is
    larger than any model's, or whose name is not known without a model."""
    found: dict[str, TensorSpec] = {}
    for pair in adapter.parts.pairs:
        (rank, inputs), outputs = pair.a.shape, pair.b.shape[0]
        if rank != adapter.lora.rank(pair.module):
            raise _rank_error(adapter, pair, "parameters of several experts, " if adapter.lora.parameters else "")
        swapped = pair.embedding or adapter.lora.transposed
        shape = (inputs, outputs) if swapped else (outputs, inputs)
        if math.prod(shape) > _MOST_ELEMENTS:
            raise InputError(f"{adapter.at.path(adapter.file)}: `{pair.a.name}` makes a matrix of shape {list(shape)}")
        for ending, size in ((".weight", shape), (".bias", (outputs,)) if pair.bias else ("", ())):
            name = replaced(pair.module + ending, rename)
            if ending:
                found[name] = TensorSpec(name, "F32", size, adapter.file)
    return found


def changes_of(
    adapter: Adapter, model: Model, rename: Sequence[tuple[str, str]]
) -> tuple[dict[str, Change], list[Pair]]:
    """Return what an adapter changes, by the model's names; and the pairs for which the model has no tensor, which it
    may store in another layout. rename: prefixes of the adapter's names.

    Raises InputError where any other part has no tensor of the model, or another shape.
    """
    found: dict[str, Change] = {}
    taken: dict[str, str] = {}
    left: list[Pair] = []
    for (name, written), change in _parts(adapter, model, rename, left):
        if name in taken:
            raise InputError(f"{_at(adapter)}: `{taken[name]}` and `{written}` both change `{name}`")
        taken[name] = written
        found[name] = change
    for name, change in list(found.items()):
        if (head := _tied_head(name, model)) is not None and head not in found:
            found[head] = change
    return found, left


def _parts(
    adapter: Adapter, model: Model, rename: Sequence[tuple[str, str]], left: list[Pair]
) -> Iterator[tuple[tuple[str, str], Change]]:
    """Yield the tensor of each part, the adapter's tensor that shows it, and the change. left: gets the pairs without a
    tensor."""
    for pair in adapter.parts.pairs:
        module = replaced(f"{pair.module}.weight", rename)
        if module in model.tensors:
            yield (module, pair.a.name), Change(_product(adapter, pair, model, model.tensors[module]))
        elif (found := _parameter(adapter, pair, model, rename)) is not None:
            yield found
        else:
            left.append(pair)
        if pair.bias is not None:
            bias = _tensor(adapter, model, replaced(f"{pair.module}.bias", rename), pair.bias)
            _fit(adapter, model, bias, pair.bias)
            yield (bias.name, pair.bias.name), Change(bias=pair.bias, scale=adapter.lora.scale(pair.module))
    for rows in adapter.parts.rows:
        spec = _tensor(adapter, model, replaced(f"{rows.module}.weight", rename), rows.values)
        if len(spec.shape) != 2 or spec.shape[1] != rows.values.shape[1] or max(rows.rows, default=0) >= spec.shape[0]:
            raise InputError(
                f"{_at(adapter)}: the rows of `{rows.values.name}` {list(rows.values.shape)} are not rows of "
                f"`{spec.name}` {list(spec.shape)} of {model.said}",
                fix=_OTHER,
            )
        yield (spec.name, rows.values.name), Change(rows=rows)
    for named, whole in adapter.parts.replaced.items():
        spec = _tensor(adapter, model, replaced(named, rename), whole)
        _fit(adapter, model, spec, whole)
        yield (spec.name, whole.name), Change(whole=whole)


def _product(adapter: Adapter, pair: Pair, model: Model, spec: TensorSpec) -> Product:
    """Return B A on a matrix. Raises InputError where it does not fit."""
    (rank, inputs), outputs = pair.a.shape, pair.b.shape[0]
    if rank != adapter.lora.rank(pair.module):
        raise _rank_error(adapter, pair)
    _check_float(adapter, spec, model)
    ways = {(outputs, inputs): False, (inputs, outputs): True}
    if inputs == outputs:
        ways = {spec.shape: adapter.lora.transposed} if spec.shape == (inputs, outputs) else {}
    elif pair.embedding:
        ways = {(inputs, outputs): True}
    if spec.shape not in ways:
        raise _shape_error(adapter, model, spec, pair, (inputs, outputs) if pair.embedding else (outputs, inputs))
    if pair.copy is not None:
        _fit(adapter, model, spec, pair.copy)
    transposed = pair.embedding or ways[spec.shape]
    return Product(pair, adapter.lora.scale(pair.module), 1, *spec.shape, transposed)


def _parameter(
    adapter: Adapter, pair: Pair, model: Model, rename: Sequence[tuple[str, str]]
) -> tuple[tuple[str, str], Change] | None:
    """Return B A on a parameter that is no module's weight: the one of `target_parameters` that it fits, in one way;
    None if it fits none.

    The names do not say which parameter is meant, nor does the order of nesting.
    """
    fitting: dict[tuple[str, bool], Product] = {}
    for named in parameters_of(adapter, pair):
        spec = model.tensors.get(replaced(named, rename))
        if spec is None or not 2 <= len(spec.shape) <= 3:
            continue
        experts, rows, columns = spec.shape if len(spec.shape) == 3 else (1, *spec.shape)
        if pair.a.shape[0] != experts * adapter.lora.rank(named):
            continue
        inputs, outputs = pair.a.shape[1], pair.b.shape[0]
        for transposed, size in ((False, (outputs, inputs)), (True, (inputs, outputs))):
            if (rows, columns) == size:
                _check_float(adapter, spec, model)
                scale = adapter.lora.scale(named)
                fitting[spec.name, transposed] = Product(pair, scale, experts, rows, columns, transposed)
    if len(fitting) > 1:
        raise ambiguous(adapter, pair, [name for name, _ in fitting])
    return next((((name, pair.a.name), Change(product)) for (name, _), product in fitting.items()), None)


def parameters_of(adapter: Adapter, pair: Pair) -> list[str]:
    """Return the parameters that a pair may be for, by the configuration."""
    return list(dict.fromkeys(f"{pair.module}.{name.rpartition('.')[2]}" for name in adapter.lora.parameters))


def ambiguous(adapter: Adapter, pair: Pair, names: Sequence[str]) -> InputError:
    return InputError(
        f"{_at(adapter)}: `{pair.a.name}` {list(pair.a.shape)} and `{pair.b.name}` {list(pair.b.shape)} fit more than "
        f"one parameter, or one in two ways: {some([f'`{name}`' for name in dict.fromkeys(names)])}",
        fix="merge the adapter with peft (`merge_and_unload`), and name that folder as a model",
    )


def _tensor(adapter: Adapter, model: Model, name: str, stored: StoredTensor) -> TensorSpec:
    """Return the model's tensor `name`. Raises InputError if it has none, or no plain numbers there."""
    spec = model.tensors.get(name)
    if spec is None:
        raise InputError(
            f"{_at(adapter)}: `{stored.name}` changes `{name}`, which {model.said} does not have",
            fix=_nearest(name, model) or _OTHER,
        )
    _check_float(adapter, spec, model)
    return spec


def _fit(adapter: Adapter, model: Model, spec: TensorSpec, stored: StoredTensor) -> None:
    """Raise InputError unless a stored tensor has the shape of the model's."""
    if stored.shape == spec.shape:
        return
    grown = module_kind(spec.name) in ("embedding", "head") and stored.shape[1:] == spec.shape[1:]
    if grown:
        raise InputError(
            f"{_at(adapter)}: `{stored.name}` has {stored.shape[0]:,} rows, and `{spec.name}` of {model.said} has "
            f"{spec.shape[0]:,}: tokens were added or removed in training",
            fix="name a base whose embedding has that many rows: "
            f"`resize_token_embeddings({stored.shape[0]})` in transformers makes one",
        )
    raise InputError(
        f"{_at(adapter)}: `{stored.name}` has shape {list(stored.shape)}, and `{spec.name}` of {model.said} has "
        f"{list(spec.shape)}",
        fix=_OTHER,
    )


def _shape_error(adapter: Adapter, model: Model, spec: TensorSpec, pair: Pair, found: tuple[int, int]) -> InputError:
    if module_kind(spec.name) in ("embedding", "head") and spec.shape[1:] == found[1:]:
        try:
            _fit(adapter, model, spec, replace(pair.b if not pair.embedding else pair.a, shape=found))
        except InputError as error:
            return error
    return InputError(
        f"{_at(adapter)}: `{pair.a.name}` {list(pair.a.shape)} and `{pair.b.name}` {list(pair.b.shape)} make a matrix "
        f"of shape {list(found)}, and `{spec.name}` of {model.said} has {list(spec.shape)}",
        fix=f"the adapter says that it was trained on `{adapter.lora.base}`: name a model of that size"
        if adapter.lora.base
        else _OTHER,
    )


def _rank_error(adapter: Adapter, pair: Pair, what: str = "") -> InputError:
    return InputError(
        f"{_at(adapter)}: `{pair.a.name}` has rank {pair.a.shape[0]}, and {adapter.lora.where} gives it "
        f"{adapter.lora.rank(pair.module)}" + (f" ({what}which only a model can say)" if what else ""),
        fix="give `onto:` the model, or add that model to the formula" if what
        else "weights and configuration are of different adapters: fetch both again",
    )  # fmt: skip


def no_module(adapter: Adapter, pair: Pair, model: Model, rename: Sequence[tuple[str, str]]) -> InputError:
    """Return the error for a module that the model does not have."""
    name = replaced(f"{pair.module}.weight", rename)
    module = name.removesuffix(".weight")
    if adapter.lora.parameters:
        inside = [other for other in model.tensors if other.startswith(f"{module}.")]
        if any(part.isdigit() for other in inside for part in other.removeprefix(f"{module}.").split(".")[:1]):
            return InputError(
                f"{_at(adapter)}: the adapter names packed experts (`{module}`), and {model.said} has them split: "
                f"{some([f'`{other}`' for other in inside], 2)}",
                fix="name a model that stores them packed, as transformers has them in memory",
            )
        if inside:
            shown = [f"`{other}` {list(model.tensors[other].shape)}" for other in inside]
            return InputError(
                f"{_at(adapter)}: `{pair.a.name}` {list(pair.a.shape)} and `{pair.b.name}` {list(pair.b.shape)} fit no "
                f"parameter of `{module}` in {model.said}: {some(shown, 4)}",
                fix=_OTHER,
            )
    tied = ties_embeddings(model.config) and module_kind(name) == "head"
    what = f"{_at(adapter)}: `{pair.a.name}` changes module `{module}`, which {model.said} does not have"
    if tied:
        return InputError(
            f"{what}: its config ties the head to the embedding, and the adapter changes only the head",
            fix="name a model that stores both (`tie_word_embeddings: false`)",
        )
    return InputError(what, fix=_nearest(name, model) or _OTHER)


def _nearest(name: str, model: Model) -> str | None:
    """Return the model's name for a tensor that has another one in the adapter: that with the longest common end."""
    parts = name.split(".")
    for start in range(max(1, len(parts) - 2)):
        ending = "." + ".".join(parts[start:])
        ends = [other for other in model.tensors if other.endswith(ending) or f".{other}" == ending]
        if len(ends) == 1:
            old, new = name.removesuffix(ending[1:]), ends[0].removesuffix(ending[1:])
            return f'the nearest is `{ends[0]}`; to read it so, add `rename: [{{from: "{old}", to: "{new}"}}]`'
    alike = [other for other in model.tensors if other.count(".") == name.count(".")]
    near = difflib.get_close_matches(name, alike[:2000], n=1, cutoff=0.8)
    return f"the nearest is `{near[0]}`; {_OTHER}" if near else None


def _tied_head(name: str, model: Model) -> str | None:
    """Return the stored copy of an embedding that a config ties to it."""
    if module_kind(name) != "embedding" or not ties_embeddings(model.config):
        return None
    spec = model.tensors[name]
    heads = [
        other for other, it in model.tensors.items()
        if it.shape == spec.shape and other.endswith("lm_head.weight")
    ]  # fmt: skip
    return heads[0] if len(heads) == 1 else None


def _check_float(adapter: Adapter, spec: TensorSpec, model: Model) -> None:
    if not DTYPES[spec.dtype].is_float:
        raise InputError(
            f"{_at(adapter)}: changes `{spec.name}`, which {model.said} holds as {spec.dtype}: nothing can be added "
            "to it",
            fix="name the checkpoint that it was quantized from (bfloat16, float16 or float32)",
        )


def _at(adapter: Adapter) -> str:
    return adapter.at.place
