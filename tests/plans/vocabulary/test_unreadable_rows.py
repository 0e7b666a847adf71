"""Models whose rows cannot be matched by token: what is said, and that nothing is written, soon."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import read_checkpoint, run_cli, write_checkpoint, write_recipe
from test_rows_by_hand import write_models
from token_rows import BASE, EMBEDDING, HEAD, Words, by_token, tokenizer_json

import skillmerge

ALIKE: tuple[Words, Words, Words] = ([*BASE, None], [*BASE[::-1], None], [*BASE, None])


def refused(folder: Path, **keys: Any) -> str:
    """What `apply` says: it has to end with status 4, in two seconds, and write nothing."""
    before, started = sorted(folder.iterdir()), time.process_time()
    found = run_cli("apply", write_recipe(folder, **by_token(**keys)), "-o", folder / "out")
    assert time.process_time() - started < 2
    assert found.returncode == 4, found.stderr
    assert sorted(folder.iterdir()) == sorted({*before, folder / "recipe.yaml"})
    return found.stderr


def rewritten(folder: Path, name: str, change: Any) -> None:
    path = folder / name / "tokenizer.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_model_without_a_tokenizer(tmp_path: Path) -> None:
    write_models(tmp_path, ALIKE)
    (tmp_path / "rl" / "tokenizer.json").unlink()
    said = refused(tmp_path)
    assert f"model `rl` ({tmp_path / 'rl'}) has no tokenizer files, so its rows cannot be matched by token" in said
    help = (
        "help: copy the tokenizer that it was trained with into its folder, or leave `vocabulary` out of the recipe\n"
    )
    assert help in said


def test_model_with_sentencepiece_only(tmp_path: Path) -> None:
    write_models(tmp_path, ALIKE)
    (tmp_path / "rl" / "tokenizer.json").rename(tmp_path / "rl" / "tokenizer.model")
    said = refused(tmp_path)
    assert "has only tokenizer.model, which does not name the rows of all tokens" in said
    assert (
        "help: write its tokenizer.json with transformers: `AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)`; "
        "or leave `vocabulary` out of the recipe\n"
    ) in said


@pytest.mark.parametrize("content", ["{", "[]", '{"model": {"vocab": {"a": -1}}}', '{"model": {"vocab": {"a": 1e9}}}',
                                     '{"model": {"vocab": {"a": 1, "a": 2}}}', "[" * 100_000])  # fmt: skip
def test_unreadable_tokenizers(tmp_path: Path, content: str) -> None:
    write_models(tmp_path, ALIKE)
    (tmp_path / "rl" / "tokenizer.json").write_text(content)
    said = refused(tmp_path)
    assert "its rows cannot be matched by token:" in said
    assert "help: save the tokenizer again, or leave `vocabulary` out of the recipe\n" in said


def test_pointer_in_the_place_of_a_tokenizer(tmp_path: Path) -> None:
    write_models(tmp_path, ALIKE)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 11422654\n"
    (tmp_path / "rl" / "tokenizer.json").write_text(pointer)
    said = refused(tmp_path)
    assert "tokenizer.json: is a Git LFS pointer, not the file itself\n" in said
    assert "help: fetch the files: `git lfs pull`" in said


@pytest.mark.parametrize("name", ["target", "rl"])
def test_token_with_two_ids(tmp_path: Path, name: str) -> None:
    write_models(tmp_path, ALIKE)
    added = {"id": 8, "content": "a", "special": True}
    rewritten(tmp_path, name, lambda it: it["added_tokens"].append(added))
    said = refused(tmp_path)
    first = 0 if name == "target" else 7
    assert f"a token of `{name}` has more than one id: `a` is {first} and 8\n" in said
    assert (
        f"help: check that the tokenizer of `{name}` belongs to its weights; to leave the rows of such tokens" in said
    )
    output = skillmerge.apply(write_recipe(tmp_path, **by_token(accept=["tokenizer"])), tmp_path / "out").output
    for matrix in (EMBEDDING, HEAD):
        made, ours = read_checkpoint(output)[matrix], read_checkpoint(tmp_path / "target")[matrix]
        assert torch.equal(made[[0, 8]], ours[[0, 8]])
        assert not torch.equal(made[1], ours[1])


@pytest.mark.parametrize("name", ["target", "rl"])
def test_ids_beyond_the_rows(tmp_path: Path, name: str) -> None:
    write_models(tmp_path, ALIKE)
    added = [{"id": 9 + number, "content": f"<{number}>", "special": True} for number in range(20)]
    rewritten(tmp_path, name, lambda it: it.update(added_tokens=added))
    said = refused(tmp_path)
    assert f"20 tokens of `{name}` have no row: `<0>` is 9; `<1>` is 10;" in said
    assert "`<7>` is 16; …\n" in said
    plan = skillmerge.plan(write_recipe(tmp_path, **by_token(accept=["tokenizer"])))
    assert [(it.name, it.accepted) for it in plan.compared.found if it.name == "tokenizer"] == [("tokenizer", True)]


def test_token_without_a_row_keeps_the_donors(tmp_path: Path) -> None:
    write_models(tmp_path, ([*BASE, "<x>"], [*BASE, None], [*BASE, "<x>"]))
    rewritten(tmp_path, "rl", lambda it: it.update(added_tokens=[{"id": 9, "content": "<x>", "special": True}]))
    assert "a token of `rl` has no row: `<x>` is 9\n" in refused(tmp_path)
    output = skillmerge.apply(write_recipe(tmp_path, **by_token(accept=["tokenizer"])), tmp_path / "out").output
    assert torch.equal(read_checkpoint(output)[HEAD][8], read_checkpoint(tmp_path / "target")[HEAD][8])


def test_many_tokens_without_rows_take_no_time(tmp_path: Path) -> None:
    write_models(tmp_path, ALIKE)
    words = [f"t{number}" for number in range(120_000)]
    (tmp_path / "rl" / "tokenizer.json").write_text(tokenizer_json(words))
    assert "119,991 tokens of `rl` have no row: `t9` is 9; `t10` is 10;" in refused(tmp_path)


def test_matrix_with_more_rows_than_any_vocabulary(tmp_path: Path) -> None:
    """Its file is nothing but a hole."""
    write_models(tmp_path, ALIKE)
    rows = 1 << 31
    header = json.dumps({EMBEDDING: {"dtype": "F32", "shape": [rows, 1], "data_offsets": [0, 4 * rows]}}).encode()
    header += b" " * (-len(header) % 8)
    for name in ("target", "rl", "sft"):
        with open(tmp_path / name / "model.safetensors", "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + 4 * rows)
    said = refused(tmp_path)
    assert f"model `target`: `{EMBEDDING}` has 2,147,483,648 rows, more than any vocabulary" in said


def test_rows_of_added_tokens_that_are_stored_apart(tmp_path: Path) -> None:
    write_models(tmp_path, ALIKE)
    apart = "model.embed_tokens.additional_embedding.weight"
    for name in ("target", "rl", "sft"):
        tensors = read_checkpoint(tmp_path / name)
        write_checkpoint(tmp_path / name, {**tensors, apart: torch.zeros(2, 6)}, config={"vocab_size": 9})
    by_id = run_cli("plan", write_recipe(tmp_path))
    assert by_id.returncode == 4
    assert "ids mean different tokens" in by_id.stdout
    assert "by-token" not in by_id.stdout
    said = refused(tmp_path)
    assert f"model `target` keeps the rows of added tokens apart, in `{apart}`, which `by-token` does not read" in said


def test_matrices_of_other_widths_are_the_problem_that_they_were(tmp_path: Path) -> None:
    write_models(tmp_path, ALIKE)
    tensors = read_checkpoint(tmp_path / "rl")
    wide = {name: torch.zeros(9, 7) if name in (EMBEDDING, HEAD) else it for name, it in tensors.items()}
    write_checkpoint(tmp_path / "rl", wide, config={"vocab_size": 9})
    assert "[9, 6] against [9, 7]" in refused(tmp_path)


def test_other_row_counts_without_the_key_say_what_settles_them(tmp_path: Path) -> None:
    write_models(tmp_path, (BASE, [*BASE, "<x>"], BASE))
    found = run_cli("plan", write_recipe(tmp_path))
    assert found.returncode == 4
    assert "their vocabularies seem to differ" in found.stdout
    assert "help: to give each token its own row, add to the recipe `vocabulary: by-token`\n" in found.stdout
    write_models(tmp_path, (BASE, [*BASE[::-1], "<x>"], BASE))
    both = run_cli("plan", write_recipe(tmp_path)).stdout
    assert "8 ids mean different tokens" in both
    assert "their vocabularies seem to differ" in both
    assert both.count("to give each token its own row") == 1
    (tmp_path / "rl" / "tokenizer.json").rename(tmp_path / "rl" / "tokenizer.model")
    assert "by-token" not in run_cli("plan", write_recipe(tmp_path)).stdout
    extract = ("extract", "--from", tmp_path / "target", "--minus", tmp_path / "sft", "-o", tmp_path / "skill")
    write_models(tmp_path, (BASE[::-1], BASE, BASE))
    by_token = "to give each token its own row, pass: --vocabulary by-token\n"
    assert by_token in run_cli(*extract).stderr
    assert f"help: {by_token}" in run_cli("inspect", tmp_path / "sft", tmp_path / "target").stderr


def test_two_problems_with_one_way_say_it_once(tmp_path: Path) -> None:
    write_models(tmp_path, (BASE, [*BASE[::-1], "<x>"], BASE))
    found = run_cli("plan", write_recipe(tmp_path))
    assert "ids mean different tokens" in found.stdout
    assert "their vocabularies seem to differ" in found.stdout
    assert found.stdout.count("`vocabulary: by-token`") == 1
