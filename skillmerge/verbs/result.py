"""The result of a merge or of a cut skill, and the warnings that its manifest calls for. Knows nothing of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skillmerge.brief import brief
from skillmerge.plans.plan import Plan

if TYPE_CHECKING:
    from skillmerge.outputs.hub_commit import Published


@dataclass(frozen=True, slots=True)
class Result:
    """A finished merge: where it is, its manifest, and where it was computed and why there.

    `already` where nothing was left to do. published: where on the Hub it is, if it was pushed. gates: what became
    of each, as `gates.Outcome` has it.
    """

    output: Path
    manifest: Mapping[str, Any]
    seconds: float
    device: str = ""
    already: bool = False
    published: Published | None = None
    plan: Plan | None = None
    gates: Sequence[Mapping[str, Any]] = ()

    __repr__ = brief

    @property
    def warnings(self) -> list[str]:
        """Where the output is not what was asked for: nothing changed, or rounding changed what was asked."""
        skill = self.manifest["output"].get("kind") == "skill"
        return _warnings_of_skill(self.manifest) if skill else _warnings_of_model(self.manifest)

    def as_dict(self) -> dict[str, Any]:
        return {
            "output": str(self.output),
            "already": self.already,
            "seconds": round(self.seconds, 3),
            "plan_digest": self.manifest["plan_digest"],
            "statistics": self.manifest["statistics"],
            "warnings": self.warnings,
            "gates": list(self.gates),
            "published": self.published.as_dict() if self.published else None,
            "files": self.manifest["files"],
        }


def _warnings_of_skill(manifest: Mapping[str, Any]) -> list[str]:
    found = manifest["statistics"]["all"]
    warnings = []
    if not found["changed"]:
        warnings.append("this skill is empty: the models that it was cut from hold the same weights")
    if found["relative_error"]:
        lost = found["relative_error"]
        warnings.append(f"this skill is rounded: {lost:.2g} of its norm was lost, and merges with it differ by that")
    return warnings


def _warnings_of_model(manifest: Mapping[str, Any]) -> list[str]:
    from skillmerge.engine.rounding_statistics import deviating  # imports torch

    statistics, donor = manifest["statistics"], manifest["donor"]
    plain = all(tensor["action"] == "copy" and tensor["sources"][0][0] == donor for tensor in manifest["tensors"])
    if plain or statistics["all"].get("changed") == 0:
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
