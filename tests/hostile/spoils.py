"""Ways to spoil a good family of checkpoints: its indexes, headers, files, links, configs, tensors, recipe."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from conftest import read_checkpoint, write_checkpoint
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
LONG_NAME = "a" * 900
NOT_TEXT = os.fsdecode(b"\xff")
BF16, I32, I64 = torch.bfloat16, torch.int32, torch.int64
CONFIG = {"model_type": "llama", "vocab_size": 32, "num_hidden_layers": 3}

Spoil = Callable[[Path], object]


@dataclass(frozen=True)
class Hostile:
    """`spoil` is given the folder that holds the models target, rl and sft and their recipe.yaml."""

    status: int
    name: str
    phrase: str
    spoil: Spoil
    options: Mapping[str, Any] = field(default_factory=dict)


def cases(status: int, rows: list[tuple[Any, ...]]) -> list[Hostile]:
    """Rows of name, phrase, spoil and options of apply."""
    return [Hostile(status, *row) for row in rows]


# What somebody can do to a family.


def all_of(*spoils: Spoil) -> Spoil:
    return lambda folder: [spoil(folder) for spoil in spoils]


def index_is(text: str | bytes) -> Spoil:
    content = text if isinstance(text, bytes) else text.encode()
    return lambda folder: (folder / "target" / INDEX).write_bytes(content)


def index_edited(edit: Callable[[dict[str, Any]], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / "target" / INDEX
        document = json.loads(path.read_text())
        edit(document["weight_map"])
        path.write_text(json.dumps(document))

    return spoil


def index_places(file: Any) -> Spoil:
    """The index says that the first tensor is in `file`."""
    return index_edited(lambda weight_map: weight_map.update({EMBEDDING: file}))


def single_file(content: bytes) -> Spoil:
    """The target is one file with this content."""

    def spoil(folder: Path) -> None:
        shutil.rmtree(folder / "target")
        (folder / "target").mkdir()
        (folder / "target" / "model.safetensors").write_bytes(content)

    return spoil


def header(text: str | bytes, data: bytes = b"", size: int | None = None) -> Spoil:
    """The target is one file with this header (which claims `size` bytes) and this data."""
    content = text if isinstance(text, bytes) else text.encode()
    return single_file((len(content) if size is None else size).to_bytes(8, "little") + content + data)


def info(dtype: Any = "U8", shape: Any = (1,), offsets: Any = (0, 1)) -> str:
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": offsets})


def tensor(dtype: Any = "U8", shape: Any = (1,), offsets: Any = (0, 1), data: bytes = b"x") -> Spoil:
    """The target is one file with one tensor, described like this."""
    return header(f'{{"a":{info(dtype, shape, offsets)}}}', data)


def file_edited(name: str, edit: Callable[[bytes], bytes]) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / name
        path.write_bytes(edit(path.read_bytes()))

    return spoil


def file_is(name: str, content: str | bytes) -> Spoil:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(data)


def removed(*names: str) -> Spoil:
    def spoil(folder: Path) -> None:
        for name in names:
            path = folder / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    return spoil


def moved(old: str, new: str) -> Spoil:
    return lambda folder: (folder / old).rename(folder / new)


def made_folder(name: str) -> Spoil:
    return all_of(lambda folder: (folder / name).unlink(missing_ok=True), lambda folder: (folder / name).mkdir())


def made_fifo(name: str) -> Spoil:
    return all_of(lambda folder: (folder / name).unlink(missing_ok=True), lambda folder: os.mkfifo(folder / name))


def linked(name: str, to: str) -> Spoil:
    """`name` becomes a link; `to` may use {folder}."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(to.format(folder=folder))

    return spoil


def moved_and_linked(name: str, to: str) -> Spoil:
    """A file moved to `to` and replaced by a link to it."""

    def spoil(folder: Path) -> None:
        (folder / to).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).rename(folder / to)
        (folder / name).symlink_to(folder / to)

    return spoil


def config_is(text: str | bytes) -> Spoil:
    return file_is("target/config.json", text)


def config_has(model: str = "target", **keys: Any) -> Spoil:
    return file_is(f"{model}/config.json", json.dumps({**CONFIG, **keys}))


def tensors_edited(edit: Callable[[dict[str, torch.Tensor]], object], *models: str) -> Spoil:
    """These models (all three, if none are named) are written anew with other tensors."""

    def spoil(folder: Path) -> None:
        for model in models or ("target", "rl", "sft"):
            tensors = read_checkpoint(folder / model)
            edit(tensors)
            shutil.rmtree(folder / model)
            write_checkpoint(folder / model, tensors, shards=2, config=CONFIG)

    return spoil


def with_tensor(name: str, value: torch.Tensor, *models: str) -> Spoil:
    return tensors_edited(lambda tensors: tensors.update({name: value}), *models)


def without_tensor(name: str, *models: str) -> Spoil:
    return tensors_edited(lambda tensors: tensors.pop(name), *models)


def recipe_is(text: str | bytes) -> Spoil:
    return file_is("recipe.yaml", text)


def recipe_has(**keys: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / "recipe.yaml"
        path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))

    return spoil


def merge(expression: str, **coefficients: Any) -> Spoil:
    return recipe_has(merge=expression, coefficients=coefficients or {"lam": 0.7})


def models(**places: str) -> Spoil:
    return recipe_has(models={"target": "target", "rl": "rl", "sft": "sft", **places})


def output(path: str, **keys: Any) -> Spoil:
    """The output goes to `path`, which may use {folder}."""
    return lambda folder: recipe_has(output={"path": path.format(folder=folder), **keys})(folder)


def copy_rule(glob: Any) -> Spoil:
    return recipe_has(copy=[{"tensors": glob, "from": "target"}])


def terabytes(folder: Path) -> None:
    """All three models hold one tensor of 2 TB, in files that are all hole."""
    text = info("BF16", [1 << 20, 1 << 20], [0, 1 << 41])
    for model in ("target", "rl", "sft"):
        content = f'{{"{HEAD}":{text}}}'.encode()
        shutil.rmtree(folder / model)
        (folder / model).mkdir()
        path = folder / model / "model.safetensors"
        path.write_bytes(len(content).to_bytes(8, "little") + content)
        os.truncate(path, 8 + len(content) + (1 << 41))


def adapter(folder: Path) -> None:
    shutil.rmtree(folder / "target")
    (folder / "target").mkdir()
    save_file({"lora_A.weight": torch.zeros(2, 2)}, folder / "target" / "adapter_model.safetensors")
    (folder / "target" / "adapter_config.json").write_text('{"peft_type": "LORA"}')


def pickles(folder: Path) -> None:
    shutil.rmtree(folder / "target")
    (folder / "target").mkdir()
    (folder / "target" / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch executed'\ntR.")


def doubled_tensor(folder: Path) -> None:
    """A tensor stands in both shards; the index names one of them."""
    second = load_file(folder / "target" / SECOND)
    first = load_file(folder / "target" / FIRST)
    save_file({**second, EMBEDDING: first[EMBEDDING]}, folder / "target" / SECOND)


def cut_short(count: int) -> Callable[[bytes], bytes]:
    return lambda content: content[:-count]


def nested_expression() -> str:
    """Long chains at the left end of one another, each in parentheses: deep, but never more than 50 of those."""
    text = "rl"
    for _ in range(24):
        text = f"sft-({text}{'+0*t' * 95})"
    return f"t-({text})"


def laughs() -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    return "\n".join(lines)
