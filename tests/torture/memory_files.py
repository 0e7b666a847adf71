"""A weight file in memory."""

from __future__ import annotations

from collections.abc import Mapping

from skillmerge.checkpoints.safetensors import build_header


def weight_file(shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """A file of zeros."""
    raw, specs = build_header((name, "BF16", shape) for name, shape in shapes.items())
    return raw + bytes(specs[-1].end - len(raw))
