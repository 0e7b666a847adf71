"""The one stream: results in order, the first failure, interrupts, and nothing left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator
from queue import SimpleQueue

import pytest
import torch

from skillmerge.engine import stream as stream_module
from skillmerge.engine.destination import ShardRecord
from skillmerge.engine.runner import handed
from skillmerge.engine.stream import Stream

pytestmark = pytest.mark.timeout(60, method="thread")
"""A thread that waits for ever also keeps an exception from leaving the pass."""


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


def test_what_comes_after_a_failure_is_handed_over_too() -> None:
    """Found by a review: threads that had nearly done something had done it for nothing."""
    queue: SimpleQueue[int] = SimpleQueue()
    taken: list[int] = []

    def finish() -> None:
        assert stream.stop.wait(5)
        time.sleep(3 * stream_module._GLANCE)  # until the caller has long seen the failure
        queue.put(1)

    def fail() -> None:
        raise ValueError("first")

    def run() -> None:
        with stream:
            stream.start(1, finish)
            stream.start(1, fail)
            for item in stream.take(queue, 2, lambda: None):
                taken.append(item)

    stream = Stream([])
    with pytest.raises(ValueError, match="first"):
        run()
    assert taken == [1]


def test_what_is_there_comes_before_an_error_that_is_thrown_in() -> None:
    """The one in the caller's hands comes again: it may not have been recorded."""
    queue: SimpleQueue[int] = SimpleQueue()
    for number in range(3):
        queue.put(number)

    def run() -> None:
        with stream:
            taking = stream.take(queue, 4, lambda: None)
            assert isinstance(taking, Generator)
            assert [next(taking), next(taking)] == [0, 1]
            assert taking.throw(OSError("full")) == 1
            assert next(taking) == 2
            next(taking)

    stream = Stream([])
    with pytest.raises(OSError, match="full"):
        run()


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


def test_first_failure_is_raised_whatever_fails_after_it() -> None:
    def fail_first() -> None:
        raise ValueError("first")

    def fail_last() -> None:
        assert stream.stop.wait(5)
        raise ValueError("last")

    def run() -> None:
        with stream:
            stream.start(1, fail_last)
            stream.start(1, fail_first)
            for thread in stream._threads:
                thread.join()

    stream = Stream([])
    with pytest.raises(ValueError, match="first"):
        run()


class Network:
    """A checkpoint that answers no read until it is cancelled."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()

    def cancel(self) -> None:
        self.cancelled.set()

    def read(self) -> None:
        self.freed = self.cancelled.wait(3)
        raise TimeoutError("cancelled")


def test_failure_of_a_thread_ends_reads_that_wait_for_a_network() -> None:
    networks = [Network(), Network()]

    def fail() -> None:
        raise ValueError("alone")

    def run() -> None:
        with stream:
            for network in networks:
                stream.start(1, network.read)
            stream.start(1, fail)
            for thread in stream._threads:
                thread.join()  # the caller has not seen it yet

    stream = Stream(networks)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="alone"):
        run()
    assert all(network.freed for network in networks)


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()])
def test_callers_own_error_ends_reads_that_wait_for_a_network(error: BaseException) -> None:
    network = Network()

    def run() -> None:
        with stream:
            stream.start(1, network.read)
            raise error

    stream = Stream([network])  # type: ignore[list-item]
    with pytest.raises(type(error)):
        run()
    assert network.freed


def test_interrupt_waits_for_threads_only_a_while_and_takes_nothing_from_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by a review: with what it works with closed, a thread that still waits would crash the process."""
    monkeypatch.setattr(stream_module, "_PATIENCE", 0.2)
    begun, free, ended = threading.Event(), threading.Event(), threading.Event()
    resource, own = Resource(), Resource()

    def hang() -> None:
        stream.own(lambda: own)
        begun.set()
        assert free.wait(20)
        ended.set()

    def run() -> None:
        stream.keep(resource)
        stream.start(1, hang)
        assert begun.wait(5)
        raise KeyboardInterrupt

    before = time.monotonic()
    with pytest.raises(KeyboardInterrupt), Stream([]) as stream:
        run()
    assert time.monotonic() - before < 10
    assert [ended.is_set(), resource.closed, own.closed] == [False] * 3
    free.set()
    for thread in stream._threads:
        thread.join()


def test_interrupt_while_something_is_taken_waits_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "_PATIENCE", 0.5)
    free, waits = threading.Event(), []
    join = threading.Thread.join

    def noted(thread: threading.Thread, timeout: float | None = None) -> None:
        waits.append(timeout)
        join(thread, timeout)

    def hang() -> None:
        assert free.wait(20)

    def interrupt() -> None:
        raise KeyboardInterrupt

    def run() -> None:
        with stream:
            stream.start(1, hang)
            monkeypatch.setattr(threading.Thread, "join", noted)
            list(stream.take(SimpleQueue(), 1, interrupt))

    stream = Stream([])
    with pytest.raises(KeyboardInterrupt):
        run()
    assert waits == [pytest.approx(0.5, abs=0.4), 0.0]  # the second look only sees whether it has ended since
    free.set()
    for thread in stream._threads:
        thread.join()


def test_result_that_was_made_while_another_thread_failed_is_not_given() -> None:
    """A worker that was stopped hands over what it has, which may be half of it."""
    begun = threading.Event()

    def fail() -> None:
        assert begun.wait(5)
        raise ValueError("meanwhile")

    def half(item: int) -> str:
        begun.set()
        assert stream.stop.wait(5)
        return "half"

    def run() -> None:
        with stream:
            stream.start(1, fail)
            assert not list(stream.map(half, range(1), threads=1, ahead=1))

    stream = Stream([])
    with pytest.raises(ValueError, match="meanwhile"):
        run()


ROWS = [ShardRecord(f"{name}.safetensors", 1, "", {}) for name in "abc"]


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()])
def test_run_ends_with_its_callers_own_error(error: BaseException) -> None:
    """What it has finished by then is handed over all the same."""
    seen: list[BaseException] = []
    recorded: list[ShardRecord] = []

    def run() -> Generator[ShardRecord, None, None]:
        try:
            yield ROWS[0]
        except BaseException as found:
            seen.append(found)
            yield from ROWS
            raise

    def consume() -> None:
        with handed(run(), recorded.append) as records:
            for _ in records:
                raise error

    with pytest.raises(type(error)) as caught:
        consume()
    assert seen == [error]
    assert caught.value is error
    assert recorded == ROWS


def test_callers_own_error_is_raised_even_where_nothing_more_can_be_recorded() -> None:
    def run() -> Generator[ShardRecord, None, None]:
        try:
            yield from ROWS
        except OSError:
            yield from ROWS
            raise
        finally:
            ended.append(True)

    ended: list[bool] = []

    def refuse(done: ShardRecord) -> None:
        raise OSError("still full")

    def consume() -> None:
        with handed(run(), refuse) as records:
            for _ in records:
                raise OSError("full")

    with pytest.raises(OSError, match=r"^full$"):
        consume()
    assert ended == [True]


def test_run_ends_where_its_caller_wants_no_more() -> None:
    ended: list[bool] = []

    def run() -> Generator[ShardRecord, None, None]:
        try:
            yield from ROWS
        finally:
            ended.append(True)

    records = run()
    with handed(records, lambda done: None) as wanted:
        for _ in wanted:
            break
        assert not ended
    assert ended == [True]
    assert list(records) == []
