"""Merges whose models and output are in buckets, for tests of them."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from bucket_server import S3Server
from conftest import MODELS, tensor_shapes, write_family, write_recipe

import skillmerge
from skillmerge.outputs.buckets import prefix


def bucket_to_bucket(s3: S3Server, folder: Path, output: str) -> Path:
    """A recipe from a bucket to a bucket, and what it makes as a folder, `direct`."""
    write_family(folder, config={"model_type": "odd"})
    skillmerge.apply(folder / "recipe.yaml", folder / "direct")
    models = {model: s3.put_folder(f"family/{model}", folder / model) for model in MODELS}
    s3.requests.clear()
    return write_recipe(folder, models=models, output={"path": output})


def one_file_in_parts(folder: Path, monkeypatch: pytest.MonkeyPatch, output: str) -> Path:
    """A recipe whose output is one file of 13 MB, sent in three parts, and what it makes as a folder, `direct`."""
    monkeypatch.setattr(prefix, "_WHOLE", 1000)
    monkeypatch.setattr(prefix, "_PART", 5 << 20)
    write_family(folder, tensor_shapes(layers=1, hidden=512, vocabulary=5600), shards=1)
    skillmerge.apply(folder / "recipe.yaml", folder / "direct")
    return write_recipe(folder, output={"path": output})


def another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> Path:
    folder = tmp_path / name
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


def sent(s3: S3Server, prefix: str = "out/merged") -> dict[str, bytes]:
    """What is under a prefix and does not speak of how and where it was made."""
    keys = [key for key in s3.keys(prefix + "/") if "/skillmerge." not in key]
    return {key.removeprefix(prefix + "/"): s3.get(key) for key in keys}


def flip(s3: S3Server, key: str) -> None:
    content = bytearray(s3.get(key))
    content[-1] ^= 1
    s3.put(key, bytes(content))
