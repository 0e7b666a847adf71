"""What is assumed where a configuration is silent, held against the configuration classes of transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from skillmerge.plans.compare.architectures import ACTIVATIONS, DEFAULTS, TEXT_OF, WINDOW_OFF, WINDOW_PATTERNS
from skillmerge.plans.compare.config_values import effective, text_kind, text_part

pytestmark = pytest.mark.xdist_group("transformers")

SIZES = ("num_hidden_layers", "num_attention_heads", "hidden_size", "max_position_embeddings", "n_head", "n_embd",
         "n_layer", "n_positions")  # fmt: skip
"""What no configuration leaves out."""


OTHERS = (
    "apertus", "bamba", "bert", "bloom", "dbrx", "deepseek_v2", "ernie4_5", "exaone4", "falcon", "falcon_h1", "gemma3n",
    "gemma4", "glm", "glm4_moe", "gpt_bigcode", "gpt_oss", "gptj", "granitemoe", "hunyuan_v1_dense", "jamba", "lfm2",
    "llama4", "mamba2", "minimax_m2", "modernbert", "mpt", "nemotron", "nemotron_h", "olmo3", "opt", "persimmon",
    "qwen3_5", "qwen3_next", "qwen3_vl_moe", "seed_oss", "t5", "whisper", "xglm",
)  # fmt: skip
"""Architectures without defaults here: of what they leave out, nothing is concluded that could be wrong."""


def full(transformers: Any, kind: str) -> dict[str, Any]:
    """The configuration of an architecture with everything that its class assumes written out."""
    mapping = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    known = f"{kind}_text" if f"{kind}_text" in mapping else kind
    return dict(json.loads(mapping[known]().to_json_string(use_diff=False)))


def assumed(document: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a configuration of sizes alone is taken to mean, and what the full one says."""
    kind, part = text_kind(document), text_part(document)
    sizes = {key: part[key] for key in SIZES if key in part}
    return effective(sizes, kind), effective(part, kind)


@pytest.mark.parametrize("kind", DEFAULTS)
def test_default_is_that_of_the_configuration_class(transformers: Any, kind: str) -> None:
    silent, said = assumed(full(transformers, kind))
    assert {what: value for what, value in silent.items() if what in said} == {
        what: value for what, value in said.items() if what in silent
    }
    rope = {"rope base", "rope partial", "rope trained scaling", "rope scaling"} if kind != "gpt2" else set()
    assert {"head size", "key and value heads", "activation", "sliding window"} | rope <= silent.keys()


def test_nothing_is_assumed_that_any_configuration_class_contradicts(transformers: Any) -> None:
    mapping = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    wrong, seen = {}, [kind for kind in OTHERS if kind in mapping]
    for kind in seen:
        document = full(transformers, kind)
        silent, said = assumed(document)
        if found := {
            what: (silent[what], said[what]) for what in silent if what in said and silent[what] != said[what]
        }:
            wrong[kind] = found
    assert wrong == {}
    assert len(seen) > len(OTHERS) / 2


def test_names_of_architectures_are_those_of_the_library(transformers: Any) -> None:
    mapping = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    named = {*TEXT_OF, *TEXT_OF.values(), *WINDOW_OFF, *WINDOW_PATTERNS, *DEFAULTS}
    assert {kind for kind in named if kind not in mapping} == set()


def test_activations_of_one_name_compute_one_function(transformers: Any) -> None:
    import torch
    from transformers.activations import ACT2FN

    values = torch.linspace(-6, 6, 101)
    for spelling, name in ACTIVATIONS.items():
        if spelling in ACT2FN and name in ACT2FN:
            torch.testing.assert_close(ACT2FN[spelling](values), ACT2FN[name](values), atol=1e-5, rtol=1e-5)


def test_old_and_new_files_of_one_model_mean_the_same(transformers: Any, tmp_path: Path) -> None:
    """What the library saves today of a configuration that version 4 wrote."""
    from old_configs import OLD

    for name, old in OLD.items():
        (tmp_path / "config.json").write_text(json.dumps(old))
        saved = json.loads(transformers.AutoConfig.from_pretrained(tmp_path).to_json_string(use_diff=True))
        before, after = (effective(text_part(each), text_kind(each)) for each in (old, saved))
        shared = before.keys() & after.keys()
        assert {what: before[what] for what in shared} == {what: after[what] for what in shared}, name
        assert text_kind(old) == text_kind(saved)
