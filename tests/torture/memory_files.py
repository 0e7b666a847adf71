"""A checkpoint that lies nowhere: its files in memory, behind the same narrow door as folders and repositories."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from skillmerge.checkpoints.safetensors import FileIdentity, Header, build_header, fetch_header, parse_header
from skillmerge.errors import InputError


class MemoryFiles:
    """A checkpoint's files in memory; see `checkpoint.Files`."""

    place, root, revision, remote, license = "memory", None, None, False, None

    def __init__(self, contents: Mapping[str, bytes]) -> None:
        self.contents = contents

    def names(self) -> list[str]:
        return sorted(self.contents)

    def path(self, name: str) -> str:
        return name

    def read(self, name: str, limit: int) -> bytes:
        if name not in self.contents:
            raise InputError(f"{name}: is missing")
        return self.contents[name]

    def headers(self, names: Sequence[str], sizes: Mapping[str, int]) -> list[Header]:
        return [self._header(name) for name in names]

    def _header(self, name: str) -> Header:
        content = self.read(name, 1 << 16)
        raw = fetch_header(lambda start, count: content[start : start + count], len(content), name)
        specs = parse_header(raw[8:], len(content), name, name)
        return Header(raw, specs, len(content), FileIdentity(0, 0, len(content), 0))

    def begin(self, name: str, position: int, buffer: memoryview) -> Callable[[], None]:
        buffer[:] = self.contents[name][position : position + len(buffer)]
        return lambda: None

    def announce(self, name: str, position: int, nbytes: int) -> None: ...

    def version(self, name: str) -> list[int | str]:
        return [len(self.contents[name]), 0]

    def known_digest(self, name: str) -> None:
        return None

    def check_unchanged(self, names: Sequence[str]) -> None: ...

    def cancel(self) -> None: ...

    def close(self) -> None: ...


def weight_file(shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """A file of zeros."""
    raw, specs = build_header((name, "BF16", shape) for name, shape in shapes.items())
    return raw + bytes(specs[-1].end - len(raw))
