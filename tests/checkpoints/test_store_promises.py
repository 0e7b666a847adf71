"""What every store promises, whoever it is: a folder, a repository (streamed, or through the local cache), a bucket,
memory."""

from __future__ import annotations

import dataclasses
import hashlib
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from bucket_server import S3Server
from conftest import read_checkpoint, write_family, write_recipe
from hub_server import HubServer

import skillmerge
from skillmerge.checkpoints import schemes
from skillmerge.checkpoints.place import Local, parse_location
from skillmerge.checkpoints.schemes import Scheme, open_store, parse_place
from skillmerge.checkpoints.store import Store, digest_of
from skillmerge.checkpoints.stores import retries
from skillmerge.checkpoints.stores.folder import Folder
from skillmerge.checkpoints.stores.headed import Headed
from skillmerge.checkpoints.stores.memory import Memory
from skillmerge.checkpoints.stores.overlaid import Overlaid
from skillmerge.errors import InputError, StalePlan, TemporaryError

WEIGHTS = "model.safetensors"
SIZE = 3_000_000
FILES = {
    "config.json": b'{"a": 1}',
    "empty.txt": b"",
    "inner/notes.txt": b"deep",
    WEIGHTS: random.Random(7).randbytes(SIZE),
    "other.safetensors": random.Random(8).randbytes(5000),
}


@dataclass
class Case:
    """A store of FILES, and how somebody else changes a file of its place."""

    store: Store
    change: Callable[[str, bytes], object]
    hub: HubServer | None = None
    stall: Callable[[Callable[[], None]], None] | None = None
    """Calls a function where bytes are asked for over a network."""


