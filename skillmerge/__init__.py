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

__version__ = "0.1.0"
__all__ = [
    "SkillmergeError", "__version__", "apply", "attest", "export", "export_patch", "extract", "inspect", "plan", "push",
    "sign", "verify", "verify_signed",
]  # fmt: skip

if TYPE_CHECKING:
    from skillmerge.attestation import attest
    from skillmerge.errors import SkillmergeError
    from skillmerge.exporting import export
    from skillmerge.extraction import extract
    from skillmerge.inspection import inspect
    from skillmerge.merge import apply
    from skillmerge.merge import make_plan as plan
    from skillmerge.patching import export_patch
    from skillmerge.pushing import push
    from skillmerge.signing import sign, verify_signed
    from skillmerge.verification import verify

_HOMES = {
    "apply": ("skillmerge.merge", "apply"),
    "attest": ("skillmerge.attestation", "attest"),
    "export": ("skillmerge.exporting", "export"),
    "export_patch": ("skillmerge.patching", "export_patch"),
    "extract": ("skillmerge.extraction", "extract"),
    "inspect": ("skillmerge.inspection", "inspect"),
    "plan": ("skillmerge.merge", "make_plan"),
    "push": ("skillmerge.pushing", "push"),
    "sign": ("skillmerge.signing", "sign"),
    "verify": ("skillmerge.verification", "verify"),
    "verify_signed": ("skillmerge.signing", "verify_signed"),
    "SkillmergeError": ("skillmerge.errors", "SkillmergeError"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)
