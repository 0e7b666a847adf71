"""Ranges of files over HTTP, straight into the caller's memory.

The Hub answers a request for a weight file with a signed storage address, which needs no token. Reading that
through the general client costs more processor time than the merge itself (it hands over small pieces, each
copied several times under Python's lock); the standard library's client fills a buffer where it lies. What
the general client alone knows (proxies, certificates of one's own) stays with it.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import string
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import SplitResult, quote, urlsplit
from urllib.request import getproxies, proxy_bypass

from huggingface_hub import constants
from huggingface_hub.utils import get_session, hf_raise_for_status

from skillmerge.checkpoints.stores.retries import Passing

_PIECE, _SMALL_PIECE = 1 << 20, 1 << 12
"""Bytes asked of a connection at once; they are lost if it breaks, and it is read in small ones from then on."""

_TOO_MUCH = "the server sent more than was requested"


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
    """Connections to storage hosts, kept open between ranges."""

    def __init__(self) -> None:
        self._idle: dict[tuple[str, str], list[_Connection]] = {}
        self._open: set[_Connection] = set()
        self._lock = threading.Lock()
        self._tls: ssl.SSLContext | None = None
        self._refused: set[str] = set()
        self._cancelled = False
        self._piece = _PIECE

    @contextmanager
    def get(self, url: str, headers: Mapping[str, str]) -> Iterator[Answer]:
        """GET without a token; redirects are answers. Raises ConnectionError, TimeoutError, or as the client."""
        place = urlsplit(quote(url, safe=string.punctuation))
        if not self._is_direct(place):
            with _through_client(url, headers) as response:
                yield _answer(response)
            return
        try:
            connection, response = self._ask(place, headers)
        except ssl.SSLCertVerificationError:
            self._refused.add(place.netloc)  # the client may know other certificates
            with self.get(url, headers) as answer:
                yield answer
            return
        try:
            answered = {name.lower(): value for name, value in response.headers.items()}
            yield Answer(response.status, answered, partial(self._fill, response))
        finally:
            # What is left of an answer would be taken for the next one.
            self._put_back(place, connection, good=response.isclosed())

    def cancel(self) -> None:
        """Break every connection, and make no more: waiting reads get an error."""
        with self._lock:
            self._cancelled = True
            for connection in self._open:
                connection.shut()

    def close(self) -> None:
        with self._lock:
            for connection in self._open:
                connection.close()
            self._open.clear()
            self._idle.clear()

    def _is_direct(self, place: SplitResult) -> bool:
        if place.scheme not in ("http", "https") or place.netloc in self._refused or "@" in place.netloc:
            return False
        proxies = getproxies()
        proxied = place.scheme in proxies or "all" in proxies
        return not proxied or bool(proxy_bypass(place.hostname or ""))

    def _ask(self, place: SplitResult, headers: Mapping[str, str]) -> tuple[_Connection, http.client.HTTPResponse]:
        target = (place.path or "/") + (f"?{place.query}" if place.query else "")
        while True:
            with self._lock:
                idle = self._idle.get((place.scheme, place.netloc))
                kept = idle.pop() if idle else None
            connection = kept or self._connection(place)
            try:
                connection.http.request("GET", target, headers=dict(headers))
                return connection, connection.http.getresponse()
            except ssl.SSLCertVerificationError:
                self._put_back(place, connection, good=False)
                raise
            except (OSError, http.client.HTTPException, ValueError) as error:
                self._put_back(place, connection, good=False)
                if kept is None or isinstance(error, TimeoutError):
                    raise _network(error) from None
                # A host closes what was idle: that says nothing of a new connection.

    def _connection(self, place: SplitResult) -> _Connection:
        if place.scheme == "https":
            with self._lock:
                self._tls = self._tls or ssl.create_default_context()
        try:
            connection = _Connection(place, self._tls)
        except (http.client.HTTPException, ValueError) as error:  # an address that is none
            raise _network(error) from None
        with self._lock:
            if self._cancelled:
                raise ConnectionAbortedError
            self._open.add(connection)
        return connection

    def _put_back(self, place: SplitResult, connection: _Connection, good: bool) -> None:
        with self._lock:
            if good and connection in self._open:
                self._idle.setdefault((place.scheme, place.netloc), []).append(connection)
                return
            self._open.discard(connection)
        connection.close()

    def _fill(self, response: http.client.HTTPResponse, buffer: memoryview) -> Iterator[int]:
        if response.length is not None and response.length > len(buffer):
            raise Passing(_TOO_MUCH)
        done = 0
        try:
            while done < len(buffer) and (count := response.readinto(buffer[done : done + self._piece])):
                done += count
                yield count
            if done == len(buffer) and response.read(1):
                raise Passing(_TOO_MUCH)
        except (OSError, http.client.HTTPException, ValueError) as error:
            self._piece = _SMALL_PIECE
            raise _network(error) from None


class _Connection:
    """A connection that another thread can break."""

    def __init__(self, place: SplitResult, tls: ssl.SSLContext | None) -> None:
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        if place.scheme == "https":
            self.http: http.client.HTTPConnection = http.client.HTTPSConnection(
                place.netloc, timeout=timeout, context=tls
            )
        else:
            self.http = http.client.HTTPConnection(place.netloc, timeout=timeout)
        self._sockets: list[socket.socket] = []
        connect = self.http.connect

        def connect_and_keep() -> None:
            connect()
            # The connection forgets its socket where an answer is the last one, and goes on to read from it.
            self._sockets.append(self.http.sock)

        self.http.connect = connect_and_keep  # type: ignore[method-assign]

    def shut(self) -> None:
        for each in self._sockets:
            with suppress(OSError):
                socket.socket.shutdown(each, socket.SHUT_RDWR)

    def close(self) -> None:
        self.http.close()


def _network(error: Exception) -> Exception:
    return error if isinstance(error, (ConnectionError, TimeoutError)) else ConnectionError(type(error).__name__)
