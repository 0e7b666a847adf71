"""A process that has paid for torch's import once and forks merges on demand, many of them to be killed.

Each line on stdin is a list of requests that run at the same time, each line on stdout the list of answers. A
request holds the arguments of `skillmerge.apply` and how to be cruel to it:

    verify          an output to verify, in place of a merge
    kill_after      seconds until SIGKILL
    kill_at         die right before the n-th step; a write dies with half of its bytes on the disk
    pace            seconds that every write of a span takes longer
    no_exchange     the system cannot swap two names in one step
    direct          every span is written with direct I/O
    memory          bytes of address space that it gets beside what the process has
    unchecked       the room on the disk is not looked at before
    fault           arguments of `fault_arm` in torture/faults.c, which has to be preloaded
    mount           arguments of `filesystem_mount` in torture/filesystems.c, likewise
    verb            another function of the package than `apply`, whose arguments are in `given` and the request

A step is a call that changes the disk. The answer holds status (negative: the signal that it died of), and,
where it lived, steps, said, warned, already and message; with a fault, how many calls it was counted among.
"""

from __future__ import annotations

import ctypes
import inspect
import json
import os
import resource
import select
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

import safetensors  # noqa: F401 - the first header would import it

import skillmerge
import skillmerge.engine.device
import skillmerge.engine.shards
import skillmerge.engine.skill_shards  # what a merge would import, torch before all
from skillmerge import reporter
from skillmerge.engine.runners import threads
from skillmerge.errors import SkillmergeError
from skillmerge.outputs import shard_file, staging, verify
from skillmerge.outputs.trials import tried
from skillmerge.plans.budget import Budget
from skillmerge.tensors import BLOCK
from skillmerge.verbs import apply

DISK_EVENTS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}


class Teller(reporter.Reporter):
    """Keeps what a person would be told."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def note(self, message: str) -> None:
        self.said.append(message)


class Steps:
    """Counts the steps of this process and ends it at one of them."""

    def __init__(self, kill_at: int | None) -> None:
        self.count = 0
        self.kill_at = kill_at
        self._lock = threading.Lock()
        self._pwrite, self._fsync, self._ftruncate = os.pwrite, os.fsync, os.ftruncate

    def watch(self) -> None:
        os.pwrite, os.fsync, os.ftruncate = self.pwrite, self.fsync, self.ftruncate
        sys.addaudithook(self.audit)

    def is_last(self) -> bool:
        with self._lock:
            self.count += 1
            return self.count == self.kill_at

    def step(self) -> None:
        if self.is_last():
            die()

    def pwrite(self, descriptor: int, data: memoryview, offset: int) -> int:
        if self.is_last():
            self._pwrite(descriptor, data[: len(data) // 2], offset)
            die()
        return self._pwrite(descriptor, data, offset)

    def fsync(self, descriptor: int) -> None:
        self.step()
        self._fsync(descriptor)

    def ftruncate(self, descriptor: int, size: int) -> None:
        self.step()
        self._ftruncate(descriptor, size)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        swaps = event == "ctypes.dlsym" and str(arguments[1]).startswith("rename")
        if writes or swaps or event in DISK_EVENTS:
            self.step()


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def slow_down(pace: float) -> None:
    write = shard_file.ShardFile.write

    def slowly(self: shard_file.ShardFile, data: memoryview, offset: int) -> None:
        time.sleep(pace)
        write(self, data, offset)

    shard_file.ShardFile.write = slowly  # type: ignore[method-assign]


def write_directly() -> None:
    begin = shard_file.WriteMode.__init__

    def decided(self: shard_file.WriteMode) -> None:
        begin(self)
        self.direct, self._open = True, False

    shard_file.WriteMode.__init__ = decided  # type: ignore[method-assign]


def child(request: dict[str, Any], answers: int) -> NoReturn:
    """Run one merge, say how it went, and end without a word to anyone else."""
    kill_at, pace = request.pop("kill_at", None), request.pop("pace", 0)
    fault = request.pop("fault", None)
    request.pop("kill_after", None)
    if pace:
        slow_down(pace)
    if request.pop("direct", False):
        write_directly()
    if request.pop("no_exchange", False):
        staging.exchange = lambda first, second: False
    # Small tiles, so that a small shard takes several writes.
    threads.budget = apply.budget = lambda plan, *, threads, **limits: Budget(threads or 2, BLOCK, 0)
    teller, steps = Teller(), Steps(kill_at)
    steps.watch()
    answer: dict[str, Any] = {"already": False, "message": ""}
    status = 1
    if request.pop("unchecked", False):
        apply.check_disk = lambda path, needed, what: None
    if (memory := request.pop("memory", None)) is not None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory,) * 2)
    library = ctypes.CDLL(None)
    if fault is not None:
        folder, *numbers = fault
        library.fault_arm(os.fsencode(folder), *numbers)
    if (mount := request.pop("mount", None)) is not None:
        folder, which, limit = mount
        library.filesystem_mount(os.fsencode(folder), which, ctypes.c_long(limit))
    verb, given = request.pop("verb", None), request.pop("given", [])
    try:
        if verb == "tried":
            answer["trials"] = {trial.what: trial.works for trial in tried(Path(given[0]))}
        elif verb is not None:
            listens = "reporter" in inspect.signature(getattr(skillmerge, verb)).parameters
            getattr(skillmerge, verb)(*given, **request, **({"reporter": teller} if listens else {}))
        elif (verified := request.pop("verify", None)) is not None:
            verify.verify_files(verified)
        else:
            answer["already"] = apply.apply(reporter=teller, **request).already
        status = 0
    except SkillmergeError as error:
        status, answer["message"] = error.exit_status, str(error)
    except BaseException as error:
        answer["message"] = repr(error)
    if fault is not None:
        answer["calls"] = library.fault_calls()
    answer |= {"steps": steps.count, "said": teller.said, "warned": teller.warnings}
    os.write(answers, json.dumps(answer).encode())
    os._exit(status)


def serve(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run `requests` at the same time, each in a process of its own."""
    running = []
    for request in requests:
        reader, answers = os.pipe()
        pid = os.fork()
        if pid == 0:
            child(request, answers)
        os.close(answers)
        running.append((pid, reader, request.get("kill_after")))
    results = []
    for pid, reader, kill_after in running:
        if kill_after is not None and not select.select([reader], [], [], kill_after)[0]:
            os.kill(pid, signal.SIGKILL)
        with open(reader, "rb") as stream:
            text = stream.read()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        results.append({"status": status, **json.loads(text or "{}")})
    return results


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), flush=True)
