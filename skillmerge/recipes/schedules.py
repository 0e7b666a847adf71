"""Schedules: the number that a coefficient has for one tensor.

A schedule is a default and rules; the last rule that matches a tensor wins, as in .gitignore. A rule selects
by layer, by expert, by globs over whole names and by module kind; what it selects, it must select in this model:
a rule that matches nothing is always a mistake. Knows names, never values. A tensor that packs experts has a name for
each of them here (`naming.sliced`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import translate

from skillmerge.errors import did_you_mean
from skillmerge.naming import expert_of, layer_of, module_kind, unsliced


class ScheduleError(ValueError):
    """A rule that cannot be meant; `rule` is its position in the schedule."""

    def __init__(self, rule: int, message: str, fix: str | None = None) -> None:
        super().__init__(message)
        self.rule, self.fix = rule, fix


@dataclass(frozen=True, slots=True)
class Numbers:
    """Layers or experts first..last, both included; last is None if the range is open (`4-`)."""

    first: int
    last: int | None

    def __str__(self) -> str:
        last = "" if self.last is None else self.last
        return f"{self.first}" if self.last == self.first else f"{self.first}-{last}"

    def __contains__(self, number: object) -> bool:
        return isinstance(number, int) and self.first <= number and (self.last is None or number <= self.last)


def parse_numbers(text: str, what: str = "layers") -> tuple[Numbers, ...]:
    """`7`, `0-3`, `4-` and lists of them, `0-3, 8-11`. Raises ValueError: what is wrong; what to write."""
    ranges = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})?\s*(-)?\s*(\d{1,6})?\s*", part)
        first, dash, last = match.groups() if match else (None, None, None)
        if match is not None and first is None and last is not None:
            raise ValueError(
                f"`{part.strip()}` could be the first {what} or the last; write 0-{last}, or the last one's number"
            )
        if match is None or first is None or (dash is None and last is not None):
            meant = re.fullmatch(r"\s*(\d{1,6})\s*(?:\.\.\.?|:|–|to)\s*(\d{1,6})\s*", part)
            fix = f"did you mean `{meant[1]}-{meant[2]}`?" if meant else "write them like 7, 0-3, 4- or 0-3,8-11"
            raise ValueError(f"`{text}` does not name {what}; {fix}")
        low = int(first)
        high = low if dash is None else int(last) if last is not None else None
        if high is not None and high < low:
            raise ValueError(f"`{part.strip()}` runs backwards; write {high}-{low}")
        ranges.append(Numbers(low, high))
    return tuple(ranges)


def matcher(globs: Iterable[str]) -> re.Pattern[str]:
    """Return one pattern for whole names that any of the globs matches."""
    return re.compile("|".join(translate(glob) for glob in globs))


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule: empty selectors match everything, all that are given must match. A ramp goes over the
    layers selected, by their order, in each stack by itself: its points are evenly spaced from the first layer to the
    last, both included, and it is linear between them."""

    layers: tuple[Numbers, ...] = ()
    tensors: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    experts: tuple[Numbers, ...] = ()
    value: float = 0.0
    ramp: tuple[float, ...] | None = None

    def select(self, names: Iterable[str]) -> list[str]:
        pattern = matcher(self.tensors) if self.tensors else None
        return [
            name
            for name in names
            if (pattern is None or pattern.match(unsliced(name)))
            and (not self.modules or module_kind(name) in self.modules)
            and self._in_layers(name)
            and self._in_experts(name)
        ]

    def covers(self, rule: Rule) -> bool:
        """Return whether it certainly selects every tensor that another rule can select."""
        in_layers = bool(rule.layers) or rule.ramp is not None
        if self.layers:
            if not in_layers or not _contains(self.layers, rule.layers or (Numbers(0, None),)):
                return False
        elif self.ramp is not None and not in_layers:
            return False
        if self.tensors and "*" not in self.tensors and not (rule.tensors and {*rule.tensors} <= {*self.tensors}):
            return False
        if self.experts and not (rule.experts and _contains(self.experts, rule.experts)):
            return False
        return not self.modules or (bool(rule.modules) and {*rule.modules} <= {*self.modules})

    def _in_layers(self, name: str) -> bool:
        if not self.layers and self.ramp is None:
            return True
        layer = layer_of(name)
        return layer is not None and (not self.layers or any(layer[1] in part for part in self.layers))

    def _in_experts(self, name: str) -> bool:
        if not self.experts:
            return True
        expert = expert_of(name)
        return expert is not None and any(expert in part for part in self.experts)


