"""The warnings that finished weights call for: nothing changed, or rounding changed what was asked.

Read from the statistics of a manifest; nothing is measured here.
"""

from __future__ import annotations

from skillmerge.engine.rounding_statistics import SkillStatistics, Statistics, deviating
from skillmerge.outputs.manifest import ManifestBody
from skillmerge.outputs.output import Outcome
from skillmerge.remarks import Remark, warning

STRICT = "strict"
"""The name of the gate that `--strict` makes of warnings."""


def warnings_of(body: ManifestBody) -> list[Remark]:
    """Return where the output is not what was asked for."""
    if isinstance(body.statistics, SkillStatistics):
        return _of_skill(body.statistics)
    return _of_model(body, body.statistics)


def strict_outcome(body: ManifestBody) -> Outcome:
    """Return what becomes of the gate that `--strict` makes of the warnings."""
    found = warnings_of(body)
    return Outcome(STRICT, "no warnings", float(len(found)), not found, "\n".join(remark.message for remark in found))


def _of_skill(statistics: SkillStatistics) -> list[Remark]:
    warnings = []
    if not statistics.all.changed:
        warnings.append(warning("this skill is empty: the models that it was cut from hold the same weights"))
    if lost := statistics.all.relative_error:
        lossy = f"this skill is rounded: {lost:.2g} of its norm was lost, and merges with it differ by that"
        warnings.append(warning(lossy))
    return warnings


def _of_model(body: ManifestBody, statistics: Statistics) -> list[Remark]:
    donor = body.donor
    plain = all(tensor.action == "copy" and tensor.sources[0][0] == donor for tensor in body.tensors)
    if plain or statistics.all.changed == 0:
        return [
            warning(f"this merge does nothing: as far as was measured, the output's weights are those of `{donor}`")
        ]
    warnings, far = [], dict(deviating(statistics))
    for much, what in ((False, "only part of the update"), (True, "more than the update")):
        found = [f"{share:.0%} for {name}" for name, share in far.items() if (share > 1) == much]
        if found:
            warnings.append(
                warning(
                    f"rounding lets through {what}: {', '.join(found)}",
                    "set `output.dtype: float32` or `output.rounding: stochastic`",
                )
            )
    return warnings
