"""`import` of real files of mergekit: its examples, and recipes from public model cards."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_tensors, run_cli, tensor_shapes, write_checkpoint
from mergekit_files import FILES, File

import skillmerge
from skillmerge.errors import RecipeError
from skillmerge.recipes import yamltext


def models_of(text: str) -> Mapping[str, Any]:
    return yamltext.read(text, "recipe.yaml").data["models"]  # type: ignore[no-any-return]


def with_tiny_models(text: str, folder: Path, layers: int) -> Path:
    """The recipe with its models in folders, tiny ones of as many layers, which exist; the path of its file."""
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": layers}
    base = random_tensors(tensor_shapes(layers=layers, hidden=4, vocabulary=8), torch.float32)
    for seed, (name, place) in enumerate(models_of(text).items()):
        if not isinstance(place, str):
            continue  # a stack
        update = random_tensors(tensor_shapes(layers=layers, hidden=4, vocabulary=8), torch.float32, seed + 1, 1e-3)
        tensors = {key: tensor + update[key] for key, tensor in base.items()}
        write_checkpoint(folder / name, tensors, config={**config, "vocab_size": 8, "tie_word_embeddings": False})
        for written in (place, json.dumps(place)):
            text = re.sub(rf"(?m)^(  {name}: ){re.escape(written)}$", rf"\g<1>./{name}", text)
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def told(stack: list[dict[str, str]]) -> str:
    return ", ".join(f"{part['from']} {part['layers']}" for part in stack)


def said(found: list[str], wanted: tuple[str, ...]) -> None:
    """Each message has the words of one that is wanted, and none is left."""
    left = list(found)
    for words in wanted:
        message = next((message for message in left if words in message), None)
        assert message is not None, (words, found)
        left.remove(message)
    assert left == []


@pytest.mark.parametrize("name", [name for name, file in FILES.items() if file.refused is None])
def test_file_becomes_a_recipe_that_lints_and_plans(name: str, tmp_path: Path) -> None:
    file = FILES[name]
    (tmp_path / "mergekit.yml").write_text(file.text)
    made = skillmerge.import_recipe(tmp_path / "mergekit.yml", document=file.document, layers=file.layers)
    said([remark.message for remark in made.warnings], file.warnings)
    said(made.as_dict()["notes"], file.notes)
    for remark in made.remarks:
        assert remark.message in " ".join(made.text.replace("#", " ").split())
    assert max(map(len, made.text.splitlines())) <= 120
    if file.merge:
        merge = " ".join(str(yamltext.read(made.text, "r").data["merge"]).split())
        assert merge.replace("( ", "(") == file.merge
    assert {name: told(it["stack"]) for name, it in models_of(made.text).items() if isinstance(it, dict)} == file.stacks
    (tmp_path / "as_written.yaml").write_text(made.text)
    found = skillmerge.lint(tmp_path / "as_written.yaml").findings
    assert {finding.rule.id for finding in found} <= {"unpinned-revision"}
    recipe = with_tiny_models(made.text, tmp_path, file.layers)
    assert skillmerge.lint(recipe).findings == ()
    assert skillmerge.plan(recipe).problems == ()


@pytest.mark.parametrize("name", [name for name, file in FILES.items() if file.refused is not None])
def test_file_is_refused_at_its_place(name: str, tmp_path: Path) -> None:
    file = FILES[name]
    assert file.refused is not None
    words, line = file.refused
    (tmp_path / "mergekit.yml").write_text(file.text)
    process = run_cli("import", "mergekit.yml", "-o", "r.yaml", "--layers", file.layers, cwd=tmp_path)
    first = process.stderr.splitlines()[0]
    assert process.returncode == 2
    assert first.startswith(f"error: mergekit.yml:{line}:"), process.stderr
    assert words in first
    assert "\nhelp: " in process.stderr
    assert not (tmp_path / "r.yaml").exists()


def test_later_document_reads_the_output_of_an_earlier_one(tmp_path: Path) -> None:
    file = FILES["YOYO-AI/Qwen2.5-7B-YOYO-super"]
    (tmp_path / "m.yml").write_text(file.text)
    first, second = (
        skillmerge.import_recipe(tmp_path / "m.yml", document=f"Qwen2.5-7B-YOYO-{number}").text for number in (1, 2)
    )
    assert yamltext.read(first, "r").data["output"]["path"] == "./Qwen2.5-7B-YOYO-1"
    assert next(iter(models_of(second).values())) == "./Qwen2.5-7B-YOYO-1"
    with pytest.raises(RecipeError, match=r"there are 2 merges in this file: Qwen2\.5-7B-YOYO-1, Qwen2\.5-7B-YOYO-2"):
        skillmerge.import_recipe(tmp_path / "m.yml")


def test_files_are_the_six_examples_and_thirteen_of_the_public() -> None:
    assert len(FILES) == 6 + 13
    assert sum("/" in name for name in FILES) == 13
    assert all(isinstance(file, File) for file in FILES.values())
