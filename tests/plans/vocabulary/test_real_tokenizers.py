"""Models and tokenizers that transformers and tokenizers wrote, with tokens added in other orders: the merged model
loads, and a token that the others lack is the target's still."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import read_checkpoint, run_cli, write_recipe
from token_rows import EMBEDDING, HEAD, by_token

import skillmerge

pytestmark = pytest.mark.xdist_group("transformers")

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

ADDED = {"target": ["<tool>"], "sft": ["<think>", "</think>", "<tool>"], "rl": ["</think>", "<think>", "<tool>"]}
CORPUS = ["the cat sat on the mat", "a dog ran in the sun", "it is what it is"]


def tokenizer(added: list[str]) -> Any:
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=None))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=60, special_tokens=["<eos>"], show_progress=False)
    raw.train_from_iterator(CORPUS, trainer)
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<eos>")
    made.add_special_tokens({"additional_special_tokens": added})
    return made


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def family(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=request.param, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(config).state_dict()
    for number, (name, added) in enumerate(ADDED.items()):
        words = tokenizer(added)
        config.vocab_size = 60
        model = transformers.LlamaForCausalLM(config)
        model.load_state_dict(base)
        model.resize_token_embeddings(len(words), pad_to_multiple_of=[None, 64, 7][number])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.01 * torch.randn_like(parameter)
        model.save_pretrained(tmp_path / name)
        words.save_pretrained(tmp_path / name)
    return tmp_path


def test_merged_model_loads_and_has_every_tokens_row(family: Path) -> None:
    assert run_cli("plan", write_recipe(family)).returncode == 4
    output = skillmerge.apply(write_recipe(family, **by_token()), family / "out").output
    model = transformers.AutoModelForCausalLM.from_pretrained(output)
    words = transformers.AutoTokenizer.from_pretrained(output)
    rows, tokens = {}, {}
    for name in ADDED:
        rows[name] = read_checkpoint(family / name)[EMBEDDING]
        tokens[name] = transformers.AutoTokenizer.from_pretrained(family / name).get_vocab()
    found = model.get_input_embeddings().weight
    assert found.shape[0] == len(words)
    for text, row in words.get_vocab().items():
        target, rl, sft = (rows[name][tokens[name][text]].double() for name in ("target", "rl", "sft"))
        assert torch.equal(found[row], (target - 0.7 * (sft - rl)).float()), text
    head = read_checkpoint(output).get(HEAD)
    assert (head is None) == model.config.tie_word_embeddings
    ids = words("the cat <tool>", return_tensors="pt").input_ids
    assert torch.isfinite(model(ids).logits).all()


def test_thinking_tokens_come_from_rl_where_its_tokenizer_is_the_outputs(family: Path) -> None:
    tokens = {"<think>": {"from": "sft"}}
    output = skillmerge.apply(
        write_recipe(family, **by_token(output={"like": "rl"}, tokens=tokens)), family / "out"
    ).output
    made, words = read_checkpoint(output)[EMBEDDING], transformers.AutoTokenizer.from_pretrained(output).get_vocab()
    rl, sft = (read_checkpoint(family / name)[EMBEDDING] for name in ("rl", "sft"))
    theirs = transformers.AutoTokenizer.from_pretrained(family / "sft").get_vocab()
    assert torch.equal(made[words["</think>"]], rl[words["</think>"]])
    assert torch.equal(made[words["<think>"]], sft[theirs["<think>"]])
    assert torch.equal(made[len(words) :], rl[len(words) :])
