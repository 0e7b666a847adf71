"""Quantized tensors, which mean nothing without their scales: they are copied, or equal in all models.

Knows names, dtypes and configs; `refuse_unequal` looks at a few bytes, and `equal_tensors` at all of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from skillmerge.checkpoints.checkpoint import Checkpoint, read_bytes
from skillmerge.checkpoints.model_config import quantised
from skillmerge.errors import InputError
from skillmerge.methods.terms import Leaf, Term, model_of, models_of
from skillmerge.plans.mapping import Source, find_source
from skillmerge.recipes.formula.tree import names_in
from skillmerge.recipes.recipe import Recipe
from skillmerge.recipes.schedules import matcher
from skillmerge.tensors import DTYPES, UNIT, TensorSpec

Marks = Mapping[str, Mapping[str, str]]
"""Model -> tensor -> why it is no plain number."""

_LOOKED_AT = 3
"""Tensors of each dtype of which the first bytes are compared before any work."""
_LOOKED_BYTES = 4096


def marks_of(checkpoints: Mapping[str, Checkpoint]) -> Marks:
    """Return the quantized tensors of each model. A stored skill has none, whatever the configs of its models say."""
    return {
        name: quantised(checkpoint.config, checkpoint.tensors) if checkpoint.same is None else {}
        for name, checkpoint in checkpoints.items()
    }


def exact_tensors(
    recipe: Recipe, checkpoints: Mapping[str, Checkpoint], donor_name: str, terms: Mapping[str, Term | None]
) -> set[str]:
    """Return the tensors that no arithmetic is meant for: quantized ones, scales included, of any model.

    Raises InputError if the formula would compute with one. Where all of its models hold the tensor alike, in dtype
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
            if why is not None and not _alike(donor.tensors[name], checkpoints, term):
                raise _refusal(model_of(model), checkpoints[model], why, _way_out(recipe))
    ignored = matcher(recipe.ignore) if recipe.ignore else None
    for model in dict.fromkeys(name.name for name in names_in(recipe.expression) if name.is_model):
        for name, why in marks.get(model, {}).items():
            if name not in donor.tensors and not (ignored is not None and ignored.match(name)):
                raise _refusal(model, checkpoints[model], why, _way_out(recipe))
    return {name for marked in marks.values() for name in marked}


Actions = Mapping[str, tuple[str, Sequence[Source]]]
"""Tensor -> its action in a plan, and its sources."""


def same_tensors(tensors: Actions, checkpoints: Mapping[str, Checkpoint]) -> list[str]:
    """Return the quantized tensors that a skill does without: its models hold the same ones, or its formula multiplies
    them by 0."""
    marks = marks_of(checkpoints)
    kept = {name for checkpoint in checkpoints.values() for name in checkpoint.same or ()}
    marked = {
        name
        for name, (action, sources) in tensors.items()
        if (action == "same" and any(source in marks[model] for model, source in sources))
        or (action == "zero" and any(name in marked for marked in marks.values()))
    }
    return sorted(marked | kept)


def refuse_unequal(recipe: Recipe, tensors: Actions, checkpoints: Mapping[str, Checkpoint]) -> None:
    """Raise InputError if the first bytes of quantized tensors, which have to be the same everywhere, differ.

    Only folders are looked into; all bytes are compared when they are read.
    """
    same = {name: sources for name, (action, sources) in tensors.items() if action == "same"}
    if not same or not any((marks := marks_of(checkpoints)).values()):
        return
    looked: dict[str, int] = {}
    for name, sources in same.items():
        if not any(source in marks[model] for model, source in sources):
            continue
        first = sources[0]
        dtype = checkpoints[first.model].tensors[first.tensor].dtype
        looked[dtype] = looked.get(dtype, 0) + 1
        if looked[dtype] > _LOOKED_AT:
            continue
        local = [source for source in sources if not checkpoints[source.model].at.remote]
        other = _differing(local, checkpoints, _LOOKED_BYTES) if first in local else None
        if other is not None:
            raise _unequal(name, first, other, marks, checkpoints, _way_out(recipe))