def _contains(outer: Iterable[Numbers], inner: Iterable[Numbers]) -> bool:
    """Return whether all numbers of `inner` are in `outer`."""
    for part in inner:
        at = part.first
        for other in sorted(outer, key=lambda it: it.first):
            if other.first <= at and (other.last is None or other.last >= at):
                if other.last is None or (part.last is not None and other.last >= part.last):
                    break
                at = other.last + 1
        else:
            return False
    return True


@dataclass(frozen=True, slots=True)
class Schedule:
    default: float
    rules: tuple[Rule, ...] = ()

    def resolve(self, names: list[str]) -> dict[str, float]:
        """Return the coefficient of each tensor. Raises ScheduleError for a rule that cannot be meant."""
        values = dict.fromkeys(names, self.default)
        for index, rule in enumerate(self.rules):
            chosen = rule.select(names)
            _check_numbers(index, rule, names)
            if not chosen:
                raise ScheduleError(index, "this rule matches no tensor", _why_nothing(rule, names))
            found = _ramp(rule.ramp, chosen) if rule.ramp else dict.fromkeys(chosen, rule.value)
            if not all(map(math.isfinite, found.values())):
                raise ScheduleError(index, "this ramp's values are not finite: its points are too far apart")
            values.update(found)
        return values


def _ramp(points: tuple[float, ...], names: list[str]) -> dict[str, float]:
    stacks: dict[str, set[int]] = {}
    layers_of = {name: layer_of(name) for name in names}
    for layer in layers_of.values():
        assert layer is not None, "a ramp only selects tensors in layers"
        stacks.setdefault(layer[0], set()).add(layer[1])
    ranks = {
        (stack, index): (rank, len(indices))
        for stack, indices in stacks.items()
        for rank, index in enumerate(sorted(indices))
    }
    values = {}
    for name, layer in layers_of.items():
        assert layer is not None
        rank, count = ranks[layer]
        # Written so that a layer at a point has exactly its value.
        steps = max(count - 1, 1)
        before, between = divmod(rank * (len(points) - 1), steps)
        low = points[before]
        values[name] = low + (points[before + 1] - low) * between / steps if between else low
    return values


def _check_numbers(index: int, rule: Rule, names: list[str]) -> None:
    """A range that ends past the last layer of every stack the rule could mean, or past the last expert, is a slip of
    counting."""
    if not rule.layers and not rule.experts:
        return
    everywhere = Rule(tensors=rule.tensors, modules=rule.modules).select(names)
    layers = [layer[1] for name in everywhere if (layer := layer_of(name)) is not None]
    experts = [expert for name in everywhere if (expert := expert_of(name)) is not None]
    for what, asked_for, found in (("layer", rule.layers, layers), ("expert", rule.experts, experts)):
        last = max(found, default=None)
        for part in asked_for:
            asked = part.first if part.last is None else part.last
            if last is not None and asked > last:
                raise ScheduleError(
                    index,
                    f"{what} {asked} is past the last {what}, which is {last}",
                    f"{what}s are counted from 0: this model has 0-{last}",
                )


_ONE_EXPERT = re.compile(r"experts?\.(\d+)")
_PACKED = re.compile(r"\.experts\.[a-z]")


def near_pattern(glob: str, names: Iterable[str]) -> str | None:
    """Return a suggestion for a glob that matches none of many names: layer numbers make no difference."""
    return did_you_mean(glob, list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", unsliced(name)) for name in names)))


def _why_nothing(rule: Rule, names: list[str]) -> str:
    if rule.experts and all(expert_of(name) is None for name in names):
        return "this model is no mixture of experts: none of its tensors is of a numbered expert"
    if rule.tensors and not Rule(tensors=rule.tensors).select(names):
        number = _ONE_EXPERT.search(rule.tensors[0])
        if number is not None and any(_PACKED.search(name) for name in names):
            return f"this model has its experts packed: write `experts: {number[1]}`"
        near = near_pattern(rule.tensors[0], names)
        return near or f"globs match whole names, such as {unsliced(names[0])}; use * for any part"
    if rule.modules and rule.experts and Rule(modules=rule.modules).select(names):
        return "numbered experts are of the kind `expert`: leave `modules` out, or write a rule for each"
    if rule.modules:
        present = sorted({module_kind(name) for name in names})
        return "this model has modules of the kinds " + ", ".join(present)
    return "the selectors of one rule must all match"
