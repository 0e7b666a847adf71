"""Hostile and broken inputs: each a clear error with the right exit status, quickly, and nothing written.

One line per case: what somebody did to a good family of checkpoints (or to its recipe), the exit status, and
words that the message must hold. What is refused from headers and text alone leaves no trace on the disk;
what only the weights can show leaves no output and never stands in the way of the cure.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import read_checkpoint, run_cli, write_checkpoint, write_family
from safetensors.torch import load_file, save_file

import skillmerge
from skillmerge.errors import SkillmergeError
from skillmerge.reporter import Reporter

CPU_SECONDS = 2.0
"""The promise. In CPU time, so that a busy machine does not fail it; what hangs runs into the timeout."""
pytestmark = pytest.mark.timeout(30)

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


INDEXES = cases(4, [
    ("index: a file in the parent folder", "in the same folder", index_places("../x.safetensors")),
    ("index: an absolute name", "in the same folder", index_places("/etc/x.safetensors")),
    ("index: a file in a subfolder", "in the same folder", index_places("a/b.safetensors")),
    ("index: a backslash", "in the same folder", index_places("..\\x.safetensors")),
    ("index: an empty name", "in the same folder", index_places("")),
    ("index: nothing but the ending", "in the same folder", index_places(".safetensors")),
    ("index: a pickle", "in the same folder", index_places("pytorch_model.bin")),
    ("index: a NUL in a name", "in the same folder", index_places("x\0.safetensors")),
    ("index: a line break in a name", "in the same folder", index_places("x\n.safetensors")),
    ("index: half a character in a name", "in the same folder", index_places("\ud800.safetensors")),
    ("index: a number for a name", "in the same folder", index_places(7)),
    ("index: null for a name", "in the same folder", index_places(None)),
    ("index: a list of names", "in the same folder", index_places([FIRST])),
    ("index: a name of a million characters", "in the same folder", index_places("a" * 10**6 + ".safetensors")),
    ("index: a file that is not there", "is missing", index_places("other.safetensors")),
    ("index: tensor in the wrong shard", "that their shards lack", index_places(SECOND)),
    ("index: tensor that no shard has", "that their shards lack", index_edited(lambda m: m.update(new=FIRST))),
    ("index: tensor left out", "does not name", index_edited(lambda m: m.pop(EMBEDDING))),
    ("index: terminal escapes in a tensor's name", "no file can hold",
        index_edited(lambda m: m.update({"\x1b[2Jgone": FIRST}))),
    ("index: half a character in a tensor's name", "no file can hold",
        index_edited(lambda m: m.update({"\udfff": FIRST}))),
    ("index: empty weight map", "has no `weight_map`", index_edited(lambda m: m.clear())),
    ("index: no weight map", "has no `weight_map`", index_is("{}")),
    ("index: weight map is a list", "has no `weight_map`", index_is('{"weight_map": ["a"]}')),
    ("index: a list", "is not a JSON object", index_is("[]")),
    ("index: empty file", "is not valid JSON", index_is("")),
    ("index: cut short", "is not valid JSON", file_edited(f"target/{INDEX}", cut_short(30))),
    ("index: not UTF-8", "is not valid JSON", index_is(b'{"weight_map": {"\xff": "a.safetensors"}}')),
    ("index: UTF-16", "is not valid JSON", index_is('{"weight_map": {}}'.encode("utf-16"))),
    ("index: duplicate key", "stands twice",
        index_is(f'{{"weight_map": {{"{EMBEDDING}": "{FIRST}", "{EMBEDDING}": "{SECOND}"}}}}')),
    ("index: deep nesting", "nested too deeply", index_is('{"weight_map": ' + "[" * 100_000)),
    ("index: a folder", "is not a file", made_folder(f"target/{INDEX}")),
    ("index: a pipe", "is not a file", made_fifo(f"target/{INDEX}")),
    ("index: larger than any index", "of sane size", lambda f: os.truncate(f / "target" / INDEX, 1 << 40)),
])  # fmt: skip

HEADERS = cases(4, [
    ("header: empty file", "is 0 bytes long", single_file(b"")),
    ("header: seven bytes", "is 7 bytes long", single_file(b"\x01\0\0\0\0\0\0")),
    ("header: size 0", "does not start with `{`", header("{}", size=0)),
    ("header: size 2^63", "claims a header of 9223372036854775808", header("{}", size=1 << 63)),
    ("header: size 2^64 - 1", "claims a header of 18446744073709551615", header("{}", size=(1 << 64) - 1)),
    ("header: one byte more than the file", "claims a header of 3 bytes", header("{}", size=3)),
    ("header: larger than the bound, in a file that is larger still", "the largest accepted",
        all_of(header("{}", size=1 << 30), lambda f: os.truncate(f / "target" / "model.safetensors", 1 << 40))),
    ("header: not JSON", "not strict JSON", header("{nonsense}")),
    ("header: a list", "does not start with `{`", header("[]")),
    ("header: a space first", "does not start with `{`", header(" {}")),
    ("header: nothing but NULs", "does not start with `{`", header(bytes(64))),
    ("header: cut off", "not strict JSON", header('{"a":{"dtype":"U8","shape":[1],"data_offs')),
    ("header: two documents", "not strict JSON", header("{}{}")),
    ("header: padded with NULs", "not strict JSON", header(f'{{"a":{info()}}}\0\0', b"x")),
    ("header: single quotes", "not strict JSON", header("{'a':1}")),
    ("header: not UTF-8", "not strict JSON", header(b'{"\xff":' + info().encode() + b"}", b"x")),
    ("header: UTF-16", "does not start with `{`", header(f'{{"a":{info()}}}'.encode("utf-16"), b"x")),
    ("header: NaN", "NaN is not JSON", tensor(shape=[float("nan")])),
    ("header: Infinity", "Infinity is not JSON", tensor(offsets=[0, float("inf")])),
    ("header: deep nesting", "nested too deeply", header('{"a":' * 100_000)),
    ("header: deep lists", "nested too deeply", header('{"a":' + "[" * 100_000 + "]" * 100_000 + "}")),
    ("header: duplicate tensor", "stands twice", header(f'{{"a":{info()},"a":{info()}}}', b"x")),
    ("header: duplicate key in a tensor", "stands twice",
        header('{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x")),
    ("header: empty tensor name", "whose name is empty", header(f'{{"":{info()}}}', b"x")),
    ("header: NUL in a name", "control characters", header(f'{{"a\\u0000":{info()}}}', b"x")),
    ("header: terminal escape in a name", "control characters", header(f'{{"\\u001b[2J":{info()}}}', b"x")),
    ("header: one-byte escape in a name", "control characters", header(f'{{"\\u009b2J":{info()}}}', b"x")),
    ("header: text turned round in a name", "control characters", header(f'{{"a\u202e":{info()}}}', b"x")),
    ("header: half a character in a name", "control characters", header(f'{{"\\ud800":{info()}}}', b"x")),
    ("header: endless name", "too long", header(f'{{"{"n" * 10**6}":{info()}}}', b"x")),
    ("header: unknown dtype", "unknown dtype 'X9'", tensor(dtype="X9")),
    ("header: dtype in small letters", "unknown dtype 'f32'", tensor("f32", [1], [0, 4], b"1234")),
    ("header: dtype is a list", "unknown dtype", tensor(dtype=["U8"])),
    ("header: dtype is a long text", "unknown dtype", tensor(dtype="F" * 10**6)),
    ("header: no shape", "must have exactly the keys", header('{"a":{"dtype":"U8","data_offsets":[0,1]}}', b"x")),
    ("header: one key too many", "must have exactly the keys", header(f'{{"a":{info()[:-1]},"x":1}}}}', b"x")),
    ("header: tensor is a list", "must have exactly the keys", header('{"a":[1]}')),
    ("header: tensor is null", "must have exactly the keys", header('{"a":null}')),
    ("header: shape is a number", "not natural numbers", tensor(shape=1)),
    ("header: negative size", "not a natural number", tensor(shape=[-1])),
    ("header: minus zero", "not a natural number", header('{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}')),
    ("header: size is a fraction", "not natural numbers", tensor(shape=[1.0])),
    ("header: size is true", "not natural numbers", tensor(shape=[True])),
    ("header: size is text", "not natural numbers", tensor(shape=["1"])),
    ("header: size of 5000 digits", "not a natural number",
        header('{"a":{"dtype":"U8","shape":[' + "9" * 5000 + '],"data_offsets":[0,1]}}', b"x")),
    ("header: offsets are negative", "not a natural number", tensor(offsets=[-1, 0])),
    ("header: offsets are fractions", "not natural numbers", tensor(offsets=[0.0, 1.0])),
    ("header: offset is true", "not natural numbers", tensor(offsets=[0, True])),
    ("header: one offset", "not natural numbers", tensor(offsets=[1])),
    ("header: three offsets", "not natural numbers", tensor(offsets=[0, 1, 2])),
    ("header: end before start", "does not fill", tensor(offsets=[1, 0])),
    ("header: shape smaller than its bytes", "does not fill", tensor("U8", [1], [0, 2], b"xx")),
    ("header: shape larger than its bytes", "does not fill", tensor("F32", [2], [0, 4], b"1234")),
    ("header: half a byte", "does not fill", tensor("F4", [3], [0, 1])),
    ("header: shape that overflows 64 bits", "overflows", tensor(shape=[1 << 32, 1 << 32], offsets=[0, 0])),
    ("header: shape that overflows before a 0", "overflows",
        tensor(shape=[1 << 62, 1 << 62, 0], offsets=[0, 0], data=b"")),
    ("header: size of 64 bits after a 0", "not natural numbers", tensor(shape=[0, 1 << 64], offsets=[0, 0], data=b"")),
    ("header: a hundred dimensions", "100 dimensions", tensor(shape=[1] * 100)),
    ("header: a hundred thousand dimensions", "100000 dimensions", tensor(shape=[1] * 10**5)),
    ("header: end past the file", "is cut short", tensor(shape=[9], offsets=[0, 9])),
    ("header: data far past the file", "is cut short", tensor(shape=[1 << 40], offsets=[0, 1 << 40])),
    ("header: trailing bytes", "bytes after its last tensor", tensor(data=b"xy")),
    ("header: hole at the start", "leaves a hole", tensor(offsets=[1, 2], data=b"xx")),
    ("header: hole between", "leaves a hole", header(f'{{"a":{info()},"b":{info(offsets=[2, 3])}}}', b"xxx")),
    ("header: overlap", "overlaps",
        header(f'{{"a":{info(shape=[2], offsets=[0, 2])},"b":{info(shape=[2], offsets=[1, 3])}}}', b"xxx")),
    ("header: two tensors in the same bytes", "overlaps", header(f'{{"a":{info()},"b":{info()}}}', b"x")),
    ("header: metadata is a list", "not a table of strings", header(f'{{"__metadata__":[],"a":{info()}}}', b"x")),
    ("header: metadata of numbers", "not a table of strings",
        header(f'{{"__metadata__":{{"x":1}},"a":{info()}}}', b"x")),
    ("header: half a character in metadata", "not a table of strings",
        header(f'{{"__metadata__":{{"x":"\\ud800"}},"a":{info()}}}', b"x")),
    ("header: no tensors", "holds no tensors", header("{}")),
    ("header: a bomb of empty lists", "more than 1,000,000 parts", header('{"a":[' + "[]," * 2_000_000 + "[]]}")),
    ("header: a bomb of metadata", "more than 1,000,000 parts",
        header('{"__metadata__":{' + ",".join(f'"{n}":""' for n in range(900_000)) + "}}")),
    ("header: a bomb of tables", "more than 1,000,000 parts",
        header("{" + ",".join(f'"{n}":{{}}' for n in range(900_000)) + "}")),
    ("header: a bomb of a shape", "more than 1,000,000 parts", tensor(shape=[1] * 3_000_000)),
    ("index: a bomb of empty lists", "parts", index_is('{"metadata": [' + "[]," * 10_000_000 + "[]]}")),
    ("header: a bomb of keys", "more than 1,000,000 parts",
        header("{" + ",".join(f'"{n}":0' for n in range(700_000)) + "}")),
])  # fmt: skip

FILES = cases(4, [
    ("shard: cut short", "is cut short", file_edited(f"target/{SECOND}", cut_short(1))),
    ("shard: grown", "bytes after its last tensor", file_edited(f"rl/{FIRST}", lambda content: content + b"\0")),
    ("shard: a text of the fetcher", "claims a header",
        file_is(f"sft/{FIRST}", "version https://git-lfs.github.com/spec/v1\n")),
    ("shard: missing", "is missing", removed(f"target/{SECOND}")),
    ("shard: a folder", "is not a regular file", made_folder(f"target/{FIRST}")),
    ("shard: a pipe", "is not a regular file", made_fifo(f"target/{FIRST}")),
    ("shard: a device", "is not a regular file", linked(f"target/{FIRST}", "/dev/zero"), {"follow_links": True}),
    ("shard: tensor in two shards", f"tensor `{EMBEDDING}` is in both", doubled_tensor),
    ("single file: a folder", "is not a regular file",
        all_of(single_file(b""), made_folder("target/model.safetensors"))),
    ("single file: a pipe", "is not a regular file", all_of(single_file(b""), made_fifo("target/model.safetensors"))),
    ("single file: bytes in its name", "not a name that a weight file can have",
        all_of(single_file(b""), moved("target/model.safetensors", f"target/{NOT_TEXT}.safetensors"))),
    ("folder: shards without an index", "but no model.safetensors.index.json", removed(f"target/{INDEX}")),
    ("folder: single file and index", "has both",
        lambda f: shutil.copy(f / "target" / FIRST, f / "target" / "model.safetensors")),
    ("folder: only pickles", "pickles can run code", pickles),
    ("folder: a PEFT adapter", "is a PEFT adapter", adapter),
    ("folder: a PEFT adapter of pickles", "is a PEFT adapter",
        all_of(adapter, moved("target/adapter_model.safetensors", "target/adapter_model.bin"))),
    ("folder: empty", "has no *.safetensors", all_of(removed("target"), made_folder("target"))),
    ("folder: the model is one below", "did you mean one of its folders: deeper",
        all_of(moved("target", "deeper"), made_folder("target"), moved("deeper", "target/deeper"))),
    ("folder: missing", "does not exist", removed("sft")),
    ("folder: a file", "is not a folder", all_of(removed("sft"), file_is("sft", "x"))),
    ("side file: bytes in its name", "is not text", file_is(f"target/{NOT_TEXT}.json", "{}")),
])  # fmt: skip

LINKS = cases(4, [
    ("link: shard leads out", "--follow-links", moved_and_linked(f"target/{FIRST}", f"elsewhere/{FIRST}")),
    ("link: index leads out", "--follow-links", moved_and_linked(f"target/{INDEX}", f"elsewhere/{INDEX}")),
    ("link: config leads out", "--follow-links", moved_and_linked("target/config.json", "elsewhere/config.json")),
    ("link: config of another model leads out", "--follow-links",
        moved_and_linked("rl/config.json", "elsewhere/config.json")),
    ("link: side file leads to a secret", "--follow-links", linked("target/notes.txt", "/etc/passwd")),
    ("link: through the folder and out again", "--follow-links",
        all_of(linked("target/in", "{folder}"), moved(f"target/{FIRST}", FIRST),
               linked(f"target/{FIRST}", f"in/{FIRST}"))),
    ("link: to another model's folder", "--follow-links", linked(f"target/{FIRST}", f"{{folder}}/sft/{FIRST}")),
    ("link: to a folder whose name begins alike", "--follow-links",
        moved_and_linked(f"target/{FIRST}", f"target-2/{FIRST}")),
    ("link: to itself", "broken link", linked(f"target/{FIRST}", FIRST)),
    ("link: in a circle", "broken link", all_of(linked(f"target/{FIRST}", SECOND), linked(f"target/{SECOND}", FIRST))),
    ("link: single file to itself", "broken link",
        all_of(single_file(b""), linked("target/model.safetensors", "model.safetensors"))),
    ("link: dangling shard", "broken link", linked(f"target/{FIRST}", "nowhere")),
    ("link: dangling shard, links allowed", "broken link",
        linked(f"target/{FIRST}", "nowhere"), {"follow_links": True}),
    ("link: dangling index", "broken link", linked(f"target/{INDEX}", "nowhere")),
    ("link: dangling config of another model", "broken link", linked("rl/config.json", "nowhere")),
    ("link: dangling tokenizer", "broken link", linked("target/tokenizer.json", "nowhere")),
])  # fmt: skip

CONFIGS = cases(4, [
    ("config: not JSON", "config.json: is not valid JSON", config_is("{hidden_size: 1}")),
    ("config: empty", "config.json: is not valid JSON", config_is("")),
    ("config: a list", "config.json: is not a JSON object", config_is("[]")),
    ("config: too deep for any reader", "config.json: is nested too deeply", config_is('{"a":' * 100_000)),
    ("config: deep configs", "config.json: is nested too deeply", config_is('{"a_config":' * 900 + "1" + "}" * 900)),
    ("config: deep lists", "config.json: is nested too deeply", config_is('{"a":' + "[" * 200 + "]" * 200 + "}")),
    ("config: not UTF-8", "config.json: is not valid JSON", config_is(b'{"a": "\xff"}')),
    ("config: UTF-16", "config.json: is not valid JSON", config_is("{}".encode("utf-16"))),
    ("config: duplicate key", "'vocab_size' stands twice", config_is('{"vocab_size": 32, "vocab_size": 33}')),
    ("config: a folder", "config.json: is not a file", made_folder("target/config.json")),
    ("config: a pipe", "config.json: is not a file", made_fifo("target/config.json")),
    ("config: auto_map", "--allow-code", config_has(auto_map={"AutoModel": "evil.Model"})),
    ("config: auto_map inside", "--allow-code", config_has(text_config={"auto_map": {"AutoModel": "evil.Model"}})),
    ("config: auto_map spelt with an escape", "--allow-code",
        config_is('{"auto\\u005fmap": {"AutoModel": "evil.Model"}}')),
    ("config: auto_map of a tokenizer", "tokenizer_config.json: has `auto_map`",
        file_is("target/tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["evil.Slow", null]}}')),
    ("config: auto_map of a processor", "--allow-code",
        file_is("target/processor_config.json", '{"auto_map": {"AutoProcessor": "other/repo--evil.P"}}')),
    ("config: auto_map in a broken file", "is not valid JSON",
        file_is("target/tokenizer_config.json", '{"auto_map": ')),
    ("config: vocabulary larger than the embedding", "vocab_size = 99", config_has(vocab_size=99)),
    ("config: more blocks than the weights", "num_hidden_layers = 7", config_has(num_hidden_layers=7)),
    ("config: says quantised", "is quantised", config_has(quantization_config={"quant_method": "fp8"})),
    ("config: says quantised inside", "is quantised",
        config_has("rl", text_config={"quantization_config": {"quant_method": "gptq"}})),
])  # fmt: skip

QUANTISED = cases(4, [
    ("quantised: FP8", "holds F8_E4M3", with_tensor(HEAD, torch.zeros(32, 16).to(torch.float8_e4m3fn))),
    ("quantised: FP8 in one model", "model `rl`", with_tensor(HEAD, torch.zeros(32, 16).to(torch.float8_e5m2), "rl")),
    ("quantised: FP8 scales", "quantised layout",
        with_tensor("model.layers.0.mlp.up_proj.weight_scale_inv", torch.ones(1))),
    ("quantised: MXFP4 blocks", "MXFP4",
        all_of(with_tensor("model.layers.0.mlp.experts.down_proj_blocks", torch.zeros(4, dtype=torch.uint8)),
               with_tensor("model.layers.0.mlp.experts.down_proj_scales", torch.zeros(1, dtype=torch.uint8)))),
    ("quantised: four bits", "holds F4", tensor("F4", [2], [0, 1])),
    ("quantised: GPTQ", "quantised layout",
        with_tensor("model.layers.0.mlp.up_proj.qweight", torch.zeros(4, dtype=I32))),
    ("quantised: bitsandbytes", "quantised layout",
        with_tensor("model.layers.0.mlp.up_proj.weight.absmax", torch.zeros(4))),
])  # fmt: skip

MISFITS = cases(4, [
    ("misfit: shape", "[31, 16]", with_tensor(HEAD, torch.zeros(31, 16, dtype=BF16), "rl")),
    ("misfit: transposed", "[16, 32]", with_tensor(HEAD, torch.zeros(16, 32, dtype=BF16), "sft")),
    ("misfit: one dimension more", "differ in shape",
        with_tensor(NORM, torch.zeros(16, 1, dtype=BF16), "sft")),
    ("misfit: integer against float", "I32 against BF16",
        with_tensor(NORM, torch.zeros(16, dtype=I32), "target")),
    ("misfit: integers of two widths", "I64 against I32",
        all_of(with_tensor("ids", torch.zeros(3, dtype=I64)), with_tensor("ids", torch.zeros(3, dtype=I32), "sft"))),
    ("misfit: tensor missing", "lacks 1 tensor", without_tensor(HEAD, "rl")),
    ("misfit: tensor too many", "has 1 tensor", with_tensor("extra.weight", torch.zeros(3), "sft")),
    ("misfit: another architecture", "of the same architecture",
        all_of(removed("rl"), lambda f: write_checkpoint(f / "rl", {"other.weight": torch.zeros(3)}))),
])  # fmt: skip

RECIPES = cases(2, [
    ("recipe: missing", "does not exist", removed("recipe.yaml")),
    ("recipe: a folder", "is a folder", made_folder("recipe.yaml")),
    ("recipe: a pipe", "is not a file", made_fifo("recipe.yaml")),
    ("recipe: a device", "is not a file", linked("recipe.yaml", "/dev/zero")),
    ("recipe: empty", "is empty", recipe_is("")),
    ("recipe: only comments", "is empty", recipe_is("#\n" * 100_000)),
    ("recipe: a list", "must be a table", recipe_is("- a")),
    ("recipe: two documents", "not valid YAML", recipe_is("a: 1\n---\nb: 1\n")),
    ("recipe: huge", "larger than 256 KiB", recipe_is("#" * (1 << 19))),
    ("recipe: endless", "larger than 256 KiB", lambda f: os.truncate(f / "recipe.yaml", 1 << 40)),
    ("recipe: NUL bytes", "not valid YAML", recipe_is(b"skillmerge: 1\n\0\0")),
    ("recipe: not UTF-8", "is not UTF-8", recipe_is(b"merge: \xff")),
    ("recipe: UTF-16", "is not UTF-8", recipe_is("skillmerge: 1".encode("utf-16"))),
    ("recipe: the weights themselves", "is not UTF-8", lambda f: shutil.copy(f / "rl" / FIRST, f / "recipe.yaml")),
    ("recipe: nested lists", "nested deeper", recipe_is("[" * 200_000)),
    ("recipe: nested tables", "nested deeper", recipe_is("{a: " * 60_000)),
    ("recipe: nested dashes", "nested deeper", recipe_is("- " * 100_000)),
    ("recipe: too many parts", "too many parts", recipe_is("- a\n" * 60_000)),
    ("recipe: a billion laughs", "too many parts", recipe_is(laughs())),
    ("recipe: an alias of itself", "too many parts", recipe_is("a: &a [*a]")),
    ("recipe: nested aliases", "nests aliases", recipe_is("a: &a 1\nb: " + "[" * 12 + "*a" + "]" * 12)),
    ("recipe: an alias of nothing", "not valid YAML", recipe_is("a: *b")),
    ("recipe: an anchor twice", "stands twice", recipe_is("a: &a 1\nb: &a 2\n")),
    ("recipe: python/object", "tag", recipe_is('merge: !!python/object/apply:os.system ["touch executed"]')),
    ("recipe: python/name", "tag", recipe_is("merge: !!python/name:os.system")),
    ("recipe: a tag on a table", "tag", recipe_is("models: !!set {a, b}")),
    ("recipe: a tag of its own", "tag", recipe_is("merge: !eval target")),
    ("recipe: a tag of 100,000 characters", "tag", recipe_is("a: !" + "x" * 100_000 + " 1")),
    ("recipe: merge key", "unknown key `<<`", recipe_is("<<: {skillmerge: 1}")),
    ("recipe: YAML 1.1", "recipes are YAML 1.2", recipe_is("%YAML 1.1\n---\nskillmerge: 1\n")),
    ("recipe: duplicate key", "duplicate key", recipe_is("skillmerge: 1\nskillmerge: 1\n")),
    ("recipe: unclosed quote", "not valid YAML", recipe_is('merge: "' + "x\n " * 60_000)),
    ("recipe: a character past Unicode", "not valid YAML", recipe_is('merge: "\\UFFFFFFFF"')),
    ("recipe: a key of 200,000 characters", "unknown key", recipe_is('? "' + "k" * 200_000 + '"\n: 1\n')),
    ("recipe: version 2", "format version", recipe_has(skillmerge=2)),
    ("recipe: no coefficient, 1e999", "finite",
        recipe_is("skillmerge: 1\nmodels: {a: a}\nmerge: a\ncoefficients: {lam: 1e999}\n")),
    ("recipe: a number of 100,000 digits", "more than 300 digits",
        recipe_is("coefficients: {lam: " + "9" * 100_000 + "}")),
    ("recipe: a number of 100,000 digits as text", "must be a number", recipe_has(coefficients={"lam": "9" * 100_000})),
    ("recipe: a coefficient that is not a number", "finite",
        recipe_is("skillmerge: 1\nmodels: {a: a}\nmerge: a\ncoefficients: {lam: .nan}\n")),
    ("recipe: a shard size of 400 digits", "not a", recipe_has(output={"shard_size": "9" * 400 + "GB"})),
    ("recipe: a seed of 300 digits", "`seed`",
        recipe_is("skillmerge: 1\nmodels: {a: a}\nmerge: a\noutput: {seed: " + "9" * 299 + "}\n")),
    ("recipe: a million layers", "past the last block",
        recipe_has(coefficients={"lam": {"rules": [{"layers": "0-999999", "value": 1}]}})),
    ("recipe: layers of 9 digits", "does not name layers",
        recipe_has(coefficients={"lam": {"rules": [{"layers": "0-999999999", "value": 1}]}})),
    ("recipe: a ramp out of this world", "finite",
        recipe_has(coefficients={"lam": {"rules": [{"layers": "0-", "ramp": [1e308, -1e308]}]}})),
    ("recipe: glob that backtracks", "matches no tensor",
        all_of(with_tensor(LONG_NAME, torch.zeros(1)), copy_rule("*a*a*a*a*a*a*a*a*a*a*a*a*a*a*b"))),
    ("recipe: glob of 500 stars", "matches no tensor",
        all_of(with_tensor(LONG_NAME, torch.zeros(1)), copy_rule("*a" * 499 + "b"))),
    ("recipe: glob of 1,000 brackets", "matches no tensor", copy_rule("[" * 1_000)),
    ("recipe: glob of 1,001 characters", "at most 1000", copy_rule("[" * 1_001)),
    ("recipe: glob of impossible ranges", "matches no tensor", copy_rule("*[z-a]*[[:]*[!]*")),
    ("recipe: 3,000 globs", "matches no tensor", copy_rule([f"*{n}*x{n}*" for n in range(3000)])),
    ("recipe: ignore that backtracks", "matches no tensor",
        all_of(with_tensor(LONG_NAME, torch.zeros(1)), recipe_has(ignore=["*a*a*a*a*a*a*a*a*a*a*b"]))),
]) + cases(4, [
    ("recipe: a link to itself", "cannot be read", linked("recipe.yaml", "recipe.yaml")),
])  # fmt: skip

EXPRESSIONS = cases(2, [
    ("expression: Python", "expression", merge("__import__('os').system('touch executed')")),
    ("expression: a call", "no method of this version", merge("eval(target)")),
    ("expression: 10,000 parentheses", "longer than 10000", merge("(" * 10_000 + "target" + ")" * 10_000)),
    ("expression: 4,000 parentheses", "nested deeper than", merge("(" * 4_000 + "target" + ")" * 4_000)),
    ("expression: 9,000 open parentheses", "nested deeper than", merge("(" * 9_000)),
    ("expression: 9,000 minus signs", "nested deeper than", merge("-" * 9_000 + "target")),
    ("expression: 100,000 terms", "longer than 10000", merge("+".join(["rl"] * 50_000))),
    ("expression: 3,000 terms", "too many terms", merge("+".join(["rl"] * 3_000))),
    ("expression: 3,000 factors", "too many terms", merge("rl" + "*1" * 3_000)),
    ("expression: chains in chains", "too many terms", all_of(models(t="target"), merge(nested_expression()))),
    ("expression: 1e999", "not finite", merge("1e999 * target")),
    ("expression: 9,000 digits", "not finite", merge("9" * 9_000 + " * target")),
    ("expression: a product that overflows", "not finite", merge("1e308 * 10 * target")),
    ("expression: a nested product that overflows", "finite", merge("target + 1e200 * (1e200 * (rl - sft))")),
    ("expression: factors that overflow in the end", "finite", merge("1e200 * (1e200 * target)")),
    ("expression: a coefficient that overflows", "finite", merge("target + lam * (1e10 * (rl - sft))", lam=1e300)),
    ("expression: division by zero", "divides by zero", merge("target / (1 - 1)")),
    ("expression: division by a coefficient of zero", "divides by zero", merge("target / lam", lam=0)),
    ("expression: division by almost nothing", "finite", merge("target + (rl - sft) / 1e-300 / 1e-300")),
    ("expression: a name of 9,000 letters", "neither a model nor", merge("x" * 9_000)),
    ("expression: not one model in the end", "models' worth", merge("target + rl")),
    ("expression: always zero", "zero", merge("0 * target")),
])  # fmt: skip

PLACES = cases(2, [
    ("place: NUL in a model's path", "control character", recipe_is('models: {a: "x\\0y"}')),
    ("place: half a character in a path", "control character", recipe_is('models: {a: "\\ud800"}')),
    ("place: the home of nobody", "home", models(target="~nobody-of-that-name/target")),
    ("place: an unknown scheme", "is not a place", models(target="ftp://host/target")),
    ("place: an empty path", "`target`", models(target="")),
    ("output: an input", "would replace model `target`", output("target")),
    ("output: an input, spelt otherwise", "would replace model `target`", output("./x/../target/")),
    ("output: an input, through a link", "would replace model `target`",
        all_of(linked("again", "."), output("again/target"))),
    ("output: holds the inputs", "would replace", output("{folder}")),
    ("output: the root of everything", "would replace", output("/"), {"overwrite": True}),
    ("output: the recipe", "would replace the recipe", output("recipe.yaml"), {"overwrite": True}),
    ("output: a shard of an input", "is not a folder", output(f"target/{FIRST}"), {"overwrite": True}),
    ("output: its staging folder is an input", "model `target`",
        all_of(moved("target", "merged.partial"), models(target="merged.partial"))),
    ("output: its staging folder holds an input", "model `target`",
        all_of(made_folder("merged.partial"), moved("target", "merged.partial/files"),
               models(target="merged.partial/files"))),
    ("output: its staging folder leads to an input", "merged.partial", linked("merged.partial", "target")),
    ("output: its staging folder is somebody's", "merged.partial",
        all_of(made_folder("merged.partial"), file_is("merged.partial/thesis.txt", "x"))),
    ("output: its staging folder is a file", "merged.partial", file_is("merged.partial", "x")),
    ("output: a folder with something in it", "exists already",
        all_of(made_folder("merged"), file_is("merged/thesis.txt", "x"))),
    ("output: a file", "is not a folder", file_is("merged", "x"), {"overwrite": True}),
    ("output: a link", "is not a folder",
        all_of(made_folder("elsewhere"), linked("merged", "elsewhere")), {"overwrite": True}),
    ("output: below a file", "cannot be written", output("recipe.yaml/merged")),
    ("output: NUL in its path", "control character", recipe_is('output: {path: "x\\0y"}')),
    ("output: a name of 5,000 characters", "too long", output("x" * 5_000)),
    ("output: the home of nobody", "home", output("~nobody-of-that-name/merged")),
    ("output: nowhere", "names no output", recipe_has(output={})),
    ("resources: a device that is not there", "--device cuda:99", lambda f: None, {"device": "cuda:99"}),
]) + cases(4, [
    ("place: a path of 5,000 characters", "File name too long", models(target="x" * 5_000)),
    ("place: a device", "is not a folder", models(target="/dev/null")),
]) + cases(5, [
    ("resources: more than the disk", "free", terabytes),
    ("resources: a memory limit of 1 MB", "too small", lambda f: None, {"memory_limit": 10**6}),
])  # fmt: skip

BEFORE_WEIGHTS = [
    *INDEXES, *HEADERS, *FILES, *LINKS, *CONFIGS, *QUANTISED, *MISFITS, *RECIPES, *EXPRESSIONS, *PLACES,
]  # fmt: skip


def table(rows: list[Hostile]) -> list[Any]:
    """Parameters with the cases' names."""

    def marks(name: str) -> list[pytest.MarkDecorator]:
        impossible = sys.platform == "darwin" and name.endswith("bytes in its name")
        return [pytest.mark.skipif(impossible, reason="this system has no such names")]

    return [pytest.param(row, id=row.name, marks=marks(row.name)) for row in rows]


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
        time_of_change = 0 if path.is_dir() and not path.is_symlink() else status.st_mtime_ns
        found[str(path.relative_to(folder))] = (status.st_mode, status.st_size, time_of_change)
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


