"""Small files that are pointers, and those that a store states to be the donor's: what is read of them all the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from test_tokens import compared

from skillmerge.checkpoints.store import Stat, digest_of
from skillmerge.checkpoints.stores.folder import Folder
from skillmerge.errors import InputError
from skillmerge.methods.terms import Leaf

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 11421896\n"
FETCH = "fetch the files: `git lfs pull`, or `hf download ORG/NAME`"


@pytest.mark.parametrize("file", ["tokenizer.json", "chat_template.jinja"])
def test_a_pointer_in_the_place_of_a_file_of_the_donor_is_an_error(tmp_path: Path, file: str) -> None:
    with pytest.raises(InputError, match=rf"target/{file}: is a Git LFS pointer, not the file itself") as caught:
        compared(tmp_path, target={file: POINTER})
    assert caught.value.fix == FETCH


@pytest.mark.parametrize("file", ["tokenizer.json", "chat_template.jinja", "generation_config.json"])
def test_a_pointer_in_the_place_of_a_file_of_another_model_is_a_warning(tmp_path: Path, file: str) -> None:
    """Found by a review: nothing settled it, and the output needs none of these files."""
    (found,) = compared(tmp_path, rl={file: POINTER})
    message = f"model `rl`: {file}: is a Git LFS pointer, not the file itself; its tokenizer is compared as far as"
    assert (found.level, found.name, found.help) == ("warning", "tokenizer", FETCH)
    assert found.message == f"{message} other files say it"


def test_a_pointer_of_a_model_without_a_part_in_embedding_and_head_is_a_note(tmp_path: Path) -> None:
    (found,) = compared(tmp_path, rl={"tokenizer.json": POINTER}, rows=Leaf("target"))
    assert (found.level, found.name) == ("note", None)


@pytest.fixture
def stated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let folders state digests, as the Hub does."""
    listed = Folder.list

    def with_digests(store: Folder) -> dict[str, Stat]:
        return {
            name: replace(stat, digest=digest_of("sha256", (store.root / name).read_bytes()))
            for name, stat in listed(store).items()
        }

    monkeypatch.setattr(Folder, "list", with_digests)


@pytest.mark.usefixtures("stated")
def test_added_tokens_are_compared_where_the_vocabulary_is_stated_to_be_one(tmp_path: Path) -> None:
    """Found by a review: on the Hub the vocabulary was not read where its digest is that of the donor's."""
    added = {"rl": ["</think>", "<think>"], "sft": ["<think>", "</think>"], "target": ["<tool>"]}
    configs = {
        name: {"tokenizer_config.json": {"added_tokens_decoder": {
            str(14 + place): {"content": token} for place, token in enumerate(tokens)
        }}} for name, tokens in added.items()
    }  # fmt: skip
    found = compared(tmp_path, **configs)
    assert [(it.level, it.name) for it in found if it.name] == [("problem", "tokenizer")]
    assert "`<think>` is 15 in `rl`, 14 in `sft`" in found[0].message


@pytest.mark.usefixtures("stated")
def test_stop_token_of_a_vocabulary_that_is_stated_to_be_one_is_known(tmp_path: Path) -> None:
    """Found by a review: without its vocabulary, a tokenizer's own stop token was no id, and nothing was compared."""
    ends = {"target": "a", "sft": "a", "rl": {"content": "b"}}
    (found,) = compared(tmp_path, **{name: {"tokenizer_config.json": {"eos_token": end}} for name, end in ends.items()})
    assert (found.level, found.name) == ("warning", "stop-tokens")
    assert found.message.startswith("`rl` stops at 1 (`b`), and the output")
