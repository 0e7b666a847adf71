"""Hostile and broken inputs: each a clear error with the right exit status, quickly, and nothing written.

One line per case: what somebody did to a good family of checkpoints (or to its recipe), the exit status, and
words that the message must hold. What is refused from headers and text alone leaves no trace on the disk;
what only the weights can show leaves no output and never stands in the way of the cure.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import read_checkpoint, run_cli, tensor_shapes, write_checkpoint, write_family
from safetensors.torch import load_file, save_file

import skillmerge
from skillmerge.errors import SkillmergeError
from skillmerge.merge import Reporter

CPU_SECONDS = 2.0
"""The promise. In CPU time, so that a busy machine does not fail it; what hangs runs into the timeout."""
pytestmark = pytest.mark.timeout(30)

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
LONG_NAME = "a" * 900
CONFIG = {"model_type": "llama", "vocab_size": 32, "num_hidden_layers": 3}

Spoil = Callable[[Path], object]


@dataclass(frozen=True)
class Hostile:
    """`spoil` is given the folder that holds the models target, rl and sft and their recipe.yaml."""

    name: str
    status: int
    phrase: str
    spoil: Spoil
    options: Mapping[str, Any] = field(default_factory=dict)


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


def output(path: str) -> Spoil:
    """The output goes to `path`, which may use {folder}."""
    return lambda folder: recipe_has(output={"path": path.format(folder=folder)})(folder)


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


INDEXES = [
    Hostile("index: a file in the parent folder", 4, "in the same folder", index_places("../x.safetensors")),
    Hostile("index: an absolute name", 4, "in the same folder", index_places("/etc/x.safetensors")),
    Hostile("index: a file in a subfolder", 4, "in the same folder", index_places("a/b.safetensors")),
    Hostile("index: a backslash", 4, "in the same folder", index_places("..\\x.safetensors")),
    Hostile("index: an empty name", 4, "in the same folder", index_places("")),
    Hostile("index: nothing but the ending", 4, "in the same folder", index_places(".safetensors")),
    Hostile("index: a pickle", 4, "in the same folder", index_places("pytorch_model.bin")),
    Hostile("index: a NUL in a name", 4, "in the same folder", index_places("x\0.safetensors")),
    Hostile("index: a line break in a name", 4, "in the same folder", index_places("x\n.safetensors")),
    Hostile("index: half a character in a name", 4, "in the same folder", index_places("\ud800.safetensors")),
    Hostile("index: a number for a name", 4, "in the same folder", index_places(7)),
    Hostile("index: null for a name", 4, "in the same folder", index_places(None)),
    Hostile("index: a list of names", 4, "in the same folder", index_places([FIRST])),
    Hostile("index: a name of a million characters", 4, "is missing", index_places("a" * 10**6 + ".safetensors")),
    Hostile("index: a file that is not there", 4, "is missing", index_places("other.safetensors")),
    Hostile("index: tensor in the wrong shard", 4, "that their shards lack", index_places(SECOND)),
    Hostile(
        "index: tensor that no shard has", 4, "that their shards lack", index_edited(lambda m: m.update(new=FIRST))
    ),
    Hostile("index: tensor left out", 4, "does not name", index_edited(lambda m: m.pop(EMBEDDING))),
    Hostile(
        "index: terminal escapes in a tensor's name",
        4,
        "no file can hold",
        index_edited(lambda m: m.update({"\x1b[2Jgone": FIRST})),
    ),
    Hostile(
        "index: half a character in a tensor's name",
        4,
        "no file can hold",
        index_edited(lambda m: m.update({"\udfff": FIRST})),
    ),
    Hostile("index: empty weight map", 4, "has no `weight_map`", index_edited(lambda m: m.clear())),
    Hostile("index: no weight map", 4, "has no `weight_map`", index_is("{}")),
    Hostile("index: weight map is a list", 4, "has no `weight_map`", index_is('{"weight_map": ["a"]}')),
    Hostile("index: a list", 4, "is not a JSON object", index_is("[]")),
    Hostile("index: empty file", 4, "is not valid JSON", index_is("")),
    Hostile("index: cut short", 4, "is not valid JSON", file_edited(f"target/{INDEX}", cut_short(30))),
    Hostile("index: not UTF-8", 4, "is not valid JSON", index_is(b'{"weight_map": {"\xff": "a.safetensors"}}')),
    Hostile("index: UTF-16", 4, "is not valid JSON", index_is('{"weight_map": {}}'.encode("utf-16"))),
    Hostile(
        "index: duplicate key",
        4,
        "stands twice",
        index_is(f'{{"weight_map": {{"{EMBEDDING}": "{FIRST}", "{EMBEDDING}": "{SECOND}"}}}}'),
    ),
    Hostile("index: deep nesting", 4, "nested too deeply", index_is('{"weight_map": ' + "[" * 100_000)),
    Hostile("index: a folder", 4, "is not a file", made_folder(f"target/{INDEX}")),
    Hostile("index: a pipe", 4, "is not a file", made_fifo(f"target/{INDEX}")),
    Hostile("index: larger than any index", 4, "of sane size", lambda f: os.truncate(f / "target" / INDEX, 1 << 40)),
]

HEADERS = [
    Hostile("header: empty file", 4, "is 0 bytes long", single_file(b"")),
    Hostile("header: seven bytes", 4, "is 7 bytes long", single_file(b"\x01\0\0\0\0\0\0")),
    Hostile("header: size 0", 4, "does not start with `{`", header("{}", size=0)),
    Hostile("header: size 2^63", 4, "claims a header of 9223372036854775808", header("{}", size=1 << 63)),
    Hostile("header: size 2^64 - 1", 4, "claims a header of 18446744073709551615", header("{}", size=(1 << 64) - 1)),
    Hostile("header: one byte more than the file", 4, "claims a header of 3 bytes", header("{}", size=3)),
    Hostile(
        "header: larger than the bound, in a file that is larger still",
        4,
        "the largest accepted",
        all_of(header("{}", size=1 << 30), lambda f: os.truncate(f / "target" / "model.safetensors", 1 << 40)),
    ),
    Hostile("header: not JSON", 4, "not strict JSON", header("{nonsense}")),
    Hostile("header: a list", 4, "does not start with `{`", header("[]")),
    Hostile("header: a space first", 4, "does not start with `{`", header(" {}")),
    Hostile("header: nothing but NULs", 4, "does not start with `{`", header(bytes(64))),
    Hostile("header: cut off", 4, "not strict JSON", header('{"a":{"dtype":"U8","shape":[1],"data_offs')),
    Hostile("header: two documents", 4, "not strict JSON", header("{}{}")),
    Hostile("header: padded with NULs", 4, "not strict JSON", header(f'{{"a":{info()}}}\0\0', b"x")),
    Hostile("header: single quotes", 4, "not strict JSON", header("{'a':1}")),
    Hostile("header: not UTF-8", 4, "not strict JSON", header(b'{"\xff":' + info().encode() + b"}", b"x")),
    Hostile("header: UTF-16", 4, "does not start with `{`", header(f'{{"a":{info()}}}'.encode("utf-16"), b"x")),
    Hostile("header: NaN", 4, "NaN is not JSON", tensor(shape=[float("nan")])),
    Hostile("header: Infinity", 4, "Infinity is not JSON", tensor(offsets=[0, float("inf")])),
    Hostile("header: deep nesting", 4, "nested too deeply", header('{"a":' * 100_000)),
    Hostile("header: deep lists", 4, "nested too deeply", header('{"a":' + "[" * 100_000 + "]" * 100_000 + "}")),
    Hostile("header: duplicate tensor", 4, "stands twice", header(f'{{"a":{info()},"a":{info()}}}', b"x")),
    Hostile(
        "header: duplicate key in a tensor",
        4,
        "stands twice",
        header('{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"),
    ),
    Hostile("header: empty tensor name", 4, "whose name is empty", header(f'{{"":{info()}}}', b"x")),
    Hostile("header: NUL in a name", 4, "control characters", header(f'{{"a\\u0000":{info()}}}', b"x")),
    Hostile("header: terminal escape in a name", 4, "control characters", header(f'{{"\\u001b[2J":{info()}}}', b"x")),
    Hostile("header: one-byte escape in a name", 4, "control characters", header(f'{{"\\u009b2J":{info()}}}', b"x")),
    Hostile("header: text turned round in a name", 4, "control characters", header(f'{{"a\u202e":{info()}}}', b"x")),
    Hostile("header: half a character in a name", 4, "control characters", header(f'{{"\\ud800":{info()}}}', b"x")),
    Hostile("header: endless name", 4, "too long", header(f'{{"{"n" * 10**6}":{info()}}}', b"x")),
    Hostile("header: unknown dtype", 4, "unknown dtype 'X9'", tensor(dtype="X9")),
    Hostile("header: dtype in small letters", 4, "unknown dtype 'f32'", tensor("f32", [1], [0, 4], b"1234")),
    Hostile("header: dtype is a list", 4, "unknown dtype", tensor(dtype=["U8"])),
    Hostile("header: dtype is a long text", 4, "unknown dtype", tensor(dtype="F" * 10**6)),
    Hostile("header: no shape", 4, "must have exactly the keys", header('{"a":{"dtype":"U8","data_offsets":[0,1]}}', b"x")),
    Hostile("header: one key too many", 4, "must have exactly the keys", header(f'{{"a":{info()[:-1]},"x":1}}}}', b"x")),
    Hostile("header: tensor is a list", 4, "must have exactly the keys", header('{"a":[1]}')),
    Hostile("header: tensor is null", 4, "must have exactly the keys", header('{"a":null}')),
    Hostile("header: shape is a number", 4, "not natural numbers", tensor(shape=1)),
    Hostile("header: negative size", 4, "not a natural number", tensor(shape=[-1])),
    Hostile("header: minus zero", 4, "not a natural number", header('{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}')),
    Hostile("header: size is a fraction", 4, "not natural numbers", tensor(shape=[1.0])),
    Hostile("header: size is true", 4, "not natural numbers", tensor(shape=[True])),
    Hostile("header: size is text", 4, "not natural numbers", tensor(shape=["1"])),
    Hostile("header: size of 5000 digits", 4, "not a natural number", header('{"a":{"dtype":"U8","shape":[' + "9" * 5000 + '],"data_offsets":[0,1]}}', b"x")),
    Hostile("header: offsets are negative", 4, "not a natural number", tensor(offsets=[-1, 0])),
    Hostile("header: offsets are fractions", 4, "not natural numbers", tensor(offsets=[0.0, 1.0])),
    Hostile("header: offset is true", 4, "not natural numbers", tensor(offsets=[0, True])),
    Hostile("header: one offset", 4, "not natural numbers", tensor(offsets=[1])),
    Hostile("header: three offsets", 4, "not natural numbers", tensor(offsets=[0, 1, 2])),
    Hostile("header: end before start", 4, "does not fill", tensor(offsets=[1, 0])),
    Hostile("header: shape smaller than its bytes", 4, "does not fill", tensor("U8", [1], [0, 2], b"xx")),
    Hostile("header: shape larger than its bytes", 4, "does not fill", tensor("F32", [2], [0, 4], b"1234")),
    Hostile("header: half a byte", 4, "does not fill", tensor("F4", [3], [0, 1])),
    Hostile("header: shape that overflows 64 bits", 4, "overflows", tensor(shape=[1 << 32, 1 << 32], offsets=[0, 0])),
    Hostile("header: shape that overflows before a 0", 4, "overflows", tensor(shape=[1 << 62, 1 << 62, 0], offsets=[0, 0], data=b"")),
    Hostile("header: size of 64 bits after a 0", 4, "not natural numbers", tensor(shape=[0, 1 << 64], offsets=[0, 0], data=b"")),
    Hostile("header: a hundred dimensions", 4, "100 dimensions", tensor(shape=[1] * 100)),
    Hostile("header: a million dimensions", 4, "1000000 dimensions", tensor(shape=[1] * 10**6)),
    Hostile("header: end past the file", 4, "is cut short", tensor(shape=[9], offsets=[0, 9])),
    Hostile("header: data far past the file", 4, "is cut short", tensor(shape=[1 << 40], offsets=[0, 1 << 40])),
    Hostile("header: trailing bytes", 4, "bytes after its last tensor", tensor(data=b"xy")),
    Hostile("header: hole at the start", 4, "leaves a hole", tensor(offsets=[1, 2], data=b"xx")),
    Hostile("header: hole between", 4, "leaves a hole", header(f'{{"a":{info()},"b":{info(offsets=[2, 3])}}}', b"xxx")),
    Hostile("header: overlap", 4, "overlaps", header(f'{{"a":{info(shape=[2], offsets=[0, 2])},"b":{info(shape=[2], offsets=[1, 3])}}}', b"xxx")),
    Hostile("header: two tensors in the same bytes", 4, "overlaps", header(f'{{"a":{info()},"b":{info()}}}', b"x")),
    Hostile("header: metadata is a list", 4, "not a table of strings", header(f'{{"__metadata__":[],"a":{info()}}}', b"x")),
    Hostile("header: metadata of numbers", 4, "not a table of strings", header(f'{{"__metadata__":{{"x":1}},"a":{info()}}}', b"x")),
    Hostile("header: half a character in metadata", 4, "not a table of strings", header(f'{{"__metadata__":{{"x":"\\ud800"}},"a":{info()}}}', b"x")),
    Hostile("header: no tensors", 4, "holds no tensors", header("{}")),
    Hostile("header: a bomb of empty lists", 4, "must have exactly the keys", header('{"a":[' + "[]," * 4_000_000 + "[]]}")),
    Hostile("header: a bomb of keys", 4, "must have exactly the keys", header("{" + ",".join(f'"{n}":0' for n in range(1_000_000)) + "}")),
]  # fmt: skip

FILES = [
    Hostile("shard: cut short", 4, "is cut short", file_edited(f"target/{SECOND}", cut_short(1))),
    Hostile("shard: grown", 4, "bytes after its last tensor", file_edited(f"rl/{FIRST}", lambda content: content + b"\0")),
    Hostile("shard: a text of the fetcher", 4, "claims a header", file_is(f"sft/{FIRST}", "version https://git-lfs.github.com/spec/v1\n")),
    Hostile("shard: missing", 4, "is missing", removed(f"target/{SECOND}")),
    Hostile("shard: a folder", 4, "is not a regular file", made_folder(f"target/{FIRST}")),
    Hostile("shard: a pipe", 4, "is not a regular file", made_fifo(f"target/{FIRST}")),
    Hostile("shard: a device", 4, "is not a regular file", linked(f"target/{FIRST}", "/dev/zero"), {"follow_links": True}),
    Hostile("shard: tensor in two shards", 4, f"tensor `{EMBEDDING}` is in both", doubled_tensor),
    Hostile("single file: a folder", 4, "is not a regular file", all_of(removed(f"target/{INDEX}", f"target/{FIRST}", f"target/{SECOND}"), made_folder("target/model.safetensors"))),
    Hostile("single file: a pipe", 4, "is not a regular file", all_of(single_file(b""), made_fifo("target/model.safetensors"))),
    Hostile("single file: bytes in its name", 4, "not a name that a weight file can have", all_of(single_file(b""), lambda f: os.rename(f / "target/model.safetensors", os.fsencode(f) + b"/target/\xff.safetensors"))),
    Hostile("folder: shards without an index", 4, "but no model.safetensors.index.json", removed(f"target/{INDEX}")),
    Hostile("folder: single file and index", 4, "has both", lambda f: shutil.copy(f / "target" / FIRST, f / "target" / "model.safetensors")),
    Hostile("folder: only pickles", 4, "pickles can run code", pickles),
    Hostile("folder: a PEFT adapter", 4, "is a PEFT adapter", adapter),
    Hostile("folder: a PEFT adapter of pickles", 4, "is a PEFT adapter", all_of(adapter, moved("target/adapter_model.safetensors", "target/adapter_model.bin"))),
    Hostile("folder: empty", 4, "has no *.safetensors", all_of(removed("target"), made_folder("target"))),
    Hostile("folder: the model is one below", 4, "did you mean one of its folders: deeper", all_of(moved("target", "deeper"), made_folder("target"), moved("deeper", "target/deeper"))),
    Hostile("folder: missing", 4, "does not exist", removed("sft")),
    Hostile("folder: a file", 4, "is not a folder", all_of(removed("sft"), file_is("sft", "x"))),
    Hostile("side file: bytes in its name", 4, "is not text", lambda f: Path(os.fsdecode(os.fsencode(f) + b"/target/\xff.json")).write_text("{}")),
]  # fmt: skip

LINKS = [
    Hostile("link: shard leads out", 4, "--follow-links", moved_and_linked(f"target/{FIRST}", f"elsewhere/{FIRST}")),
    Hostile("link: index leads out", 4, "--follow-links", moved_and_linked(f"target/{INDEX}", f"elsewhere/{INDEX}")),
    Hostile("link: config leads out", 4, "--follow-links", moved_and_linked("target/config.json", "elsewhere/config.json")),
    Hostile("link: config of another model leads out", 4, "--follow-links", moved_and_linked("rl/config.json", "elsewhere/config.json")),
    Hostile("link: side file leads to a secret", 4, "--follow-links", linked("target/notes.txt", "/etc/passwd")),
    Hostile("link: through the folder and out again", 4, "--follow-links", all_of(linked("target/inner", "{folder}"), moved(f"target/{FIRST}", FIRST), linked(f"target/{FIRST}", f"inner/{FIRST}"))),
    Hostile("link: to another model's folder", 4, "--follow-links", linked(f"target/{FIRST}", f"{{folder}}/sft/{FIRST}")),
    Hostile("link: to a folder whose name begins alike", 4, "--follow-links", moved_and_linked(f"target/{FIRST}", f"target-2/{FIRST}")),
    Hostile("link: to itself", 4, "broken link", linked(f"target/{FIRST}", FIRST)),
    Hostile("link: in a circle", 4, "broken link", all_of(linked(f"target/{FIRST}", SECOND), linked(f"target/{SECOND}", FIRST))),
    Hostile("link: single file to itself", 4, "broken link", all_of(single_file(b""), linked("target/model.safetensors", "model.safetensors"))),
    Hostile("link: dangling shard", 4, "broken link", linked(f"target/{FIRST}", "nowhere")),
    Hostile("link: dangling shard, links allowed", 4, "broken link", linked(f"target/{FIRST}", "nowhere"), {"follow_links": True}),
    Hostile("link: dangling index", 4, "broken link", linked(f"target/{INDEX}", "nowhere")),
    Hostile("link: dangling config of another model", 4, "broken link", linked("rl/config.json", "nowhere")),
    Hostile("link: dangling tokenizer", 4, "broken link", linked("target/tokenizer.json", "nowhere")),
]  # fmt: skip

CONFIGS = [
    Hostile("config: not JSON", 4, "config.json: is not valid JSON", config_is("{hidden_size: 1}")),
    Hostile("config: empty", 4, "config.json: is not valid JSON", config_is("")),
    Hostile("config: a list", 4, "config.json: is not a JSON object", config_is("[]")),
    Hostile("config: too deep for any reader", 4, "config.json: is nested too deeply", config_is('{"a":' * 100_000)),
    Hostile("config: deep configs", 4, "config.json: is nested too deeply", config_is('{"a_config":' * 900 + "1" + "}" * 900)),
    Hostile("config: deep lists", 4, "config.json: is nested too deeply", config_is('{"a":' + "[" * 200 + "]" * 200 + "}")),
    Hostile("config: not UTF-8", 4, "config.json: is not valid JSON", config_is(b'{"a": "\xff"}')),
    Hostile("config: UTF-16", 4, "config.json: is not valid JSON", config_is("{}".encode("utf-16"))),
    Hostile("config: duplicate key", 4, "'vocab_size' stands twice", config_is('{"vocab_size": 32, "vocab_size": 33}')),
    Hostile("config: a folder", 4, "config.json: is not a file", made_folder("target/config.json")),
    Hostile("config: a pipe", 4, "config.json: is not a file", made_fifo("target/config.json")),
    Hostile("config: auto_map", 4, "--allow-code", config_has(auto_map={"AutoModel": "evil.Model"})),
    Hostile("config: auto_map inside", 4, "--allow-code", config_has(text_config={"auto_map": {"AutoModel": "evil.Model"}})),
    Hostile("config: auto_map spelt with an escape", 4, "--allow-code", config_is('{"auto\\u005fmap": {"AutoModel": "evil.Model"}}')),
    Hostile("config: auto_map of a tokenizer", 4, "tokenizer_config.json: has `auto_map`", file_is("target/tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["evil.Slow", null]}}')),
    Hostile("config: auto_map of a processor", 4, "--allow-code", file_is("target/processor_config.json", '{"auto_map": {"AutoProcessor": "other/repo--evil.P"}}')),
    Hostile("config: auto_map in a broken file", 4, "is not valid JSON", file_is("target/tokenizer_config.json", '{"auto_map": ')),
    Hostile("config: vocabulary larger than the embedding", 4, "vocab_size = 99", config_has(vocab_size=99)),
    Hostile("config: more blocks than the weights", 4, "num_hidden_layers = 7", config_has(num_hidden_layers=7)),
    Hostile("config: says quantised", 4, "is quantised", config_has(quantization_config={"quant_method": "fp8"})),
    Hostile("config: says quantised inside", 4, "is quantised", config_has("rl", text_config={"quantization_config": {"quant_method": "gptq"}})),
]  # fmt: skip

QUANTISED = [
    Hostile("quantised: FP8", 4, "holds F8_E4M3", with_tensor(HEAD, torch.zeros(32, 16).to(torch.float8_e4m3fn))),
    Hostile("quantised: FP8 in one model", 4, "model `rl`", with_tensor(HEAD, torch.zeros(32, 16).to(torch.float8_e5m2), "rl")),
    Hostile("quantised: FP8 scales", 4, "quantised layout", with_tensor("model.layers.0.mlp.up_proj.weight_scale_inv", torch.ones(1))),
    Hostile("quantised: MXFP4 blocks", 4, "MXFP4", all_of(with_tensor("model.layers.0.mlp.experts.down_proj_blocks", torch.zeros(4, dtype=torch.uint8)), with_tensor("model.layers.0.mlp.experts.down_proj_scales", torch.zeros(1, dtype=torch.uint8)))),
    Hostile("quantised: four bits", 4, "holds F4", tensor("F4", [2], [0, 1])),
    Hostile("quantised: GPTQ", 4, "quantised layout", with_tensor("model.layers.0.mlp.up_proj.qweight", torch.zeros(4, dtype=torch.int32))),
    Hostile("quantised: bitsandbytes", 4, "quantised layout", with_tensor("model.layers.0.mlp.up_proj.weight.absmax", torch.zeros(4))),
]  # fmt: skip

MISFITS = [
    Hostile("misfit: shape", 4, "[31, 16]", with_tensor(HEAD, torch.zeros(31, 16, dtype=torch.bfloat16), "rl")),
    Hostile("misfit: transposed", 4, "[16, 32]", with_tensor(HEAD, torch.zeros(16, 32, dtype=torch.bfloat16), "sft")),
    Hostile("misfit: one dimension more", 4, "differ in shape", with_tensor(NORM, torch.zeros(16, 1, dtype=torch.bfloat16), "sft")),
    Hostile("misfit: integer against float", 4, "I32 against BF16", with_tensor(NORM, torch.zeros(16, dtype=torch.int32), "target")),
    Hostile("misfit: integers of two widths", 4, "I64 against I32", all_of(with_tensor("ids", torch.zeros(3, dtype=torch.int64), "target"), with_tensor("ids", torch.zeros(3, dtype=torch.int32), "rl", "sft"))),
    Hostile("misfit: tensor missing", 4, "lacks 1 tensor", without_tensor(HEAD, "rl")),
    Hostile("misfit: tensor too many", 4, "has 1 tensor", with_tensor("extra.weight", torch.zeros(3), "sft")),
    Hostile("misfit: another architecture", 4, "of the same architecture", all_of(removed("rl"), lambda f: write_checkpoint(f / "rl", {"other.weight": torch.zeros(3)}))),
]  # fmt: skip

RECIPES = [
    Hostile("recipe: missing", 2, "does not exist", removed("recipe.yaml")),
    Hostile("recipe: a folder", 2, "is a folder", made_folder("recipe.yaml")),
    Hostile("recipe: a pipe", 2, "is not a file", made_fifo("recipe.yaml")),
    Hostile("recipe: a device", 2, "is not a file", linked("recipe.yaml", "/dev/zero")),
    Hostile("recipe: a link to itself", 4, "cannot be read", linked("recipe.yaml", "recipe.yaml")),
    Hostile("recipe: empty", 2, "is empty", recipe_is("")),
    Hostile("recipe: only comments", 2, "is empty", recipe_is("#\n" * 100_000)),
    Hostile("recipe: a list", 2, "must be a table", recipe_is("- a")),
    Hostile("recipe: two documents", 2, "not valid YAML", recipe_is("a: 1\n---\nb: 1\n")),
    Hostile("recipe: huge", 2, "larger than 256 KiB", recipe_is("#" * (1 << 19))),
    Hostile("recipe: endless", 2, "larger than 256 KiB", lambda f: os.truncate(f / "recipe.yaml", 1 << 40)),
    Hostile("recipe: NUL bytes", 2, "not valid YAML", recipe_is(b"skillmerge: 1\n\0\0")),
    Hostile("recipe: not UTF-8", 2, "is not UTF-8", recipe_is(b"merge: \xff")),
    Hostile("recipe: UTF-16", 2, "is not UTF-8", recipe_is("skillmerge: 1".encode("utf-16"))),
    Hostile("recipe: the weights themselves", 2, "is not UTF-8", lambda f: shutil.copy(f / "rl" / FIRST, f / "recipe.yaml")),
    Hostile("recipe: nested lists", 2, "nested deeper", recipe_is("[" * 200_000)),
    Hostile("recipe: nested tables", 2, "nested deeper", recipe_is("{a: " * 60_000)),
    Hostile("recipe: nested dashes", 2, "nested deeper", recipe_is("- " * 100_000)),
    Hostile("recipe: too many parts", 2, "too many parts", recipe_is("- a\n" * 60_000)),
    Hostile("recipe: a billion laughs", 2, "too many parts", recipe_is(laughs())),
    Hostile("recipe: an alias of itself", 2, "too many parts", recipe_is("a: &a [*a]")),
    Hostile("recipe: nested aliases", 2, "nests aliases", recipe_is("a: &a 1\nb: " + "[" * 12 + "*a" + "]" * 12)),
    Hostile("recipe: an alias of nothing", 2, "not valid YAML", recipe_is("a: *b")),
    Hostile("recipe: an anchor twice", 2, "stands twice", recipe_is("a: &a 1\nb: &a 2\n")),
    Hostile("recipe: python/object", 2, "tag", recipe_is('merge: !!python/object/apply:os.system ["touch executed"]')),
    Hostile("recipe: python/name", 2, "tag", recipe_is("merge: !!python/name:os.system")),
    Hostile("recipe: a tag on a table", 2, "tag", recipe_is("models: !!set {a, b}")),
    Hostile("recipe: a tag of its own", 2, "tag", recipe_is("merge: !eval target")),
    Hostile("recipe: a tag of a quarter million characters", 2, "tag", recipe_is("a: !" + "x" * 250_000 + " 1")),
    Hostile("recipe: merge key", 2, "unknown key `<<`", recipe_is("<<: {skillmerge: 1}")),
    Hostile("recipe: YAML 1.1", 2, "recipes are YAML 1.2", recipe_is("%YAML 1.1\n---\nskillmerge: 1\n")),
    Hostile("recipe: duplicate key", 2, "duplicate key", recipe_is("skillmerge: 1\nskillmerge: 1\n")),
    Hostile("recipe: unclosed quote", 2, "not valid YAML", recipe_is('merge: "' + "x\n " * 60_000)),
    Hostile("recipe: a character past Unicode", 2, "not valid YAML", recipe_is('merge: "\\UFFFFFFFF"')),
    Hostile("recipe: a key of 200,000 characters", 2, "unknown key", recipe_is('? "' + "k" * 200_000 + '"\n: 1\n')),
    Hostile("recipe: version 2", 2, "format version", recipe_has(skillmerge=2)),
    Hostile("recipe: no coefficient, 1e999", 2, "finite", recipe_is("skillmerge: 1\nmodels: {a: a}\nmerge: a\ncoefficients: {lam: 1e999}\n")),
    Hostile("recipe: a number of 100,000 digits", 2, "more than 300 digits", recipe_is("coefficients: {lam: " + "9" * 100_000 + "}")),
    Hostile("recipe: a number of 100,000 digits as text", 2, "must be a number", recipe_has(coefficients={"lam": "9" * 100_000})),
    Hostile("recipe: a coefficient that is not a number", 2, "finite", recipe_is("skillmerge: 1\nmodels: {a: a}\nmerge: a\ncoefficients: {lam: .nan}\n")),
    Hostile("recipe: a shard size of 400 digits", 2, "not a", recipe_has(output={"shard_size": "9" * 400 + "GB"})),
    Hostile("recipe: a seed of 300 digits", 2, "`seed`", recipe_is("skillmerge: 1\nmodels: {a: a}\nmerge: a\noutput: {seed: " + "9" * 299 + "}\n")),
    Hostile("recipe: a million layers", 2, "past the last block", recipe_has(coefficients={"lam": {"rules": [{"layers": "0-999999", "value": 1}]}})),
    Hostile("recipe: layers of 9 digits", 2, "does not name layers", recipe_has(coefficients={"lam": {"rules": [{"layers": "0-999999999", "value": 1}]}})),
    Hostile("recipe: a ramp out of this world", 2, "finite", recipe_has(coefficients={"lam": {"rules": [{"layers": "0-", "ramp": [1e308, -1e308]}]}})),
    Hostile("recipe: glob that backtracks", 2, "matches no tensor", all_of(with_tensor(LONG_NAME, torch.zeros(1)), copy_rule("*a*a*a*a*a*a*a*a*a*a*a*a*a*a*b"))),
    Hostile("recipe: glob of 100,000 stars", 2, "matches no tensor", all_of(with_tensor(LONG_NAME, torch.zeros(1)), copy_rule("*a" * 50_000 + "b"))),
    Hostile("recipe: glob of open brackets", 2, "matches no tensor", copy_rule("[a" * 20_000)),
    Hostile("recipe: glob of impossible ranges", 2, "matches no tensor", copy_rule("*[z-a]*[[:]*[!]*")),
    Hostile("recipe: 9,000 globs", 2, "matches no tensor", copy_rule([f"*{n}*x{n}*" for n in range(9000)])),
    Hostile("recipe: ignore that backtracks", 2, "matches no tensor", all_of(with_tensor(LONG_NAME, torch.zeros(1)), recipe_has(ignore=["*a*a*a*a*a*a*a*a*a*a*b"]))),
]  # fmt: skip

EXPRESSIONS = [
    Hostile("expression: Python", 2, "expression", merge("__import__('os').system('touch executed')")),
    Hostile("expression: a call", 2, "no method of this version", merge("eval(target)")),
    Hostile("expression: 10,000 parentheses", 2, "longer than 10000", merge("(" * 10_000 + "target" + ")" * 10_000)),
    Hostile("expression: 4,000 parentheses", 2, "nested deeper than", merge("(" * 4_000 + "target" + ")" * 4_000)),
    Hostile("expression: 9,000 open parentheses", 2, "nested deeper than", merge("(" * 9_000)),
    Hostile("expression: 9,000 minus signs", 2, "nested deeper than", merge("-" * 9_000 + "target")),
    Hostile("expression: 100,000 terms", 2, "longer than 10000", merge("+".join(["rl"] * 50_000))),
    Hostile("expression: 3,000 terms", 2, "too many terms", merge("+".join(["rl"] * 3_000))),
    Hostile("expression: 3,000 factors", 2, "too many terms", merge("rl" + "*1" * 3_000)),
    Hostile("expression: chains in chains", 2, "too many terms", all_of(models(t="target"), merge(nested_expression()))),
    Hostile("expression: 1e999", 2, "not finite", merge("1e999 * target")),
    Hostile("expression: 9,000 digits", 2, "not finite", merge("9" * 9_000 + " * target")),
    Hostile("expression: a product that overflows", 2, "not finite", merge("1e308 * 10 * target")),
    Hostile("expression: a nested product that overflows", 2, "finite", merge("target + 1e200 * (1e200 * (rl - sft))")),
    Hostile("expression: factors that overflow in the end", 2, "finite", merge("1e200 * (1e200 * target)")),
    Hostile("expression: a coefficient that overflows", 2, "finite", merge("target + lam * (1e10 * (rl - sft))", lam=1e300)),
    Hostile("expression: division by zero", 2, "divides by zero", merge("target / (1 - 1)")),
    Hostile("expression: division by a coefficient of zero", 2, "divides by zero", merge("target / lam", lam=0)),
    Hostile("expression: division by almost nothing", 2, "finite", merge("target + (rl - sft) / 1e-300 / 1e-300")),
    Hostile("expression: a name of 9,000 letters", 2, "neither a model nor", merge("x" * 9_000)),
    Hostile("expression: not one model in the end", 2, "models' worth", merge("target + rl")),
    Hostile("expression: always zero", 2, "zero", merge("0 * target")),
]  # fmt: skip

PLACES = [
    Hostile("place: NUL in a model's path", 2, "control character", recipe_is('models: {a: "x\\0y"}')),
    Hostile("place: half a character in a path", 2, "control character", recipe_is('models: {a: "\\ud800"}')),
    Hostile("place: a path of 5,000 characters", 4, "File name too long", models(target="x" * 5_000)),
    Hostile("place: the home of nobody", 2, "home", models(target="~nobody-of-that-name/target")),
    Hostile("place: an unknown scheme", 2, "is not a place", models(target="ftp://host/target")),
    Hostile("place: a device", 4, "is not a folder", models(target="/dev/null")),
    Hostile("place: an empty path", 2, "`target`", models(target="")),
    Hostile("output: an input", 2, "would replace model `target`", output("target")),
    Hostile("output: an input, spelt otherwise", 2, "would replace model `target`", output("./x/../target/")),
    Hostile("output: an input, through a link", 2, "would replace model `target`", all_of(linked("again", "."), output("again/target"))),
    Hostile("output: holds the inputs", 2, "would replace", output("{folder}")),
    Hostile("output: the root of everything", 2, "would replace", output("/"), {"overwrite": True}),
    Hostile("output: the recipe", 2, "would replace the recipe", output("recipe.yaml"), {"overwrite": True}),
    Hostile("output: a shard of an input", 2, "is not a folder", output(f"target/{FIRST}"), {"overwrite": True}),
    Hostile("output: its staging folder is an input", 2, "model `target`", all_of(moved("target", "merged.partial"), models(target="merged.partial"))),
    Hostile("output: its staging folder holds an input", 2, "model `target`", all_of(made_folder("merged.partial"), moved("target", "merged.partial/files"), models(target="merged.partial/files"))),
    Hostile("output: its staging folder leads to an input", 2, "merged.partial", linked("merged.partial", "target")),
    Hostile("output: its staging folder is somebody's", 2, "merged.partial", all_of(made_folder("merged.partial"), file_is("merged.partial/thesis.txt", "x"))),
    Hostile("output: its staging folder is a file", 2, "merged.partial", file_is("merged.partial", "x")),
    Hostile("output: a folder with something in it", 2, "exists already", all_of(made_folder("merged"), file_is("merged/thesis.txt", "x"))),
    Hostile("output: a file", 2, "is not a folder", file_is("merged", "x"), {"overwrite": True}),
    Hostile("output: a link", 2, "is not a folder", all_of(made_folder("elsewhere"), linked("merged", "elsewhere")), {"overwrite": True}),
    Hostile("output: below a file", 2, "cannot be written", output("recipe.yaml/merged")),
    Hostile("output: NUL in its path", 2, "control character", recipe_is('output: {path: "x\\0y"}')),
    Hostile("output: a name of 5,000 characters", 2, "too long", output("x" * 5_000)),
    Hostile("output: the home of nobody", 2, "home", output("~nobody-of-that-name/merged")),
    Hostile("output: nowhere", 2, "names no output", recipe_has(output={})),
    Hostile("resources: more than the disk", 5, "free", terabytes),
    Hostile("resources: a memory limit of 1 MB", 5, "too small", lambda f: None, {"memory_limit": 10**6}),
    Hostile("resources: a device that is not there", 2, "--device cuda:99", lambda f: None, {"device": "cuda:99"}),
]  # fmt: skip

BEFORE_WEIGHTS = [
    *INDEXES, *HEADERS, *FILES, *LINKS, *CONFIGS, *QUANTISED, *MISFITS, *RECIPES, *EXPRESSIONS, *PLACES,
]  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    write_family(folder, config=CONFIG)
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A good family of one's own, to be spoilt."""
    return Path(shutil.copytree(good, tmp_path / "family"))


