"""An expression on tensors in memory: parsed, bound, prepared and computed as the engine does, without files.

Nothing is read but by stretches and tiles, as a worker would.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from skillmerge.methods.evaluate import Scratch, evaluate
from skillmerge.methods.linear import compile_term
from skillmerge.methods.preparation import Partials, Preparation, State, Stretch, state_of_model
from skillmerge.methods.rounding import round_nearest
from skillmerge.methods.terms import Term
from skillmerge.recipes.formula.bind import bind
from skillmerge.recipes.formula.parser import parse
from skillmerge.tensors import BLOCK


def bound(text: str, models: list[str], **coefficients: float) -> Term | None:
    """The term of an expression that makes sense."""
    return bind(parse(text, models, list(coefficients)), coefficients)


def prepared(
    text: str, tensors: Mapping[str, Tensor], name: str = "w", seed: int = 0, tile: int = BLOCK, **coefficients: float
) -> tuple[Preparation, int]:
    """The preparation of an expression, and how many times its operands were read for that."""
    term = bound(text, list(tensors), **coefficients)
    assert term is not None
    program = compile_term(term)
    shape = next(iter(tensors.values())).shape
    # The tensor is all of the model.
    of_model = {call.position: state_of_model(call, shape.numel()) for call in program.calls if call.by_model}
    preparation = Preparation(program, shape, name, seed, of_model)
    return preparation, sum(1 for _ in readings(preparation, tensors, tile, of_model))


def readings(
    preparation: Preparation,
    tensors: Mapping[str, Tensor],
    tile: int = BLOCK,
    of_model: Mapping[int, State] | None = None,
) -> Iterator[list[Stretch]]:
    """Read what a preparation asks for, and yield each reading."""
    program, of_model = preparation.program, of_model or {}
    flat = {model: tensors[model].contiguous().view(-1) for model in program.models}
    while stretches := preparation.stretches(tile):
        for stretch in reversed(stretches):  # in an order that no worker would choose
            partials: Partials = []
            first, here, inside = _needed(preparation, flat, stretch.first, stretch.last)
            evaluate(program, here, _scratch(here), preparation.collector(stretch, first, inside, partials))
            for fold, partial in partials:
                fold.add(partial)
        for state in of_model.values():
            state.advance()
        preparation.advance()
        yield stretches


def _needed(
    preparation: Preparation, flat: Mapping[str, Tensor], first: int, last: int
) -> tuple[int, dict[str, Tensor], slice]:
    """What has to be read for some elements: from where on, the inputs, and which of these they are."""
    start, stop = preparation.needed(first, last)
    return start, {model: values[start:stop] for model, values in flat.items()}, slice(first - start, last - start)


def _scratch(inputs: Mapping[str, Tensor]) -> Scratch:
    return Scratch(torch.device("cpu"), max(values.numel() for values in inputs.values()))


def compute(
    text: str,
    tensors: Mapping[str, Tensor],
    *,
    name: str = "w",
    seed: int = 0,
    tile: int = BLOCK,
    dtype: torch.dtype | None = None,
    **coefficients: float,
) -> Tensor:
    """The value of an expression, rounded once to `dtype`; without one in the dtype of accumulation."""
    preparation, _ = prepared(text, tensors, name, seed, tile, **coefficients)
    program = preparation.program
    first = tensors[program.models[0]]
    flat = {model: tensors[model].contiguous().view(-1) for model in program.models}
    found = []
    for start in range(0, first.numel(), tile):
        begin, here, inside = _needed(preparation, flat, start, min(start + tile, first.numel()))
        value = evaluate(program, here, _scratch(here), preparation.runner(begin))[0][inside]
        found.append(value.clone() if dtype is None else round_nearest(value, torch.empty_like(value, dtype=dtype)))
    return torch.cat(found).view(first.shape) if found else torch.empty(first.shape, dtype=dtype)


def numbers_found(text: str, tensors: Mapping[str, Tensor], **options: Any) -> dict[str, list[float]]:
    """What the calls found of the whole tensor."""
    return prepared(text, tensors, **options)[0].found()
