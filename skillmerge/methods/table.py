"""The table of methods, by the names that expressions call them by. A new one is a function in a file and a line
here."""

from __future__ import annotations

from skillmerge.methods.families.average import median, model_stock, sce
from skillmerge.methods.families.elect import elect, pick, ram, ties
from skillmerge.methods.families.sparsify import band, clip, drop, match, project, trim
from skillmerge.methods.families.spherical import karcher, multislerp, slerp
from skillmerge.methods.method import Method

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        trim, drop, band, clip, match, project,
        elect, ties, pick, ram, model_stock, sce,
        slerp, multislerp, karcher, median,
    )
}  # fmt: skip
