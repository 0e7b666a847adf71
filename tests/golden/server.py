"""A process that pays for torch's import once and forks one command line for each request.

A request is a line of JSON, {"argv": [...], "cwd": ..., "env": {...}}; the answer is a line of JSON with `status`,
`stdout` and `stderr`. The command ends as it does for its users, with `os._exit`, which is why it needs a process. All
modules are imported before, so that no command imports them again.
"""

from __future__ import annotations

import json
import os
import pkgutil
import sys
import tempfile
from importlib import import_module
from typing import Any

import skillmerge
from skillmerge.cli.main import main  # the one line that knows where the entry point is

for _library in ("torch", "numpy", "rich.table"):
    import_module(_library)
for _module in pkgutil.walk_packages(skillmerge.__path__, "skillmerge."):
    if not _module.name.endswith("__main__"):
        import_module(_module.name)


def child(request: dict[str, Any], stdout: int, stderr: int) -> None:
    """Become the command. Does not return."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    sys.argv = ["skillmerge", *request["argv"]]
    try:
        main()
    finally:
        os._exit(99)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Run one command and return what it printed and how it ended."""
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        pid = os.fork()
        if pid == 0:
            child(request, stdout.fileno(), stderr.fileno())
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        texts = []
        for stream in (stdout, stderr):
            stream.seek(0)
            texts.append(stream.read().decode(errors="backslashreplace"))
    return {"status": status, "stdout": texts[0], "stderr": texts[1]}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
