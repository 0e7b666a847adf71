"""A process that has paid for torch's import and becomes one command of skillmerge after another, in forks.

`Commands` starts it. Its `folder` goes onto the path of scripts: the `skillmerge` in it hands its arguments,
environment, folder and streams over, waits, and ends as the command did. `start` does the same for a test that kills
or interrupts. Such a command is real in all but the start of an interpreter, which takes ten times as long.

The `python` in the folder does this for scripts and `-c`, with a second process that has imported transformers too. One
with a PYTHONPATH of its own is the real interpreter.
Its scripts are offline. Commands of the folder start probes of loads with it.
"""

from __future__ import annotations

import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

PROGRAM = """\
#!{python} -ISE
import json, os, signal, socket, sys

own = os.environ.get("PYTHONPATH") == {path!r} and (sys.argv[1] == "-c" or sys.argv[1].endswith(".py"))
if {name!r} == "python" and not own:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
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


PRELOADED = (
    "safetensors",
    "skillmerge.cli.main",
    "skillmerge.cli.show.merging",
    "skillmerge.cli.show.proving",
    "skillmerge.engine.shards",
    "skillmerge.engine.skill_shards",
    "skillmerge.verbs.apply",
    "skillmerge.verbs.extract",
)
"""What commands would import one by one. Not the Hub's client, which is made of the command's environment."""
Run = Callable[[list[str]], NoReturn]
"""Becomes a program with these arguments."""


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
        for name, address in (("skillmerge", self._address), ("python", f"{self._address}.python")):
            program = folder / name
            program.write_text(
                PROGRAM.format(python=sys.executable, address=address, name=name, path=os.environ.get("PYTHONPATH"))
            )
            program.chmod(0o755)
        self.python = str(program)
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


def take_over(folder: str, environment: dict[str, str], streams: list[int]) -> None:
    """Be in this folder and environment, with these streams as stdin, stdout and stderr."""
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
    signal.signal(signal.SIGINT, signal.default_int_handler)


def run_command(arguments: list[str]) -> NoReturn:
    from skillmerge.cli.main import main

    sys.argv = ["skillmerge", *arguments]
    main()


def run_script(arguments: list[str]) -> NoReturn:
    """Be the interpreter with these arguments: `-c`, or a script, and what follows."""
    script, *others = arguments
    sys.path[0] = "" if script == "-c" else str(Path(script).absolute().parent)
    if script == "-c":
        sys.argv = ["-c", *others[1:]]
        exec(compile(others[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = arguments
        runpy.run_path(script, run_name="__main__")
    sys.exit()


def attend(connection: socket.socket, run: Run) -> None:
    """Start one command and say how it ended."""
    length, streams, _, _ = socket.recv_fds(connection, 8, 3)
    size = int.from_bytes(length, "big")
    arguments, folder, environment = json.loads(connection.recv(size, socket.MSG_WAITALL))
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        connection.close()
        take_over(folder, environment, streams)
        run(arguments)
    for stream in streams:
        os.close(stream)
    connection.sendall(pid.to_bytes(8, "big"))
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    connection.sendall(status.to_bytes(8, "big", signed=True))


def listen(address: str) -> socket.socket:
    server = socket.socket(socket.AF_UNIX)
    server.bind(address)
    server.listen(64)
    return server


def serve(server: socket.socket, run: Run, scripts: socket.socket | None = None) -> NoReturn:
    """Fork an attendant for each command, until stdin is closed, and one server for `scripts` when first asked for."""
    while True:
        ready, _, _ = select.select([sys.stdin, server, *([scripts] if scripts else [])], [], [])
        if sys.stdin in ready:
            os._exit(0)
        if server in ready:
            connection, _ = server.accept()
            with connection:
                if os.fork() == 0:
                    server.close()
                    attend(connection, run)
                    os._exit(0)
        elif scripts:
            if os.fork() == 0:
                server.close()
                import_transformers()
                serve(scripts, run_script)
            scripts.close()
            scripts = None


def import_transformers() -> None:
    """What loads of models would import one by one."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    with suppress(ImportError):
        from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM  # noqa: F401

        import skillmerge.study.loads.load_probe  # noqa: F401


def main(address: str) -> NoReturn:
    for module in PRELOADED:
        import_module(module)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for attendants
    sys.executable = str(Path(address).with_name("python"))
    scripts, commands = listen(f"{address}.python"), listen(address)
    print("ready", flush=True)
    serve(commands, run_command, scripts)


if __name__ == "__main__":
    main(sys.argv[1])
