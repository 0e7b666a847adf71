"""The result of a merge or an extracted skill. Knows nothing about the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skillmerge.brief import brief, drawn
from skillmerge.outputs.manifest import Manifest
from skillmerge.outputs.output import Outcome
from skillmerge.plans.plan import Plan

if TYPE_CHECKING:
    from skillmerge.outputs.hub.published import Published


@dataclass(frozen=True, slots=True)
class Result:
    """A finished merge: its folder, its manifest, the device and why it was chosen.

    already: the output was up to date. published: its place on the Hub, if it was pushed. gates: the outcome of each.
    warnings: those of the plan, the weights and the run. place: the bucket that has the output; the folder does not.
    """

    output: Path
    manifest: Manifest
    seconds: float
    device: str = ""
    already: bool = False
    published: Published | None = None
    plan: Plan | None = None
    gates: Sequence[Outcome] = ()
    warnings: Sequence[str] = ()
    place: str = ""

    __repr__ = brief
    _repr_html_ = drawn

    @property
    def shown(self) -> str:
        """What to call the output."""
        return self.place or str(self.output)

    @property
    def is_kept(self) -> bool:
        """Whether the output is where `shown` says, and not on the Hub alone."""
        return bool(self.place) or self.output.exists()

    def as_dict(self) -> dict[str, Any]:
        plan = self.plan
        share = plan.merged_share if plan is not None else None
        found = [each.as_dict() for each in plan.compared.found] if plan is not None else []
        return {
            "output": self.shown,
            "already": self.already,
            "seconds": round(self.seconds, 3),
            "plan_digest": self.manifest.plan_digest,
            **({"merged_share": share} if share is not None else {}),
            "statistics": self.manifest.statistics.as_dict(),
            "warnings": list(self.warnings),
            "notes": list(plan.notes) if plan is not None else [],
            "compared": found,
            "gates": [outcome.as_dict() for outcome in self.gates],
            "published": self.published.as_dict() if self.published else None,
            "files": [file.as_dict() for file in self.manifest.files],
        }
