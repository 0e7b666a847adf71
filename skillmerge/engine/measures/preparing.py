"""What methods have to know of a whole tensor before its arithmetic, read by all workers that come to it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.checkpoints.views.spooled import Spooled
from skillmerge.engine.stream import Stream
from skillmerge.errors import UnusableWeights
from skillmerge.methods.method import Scalars
from skillmerge.methods.preparation import Partials, Preparation, State, Stretch, state_of_model
from skillmerge.methods.terms import Call
from skillmerge.plans.plan import Plan, TensorPlan

_WAIT = 0.2
"""Seconds between two looks at whether the run is over, of a thread that waits for another one's stretch."""

Read = Callable[[Preparation, Stretch], Partials]


class StretchReader(Protocol):
    """What a thread reads stretches with."""

    def read_stretch(self, tensor: TensorPlan, preparation: Preparation, stretch: Stretch) -> Partials: ...
    def close(self) -> None: ...


class _Shared:
    """A preparation, and what of its reading is left."""

    def __init__(self, preparation: Preparation, tile: int) -> None:
        self.preparation = preparation
        self.tile = tile
        self.left = deque(preparation.stretches(tile))
        self.being_read = 0
        self.changed = threading.Condition()


class Preparations:
    """The preparations of a run's tensors: the first worker that comes to a tensor begins, others that come help."""

    def __init__(self, plan: Plan, checkpoints: Mapping[str, Checkpoint], tile: int) -> None:
        self._plan, self._checkpoints, self._tile = plan, checkpoints, tile
        self._known: dict[tuple[str, tuple[int, int] | None], _Shared] = {}
        self._lock = threading.Lock()
        self._of_model = _states_of_model(plan)

    def read_model(self, stream: Stream, worker: Callable[[], StretchReader], threads: int) -> None:
        """Find out what methods have to know of the whole model, if they do: before anything is merged."""
        pieces = (piece for tensor in self._plan.tensors.values() for piece in tensor.pieces)
        tensors = [it for it in pieces if it.program and any(call.by_model for call in it.program.calls)]

        def read(item: tuple[TensorPlan, Preparation, Stretch]) -> Partials:
            return stream.own(worker).read_stretch(*item)

        while any(state.folds for state in self._of_model.values()):
            found = [(tensor, self._shared(tensor).preparation) for tensor in tensors]
            items = ((tensor, it, stretch) for tensor, it in found for stretch in it.stretches(self._tile))
            for partials in stream.map(read, items, threads=threads, ahead=2 * threads):
                for fold, partial in partials:
                    fold.add(partial)
            for state in self._of_model.values():
                state.advance()
        with self._lock:
            self._known.clear()

    def of(self, tensor: TensorPlan, read: Read, stop: threading.Event) -> Preparation:
        """Return a tensor's preparation, finished; or not, if `stop` was set meanwhile. read: reads a stretch."""
        shared = self._shared(tensor)
        while not stop.is_set():
            with shared.changed:
                if not shared.left and shared.being_read:
                    shared.changed.wait(_WAIT)
                    continue
                if not shared.left:
                    break
                stretch = shared.left.popleft()
                shared.being_read += 1
            partials = read(shared.preparation, stretch)
            with shared.changed:
                for fold, partial in partials:
                    fold.add(partial)
                shared.being_read -= 1
                if not shared.left and not shared.being_read:
                    self._advance(tensor, shared)
                    shared.changed.notify_all()
        return shared.preparation

    def done(self, names: Iterable[str]) -> dict[str, Scalars]:
        """Forget tensors that are merged, and return what their calls found."""
        with self._lock:
            wanted = set(names)
            finished = {key: self._known.pop(key) for key in sorted(self._known, key=_place) if key[0] in wanted}
        again = (self._plan.tensors[name].read_again for name in dict.fromkeys(name for name, _ in finished))
        for model, source in (source for sources in again for source in sources):
            if isinstance(checkpoint := self._checkpoints[model], Spooled):
                checkpoint.forget(source)
        found: dict[str, dict[str, Sequence[float]]] = {}
        for (name, _), shared in finished.items():
            for key, numbers in shared.preparation.found().items():
                scalars = found.setdefault(name, {})
                scalars[key] = (*scalars.get(key, ()), *numbers)
        return dict(found)

    def _shared(self, tensor: TensorPlan) -> _Shared:
        assert tensor.program is not None
        with self._lock:
            key = tensor.name, tensor.experts
            if key not in self._known:
                seed, span = self._plan.recipe.output.seed, tensor.span if tensor.experts is not None else None
                preparation = Preparation(tensor.program, tensor.shape, tensor.name, seed, self._of_model, span)
                self._known[key] = _Shared(preparation, self._tile)
            return self._known[key]

    def _advance(self, tensor: TensorPlan, shared: _Shared) -> None:
        try:
            shared.preparation.advance()
        except UnusableWeights as error:
            raise UnusableWeights(f"tensor `{tensor.name}`: {error.message}", fix=error.fix) from error
        shared.left.extend(shared.preparation.stretches(self._tile))


def _place(key: tuple[str, tuple[int, int] | None]) -> tuple[str, tuple[int, int]]:
    return key[0], key[1] or (0, 0)


def _states_of_model(plan: Plan) -> dict[int, State]:
    """Return the states of calls that take the whole model, by their positions in the text. Calls whose tensors have no
    elements have none."""
    calls: dict[int, Call] = {}
    elements: dict[int, int] = {}
    for tensor in plan.tensors.values():
        for piece in tensor.pieces:
            for call in piece.program.calls if piece.program is not None else ():
                if call.by_model:
                    calls[call.position] = call
                    first, last = piece.span
                    elements[call.position] = elements.get(call.position, 0) + last - first
    return {
        position: state_of_model(call, elements[position]) for position, call in calls.items() if elements[position]
    }
