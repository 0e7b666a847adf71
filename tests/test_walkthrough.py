"""The walkthrough in the docs, run as it stands: files, commands, and what they print.

SKILLMERGE_RECORD=1 writes what they print now into the page.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_server import Commands
from hub_server import HubServer

from skillmerge.verbs.demo.miniature import FAMILY

PAGE = Path(__file__).parent.parent / "docs" / "walkthrough.md"
FILE = re.compile(r"^`([\w.]+)`:\n\n```\w+\n(.*?)```$", re.M | re.S)
CONSOLE = re.compile(r"(?<=^```console\n)(.*?)(?=^```$)", re.M | re.S)
MARK = "@@@ another command @@@"
VARYING = [
    (r"\b[0-9a-f]{64}\b", "DIGEST"),
    (r"\b[0-9a-f]{12}\b", "PLAN"),
    (r"\b[0-9a-f]{40}\b", "COMMIT"),
    (r"urn:uuid:[0-9a-f-]{36}", "UUID"),
    (r"\d{4}-\d\d-\d\dT[\d:.]+Z?", "TIME"),
    (r"in \d+\.\d s", "in SECONDS"),
    (r"\d+(\.\d+)? (GB|TB)\b", "ROOM"),
    (r"about \d+(\.\d+)? MB with \d+ threads", "MEMORY"),
    (r"drwx.*\n", ""),
]


def commands(block: str) -> list[str]:
    return [line[2:] for line in block.splitlines() if line.startswith("$ ")]


def run_all(page: str, folder: Path, environment: dict[str, str]) -> list[str]:
    """What each command of the page prints, in one shell."""
    script = ["last=0"]
    for block in CONSOLE.findall(page):
        for command in commands(block):
            script += [f"printf '%s\\n' '{MARK}'", "(exit $last)", command, "last=$?"]
    process = subprocess.run(
        ["bash", "-c", "\n".join(script)], cwd=folder, env=environment, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=280, check=False,
    )  # fmt: skip
    return process.stdout.split(f"{MARK}\n")[1:]


def with_output(page: str, printed: list[str]) -> str:
    """The page, each command followed by what it printed."""
    left = iter(printed)

    def fill(match: re.Match[str]) -> str:
        return "".join(f"$ {command}\n{next(left)}" for command in commands(match[1]))

    return CONSOLE.sub(fill, page)


def steady(text: str) -> str:
    for pattern, word in VARYING:
        text = re.sub(pattern, word, text)
    return "\n".join(line.rstrip() for line in text.splitlines())


def test_walkthrough_prints_what_it_says(tmp_path: Path, commands: Commands) -> None:
    for needed in ("transformers", "model_signing", "cyclonedx", "in_toto_attestation"):
        pytest.importorskip(needed)
    if not all(shutil.which(program) for program in ("bash", "openssl")):
        pytest.skip("needs bash and openssl")
    page = PAGE.read_text()
    folder = tmp_path / "work"
    folder.mkdir()
    for name, content in FILE.findall(page):
        (folder / name).write_text(content)
    with HubServer(tmp_path / "hub") as hub:
        for model in ("target-sft", "source-rl", "source-sft"):
            hub.create_from(f"acme/{model}", FAMILY / model)
        path = f"{commands.folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        fixed = {"PATH": path, "NO_COLOR": "1", "COLUMNS": "110", "LC_ALL": "C.UTF-8", "HOME": str(tmp_path)}
        printed = run_all(page, folder, {**os.environ, **hub.variables(), **fixed})
        printed = [text.replace(hub.endpoint, "https://huggingface.co") for text in printed]
    printed = [text.replace(str(folder), "/home/ci") for text in printed]
    found = with_output(page, printed)
    if os.environ.get("SKILLMERGE_RECORD"):
        PAGE.write_text(found)
    assert steady(found) == steady(page)
