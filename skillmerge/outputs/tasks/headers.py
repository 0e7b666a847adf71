"""Headers of models on the Hub that tasks have read, kept beside their records: `finish` asks for none of them again.

    out.partial/headers/<sha256>   the header of a weight file, by the digest that the plan has of it

Nothing depends on them: what is not there, or has another digest, is asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.durable import write_whole
from skillmerge.errors import SkillmergeError

HEADERS = "headers"


def keep(folder: Path, own: Path, checkpoints: Iterable[Checkpoint]) -> None:
    """Keep the headers of files at a commit. folder: of the output in the making. own: the task's, for what is not
    whole yet."""
    with suppress(OSError, SkillmergeError):
        (folder / HEADERS).mkdir(exist_ok=True)
        for checkpoint in checkpoints:
            if checkpoint.at.remote and checkpoint.at.revision is not None:
                for file in checkpoint.files.values():
                    path = folder / HEADERS / hashlib.sha256(file.header.raw).hexdigest()
                    if not path.exists():
                        write_whole(path, file.header.raw, own / path.name)


def kept(folder: Path, digest: str) -> bytes | None:
    """Return the header with a digest, if it is there."""
    with suppress(OSError):
        path = folder / HEADERS / digest
        content = path.read_bytes() if path.is_file() else b""  # opening a FIFO would block
        if hashlib.sha256(content).hexdigest() == digest:
            return content
    return None
