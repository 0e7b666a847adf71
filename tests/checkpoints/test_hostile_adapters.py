"""Adapters that mean harm are refused soon, and nothing is written; expressions are matched as PEFT matches them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from refused_adapters import PREFIX, Q, refused, write_both
from safetensors.torch import load_file, save_file

from skillmerge.checkpoints.kinds.lora import adapter as lora
from skillmerge.checkpoints.kinds.lora.patterns import Patterns
from skillmerge.errors import InputError


def config_of(**keys: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "adapter" / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))

    return change


def text_of(text: str | bytes, name: str = "adapter_config.json") -> Callable[[Path], None]:
    return lambda folder: (
        (folder / "adapter" / name).write_bytes(text.encode() if isinstance(text, str) else text) and None
    )


def many_modules(folder: Path) -> None:
    """20,000 modules, each to be tried against expressions that backtrack as much as is allowed."""
    tensors = {f"{PREFIX}model.layers.{n}.{'a' * 100}.lora_{part}.weight": torch.zeros(1, 1)
               for n in range(20_000) for part in "AB"}  # fmt: skip
    save_file(tensors, folder / "adapter" / lora.WEIGHTS)
    config_of(rank_pattern={f".*a.*{n}b": 1 for n in range(1000)}, r=1)(folder)


def many_experts(folder: Path) -> None:
    """20,000 modules that may each hold packed experts, and 64 parameters of them."""
    names = (f"{PREFIX}model.layers.0.m{n}.experts.lora_{part}.weight" for n in range(20_000) for part in "AB")
    save_file({name: torch.zeros(1, 1) for name in names}, folder / "adapter" / lora.WEIGHTS)
    parameters = ["gate_up_proj", "gate_proj", "up_proj", "down_proj", *(f"p{n}" for n in range(60))]
    config_of(target_parameters=parameters, r=1)(folder)


def many_rows(folder: Path) -> None:
    """20,000 modules with rows, beside a table of 200,000 others."""
    names = [f"{PREFIX}m{n}.token_adapter.trainable_tokens_delta" for n in range(20_000)]
    save_file({name: torch.zeros(1, 1) for name in names}, folder / "adapter" / lora.WEIGHTS)
    tables = {f"m{n}": [0] for n in range(19_999)} | {f"n{n}": [0] for n in range(180_000)}
    config_of(trainable_token_indices=tables)(folder)


def sparse(folder: Path) -> None:
    """A matrix of 2^76 elements, of two vectors that the file has no bytes for."""
    load_file(folder / "adapter" / lora.WEIGHTS)
    names = {f"{PREFIX}{Q}.lora_A.weight": [2, 1 << 38], f"{PREFIX}{Q}.lora_B.weight": [1 << 38, 2]}
    offsets, end = {}, 0
    for name, shape in names.items():
        size = 4 * shape[0] * shape[1]
        offsets[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(offsets).encode()
    with (folder / "adapter" / lora.WEIGHTS).open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + end)


HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "10 MB of patterns": (config_of(rank_pattern={f"{n:020}": 1 for n in range(400_000)}), "acceptable size"),
    "7 MB of patterns": (config_of(rank_pattern={f"{n:020}": 1 for n in range(250_000)}), "has rank 2"),
    "too many expressions": (config_of(rank_pattern={f"{n}.*": 1 for n in range(20_000)}), "the most accepted is 1000"),
    "nested repetitions": (config_of(rank_pattern={r"(\w+)+$": 1}), "could take too long to match"),
    "alternatives in a repetition": (config_of(alpha_pattern={"(a|a)*b": 1}), "could take too long to match"),
    "optional characters": (config_of(rank_pattern={"a?" * 40 + "a" * 40: 1}), "could take too long to match"),
    "a long expression": (config_of(rank_pattern={"a*" * 1000: 1}), "could take too long to match"),
    "a reference": (config_of(rank_pattern={r"(a)\1*": 1}), "could take too long to match"),
    "looking around": (config_of(rank_pattern={"(?=a*)*b": 1}), "could take too long to match"),
    "alternatives beside each other": (config_of(rank_pattern={"(a|a|a|b)" * 12 + "c": 1}), "could take too long"),
    "parameters": (config_of(target_parameters=[f"m.p{n}" for n in range(200_000)]), "the most accepted is 64"),
    "many packed experts": (many_experts, "which base does not have"),
    "rows of many modules": (many_rows, "does not say which rows"),
    "no expression": (config_of(rank_pattern={"(q": 1}), "is not a regular expression"),
    "keys of other types": (config_of(rank_pattern={"q": "x"}), "the rank 'x'"),
    "a number without end": (text_of('{"peft_type": "LORA", "r": 2, "lora_alpha": 1e999}'), "not a number"),
    "no number": (text_of('{"peft_type": "LORA", "r": 2, "lora_alpha": NaN}'), "not a number"),
    "an enormous rank": (config_of(r=1 << 40), "a rank is a number from 1 to 65536"),
    "a key twice": (text_of('{"peft_type": "LORA", "r": 2, "r": 3}'), "is defined twice"),
    "deep nesting": (text_of('{"a":' * 100_000 + "1" + "}" * 100_000), "nested too deeply"),
    "a list": (text_of("[]"), "is not a JSON object"),
    "no text": (text_of(b"\xff\xfe\x00"), "is not valid JSON"),
    "rows of other types": (config_of(trainable_token_indices={"embed_tokens": [-1]}), "is not a list of rows"),
    "a name over several lines": (config_of(peft_type="LO\nRA\x1b[31m"), "`peft_type` is 'LO\\nRA"),
    "a matrix larger than any": (sparse, "make a matrix of shape [274877906944, 274877906944]"),
    "weights that are none": (text_of(b"x", lora.WEIGHTS), "bytes long"),
    "many modules and expressions": (many_modules, "take too long to match"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_adapter_is_refused_soon(tmp_path: Path, case: str) -> None:
    change, message = HOSTILE[case]
    write_both(tmp_path)
    if "7 MB" in case:
        config_of(r=3)(tmp_path)
    change(tmp_path)
    assert message in refused(tmp_path)


def test_matrix_that_no_model_bounds_is_bounded(tmp_path: Path) -> None:
    """Alone, an adapter says itself how large its matrices are."""
    write_both(tmp_path)
    sparse(tmp_path)
    found = refused(tmp_path, "inspect", "adapter")
    assert "makes a matrix of shape [274877906944, 274877906944]" in found


EXPRESSIONS = {
    r"^model\.layers\.0\.self_attn\.q_proj": ["model.layers.0.self_attn.q_proj"],
    "self_attn.q_proj": ["model.layers.0.self_attn.q_proj", "self_attn.q_proj"],
    r"layers\.\d+\.mlp\.(up|down)_proj": ["model.layers.10.mlp.up_proj", "layers.1.mlp.down_proj"],
    "[qk]_proj": ["model.layers.0.self_attn.q_proj"],
    r".*\.mlp\..*": ["model.layers.3.mlp.gate_proj"],
    r"layers\.(?:0|1)\..*?_proj": ["layers.1.mlp.x_proj"],
    rf"layers\.({'|'.join(map(str, range(40)))})\.(self_attn|mlp)\..*": ["layers.37.mlp.x_proj"],
}


@pytest.mark.parametrize("key", EXPRESSIONS)
def test_pattern_matches_as_pefts_does(key: str) -> None:
    names = {name for found in EXPRESSIONS.values() for name in found} | {"xself_attn.q_proj", "model", "a.mlp"}
    for name in names:
        theirs = re.match(rf"(.*\.)?({key})$", name) is not None
        assert (Patterns("x", {key: 5}).number(name) == 5) == theirs, name


def test_first_pattern_that_matches_counts() -> None:
    table = Patterns("x", {"b.c": 1, ".*c": 2, "c": 3, "a.b.c": 4})
    assert [table.number(name) for name in ("a.b.c", "x.c", "c", "d")] == [1, 2, 2, None]
    assert Patterns("x", {"c": 3, "b.c": 1, ".*c": 2}).number("a.b.c") == 3


def test_expressions_are_not_tried_on_endless_names() -> None:
    with pytest.raises(InputError, match="too long to try them on"):
        Patterns("x", {"a.*": 1}).number("b" * 300)
