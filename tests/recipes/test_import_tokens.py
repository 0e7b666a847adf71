"""`import` of what mergekit says about tokens: by token where that says the same, and refused where it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import numpy_of
from token_rows import BASE, EMBEDDING, HEAD, Words, write_model

import skillmerge
from skillmerge.errors import RecipeError
from skillmerge.recipes import yamltext
from skillmerge.recipes.mergekit.importing import Imported

OTHER = [*"hgfedcba"]


def imported(folder: Path, **document: Any) -> Imported:
    plain = {
        "merge_method": "task_arithmetic",
        "base_model": "./base",
        "parameters": {"weight": 0.5},
        "dtype": "float32",
    }
    (folder / "mergekit.yml").write_text(json.dumps({**plain, "models": [{"model": "./a"}], **document}, indent=1))
    return skillmerge.import_recipe(folder / "mergekit.yml", folder / "recipe.yaml", overwrite=True)


def keys(made: Imported) -> dict[str, Any]:
    data = yamltext.read(made.text, "recipe.yaml").data
    return {key: data[key] for key in ("vocabulary", "tokens") if key in data}


def models(folder: Path, **words: Words) -> None:
    for seed, (name, these) in enumerate(words.items()):
        write_model(folder / name, these, seed)


def rows(folder: Path, words: Words, name: str = EMBEDDING) -> dict[str | None, np.ndarray]:
    return dict(zip(words, numpy_of(folder)[name], strict=True))


@pytest.mark.parametrize("source", ["base", "./base", "union"])
def test_rows_of_the_same_tokens_are_merged(source: str, tmp_path: Path) -> None:
    models(tmp_path, base=BASE, a=OTHER)
    made = imported(tmp_path, tokenizer_source=source)
    assert keys(made) == {"vocabulary": "by-token"}
    assert made.warnings == []
    assert skillmerge.lint(tmp_path / "recipe.yaml").findings == ()
    skillmerge.apply(tmp_path / "recipe.yaml")
    for name in (EMBEDDING, HEAD):
        base, a, merged = (rows(tmp_path / folder, words, name) for folder, words in
                           (("base", BASE), ("a", OTHER), ("merged", BASE)))  # fmt: skip
        for token in BASE:
            wanted = base[token].astype(np.float64) + 0.5 * (a[token].astype(np.float64) - base[token])
            assert np.allclose(merged[token], wanted, rtol=0, atol=1e-9), token


def test_tokenizers_that_are_the_same_need_no_key(tmp_path: Path) -> None:
    models(tmp_path, base=BASE, a=BASE)
    assert keys(imported(tmp_path, tokenizer_source="union")) == {}
    assert keys(imported(tmp_path, tokenizer_source="base")) == {}
    assert keys(imported(tmp_path)) == {}


def test_union_is_the_model_that_has_all_tokens(tmp_path: Path) -> None:
    models(tmp_path, base=BASE, a=[*BASE, "<think>"])
    made = imported(tmp_path, tokenizer={"source": "union"})
    assert yamltext.read(made.text, "r").data["output"]["like"] == "a"
    assert keys(made) == {"vocabulary": "by-token"}
    skillmerge.apply(tmp_path / "recipe.yaml")
    a, merged = (rows(tmp_path / folder, [*BASE, "<think>"]) for folder in ("a", "merged"))
    assert np.array_equal(a["<think>"], merged["<think>"])


def test_union_that_no_model_has_is_refused_with_a_token_that_is_missing(tmp_path: Path) -> None:
    models(tmp_path, base=[*BASE, "<tool>"], a=[*BASE, "<think>"])
    with pytest.raises(RecipeError, match="`base` has most of them, and lacks `<think>`"):
        imported(tmp_path, tokenizer_source="union")
    assert keys(imported(tmp_path, tokenizer_source="base")) == {"vocabulary": "by-token"}


def test_tokens_that_only_some_models_have_are_warned_of(tmp_path: Path) -> None:
    models(tmp_path, base=[*BASE, "<think>"], a=[*BASE, "<think>"], b=BASE)
    made = imported(tmp_path, models=[{"model": "./a"}, {"model": "./b"}], tokenizer_source="base")
    assert [remark.message.partition(":")[0] for remark in made.warnings] == [
        "1 token is in some models only, such as `<think>`"
    ]


def test_forced_rows_are_taken_whole(tmp_path: Path) -> None:
    models(tmp_path, base=[*BASE, "<think>"], a=["<think>", *OTHER])
    tokens = {"<think>": {"source": "./a", "force": True}, "yes": {"source": {"model": "./a"}, "force": True}}
    made = imported(tmp_path, tokenizer={"source": "base", "tokens": dict(list(tokens.items())[:1])})
    assert keys(made) == {"vocabulary": "by-token", "tokens": {"<think>": {"from": "a"}}}
    skillmerge.apply(tmp_path / "recipe.yaml")
    a, merged = rows(tmp_path / "a", ["<think>", *OTHER]), rows(tmp_path / "merged", [*BASE, "<think>"])
    assert np.array_equal(merged["<think>"], a["<think>"])
    assert not np.array_equal(merged["a"], a["a"])
    made = imported(tmp_path, tokenizer={"source": "base", "tokens": tokens})
    assert keys(made)["tokens"]["yes"] == {"from": "a"}


def test_what_is_not_known_stays_as_it_was(tmp_path: Path) -> None:
    models(tmp_path, base=BASE, a=OTHER)
    (tmp_path / "a" / "tokenizer.json").write_text("{")
    made = imported(tmp_path, tokenizer_source="base")
    assert keys(made) == {}
    assert any("embeddings keep their size" in remark.message for remark in made.remarks)
    with pytest.raises(RecipeError, match="the tokenizers are not in folders here to compare"):
        imported(tmp_path, tokenizer_source="union")
