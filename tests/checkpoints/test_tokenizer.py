"""Tokenizers read from files: what libraries save again is equal, and nothing hostile gets through."""

from __future__ import annotations

import base64
import json
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_checkpoint
from hub_server import HubServer

from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.checkpoints.kinds.table import open_as, open_folder
from skillmerge.checkpoints.place import Location
from skillmerge.checkpoints.stores.hub import Repository
from skillmerge.checkpoints.tokenizers import small_files
from skillmerge.checkpoints.tokenizers.small_files import SmallFiles
from skillmerge.checkpoints.tokenizers.tokenizer import Tokenizer, read_tokenizer
from skillmerge.plans.compare.roles import Role
from skillmerge.plans.compare.tokens import compare_tokens

SAVED = Path(__file__).parent / "tokenizers.tar.gz"
"""Tiny tokenizers trained with tokenizers 0.22 and sentencepiece 0.2.3, saved by transformers 4.57 (slow and fast,
`4-…`) and saved again by transformers 5.23 (`5-…`)."""

EMBEDDING = "model.embed_tokens.weight"
ROLES = {
    "target": Role(True, False, frozenset([EMBEDDING])),
    "rl": Role(True, False, frozenset([EMBEDDING])),
    "sft": Role(False, True, frozenset([EMBEDDING])),
}

FAMILIES = ("bert", "gemma", "gpt2", "llama", "qwen2", "t5")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers")
    with tarfile.open(SAVED) as archive:
        archive.extractall(folder, filter="data") if hasattr(tarfile, "data_filter") else archive.extractall(folder)
    return folder


def read(folder: Path, files: SmallFiles | None = None) -> Tokenizer:
    """The tokenizer of a model with the files of `folder`."""
    write_checkpoint(folder, {"model.norm.weight": torch.zeros(2)})
    return read_tokenizer(open_folder("m", folder), files or SmallFiles())


def assert_alike(one: Tokenizer, other: Tokenizer) -> None:
    plain = [{number: {"<0x09>": "\t"}.get(text, text) for number, text in it.tokens.items()} for it in (one, other)]
    assert all(plain[0][number] == plain[1][number] for number in plain[0].keys() & plain[1].keys())
    # What a library adds when it saves again lies above the rest.
    assert plain[0].keys() ^ plain[1].keys() <= {max(plain[0].keys() | plain[1].keys())}
    parts = one.tokenization.keys() & other.tokenization.keys()
    assert {part: one.tokenization[part] for part in parts} == {part: other.tokenization[part] for part in parts}
    assert (one.stop, one.pad, one.bos) == (other.stop, other.pad, other.bos)
    assert one.unread == other.unread == ()


@pytest.mark.parametrize("family", FAMILIES)
def test_resaved_tokenizers_are_alike(saved: Path, family: str) -> None:
    folders = sorted((saved / family).iterdir())
    assert len(folders) >= 4
    first, *others = [read(folder) for folder in folders]
    assert len(first.tokens) > 200
    for other in others:
        assert_alike(first, other)


@pytest.mark.parametrize("family", FAMILIES)
def test_resaved_tokenizers_give_no_problem_and_no_warning(saved: Path, tmp_path: Path, family: str) -> None:
    folders = sorted((saved / family).iterdir())
    for number, folder in enumerate(folders):
        models = {}
        for name, source in zip(ROLES, [folder, *folders[number + 1 :], *folders], strict=False):
            place = _copy(source, tmp_path / str(number) / name)
            models[name] = open_folder(name, write_checkpoint(place, {EMBEDDING: torch.zeros(500, 2)}))
        assert {it.level for it in compare_tokens(models, "target", ROLES)} <= {"note"}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_installed_library_saves_tokenizers_that_are_alike(saved: Path, tmp_path: Path, family: str) -> None:
    transformers = pytest.importorskip("transformers")
    for kind in ("4-fast", "5-fast"):
        once, twice = tmp_path / kind / "once", tmp_path / kind / "twice"
        transformers.AutoTokenizer.from_pretrained(saved / family / kind).save_pretrained(once)
        transformers.PreTrainedTokenizerFast.from_pretrained(once).save_pretrained(twice)
        added = transformers.AutoTokenizer.from_pretrained(once)
        size = len(added)
        added.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<tool>"]})
        added.save_pretrained(tmp_path / kind / "added")
        original, resaved, again, more = map(read, (saved / family / kind, once, twice, tmp_path / kind / "added"))
        assert_alike(original, resaved)
        assert_alike(resaved, again)
        assert "<tool>" in more.tokens.values()
        assert {number: more.tokens[number] for number in range(size)} == resaved.tokens
        assert more.tokenization == resaved.tokenization