@pytest.fixture(params=["folder", "hub", "hub cache", "bucket", "memory", "headed", "overlaid"])
def case(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    if request.param == "memory":
        contents = dict(FILES)
        yield Case(Memory(contents), contents.__setitem__)
    elif request.param == "headed":  # a file whose header is known, and the others
        contents = dict(FILES)
        yield Case(Headed(Memory(contents), {"other.safetensors": b"head"}), contents.__setitem__)
    elif request.param == "overlaid":  # some files of one store over those of another
        under, over = dict(FILES) | {"empty.txt": b"other"}, dict(FILES) | {WEIGHTS: b"other"}
        below, above = Memory(under), Memory(over)
        del under["config.json"]

        def change_both(name: str, content: bytes) -> None:
            under[name] = over[name] = content

        yield Case(Overlaid(below, above, lambda name: name.endswith((".txt", ".json"))), change_both)
    elif request.param == "folder":
        folder = write(tmp_path / "model")

        def change(name: str, content: bytes) -> None:
            (folder / "new").write_bytes(content)
            (folder / "new").rename(folder / name)

        assert parse_place(str(folder)) is None, "a path has no scheme"
        store = open_store(Local(folder))
        yield Case(store, change)
        store.close()
    elif request.param == "bucket":
        s3: S3Server = request.getfixturevalue("s3")
        store = open_store(parse_place(s3.put_folder("some/model", write(tmp_path / "model"))) or Local(tmp_path))
        s3.put("some/model-2/other.safetensors", b"a neighbor")

        def stall_s3(action: Callable[[], None]) -> None:
            s3.fail("GET /bucket/some/model/model.safetensors", lambda environ, start: action(), times=99)

        yield Case(store, lambda name, content: s3.put(f"some/model/{name}", content), stall=stall_s3)
        store.close()
    else:
        monkeypatch.setattr(retries, "FIRST_WAIT", 0.001)
        with HubServer(tmp_path / "hub") as hub, hub.environment(monkeypatch):
            hub.create_from("acme/model", write(tmp_path / "model"))
            store = open_store(parse_location("hf://acme/model"), download=request.param == "hub cache")

            def stall(action: Callable[[], None]) -> None:
                hub.fail("call", "GET /storage", times=99, action=action)

            streamed = stall if request.param == "hub" else None
            yield Case(store, lambda name, content: hub.commit("acme/model", {name: content}), hub, streamed)
            store.close()


@pytest.fixture
def store(case: Case) -> Store:
    return case.store


def write(folder: Path) -> Path:
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def read(store: Store, name: str, start: int, count: int) -> bytes:
    buffer = bytearray(count)
    store.read(name, start, memoryview(buffer))()
    return bytes(buffer)


def test_a_known_header_is_given_and_the_rest_is_read() -> None:
    store = Headed(Memory(dict(FILES)), {WEIGHTS: b"head"})
    assert (store.peek(WEIGHTS, 0, 9), store.peek(WEIGHTS, 0, 2)) == (b"head", b"he")
    assert store.peek(WEIGHTS, 4, 9) == FILES[WEIGHTS][4:13]
    assert read(store, WEIGHTS, 0, 9) == FILES[WEIGHTS][:9]
    assert store.peek("other.safetensors", 0, 9) == FILES["other.safetensors"][:9]


# What there is.


def test_every_file_is_listed_by_name(store: Store) -> None:
    listed = store.list()
    assert list(listed) == sorted(FILES)
    assert {name: stat.size for name, stat in listed.items()} == {name: len(data) for name, data in FILES.items()}


def test_stated_digests_are_those_of_the_content(case: Case) -> None:
    stated = {name: stat.digest for name, stat in case.store.list().items() if stat.digest is not None}
    assert stated == {name: digest_of(digest[0], FILES[name]) for name, digest in stated.items()}
    assert bool(stated) == (case.hub is not None)
    assert case.store.at.remote == str(case.store.at.place).startswith(("hf://", "s3://"))


def test_versions_tell_files_apart(store: Store) -> None:
    versions = [stat.version for stat in store.list().values()]
    assert len(set(versions)) == len(versions)


def test_a_place_says_where_it_is_and_does_not_change(store: Store) -> None:
    assert store.at.path("config.json").startswith(store.at.place)
    assert store.at.path("config.json").endswith("/config.json")
    with pytest.raises(dataclasses.FrozenInstanceError):
        store.at.place = "elsewhere"  # type: ignore[misc]


# Reading.

RANGES = [(0, 1), (0, SIZE), (1, 7), (4095, 4098), (SIZE - 1, 1), (1_234_567, 1_000_001), (77, 0), (SIZE, 0)]


@pytest.mark.parametrize(("start", "count"), RANGES)
def test_any_range_is_read_and_nothing_beside_it(store: Store, start: int, count: int) -> None:
    buffer = bytearray(b"\xaa" * (count + 20))
    store.read(WEIGHTS, start, memoryview(buffer)[10 : 10 + count])()
    assert buffer[10 : 10 + count] == FILES[WEIGHTS][start : start + count]
    assert buffer[:10] + buffer[10 + count :] == b"\xaa" * 20


@pytest.mark.parametrize(("start", "count"), [*RANGES, (SIZE - 3, 100), (SIZE + 5, 3)])
def test_peeking_gives_fewer_bytes_only_at_the_end(store: Store, start: int, count: int) -> None:
    assert store.peek(WEIGHTS, start, count) == FILES[WEIGHTS][start : start + count]


def test_reads_are_waited_for_in_any_order(store: Store) -> None:
    starts = random.Random(1).sample(range(SIZE - 5000), 40)
    buffers = [bytearray(5000) for _ in starts]
    waits = [store.read(WEIGHTS, start, memoryview(buffer)) for start, buffer in zip(starts, buffers, strict=True)]
    for wait in reversed(waits):
        wait()
    assert [bytes(buffer) for buffer in buffers] == [FILES[WEIGHTS][start : start + 5000] for start in starts]


def test_threads_read_together(store: Store) -> None:
    names = [WEIGHTS, "other.safetensors"] * 20
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda name: read(store, name, 100, 4000), names))
    assert found == [FILES[name][100:4100] for name in names]


def test_a_hint_changes_nothing(store: Store) -> None:
    store.peek(WEIGHTS, 0, 8)
    store.hint(WEIGHTS, 4096, 100_000)
    assert read(store, WEIGHTS, 4096, 100) == FILES[WEIGHTS][4096:4196]


def test_small_files_are_read_whole_up_to_a_limit(store: Store) -> None:
    for name in ("config.json", "empty.txt", "inner/notes.txt"):
        assert store.read_small(name, 8) == FILES[name]
    with pytest.raises(InputError, match=r"config\.json: is not a regular file of acceptable size"):
        store.read_small("config.json", 7)


LOOKS: dict[str, Callable[[Store, str], bytes]] = {
    "read_small": lambda store, name: store.read_small(name, 100),
    "peek": lambda store, name: store.peek(name, 0, 8),
    "read": lambda store, name: read(store, name, 0, 8),
}


@pytest.mark.parametrize("look", LOOKS)
def test_what_is_not_there_is_told_by_its_name(store: Store, look: str) -> None:
    with pytest.raises(InputError, match=r"none\.safetensors: is missing"):
        LOOKS[look](store, "none.safetensors")


def test_a_small_file_is_compared_with_its_stated_digest(case: Case) -> None:
    if case.hub is None:
        assert case.store.list()["config.json"].digest is None, "which is nothing to compare with"
        return
    tree = case.hub.tree("acme/model")
    tree["config.json"] = dataclasses.replace(tree["config.json"], content=b'{"a": 2}')
    with pytest.raises(InputError, match="does not have the digest that the Hub says it has"):
        case.store.read_small("config.json", 100)


