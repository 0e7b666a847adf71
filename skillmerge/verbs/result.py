"""The result of a merge or of a cut skill, and the warnings that its manifest calls for. Knows nothing of the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skillmerge.brief import brief
from skillmerge.engine.rounding_statistics import SkillStatistics, Statistics, deviating
from skillmerge.outputs.manifest import Manifest
from skillmerge.outputs.output import Outcome
from skillmerge.plans.plan import Plan

if TYPE_CHECKING:
    from skillmerge.outputs.hub_commit import Published


@dataclass(frozen=True, slots=True)
class Result:
    """A finished merge: where it is, its manifest, and where it was computed and why there.

    `already` where nothing was left to do. published: where on the Hub it is, if it was pushed. gates: what became
    of each.
    """

    output: Path
    manifest: Manifest
    seconds: float
    device: str = ""
    already: bool = False
    published: Published | None = None
    plan: Plan | None = None
    gates: Sequence[Outcome] = ()

    __repr__ = brief

    @property
    def warnings(self) -> list[str]:
        """Where the output is not what was asked for: nothing changed, or rounding changed what was asked."""
        statistics = self.manifest.statistics
        if isinstance(statistics, SkillStatistics):
            return _warnings_of_skill(statistics)
        return _warnings_of_model(self.manifest, statistics)

    def as_dict(self) -> dict[str, Any]:
        return {
            "output": str(self.output),
            "already": self.already,
            "seconds": round(self.seconds, 3),
            "plan_digest": self.manifest.plan_digest,
            "statistics": self.manifest.statistics.as_dict(),
            "warnings": self.warnings,
            "gates": [outcome.as_dict() for outcome in self.gates],
            "published": self.published.as_dict() if self.published else None,
            "files": [file.as_dict() for file in self.manifest.files],
        }


def _warnings_of_skill(statistics: SkillStatistics) -> list[str]:
    warnings = []
    if not statistics.all.changed:
        warnings.append("this skill is empty: the models that it was cut from hold the same weights")
    if lost := statistics.all.relative_error:
        warnings.append(f"this skill is rounded: {lost:.2g} of its norm was lost, and merges with it differ by that")
    return warnings


def _warnings_of_model(manifest: Manifest, statistics: Statistics) -> list[str]:
    donor = manifest.donor
    plain = all(tensor.action == "copy" and tensor.sources[0][0] == donor for tensor in manifest.tensors)
    if plain or statistics.all.changed == 0:
        return [f"this merge does nothing: as far as was measured, the output's weights are those of `{donor}`"]
    warnings, far = [], dict(deviating(statistics))
    for much, what in ((False, "only part of the update"), (True, "more than the update")):
        found = [f"{share:.0%} for {name}" for name, share in far.items() if (share > 1) == much]
        if found:
            warnings.append(
                f"rounding lets through {what}: {', '.join(found)}. "
                "The cures are `dtype: float32` or `rounding: stochastic` under `output`."
            )
    return warnings
