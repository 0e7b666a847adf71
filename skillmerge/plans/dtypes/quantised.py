"""Quantized tensors mean nothing without their scales: they are copied, or taken where all models hold the same.

Knows names, dtypes and configs; `refuse_unequal` alone looks at a few bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from skillmerge.checkpoints.checkpoint import Checkpoint, read_bytes
from skillmerge.checkpoints.model_config import quantised
from skillmerge.errors import InputError
from skillmerge.methods.terms import Leaf, Term, model_of, models_of
from skillmerge.plans.mapping import Source, find_source
from skillmerge.recipes.expression import names_in
from skillmerge.recipes.recipe import Recipe
from skillmerge.recipes.schedules import matcher
from skillmerge.tensors import DTYPES, TensorSpec

Marks = Mapping[str, Mapping[str, str]]
"""Model -> tensor -> why it is no plain number."""

_LOOKED_AT = 3
"""Tensors of each dtype of which the first bytes are compared before any work."""
_LOOKED_BYTES = 4096


def marks_of(checkpoints: Mapping[str, Checkpoint]) -> Marks:
    """The quantized tensors of each model."""
    return {name: quantised(checkpoint.config, checkpoint.tensors) for name, checkpoint in checkpoints.items()}


def exact_tensors(
    recipe: Recipe, checkpoints: Mapping[str, Checkpoint], donor_name: str, terms: Mapping[str, Term | None]
) -> set[str]:
    """The tensors that no arithmetic is meant for: quantized ones, scales included, of any model.

    Raises InputError where the formula would compute with one. Where all of its models hold the tensor alike, in dtype
    and shape, it may still be the same in all of them.
    """
    marks = marks_of(checkpoints)
    if not any(marks.values()):
        return set()
    donor = checkpoints[donor_name]
    for name, term in terms.items():
        if term is None or (isinstance(term, Leaf) and _whole_bytes(donor.tensors[name])):
            continue
        for model in models_of(term):
            source = find_source(donor.tensors[name], model, checkpoints[model])
            why = marks[model].get(source.tensor if source is not None else name)
            if why is not None and (recipe.makes_skill or not _alike(donor.tensors[name], checkpoints, term)):
                raise _refusal(model_of(model), checkpoints[model], why)
    ignored = matcher(recipe.ignore) if recipe.ignore else None
    for model in dict.fromkeys(name.name for name in names_in(recipe.expression) if name.is_model):
        for name, why in marks.get(model, {}).items():
            if name not in donor.tensors and not (ignored is not None and ignored.match(name)):
                raise _refusal(model, checkpoints[model], why)
    return {name for marked in marks.values() for name in marked}


def refuse_unequal(tensors: Mapping[str, tuple[str, Sequence[Source]]], checkpoints: Mapping[str, Checkpoint]) -> None:
    """Raise InputError where the first bytes of quantized tensors, which have to be the same everywhere, differ.

    tensors: name -> action and sources. Only folders are looked into; all bytes are compared when they are read.
    """
    if not any((marks := marks_of(checkpoints)).values()):
        return
    looked: dict[str, int] = {}
    for name, (action, sources) in tensors.items():
        if action != "same" or not any(source in marks[model] for model, source in sources):
            continue
        (first, first_name), *others = sources
        dtype = checkpoints[first].tensors[first_name].dtype
        looked[dtype] = looked.get(dtype, 0) + 1
        if looked[dtype] > _LOOKED_AT:
            continue
        for model, source in others:
            if not (checkpoints[first].at.remote or checkpoints[model].at.remote):
                count = min(checkpoints[first].tensors[first_name].elements, _LOOKED_BYTES)
                pair = (
                    read_bytes(checkpoints[first], first_name, 0, count),
                    read_bytes(checkpoints[model], source, 0, count),
                )
                if pair[0] != pair[1]:
                    why = next(marks[at][its] for at, its in ((model, source), *sources) if its in marks[at])
                    raise _refusal(model_of(model), checkpoints[model], f"{why}, and `{name}` is not that of `{first}`")


def refuse_quantised(name: str, checkpoint: Checkpoint) -> None:
    """Raise InputError where a checkpoint's weights are no plain numbers."""
    why = next(iter(quantised(checkpoint.config, checkpoint.tensors).values()), None)
    if why is not None:
        raise _refusal(name, checkpoint, why)


def _refusal(name: str, checkpoint: Checkpoint, why: str) -> InputError:
    return InputError(
        f"model `{name}` ({checkpoint.place}) is quantized, and its numbers cannot be added: {why}",
        fix="use the checkpoint it was quantized from (bfloat16, float16 or float32), or take these tensors from one "
        "model: a coefficient of 0 for them, or `copy`",
    )


def _whole_bytes(spec: TensorSpec) -> bool:
    """Whether an element has a whole number of bytes, so that it can be copied by itself."""
    return DTYPES[spec.dtype].bits % 8 == 0


def _alike(spec: TensorSpec, checkpoints: Mapping[str, Checkpoint], term: Term) -> bool:
    """Whether all models of a term hold a tensor in the same dtype and shape."""
    sources = [(model, find_source(spec, model, checkpoints[model])) for model in models_of(term)]
    found = [checkpoints[model].tensors[source.tensor] for model, source in sources if source is not None]
    same = {(other.dtype, other.shape) for other in found} == {(spec.dtype, spec.shape)}
    return same and len(found) == len(sources) and _whole_bytes(spec)
