"""What every destination promises: a staging folder, a comparison with what is there, a Hub or a bucket that alone keep
it."""

from __future__ import annotations

import ctypes
import hashlib
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from bucket_server import S3Server
from conftest import write_family, write_recipe
from hub_server import HubServer

import skillmerge
from skillmerge.checkpoints.place import Bucket
from skillmerge.engine.destination import Destination, ShardRecord, SpanFile, StreamFile
from skillmerge.engine.rounding_statistics import TensorStatistics
from skillmerge.errors import CheckFailed
from skillmerge.outputs.buckets.sending import BucketOutput
from skillmerge.outputs.hub.push import MergePush
from skillmerge.outputs.sending import Sender
from skillmerge.outputs.staging import Staging
from skillmerge.plans.plan import Plan, ShardPlan
from skillmerge.verbs.rebuild import _Original

CONDITIONS = {"stats": "sampled"}


@dataclass
class Case:
    """A destination of one run, and how a test sees what it has. again: the destination of the next run."""

    destination: Destination
    content: Callable[[str], bytes]
    again: Callable[[], Destination]
    keeps: bool = True


class Sent:
    """A staging folder whose shards are sent and removed as they are recorded, as `apply --no-local` has it."""

    def __init__(self, staging: Staging, push: Sender) -> None:
        self._staging, self._push = staging, push
        push.attach(staging)

    @property
    def finished(self) -> dict[str, ShardRecord]:
        return self._staging.finished

    def open_shard(self, shard: ShardPlan) -> SpanFile:
        return self._staging.open_shard(shard)

    def open_stream(self, shard: ShardPlan, start: int) -> StreamFile:
        return self._staging.open_stream(shard, start)

    def record(self, done: ShardRecord) -> None:
        self._staging.record(done)
        self._push.send(done)
        for sent in self._push._sent:
            sent.result()


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    write_family(tmp_path)
    recipe = write_recipe(tmp_path, output={"path": "merged", "shard_size": "2KB", "license": "mit"})
    skillmerge.apply(recipe, tmp_path / "reference")
    return skillmerge.plan(recipe)


@pytest.fixture(params=["staging", "comparison", "hub", "bucket"])
def case(request: pytest.FixtureRequest, tmp_path: Path, plan: Plan) -> Iterator[Case]:
    opened: list[Staging] = []

    def staging() -> Staging:
        for earlier in opened:
            earlier.close()
        opened.append(Staging(tmp_path / "merged"))
        opened[-1].begin("plan", CONDITIONS)
        return opened[-1]

    if request.param == "comparison":
        root = tmp_path / "reference"
        yield Case(_Original(root), lambda name: (root / name).read_bytes(), lambda: _Original(root), keeps=False)
    elif request.param == "staging":
        yield Case(staging(), lambda name: (opened[-1].files / name).read_bytes(), staging)
    elif request.param == "bucket":
        s3: S3Server = request.getfixturevalue("s3")

        def in_bucket() -> Sent:
            return Sent(staging(), BucketOutput(plan, Bucket("s3", "bucket", "out")))

        yield Case(in_bucket(), lambda name: s3.get(f"out/{name}"), in_bucket)
    else:
        hub: HubServer = request.getfixturevalue("hub")

        def hub_only() -> Sent:
            return Sent(staging(), MergePush(plan, "acme/merged", True, {}))

        def content(name: str) -> bytes:
            assert not (opened[-1].files / name).exists(), "what the Hub has is not kept on the disk"
            return (hub.store / opened[-1].finished[name].sha256).read_bytes()

        yield Case(hub_only(), content, hub_only)
    for each in opened:
        each.close()


def wanted(tmp_path: Path, shard: ShardPlan) -> bytes:
    return (tmp_path / "reference" / shard.file).read_bytes()


def record_of(shard: ShardPlan, data: bytes) -> ShardRecord:
    statistics = {spec.name: TensorStatistics(9, 3, 2, 1, 1, 1 / 3, 5e-324, None, 0.0) for spec in shard.specs}
    return ShardRecord(shard.file, len(data), hashlib.sha256(data).hexdigest(), statistics)


def view(data: bytes) -> memoryview:
    """As the engine hands over a tensor's memory: of characters."""
    return memoryview((ctypes.c_char * len(data)).from_buffer_copy(data))


