"""Ranges from storage hosts: kept connections, proxies, TLS, servers that lie. Real sockets throughout."""

from __future__ import annotations

import ssl
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytest.importorskip("huggingface_hub")

from skillmerge.checkpoints.stores.http_ranges import Storage
from skillmerge.checkpoints.stores.hub_client import HTTPError
from skillmerge.checkpoints.stores.retries import Passing

CONTENT = bytes(range(256)) * 12_000


class Handler(BaseHTTPRequestHandler):
    """Serves CONTENT by ranges, at any path, to itself and as a proxy."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append((self.client_address[1], self.path))
        first, last = (int(part) for part in self.headers["range"].removeprefix("bytes=").split("-"))
        body = CONTENT[first : last + 1] + self.server.extra
        self.send_response(206)
        if self.server.chunked:
            self.send_header("Transfer-Encoding", "chunked")
            body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
        else:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = self.server.hang_up

    def log_message(self, format: str, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    extra, chunked, hang_up = b"", False, False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[int, str]] = []
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    storage = Storage()
    yield storage
    storage.close()


def read(storage: Storage, url: str, first: int = 1000, count: int = 2_500_000) -> bytes:
    buffer = bytearray(count)
    with storage.get(url, {"Range": f"bytes={first}-{first + count - 1}"}) as answer:
        assert answer.status == 206
        came = sum(answer.fill(memoryview(buffer)))
    return bytes(buffer[:came])


@pytest.mark.parametrize("chunked", [False, True])
def test_ranges_arrive_over_one_connection(server: Server, storage: Storage, chunked: bool) -> None:
    server.chunked = chunked
    url = f"http://127.0.0.1:{server.server_port}/file?signature=1"
    for first in (0, 17, 500_000):
        assert read(storage, url, first) == CONTENT[first : first + 2_500_000]
    assert {path for _, path in server.asked} == {"/file?signature=1"}
    assert len({port for port, _ in server.asked}) == 1


def test_connection_that_was_closed_while_idle_is_made_anew(server: Server, storage: Storage) -> None:
    server.hang_up = True
    url = f"http://127.0.0.1:{server.server_port}/file"
    assert [read(storage, url) for _ in range(3)] == [CONTENT[1000:2_501_000]] * 3
    assert len({port for port, _ in server.asked}) == 3


def test_answer_that_is_not_read_does_not_get_into_the_next(server: Server, storage: Storage) -> None:
    url = f"http://127.0.0.1:{server.server_port}/file"
    with storage.get(url, {"Range": "bytes=0-99999"}):
        pass
    assert read(storage, url, 5, 100) == CONTENT[5:105]


@pytest.mark.parametrize("chunked", [False, True])
def test_more_than_was_asked_for_is_refused(server: Server, storage: Storage, chunked: bool) -> None:
    server.extra, server.chunked = b"x", chunked
    with pytest.raises(Passing, match="more than was requested"):
        read(storage, f"http://127.0.0.1:{server.server_port}/file")


def test_host_that_is_not_there_is_a_network_error(storage: Storage) -> None:
    for url in ("http://127.0.0.1:9/file", "http://no-such-host.invalid/file"):
        with pytest.raises(ConnectionError):
            read(storage, url)


def test_proxy_is_used_where_one_is_set(server: Server, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils import close_session

    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.server_port}")
    close_session()  # the client looks at the environment when it is made
    try:
        assert read(storage, "http://storage.invalid/file") == CONTENT[1000:2_501_000]
        assert server.asked[0][1] == "http://storage.invalid/file"
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert read(storage, f"http://127.0.0.1:{server.server_port}/mine") == CONTENT[1000:2_501_000]
        assert server.asked[1][1] == "/mine"
    finally:
        close_session()


def test_tls_takes_certificates_that_the_environment_names(
    server: Server, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -keyout {key} -out {certificate}"
    subprocess.run([*make.split(), "-addext", "subjectAltName=DNS:localhost"], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    url = f"https://localhost:{server.server_port}/file"
    with pytest.raises((ConnectionError, HTTPError)):
        read(storage, url)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    trusting = Storage()
    assert read(trusting, url) == CONTENT[1000:2_501_000]
    trusting.close()
