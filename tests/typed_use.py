"""A user's script as type checkers see it: what every public function returns. mypy reads it; nothing runs it."""

from __future__ import annotations

from typing import Any

from typing_extensions import assert_type

import skillmerge
from skillmerge.cli.doctor import Diagnosis
from skillmerge.engine.measures.skill_statistics import SkillStatistics
from skillmerge.engine.rounding_statistics import Statistics
from skillmerge.outputs.hub.published import Published
from skillmerge.outputs.manifest import Manifest
from skillmerge.outputs.proof.attest import Attested
from skillmerge.outputs.proof.sign import Signature
from skillmerge.outputs.verify import Verdict
from skillmerge.recipes.formula.catalog import Catalog
from skillmerge.recipes.lint import Lint
from skillmerge.study.gates import GateReport
from skillmerge.study.inspect import Inspection
from skillmerge.study.scoring.scores import Score
from skillmerge.verbs.demo.demo import Demo
from skillmerge.verbs.export.lora import Exported
from skillmerge.verbs.export.patch import Patch
from skillmerge.verbs.plan import Preview
from skillmerge.verbs.rebuild import Rebuilt
from skillmerge.verbs.result import Result
from skillmerge.verbs.sweep.sweep import Sweep
from skillmerge.verbs.tasks.shard import Shards


def script(recipe: dict[str, Any]) -> None:
    """Call each function as the Python guide does."""
    preview = assert_type(skillmerge.plan(recipe, coefficients={"lam": 0.7}), Preview)
    assert_type(preview.ok, bool)
    assert_type(preview.bytes_read, int)
    assert_type(preview.as_dict(), dict[str, Any])
    result = assert_type(skillmerge.apply(recipe, "merged", device="cpu"), Result)
    assert_type(result.manifest, Manifest)
    assert_type(result.manifest.statistics, SkillStatistics | Statistics)
    assert_type(skillmerge.shard("plan.json", "merged", index=0, of=4), Shards)
    assert_type(skillmerge.finish("plan.json", "merged", wait=True), Result)
    assert_type(skillmerge.inspect("before", "after"), Inspection)
    found = assert_type(skillmerge.sweep(recipe, ["lam=0:1:0.5"], "qa:questions.jsonl"), Sweep)
    assert_type(found.best.scores["accuracy"], Score)
    assert_type(skillmerge.extract("rl", "sft", "skill"), Result)
    assert_type(skillmerge.export("skill", "adapter"), Exported | Patch)
    assert_type(skillmerge.verify("merged"), Verdict)
    assert_type(skillmerge.gate("merged", "gates.yaml"), GateReport)
    assert_type(skillmerge.rebuild("merged", check=True), Rebuilt)
    assert_type(skillmerge.sign("merged", private_key="key.pem"), Signature)
    assert_type(skillmerge.attest("merged", "attestation.json", private_key="key.pem"), Attested)
    assert_type(skillmerge.push("merged", "acme/model"), Published)
    assert_type(skillmerge.lint(["recipe.yaml"]), Lint)
    assert_type(skillmerge.list_methods("ties"), Catalog)
    assert_type(skillmerge.doctor(), Diagnosis)
    assert_type(skillmerge.demo("demo"), Demo)
    assert_type(skillmerge.schema(), dict[str, Any])
    try:
        skillmerge.init("recipe.yaml")
    except skillmerge.SkillmergeError as error:
        assert_type(error.fix, str | None)
