"""What a merge is asked for beside its recipe: how it is checked, and how it becomes visible.

How models are reached is `plans.opening.Access`, how it is computed `engine.runner.Work`.
"""

from __future__ import annotations

from dataclasses import dataclass

from skillmerge.outputs.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Checks:
    """How inputs and output are checked.

    stats: how much of the rounding is measured: full, sampled or off. full: an output that is there already is read
    again, every byte. expected: a manifest that the output has to get, but for its environment. strict: warnings
    are refused.
    """

    stats: str = "sampled"
    allow_nonfinite: bool = False
    hash_inputs: bool = False
    full: bool = False
    keep_failed: bool = False
    expected: Manifest | None = None
    strict: bool = False


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
