"""The calls of one tensor's program: what they have to know first, and then their arithmetic.

Every call has a state for each unit (matrix) of the tensor. A *reading* passes over the operands of all units that
still ask for something, and answers all that can be asked by then. Knows no files: the reader hands the values in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from skillmerge.methods.evaluate import CallRunner
from skillmerge.methods.folds import Fold, fold_of
from skillmerge.methods.linear import Program
from skillmerge.methods.method import Ranks, Ready, Scalars, Sums, Unit
from skillmerge.methods.rounding import lots_key, uniform
from skillmerge.methods.terms import Call, calls

_AT_ONCE = 16
"""Units that ask at the same time: the counts of a rank take half a megabyte, and stacked experts are many units."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Elements first..last of a unit, counted from the tensor's first element, that are read together."""

    unit: int
    first: int
    last: int


Partials = list[tuple[Fold, Any]]


class State:
    """One call on one unit, a matrix or the whole model: its method's steps, what they ask for, and in the end its
    function."""

    def __init__(self, call: Call, unit: Unit) -> None:
        self.ready: Ready | None = None
        self.folds: list[Fold] = []
        """What it asks for, as far as the next reading is for that."""
        self._asked: list[Fold] = []
        self._single = False
        self._steps: Generator[Any, Any, Ready] | None = None
        begun = call.method.prepare(unit, **dict(call.arguments))
        if isinstance(begun, Ready):
            self.ready = begun
        else:
            self._steps = begun
            self._send(None)

    def advance(self) -> None:
        """After a reading: ask for another one, or hand the answers to the method."""
        if self.folds:
            self.folds = [fold for fold in self.folds if fold.next_reading()]
            if not self.folds:
                answers = [fold.answer for fold in self._asked]
                self._send(answers[0] if self._single else answers)

    def _send(self, answer: Any) -> None:
        assert self._steps is not None
        try:
            wish = self._steps.send(answer)
        except StopIteration as done:
            self.ready = done.value
            self._asked, self.folds, self._steps = [], [], None  # counts of a tensor are large
            return
        self._single = isinstance(wish, Sums | Ranks)
        self._asked = [fold_of(each) for each in ([wish] if self._single else wish)]
        self.folds = self._asked


