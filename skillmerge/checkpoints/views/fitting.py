"""An adapter's parts on a model's tensors: which tensor each changes, and how. Knows names and shapes alone.

Every part finds exactly one tensor (and a tied head beside it), or the adapter is not for this model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.checkpoints.kinds.lora.adapter import Adapter
from skillmerge.checkpoints.kinds.lora.parts import MERGE, UNLIKE, Pair, Parts, Rows, Same
from skillmerge.checkpoints.kinds.lora.tied import as_one
from skillmerge.checkpoints.model_config import ties_embeddings
from skillmerge.checkpoints.views.renamed import nearest, replaced
from skillmerge.errors import InputError, some
from skillmerge.naming import module_kind
from skillmerge.tensors import DTYPES, StoredTensor, TensorSpec

_MOST_ELEMENTS = 1 << 36
"""Of one tensor that only an adapter describes: more than any model has."""
_CONV1D = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
"""Architectures whose layers transformers makes of `Conv1D`, which stores matrices as [inputs, outputs]."""
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
    """What an adapter does to one tensor. Exactly one of product, arranged, bias, whole and rows is not None.

    product: is added; with a magnitude, rows are scaled after that. arranged: what is added, in float64 and under the
    tensor's name, where the adapter has it in another layout. bias: is added, times `scale`. whole: replaces the
    tensor. rows: replace some of its rows. same: tensors of the adapter that have to be the same. copies: those that
    have to be the model's own.
    """

    product: Product | None = None
    arranged: Checkpoint | None = None
    bias: StoredTensor | None = None
    scale: float = 1.0
    whole: StoredTensor | None = None
    rows: Rows | None = None
    same: tuple[Same, ...] = ()
    copies: tuple[StoredTensor, ...] = ()

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
    """What an adapter is fitted to. said: what messages call it. grown: what to do where an adapter was trained with
    other numbers of tokens, if not to name a model with as many."""

    said: str
    tensors: Mapping[str, TensorSpec]
    config: Mapping[str, Any]
    grown: str | None = None


def own_tensors(adapter: Adapter, rename: Sequence[tuple[str, str]]) -> dict[str, TensorSpec]:
    """Return the tensors that an adapter alone describes: those that it changes. Raises InputError for one that is
    larger than any model's, or whose name is not known without a model."""
    found: dict[str, TensorSpec] = {}
    for pair in adapter.parts.pairs:
        (rank, inputs), outputs = pair.a.shape, pair.b.shape[0]
        if rank != adapter.lora.rank(pair.module):
            raise _rank_error(adapter, pair, "parameters of several experts, " if adapter.lora.parameters else "")
        is_head = module_kind(f"{pair.module}.weight") == "head"
        swapped = pair.embedding or (adapter.lora.transposed and not is_head)
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
            raise twice(adapter, taken[name], written, name)
        taken[name] = written
        found[name] = change
    if ties_embeddings(model.config):
        found |= _tied_heads(found, model)
    return found, left


def _parts(
    adapter: Adapter, model: Model, rename: Sequence[tuple[str, str]], left: list[Pair]
) -> Iterator[tuple[tuple[str, str], Change]]:
    """Yield the tensor of each part, the adapter's tensor that shows it, and the change. left: gets the pairs without a
    tensor."""
    turned = _is_turned(adapter, model, rename)
    parts = _with_tied(adapter, model, rename)
    for pair in parts.pairs:
        module = replaced(f"{pair.module}.weight", rename)
        if module in model.tensors:
            yield (
                (module, pair.a.name),
                Change(
                    _product(adapter, pair, model, model.tensors[module], turned), same=pair.same, copies=pair.copies
                ),
            )
        elif (found := _parameter(adapter, pair, model, rename)) is not None:
            yield found
        else:
            left.append(pair)
        if pair.bias is not None:
            bias = _tensor(adapter, model, replaced(f"{pair.module}.bias", rename), pair.bias)
            _fit(adapter, model, bias, pair.bias)
            yield (bias.name, pair.bias.name), Change(bias=pair.bias, scale=adapter.lora.scale(pair.module))
    for rows in parts.rows:
        spec = _tensor(adapter, model, replaced(f"{rows.module}.weight", rename), rows.values)
        last = rows.rows[-1][0] if rows.rows else 0
        if len(spec.shape) != 2 or spec.shape[1] != rows.values.shape[1] or last >= spec.shape[0]:
            raise InputError(
                f"{_at(adapter)}: the rows of `{rows.values.name}` {list(rows.values.shape)} are not rows of "
                f"`{spec.name}` {list(spec.shape)} of {model.said}",
                fix=_OTHER,
            )
        for copy in rows.copies:
            _fit(adapter, model, spec, copy)
        yield (spec.name, rows.values.name), Change(rows=rows, same=rows.same, copies=rows.copies)
    for named, whole in parts.replaced.items():
        spec = _tensor(adapter, model, replaced(named, rename), whole)
        _fit(adapter, model, spec, whole)
        yield (spec.name, whole.name), Change(whole=whole, same=parts.same.get(named, ()))


