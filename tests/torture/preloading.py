"""Builds the libraries that stand in libc's place in a process (LD_PRELOAD)."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


def built(name: str, folder: Path) -> Path:
    """The library of `name`.c, in the folder. Skips the test where it cannot be built."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler to build a library with that is preloaded")
    library, source = folder / f"{name}.so", Path(__file__).with_name(f"{name}.c")
    done = subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        pytest.skip(f"the compiler cannot build a library that is preloaded: {done.stderr[-300:]}")
    return library
