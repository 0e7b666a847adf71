"""Which files are carried from the donor, byte for byte, and the one edit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import skillmerge
from skillmerge.errors import InputError
from skillmerge.plans.side_files import with_dtype

CARRIED = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "preprocessor_config.json",
    "LICENSE",
    "1_Pooling/config.json",
    "additional_chat_templates/tool.jinja",
]
LEFT = [
    "README.md",
    "modeling_custom.py",
    "pytorch_model.bin",
    "optimizer.pt",
    "training_args.bin",
    "trainer_state.json",
    "all_results.json",
    ".gitattributes",
    "checkpoint-500/config.json",
    "runs/events.out.tfevents.1",
    "onnx/config.json",
    "skillmerge.manifest.json",
]


def test_side_files_are_carried_byte_for_byte_and_leftovers_are_not(family: Path) -> None:
    donor = family.parent / "target"
    for number, name in enumerate([*CARRIED, *LEFT]):
        (donor / name).parent.mkdir(exist_ok=True)
        (donor / name).write_bytes(b'{\r\n "odd"   :  "bytes %d"}' % number)
    output = skillmerge.apply(family).output
    found = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    ours = {"skillmerge.manifest.json", "skillmerge.run.json", "model.safetensors.index.json"}
    shards = {f"model-0000{number}-of-00002.safetensors" for number in (1, 2)}
    assert found == set(CARRIED) | ours | shards
    for name in CARRIED:
        assert (output / name).read_bytes() == (donor / name).read_bytes()


def test_config_keeps_every_byte_but_the_dtypes() -> None:
    config = b'{\n\t"torch_dtype" :"bfloat16",  "text_config": {"dtype": "bfloat16"}, "note": "bfloat16"}\r\n'
    wanted = b'{\n\t"torch_dtype" :"float32",  "text_config": {"dtype": "float32"}, "note": "bfloat16"}\r\n'
    assert with_dtype(config, "float32") == wanted


def test_config_is_edited_only_where_the_dtype_changes(family: Path, edit: Callable[..., Path]) -> None:
    config = family.parent / "target" / "config.json"
    config.write_text('{"torch_dtype":   "bfloat16"}')
    assert (skillmerge.apply(family).output / "config.json").read_text() == config.read_text()
    edit(family, output={"path": "wide", "dtype": "float32"})
    assert json.loads((skillmerge.apply(family).output / "config.json").read_text()) == {"torch_dtype": "float32"}


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "preprocessor_config.json"])
def test_code_that_runs_on_loading_is_refused_unless_allowed(family: Path, name: str) -> None:
    donor = family.parent / "target"
    (donor / name).write_text(json.dumps({"nested": {"auto_map": {"AutoModel": "modeling_custom.Model"}}}))
    (donor / "modeling_custom.py").write_text("print('hello')")
    with pytest.raises(InputError, match=r"modeling_custom\.Model"):
        skillmerge.plan(family)
    output = skillmerge.apply(family, allow_code=True).output
    assert (output / "modeling_custom.py").exists()
