"""Models that are there and cannot be used: whatever is wrong, the recipe's line and the model's name are shown."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import run_cli, write_family

RECIPE = """skillmerge: 1
models:
  target: ./target
  rl: {rl}
  sft: ./sft
coefficients: {{lam: 1}}
merge: target + lam * (rl - sft)
output: {{path: ./out}}
"""
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 5\n"
FETCH = "help: fetch the files: `git lfs pull`, or `hf download ORG/NAME`\n"


def alone(*names: str) -> Callable[[Path], None]:
    """A folder with nothing but these files."""

    def make(folder: Path) -> None:
        shutil.rmtree(folder)
        folder.mkdir()
        for name in names:
            (folder / name).write_text("")

    return make


def with_file(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None  # type: ignore[func-returns-value]


def a_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")


FOUND: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "another format": (
        alone("model.gguf"), "rlx holds a GGUF model for llama.cpp, not a model in safetensors",
        'help: use the checkpoint that it was converted from; without it: `AutoModelForCausalLM.from_pretrained('
        'FOLDER, gguf_file="model.gguf").save_pretrained(NEW)`, which keeps what quantization has lost\n',
    ),
    "ranks of a trainer": (
        alone("model_world_size_2_rank_0.pt"), "rlx holds the FSDP ranks of a verl run, not a model in safetensors",
        "help: merge them: `python -m verl.model_merger merge --backend fsdp --local_dir rlx --target_dir NEW`\n",
    ),
    "a shard of two": (
        a_shard, "rlx: shard 2 of 2 is missing: only model-00001-of-00002.safetensors is there",
        "help: the checkpoint is incomplete: fetch it again, with model.safetensors.index.json\n",
    ),
    "a pointer for weights": (
        with_file("model.safetensors", POINTER), "rlx/model.safetensors: is a Git LFS pointer, not the file itself",
        FETCH,
    ),
    "a broken config": (
        with_file("config.json", "{"),
        "rlx/config.json: is not valid JSON: Expecting property name enclosed in double quotes: line 1 column 2 "
        "(char 1)",
        "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", FOUND)
def test_model_that_cannot_be_read_is_shown_in_the_recipe(tmp_path: Path, what: str) -> None:
    make, message, fix = FOUND[what]
    write_family(tmp_path, shards=1)
    (tmp_path / "rl").rename(tmp_path / "rlx")
    shutil.copytree(tmp_path / "target", tmp_path / "rl")  # whose name the other's begins with
    make(tmp_path / "rlx")
    (tmp_path / "r.yaml").write_text(RECIPE.format(rl="./rlx"))
    where = "    4 |   rl: ./rlx\n      |       ^^^^^\n"
    for command in ("plan", "apply"):
        done = run_cli(command, "r.yaml", cwd=tmp_path)
        assert (done.returncode, done.stderr) == (4, f"error: r.yaml:4:7: model `rl`: {message}\n{where}{fix}")
    assert not (tmp_path / "out").exists()


def test_model_that_a_command_names_has_no_line(tmp_path: Path) -> None:
    write_family(tmp_path, shards=1)
    a_shard(tmp_path / "rl")
    for command in (("extract", "--from", "rl", "--minus", "sft", "--output", "skill"), ("inspect", "sft", "rl")):
        done = run_cli(*command, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (
            4,
            f"error: {tmp_path / 'rl'}: shard 2 of 2 is missing: only model-00001-of-00002.safetensors is there\n"
            "help: the checkpoint is incomplete: fetch it again, with model.safetensors.index.json\n",
        )
