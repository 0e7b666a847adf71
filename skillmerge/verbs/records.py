"""How a merge is checked and published, apart from its recipe.

`plans.opening.Access` says how models are reached, `engine.runner.Work` how the merge is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from skillmerge.outputs.manifest import Manifest

if TYPE_CHECKING:
    from skillmerge.outputs.sending import Sender


@dataclass(frozen=True, slots=True)
class Checks:
    """How inputs and output are checked.

    stats: how much of the rounding is measured: full, sampled or off. full: reread every byte of an existing output.
    expected: a manifest that the output must equal, except its environment. strict: warnings fail.
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
    """How the output is published: replacing an existing one, on the Hub too, or on the Hub only.

    repository: org/name; replaces `output.push.repo`, as private, revision, pull_request and message replace theirs.
    no_local: upload shards as they finish and remove them here.
    """

    overwrite: bool = False
    repository: str | None = None
    no_local: bool = False
    private: bool | None = None
    revision: str | None = None
    pull_request: bool | None = None
    message: str | None = None


def is_published(push: Sender | None, publish: Publish) -> bool:
    """Return whether an output that is to be on the Hub alone is there: then nobody waits for its tasks."""
    return push is not None and publish.no_local and not publish.overwrite and push.find({}) is not None
