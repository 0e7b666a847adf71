"""Two models that share little: `inspect` measures what they share, and first says how much that leaves out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import read_checkpoint, run_cli, write_checkpoint, write_family

import skillmerge

Tensors = dict[str, torch.Tensor]


def changed(folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    tensors = change(read_checkpoint(folder))
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    return write_checkpoint(folder, tensors)


def prefixed(tensors: Tensors) -> Tensors:
    return {f"language_{name}" if name.startswith("model.layers") else name: it for name, it in tensors.items()}


def without_mlp(tensors: Tensors) -> Tensors:
    return {name: it for name, it in tensors.items() if ".mlp." not in name}


def narrow(tensors: Tensors) -> Tensors:
    return {name: it[:, :1].clone() if ".mlp." in name and it.dim() == 2 else it for name, it in tensors.items()}


LEFT = "of the parameters are not compared, and the figures say nothing about them: "


def test_names_under_a_prefix_come_with_the_rename(tmp_path: Path) -> None:
    """Found by a newcomer: `100.0% of its energy is in embedding tensors` stood over a twentieth of the model."""
    write_family(tmp_path)
    changed(tmp_path / "rl", prefixed)
    process = run_cli("inspect", tmp_path / "sft", tmp_path / "rl", "-q")
    first, fix, line, *_ = process.stderr.splitlines()
    assert first.endswith(
        f"{LEFT}`{tmp_path / 'sft'}` has the tensors of `{tmp_path / 'rl'}` under other names: `model.layers.…` for "
        "`language_model.layers.…`"
    )
    assert fix.startswith("help: to read one under the other's names, write a recipe with `output: {kind: skill}`")
    assert (
        line
        == f'  before: {{path: {tmp_path / "sft"}, rename: [{{from: "model.layers.", to: "language_model.layers."}}]}}'
    )


@pytest.mark.parametrize(
    ("change", "which", "what"),
    [
        (without_mlp, "rl", "only `{sft}` has model.layers.0.mlp."),
        (without_mlp, "sft", "only `{rl}` has model.layers.0.mlp."),
        (narrow, "rl", "of other shapes are model.layers.0.mlp."),
        (narrow, "sft", "of other shapes are model.layers.0.mlp."),
    ],
)  # fmt: skip
def test_what_one_model_lacks_is_a_warning(
    change: Callable[[Tensors], Tensors], which: str, what: str, tmp_path: Path
) -> None:
    write_family(tmp_path)
    changed(tmp_path / which, change)
    [remark] = skillmerge.inspect(str(tmp_path / "sft"), str(tmp_path / "rl"), stats="off").remarks
    assert LEFT + what.format(rl=tmp_path / "rl", sft=tmp_path / "sft") in remark.message
    assert remark.fix == "check that both are the right models, and complete"


def test_a_norm_more_is_no_warning(tmp_path: Path) -> None:
    write_family(tmp_path)
    changed(tmp_path / "rl", lambda tensors: tensors | {"model.more.weight": torch.ones(2)})
    assert skillmerge.inspect(str(tmp_path / "sft"), str(tmp_path / "rl"), stats="off").remarks == ()
