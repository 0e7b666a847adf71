"""Object stores on loopback: moto's S3 behind a door that counts requests and can make them fail, and Azurite.

    with S3Server(tmp_path) as s3, s3.environment(monkeypatch):
        s3.put("model/config.json", b"{}")
        s3.fail("GET /bucket/model/config.json", 503)

Where moto is not installed (the extra `dev` has it, Python 3.11 or later), what needs it is skipped by name.
"""

from __future__ import annotations

import base64
import hmac
import io
import logging
import shutil
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from skillmerge.checkpoints.stores import retries

BUCKET = "bucket"
CANARIES = {
    "AWS_ACCESS_KEY_ID": "AKIACANARYCANARY",
    "AWS_SECRET_ACCESS_KEY": "CANARY+secret/key",
    "AWS_SESSION_TOKEN": "CANARYtoken",
}
"""Credentials that no output may show."""

Answer = Callable[[dict[str, Any], Any], Iterable[bytes] | None]


def refusal(status: str, code: str) -> Answer:
    """An answer of S3, which quotes credentials, as S3's do."""
    body = f"<Error><Code>{code}</Code><Message>of {CANARIES['AWS_ACCESS_KEY_ID']}</Message></Error>".encode()

    def answer(environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start(status, [("Content-Length", str(len(body))), ("Content-Type", "application/xml")])
        return [body]

    return answer


@dataclass
class Fault:
    """What happens to requests whose `METHOD /path?query` has a text in it, so many times."""

    where: str
    answer: Answer
    times: int


class S3Server:
    """S3 with one bucket."""

    def __init__(self, bucket: str = BUCKET) -> None:
        self.bucket = bucket
        pytest.importorskip("obstore", reason="object stores need obstore")
        pytest.importorskip("moto.server", reason="tests of object stores need moto[s3] and flask")
        from moto.backends import get_backend
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
        for backend in get_backend("s3")._instances:
            backend.reset()
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._serve, threaded=True)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self.requests: list[str] = []
        self.faults: list[Fault] = []

    def __enter__(self) -> S3Server:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        self._ask("PUT", "")
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def variables(self) -> dict[str, str]:
        """The environment of a process that uses this server and nothing else."""
        return {
            **CANARIES,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": "us-east-1",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    @contextmanager
    def environment(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        for name, value in self.variables().items():
            monkeypatch.setenv(name, value)
        yield

    # What a test puts in and looks at, past the door.

    def put(self, key: str, content: bytes) -> None:
        self._ask("PUT", f"/{key}", content)

    def put_folder(self, prefix: str, folder: Path) -> str:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())
        return f"s3://{self.bucket}/{prefix}"

    def delete(self, key: str) -> None:
        self._ask("DELETE", f"/{key}")

    def get(self, key: str) -> bytes:
        return self._ask("GET", f"/{key}")

    def keys(self, prefix: str = "") -> list[str]:
        return sorted(key for key in self._bucket().keys if key.startswith(prefix))

    def unfinished(self) -> int:
        """How many multipart uploads were begun and neither finished nor aborted."""
        return len(self._bucket().multiparts)

    def _bucket(self) -> Any:
        from moto.s3.models import s3_backends

        backends = (backend for region in s3_backends.values() for backend in region.values())
        return next(backend.buckets[self.bucket] for backend in backends if self.bucket in backend.buckets)

    def fail(self, where: str, answer: Answer, times: int = 1) -> None:
        self.faults.append(Fault(where, answer, times))

    def count(self, where: str) -> int:
        return sum(where in request for request in self.requests)

    def _ask(self, method: str, path: str, content: bytes = b"") -> bytes:
        from werkzeug.test import Client

        answer = Client(self._app).open(
            f"/{self.bucket}{path}", method=method, data=content, base_url=self.endpoint,
            headers={"Authorization": "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request"},
        )  # fmt: skip
        assert answer.status_code < 300, (answer.status, answer.data[:300])
        return answer.data

    def _serve(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        query = f"?{environ['QUERY_STRING']}" if environ["QUERY_STRING"] else ""
        request = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}{query}"
        self.requests.append(request)
        for fault in self.faults:
            if fault.times and fault.where in request:
                fault.times -= 1
                if (given := fault.answer(environ, start)) is not None:
                    return given
        # A connection that is given up must not end in moto, which would go on with half a body.
        environ["wsgi.input"] = io.BytesIO(environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0)))
        return self._app(environ, start)


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[S3Server]:
    """An object store that this process uses, with waits between tries that no test has time for taken out."""
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.001)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # which has no profiles
    with S3Server() as server, server.environment(monkeypatch):
        yield server


