"""skillmerge: cut a skill out of one family of checkpoints and put it into another, streaming, with proof.

The verbs of the command line are functions here, with the same words:

    skillmerge.plan("recipe.yaml")                      -> Plan
    skillmerge.apply("recipe.yaml", "out", device="cpu") -> Result
    skillmerge.verify("out", load=True)                 -> Verdict
    skillmerge.push("out", "org/name")                  -> Published

They are imported when first used, so that `import skillmerge` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from skillmerge.version import __version__

__all__ = [
    "SkillmergeError", "__version__", "apply", "attest", "export", "export_patch", "extract", "inspect", "plan", "push",
    "sign", "verify", "verify_signed",
]  # fmt: skip

if TYPE_CHECKING:
    from skillmerge.errors import SkillmergeError
    from skillmerge.outputs.attest import attest
    from skillmerge.outputs.push import push
    from skillmerge.outputs.sign import sign
    from skillmerge.study.inspect import inspect
    from skillmerge.verbs.apply import apply
    from skillmerge.verbs.export_lora import export
    from skillmerge.verbs.export_patch import export_patch
    from skillmerge.verbs.extract import extract
    from skillmerge.verbs.plan import make_plan as plan
    from skillmerge.verbs.verify import verify, verify_signed

_HOMES = {
    "apply": ("skillmerge.verbs.apply", "apply"),
    "attest": ("skillmerge.outputs.attest", "attest"),
    "export": ("skillmerge.verbs.export_lora", "export"),
    "export_patch": ("skillmerge.verbs.export_patch", "export_patch"),
    "extract": ("skillmerge.verbs.extract", "extract"),
    "inspect": ("skillmerge.study.inspect", "inspect"),
    "plan": ("skillmerge.verbs.plan", "make_plan"),
    "push": ("skillmerge.outputs.push", "push"),
    "sign": ("skillmerge.outputs.sign", "sign"),
    "verify": ("skillmerge.verbs.verify", "verify"),
    "verify_signed": ("skillmerge.verbs.verify", "verify_signed"),
    "SkillmergeError": ("skillmerge.errors", "SkillmergeError"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)
