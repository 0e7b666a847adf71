"""What a merge is asked for beside its recipe: how it is checked, and how it becomes visible.

How models are reached is `plans.opening.Access`, how it is computed `engine.runner.Work`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from skillmerge.errors import UsageError
from skillmerge.outputs.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Checks:
    """How inputs and output are checked.

    stats: how much of the rounding is measured: full, sampled or off. full: an output that is there already is read
    again, every byte. expected: a manifest that the output has to get, but for its environment.
    """

    stats: str = "sampled"
    allow_nonfinite: bool = False
    hash_inputs: bool = False
    full: bool = False
    keep_failed: bool = False
    expected: Manifest | None = None


@dataclass(frozen=True, slots=True)
class Publish:
    """How the output becomes visible: in place of what is there, on the Hub, or there alone.

    repository: org/name, in place of the recipe's `output.push.repo`; private, revision, pull_request and message
    likewise. no_local: shards are sent as they are finished and removed; only the Hub keeps them.
    """

    overwrite: bool = False
    repository: str | None = None
    no_local: bool = False
    private: bool | None = None
    revision: str | None = None
    pull_request: bool | None = None
    message: str | None = None


def check_words(device: str, threads: int | None, memory_limit: int | None, stats: str, hub: str) -> None:
    """What the command line checks by itself."""
    for wrong, what in (
        (re.fullmatch(r"auto|cpu|cuda(:\d+)?", str(device)) is None, f"device {device!r}: auto, cpu, cuda or cuda:N"),
        (threads is not None and (type(threads) is not int or threads < 1), f"threads {threads!r}: a number from 1"),
        (memory_limit is not None and type(memory_limit) is not int, f"memory_limit {memory_limit!r}: bytes"),
        (stats not in ("full", "sampled", "off"), f"stats {stats!r}: full, sampled or off"),
        (hub not in ("stream", "download"), f"hub {hub!r}: stream or download"),
    ):
        if wrong:
            raise UsageError(what)
