"""The one stream: results in order, the first failure, interrupts, and nothing left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from queue import SimpleQueue

import pytest
import torch

from skillmerge.engine.destination import ShardRecord
from skillmerge.engine.runner import handed
from skillmerge.engine.stream import Stream


class Resource:
    closed = False

    def close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    intraop = torch.get_num_threads()
    yield
    assert set(threading.enumerate()) <= before
    assert torch.get_num_threads() == intraop


def slowly(item: int) -> int:
    time.sleep(0.01 * (item % 3))
    return item * item


def test_results_come_in_the_order_of_their_items() -> None:
    with Stream([]) as stream:
        assert list(stream.map(slowly, range(20), threads=4, ahead=5)) == [item * item for item in range(20)]


def test_items_are_begun_no_further_ahead_than_asked() -> None:
    begun: list[int] = []

    def items() -> Iterator[int]:
        for item in range(10):
            begun.append(item)
            yield item

    with Stream([]) as stream:
        for number, _ in enumerate(stream.map(slowly, items(), threads=2, ahead=3)):
            assert len(begun) <= number + 3


def test_each_thread_has_its_own_which_is_closed() -> None:
    made: list[Resource] = []

    def make() -> Resource:
        made.append(Resource())
        return made[-1]

    with Stream([]) as stream:
        owned = list(stream.map(lambda _: (time.sleep(0.01), stream.own(make))[1], range(12), threads=3, ahead=6))
    assert len(made) == len(set(map(id, owned))) <= 3
    assert all(resource.closed for resource in made)


def test_first_failure_stops_all_and_is_raised() -> None:
    waiting = threading.Event()

    def work(item: int) -> int:
        if item == 3:
            raise ValueError("three")
        waiting.wait(0.01)
        return item

    with pytest.raises(ValueError, match="three"), Stream([]) as stream:
        for _ in stream.map(work, range(1000), threads=2, ahead=4):
            pass
    assert stream.stop.is_set()


def test_failure_of_a_thread_that_nobody_asks_is_raised_too() -> None:
    def fail() -> None:
        raise ValueError("alone")

    with pytest.raises(ValueError, match="alone"), Stream([]) as stream:
        stream.start(1, fail)


def test_what_is_there_is_handed_over_before_a_failure_is_raised() -> None:
    queue: SimpleQueue[int] = SimpleQueue()
    queue.put(1)
    taken: list[int] = []

    def fail() -> None:
        raise ValueError("later")

    def run() -> None:
        with Stream([]) as stream:
            stream.start(1, fail)
            stream.stop.wait(5)
            taken.extend(stream.take(queue, 2, lambda: None))

    with pytest.raises(ValueError, match="later"):
        run()
    assert taken == [1]


def test_thread_that_waits_for_another_ends_with_the_caller() -> None:
    """A thread may consume a map too; when the caller gives up, nobody makes what it waits for."""
    stopped = threading.Event()

    def endless(item: int) -> int:
        stopped.wait(0.05)
        return item

    def run() -> None:
        with Stream([]) as stream:
            results = stream.map(endless, iter(int, 1), threads=1, ahead=2)
            stream.start(1, lambda: list(results).clear())
            raise KeyError("the caller's own")

    with pytest.raises(KeyError):
        run()


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()])
def test_run_ends_with_its_callers_own_error(error: BaseException) -> None:
    seen: list[BaseException] = []

    def run() -> Iterator[ShardRecord]:
        try:
            yield ShardRecord("a.safetensors", 1, "", {})
        except BaseException as found:
            seen.append(found)
            raise

    def consume() -> None:
        with handed(run()) as records:  # type: ignore[arg-type]
            for _ in records:
                raise error

    with pytest.raises(type(error)):
        consume()
    assert seen == [error]