def write_spans(destination: Destination, shard: ShardPlan, data: bytes) -> None:
    """Spans of odd lengths, shuffled, from several threads."""
    file = destination.open_shard(shard)
    starts = list(range(len(shard.header), len(data), 977))
    random.Random(1).shuffle(starts)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda start: file.write(view(data[start : start + 977]), start), starts))
    file.finish()
    file.close()


def test_spans_come_from_any_thread_in_any_order(case: Case, plan: Plan, tmp_path: Path) -> None:
    for shard in plan.shards:
        data = wanted(tmp_path, shard)
        write_spans(case.destination, shard, data)
        case.destination.record(record_of(shard, data))
        assert case.content(shard.file) == data


def test_a_stream_grows_and_its_start_is_filled_last(case: Case, plan: Plan, tmp_path: Path) -> None:
    for shard in plan.shards:
        data, start = wanted(tmp_path, shard), len(shard.header)
        file = case.destination.open_stream(shard, start)
        for position in range(start, len(data), 977):
            file.append(view(data[position : position + 977]))
        file.put(data[:start], 0)
        assert file.finish(threading.Event()) == (len(data), hashlib.sha256(data).hexdigest())
        file.close()
        case.destination.record(record_of(shard, data))
        assert case.content(shard.file) == data


def test_what_is_recorded_is_finished(case: Case, plan: Plan, tmp_path: Path) -> None:
    shard = plan.shards[0]
    data = wanted(tmp_path, shard)
    assert case.destination.finished == {}
    write_spans(case.destination, shard, data)
    assert case.destination.finished == {}, "the caller records, nobody else"
    case.destination.record(record_of(shard, data))
    assert {name: replace(done, uploaded=False) for name, done in case.destination.finished.items()} == {
        shard.file: record_of(shard, data)
    }
    assert case.content(shard.file) == data


def test_what_was_recorded_is_known_to_the_next_run(case: Case, plan: Plan, tmp_path: Path) -> None:
    """And nothing else is: what a run that died had only written is made again."""
    first, second, *_ = plan.shards
    data = wanted(tmp_path, first)
    write_spans(case.destination, first, data)
    case.destination.record(record_of(first, data))
    known = dict(case.destination.finished)
    write_spans(case.destination, second, wanted(tmp_path, second))
    found = case.again()
    assert found.finished == (known if case.keeps else {})
    write_spans(found, second, wanted(tmp_path, second))
    found.record(record_of(second, wanted(tmp_path, second)))
    assert set(found.finished) == ({first.file, second.file} if case.keeps else {second.file})
    assert case.content(second.file) == wanted(tmp_path, second)


def test_what_was_begun_and_closed_is_not_finished(case: Case, plan: Plan, tmp_path: Path) -> None:
    shard = plan.shards[0]
    data, start = wanted(tmp_path, shard), len(shard.header)
    spans = case.destination.open_shard(shard)
    spans.write(view(data[start:]), start)
    spans.close()
    other, start = plan.shards[1], len(plan.shards[1].header)
    stream = case.destination.open_stream(other, start)
    stream.append(view(wanted(tmp_path, other)[start:]))
    stream.close()
    stream.close()
    assert case.destination.finished == {}
    found = case.again()
    assert found.finished == {}
    write_spans(found, shard, data)
    found.record(record_of(shard, data))
    assert case.content(shard.file) == data


def test_a_comparison_takes_no_other_byte(plan: Plan, tmp_path: Path) -> None:
    shard, original = plan.shards[0], _Original(tmp_path / "reference")
    data = bytearray(wanted(tmp_path, shard))
    data[-1] ^= 1
    file = original.open_shard(shard)
    with pytest.raises(CheckFailed, match=f"tensor `{shard.specs[-1].name}` differs from element"):
        file.write(view(bytes(data[-4:])), len(data) - 4)
    file.close()
    stream = original.open_stream(shard, len(data) - 4)
    with pytest.raises(CheckFailed, match="differs when rebuilt"):
        stream.append(view(bytes(data[-4:])))
    stream.close()
    short = original.open_stream(shard, len(data) - 4)
    short.append(view(wanted(tmp_path, shard)[-4:-1]))
    with pytest.raises(CheckFailed, match="differs when rebuilt"):
        short.finish(threading.Event())