class Azurite:
    """Azure's own emulator, from npm. Its account and key are published, and the same everywhere."""

    ACCOUNT = "devstoreaccount1"
    KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="

    def __init__(self) -> None:
        pytest.importorskip("obstore", reason="object stores need obstore")
        beside = Path(sys.prefix, "azurite", "node_modules", ".bin", "azurite-blob")
        found = beside if beside.exists() else shutil.which("azurite-blob")
        if found is None:
            pytest.skip("Azurite is not here: `make stores` installs it")
        command = [found, "--inMemoryPersistence", "--extentMemoryLimit", "200", "--blobPort", "0",
                   "--skipApiVersionCheck", "--disableTelemetry"]  # fmt: skip
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self._process.stdout is not None
        lines = iter(self._process.stdout.readline, "")
        self.endpoint = next(line for line in lines if "successfully listens on" in line).split()[-1]
        self._rest = threading.Thread(target=self._process.stdout.read, daemon=True)  # a full pipe would stop it
        self._rest.start()

    def __enter__(self) -> Azurite:
        self._ask("PUT", BUCKET, "restype=container")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()
        self._rest.join()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def variables(self) -> dict[str, str]:
        return {
            "AZURE_STORAGE_ACCOUNT_NAME": self.ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": self.KEY,
            "AZURE_STORAGE_ENDPOINT": f"{self.endpoint}/{self.ACCOUNT}",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def put(self, name: str, content: bytes) -> None:
        self._ask("PUT", f"{BUCKET}/{name}", "", content, {"x-ms-blob-type": "BlockBlob"})

    def put_folder(self, prefix: str, folder: Path) -> str:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            self.put(f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())
        return f"az://{BUCKET}/{prefix}"

    def get(self, name: str) -> bytes:
        return self._ask("GET", f"{BUCKET}/{name}", "")

    def _ask(
        self, method: str, path: str, query: str, content: bytes = b"", extra: dict[str, str] | None = None
    ) -> bytes:
        """One request, signed by hand: what a test looks at does not come through what it tests."""
        date = formatdate(usegmt=True)
        headers = {"x-ms-date": date, "x-ms-version": "2021-08-06", **(extra or {})}
        canonical = "".join(f"{name}:{headers[name]}\n" for name in sorted(headers))
        kind = "application/octet-stream" if content else ""
        named = "".join(f"\n{part.replace('=', ':')}" for part in query.split("&") if part)
        text = f"{method}\n\n\n{len(content) or ''}\n\n{kind}" + 7 * "\n" + canonical
        text += f"/{self.ACCOUNT}/{self.ACCOUNT}/{path}{named}"
        signature = base64.b64encode(hmac.new(base64.b64decode(self.KEY), text.encode(), "sha256").digest()).decode()
        headers["Authorization"] = f"SharedKey {self.ACCOUNT}:{signature}"
        if content:
            headers["Content-Type"] = kind
        url = f"{self.endpoint}/{self.ACCOUNT}/{path}" + (f"?{query}" if query else "")
        request = urllib.request.Request(url, data=content or None, method=method, headers=headers)
        with urllib.request.urlopen(request) as answer:
            found: bytes = answer.read()
            return found
