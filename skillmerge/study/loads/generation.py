"""Two runtimes that continue one prompt: where they differ, and whether rounding explains it.

Arithmetic on what they report; runs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TOKENS = 8
"""Tokens to generate."""
LIKELY = 20
"""Most likely tokens to report for each step."""

_PRECISION = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "float32": 2.0**-23}
"""The distance of 1 to the next number."""
_UNITS = 4
"""How many of these, at the size of the largest logit, two runtimes may differ by; about 2 were observed."""


def compare(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Compare what a runtime generated with what transformers generated, `ours`.

    Both have `tokens`, and `steps` with the log probabilities of the `likely` tokens; ours also the `dtype`, and of
    each step the `largest` of the logits. Returns `same`, how many tokens agree before the first that does not;
    `furthest`, the largest difference of a log probability up to there; and, where they part, `difference`: both
    tokens, their log probabilities in both runtimes (None if a token is not likely), the `noise` that rounding may
    add to the difference of two logits, and whether it is a `tie`: the two are no further apart in either runtime.
    """
    pairs = list(zip(ours["tokens"], theirs["tokens"], strict=True))
    same = next((place for place, (one, other) in enumerate(pairs) if one != other), len(pairs))
    steps = [[dict(map(tuple, step["likely"])) for step in run["steps"][: same + 1]] for run in (ours, theirs)]
    both = [abs(one[token] - other[token]) for one, other in zip(*steps, strict=True) for token in one.keys() & other]
    report: dict[str, Any] = {"same": same, "furthest": max(both, default=0.0)}
    if same < len(pairs):
        tokens = pairs[same]
        noise = _UNITS * _PRECISION.get(ours["dtype"], 2.0**-7) * ours["steps"][same]["largest"]
        chances = [[likely[same].get(token) for token in tokens] for likely in steps]
        tie = all(one is not None and other is not None and abs(one - other) <= noise for one, other in chances)
        report["difference"] = {"tokens": list(tokens), "logprobs": chances, "noise": noise, "tie": tie}
    return report


def first_difference(report: Mapping[str, Any], name: str) -> str:
    """Describe where two runtimes differ. name: of the other one."""
    found = report["difference"]
    (ours, theirs), chances = found["tokens"], found["logprobs"]
    sides = [
        f"{' and '.join('not likely' if value is None else f'{value:.4f}' for value in row)} in {who}"
        for who, row in zip(("transformers", name), chances, strict=True)
    ]
    return (
        f"token {report['same'] + 1} is {theirs}, and {ours} in transformers; "
        f"log probabilities of {ours} and {theirs}: {', '.join(sides)}"
    )