def test_every_file_of_a_vocabulary_says_the_same(saved: Path) -> None:
    """Ids and texts as the libraries' own readers give them, from whichever file they are read."""
    from tokenizers import Tokenizer as Library

    for family in FAMILIES:
        library = Library.from_file(str(saved / family / "4-fast" / "tokenizer.json"))
        expected = {number: text for text, number in library.get_vocab().items()}
        assert read(saved / family / "4-fast").tokens == expected


def test_added_tokens_are_found_in_each_of_their_places(tmp_path: Path) -> None:
    places: list[dict[str, Any]] = [
        {"vocab.json": {"a": 0}, "added_tokens.json": {"<tool>": 1}},
        {"vocab.json": {"a": 0}, "tokenizer_config.json": {"added_tokens_decoder": {"1": {"content": "<tool>"}}}},
        {"tokenizer.json": {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1, "content": "<tool>"}]}},
        {"tokenizer.json": {"model": {"vocab": {"a": 0}}},
         "tokenizer_config.json": {"added_tokens_decoder": {"1": {"content": "<tool>"}}}},
        {"tokenizer.json": {"model": {"vocab": [["a", 0.0], ["<tool>", -1.5]]}}},
    ]  # fmt: skip
    for number, files in enumerate(places):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content))
        assert read(folder).tokens == {0: "a", 1: "<tool>"}, files


def test_ranks_of_bytes_are_read_as_byte_level_tokens(saved: Path, tmp_path: Path) -> None:
    from tokenizers.decoders import ByteLevel

    tokens = read(saved / "gpt2" / "4-fast").tokens
    plain = {number: text for number, text in tokens.items() if not text.startswith("<|")}
    raw = {number: bytes(_BYTES[character] for character in text) for number, text in plain.items()}
    assert raw[max(raw)].decode() == ByteLevel().decode([plain[max(raw)]])
    ranks = b"".join(base64.b64encode(text) + b" %d\n" % number for number, text in raw.items())
    tekken = {
        "config": {"default_num_special_tokens": 1},
        "vocab": [{"rank": n - 1, "token_bytes": base64.b64encode(text).decode()} for n, text in raw.items()],
        "special_tokens": [{"rank": 0, "token_str": "<|endoftext|>"}],
    }
    for name, content, expected in [
        ("qwen.tiktoken", ranks, plain),
        ("tokenizer.model", ranks, plain),
        ("tekken.json", json.dumps(tekken).encode(), tokens),
    ]:
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_bytes(content)
        assert read(folder).tokens == expected


def test_ranks_that_a_tekken_file_does_not_use_are_no_tokens(tmp_path: Path) -> None:
    """Mistral's files rank more tokens than their models have."""
    ranks = [{"rank": n, "token_bytes": base64.b64encode(bytes([97 + n])).decode()} for n in range(5)]
    special = [{"rank": n, "token_str": f"<{n}>"} for n in range(2)]
    config = {"default_num_special_tokens": 2, "default_vocab_size": 5}
    (tmp_path / "tekken.json").write_text(json.dumps({"config": config, "vocab": ranks, "special_tokens": special}))
    assert read(tmp_path).tokens == {0: "<0>", 1: "<1>", 2: "a", 3: "b", 4: "c"}


_BYTES = {
    character: byte
    for byte, character in enumerate(
        [chr(256 + n) for n in range(33)] + [chr(n) for n in range(33, 127)]
        + [chr(256 + n) for n in range(33, 67)] + [chr(n) for n in range(161, 173)] + [chr(256 + 67)]
        + [chr(n) for n in range(174, 256)]
    )
}  # fmt: skip
"""GPT-2's table, written down in another way than the module's."""


