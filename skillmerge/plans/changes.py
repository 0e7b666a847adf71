"""The differences between two plans, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from skillmerge.checkpoints.kinds.lora.adapter import WEIGHTS
from skillmerge.errors import some
from skillmerge.naming import layer_label, sliced


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return what changed between two plans, in words; nothing if they are the same."""
    changes = [*_inputs(old, new)]
    if old["recipe_sha256"] != new["recipe_sha256"]:
        changes.append("the recipe's text changed")
    for key, before in {**new["output"], **old["output"]}.items():
        after = new["output"].get(key)
        if after != before or key not in old["output"]:
            changes.append(f"output {key}: {old['output'].get(key)} before, {after} now")
    if old["donor"] != new["donor"]:
        changes.append(f"the donor was {old['donor']}, and is {new['donor']} now")
    changes += _tensors(old, new)
    changes += _coefficients(old, new)
    files = [{item["name"]: item for item in plan["side_files"]} for plan in (old, new)]
    other = sorted(name for name in {*files[0], *files[1]} if files[0].get(name) != files[1].get(name))
    if other:
        changes.append(f"other files changed: {some(other)}")
    return changes


def _inputs(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    before, after = ({item["name"]: item for item in plan["inputs"]} for plan in (old, new))
    changes = [f"model {name} is no longer used" for name in before if name not in after]
    for name, item in after.items():
        was = before.get(name)
        if was is None:
            changes.append(f"model {name} is new: {item['uri']}")
            continue
        for key, what in (("uri", "place"), ("revision", "commit")):
            if was[key] != item[key]:
                changes.append(f"model {name}: its {what} was {was[key]}, and is {item[key]} now")
        if any(was.get(key) != item.get(key) for key in ("rename", "unwrapped")):
            changes.append(f"model {name}: its tensors are now read under other names")
        if was.get("stack") != item.get("stack"):
            changes.append(f"model {name}: it is now made of other layers")
        if was.get("layout") != item.get("layout"):
            changes.append(f"model {name}: its tensors are now read in another layout")
        files = [{file["name"]: file for file in each["files"]} for each in (was, item)]
        kept = [{file: (row["size"], row["header_sha256"]) for file, row in each.items()} for each in files]
        other = sorted(file for file in {*kept[0], *kept[1]} if kept[0].get(file) != kept[1].get(file))
        rows = [plan.get("vocabulary", {}).get("models", {}).get(name) for plan in (old, new)]
        if rows[0] != rows[1] and None not in rows:
            changes.append(f"model {name}: other tokens, or tokens with other ids")
        elif other:
            beside = ", or another adapter_config.json" if other[-1].endswith(WEIGHTS) else ""
            changes.append(f"model {name}: other tensors or sizes in {some(other)}{beside}")
        versions = [plan.get("versions", {}).get(name, {}) for plan in (old, new)]
        again = sorted(file for file in versions[1] if versions[0] and versions[0].get(file) != versions[1][file])
        if again and not other:
            changes.append(f"model {name}: rewritten since: {some(again)}")
    return changes


def _tensors(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    before, after = ({item["name"]: item for item in plan["tensors"]} for plan in (old, new))
    changes = []
    for what, names in (
        ("gone", [name for name in before if name not in after]),
        ("new", [name for name in after if name not in before]),
    ):
        if names:
            changes.append(f"{len(names)} tensors are {what}: {some(names, 3)}")
    for key, what in (("action", "what happens to"), ("dtype", "the dtype of"), ("shape", "the shape of")):
        groups: dict[tuple[str, str], list[str]] = {}
        for name in after:
            if name in before and before[name][key] != after[name][key]:
                groups.setdefault((str(before[name][key]), str(after[name][key])), []).append(name)
        for (was, now), names in groups.items():
            changes.append(f"{what} {len(names)} tensors: {was} before, {now} now: {some(names, 3)}")
    return changes


def _coefficients(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Yield changed coefficients by value before and after, with their layers."""
    rows = [
        {
            name: dict(zip(plan["coefficients"], values, strict=False))
            for item in plan["tensors"]
            for name, values in _rows(item)
        }
        for plan in (old, new)
    ]
    groups: dict[tuple[str, Any, Any], dict[str, None]] = {}
    for name in rows[1]:
        if name in rows[0]:
            place = layer_label(name)
            for coefficient in {**rows[0][name], **rows[1][name]}:
                was, now = rows[0][name].get(coefficient), rows[1][name].get(coefficient)
                if was != now:
                    groups.setdefault((coefficient, was, now), {})[place] = None
    return [f"{name}: {_shown(was)} before, {_shown(now)} now, in {some(list(places), 6)}"
            for (name, was, now), places in groups.items()]  # fmt: skip


def _rows(item: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the coefficients of a tensor, or those of each expert in it."""
    for piece in item.get("slices", ()):
        for expert in range(piece["experts"][0], piece["experts"][1] + 1):
            yield sliced(item["name"], expert), piece["coefficients"]
    if not item.get("slices"):
        yield item["name"], item["coefficients"]


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:g}"
