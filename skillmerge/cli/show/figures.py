"""The figures of inspect (name, formula, meaning, source), and what the actions of a plan do.

v is the update, k the second update, w the weights that v is compared with, n the number of elements.
"""

from __future__ import annotations

from dataclasses import dataclass

from skillmerge.plans.depth import number


@dataclass(frozen=True, slots=True)
class Figure:
    """label: the column's head. unit: share, number, signed or count. source: a paper, or empty."""

    label: str
    formula: str
    meaning: str
    unit: str = "number"
    source: str = ""


_SUBNETWORKS = "Mukherjee et al. 2025, arXiv 2505.11711"
_PRINCIPALS = "Zhu et al. 2025, arXiv 2511.08567"
_PAST = "Parametric Skill Transfer, arXiv 2601.11258"
_CASTS = "arXiv 2608.27409"
_TIES = "Yadav et al. 2023 (TIES), arXiv 2306.01708"

FIGURES = {
    "elements": Figure("elements", "n", "Numbers in the tensors.", "count"),
    "changed": Figure(
        "changed",
        "|{i : bits differ}| / n",
        "Share of elements whose stored bits differ. Depends on the dtype: bfloat16 hides changes smaller than half a "
        "unit in the last place, so a low share can come from learning rate and precision.",
        "share",
        _PRINCIPALS,
    ),
    "above_absolute": Figure(
        "above 1e-5",
        "|{i : |v_i| > 1e-5}| / n",
        "Share of elements that moved by more than 1e-5, regardless of their own size.",
        "share",
        _SUBNETWORKS,
    ),
    "above_relative": Figure(
        "above 1e-3 of w",
        "|{i : |v_i| > 1e-3 |w_i|}| / n",
        "Share of elements that moved by more than a thousandth of themselves, less than half a unit of bfloat16.",
        "share",
        _PRINCIPALS,
    ),
    "norm": Figure("norm", "||v||", "Euclidean norm of the update."),
    "largest": Figure("largest", "max |v_i|", "The largest change of one element."),
    "norm_ratio": Figure("relative norm", "||v|| / ||w||", "Size of the update relative to the weights."),
    "energy": Figure("energy", "||v||^2 / ||v of the whole model||^2", "This part's share of the update.", "share"),
    "input_rounding": Figure(
        "input rounding",
        "sqrt(sum (ulp(r)^2 + ulp(s)^2) / 12) / ||v||",
        "Expected rounding error in v = r - s if both models were cast, as a share of its norm, in tensors with an "
        "update. From about 0.7 it is as large as the rest of the update. Does not apply to models that were trained "
        "in the precision of their numbers: those are not casts.",
        "number",
        _CASTS,
    ),
    "input_rounding_added": Figure(
        "of r alone",
        "sqrt(sum ulp(r)^2 / 12) / ||v||",
        "The same if only r was cast, for example if RL started from s as stored.",
    ),
    "other_norm": Figure("second norm", "||k||", "Euclidean norm of the second update, the target's own."),
    "updates_ratio": Figure("update ratio", "||v|| / ||k||", "Size of the update relative to the second one."),
    "cosine": Figure(
        "cosine",
        "<v, k> / (||v|| ||k||)",
        "Near 0 for any two unrelated vectors of this many dimensions, so weak evidence alone. Updates that are "
        "nearly orthogonal can still disturb each other's function (arXiv 2305.12827).",
        "signed",
        _PAST,
    ),
    "cosine_z": Figure(
        "cosine z",
        "cosine * sqrt(n)",
        "Standard deviations from chance: dense independent updates have a cosine of 0, give or take 1/sqrt(n). "
        "Overstates if few elements carry most of the norms (sparse updates; norms beside matrices). If both updates "
        "subtract the same SFT model, its own part is in both and raises z.",
        "signed",
    ),
    "cosine_z_signs": Figure(
        "sign-flip z",
        "<v, k> / sqrt(sum v_i^2 k_i^2)",
        "The same against updates of exactly these sizes with random signs, which does not overstate. If the two z "
        "differ, trust this one.",
        "signed",
    ),
    "conflict": Figure(
        "sign conflict",
        "|{i : v_i k_i < 0}| / |{i : v_i k_i != 0}|",
        "Share of the elements that both updates move in opposite directions; 50% by chance.",
        "share",
        _TIES,
    ),
    "conflict_z": Figure(
        "sign z", "(conflict - 1/2) * 2 sqrt(|{i : v_i k_i != 0}|)", "Standard deviations from chance.", "signed"
    ),
    "overlap": Figure(
        "overlap",
        "|{i : v_i k_i != 0}| / |{i : v_i != 0}|",
        "Share of the update's elements that the second update also moves.",
        "share",
        _SUBNETWORKS,
    ),
    "overlap_chance": Figure(
        "chance overlap", "|{i : k_i != 0}| / n", "Overlap expected if the positions were unrelated.", "share"
    ),
}

SPECTRAL = {
    "stable_rank": Figure(
        "stable rank",
        "||v||_F^2 / s_1^2",
        "How many directions share a matrix's energy; s_1 is its largest singular value.",
    ),
    "effective_rank": Figure(
        "effective rank",
        "exp(-sum p_i ln p_i), p_i = s_i^2 / sum s^2",
        "The same, from the entropy of the leading singular values (up to the requested rank).",
        source="Roy and Vetterli 2007",
    ),
    "leading_energy": Figure(
        "leading energy",
        "sum s_i^2 / ||v||_F^2",
        "Energy in the leading directions, and so in an adapter of that rank.",
        "share",
    ),
    "principal_left": Figure(
        "in principal rows",
        "||U_k^T v||_F^2 / ||v||_F^2",
        "Energy in the leading k left singular directions of the weights. RL updates have been observed to avoid them.",
        "share",
        _PRINCIPALS,
    ),
    "principal_left_chance": Figure("chance, rows", "k / rows", "Energy that a random update has there.", "share"),
    "principal_right": Figure(
        "in principal columns",
        "||v V_k||_F^2 / ||v||_F^2",
        "The same for right singular directions.",
        "share",
        _PRINCIPALS,
    ),
    "principal_right_chance": Figure(
        "chance, columns", "k / columns", "Energy that a random update has there.", "share"
    ),
    "subspace_overlap": Figure(
        "subspace overlap",
        "mean of cos^2 of the principal angles between U_k of v and U_k of w",
        "1 if the update's leading directions are those of the weights; k / rows by chance.",
        "share",
        _PRINCIPALS,
    ),
    "least_angle": Figure("least angle", "arccos of the largest cosine, in degrees", "0 if a direction is shared."),
}

FORECAST = {
    "realised": Figure(
        "effective λ",
        "lambda <y - t, u> / <u, u>, u = lambda v",
        "Lambda left after rounding; t is the target, y the output.",
    ),
    "vanished": Figure(
        "lost",
        "|{i : u_i != 0, y_i = t_i}| / |{i : u_i != 0}|",
        "Share of the update's nonzero elements that left the weight unchanged.",
        "share",
    ),
}


def show(value: float | None, unit: str) -> str:
    """Return a figure for people; a dash if unknown."""
    if value is None:
        return "–"
    if unit == "share":
        return f"{value:.1%}"
    if unit == "count":
        return f"{value:,.0f}"
    return number(value)


ACTIONS = {
    "merge": "computed",
    "copy": "copied byte for byte",
    "cast": "converted to the output dtype",
    "same": "not numbers to add: must be equal in all models",
    "cut": "the difference, kept exactly",
    "compute": "computed, rounded once",
    "join": "side by side",
    "zero": "nothing",
}
"""Actions of a plan, in words."""
