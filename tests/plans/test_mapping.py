"""Where elements come from: sources by name or by tie, and the runs that they are made of."""

from __future__ import annotations

from pathlib import Path

import torch
from conftest import random_tensors, write_checkpoint

from skillmerge.checkpoints.kinds.table import open_folder
from skillmerge.plans.mapping import Run, Source, find_source


def test_source_is_one_run_of_the_same_elements() -> None:
    assert list(Source("rl", "model.norm.weight").runs(65_536, 131_072)) == [
        Run("rl", "model.norm.weight", 65_536, 131_072)
    ]


def test_source_reads_as_a_pair() -> None:
    model, tensor = Source("rl", "w")
    assert (model, tensor) == ("rl", "w")


def test_source_has_the_name_or_is_what_the_config_ties(tmp_path: Path) -> None:
    shapes = {"model.embed_tokens.weight": (8, 4), "model.norm.weight": (4,)}
    tied = write_checkpoint(
        tmp_path / "tied", random_tensors(shapes, torch.float32), config={"tie_word_embeddings": True}
    )
    loose = write_checkpoint(tmp_path / "loose", random_tensors({**shapes, "lm_head.weight": (8, 4)}, torch.float32))
    donor, other = (open_folder(str(folder), folder) for folder in (loose, tied))
    norm, head = donor.tensors["model.norm.weight"], donor.tensors["lm_head.weight"]
    assert find_source(norm, "sft", other) == Source("sft", "model.norm.weight")
    assert find_source(head, "sft", other) == Source("sft", "model.embed_tokens.weight")
    bare = write_checkpoint(tmp_path / "bare", random_tensors(shapes, torch.float32))
    assert find_source(head, "rl", open_folder(str(bare), bare)) is None
