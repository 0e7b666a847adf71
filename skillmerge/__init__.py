"""skillmerge: merge model checkpoints, and extract skills of one model family to use in another.

Every command is a function here, with the same arguments (`import` is `import_recipe`, `methods` is `list_methods`):

    skillmerge.plan("recipe.yaml")                       -> Preview
    skillmerge.apply("recipe.yaml", "out", device="cpu") -> Result
    skillmerge.verify("out", load=True)                  -> Verdict
    skillmerge.push("out", "org/name")                   -> Published

A function returns what its command shows: a frozen result with a short repr, whose `as_dict()` is what `--json`
prints after `"ok"`. It raises a `SkillmergeError` where the command exits with a status above 0.

Functions are imported on first use, so `import skillmerge` is fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from skillmerge.version import __version__

_HOMES = {
    "SkillmergeError": "errors",
    "apply": "verbs.apply",
    "attest": "outputs.proof.attest",
    "demo": "verbs.demo.demo",
    "doctor": "cli.doctor",
    "export": "verbs.export.export",
    "export_patch": "verbs.export.patch",
    "extract": "verbs.extract",
    "finish": "verbs.tasks.finish",
    "gate": "study.gates",
    "import_recipe": "recipes.mergekit.importing",
    "init": "recipes.starter",
    "inspect": "study.inspect",
    "lint": "recipes.lint",
    "list_methods": "recipes.formula.catalog",
    "plan": "verbs.plan",
    "push": "outputs.hub.push",
    "rebuild": "verbs.rebuild",
    "rehearse_push": "outputs.hub.push",
    "schema": "recipes.schema",
    "shard": "verbs.tasks.shard",
    "sign": "outputs.proof.sign",
    "sweep": "verbs.sweep.sweep",
    "verify": "verbs.verify",
    "verify_signed": "verbs.verify",
}
"""Every public name -> the module that defines it. Type checkers read the imports below instead; a test compares."""

__all__ = [*_HOMES, "__version__"]

if TYPE_CHECKING:
    from skillmerge.cli.doctor import doctor as doctor
    from skillmerge.errors import SkillmergeError as SkillmergeError
    from skillmerge.outputs.hub.push import push as push
    from skillmerge.outputs.hub.push import rehearse_push as rehearse_push
    from skillmerge.outputs.proof.attest import attest as attest
    from skillmerge.outputs.proof.sign import sign as sign
    from skillmerge.recipes.formula.catalog import list_methods as list_methods
    from skillmerge.recipes.lint import lint as lint
    from skillmerge.recipes.mergekit.importing import import_recipe as import_recipe
    from skillmerge.recipes.schema import schema as schema
    from skillmerge.recipes.starter import init as init
    from skillmerge.study.gates import gate as gate
    from skillmerge.study.inspect import inspect as inspect
    from skillmerge.verbs.apply import apply as apply
    from skillmerge.verbs.demo.demo import demo as demo
    from skillmerge.verbs.export.export import export as export
    from skillmerge.verbs.export.patch import export_patch as export_patch
    from skillmerge.verbs.extract import extract as extract
    from skillmerge.verbs.plan import plan as plan
    from skillmerge.verbs.rebuild import rebuild as rebuild
    from skillmerge.verbs.sweep.sweep import sweep as sweep
    from skillmerge.verbs.tasks.finish import finish as finish
    from skillmerge.verbs.tasks.shard import shard as shard
    from skillmerge.verbs.verify import verify as verify
    from skillmerge.verbs.verify import verify_signed as verify_signed


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
