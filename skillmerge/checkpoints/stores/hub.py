"""The files of a checkpoint in a repository on the Hugging Face Hub, read where they lie.

One request names the commit and every file with its size and digest; from then on everything speaks of that
commit. Headers and weights are range requests straight into the caller's buffers; nothing is stored. Files
that the local Hub cache has are read from there.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import build_hf_headers

from skillmerge.checkpoints.checkpoint import INDEX_FILE
from skillmerge.checkpoints.place import Location
from skillmerge.checkpoints.store import Stat, Store, Wait, Where, digest_of, nothing_to_wait_for
from skillmerge.checkpoints.stores.folder import Folder
from skillmerge.checkpoints.stores.http_ranges import Answer, Storage, from_hub
from skillmerge.checkpoints.stores.hub_client import refused, retried
from skillmerge.checkpoints.stores.retries import Passing
from skillmerge.errors import NEAR, InputError, StalePlan, TemporaryError, some
from skillmerge.threads import hash_file

_CONNECTIONS = 16
"""Requests in flight per repository."""

_REDIRECTS = 5


_OF_A_MODEL = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")


class Repository:
    """A repository at one commit. See `Store` for what its methods promise."""

    def __init__(self, location: Location, *, download: bool = False, known: Mapping[str, Stat] | None = None) -> None:
        """Find the commit and its files: one request, or none where the files of a commit are `known`. `download` puts
        weight files into the Hub's cache."""
        self._prefix = f"{location.subfolder}/" if location.subfolder else ""
        if known is not None:
            self.location, license = location, None
            self._listed = dict(known)
        else:
            info = _info(location)
            self.location = location.at(info.sha)
            license = info.card_data.license if info.card_data is not None else None
            license = license if isinstance(license, str) else None
            self._listed = self._listing(info.siblings or [])
        self.at = Where(str(self.location), None, self.location.revision, license, remote=True)
        self._download = download
        self._signed: dict[str, str] = {}
        self._cached: Folder | None = None
        self._cached_names: set[str] = set()
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(_CONNECTIONS)
        self._storage = Storage()

    def _listing(self, siblings: Sequence[Any]) -> dict[str, Stat]:
        files = {}
        for sibling in siblings:
            if not sibling.rfilename.startswith(self._prefix):
                continue
            if sibling.size is None or not (sibling.lfs or sibling.blob_id):
                raise InputError(f"{self.location}: the Hub says nothing of the size of {sibling.rfilename}")
            digest = ("sha256", sibling.lfs.sha256) if sibling.lfs else ("git_sha1", sibling.blob_id)
            files[sibling.rfilename.removeprefix(self._prefix)] = Stat(sibling.size, (sibling.size, *digest), digest)
        if not files and self._prefix:
            raise InputError(f"{self.location}: the repository has no such folder")
        return dict(sorted(files.items()))

    def list(self) -> Mapping[str, Stat]:
        return self._listed

    def read_small(self, file: str, limit: int) -> bytes:
        size, digest = self._stat(file).size, self._stat(file).digest
        if size > limit:
            raise InputError(f"{self.at.path(file)}: is not a regular file of acceptable size")
        cached = self._from_cache(file)
        if cached is None and self._download:
            cached = self._into_cache(file)
        content = bytearray(size)
        if cached is not None:
            content[:] = cached.read_bytes()
        elif size:
            self._fetch(file, 0, memoryview(content))
        if digest is not None and digest_of(digest[0], content) != digest:
            raise InputError(
                f"{self.at.path(file)}: does not have the digest that the Hub says it has",
                fix="fetch it again" if cached is None else f"the local copy is damaged: remove {cached}",
            )
        return bytes(content)

    def peek(self, file: str, start: int, count: int) -> bytes:
        """Read from the local cache what it has, now and later, unless it is to be compared with its
        digest."""
        size = self._stat(file).size
        if not self._download:
            if file not in self._cached_names and (found := self._from_cache(file)) is not None:
                self._adopt(file, found)
            if self._cached is not None and file in self._cached_names:
                return self._cached.peek(file, start, count)
        content = bytearray(max(0, min(count, size - start)))
        if content:
            self._fetch(file, start, memoryview(content))
        return bytes(content)

    def read(self, file: str, start: int, into: memoryview) -> Wait:
        self._stat(file)
        if not into:
            return nothing_to_wait_for
        if self._download and file not in self._cached_names:
            with self._lock:
                if file not in self._cached_names:
                    self._adopt(file, self._downloaded(file))
        if self._cached is not None and file in self._cached_names:
            return self._cached.read(file, start, into)
        return self._pool.submit(self._fetch, file, start, into).result

    def hint(self, file: str, start: int, nbytes: int) -> None:
        if self._cached is not None and file in self._cached_names:
            self._cached.hint(file, start, nbytes)

    def check_unchanged(self, files: Collection[str]) -> None:
        """A commit does not change; a copy in the cache might."""
        if self._cached is not None:
            self._cached.check_unchanged([file for file in files if file in self._cached_names])

    def cancel(self) -> None:
        self._stop.set()
        self._storage.cancel()

    def close(self) -> None:
        self.cancel()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._storage.close()
        if self._cached is not None:
            self._cached.close()

    def _stat(self, name: str) -> Stat:
        if name not in self._listed:
            raise InputError(
                f"{self.at.path(name)}: is missing", fix="the repository is incomplete: see what its index names"
            )
        return self._listed[name]

    # The local cache.

    def _from_cache(self, name: str) -> Path | None:
        """Return a file of exactly this commit in the Hub's cache, of the right size."""
        found = try_to_load_from_cache(self.location.repository, self._prefix + name, revision=self.at.revision)
        if not isinstance(found, str):
            return None
        path = Path(found)
        return path if path.is_file() and path.stat().st_size == self._listed[name].size else None

    def _adopt(self, name: str, path: Path) -> None:
        """Read a weight file from the cache from now on."""
        with self._lock:
            if self._cached is None:
                self._cached = Folder(path.parents[name.count("/")])
        self._cached.peek(name, 0, 0)
        self._cached_names.add(name)

    def _into_cache(self, name: str) -> Path:
        """Return a file in the Hub's cache, fetched where it is not there."""
        repository, path = self.location.repository, self._prefix + name
        return Path(retried(self.at.place, lambda: hf_hub_download(repository, path, revision=self.at.revision)))

    def _downloaded(self, name: str) -> Path:
        """Return a weight file in the cache, compared with the digest that the Hub states."""
        path = self._into_cache(name)
        kind, stated = self._listed[name].digest or ("", "")
        if kind == "sha256" and hash_file(path) != stated:
            raise InputError(
                f"{self.at.path(name)}: what was downloaded does not have the digest that the Hub states",
                fix=f"remove {path.resolve()} and run the same command again",
            )
        return path

    # Ranges over the network.

    def _fetch(self, name: str, position: int, buffer: memoryview) -> None:
        """Fill `buffer` from `position` on, going on behind what has arrived where a connection breaks.

        Raises TemporaryError if the network or the server fail for good, StalePlan if the file is
        another one, InputError if it may not be read.
        """
        done = 0

        def attempt() -> None:
            nonlocal done
            for count in self._ask(name, position + done, buffer[done:]):
                done += count
                if self._stop.is_set():
                    raise Passing("stopped")
            if done < len(buffer):
                raise Passing(f"the connection ended {len(buffer) - done} bytes early")

        retried(self.at.place, attempt, progress=lambda: done, stop=self._stop)

    def _ask(self, name: str, position: int, buffer: memoryview) -> Iterator[int]:
        """Fill `buffer` with one request, or as much of it as comes: the bytes that came, again and again."""
        url = self._signed.get(name)
        wanted = {"Range": f"bytes={position}-{position + len(buffer) - 1}", "Accept-Encoding": "identity"}
        fresh = False
        for _ in range(_REDIRECTS):
            target = url or hf_hub_url(
                self.location.repository, self._prefix + name, revision=self.at.revision, endpoint=constants.ENDPOINT
            )
            hub = _is_hub(target)
            with (
                from_hub(target, {**build_hf_headers(), **wanted}) if hub else self._storage.get(target, wanted)
            ) as answer:
                if answer.status in (301, 302, 303, 307, 308):
                    self._check_commit(name, answer.headers)
                    if "location" not in answer.headers:
                        raise Passing("the server redirects to nowhere")
                    url, fresh = urljoin(target, answer.headers["location"]), True
                    if not _is_hub(url):
                        self._signed[name] = url  # good for many ranges, until it expires
                    continue
                if not hub and answer.status in (400, 401, 403, 404, 410):
                    self._signed.pop(name, None)
                    if fresh:
                        raise Passing(f"the storage refuses an address that the Hub has just given ({answer.status})")
                    url = None
                    continue
                if hub:
                    self._check_commit(name, answer.headers)
                self._check_range(name, answer, position, len(buffer))
                yield from answer.fill(buffer)
                return
        raise InputError(f"{self.at.path(name)}: the server redirects without end")

    def _check_commit(self, name: str, headers: Mapping[str, str]) -> None:
        commit = headers.get("x-repo-commit")
        etag = (headers.get("x-linked-etag") or headers.get("etag") or "").removeprefix("W/").strip('"')
        _, stated = self._listed[name].digest or ("", "")
        if commit not in (None, self.at.revision) or (headers.get("x-linked-etag") and etag != stated):
            raise StalePlan(
                f"{self.at.path(name)}: the server sent another version of it ({commit or etag})",
                fix="run the same command again",
            )

    def _check_range(self, name: str, answer: Answer, position: int, count: int) -> None:
        size = self._listed[name].size
        if answer.status == 200 and answer.headers.get("content-type", "").startswith("text/html"):
            raise Passing("a web page came in place of the file")
        if answer.status == 200 and position == 0 and count == size:
            if answer.headers.get("content-length", str(size)) != str(size):
                raise Passing(f"{answer.headers['content-length']} bytes came in place of {size}")
            return
        if answer.status == 200:
            fix = f"fetch it first: `hf download {self.location.repository}`"
            raise InputError(f"{self.at.path(name)}: the server does not serve ranges", fix=fix)
        if answer.status != 206:
            raise refused(answer.status, answer.headers, self.at.place)
        wanted = f"bytes {position}-{position + count - 1}/{size}"
        if answer.headers.get("content-range", wanted) != wanted:
            raise StalePlan(
                f"{self.at.path(name)}: the server sent {answer.headers['content-range']} where {wanted} was requested",
                fix="run the same command again",
            )


def _info(location: Location) -> Any:
    """Return what the Hub says of a revision: its commit, and every file with size and digest."""
    info = retried(
        str(location),
        lambda: HfApi().model_info(
            location.repository,
            revision=location.revision or None,
            files_metadata=True,
            timeout=constants.HF_HUB_ETAG_TIMEOUT,
        ),
    )
    if not info.sha:
        raise InputError(f"{location}: the Hub names no commit for it")
    return info


def _is_hub(url: str) -> bool:
    """Return whether a request to `url` may carry the token."""
    hub, asked = urlsplit(constants.ENDPOINT), urlsplit(url)
    return (hub.scheme, hub.netloc) == (asked.scheme, asked.netloc)


def open_location(location: Location, *, download: bool = False, known: Mapping[str, Stat] | None = None) -> Store:
    """Return the files of a model on the Hub. Offline, those of the local cache. known: the files of this commit.

    Raises InputError, TemporaryError.
    """
    if not constants.HF_HUB_OFFLINE:
        try:
            return Repository(location, download=download, known=known)
        except TemporaryError as error:
            if not _cached(location):
                raise
            fix = f"{error.fix}; or read it from the local cache, which has this model: set HF_HUB_OFFLINE=1"
            raise TemporaryError(error.message, fix=fix) from error
    try:
        snapshot, is_sure = _snapshot(location)
    except (LocalEntryNotFoundError, HFValidationError) as error:
        others = [] if location.revision else [ref for ref in _refs(location) if ref != "main"]
        named = some([f"`{ref}`" for ref in others], NEAR)
        which = f", which has its revision{'s' if len(others) > 1 else ''} {named}" if others else ""
        written = [ref if ref.startswith("refs/pr/") else ref.replace("/", "%2F") for ref in others]
        raise InputError(
            f"{location} is not in the local cache{which}, and HF_HUB_OFFLINE is set",
            fix=f"unset HF_HUB_OFFLINE, or where there is a network: hf download {location.repository}"
            + (f" --revision {location.revision}" if location.revision else "")
            + (f"; to read what the cache has, name its revision: {location.at(written[0])}" if others else ""),
        ) from error
    doubt = "" if is_sure else f"the local cache does not say of which branch its one commit is: {snapshot.name}"
    return Folder(snapshot / location.subfolder, revision=snapshot.name, doubt=doubt)