# Changes.


@pytest.mark.parametrize("seen", ["listed", "peeked", "read"])
def test_a_changed_file_is_noticed_or_is_still_the_old_one(case: Case, seen: str) -> None:
    store = case.store
    store.list()
    if seen != "listed":
        store.peek(WEIGHTS, 0, 8)
    if seen == "read":
        read(store, WEIGHTS, 0, 8)
    store.check_unchanged([WEIGHTS])
    case.change(WEIGHTS, b"x" * SIZE)
    if case.hub is not None:  # a commit means itself
        store.check_unchanged([WEIGHTS])
        assert read(store, WEIGHTS, 0, SIZE) == FILES[WEIGHTS]
        return
    with pytest.raises(StalePlan, match=f"{WEIGHTS} changed while it was in use"):
        store.check_unchanged(["other.safetensors", WEIGHTS])
    store.check_unchanged(["other.safetensors"])
    with suppress(StalePlan):  # bytes that are open already may be read, if they are the old ones
        assert read(store, WEIGHTS, 0, SIZE) == FILES[WEIGHTS]
    with pytest.raises(StalePlan):
        store.peek(WEIGHTS, 0, 8)


# Ends.


def test_it_may_be_closed_twice(store: Store) -> None:
    read(store, WEIGHTS, 0, 8)
    store.close()
    store.close()


def test_cancelling_ends_the_reads_that_wait(case: Case) -> None:
    """At once, whatever a storage host does; where nothing is waited for there is nothing to end."""
    reached, go_on = threading.Event(), threading.Event()

    def stall() -> None:
        reached.set()
        go_on.wait(20)

    if case.stall is not None:
        case.stall(stall)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read, case.store, WEIGHTS, 0, 5000)
        if case.stall is not None:
            assert reached.wait(20)
        case.store.cancel()
        if case.stall is None:
            go_on.set()
            assert reading.result(20) == FILES[WEIGHTS][:5000]
            return
        started = time.monotonic()
        with pytest.raises(TemporaryError, match="stopped while it waited"):
            reading.result(20)
        assert time.monotonic() - started < 10
        go_on.set()


# A place of another kind.


@dataclass(frozen=True)
class Shelf:
    """Where a toy store is: shelf://NAME."""

    name: str
    scheme: ClassVar[str] = "shelf"
    versioned: ClassVar[bool] = False
    revision: ClassVar[str] = ""
    pinned: ClassVar[bool] = False

    def at(self, commit: str) -> Shelf:
        return self


def test_another_store_is_one_line_in_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    direct = skillmerge.apply(write_family(tmp_path), tmp_path / "direct")
    shelves = {
        model: {file.name: file.read_bytes() for file in (tmp_path / model).iterdir()}
        for model in ("target", "rl", "sft")
    }
    scheme = Scheme(
        lambda uri: Shelf(uri.removeprefix("shelf://")),
        lambda place, download: Memory(shelves[place.name], f"shelf://{place.name}"),
        lambda place: nullcontext(Path()),
    )
    monkeypatch.setitem(schemes.SCHEMES, "shelf", scheme)
    for model in shelves:
        shutil.rmtree(tmp_path / model)
    recipe = write_recipe(tmp_path, models={model: f"shelf://{model}" for model in shelves})
    through = skillmerge.apply(recipe, tmp_path / "through", hash_inputs=True)
    assert read_checkpoint(through.output).keys() == read_checkpoint(direct.output).keys()
    for file in direct.output.glob("*.safetensors"):
        assert (through.output / file.name).read_bytes() == file.read_bytes()
    (first, *_) = through.manifest.inputs[0].files
    assert first.sha256 == hashlib.sha256(shelves["target"][first.name]).hexdigest()


@pytest.mark.parametrize("look", LOOKS)
def test_a_folder_keeps_to_itself_whatever_reads_it(tmp_path: Path, look: str) -> None:
    """Also where only `read` is called, of a file that was listed."""
    write(tmp_path / "model")
    (tmp_path / "outside").write_bytes(b"a secret")
    (tmp_path / "model" / "link.safetensors").symlink_to(tmp_path / "outside")
    folder = Folder(tmp_path / "model")
    assert folder.list()["link.safetensors"].size == 8
    with pytest.raises(InputError, match="is a link that leaves its folder"):
        LOOKS[look](folder, "link.safetensors")
    allowed = Folder(tmp_path / "model", follow_links=True)
    assert LOOKS[look](allowed, "link.safetensors") == b"a secret"
    allowed.close()