def _with_tied(adapter: Adapter, model: Model, rename: Sequence[tuple[str, str]]) -> Parts:
    """Return an adapter's parts, with those of a head that the model does not store as the embedding's."""
    if not ties_embeddings(model.config):
        return adapter.parts

    def is_head(name: str) -> bool:
        return module_kind(name) == "head" and replaced(name, rename) not in model.tensors

    return as_one(adapter.parts, adapter.lora, is_head, lambda name: module_kind(name) == "embedding")


def _product(adapter: Adapter, pair: Pair, model: Model, spec: TensorSpec, turned: bool | None) -> Product:
    """Return B A on a matrix. turned: as `_is_turned` says. Raises InputError where it does not fit."""
    (rank, inputs), outputs = pair.a.shape, pair.b.shape[0]
    if rank != adapter.lora.rank(pair.module):
        raise _rank_error(adapter, pair)
    _check_float(adapter, spec, model)
    ways = {(outputs, inputs): False, (inputs, outputs): True}
    if inputs == outputs:
        side = False if module_kind(spec.name) == "head" else turned
        if side is None and not pair.embedding:
            raise _square(adapter, pair, spec)
        ways = {spec.shape: bool(side)} if spec.shape == (inputs, outputs) else {}
    elif pair.embedding:
        ways = {(inputs, outputs): True}
    if spec.shape not in ways:
        raise _shape_error(adapter, model, spec, pair, (inputs, outputs) if pair.embedding else (outputs, inputs))
    for copy in pair.copies:
        _fit(adapter, model, spec, copy)
    transposed = pair.embedding or ways[spec.shape]
    return Product(pair, adapter.lora.scale(pair.module), 1, *spec.shape, transposed)


def _is_turned(adapter: Adapter, model: Model, rename: Sequence[tuple[str, str]]) -> bool | None:
    """Return whether the model stores the matrices of its layers as [inputs, outputs]; None if that is not clear.

    PEFT goes by the classes of modules: `fan_in_fan_out` is only what it found last. Shapes show it, but not those of
    square matrices.
    """
    architecture = model.config.get("model_type")
    if architecture in _CONV1D:
        return True
    seen = set()
    for pair in adapter.parts.pairs:
        spec = model.tensors.get(replaced(f"{pair.module}.weight", rename))
        size = pair.b.shape[0], pair.a.shape[1]
        if spec is None or pair.embedding or size[0] == size[1] or module_kind(spec.name) == "head":
            continue
        seen |= {spec.shape != size} if spec.shape in (size, size[::-1]) else set()
    if not seen:
        return None if adapter.lora.transposed and architecture else adapter.lora.transposed
    return seen.pop() if len(seen) == 1 else None


def _parameter(
    adapter: Adapter, pair: Pair, model: Model, rename: Sequence[tuple[str, str]]
) -> tuple[tuple[str, str], Change] | None:
    """Return B A on a parameter that is no module's weight: the one of `target_parameters` that it fits, in one way;
    None if it fits none.

    The names do not say which parameter is meant, nor does the order of nesting.
    """
    fitting: dict[tuple[str, bool], Product] = {}
    for named in (f"{pair.module}.{it}" for it in adapter.lora.parameters):
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