class Preparation:
    """The calls of one tensor. `stretches` is what has to be read next; when all of it was read and added, `advance`;
    until there is nothing left to read. Then `run` computes."""

    def __init__(
        self, program: Program, shape: Sequence[int], name: str, seed: int, of_model: Mapping[int, State] | None = None,
        span: tuple[int, int] | None = None,
    ) -> None:  # fmt: skip
        """of_model: the states of calls that take the whole model, by their positions. They are not advanced here.
        span: the elements that the program is for, if not all."""
        self.program = program
        matrix = tuple(shape)[-2:]
        self.unit_size, self.units = math.prod(matrix), math.prod(tuple(shape)[:-2])
        self._columns = max(1, matrix[-1]) if matrix else 1
        self._by_rows = any(call.method.rows(**dict(call.arguments)) for call in program.calls)
        self._name, self._seed, self._of_model = name, seed, of_model or {}
        self._states: list[list[State | None]] = [[None] * len(program.calls) for _ in range(self.units)]
        self._inner = [_inner_calls(program.calls, index) for index in range(len(program.calls))]
        first, last = self._span = span or (0, self.units * self.unit_size)
        self._left = range(first // self.unit_size, -(-last // self.unit_size)) if self.unit_size else range(0)
        """Units that have not begun."""
        self._open: list[int] = []
        """Units that have begun and still ask."""
        self._begin_some()

    def stretches(self, tile: int) -> list[Stretch]:
        """Return what has to be read, at most `tile` elements together. tile: a multiple of a block."""
        return [
            Stretch(unit, start, min(start + tile, last))
            for unit in self._open
            if any(state is not None and state.folds for state in self._states[unit])
            for first, last in [self._asked_of(unit)]
            for start in range(first, last, tile)
        ]

    def collector(self, stretch: Stretch, first: int, run: slice, partials: Partials) -> CallRunner:
        """Return what to run the program with on elements from `first` on, to append to `partials` what those of them
        that `run` selects add."""
        states = self._states[stretch.unit]
        wanted = [index for index, state in enumerate(states) if state is not None and state.folds]

        def call(index: int, operands: list[Tensor]) -> Tensor | None:
            state = states[index]
            if state is None:
                return operands[0]  # nothing that is asked for depends on it
            where = self._where(index, first)
            if state.ready is not None:
                return state.ready.function(*operands, **where)
            partials.extend((fold, fold.partial(operands, where, run)) for fold in state.folds)
            return None if index == wanted[-1] else operands[0]

        return call

    def needed(self, first: int, last: int) -> tuple[int, int]:
        """Return the elements that are needed to compute others: themselves, or all of their rows."""
        if not self._by_rows:
            return first, last
        return first // self._columns * self._columns, -(-last // self._columns) * self._columns

    def advance(self) -> None:
        """Use what was read of all stretches."""
        asking, self._open = self._open, []
        for unit in asking:
            for state in self._states[unit]:
                if state is not None and state not in self._of_model.values():
                    state.advance()
            self._begin(unit)
        self._begin_some()

    def runner(self, first: int) -> CallRunner:
        """Return what to run the program with on elements from `first` on, which may be of several units."""

        def run(index: int, operands: list[Tensor]) -> Tensor:
            pieces = list(self._pieces(first, operands[0].numel()))
            if len(pieces) == 1:
                return self._apply(index, pieces[0][0], first, operands)
            result = operands[0].new_empty(operands[0].numel())
            for unit, start, stop in pieces:
                inside = [operand[start:stop] for operand in operands]
                result[start:stop] = self._apply(index, unit, first + start, inside)
            return result

        return run

    def found(self) -> Scalars:
        """Return the numbers that the calls found, of each unit: `trim 1 threshold`."""
        result: dict[str, list[float]] = {}
        for unit, states in enumerate(self._states):
            for index, state in enumerate(states):
                if unit and self.program.calls[index].by_model:
                    continue
                values: Mapping[str, float] = state.ready.found if state is not None and state.ready is not None else {}
                for name, value in values.items():
                    if not math.isfinite(value):
                        continue  # JSON has no such number
                    result.setdefault(f"{self.program.calls[index].method} {index + 1} {name}", []).append(value)
        return result

    @property
    def _together(self) -> bool:
        """Whether its units are asked for the whole model, all together."""
        return any(state.ready is None for state in self._of_model.values())

    def _asked_of(self, unit: int) -> tuple[int, int]:
        """Return the elements of a unit that are asked for: for the whole model those that the program is for alone,
        which of the vectors of experts are less than a matrix."""
        first, last = unit * self.unit_size, (unit + 1) * self.unit_size
        return (max(first, self._span[0]), min(last, self._span[1])) if self._together else (first, last)

    def _begin_some(self) -> None:
        """Begin as many units as may ask at the same time; all of them, if together they are asked for the model."""
        while self._left and (self._together or len(self._open) < _AT_ONCE):
            self._begin(self._left[0])
            self._left = self._left[1:]

    def _begin(self, unit: int) -> None:
        """Begin the calls whose operands can be computed."""
        states = self._states[unit]
        for index, call in enumerate(self.program.calls):
            if self._together and call.readings and not call.by_model:
                continue  # all units ask now, and together what each counts by itself would be too much memory
            if states[index] is None and all(_is_ready(states[inner]) for inner in self._inner[index]):
                lots = partial(self._lots, call)
                own = Unit(self.unit_size, self._columns, len(call.operands), lots)
                states[index] = self._of_model[call.position] if call.by_model else State(call, own)
        if not all(map(_is_ready, states)):
            self._open.append(unit)

    def _lots(self, call: Call, seed: int | None) -> Callable[[int, Tensor], Tensor]:
        key = lots_key(self._seed if seed is None else int(seed), self._name, call.ordinal)
        return lambda first, like: uniform(key, first, like.numel(), like.device)

    def _where(self, index: int, first: int) -> dict[str, int]:
        return {"first": first} if self.program.calls[index].method.indexed else {}

    def _apply(self, index: int, unit: int, first: int, operands: list[Tensor]) -> Tensor:
        state = self._states[unit][index]
        assert state is not None
        assert state.ready is not None, "the calls have to be prepared"
        return state.ready.function(*operands, **self._where(index, first))

    def _pieces(self, first: int, count: int) -> Iterator[tuple[int, int, int]]:
        """Yield the units that elements from `first` on belong to, and which of the elements those are."""
        start = 0
        while start < count:
            unit, inside = divmod(first + start, self.unit_size)
            stop = min(count, start + self.unit_size - inside)
            yield unit, start, stop
            start = stop


def _inner_calls(program_calls: Sequence[Call], index: int) -> list[int]:
    """Return the calls that are inside another one's operands."""
    inside = [inner for operand in program_calls[index].operands for inner in calls(operand)]
    return [other for other in range(index) if any(program_calls[other] is inner for inner in inside)]


def _is_ready(state: State | None) -> bool:
    return state is not None and state.ready is not None


def state_of_model(call: Call, elements: int) -> State:
    """Return the state of a call that takes the whole model. elements: of all tensors that it works on."""
    lots = partial(_no_lots, str(call.method))
    return State(call, Unit(elements, 1, len(call.operands), lots))


def _no_lots(method: str, seed: int | None) -> Callable[[int, Tensor], Tensor]:
    raise AssertionError(f"{method}: lots are drawn tensor by tensor")
