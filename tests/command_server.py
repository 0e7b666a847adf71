"""A process that has paid for torch's import and becomes one command of skillmerge after another, in forks.

`Commands` starts it. Its `folder` goes onto the path of scripts: the `skillmerge` in it hands its arguments,
environment, folder and streams over, waits, and ends as the command did. `start` does the same for a test that kills
or interrupts. Such a command is real in all but the start of an interpreter, which takes ten times as long.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

PROGRAM = """\
#!{python} -ISE
import json, os, signal, socket, sys

with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    request = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(request)
    pid = int.from_bytes(server.recv(8, socket.MSG_WAITALL), "big")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: os.kill(pid, number))
    status = int.from_bytes(server.recv(8, socket.MSG_WAITALL), "big", signed=True)
if status < 0:
    signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
sys.exit(status)
"""


class Command:
    """A command that runs, or has ended."""

    def __init__(self, address: str, arguments: list[str], folder: Path, environment: dict[str, str]) -> None:
        self.arguments = arguments
        self._streams = [tempfile.TemporaryFile() for _ in range(3)]  # noqa: SIM115 - closed by `wait`
        self._server = socket.socket(socket.AF_UNIX)
        self._server.connect(address)
        request = json.dumps([arguments, str(folder), environment]).encode()
        files = [stream.fileno() for stream in self._streams]
        socket.send_fds(self._server, [len(request).to_bytes(8, "big")], files)
        self._server.sendall(request)
        self.pid = int.from_bytes(self._server.recv(8, socket.MSG_WAITALL), "big")

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it, and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def poll(self) -> bool:
        """Whether it has ended."""
        return bool(select.select([self._server], [], [], 0)[0])

    def wait(self, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """How it ended (negative: by a signal), and what it wrote."""
        self._server.settimeout(timeout)
        status = int.from_bytes(self._server.recv(8, socket.MSG_WAITALL), "big", signed=True)
        self._server.close()
        texts = []
        for stream in self._streams:
            with stream:
                stream.seek(0)
                texts.append(stream.read().decode())
        return subprocess.CompletedProcess(self.arguments, status, texts[1], texts[2])


class Commands:
    """The server's process. `folder` holds its socket and the program `skillmerge`; its path has to be short."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._address = str(folder / "socket")
        program = folder / "skillmerge"
        program.write_text(PROGRAM.format(python=sys.executable, address=self._address))
        program.chmod(0o755)
        command = [sys.executable, __file__, self._address]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"

    def start(self, *arguments: str | Path, cwd: Path | None = None, **environment: str) -> Command:
        """Start a command in the background."""
        variables = {**os.environ, "NO_COLOR": "1", "COLUMNS": "120", **environment}
        return Command(self._address, [str(argument) for argument in arguments], cwd or Path.cwd(), variables)

    def close(self) -> None:
        self._process.communicate()


def wait_for(what: Any, command: Command | None = None, seconds: float = 60) -> None:
    """Wait until what() is true, while the command runs."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "in vain"
        assert command is None or not command.poll(), command.wait().stderr
        time.sleep(0.005)


def is_running(pid: int) -> bool:
    """Whether a process is there, and more than its exit status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def become(arguments: list[str], folder: str, environment: dict[str, str], streams: list[int]) -> NoReturn:
    """Be the command, with these streams as stdin, stdout and stderr."""
    from skillmerge.cli.main import main

    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    # Streams know what kind of file they were made for. stderr is written line by line, as Python's own.
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode, buffering, encoding="utf-8", closefd=False)  # noqa: SIM115 - to the end
        for number, (mode, buffering) in enumerate((("r", -1), ("w", -1), ("w", 1)))
    )
    os.setsid()  # so that a test can end it with all that it started
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["skillmerge", *arguments]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()


def attend(connection: socket.socket) -> None:
    """Start one command and say how it ended."""
    length, streams, _, _ = socket.recv_fds(connection, 8, 3)
    request: list[Any] = json.loads(connection.recv(int.from_bytes(length, "big"), socket.MSG_WAITALL))
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        connection.close()
        become(*request, streams)
    for stream in streams:
        os.close(stream)
    connection.sendall(pid.to_bytes(8, "big"))
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    connection.sendall(status.to_bytes(8, "big", signed=True))


def serve(address: str) -> NoReturn:
    """Fork an attendant for each command, until stdin is closed."""
    import skillmerge.cli.main
    import skillmerge.engine.shards
    import skillmerge.verbs.apply  # noqa: F401  (what commands would import one by one)

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for attendants
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen(64)
        print("ready", flush=True)
        while True:
            ready, _, _ = select.select([server, sys.stdin], [], [])
            if sys.stdin in ready:
                os._exit(0)
            connection, _ = server.accept()
            with connection:
                if os.fork() == 0:
                    server.close()
                    attend(connection)
                    os._exit(0)


if __name__ == "__main__":
    serve(sys.argv[1])