def listing(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Everything in a folder: kind, size and time of change."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        found[str(path.relative_to(folder))] = (status.st_mode, status.st_size, status.st_mtime_ns)
    return found


def refused(folder: Path, **options: Any) -> SkillmergeError:
    """The error that apply ends with, after checks that hold for each of them."""
    started = time.process_time()
    with pytest.raises(SkillmergeError) as caught:
        skillmerge.apply(folder / "recipe.yaml", **options)
    assert time.process_time() - started < CPU_SECONDS
    error = caught.value
    assert not re.search(r"[^\n\t -~…µ-￿]|[\ud800-\udfff]", str(error)), "raw control characters in a message"
    assert len(str(error)) < 8_000 + len(str(folder)) * 4
    assert not (folder / "merged").is_dir() or not list((folder / "merged").glob("*.safetensors"))
    return error


@pytest.mark.parametrize("case", BEFORE_WEIGHTS, ids=lambda case: case.name)
def test_hostile_input_is_refused_before_anything_is_written(case: Hostile, folder: Path) -> None:
    case.spoil(folder)
    before = listing(folder)
    error = refused(folder, **case.options)
    assert (error.exit_status, case.phrase in str(error)) == (case.status, True), str(error)
    assert listing(folder) == before


def test_hostile_cases_have_names_of_their_own() -> None:
    names = [case.name for case in (*BEFORE_WEIGHTS, *IN_WEIGHTS)]
    assert len(names) == len(set(names)) >= 60


def test_family_that_nobody_spoilt_is_merged(folder: Path) -> None:
    assert skillmerge.apply(folder / "recipe.yaml").output == folder / "merged"


# What only the weights show: there is no output, and nothing stands in the way of the cure.


def poisoned(model: str, name: str, index: int, value: float, dtype: torch.dtype = torch.bfloat16) -> Spoil:
    """All models are of `dtype`, and one element of one tensor of `model` is `value`."""

    def cast(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({key: tensor.to(dtype) for key, tensor in tensors.items()})

    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[index] = value

    return all_of(tensors_edited(cast), tensors_edited(poison, model))


def large_poisoned(model: str, index: int) -> Spoil:
    """A tensor of several tiles, with one NaN in it."""
    return all_of(
        with_tensor("large.weight", torch.ones(600_000, dtype=torch.bfloat16)),
        tensors_edited(lambda tensors: tensors["large.weight"].__setitem__(index, float("nan")), model),
    )


NAN, INF = float("nan"), float("inf")
FORCE = {"allow_nonfinite": True}
IN_WEIGHTS = [
    Hostile("weights: NaN in the target's first element", 4, f"model `target` holds nan in tensor `{EMBEDDING}` at element 0", poisoned("target", EMBEDDING, 0, NAN), FORCE),
    Hostile("weights: NaN in the last element", 4, f"model `rl` holds nan in tensor `{HEAD}` at element 511", poisoned("rl", HEAD, 511, NAN), FORCE),
    Hostile("weights: Inf in float16", 4, f"model `sft` holds inf in tensor `{NORM}` at element 3", poisoned("sft", NORM, 3, INF, torch.float16), FORCE),
    Hostile("weights: -Inf in float32", 4, f"model `target` holds -inf in tensor `{NORM}` at element 15", poisoned("target", NORM, 15, -INF, torch.float32), FORCE),
    Hostile("weights: NaN in float64", 4, f"model `rl` holds nan in tensor `{NORM}` at element 1", poisoned("rl", NORM, 1, NAN, torch.float64), FORCE),
    Hostile("weights: NaN in a tensor copied by rule", 4, f"model `rl` holds nan in tensor `{HEAD}` at element 7", all_of(poisoned("rl", HEAD, 7, NAN), recipe_has(copy=[{"tensors": HEAD, "from": "rl"}])), FORCE),
    Hostile("weights: Inf in a tensor copied for a coefficient of 0", 4, f"model `target` holds inf in tensor `{NORM}` at element 0", all_of(poisoned("target", NORM, 0, INF, torch.float16), merge("target + lam * (rl - sft)", lam=0)), FORCE),
    Hostile("weights: -Inf in a tensor that is cast", 4, f"model `target` holds -inf in tensor `{NORM}` at element 2", all_of(poisoned("target", NORM, 2, -INF), recipe_has(merge="target", output={"path": "merged", "dtype": "float32"})), FORCE),
    Hostile("weights: the same NaN in both sides of a difference", 4, f"holds nan in tensor `{NORM}` at element 4", all_of(poisoned("rl", NORM, 4, NAN), poisoned("sft", NORM, 4, NAN)), FORCE),
    Hostile("weights: the same NaN in terms that cancel", 4, f"holds nan in tensor `{NORM}` at element 4", all_of(poisoned("rl", NORM, 4, NAN), poisoned("sft", NORM, 4, NAN), recipe_has(merge="target - sft + rl")), FORCE),
    Hostile("weights: the same Inf in terms that cancel", 4, f"holds inf in tensor `{NORM}` at element 4", all_of(poisoned("rl", NORM, 4, INF), poisoned("sft", NORM, 4, INF), recipe_has(merge="target - sft + rl")), FORCE),
    Hostile("weights: NaN at the end of several tiles", 4, "model `sft` holds nan in tensor `large.weight` at element 599999", large_poisoned("sft", 599_999), FORCE),
    Hostile("weights: NaN in the middle of several tiles", 4, "model `target` holds nan in tensor `large.weight` at element 262149", large_poisoned("target", 262_149), FORCE),
    Hostile("weights: float16 overflows", 4, f"tensor `{NORM}` overflows F16 at element 5", all_of(poisoned("target", NORM, 5, 70_000.0, torch.float32), recipe_has(output={"path": "merged", "dtype": "float16"})), FORCE),
    Hostile("weights: float16 overflows on the way", 4, f"tensor `{NORM}` overflows F16 at element 5", all_of(poisoned("rl", NORM, 5, 60_000.0, torch.float16), merge("target + lam * (rl - sft)", lam=2.0)), FORCE),
    Hostile("weights: float32 overflows", 4, f"tensor `{NORM}` overflows F32 at element 6", all_of(poisoned("rl", NORM, 6, 3e38, torch.float32), merge("target + lam * (rl - sft)", lam=3.0)), FORCE),
    Hostile("weights: integers that differ", 4, "tensor `ids` holds I64 and differs between models `target` and `rl`", all_of(with_tensor("ids", torch.arange(5)), with_tensor("ids", torch.tensor([0, 1, 2, 3, 5]), "rl"))),
    Hostile("weights: booleans that differ", 4, "tensor `mask` holds BOOL and differs between models `target` and `sft`", all_of(with_tensor("mask", torch.ones(5, dtype=torch.bool)), with_tensor("mask", torch.zeros(5, dtype=torch.bool), "sft"))),
]  # fmt: skip


@pytest.mark.parametrize("case", IN_WEIGHTS, ids=lambda case: case.name)
def test_hostile_weights_are_refused_without_an_output(case: Hostile, folder: Path) -> None:
    case.spoil(folder)
    before = listing(folder)
    error = refused(folder)
    assert (error.exit_status, case.phrase in str(error)) == (case.status, True), str(error)
    after = {name: entry for name, entry in listing(folder).items() if not name.startswith("merged.partial")}
    assert after == before
    if not case.options:
        recipe_has(copy=[{"tensors": ["ids", "mask"], "from": "target"}])(folder)
    assert skillmerge.apply(folder / "recipe.yaml", **case.options).output.is_dir()
    assert not (folder / "merged.partial").exists()
