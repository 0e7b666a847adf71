"""Where the bytes of a checkpoint are: a folder, a repository, memory. Knows files, nothing about tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from skillmerge.checkpoints.safetensors import Header, refuse_bulk, unique_keys
from skillmerge.errors import InputError

MAX_JSON_BYTES = 32_000_000
"""Room for an index of 300,000 tensors."""

_MAX_JSON_NESTING = 50


class Files(Protocol):
    """The files of one checkpoint, by name; a name has `/` in it where the file lies in a subfolder.

    place: what to call them in messages. root: the local folder, or None. revision: the commit, or None where
    there are no versions. remote: whether reading goes over a network. license: what the model card says it is.
    """

    @property
    def place(self) -> str: ...
    @property
    def root(self) -> Path | None: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def remote(self) -> bool: ...
    @property
    def license(self) -> str | None: ...

    def names(self) -> list[str]:
        """Every file, sorted. Raises InputError where there is no such place."""

    def path(self, name: str) -> str:
        """What to call one file in messages."""

    def read(self, name: str, limit: int) -> bytes:
        """A small file, whole. Raises InputError where it is missing, unsafe or larger than `limit`."""

    def headers(self, names: Sequence[str], sizes: Mapping[str, int]) -> list[Header]:
        """The headers of weight files, `sizes` being how many bytes each is likely to have at most.

        Raises InputError where one is missing, unsafe or damaged.
        """

    def begin(self, name: str, position: int, buffer: memoryview) -> Callable[[], None]:
        """Begin to fill `buffer` with a weight file's bytes from `position` on; call the result to wait.

        Either may raise InputError, StalePlan, TemporaryError.
        """

    def announce(self, name: str, position: int, nbytes: int) -> None:
        """Bytes that will be read soon."""

    def version(self, name: str) -> list[int | str]:
        """What tells a weight file from another version of it."""

    def known_digest(self, name: str) -> tuple[int, tuple[str, str]] | None:
        """Size and digest (`sha256` or `git_sha1`, hex digits) of a file as whoever keeps it states them, or None
        where it has to be read."""

    def check_unchanged(self, names: Sequence[str]) -> None:
        """Raise StalePlan where a weight file is no longer the one whose header was read."""

    def cancel(self) -> None:
        """Give up waiting: what is being read is no longer wanted."""

    def close(self) -> None: ...


def read_json_object(files: Files, name: str, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint, read strictly. Raises InputError."""
    content, path = files.read(name, limit), files.path(name)
    try:
        refuse_bulk(content, limit)
        document = json.loads(content.decode("utf-8"), object_pairs_hook=unique_keys)
    except RecursionError as error:
        raise InputError(f"{path}: is nested too deeply") from error
    except ValueError as error:
        raise InputError(f"{path}: is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise InputError(f"{path}: is not a JSON object")
    if _nests_deeper(document, _MAX_JSON_NESTING):
        raise InputError(f"{path}: is nested too deeply")
    return document


def digest_of(kind: str, content: bytes | bytearray) -> tuple[str, str]:
    """The digest of a file's content. git_sha1 is the name that git gives to a file with that content."""
    if kind == "git_sha1":
        return kind, hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    return kind, hashlib.sha256(content).hexdigest()


def _nests_deeper(document: Any, limit: int) -> bool:
    level = [document]
    for _ in range(limit):
        level = [
            inner
            for item in level
            if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
    return bool(level)
