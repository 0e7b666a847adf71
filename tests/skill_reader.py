"""A reader of stored skills, written from docs/files.md alone: numpy and the safetensors library, a loop or two.

Shares no code with the package, and reads whole tensors: an oracle, and an example of how little it takes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from safetensors import safe_open

KINDS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "U8": torch.uint8}
UNIT, BLOCK = 4_194_304, 65_536


def read_skill(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Each tensor's planes, plus and minus."""
    document = json.loads((folder / "skill.json").read_text())
    parts: dict[str, torch.Tensor] = {}
    for file in document["files"]:
        with safe_open(folder / file, framework="pt") as reader:
            parts |= {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118 - not a dict
    for name in [name for name in parts if name.endswith(".zst")]:
        content = parts.pop(name).numpy().tobytes()
        frame = content[8 : 8 + int.from_bytes(content[:8], "little")]
        plain = bytearray(zstandard.ZstdDecompressor().decompress(frame))
        row = document["tensors"][name.split("@")[0]]
        dtype = row["dtype" if ".plus." in name else "minus_dtype"] if ".values" in name else "U8"
        parts[name.removesuffix(".zst")] = torch.frombuffer(plain, dtype=KINDS[dtype])
    return {
        name: (_plane(name, "plus", row["dtype"], row, parts), _plane(name, "minus", row["minus_dtype"], row, parts))
        for name, row in document["tensors"].items()
    }


def _plane(name: str, plane: str, dtype: str, row: dict[str, Any], parts: dict[str, torch.Tensor]) -> torch.Tensor:
    kind = KINDS[dtype]
    count = int(np.prod(row["shape"], dtype=np.int64))
    result = torch.zeros(count, dtype=kind)
    for unit, start in enumerate(range(0, count, UNIT)):
        length = min(UNIT, count - start)
        found = {
            part: parts[key]
            for part in ("values", "starts", "mask", "gaps")
            if (key := f"{name}@{unit}.{plane}.{part}") in parts
        }
        encoding = row["encoding"][plane][unit] if row["encoding"][plane] else "zero"
        if encoding == "zero":
            assert found == {}
        elif encoding == "dense":
            result[start : start + length] = found["values"][:length]
        else:
            places = _bitmap(found, length) if encoding == "bitmap" else _gaps(found, length)
            result[start + torch.from_numpy(places)] = found["values"][: len(places)]
    return result.reshape(row["shape"])


def _bitmap(found: dict[str, torch.Tensor], length: int) -> np.ndarray[Any, Any]:
    bits = np.unpackbits(found["mask"].numpy(), bitorder="little")[:length]
    places = bits.nonzero()[0]
    starts = found["starts"].numpy()
    for block in range(-(-length // BLOCK)):
        assert starts[block] == (places < block * BLOCK).sum()
    return places


def _gaps(found: dict[str, torch.Tensor], length: int) -> np.ndarray[Any, Any]:
    codes = found["gaps"].numpy()
    values, bytes_before = found["starts"].numpy()
    places = []
    for block in range(-(-length // BLOCK)):
        position = block * BLOCK
        assert values[block] == len(places)
        for code in codes[bytes_before[block] : bytes_before[block + 1]]:
            position += int(code)
            if code < 255:
                places.append(position)
                position += 1
    return np.array(places, dtype=np.int64)
