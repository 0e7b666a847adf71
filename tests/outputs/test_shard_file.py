"""The file of a shard takes its bytes from any side, buffered or direct."""

from __future__ import annotations

import errno
import mmap
import os
import random
from pathlib import Path

import pytest

from skillmerge.errors import OutputLocked, ResourceError
from skillmerge.outputs.shard_file import TRIAL_BYTES, ShardFile, StreamFile, WriteMode
from skillmerge.tensors import PAGE

# -------------------------------------------------------------------------------------------------- shard files


@pytest.fixture
def memory() -> memoryview:
    """Page-aligned memory with random bytes, as direct I/O asks for."""
    size = 6 * PAGE
    mapped = mmap.mmap(-1, size)
    mapped[:] = random.Random(0).randbytes(size)
    return memoryview(mapped)


def direct_mode() -> WriteMode:
    mode = WriteMode()
    mode.direct = True
    return mode


def write_pieces(path: Path, data: memoryview, cuts: list[int], mode: WriteMode) -> bytes:
    """A shard of `data`, its first piece as the header and the rest written from the last to the first."""
    path.unlink(missing_ok=True)
    header = bytes(data[: cuts[0]])
    shard = ShardFile(path, len(data), header, mode)
    for first, last in reversed(list(zip(cuts, [*cuts[1:], len(data)], strict=True))):
        shard.write(data[first:last], first)
    shard.finish()
    return path.read_bytes()


def has_direct(folder: Path) -> bool:
    shard = ShardFile(folder / "probe", 10, b"", WriteMode())
    found = shard._direct >= 0
    shard.close()
    return found


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
def test_shard_bytes_do_not_depend_on_cuts_or_mode(tmp_path: Path, memory: memoryview, direct: bool) -> None:
    if direct and not has_direct(tmp_path):
        pytest.skip("this filesystem has no direct I/O")
    dice = random.Random(1)
    edges = [1, 2, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE - 1, 2 * PAGE, 3 * PAGE + 1, 5 * PAGE, len(memory) - 1]
    cuttings = [[edge] for edge in edges] + [sorted(dice.sample(range(1, len(memory)), 4)) for _ in range(60)]
    cuttings += [sorted(dice.sample(edges, 3)) for _ in range(30)]
    for cuts in cuttings:
        mode = direct_mode() if direct else WriteMode()
        assert write_pieces(tmp_path / "shard", memory, cuts, mode) == memory.tobytes(), cuts


def test_shard_written_direct_really_is(tmp_path: Path, memory: memoryview, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_direct(tmp_path):
        pytest.skip("this filesystem has no direct I/O")
    real, pages = os.pwrite, []

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        if Path(f"/proc/self/fd/{descriptor}").exists():
            flags = Path(f"/proc/self/fdinfo/{descriptor}").read_text().split("flags:")[1].split()[0]
            if int(flags, 8) & os.O_DIRECT:
                pages.append((offset, len(data)))
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    write_pieces(tmp_path / "shard", memory, [100], direct_mode())
    assert pages == [(PAGE, 5 * PAGE)]


@pytest.mark.parametrize("written_first", [0, PAGE, PAGE + 512], ids=["refused", "one page", "not a page"])
def test_shard_is_buffered_where_direct_writes_are_refused(
    tmp_path: Path, memory: memoryview, monkeypatch: pytest.MonkeyPatch, written_first: int
) -> None:
    """Some storage opens for direct I/O and then asks for more alignment than a page, or writes short."""
    if not has_direct(tmp_path):
        pytest.skip("this filesystem has no direct I/O")
    mode = direct_mode()
    shard = ShardFile(tmp_path / "shard", len(memory), b"", mode)
    real, left = os.pwrite, [written_first]

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        if descriptor != shard._direct:
            return real(descriptor, data, offset)
        if offset % PAGE or not left:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(shard._descriptor, data[: left.pop()], offset) if left[0] else refuse(left)

    def refuse(left: list[int]) -> int:
        left.clear()
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "pwrite", pwrite)
    shard.write(memory, 0)
    shard.finish()
    assert (tmp_path / "shard").read_bytes() == memory.tobytes()
    assert mode.direct is (written_first % PAGE != 0)
    mode.note(10 * TRIAL_BYTES)
    assert mode.direct is (written_first % PAGE != 0), "storage that refused is not asked again"


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
def test_shard_survives_short_writes(
    tmp_path: Path, memory: memoryview, monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: real(descriptor, data[:PAGE], offset))
    mode = direct_mode() if direct else WriteMode()
    assert write_pieces(tmp_path / "shard", memory, [7, PAGE + 9], mode) == memory.tobytes()


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_shard_that_cannot_be_written_says_so(
    tmp_path: Path, memory: memoryview, monkeypatch: pytest.MonkeyPatch, number: int, direct: bool
) -> None:
    shard = ShardFile(tmp_path / "shard", len(memory), b"", direct_mode() if direct else WriteMode())

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(ResourceError, match="shard") as caught:
        shard.write(memory, 0)
    assert caught.value.exit_status == 5
    shard.close()


def test_shard_that_cannot_be_begun_leaves_nothing_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(os.listdir("/dev/fd"))
    monkeypatch.setattr(os, "pwrite", lambda *arguments: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(ResourceError):
        ShardFile(tmp_path / "shard", 10, b"header", WriteMode())
    assert len(os.listdir("/dev/fd")) == before


def test_shard_never_writes_into_a_file_that_is_there(tmp_path: Path) -> None:
    """Where locks lock nothing it may be another run's."""
    path = tmp_path / "shard"
    path.write_bytes(b"x" * 100)
    with pytest.raises(OutputLocked, match=f"another run is writing {path}"):
        ShardFile(path, 8, b"head", WriteMode())
    with pytest.raises(OutputLocked, match=f"another run is writing {path}"):
        StreamFile(path, 0)
    assert path.read_bytes() == b"x" * 100


# --------------------------------------------------------------------------------------------------- write mode


@pytest.mark.parametrize(("buffered", "direct", "winner"), [(1.0, 2.0, False), (2.0, 1.0, True)])
def test_write_mode_tries_both_and_takes_the_faster(
    monkeypatch: pytest.MonkeyPatch, buffered: float, direct: float, winner: bool
) -> None:
    clock = [0.0]
    monkeypatch.setattr("skillmerge.outputs.shard_file.time.monotonic", lambda: clock[0])
    mode = WriteMode()
    tried = []
    for _ in range(20):
        tried.append(mode.direct)
        clock[0] += direct if mode.direct else buffered
        mode.note(TRIAL_BYTES // 2)
    assert set(tried[:8]) == {False, True}
    assert set(tried[8:]) == {winner}
