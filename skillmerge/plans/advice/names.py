"""Two sets of tensor names that differ only in their prefixes, and the prefixes that turn one into the other.

Looks only at names and shapes. Each name is matched by the longest ending that a name of the other set shares; the
prefixes before these endings vote on which one replaces which.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from skillmerge.checkpoints.views.renamed import replaced
from skillmerge.tensors import TensorSpec

_RULES = 8
"""More of them than that are no pattern."""

Rules = list[tuple[str, str]]


def rename_rules(ours: Mapping[str, TensorSpec], wanted: Mapping[str, TensorSpec]) -> Rules:
    """Return prefixes of `ours`, and what has to stand there for the names to be the `wanted` ones; none if most of
    the tensors find no partner in this way. The first rule that matches a name wins."""
    partners = _partners(ours, wanted)
    found = sum(ours[name].elements for name in partners)
    both = [name for name in ours if name in wanted and ours[name].shape == wanted[name].shape]
    whole = min(sum(spec.elements for spec in side.values()) for side in (ours, wanted))
    if 2 * (found + sum(ours[name].elements for name in both)) <= whole or not found:
        return []
    rules = _rules(partners, both)
    return rules if len(rules) <= _RULES and _is_injective(ours, rules) else []


def _partners(ours: Mapping[str, TensorSpec], wanted: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Return names of `ours` that are not wanted -> the wanted names that they stand for, each once."""
    ends: dict[str, list[str]] = {}
    for name in wanted:
        if name not in ours:
            for _, end in _ends(name):
                ends.setdefault(end, []).append(name)
    candidates: dict[str, list[str]] = {}
    for name, spec in ours.items():
        if name not in wanted:
            for _, end in _ends(name):
                alike = [other for other in ends.get(end, ()) if wanted[other].shape == spec.shape]
                if alike:
                    candidates[name] = alike
                    break
    votes = Counter(_beginnings(name, other) for name, others in candidates.items() for other in others)
    partners: dict[str, str] = {}
    taken: set[str] = set()
    ranked = ((name, max(others, key=lambda it: votes[_beginnings(name, it)])) for name, others in candidates.items())
    for name, other in sorted(ranked, key=lambda pair: -votes[_beginnings(*pair)]):
        if other not in taken:
            taken.add(other)
            partners[name] = other
    return partners


def _ends(name: str) -> Iterator[tuple[str, str]]:
    """(beginning, end), the longest end first: beginnings hold no number of a layer, ends more than one part."""
    parts = name.split(".")
    yield "", name
    for count in range(1, len(parts) - 1):
        if parts[count - 1].isdigit():
            return
        yield ".".join(parts[:count]) + ".", ".".join(parts[count:])


def _beginnings(name: str, other: str) -> tuple[str, str]:
    """Return what stands before the longest end of whole parts that two names share."""
    parts, others = name.split("."), other.split(".")
    count = 0
    while count < min(len(parts), len(others)) and parts[-1 - count] == others[-1 - count]:
        count += 1
    return _prefix(parts[: len(parts) - count]), _prefix(others[: len(others) - count])


def _prefix(parts: Sequence[str]) -> str:
    return "".join(f"{part}." for part in parts)


def _rules(partners: Mapping[str, str], kept: Sequence[str]) -> Rules:
    """Return the fewest prefixes that rename `partners` and leave the kept names alone, the longest first.

    A prefix that would rename a name wrongly gives way to prefixes that are one part longer.
    """
    wanted = {**partners, **{name: name for name in kept}}
    lengths = dict.fromkeys({_beginnings(*pair) for pair in partners.items()}, 0)
    for _ in range(3):
        rules = sorted(
            {_longer(name, other, lengths[_beginnings(name, other)]) for name, other in partners.items()},
            key=lambda rule: (-len(rule[0]), rule),
        )
        wrong = {
            next(rule for rule in rules if name.startswith(rule[0]))
            for name, other in wanted.items()
            if replaced(name, rules) != other
        }
        if not wrong:
            break
        for pair in lengths:
            lengths[pair] += any(rule[0].startswith(pair[0]) and rule[1].startswith(pair[1]) for rule in wrong)
    return rules if not wrong else []


def _longer(name: str, other: str, parts: int) -> tuple[str, str]:
    """Return the beginnings of two names, longer by so many parts of the end that they share."""
    old, new = _beginnings(name, other)
    more = name[len(old) :].split(".")
    extra = _prefix(more[:parts]) if parts < len(more) else name[len(old) :]
    return old + extra, new + extra


def _is_injective(ours: Mapping[str, TensorSpec], rules: Rules) -> bool:
    return len({replaced(name, rules) for name in ours}) == len(ours)