def test_line_ends_of_other_systems_are_no_tokens(tmp_path: Path) -> None:
    tokens = []
    for name, end in (("unix", b"\n"), ("windows", b"\r\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vocab.txt").write_bytes(end.join([b"[PAD]", b"a", b"b", b""]))
        tokens.append(read(tmp_path / name).tokens)
    assert tokens == [{0: "[PAD]", 1: "a", 2: "b"}] * 2


def test_ids_that_code_moves_are_not_compared(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes((saved / "t5" / "4-slow" / "spiece.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PegasusTokenizer"}')
    assert read(tmp_path).tokens == {}


SPOILT: dict[str, tuple[str, bytes]] = {
    "not JSON": ("tokenizer.json", b"{"),
    "not text": ("tokenizer.json", b"\xff\xfe"),
    "a list": ("tokenizer.json", b"[]"),
    "no vocabulary": ("tokenizer.json", b"{}"),
    "a key twice": ("tokenizer.json", b'{"model": {"vocab": {"a": 0, "a": 1}}}'),
    "nested": ("tokenizer.json", b'{"normalizer": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
    "nested tables": (
        "tokenizer.json",
        b'{"model": {"vocab": {}}, "normalizer": ' + b'{"normalizers": [' * 900 + b"]}" * 900 + b"}",
    ),
    "an id that is a text": ("tokenizer.json", b'{"model": {"vocab": {"a": "0"}}}'),
    "an id that is true": ("vocab.json", b'{"a": true}'),
    "a negative id": ("vocab.json", b'{"a": -1}'),
    "an endless id": ("vocab.json", b'{"a": ' + b"9" * 5000 + b"}"),
    "a merge of three": ("tokenizer.json", b'{"model": {"vocab": {"a": 0}, "merges": [["a", "b", "c"]]}}'),
    "a merge of numbers": ("tokenizer.json", b'{"model": {"vocab": {"a": 0}, "merges": [[1, 2]]}}'),
    "a score that is a text": ("tokenizer.json", b'{"model": {"vocab": [["a", "0"]]}}'),
    "a piece that is none": ("tokenizer.json", b'{"model": {"vocab": [[]]}}'),
    "an added token that is a number": ("tokenizer.json", b'{"model": {"vocab": {}}, "added_tokens": [1]}'),
    "added tokens that are a number": ("tokenizer.json", b'{"model": {"vocab": {}}, "added_tokens": 1}'),
    "a normalizer that is a number": ("tokenizer.json", b'{"model": {"vocab": {}}, "normalizer": 1}'),
    "bulk": ("tokenizer.json", b'{"model": [' + b"0," * 6_000_000 + b"0]}"),
    "sentencepiece cut off": ("tokenizer.model", b"\x0a\x7f\x0a\x01a"),
    "sentencepiece without pieces": ("tokenizer.model", b"\x12\x00"),
    "an endless number": ("tokenizer.model", b"\x0a" + b"\xff" * 40),
    "a group": ("tokenizer.model", b"\x0b\x0c"),
    "a piece without text": ("tokenizer.model", b"\x0a\x02\x18\x01"),
    "empty": ("tokenizer.model", b""),
    "no base64": ("a.tiktoken", b"!!!! 1\n"),
    "no rank": ("a.tiktoken", b"YQ==\n"),
    "tekken without ranks": ("tekken.json", b"{}"),
    "tekken whose special tokens are true": ("tekken.json", b'{"config": {}, "vocab": [], "special_tokens": true}'),
    "tekken whose special tokens are a table": ("tekken.json", b'{"config": {}, "vocab": [], "special_tokens": {}}'),
    "a score without end": ("tokenizer.json", b'{"model": {"vocab": [["a", 1' + b"0" * 400 + b"]]}}"),
    "too many tokens": ("tokenizer.json", b'{"model": {"vocab": [' + b"[]," * (1 << 20) + b"[]]}}"),
    "too many added": ("tokenizer.json", b'{"model": {"vocab": {}}, "added_tokens": [' + b"0," * (1 << 20) + b"0]}"),
    "too many lines": ("vocab.txt", b"\n" * (2 << 20)),
    "too many ranks": ("qwen.tiktoken", b"\r" * (2 << 20)),
    "too many fields": ("tokenizer.model", b"\x10\x01" * (2 << 20)),
    "a piece of too many fields": ("tokenizer.model", b"\x0a\x20" + b"\x10\x01" * 16),
    "tekken of numbers": ("tekken.json", b'{"config": {}, "vocab": [1]}'),
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_a_file_that_is_not_what_its_name_says_is_named(tmp_path: Path, spoilt: str) -> None:
    name, content = SPOILT[spoilt]
    (tmp_path / name).write_bytes(content)
    found = read(tmp_path)
    assert found.tokens == {}
    [message] = found.unread
    assert message.startswith(f"{tmp_path / name}: cannot be read: ")
    assert len(message) < 300 + len(str(tmp_path))
    expected = {
        "bulk": "it has more than 5,592,405 parts",
        "sentencepiece cut off": "it is cut off",
        "nested": "nested too deeply",
        "a negative id": "an id is out of range",
        "too many tokens": "it has more than 1,048,576 tokens",
        "too many added": "it has more than 1,048,576 tokens",
        "too many lines": "it has more than 1,048,576 tokens",
        "too many ranks": "it has more than 1,048,576 tokens",
        "too many fields": "it has too many fields",
        "a piece of too many fields": "it has too many fields",
        "a key twice": "the key 'a' is defined twice",
    }
    assert message.endswith(f": {expected.get(spoilt, '')}") or spoilt not in expected


@pytest.mark.parametrize("content", ['{"added_tokens_decoder": 1}', '{"added_tokens_decoder": {"x": {}}}',
                                     '{"added_tokens_decoder": {"1": {"content": 2}}}', "[]"])  # fmt: skip
def test_a_config_that_is_none_is_named_and_the_rest_is_read(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    (tmp_path / "tokenizer_config.json").write_text(content)
    found = read(tmp_path)
    assert found.tokens == {0: "a"}
    [message] = found.unread
    assert message.startswith(f"{tmp_path / 'tokenizer_config.json'}: cannot be read: ")


def test_a_tokenizer_above_the_limit_is_refused_by_name(tmp_path: Path) -> None:
    with open(tmp_path / "tokenizer.json", "wb") as stream:
        stream.truncate(small_files.MAX_BYTES + 1)
    assert read(tmp_path).unread == (f"{tmp_path / 'tokenizer.json'}: is larger than 64 MB",)


def test_odd_values_in_small_files_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    config = {"chat_template": [1, {"name": 1, "template": "x"}, {"template": "y"}], "eos_token": 3, "pad_token": []}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": ["x", true, null]}')
    found = read(tmp_path)
    assert (found.templates, found.stop, found.pad, found.unread) == ({"1": "x"}, frozenset(), None, ())


# What is fetched.


def test_a_content_is_parsed_once_whichever_model_holds_it(saved: Path, tmp_path: Path) -> None:
    files = SmallFiles()
    one, other = [read(_copy(saved / "gpt2" / "4-fast", tmp_path / name), files) for name in "ab"]
    assert one.tokens is other.tokens


@contextmanager
def on_the_hub(hub: HubServer, folder: Path, **files: tuple[Path, dict[str, str]]) -> Iterator[dict[str, Checkpoint]]:
    """Models with the files of a folder and some more, opened on the Hub; what was asked until then is forgotten."""
    with ExitStack() as stack:
        models = {}
        for name, (source, more) in files.items():
            place = _copy(source, folder / name)
            for file, content in more.items():
                (place / file).write_text(content)
            hub.create_from(f"acme/{name}", write_checkpoint(place, {EMBEDDING: torch.zeros(400, 2)}))
            opened = open_as("model", name, Repository(Location(f"acme/{name}")))
            assert isinstance(opened, Checkpoint)
            models[name] = opened
            stack.callback(opened.close)
        hub.requests.clear()
        yield models


def test_equal_vocabularies_on_the_hub_are_not_fetched(hub: HubServer, saved: Path, tmp_path: Path) -> None:
    one = saved / "qwen2" / "4-fast"
    with on_the_hub(hub, tmp_path, target=(one, {}), rl=(one, {"chat_template.jinja": "x"}), sft=(one, {})) as models:
        [warning] = compare_tokens(models, "target", ROLES)
    assert warning.name == "chat-template"
    assert hub.count("GET .*/vocab.json|GET .*/tokenizer.json|GET .*/merges.txt") == 0
    assert hub.count("GET .*/chat_template.jinja") == 2
    assert hub.count("GET .*/tokenizer_config.json") == 1
    assert hub.count("GET ") == 3


def test_what_the_donor_has_is_fetched_once(hub: HubServer, saved: Path, tmp_path: Path) -> None:
    fast, slow = saved / "qwen2" / "4-fast", saved / "qwen2" / "4-slow"
    with on_the_hub(hub, tmp_path, target=(fast, {}), rl=(slow, {}), sft=(fast, {})) as models:
        assert compare_tokens(models, "target", ROLES) == []
    assert hub.count("GET .*/acme/target/.*tokenizer.json") == 1
    assert hub.count("GET .*/acme/sft/") == 0
    assert hub.count("GET .*/acme/rl/.*(vocab.json|merges.txt)") == 2


def test_at_most_five_files_of_a_model_are_fetched(hub: HubServer, saved: Path, tmp_path: Path) -> None:
    slow = {
        "vocab.json": json.dumps({"a": 0, "b": 1}),
        "merges.txt": "#version: 0.2\na b\n",
        "tokenizer_config.json": '{"x": %d}',
        "generation_config.json": '{"max_length": %d}',
        "chat_template.jinja": "%d",
        "added_tokens.json": '{"<tool>": 2}',
        "special_tokens_map.json": '{"eos_token": "a"}',
        "vocab.txt": "a",
        "tokenizer.model": "a",
    }
    empty = tmp_path / "empty"
    empty.mkdir()
    files = {
        name: (empty, {file: content.replace("%d", str(number)) + " " * number for file, content in slow.items()})
        for number, name in enumerate(ROLES)
    }
    with on_the_hub(hub, tmp_path / "models", **files) as models:
        compare_tokens(models, "target", ROLES)
        fetched = [
            sorted(path.rpartition("/")[2] for path in {it.path for it in hub.requests} if f"acme/{name}/" in path)
            for name in ROLES
        ]
    five = ["added_tokens.json", "chat_template.jinja", "generation_config.json", "tokenizer_config.json", "vocab.json"]
    assert fetched == [five] * 3


def _copy(source: Path, folder: Path) -> Path:
    folder.mkdir(parents=True)
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder
