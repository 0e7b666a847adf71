"""Ranges of files over HTTP, straight into the caller's memory.

The Hub answers a request for a weight file with a signed storage address, which needs no token. Reading that
through the general client costs more processor time than the merge itself (it hands over small pieces, each
copied several times under Python's lock); the standard library's client fills a buffer where it lies. What
the general client alone knows (proxies, certificates of one's own) stays with it.
"""

from __future__ import annotations

import http.client
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import SplitResult, urlsplit
from urllib.request import getproxies, proxy_bypass

from huggingface_hub import constants
from huggingface_hub.utils import get_session, hf_raise_for_status

from skillmerge.checkpoints.hubclient import Passing

_PIECE = 1 << 20
"""Bytes asked of a connection at once; what has arrived counts as progress if it breaks."""

_TOO_MUCH = "the server sent more than was asked for"


@dataclass(frozen=True, slots=True)
class Answer:
    """A response whose body has not been read.

    headers: by lower-case name. fill: put the body into a buffer, yielding how many bytes came each time; fewer in
    all than the buffer holds where the connection ends. Raises Passing where the server sends more,
    ConnectionError, TimeoutError.
    """

    status: int
    headers: Mapping[str, str]
    fill: Callable[[memoryview], Iterator[int]]


@contextmanager
def from_hub(url: str, headers: Mapping[str, str]) -> Iterator[Answer]:
    """GET from the Hub itself; redirects are answers. Raises huggingface_hub's errors."""
    with _through_client(url, headers) as response:
        if response.status_code >= 400:
            hf_raise_for_status(response)
        yield _answer(response)


@contextmanager
def _through_client(url: str, headers: Mapping[str, str]) -> Iterator[Any]:
    with get_session().stream(
        "GET", url, headers=dict(headers), timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT, follow_redirects=False
    ) as response:
        yield response


def _answer(response: Any) -> Answer:
    return Answer(response.status_code, response.headers, partial(_copied, response.iter_raw()))


def _copied(pieces: Iterator[bytes], buffer: memoryview) -> Iterator[int]:
    done = 0
    for piece in pieces:
        if len(piece) > len(buffer) - done:
            raise Passing(_TOO_MUCH)
        buffer[done : done + len(piece)] = piece
        done += len(piece)
        yield len(piece)


class Storage:
    """Connections to storage hosts, one per thread and host, kept open between ranges."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._open: list[http.client.HTTPConnection] = []
        self._lock = threading.Lock()
        self._tls: ssl.SSLContext | None = None
        self._refused: set[str] = set()

    @contextmanager
    def get(self, url: str, headers: Mapping[str, str]) -> Iterator[Answer]:
        """GET without a token; redirects are answers. Raises ConnectionError, TimeoutError, or as the client."""
        place = urlsplit(url)
        if not self._is_direct(place):
            with _through_client(url, headers) as response:
                yield _answer(response)
            return
        try:
            response = self._ask(place, headers)
        except ssl.SSLCertVerificationError:
            self._refused.add(place.netloc)  # the client may know other certificates
            with self.get(url, headers) as answer:
                yield answer
            return
        try:
            yield Answer(
                response.status,
                {name.lower(): value for name, value in response.headers.items()},
                partial(self._fill, response),
            )
        finally:
            if not response.isclosed():  # what is left of it would be taken for the next answer
                self._drop(place)

    def close(self) -> None:
        for connection in self._open:
            connection.close()

    def _is_direct(self, place: SplitResult) -> bool:
        if place.scheme not in ("http", "https") or place.netloc in self._refused or "@" in place.netloc:
            return False
        proxies = getproxies()
        proxied = place.scheme in proxies or "all" in proxies
        return not proxied or bool(proxy_bypass(place.hostname or ""))

    def _ask(self, place: SplitResult, headers: Mapping[str, str]) -> http.client.HTTPResponse:
        target = (place.path or "/") + (f"?{place.query}" if place.query else "")
        while True:
            connection, fresh = self._connection(place)
            try:
                connection.request("GET", target, headers=dict(headers))
                return connection.getresponse()
            except ssl.SSLCertVerificationError:
                self._drop(place)
                raise
            except (OSError, http.client.HTTPException) as error:
                self._drop(place)
                if fresh or isinstance(error, TimeoutError):
                    raise _network(error) from None
                # A host closes what was idle: that says nothing of a new connection.

    def _fill(self, response: http.client.HTTPResponse, buffer: memoryview) -> Iterator[int]:
        length = response.length
        if length is not None and length > len(buffer):
            raise Passing(_TOO_MUCH)
        done = 0
        try:
            while done < len(buffer) and (count := response.readinto(buffer[done : done + _PIECE])):
                done += count
                yield count
            if done == len(buffer) and response.read(1):
                raise Passing(_TOO_MUCH)
        except (OSError, http.client.HTTPException) as error:
            raise _network(error) from None

    def _connection(self, place: SplitResult) -> tuple[http.client.HTTPConnection, bool]:
        """This thread's connection to a host, and whether it is a new one."""
        connections = self._connections()
        key = (place.scheme, place.netloc)
        if key in connections:
            return connections[key], False
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        if place.scheme == "https":
            with self._lock:
                self._tls = self._tls or ssl.create_default_context()
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                place.netloc, timeout=timeout, context=self._tls
            )
        else:
            connection = http.client.HTTPConnection(place.netloc, timeout=timeout)
        connections[key] = connection
        with self._lock:
            self._open.append(connection)
        return connection, True

    def _drop(self, place: SplitResult) -> None:
        connection = self._connections().pop((place.scheme, place.netloc), None)
        if connection is not None:
            connection.close()
            with self._lock:
                self._open.remove(connection)

    def _connections(self) -> dict[tuple[str, str], http.client.HTTPConnection]:
        connections: dict[Any, Any] = self._local.__dict__.setdefault("connections", {})
        return connections


def _network(error: Exception) -> Exception:
    return error if isinstance(error, (ConnectionError, TimeoutError)) else ConnectionError(type(error).__name__)
