"""Pages of the docs as scripts: their files, their console blocks, and what the commands print.

A file is named in backticks before its block (`recipe.yaml`:). In a ```console block a line that begins with `$ ` is a
command, one that begins with `> ` continues it, and the other lines are what it prints.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from bucket_server import S3Server
from command_server import Commands
from hub_server import HubServer

from skillmerge.verbs.demo.demo import score_files
from skillmerge.verbs.demo.miniature import FAMILY

DOCS = Path(__file__).parent.parent / "docs"
RECIPE = DOCS.parent / "recipes" / "past.yaml"
FILE = re.compile(r"^`([\w./-]+)`:\n\n```\w+\n(.*?)```$", re.M | re.S)
CONSOLE = re.compile(r"(?<=^```console\n)(.*?)(?=^```$)", re.M | re.S)
EITHER = re.compile(f"{FILE.pattern}|{CONSOLE.pattern}", re.M | re.S)
TRAINING = """\
import shutil, sys
shutil.copytree("source-{kind}", sys.argv[sys.argv.index("--out") + 1])
"""
STAND_INS = {
    "choosing-lambda.md": score_files(),
    "refinement.md": {
        "train_sft.py": TRAINING.format(kind="sft"),
        "train_rl.py": TRAINING.format(kind="rl"),
        "refine.yaml": (DOCS.parent / "recipes" / "refine.yaml").read_text(),
    },
}
"""Files that a page expects its reader to have: page -> name -> content. Training is a copy of a trained model."""

FROM_NOTHING = {"README.md"}
"""Pages that are played in an empty folder, each file written where its reader comes to it."""

PICTURED = {"skillmerge demo"}
"""Commands whose output a picture shows (`tests/test_picture.py`), not the page."""

MARK = "@@@ another command @@@"
VARYING = [
    (r"\b[0-9a-f]{64}\b", "DIGEST"),
    (r"\b[0-9a-f]{12}\b", "PLAN"),
    (r"\b[0-9a-f]{40}\b", "COMMIT"),
    (r"urn:uuid:[0-9a-f-]{36}", "UUID"),
    (r"\d{4}-\d\d-\d\dT[\d:.]+Z?", "TIME"),
    (r"in\s+\d+\.\d\s+s", "in SECONDS"),
    (r"about\s+[\d.,]+\s+[MG]B\s+with\s+\d+\s+threads", "MEMORY"),
    (r"\d+(\.\d+)?\s+(GB|TB)\b", "ROOM"),
    (r"\b\d+\.\d+\.\d+\b", "VERSION"),
]


def commands(block: str) -> list[str]:
    """The commands of a block; one that goes on in further lines has these in it."""
    found: list[str] = []
    for line in block.splitlines():
        if line.startswith("$ "):
            found.append(line[2:])
        elif line.startswith("> ") and found:
            found[-1] += "\n" + line[2:]
    return found


def shown(command: str) -> str:
    return "$ " + command.replace("\n", "\n> ") + "\n"


def run_all(blocks: list[str], folder: Path, environment: dict[str, str]) -> list[str]:
    """What each command of the blocks prints, in one shell. A block may be a file, which is written on the way."""
    script = ["last=0"]
    for block in blocks:
        if file := FILE.match(block):
            script.append(f"cat > {file[1]} << 'END OF THE FILE'\n{file[2]}END OF THE FILE")
            continue
        for command in commands(block):
            script += [f"printf '%s\\n' '{MARK}'", "(exit $last)", command, "last=$?"]
    process = subprocess.run(
        ["bash", "-c", "\n".join(script)], cwd=folder, env=environment, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=280, check=False,
    )  # fmt: skip
    return process.stdout.split(f"{MARK}\n")[1:]


def prepare(folder: Path, page: str, text: str) -> None:
    """The small trained models, a recipe for them, and the files that the page shows."""
    folder.mkdir()
    for model in ("base", "target-sft", "source-rl", "source-sft"):
        shutil.copytree(FAMILY / model, folder / model)
    shutil.copy(RECIPE, folder / "recipe.yaml")
    for name, content in [*STAND_INS.get(page, {}).items(), *FILE.findall(text)]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def played(page: Path, where: Path, server: Commands, left_out: Callable[[str], bool]) -> str:
    """The page, each command followed by what it prints now; blocks that are left out stay as they are."""
    text = page.read_text()
    folder = where / "work"
    run = [block for block in CONSOLE.findall(text) if not left_out(block)]
    if page.name in FROM_NOTHING:
        folder.mkdir()
        run = [match[0] for match in EITHER.finditer(text) if match[1] or not left_out(match[0])]
    else:
        prepare(folder, page.name, text)
    with HubServer(where / "hub") as hub, ExitStack() as stack:
        for model in ("target-sft", "source-rl", "source-sft"):
            hub.create_from(f"acme/{model}", FAMILY / model)
        buckets = {}
        if page.name == "object-stores.md":
            s3 = stack.enter_context(S3Server("models"))
            buckets = s3.variables()
            for model in ("target-sft", "source-rl", "source-sft"):
                s3.put_folder(model, FAMILY / model)
        path = f"{server.folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        fixed = {
            "PATH": path,
            "NO_COLOR": "1",
            "LC_ALL": "C.UTF-8",
            "COLUMNS": "120",
            "HOME": str(where),
            "CUDA_VISIBLE_DEVICES": "",
        }
        printed = run_all(run, folder, {**os.environ, **hub.variables(), **buckets, **fixed})
        printed = [output.replace(hub.endpoint, "https://huggingface.co") for output in printed]
    printed = [output.replace(str(folder), "/home/ci") for output in printed]
    printed = ["".join(f"{line.rstrip()}\n" for line in output.splitlines()) for output in printed]
    left = iter(printed)

    def fill(match: re.Match[str]) -> str:
        if left_out(match[1]):
            return match[1]
        outputs = [(command, next(left, "")) for command in commands(match[1])]
        return "".join(shown(command) + ("" if command in PICTURED else output) for command, output in outputs)

    return CONSOLE.sub(fill, text)


def steady(text: str) -> list[str]:
    """The words of the text without what differs from run to run, and lines break elsewhere for."""
    for pattern, word in VARYING:
        text = re.sub(pattern, word, text)
    return text.split()