def ambiguous(adapter: Adapter, pair: Pair, names: Sequence[str]) -> InputError:
    return InputError(
        f"{_at(adapter)}: `{pair.a.name}` {list(pair.a.shape)} and `{pair.b.name}` {list(pair.b.shape)} fit more than "
        f"one parameter, or one in two ways: {some([f'`{name}`' for name in dict.fromkeys(names)])}",
        fix=MERGE,
    )


def _square(adapter: Adapter, pair: Pair, spec: TensorSpec) -> InputError:
    return InputError(
        f"{_at(adapter)}: `{pair.a.name}` and `{pair.b.name}` change `{spec.name}`, which is square, and neither "
        f"`fan_in_fan_out` in {adapter.lora.where} nor other matrices show whether it is stored transposed",
        fix=MERGE,
    )


def twice(adapter: Adapter, first: str, second: str, name: str) -> InputError:
    return InputError(f"{_at(adapter)}: `{first}` and `{second}` both change `{name}`")


def _tensor(adapter: Adapter, model: Model, name: str, stored: StoredTensor) -> TensorSpec:
    """Return the model's tensor `name`. Raises InputError if it has none, or no plain numbers there."""
    spec = model.tensors.get(name)
    if spec is None:
        raise _missing(
            f"{_at(adapter)}: `{stored.name}` changes `{name}`, which {model.said} does not have", name, model
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
            return InputError(error.message, fix=model.grown or error.fix)
    return InputError(
        f"{_at(adapter)}: `{pair.a.name}` {list(pair.a.shape)} and `{pair.b.name}` {list(pair.b.shape)} make a matrix "
        f"of shape {list(found)}, and `{spec.name}` of {model.said} has {list(spec.shape)}",
        fix=f"the adapter says that it was trained on `{adapter.lora.base}`: name a model of that size"
        if adapter.lora.base
        else _OTHER,
    )


def _rank_error(adapter: Adapter, pair: Pair, what: str = "") -> InputError:
    rank = adapter.lora.rank(pair.module)
    return InputError(
        f"{_at(adapter)}: `{pair.a.name}` has rank {pair.a.shape[0]}, and {adapter.lora.where} gives it {rank}"
        + (f" ({what}which only a model can say)" if what else ""),
        fix="give `onto:` the model, or add that model to the formula" if what
        else UNLIKE,
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
    what = f"{_at(adapter)}: `{pair.a.name}` changes module `{module}`, which {model.said} does not have"
    return _missing(what, name, model)


def _missing(what: str, name: str, model: Model) -> InputError:
    """Return the error for a tensor that the model does not have."""
    if ties_embeddings(model.config) and module_kind(name) == "head":
        return InputError(
            f"{what}: its config ties the head to the embedding, and the adapter does not do the same to both",
            fix="name a model that stores both (`tie_word_embeddings: false`)",
        )
    found = nearest(name, model.tensors)
    if found is None:
        return InputError(what, fix=_OTHER)
    near, rule = found
    how = f'to read it so, add `rename: [{{from: "{rule[0]}", to: "{rule[1]}"}}]`' if rule is not None else _OTHER
    return InputError(what, fix=f"the nearest is `{near}`; {how}")


def _tied_heads(changes: Mapping[str, Change], model: Model) -> dict[str, Change]:
    """Return the changes of stored copies of embeddings that a config ties to them."""
    heads = [spec for name, spec in model.tensors.items() if name.endswith("lm_head.weight")]
    found: dict[str, Change] = {}
    for name, change in changes.items():
        if module_kind(name) == "embedding":
            alike = [head.name for head in heads if head.shape == model.tensors[name].shape]
            if len(alike) == 1 and alike[0] not in changes:
                found[alike[0]] = change
    return found


def _check_float(adapter: Adapter, spec: TensorSpec, model: Model) -> None:
    if not DTYPES[spec.dtype].is_float:
        raise InputError(
            f"{_at(adapter)}: changes `{spec.name}`, which {model.said} holds as {spec.dtype}: nothing can be added "
            "to it",
            fix="name the checkpoint that it was quantized from (bfloat16, float16 or float32)",
        )


def _at(adapter: Adapter) -> str:
    return adapter.at.place
