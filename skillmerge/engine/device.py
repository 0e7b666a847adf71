"""The choice of the device that computes a merge."""

from __future__ import annotations

import torch

from skillmerge.errors import UsageError


def choose_device(asked: str) -> tuple[torch.device, str]:
    """Return the device for `auto`, `cpu`, `cuda` or `cuda:N`, and why. Raises UsageError if it is not there."""
    if asked == "cpu":
        return torch.device("cpu"), "as requested"
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked == "auto":
        if found == 0:
            return torch.device("cpu"), "no CUDA device was found"
        return torch.device("cuda", 0), f"{torch.cuda.get_device_name(0)} was found"
    number = int(asked.removeprefix("cuda").removeprefix(":") or 0)
    if number >= found:
        raise UsageError(
            f"--device {asked}: this machine has {found} CUDA devices that torch can use",
            fix="pass `--device cpu` or `--device auto`",
        )
    return torch.device("cuda", number), "as requested"
