"""Chromium without a window, driven over a pipe with its own protocol (CDP): sizes, schemes, scripts, pictures."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
AXE = Path(sys.prefix) / "axe" / "node_modules" / "axe-core" / "axe.min.js"
"""Where `make` puts axe-core, which finds what keeps people from using a page."""

WIDTHS = (400, 1280, 1920)
SCHEMES = ("light", "dark")

_RUN_AXE = """axe.run(document, {resultTypes: ["violations"]}).then((found) => JSON.stringify(found.violations
  .filter((one) => ["serious", "critical"].includes(one.impact))
  .map((one) => one.id + ": " + one.nodes.slice(0, 3).map((node) => node.html.slice(0, 120) + " " +
    (node.any[0] ? node.any[0].message : "")).join(" | "))))"""


class Browser:
    """One page of a running Chromium."""

    def __init__(self, send: Any, receive: Any) -> None:
        self._send, self._receive, self._ids = send, receive, itertools.count(1)
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = ""
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._call("Page.enable")
        self._call("Emulation.setScrollbarsHidden", hidden=True)

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._ids)
        message = {"id": number, "method": method, "params": params}
        if getattr(self, "_session", ""):
            message["sessionId"] = self._session
        self._send.write(json.dumps(message).encode() + b"\0")
        self._send.flush()
        while (answer := self._read()).get("id") != number:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        found: dict[str, Any] = answer["result"]
        return found

    def _read(self) -> dict[str, Any]:
        parts = []
        while (byte := self._receive.read(1)) != b"\0":
            if not byte:
                raise RuntimeError("the browser is gone")
            parts.append(byte)
        found: dict[str, Any] = json.loads(b"".join(parts))
        return found

    def open(self, page: Path, width: int, scheme: str) -> None:
        """Load a file at a width of the window, in the light or the dark color scheme."""
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self._call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self._call("Page.navigate", url=page.absolute().as_uri())
        while self._read().get("method") != "Page.loadEventFired":
            pass

    def run(self, script: str) -> Any:
        """Return what an expression gives; of a promise, what it comes to."""
        answer = self._call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"])[:2000])
        return answer["result"].get("value")

    def serious(self) -> list[str]:
        """Return what axe-core finds serious or worse on the page, with everything unfolded."""
        self.run("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        self.run(AXE.read_text(encoding="utf-8"))
        found: list[str] = json.loads(self.run(_RUN_AXE))
        return found

    def picture(self, file: Path) -> None:
        """Write the whole page as PNG."""
        found = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(found["data"]))


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """Start Chromium, and end it."""
    assert CHROMIUM is not None
    (read_end, our_out), (our_in, write_end) = os.pipe(), os.pipe()
    their_in, their_out = (fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (read_end, write_end))
    os.close(read_end)
    os.close(write_end)

    def places() -> None:  # the protocol is on these two
        os.dup2(their_in, 3)
        os.dup2(their_out, 4)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
            "--no-first-run", "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}",
            "--remote-debugging-pipe", "about:blank",
        ]  # fmt: skip
        process = subprocess.Popen(
            command, pass_fds=(3, 4), preexec_fn=places,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(their_in)
        os.close(their_out)
        try:
            with open(our_out, "wb") as send, open(our_in, "rb") as receive:
                yield Browser(send, receive)
        finally:
            process.kill()
            process.wait()