@pytest.mark.parametrize("case", table(BEFORE_WEIGHTS))
def test_hostile_input_is_refused_before_anything_is_written(case: Hostile, folder: Path) -> None:
    case.spoil(folder)
    before = listing(folder)
    error = refused(folder, **case.options)
    assert (error.exit_status, case.phrase in str(error)) == (case.status, True), str(error)
    assert listing(folder) == before


def test_hostile_cases_have_names_of_their_own() -> None:
    names = [case.name for case in (*BEFORE_WEIGHTS, *NONFINITE, *DIFFERING)]
    assert len(names) == len(set(names)) >= 60


def test_family_that_nobody_spoilt_is_merged(folder: Path) -> None:
    assert skillmerge.apply(folder / "recipe.yaml").output == folder / "merged"


# What only the weights show: there is no output, and nothing stands in the way of the cure.


def poisoned(model: str, name: str, index: int, value: float, dtype: torch.dtype = BF16) -> Spoil:
    """All models are of `dtype`, and one element of one tensor of `model` is `value`."""

    def cast(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({key: tensor.to(dtype) for key, tensor in tensors.items()})

    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[index] = value

    return all_of(tensors_edited(cast), tensors_edited(poison, model))


def large_poisoned(model: str, index: int) -> Spoil:
    """A tensor of several tiles, with one NaN in it."""
    return all_of(
        with_tensor("large.weight", torch.ones(600_000, dtype=BF16)),
        tensors_edited(lambda tensors: tensors["large.weight"].__setitem__(index, NAN), model),
    )


def differing(dtype: torch.dtype, model: str) -> Spoil:
    """A tensor that no arithmetic is meant for, whose last element is another in one model."""
    return all_of(
        with_tensor("ids", torch.ones(70_000, dtype=dtype)),
        tensors_edited(lambda tensors: tensors["ids"].__setitem__(-1, 0), model),
    )


def holds(what: str, model: str, tensor: str, index: int) -> str:
    return f"model `{model}` holds {what} in tensor `{tensor}` at element {index} ("


def overflows(dtype: str, index: int) -> str:
    return f"tensor `{NORM}` overflows {dtype} at element {index}\n"


NAN, INF = float("nan"), float("inf")
NONFINITE = cases(4, [
    ("weights: NaN first", holds("nan", "target", EMBEDDING, 0), poisoned("target", EMBEDDING, 0, NAN)),
    ("weights: NaN last", holds("nan", "rl", HEAD, 511), poisoned("rl", HEAD, 511, NAN)),
    ("weights: Inf in float16", holds("inf", "sft", NORM, 3), poisoned("sft", NORM, 3, INF, torch.float16)),
    ("weights: -Inf in float32", holds("-inf", "target", NORM, 15), poisoned("target", NORM, 15, -INF, torch.float32)),
    ("weights: NaN in float64", holds("nan", "rl", NORM, 1), poisoned("rl", NORM, 1, NAN, torch.float64)),
    ("weights: NaN, copied by a rule", holds("nan", "rl", HEAD, 7),
        all_of(poisoned("rl", HEAD, 7, NAN), recipe_has(copy=[{"tensors": HEAD, "from": "rl"}]))),
    ("weights: Inf, copied for a coefficient of 0", holds("inf", "target", NORM, 0),
        all_of(poisoned("target", NORM, 0, INF, torch.float16), merge("target + lam * (rl - sft)", lam=0))),
    ("weights: -Inf, cast", holds("-inf", "target", NORM, 2),
        all_of(poisoned("target", NORM, 2, -INF), merge("target"), output("merged", dtype="float32"))),
    ("weights: the same NaN in a difference", f"holds nan in tensor `{NORM}` at element 4",
        all_of(poisoned("rl", NORM, 4, NAN), poisoned("sft", NORM, 4, NAN))),
    ("weights: the same NaN in terms that cancel", f"holds nan in tensor `{NORM}` at element 4",
        all_of(poisoned("rl", NORM, 4, NAN), poisoned("sft", NORM, 4, NAN), merge("target - sft + rl"))),
    ("weights: the same Inf in terms that cancel", f"holds inf in tensor `{NORM}` at element 4",
        all_of(poisoned("rl", NORM, 4, INF), poisoned("sft", NORM, 4, INF), merge("target - sft + rl"))),
    ("weights: NaN after several tiles", holds("nan", "sft", "large.weight", 599_999), large_poisoned("sft", 599_999)),
    ("weights: NaN amid several tiles", holds("nan", "rl", "large.weight", 262_149), large_poisoned("rl", 262_149)),
    ("weights: float16 too narrow", overflows("F16", 5),
        all_of(poisoned("target", NORM, 5, 70_000.0, torch.float32), output("merged", dtype="float16"))),
    ("weights: float16 overflows on the way", overflows("F16", 5),
        all_of(poisoned("rl", NORM, 5, 60_000.0, torch.float16), merge("target + lam * (rl - sft)", lam=2.0))),
    ("weights: float32 overflows", overflows("F32", 6),
        all_of(poisoned("rl", NORM, 6, 3e38, torch.float32), merge("target + lam * (rl - sft)", lam=3.0))),
])  # fmt: skip
DIFFERING = cases(4, [
    ("weights: integers differ", "`ids` holds I64 and differs between models `target` and `rl`", differing(I64, "rl")),
    ("weights: booleans differ", "`ids` holds BOOL and differs", differing(torch.bool, "sft")),
    ("weights: bytes differ", "`ids` holds U8 and differs", differing(torch.uint8, "target")),
])  # fmt: skip


def refused_for_its_weights(case: Hostile, folder: Path) -> None:
    """There is no output; a staging folder is the only thing that may be left."""
    case.spoil(folder)
    before = listing(folder)
    error = refused(folder)
    assert (error.exit_status, case.phrase in str(error)) == (case.status, True), str(error)
    left = {name: entry for name, entry in listing(folder).items() if not name.startswith("merged.partial")}
    assert left == before


def merged_after_all(folder: Path, **options: Any) -> None:
    """The cure works, and takes whatever the refused run left with it."""
    assert skillmerge.apply(folder / "recipe.yaml", **options).output == folder / "merged"
    assert not (folder / "merged.partial").exists()


@pytest.mark.parametrize("case", table(NONFINITE))
def test_weights_that_are_not_finite_are_refused_until_they_are_allowed(case: Hostile, folder: Path) -> None:
    refused_for_its_weights(case, folder)
    merged_after_all(folder, allow_nonfinite=True)


@pytest.mark.parametrize("case", table(DIFFERING))
def test_weights_that_cannot_be_merged_must_be_equal_until_a_rule_says_whose(case: Hostile, folder: Path) -> None:
    refused_for_its_weights(case, folder)
    copy_rule("ids")(folder)
    merged_after_all(folder)


# An input that changes while it is in use.


class Saboteur(Reporter):
    """Does something between the plan and the first byte of weights, or between the last and the end."""

    def __init__(self, first: Callable[[], object] = lambda: None, last: Callable[[], object] = lambda: None) -> None:
        self.first, self.last = first, last

    @contextmanager
    def bar(self, total: int) -> Iterator[Callable[[int], None]]:
        self.first()
        yield lambda done: None
        self.last()


def rewritten(path: Path) -> None:
    """Other bytes, the same size, and a later time (kernels keep time in ticks)."""
    path.write_bytes(path.read_bytes()[:-2] + b"\x80\x3f")
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def replaced(path: Path) -> None:
    """Another file of the same name, size and time, moved into its place as downloads are."""
    shutil.copy2(path, path.with_name("new"))
    os.rename(path.with_name("new"), path)


def swapped(path: Path) -> None:
    """A pipe in its place: whoever opens it like a file waits for ever."""
    path.unlink()
    os.mkfifo(path)


CHANGES: dict[str, Callable[[Path], object]] = {
    "rewritten": rewritten,
    "replaced": replaced,
    "cut short": lambda path: os.truncate(path, path.stat().st_size - 2),
    "grown": lambda path: os.truncate(path, path.stat().st_size + 2),
    "emptied": lambda path: os.truncate(path, 0),
    "removed": lambda path: path.unlink(),
    "a pipe": swapped,
}


@pytest.mark.parametrize("when", ["first", "last"])
@pytest.mark.parametrize("change", CHANGES)
def test_shard_that_changes_during_the_run_is_noticed(change: str, when: str, folder: Path) -> None:
    path = folder / "rl" / SECOND
    good = path.read_bytes()
    error = refused(folder, reporter=Saboteur(**{when: lambda: CHANGES[change](path)}))
    assert error.exit_status == 7
    assert f"{path} changed while it was in use" in str(error)
    path.unlink(missing_ok=True)
    path.write_bytes(good)
    merged_after_all(folder)


def test_shard_that_cannot_be_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int, buffers: Any, offset: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    error = refused(folder, reporter=Saboteur(first=lambda: monkeypatch.setattr(os, "preadv", broken)))
    assert error.exit_status == 4
    assert re.search(r"safetensors: cannot be read: Input/output error", str(error))


# What looks alike and is allowed.


def test_links_that_lead_out_are_followed_when_allowed(folder: Path) -> None:
    expected = skillmerge.apply(folder / "recipe.yaml", folder / "expected").manifest["files"]
    for name in (FIRST, INDEX, "config.json"):
        moved_and_linked(f"target/{name}", f"elsewhere/{name}")(folder)
    assert refused(folder).exit_status == 4
    found = skillmerge.apply(folder / "recipe.yaml", follow_links=True).manifest["files"]
    assert found == expected


def as_hub_cache(model: str, repository: str) -> Spoil:
    """`model` becomes a snapshot of a Hub cache whose files are links to `repository`'s blobs."""

    def spoil(folder: Path) -> None:
        snapshot = folder / "hub" / f"models--acme--{model}" / "snapshots" / ("c0ffee" * 7)[:40]
        blobs = folder / "hub" / f"models--acme--{repository}" / "blobs"
        snapshot.mkdir(parents=True)
        blobs.mkdir(parents=True, exist_ok=True)
        for number, path in enumerate(sorted((folder / model).iterdir())):
            path.rename(blobs / f"{model}{number}")
            (snapshot / path.name).symlink_to(os.path.relpath(blobs / f"{model}{number}", snapshot))
        models(**{model: str(snapshot)})(folder)

    return spoil


def test_hub_cache_links_are_followed_within_their_repository(folder: Path) -> None:
    as_hub_cache("target", "target")(folder)
    merged_after_all(folder)


def test_hub_cache_links_into_another_repository_are_refused(folder: Path) -> None:
    as_hub_cache("target", "other")(folder)
    before = listing(folder)
    error = refused(folder)
    assert (error.exit_status, error.fix) == (4, "if you trust it, allow it with --follow-links")
    assert listing(folder) == before
    merged_after_all(folder, follow_links=True)


def test_hub_cache_link_past_its_blobs_is_refused(folder: Path) -> None:
    as_hub_cache("target", "target")(folder)
    (blob,) = (folder / "hub" / "models--acme--target" / "blobs").glob("target0")
    blob.rename(folder / "elsewhere")
    blob.symlink_to(folder / "elsewhere")
    assert refused(folder).exit_status == 4


def test_config_with_code_is_carried_with_its_code_when_allowed(folder: Path) -> None:
    config_has(auto_map={"AutoModel": "odd.Model"})(folder)
    file_is("target/odd.py", "class Model: ...")(folder)
    merged_after_all(folder, allow_code=True)
    for name in ("config.json", "odd.py"):
        assert (folder / "merged" / name).read_bytes() == (folder / "target" / name).read_bytes()


def test_config_with_infinity_is_what_some_models_have(folder: Path) -> None:
    config_is('{"vocab_size": 32, "time_step_limit": [0.0, Infinity]}')(folder)
    merged_after_all(folder)


def test_config_that_only_speaks_of_auto_map_runs_no_code(folder: Path) -> None:
    config_has(note="no auto_map here", letters="\\u0061")(folder)
    merged_after_all(folder)


def test_zero_sized_and_scalar_tensors_are_merged(folder: Path) -> None:
    all_of(with_tensor("empty", torch.zeros(0, 4)), with_tensor("scalar", torch.tensor(2.5)))(folder)
    merged_after_all(folder)
    assert read_checkpoint(folder / "merged")["scalar"].item() == 2.5


# As a person or a pipeline sees it.

SEEN = [
    "index: a file in the parent folder",
    "header: terminal escape in a name",
    "shard: a pipe",
    "config: auto_map",
    "misfit: shape",
    "recipe: a billion laughs",
    "recipe: python/object",
    "expression: 4,000 parentheses",
    "output: an input",
    "resources: a memory limit of 1 MB",
]


@pytest.mark.parametrize("name", SEEN)
def test_command_line_tells_what_is_wrong(name: str, folder: Path) -> None:
    (case,) = (case for case in BEFORE_WEIGHTS if case.name == name)
    case.spoil(folder)
    before = listing(folder)
    options = [part for key, value in case.options.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    done = run_cli("apply", folder / "recipe.yaml", "--json", *options)
    assert done.returncode == case.status, done.stderr
    assert done.stderr.startswith("error: ")
    assert case.phrase in done.stderr
    told = json.loads(done.stdout)
    assert (told["ok"], told["exit_status"]) == (False, case.status)
    assert case.phrase in told["message"] + str(told["fix"])
    assert listing(folder) == before


def test_command_line_tells_of_nan(folder: Path) -> None:
    case = NONFINITE[0]
    case.spoil(folder)
    done = run_cli("apply", folder / "recipe.yaml", "--device", "cpu")
    assert done.returncode == 4
    assert case.phrase in done.stderr
    assert not (folder / "merged").exists()