def _snapshot(location: Location) -> tuple[Path, bool]:
    """Return the folder of a revision in the Hub's cache, and whether that is certain: files that were fetched by
    their commit leave no note of the branch that they are of. Without a revision, the only snapshot is meant, if the
    cache has no branch at all. Raises LocalEntryNotFoundError."""
    try:
        found = snapshot_download(location.repository, revision=location.revision or None, local_files_only=True)
        return Path(found), True
    except LocalEntryNotFoundError:
        only = [] if location.revision or _refs(location) else list(_cache_of(location).glob("snapshots/*/"))
        if len(only) != 1:
            raise
        return only[0], False


def _refs(location: Location) -> list[str]:
    """Return the branches and tags that the Hub's cache knows of a repository."""
    folder = _cache_of(location) / "refs"
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _cache_of(location: Location) -> Path:
    return Path(constants.HF_HUB_CACHE, "--".join(["models", *location.repository.split("/")]))


def _cached(location: Location) -> bool:
    """Return whether the Hub's cache has a model, all of its weight files."""
    try:
        folder = _snapshot(location)[0] / location.subfolder
        index = folder / INDEX_FILE
        if not index.is_file():
            return any(folder.glob("*.safetensors"))
        return all((folder / file).is_file() for file in set(json.loads(index.read_text())["weight_map"].values()))
    except Exception:  # whatever is wrong with a cache that was only to be looked into
        return False


def download(location: Location) -> Path:
    """Return the folder in the Hub's cache with all of a model that a runtime reads, fetched where it is not there."""
    prefix = f"{location.subfolder}/" if location.subfolder else ""
    wanted = [prefix + pattern for pattern in _OF_A_MODEL]
    snapshot = retried(
        str(location),
        lambda: snapshot_download(location.repository, revision=location.revision or None, allow_patterns=wanted),
    )
    return Path(snapshot, location.subfolder)