def equal_tensors(
    models: Sequence[str], checkpoints: Mapping[str, Checkpoint], copied: Collection[str] = ()
) -> dict[str, str]:
    """Return the quantized tensors of any of these models, and why there is no update of them: they are only copied, or
    all models hold the same bytes. Raises InputError if the bytes differ."""
    marks = marks_of({model: checkpoints[model] for model in models})
    found: dict[str, str] = {}
    for name in dict.fromkeys(name for marked in marks.values() for name in marked):
        if name in copied:
            found[name] = "quantized, and only copied"
            continue
        sources = []
        for model in models:
            if name in (checkpoints[model].same or ()):
                continue
            at, why = next((model, marked[name]) for model, marked in marks.items() if name in marked)
            spec = checkpoints[at].tensors[name]
            source = find_source(spec, model, checkpoints[model])
            other = checkpoints[model].tensors[source.tensor] if source is not None else None
            if source is None or other is None or (other.dtype, other.shape) != (spec.dtype, spec.shape):
                raise _refusal(model_of(at), checkpoints[at], why, _INSPECT)
            sources.append(source)
        if (unlike := _differing(sources, checkpoints)) is not None:
            raise _unequal(name, sources[0], unlike, marks, checkpoints, _INSPECT)
        found[name] = "quantized, and the same in all models"
    return found


def _differing(
    sources: Sequence[Source], checkpoints: Mapping[str, Checkpoint], most: int | None = None
) -> Source | None:
    """Return the first source that does not hold the bytes of the very first, of whose elements `most` are compared."""
    first, *others = sources
    elements = checkpoints[first.model].tensors[first.tensor].elements
    for at in range(0, min(elements, most or elements), UNIT):
        count = min(UNIT, min(elements, most or elements) - at)
        wanted = read_bytes(checkpoints[first.model], first.tensor, at, count)
        for other in others:
            if read_bytes(checkpoints[other.model], other.tensor, at, count) != wanted:
                return other
    return None


def _unequal(
    name: str, first: Source, other: Source, marks: Marks, checkpoints: Mapping[str, Checkpoint], fix: str
) -> InputError:
    model, why = next((it.model, marks[it.model][it.tensor]) for it in (other, first) if it.tensor in marks[it.model])
    return _refusal(model_of(model), checkpoints[model], f"{why}, and `{name}` is not that of `{first.model}`", fix)


_MERGE = "take these tensors from one model: a coefficient of 0 for them, or `copy`"
_SKILL = "leave these tensors out of the skill: `ignore` in a recipe, `--ignore` of `extract`"
_INSPECT = "inspect a recipe that takes these tensors from one model: `copy`, or a coefficient of 0 for them"


def _way_out(recipe: Recipe) -> str:
    return _SKILL if recipe.makes_skill else _MERGE


def _refusal(name: str, checkpoint: Checkpoint, why: str, fix: str) -> InputError:
    return InputError(
        f"model `{name}` ({checkpoint.place}) is quantized, so its numbers cannot be added: {why}",
        fix=f"use the checkpoint it was quantized from (bfloat16, float16 or float32), or {fix}",
    )


def _whole_bytes(spec: TensorSpec) -> bool:
    """Return whether an element has a whole number of bytes, so that it can be copied by itself."""
    return DTYPES[spec.dtype].bits % 8 == 0


def _alike(spec: TensorSpec, checkpoints: Mapping[str, Checkpoint], term: Term) -> bool:
    """Return whether all models of a term hold a tensor in the same dtype and shape, but for skills that do without
    it."""
    models = [model for model in models_of(term) if spec.name not in (checkpoints[model].same or ())]
    sources = [(model, find_source(spec, model, checkpoints[model])) for model in models]
    found = [checkpoints[model].tensors[source.tensor] for model, source in sources if source is not None]
    same = {(other.dtype, other.shape) for other in found} == {(spec.dtype, spec.shape)}
    return same and len(found) == len(sources) and _whole_bytes(spec)
