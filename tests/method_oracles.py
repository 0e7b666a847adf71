"""The merge methods in numpy and float64, straight from their formulas; shares no code with the package.

Each takes the operands of one matrix, as arrays of any shape, and returns the result, unrounded. Iterations go over
whole vectors, where the package works on their dot products.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import numpy as np

Array = np.ndarray
Lots = Callable[[int], Array]
"""How many elements -> a number in [0, 1) for each."""


def by_matrix(function: Callable[..., Array], operands: Sequence[Array], **keywords: object) -> Array:
    """Each matrix of a tensor by itself."""
    shape = operands[0].shape
    if len(shape) <= 2:
        return function(*operands, **keywords)
    flat = [operand.reshape(-1, *shape[-2:]) for operand in operands]
    return np.stack([function(*(part[i] for part in flat), **keywords) for i in range(len(flat[0]))]).reshape(shape)


# ------------------------------------------------------------------------------------------------------------ lots


def key(seed: int, tensor: str, ordinal: int) -> int:
    text = f"skillmerge drop\0{seed}\0{tensor}\0{ordinal}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def lots(key: int, count: int) -> Array:
    """SplitMix64 of the key, and the upper 53 bits of each number as a share of 2^53."""
    with np.errstate(over="ignore"):
        z = np.uint64(key) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) / 2.0**53


# ------------------------------------------------------------------------------------------------------ sparsifiers


def sizes(v: Array) -> Array:
    return np.abs(v).astype(np.float32)


def rescaled(v: Array, kept: Array, rescale: str) -> Array:
    order = {"l1": 1, "l2": 2}.get(rescale)
    if order is None:
        return kept
    whole, left = (np.linalg.norm(x.ravel(), order) for x in (v, kept))
    return kept * (whole / left) if whole and left else kept


def trim(v: Array, *, density: float, rescale: str = "none") -> Array:
    if density == 0:
        return v * 0
    k = max(1, math.floor(density * v.size))
    least = np.sort(sizes(v).ravel())[v.size - k]
    return rescaled(v, np.where(sizes(v) >= least, v, 0), rescale)


def drop(v: Array, *, density: float, draw: Array, rescale: str = "probability") -> Array:
    kept = np.where(draw.reshape(v.shape) < density, v, 0)
    return kept / density if rescale == "probability" else rescaled(v, kept, rescale)


def drop_spread(v: Array, *, density: float, spread: float, draw: Array, rescale: str = "probability") -> Array:
    """DELLA: the probability rises with the rank in the row."""
    rows = np.abs(v).reshape(-1, v.shape[-1] if v.ndim else 1)
    places = [[np.searchsorted(np.sort(row), row, side) for side in ("left", "right")] for row in rows]
    ranks = np.array([(first + last - 1) / 2 for first, last in places])  # from 0; sizes that tie share the mean
    p = density - spread + 2 * spread * ranks / max(1, rows.shape[1] - 1)
    p = (p if rows.shape[1] > 1 else np.full(rows.shape, density)).reshape(v.shape)
    kept = np.where(draw.reshape(v.shape) < p, v, 0)
    return kept / p if rescale == "probability" else rescaled(v, kept, rescale)


def band(v: Array, *, density: float, gamma: float = 0.01, rescale: str = "none") -> Array:
    stay = max(1, math.floor(density * v.size))
    below = max(0, v.size - stay - math.floor(gamma * v.size))
    ordered = np.sort(sizes(v).ravel())
    kept = (sizes(v) >= ordered[below]) & (sizes(v) <= ordered[below + stay - 1])
    return rescaled(v, np.where(kept, v, 0), rescale)


def clip(v: Array, *, at: float) -> Array:
    return np.sign(v) * np.minimum(np.abs(v), at)


def match(v: Array, u: Array) -> Array:
    own = np.linalg.norm(v.ravel())
    return v * (np.linalg.norm(u.ravel()) / own) if own else v


def project(v: Array, u: Array) -> Array:
    whole = np.vdot(u, u)
    return v - np.vdot(v, u) / whole * u if whole else v


# -------------------------------------------------------------------------------------------------------- combiners


def elect(
    *v: Array, weights: Sequence[float] | float = 1.0, normalize: str = "yes", pick: str = "mean", zero: str = "plus"
) -> Array:
    w = np.broadcast_to(np.asarray(weights, dtype=np.float64), (len(v),))
    x = np.stack([weight * part for weight, part in zip(w, v, strict=True)])
    total = x.sum(0)
    sign = np.where(total >= 0, 1.0, -1.0)
    if zero == "majority":
        most = 1.0 if np.sign(total).sum() >= 0 else -1.0
        sign = np.where(total == 0, most, sign)
    agree = np.sign(x) == sign
    if pick == "max":
        return sign * np.where(agree, np.abs(x), 0).max(0)
    summed = np.where(agree, x, 0).sum(0)
    if normalize == "no":
        return summed
    share = (agree * w.reshape(-1, *[1] * total.ndim)).sum(0)
    if any(weight * 8 % 1 for weight in w):  # x is rounded, so that its sum may have either sign
        summed = np.where(np.abs(total) <= 2.0**-20 * np.abs(x).sum(0), np.nan, summed)
    return summed / np.where(share == 0, 1, share)


def ties(*v: Array, density: float, rescale: str = "none", **keywords: object) -> Array:
    return elect(*(trim(part, density=density, rescale=rescale) for part in v), **keywords)  # type: ignore[arg-type]


def pick(*v: Array) -> Array:
    result = v[0]
    for other in v[1:]:
        result = np.where(np.abs(other) > np.abs(result), other, result)
    return result


def ram(*v: Array, threshold: float = 0.0, boost: float = 0.0, cap: float = 1.0) -> Array:
    changed = np.stack([np.abs(part) > threshold for part in v])
    times = changed.sum(0)
    alone, shared = changed & (times == 1), changed & (times > 1)
    result = np.where(changed, np.stack(v), 0).sum(0) / np.maximum(times, 1)
    for index, part in enumerate(v):
        own = alone[index].sum()
        ratio = min(shared[index].sum() / own, cap) if own else cap
        result = np.where(alone[index], part * (1 + boost * ratio), result)
    return result


def cosine(a: Array, b: Array) -> float:
    one, other = np.linalg.norm(a.ravel()), np.linalg.norm(b.ravel())
    return float(np.vdot(a / one, b / other)) if one and other else 0.0


def by_row(function: Callable[..., Array], *operands: Array, **keywords: object) -> Array:
    """Each row of a matrix by itself."""
    rows = [operand.reshape(-1, operand.shape[-1] if operand.ndim else 1) for operand in operands]
    return np.stack([function(*parts, **keywords) for parts in zip(*rows, strict=True)]).reshape(operands[0].shape)


def model_stock(*v: Array, negative: str = "zero", scope: str = "matrix") -> Array:
    if scope == "row":
        return by_row(model_stock, *v, negative=negative)
    count = len(v)
    c = np.mean([cosine(v[i], v[j]) for i in range(count) for j in range(i)])
    c = min(c, 1.0) if negative == "keep" else min(max(c, 0.0), 1.0)
    below = 1 + (count - 1) * c
    return (count * c / below if below > 1e-9 else 0.0) * np.mean(v, axis=0)


def sce(*v: Array, select: float = 1.0, floor: float = 0.0) -> Array:
    parts = np.stack(v)
    if select < 1:
        spread = parts.var(0)
        count = math.floor(select * np.count_nonzero(spread))
        least = np.sort(spread.astype(np.float32).ravel())[spread.size - count] if count else np.inf
        parts = np.where(spread.astype(np.float32) >= least if least else spread > 0, parts, 0)
    energy = np.array([np.mean(part * part) for part in parts])
    even = energy.sum() == 0 or energy.sum() < floor
    weights = np.full(len(v), 1 / len(v)) if even else energy / energy.sum()
    sign = np.where(parts.sum(0) >= 0, 1.0, -1.0)
    agree = np.sign(parts) == sign
    wide = weights.reshape(-1, *[1] * (parts.ndim - 1))
    share = (agree * wide).sum(0)
    return np.where(agree, parts * wide, 0).sum(0) / np.where(share == 0, 1, share)


# -------------------------------------------------------------------------------------------------------- spherical


def slerp(a: Array, b: Array, *, t: float, linear_above: float = 0.9995, scope: str = "matrix") -> Array:
    if scope == "row":
        return by_row(slerp, a, b, t=t, linear_above=linear_above)
    c = cosine(a, b)
    if not a.any() or not b.any() or abs(c) > min(linear_above, 1 - 1e-12):
        return a - t * (a - b)
    angle = math.acos(c)
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def unit(x: Array) -> Array:
    norm = np.linalg.norm(x.ravel())
    return x / norm if norm else x


def multislerp(*x: Array, weights: Sequence[float] | float = 1.0) -> Array:
    w = np.broadcast_to(np.asarray(weights, dtype=np.float64), (len(x),))
    w = w / w.sum()
    mean = sum(weight * unit(part) for weight, part in zip(w, x, strict=True))
    if np.linalg.norm(mean.ravel()) < 1e-7:
        return sum(weight * part for weight, part in zip(w, x, strict=True))
    m = unit(mean)
    tangent = sum(weight * (unit(part) - np.vdot(unit(part), m) * m) for weight, part in zip(w, x, strict=True))
    length = np.linalg.norm(tangent.ravel())
    size = sum(weight * np.linalg.norm(part.ravel()) for weight, part in zip(w, x, strict=True))
    return (m * math.cos(length) + tangent * np.sinc(length / math.pi)) * size


def karcher(*x: Array, steps: int = 10, tolerance: float = 1e-5) -> Array:
    norms = [np.linalg.norm(part.ravel()) for part in x]
    units = [unit(part) for part, norm in zip(x, norms, strict=True) if norm]
    if not units:
        return x[0]
    mean = np.mean(units, axis=0)
    m = unit(mean) if np.linalg.norm(mean.ravel()) > 1e-7 else units[0]
    for _ in range(steps):
        logs = []
        for u in units:
            across = u - np.vdot(u, m) * m
            length = np.linalg.norm(across.ravel())
            logs.append(across * (math.atan2(length, np.vdot(u, m)) / length) if length > 1e-7 else across * 0)
        tangent = np.mean(logs, axis=0)
        length = np.linalg.norm(tangent.ravel())
        if length < tolerance or length == 0:
            break
        m = m * math.cos(length) + tangent * (math.sin(length) / length)
    return m * np.mean(norms)


def median(*x: Array) -> Array:
    return np.median(np.stack(x), axis=0)
