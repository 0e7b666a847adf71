"""Whether layers fit the places that a stack gives them, by their tensors: names and shapes alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from skillmerge.checkpoints.views.stacked import Layers
from skillmerge.errors import some
from skillmerge.plans.stacks.config import kind_of
from skillmerge.plans.stacks.order import Order, Unsayable

Form = frozenset[tuple[str, tuple[int, ...]]]
"""What a layer's tensors are called, and their shapes."""


def check_forms(order: Order, parts: Mapping[str, Layers]) -> None:
    """Raise Unsayable where a layer has other tensors than every layer of the first model, or other shapes; and where
    it has tensors of its own for which its number is the only reason, and gets another number."""
    forms = {model: {number: _form(layers, number) for number in layers.tensors} for model, layers in parts.items()}
    known = {*forms[order.first].values()}
    for layer in order.layers:
        form = forms[layer.model][layer.number]
        if form not in known:
            near = max(known, key=lambda other: len(other & form))
            raise Unsayable(
                f"layer {layer.number} of `{layer.model}` does not fit those of `{order.first}`: {_misfit(form, near)}",
                layer.entry,
                "stack models of one architecture and width that store their weights alike",
            )
    if order.configs[order.first]:
        _check_places(order, forms)


def _check_places(order: Order, forms: Mapping[str, Mapping[int, Form]]) -> None:
    """Refuse layers such as a first one without a norm in another place, which the architecture does not expect."""
    usual = {model: _usual(order, model, forms[model]) for model in order.counts}
    for place, layer in enumerate(order.layers):
        for model, number in ((layer.model, layer.number), (order.first, place)):
            if place == layer.number or number not in usual[model]:
                continue
            form, like = forms[model][number], usual[model][number]
            if form != like:
                raise Unsayable(
                    f"layer {number} of `{model}` has other tensors than most ({_misfit(form, like)}), and config.json "
                    f"does not say why: no other layer can be layer {number}, and it can be no other",
                    layer.entry,
                    f"take layer {number} once, as layer {number} of the stack",
                )


def _usual(order: Order, model: str, forms: Mapping[int, Form]) -> dict[int, Form]:
    """Return the form that most layers have of which a model's config.json says the same, by their numbers; if as many
    have another one, that of most layers of the model."""
    everywhere = Counter(forms.values())
    kinds: dict[object, list[int]] = {}
    for number in range(order.counts[model]):
        kinds.setdefault(kind_of(order, model, number), []).append(number)
    found: dict[int, Form] = {}
    for numbers in kinds.values():
        here = Counter(forms[number] for number in numbers)
        found |= dict.fromkeys(numbers, max(here, key=lambda form: (here[form], everywhere[form])))
    return found


def _form(layers: Layers, number: int) -> Form:
    tensors = layers.checkpoint.tensors
    return frozenset((rest, tensors[name].shape) for rest, name in layers.tensors[number].items())


def _misfit(form: Form, near: Form) -> str:
    ours, theirs = dict(form), dict(near)
    for rest in sorted(ours.keys() & theirs.keys()):
        if ours[rest] != theirs[rest]:
            return f"`{rest}` is {list(ours[rest])} against {list(theirs[rest])}"
    lacks, has = sorted(theirs.keys() - ours.keys()), sorted(ours.keys() - theirs.keys())
    what = f"it lacks {some([f'`{rest}`' for rest in lacks], 3)}" if lacks else ""
    return what or f"it has {some([f'`{rest}`' for rest in has], 3)} besides"
