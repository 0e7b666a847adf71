"""Sweeps: candidates, scores of every kind, journals that survive, the same weights as `apply` writes."""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_tensors, run_cli, tensor_shapes, write_checkpoint, write_family, write_recipe
from safetensors.torch import load_file, save_file

import skillmerge
from skillmerge.durable import hold
from skillmerge.errors import CheckFailed, OutputLocked, UsageError
from skillmerge.plans.opening import Access
from skillmerge.recipes.candidates import grid, parse_axis, path_of, with_values
from skillmerge.recipes.parse import load
from skillmerge.study.built_in import generate, perplexity
from skillmerge.study.scorers import find_scorer
from skillmerge.study.scores import NotFinite, Score, as_scores, of_items, together
from skillmerge.verbs.demo import write_family as write_demo
from skillmerge.verbs.miniature import questions
from skillmerge.verbs.sweep.in_memory import MergedModel
from skillmerge.verbs.sweep.journal import Trial
from skillmerge.verbs.sweep.sweep import Sweep, sweep

transformers = pytest.importorskip("transformers")

SCHEDULE = """\
skillmerge: 1
models: {target: ./target, rl: ./rl, sft: ./sft}   # three
coefficients:
  lam:
    default: 1.0          # elsewhere
    rules:
      - {layers: 0-1, value: 0.25}
      - {layers: 2-3, ramp: [0.5, 1.0]}   # a ramp
  mu: 2e-1
merge: target + mu * lam * (rl - sft)
"""


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built-in family, with half of the questions to choose by and half held out."""
    folder = tmp_path_factory.mktemp("sweep") / "demo"
    write_demo(folder)
    rows = [
        json.dumps({"question": " ".join(question.words), "answer": question.wanted, "pattern": r"(\S+)$"})
        for question in questions()
    ]
    (folder / "choose.jsonl").write_text("\n".join(rows[0:256:2]) + "\n")
    (folder / "held.jsonl").write_text("\n".join(rows[1:256:2]) + "\n")
    return folder


# ------------------------------------------------------------------------------------------------------ candidates


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("lam=0:1:0.25", [0, 0.25, 0.5, 0.75, 1]),
        ("lam=0:2:0.1", [round(0.1 * step, 1) for step in range(21)]),
        ("lam=0.5,1,2,1", [0.5, 1, 2]),
        ("lam=-1", [-1]),
        ("lam=1:1:5", [1]),
        ("lam=0:1:0.4", [0, 0.4, 0.8]),
    ],
)
def test_axes_are_the_numbers_that_a_person_would_write(text: str, values: list[float]) -> None:
    assert list(parse_axis(text).values) == values


@pytest.mark.parametrize(
    "text", ["lam", "=1", "lam=", "lam=a", "lam=1:0", "lam=0:1:0", "lam=0:1:2:3", "lam=nan", "lam=0:9:1e-9"]
)
def test_axes_without_meaning_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="`"):
        parse_axis(text)


def test_grid_is_every_combination() -> None:
    found = list(grid([parse_axis("a=1,2"), parse_axis("b=0:1:0.5")]))
    assert [tuple(values.values()) for values in found] == [(a, b) for a in (1, 2) for b in (0, 0.5, 1)]
    with pytest.raises(UsageError, match="is a range") as caught:
        list(grid([parse_axis("a=0:1")]))
    assert "--search" in str(caught.value.fix)


def test_candidate_is_the_recipe_with_other_numbers(tmp_path: Path) -> None:
    """Comments, order, and everything else stay."""
    (tmp_path / "recipe.yaml").write_text(SCHEDULE)
    recipe = load(tmp_path / "recipe.yaml")
    values = {"lam.rules.1.ramp.0": 0.125, "lam.rules.1.ramp.1": 10.0, "lam.default": -3.5, "mu": 1e-7}
    text = with_values(recipe, values).document.text
    wanted = (
        SCHEDULE.replace("[0.5, 1.0]", "[0.125, 10]").replace("default: 1.0", "default: -3.5").replace("2e-1", "1e-07")
    )
    assert text == wanted
    assert with_values(recipe, values).coefficients["lam"].rules[1].ramp == (0.125, 10.0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lam", "is a schedule"), ("nu", "is no number"), ("lam.rules.0.layers", "is no number"),
        ("lam.rules.7.value", "is no number"), ("lam.rules.1.ramp", "is no number"),
    ],
)  # fmt: skip
def test_names_of_no_number_are_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "recipe.yaml").write_text(SCHEDULE)
    with pytest.raises(UsageError, match=message) as caught:
        path_of(load(tmp_path / "recipe.yaml"), name)
    assert caught.value.fix


# ---------------------------------------------------------------------------------------------------------- scores


def test_scores_are_what_commands_and_functions_give() -> None:
    assert as_scores(0.5) == {"score": Score(0.5)}
    assert as_scores({"skill": 1, "kept": {"value": 0.5, "error": 0.1}}) == {"skill": Score(1), "kept": Score(0.5, 0.1)}
    found = as_scores([0, 1, 1, 1])["score"]
    share = 5 / 8  # Agresti and Coull: two more of each
    assert (found.value, found.error) == (0.75, pytest.approx(math.sqrt(share * (1 - share) / 8)))
    assert of_items([1.0] * 40).error == pytest.approx(math.sqrt((42 / 44) * (2 / 44) / 44))
    assert of_items([1.0, 2.0, 6.0]).error == pytest.approx(math.sqrt(7) / math.sqrt(3))
    for wrong in ("0.5", {}, {"a": None}, {"a\nmerge": 1}, {"": 1}, {"a": {"b": 1}}, True):
        with pytest.raises((TypeError, ValueError, KeyError)):
            as_scores(wrong)
    for wrong in (float("nan"), float("inf"), [1.0, float("nan")], {"a": {"value": 1.0, "error": float("inf")}}):
        with pytest.raises(NotFinite):
            as_scores(wrong)


def test_repeats_show_the_noise() -> None:
    found = together([{"a": Score(value)} for value in (1.0, 2.0, 3.0)])["a"]
    assert (found.value, found.error) == (2.0, pytest.approx(1 / math.sqrt(3)))
    # The same questions asked again say nothing new.
    assert together([{"a": Score(0.5, 0.1)}, {"a": Score(0.5, 0.1)}])["a"] == Score(0.5, 0.1)
    assert found.interval == (pytest.approx(2 - 1.959964 / math.sqrt(3)), pytest.approx(2 + 1.959964 / math.sqrt(3)))


def independent_accuracy(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]]) -> float:
    """One question at a time, one word at a time, without `generate`."""
    right = 0
    for row in rows:
        tokens = tokenizer(row["question"], return_tensors="pt")["input_ids"]
        start = tokens.shape[1]
        for _ in range(8):
            with torch.no_grad():
                tokens = torch.cat([tokens, model(input_ids=tokens).logits[:, -1:].argmax(-1)], 1)
            if int(tokens[0, -1]) == tokenizer.eos_token_id:
                break
        words = [w for w in tokenizer.decode(tokens[0, start:]).split() if w not in ("END", "_")]
        right += words[-1:] == [row["answer"]]
    return right / len(rows)


@pytest.fixture(scope="module")
def loaded(demo: Path) -> tuple[Any, Any]:
    model = transformers.AutoModelForCausalLM.from_pretrained(demo / "source-sft", dtype=torch.float32).eval()
    return model, transformers.PreTrainedTokenizerFast.from_pretrained(demo / "source-sft")


def test_qa_against_an_evaluation_of_its_own(demo: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(demo / "source-rl", dtype="auto").eval()
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(demo / "source-rl")
    rows = [json.loads(line) for line in (demo / "choose.jsonl").read_text().splitlines()]
    scorer = find_scorer(f"qa:{demo / 'choose.jsonl'}")
    assert scorer.function is not None
    found = scorer.function(model, tokenizer, 0)["accuracy"]
    assert found.value == independent_accuracy(model, tokenizer, rows)
    assert found.error == pytest.approx(math.sqrt(found.value * (1 - found.value) / len(rows)), rel=0.1)


def test_qa_takes_lists_case_and_patterns(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = loaded
    said = tokenizer.decode(
        model.generate(**tokenizer("Q li be na eats A", return_tensors="pt"), max_new_tokens=5, do_sample=False)[0, 6:],
        skip_special_tokens=True,
    )
    rows = [
        {"question": "Q li be na eats A", "answer": ["no", f"  {said.upper()} "]},
        {"question": "Q li be na eats A", "answer": said.split()[0], "pattern": r"^(\S+)"},
        {"question": "Q li be na eats A", "answer": "nothing of the kind"},
    ]
    (tmp_path / "qa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    scorer = find_scorer(f"qa:{tmp_path / 'qa.jsonl'}")
    assert scorer.function is not None
    assert scorer.function(model, tokenizer, 0)["accuracy"].value == pytest.approx(2 / 3)


def test_perplexity_against_its_definition(loaded: tuple[Any, Any]) -> None:
    """In one window, and in several: the model reads 32 words at once."""
    model, tokenizer = loaded
    for count in (3, 20):
        text = " ".join("D li be na eats gold owns silk END" for _ in range(count))
        tokens = tokenizer(text, return_tensors="pt")["input_ids"]
        losses = []
        for start in range(0, tokens.shape[1], 32):
            piece = tokens[:, start : start + 32]
            logits = model(input_ids=piece).logits[0].double().log_softmax(-1)
            losses += [-float(logits[i, piece[0, i + 1]].detach()) for i in range(piece.shape[1] - 1)]
        found = perplexity(model, tokenizer, text)["perplexity"]
        assert found.value == pytest.approx(math.exp(math.fsum(losses) / len(losses)), rel=1e-5)
    assert find_scorer(f"perplexity:{__file__}").minimise


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "is empty"), ("{}", "is not a question"), ('{"question": "x"}', "is not a question"),
     ("[1]", "is not a question"), ('{"question": "x", "answer": 3}', "is not a question"),
     ('{"question": "x", "answer": "y", "pattern": "("}', "is not a question")],
)  # fmt: skip
def test_questions_without_sense_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "qa.jsonl").write_text(content)
    with pytest.raises(UsageError, match=message):
        find_scorer(f"qa:{tmp_path / 'qa.jsonl'}")


def test_scores_that_are_not_there_are_refused(tmp_path: Path) -> None:
    for text in ("qa:no/such/file", "perplexity:no/such/file", "no_such_module:function", "json:no_such_function", " "):
        with pytest.raises(UsageError, match="--score"):
            find_scorer(text)


def test_lm_evaluation_harness_runs_a_local_task(demo: Path, loaded: tuple[Any, Any], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(json.dumps({"q": "Q li be na eats", "choices": ["A", "END"], "label": i % 2}) for i in range(8))
    )
    (tmp_path / "tiny.yaml").write_text(
        f"task: tiny\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{label}}'\n"
        "doc_to_choice: '{{choices}}'\nmetric_list: [{metric: acc}]\n"
    )
    scorer = find_scorer(f"lm-eval:{tmp_path / 'tiny.yaml'}")
    assert scorer.function is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path / "home"))
        found = scorer.function(*loaded, 0)
    assert found["tiny/acc"].value == 0.5


# --------------------------------------------------------------------------------------------------------- in place


@pytest.mark.parametrize("formula", ["target + lam * (rl - sft)", "(1 - lam) * target + lam * rl"])
def test_weights_in_memory_are_those_that_apply_writes(tmp_path: Path, formula: str, demo: Path) -> None:
    """Bit for bit, for every candidate, statistics included."""
    names = {"target": "target-sft", "rl": "source-rl", "sft": "source-sft"}
    models = {key: str(demo / name) for key, name in names.items()}
    recipe = load(write_recipe(tmp_path, formula, models=models, coefficients={"lam": 1.0}))
    model = MergedModel(recipe, Access(), "cpu", lambda message: None)
    for lam in (0.0, 0.3, 1.0, -1.0, 1.7):
        candidate = with_values(recipe, {"lam": lam})
        statistics = model.use(candidate)
        made = skillmerge.apply(candidate, tmp_path / f"out-{lam}")
        wanted = transformers.AutoModelForCausalLM.from_pretrained(made.output, dtype="auto").state_dict()
        found = model.model.state_dict()
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert torch.equal(found[name].view(torch.int16), tensor.view(torch.int16)), (lam, name)
        assert statistics["all"] == made.manifest["statistics"]["all"]
    model.close()


def test_stochastic_rounding_in_memory_too(tmp_path: Path, demo: Path) -> None:
    models = {
        key: str(demo / name) for key, name in {"target": "target-sft", "rl": "source-rl", "sft": "source-sft"}.items()
    }
    output = {"rounding": "stochastic", "seed": 3}
    recipe = load(write_recipe(tmp_path, models=models, output=output))
    model = MergedModel(recipe, Access(), "cpu", lambda message: None)
    model.use(recipe)
    made = skillmerge.apply(recipe, tmp_path / "out")
    wanted = transformers.AutoModelForCausalLM.from_pretrained(made.output, dtype="auto").state_dict()
    for name, tensor in model.model.state_dict().items():
        assert torch.equal(tensor.view(torch.int16), wanted[name].view(torch.int16)), name
    model.close()


def test_a_skill_is_held_in_memory_as_well(tmp_path: Path, demo: Path) -> None:
    skillmerge.extract(str(demo / "source-rl"), str(demo / "source-sft"), tmp_path / "skill")
    models = {"target": str(demo / "target-sft"), "math": {"skill": "skill"}}
    recipe = load(write_recipe(tmp_path, "target + lam * math", models=models))
    model = MergedModel(recipe, Access(), "cpu", lambda message: None)
    model.use(with_values(recipe, {"lam": 0.9}))
    made = skillmerge.apply(with_values(recipe, {"lam": 0.9}), tmp_path / "out")
    wanted = transformers.AutoModelForCausalLM.from_pretrained(made.output, dtype="auto").state_dict()
    for name, tensor in model.model.state_dict().items():
        assert torch.equal(tensor.view(torch.int16), wanted[name].view(torch.int16)), name
    model.close()


def test_too_little_memory_is_told_before_any_work(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skillmerge.verbs.sweep.in_memory.free_memory", lambda: 1000)
    process_free = pytest.raises(skillmerge.SkillmergeError, match="scoring in memory holds")
    with process_free:
        MergedModel(load(demo / "recipe.yaml"), Access(), "cpu", lambda message: None)


# ----------------------------------------------------------------------------------------------------------- sweeps


def test_sweep_finds_a_lambda_that_holds(demo: Path) -> None:
    """What was chosen by one half of the questions is as good on the other as lambda = 1 is."""
    found = sweep(demo / "recipe.yaml", ["lam=0:2:0.25"], f"qa:{demo / 'choose.jsonl'}", demo / "a")
    assert len(found.trials) == 9
    held = sweep(found.best_recipe, ["lam=1"], f"qa:{demo / 'held.jsonl'}", demo / "b")
    best = sweep(demo / "recipe.yaml", [f"lam={found.best.values['lam']}"], f"qa:{demo / 'held.jsonl'}", demo / "c")
    assert best.best.scores["accuracy"].value >= held.best.scores["accuracy"].value
    assert found.trials[0].scores["accuracy"].value < 0.2
    text = (demo / "a.best.yaml").read_text()
    assert text.startswith("# Found by `skillmerge sweep`")
    assert "candidates" in text


def test_command_gives_the_same_scores_as_memory(demo: Path, tmp_path: Path) -> None:
    script = tmp_path / "score.py"
    script.write_text(
        "import sys, transformers\n"
        "from skillmerge.study.scorers import find_scorer\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype='auto').eval()\n"
        "tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(sys.argv[1])\n"
        f"print(find_scorer('qa:{demo / 'choose.jsonl'}').function(model, tokenizer, 0)['accuracy'].value)\n"
    )
    command = f"{shlex.quote(sys.executable)} -W ignore {script} {{}}"
    one = sweep(demo / "recipe.yaml", ["lam=0.5,1.75"], command, tmp_path / "command")
    two = sweep(demo / "recipe.yaml", ["lam=0.5,1.75"], f"qa:{demo / 'choose.jsonl'}", tmp_path / "memory")
    assert [t.scores["score"].value for t in one.trials] == [t.scores["accuracy"].value for t in two.trials]
    assert [t.realised for t in one.trials] == [t.realised for t in two.trials]


def test_a_function_of_ones_own(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_score.py").write_text(
        "def norm(model):\n"
        "    return {'skill': -float(sum((p.double() ** 2).sum() for p in model.parameters())), 'kept': 1.0}\n"
        "def pair(model, tokenizer):\n    return [float(tokenizer is not None), 1.0]\n"
        "def wrong(model):\n    return 'good'\n"
    )
    monkeypatch.chdir(tmp_path)
    found = sweep(demo / "recipe.yaml", ["lam=0:1:0.5"], "own_score:norm", tmp_path / "norm")
    assert list(found.best.scores) == ["skill", "kept"]
    assert found.best.values == {"lam": 0.0}
    assert sweep(demo / "recipe.yaml", ["lam=1"], "own_score:pair", tmp_path / "pair").best.scores["score"].value == 1.0
    with pytest.raises(CheckFailed, match=r"must return|TypeError"):
        sweep(demo / "recipe.yaml", ["lam=1"], "own_score:wrong", tmp_path / "wrong")


COUNTING = "f=$(cat {}/skillmerge.manifest.json | wc -c); echo x >> %s; sleep %s; echo 0.5"


def test_a_killed_sweep_repeats_nothing(family: Path) -> None:
    log, folder = family.parent / "log", family.parent / "s"
    command = COUNTING % (log, 0.3)
    arguments = [
        sys.executable,
        "-m",
        "skillmerge",
        "sweep",
        family,
        "--set",
        "lam=0:1:0.1",
        "--score",
        command,
    ]
    process = subprocess.Popen([*map(str, arguments), "-o", str(folder), "-q"], start_new_session=True)
    while not (log.exists() and len(log.read_text().split()) >= 4):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    known = len((folder / "journal.jsonl").read_text().splitlines()) - 1
    assert 3 <= known < 11
    begun = len(log.read_text().split())
    found = sweep(family, ["lam=0:1:0.1"], command, folder)
    assert found.resumed == known
    assert len(found.trials) == 11
    assert len(log.read_text().split()) == begun + 11 - known
    assert sweep(family, ["lam=0:1:0.1"], command, folder).resumed == 11
    assert len(log.read_text().split()) == begun + 11 - known


def test_a_line_that_was_cut_off_is_done_again(family: Path) -> None:
    log, folder = family.parent / "log", family.parent / "s"
    command = COUNTING % (log, 0)
    sweep(family, ["lam=0:1:0.5"], command, folder)
    journal = folder / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    found = sweep(family, ["lam=0:1:0.5"], command, folder)
    assert (found.resumed, len(found.trials)) == (2, 3)
    assert len(log.read_text().split()) == 4
    assert len(journal.read_text().splitlines()) == 4


def test_another_sweep_is_not_continued(family: Path) -> None:
    folder = family.parent / "s"
    sweep(family, ["lam=0,1"], "echo 1 #", folder)
    for change in ({"score": "echo 2 #"}, {"repeats": 2}, {"seed": 1}):
        with pytest.raises(UsageError, match="holds another sweep"):
            sweep(family, ["lam=0,1"], **{"score": "echo 1 #", "output": folder, **change})  # type: ignore[arg-type]
    sft = family.parent / "sft"
    for path in sft.glob("model*"):
        path.unlink()
    write_checkpoint(sft, random_tensors(tensor_shapes(), seed=9))
    with pytest.raises(UsageError, match="inputs_sha256"):
        sweep(family, ["lam=0,1"], "echo 1 #", folder)
    assert sweep(family, ["lam=0,1"], "echo 3 #", folder, overwrite=True).best.scores["score"].value == 3
    (family.parent / "mine").mkdir()
    (family.parent / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is no sweep"):
        sweep(family, ["lam=0,1"], "echo 1 #", family.parent / "mine", overwrite=True)
    (family.parent / "t.best.yaml").write_text("mine")
    with pytest.raises(UsageError, match="is not a sweep's"):
        sweep(family, ["lam=0,1"], "echo 1 #", family.parent / "t")


def test_one_sweep_at_a_time(family: Path) -> None:
    folder = family.parent / "s"
    sweep(family, ["lam=0,1"], "echo 1 #", folder)
    with hold(folder), pytest.raises(OutputLocked):
        sweep(family, ["lam=0,1,2"], "echo 1 #", folder)


@pytest.mark.parametrize(
    ("command", "message"),
    [("echo no; exit 3 #", "exit status 3"), ("echo hello #", "printed no number"), ("true", "printed no number"),
     ("echo nan #", "printed no number")],
)  # fmt: skip
def test_commands_that_fail_are_told(family: Path, command: str, message: str) -> None:
    with pytest.raises(CheckFailed, match=message):
        sweep(family, ["lam=0,1"], command, family.parent / "s")
    assert len((family.parent / "s" / "journal.jsonl").read_text().splitlines()) == 1


def test_repeats_get_seeds_of_their_own(family: Path) -> None:
    found = sweep(family, ["lam=1"], "echo $SKILLMERGE_SEED #", family.parent / "s", repeats=3, seed=5)
    assert found.best.scores["score"].value == 6
    assert found.best.scores["score"].error == pytest.approx(1 / math.sqrt(3))


def made(values: dict[float, tuple[float, float]], minimise: bool = False, error: float | None = None) -> Sweep:
    trials = tuple(
        Trial({"lam": lam}, {"a": Score(a, error), "b": Score(b)}, None, 0.0) for lam, (a, b) in values.items()
    )
    return Sweep(Path("s"), None, Path("b"), "x", ("lam",), "a", minimise, trials, 0)  # type: ignore[arg-type]


def test_the_best_of_equals_is_the_smallest() -> None:
    assert made({2.0: (1, 0), -0.5: (1, 0), 1.0: (1, 0), 0.0: (0, 0)}).best.values == {"lam": -0.5}
    assert made({2.0: (1, 0), 0.0: (3, 0)}, minimise=True).best.values == {"lam": 2.0}


def test_noise_is_said_and_not_made_up() -> None:
    found = made({0.0: (0.5, 0), 1.0: (0.9, 0), 2.0: (0.85, 0)}, error=0.05)
    assert [found.within_noise(trial) for trial in found.trials] == [False, True, True]
    assert made({0.0: (0.5, 0), 1.0: (0.9, 0)}).within_noise(found.trials[0]) is None


def test_pareto_is_what_nothing_beats() -> None:
    values = {0.0: (1.0, 3.0), 1.0: (2.0, 2.0), 2.0: (1.5, 1.5), 3.0: (3.0, 0.0)}
    assert [trial.values["lam"] for trial in made(values).pareto] == [0.0, 1.0, 3.0]
    assert [trial.values["lam"] for trial in made(values, minimise=True).pareto] == [0.0]


@pytest.mark.parametrize("search", ["tpe", "cmaes", "random"])
def test_search_resumes_and_finds(family: Path, search: str) -> None:
    """The score is a parabola over what rounding left of lambda, with its top at 0.7."""
    pytest.importorskip("optuna")
    script = family.parent / "score.py"
    script.write_text(
        "import json, sys\n"
        "found = json.load(open(sys.argv[1] + '/skillmerge.manifest.json'))['statistics']['all']\n"
        "print(-((found.get('asked_lambda') or 0) - 0.7) ** 2)\n"
    )
    command = f"{shlex.quote(sys.executable)} {script} {{}}"
    options: dict[str, Any] = {"search": search, "output": family.parent / "s"}
    first = sweep(family, ["lam=0:2"], command, trials=5, **options)
    both = sweep(family, ["lam=0:2"], command, trials=16, **options)
    assert both.resumed == 5
    values = [trial.values["lam"] for trial in both.trials]
    assert {trial.values["lam"] for trial in first.trials} <= set(values)
    assert len(set(values)) == 16
    assert abs(both.best.values["lam"] - 0.7) < 0.3


def test_commands_and_report(family: Path) -> None:
    folder = family.parent
    score = 'echo \'{"skill": 1, "kept": 2}\' #'
    arguments = ("sweep", family, "--set", "lam=0:1:0.25", "--score", score, "--by", "kept", "--minimise")
    process = run_cli(*arguments, "--report", folder / "r.html", cwd=folder)
    assert process.returncode == 0, process.stderr
    assert "best: lam = 0, written to" in process.stdout
    assert "kept over lam" in process.stdout
    page = (folder / "r.html").read_text()
    assert "The sweep" in page
    assert "realised lambda" in page
    process = run_cli(*arguments, "--json", cwd=folder)
    document = json.loads(process.stdout)
    assert (document["by"], document["resumed"], len(document["trials"])) == ("kept", 5, 5)
    assert json.loads((folder / "recipe.sweep" / "results.json").read_text())["best"] == document["best"]
    assert run_cli(*arguments[:-3], "--by", "nothing", cwd=folder).returncode == 2
    assert run_cli("sweep", family, "--set", "nu=1", "--score", "true", cwd=folder).returncode == 2
    assert run_cli("sweep", family, "--set", "lam=1:x", "--score", "true", cwd=folder).returncode == 2


@pytest.fixture
def family(tmp_path: Path) -> Path:
    return write_family(tmp_path)


# ------------------------------------------------------------------------------------- what a hostile trial has found


def qa(folder: Path, rows: list[dict[str, Any]]) -> str:
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    return f"qa:{folder / 'rows.jsonl'}"


def test_a_long_question_takes_no_room_from_others(loaded: tuple[Any, Any]) -> None:
    """The model reads 32 words: one question of 30 leaves itself two, and the others all that they have alone."""
    model, tokenizer = loaded
    short = [" ".join(question.words) for question in questions()[:20]]
    before = generate(model, tokenizer, short)
    mixed = generate(model, tokenizer, [*short[:10], " ".join(["ka"] * 30), *short[10:]])
    assert [*mixed[:10], *mixed[11:]] == before
    with pytest.raises(UsageError, match="question 2 has 32 tokens"):
        generate(model, tokenizer, ["ka", " ".join(["ka"] * 32)])


def test_the_models_own_sampling_is_not_asked(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    prompts = [" ".join(question.words) for question in questions()[:20]]
    before = generate(model, tokenizer, prompts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.generation_config, "repetition_penalty", 1.5)
        patch.setattr(model.generation_config, "min_new_tokens", 8)
        assert generate(model, tokenizer, prompts) == before


def test_unusual_characters_in_questions(tmp_path: Path) -> None:
    scorer = find_scorer(qa(tmp_path, [{"question": "a\u2028b", "answer": "c"}]))
    assert scorer.function is not None


def test_tied_parameters_that_part_are_loaded_anew(tmp_path: Path) -> None:
    """Both the embedding and the head are in the files, equal at first: transformers makes one parameter of them."""
    config = transformers.Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    for seed, name in enumerate(("target", "rl", "sft")):
        torch.manual_seed(seed)
        transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path / name)
        tensors = load_file(tmp_path / name / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})
    rules = {"default": 0.0, "rules": [{"tensors": "*embed_tokens*", "value": 0.5}]}
    recipe = load(write_recipe(tmp_path, coefficients={"lam": rules}))
    notes: list[str] = []
    model = MergedModel(with_values(recipe, {"lam.rules.0.value": 0.0}), Access(), "cpu", notes.append)
    assert any("loaded anew" in note for note in notes)
    candidate = with_values(recipe, {"lam.rules.0.value": 0.7})
    model.use(candidate)
    out = skillmerge.apply(candidate, tmp_path / "out").output
    wanted = transformers.Qwen2ForCausalLM.from_pretrained(out, dtype="auto").state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.model.state_dict().items())
    model.close()


def test_other_questions_are_another_sweep(demo: Path, tmp_path: Path) -> None:
    rows = [{"question": " ".join(question.words), "answer": "x"} for question in questions()[:4]]
    sweep(demo / "recipe.yaml", ["lam=0"], qa(tmp_path, rows), tmp_path / "other")
    with pytest.raises(UsageError, match="score_sha256"):
        sweep(demo / "recipe.yaml", ["lam=0,1"], qa(tmp_path, rows[1:]), tmp_path / "other")


def test_scores_that_are_no_numbers_fail_alone(family: Path) -> None:
    """A merge that has broken is not the best, and does not end the sweep; where all have, that is an error."""
    script = family.parent / "score.py"
    script.write_text(
        "import json, sys\n"
        "found = json.load(open(sys.argv[1] + '/skillmerge.manifest.json'))['statistics']['all']\n"
        "asked = found.get('asked_lambda') or 0\n"
        "print('NaN' if asked > 0.6 else asked)\n"
    )
    command = f"{shlex.quote(sys.executable)} {script} {{}}"
    found = sweep(family, ["lam=0:1:0.25"], command, family.parent / "s")
    assert [bool(trial.failed) for trial in found.trials] == [False, False, False, True, True]
    assert found.best.values == {"lam": 0.5}
    json.loads((family.parent / "s" / "results.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert sweep(family, ["lam=0:1:0.25"], command, family.parent / "s").resumed == 5
    with pytest.raises(CheckFailed, match="no candidate has a score"):
        sweep(family, ["lam=0.75,1"], command, family.parent / "t")


def test_mistakes_in_a_score_are_told_as_such(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "faulty.py").write_text(
        "import sys\ncalls = []\n"
        "def boom(model):\n    raise RuntimeError('out of memory')\n"
        "def leave(model):\n    sys.exit(0)\n"
        "def nested(model):\n    return {'a': {'b': 1}}\n"
        "def keyword(model, *, verbose=False):\n    return 1.0\n"
        "def chatty(model):\n    print('hello')\n    return 1.0\n"
        "def names(model):\n    calls.append(1)\n    return {f'a{len(calls)}': 1.0}\n"
        "thing = 3\n"
    )
    (tmp_path / "broken.py").write_text("def (")
    monkeypatch.chdir(tmp_path)
    for name, message in (
        ("boom", "out of memory"),
        ("leave", "SystemExit"),
        ("nested", "KeyError"),
        ("names", "different scores"),
    ):
        with pytest.raises(CheckFailed, match=message):
            sweep(demo / "recipe.yaml", ["lam=0,1"], f"faulty:{name}", tmp_path / name)
    for text in ("faulty:thing", "broken:f"):
        with pytest.raises(UsageError, match="--score"):
            find_scorer(text)
    assert (
        sweep(demo / "recipe.yaml", ["lam=0"], "faulty:keyword", tmp_path / "keyword").best.scores["score"].value == 1
    )
    process = run_cli(
        "sweep", demo / "recipe.yaml", "--set", "lam=0", "--score", "faulty:chatty", "-o", tmp_path / "c", "--json",
        cwd=tmp_path,
    )  # fmt: skip
    assert json.loads(process.stdout)["ok"], process.stdout
    assert "hello" in process.stderr


def test_numbers_tied_by_an_alias_are_refused(tmp_path: Path) -> None:
    text = SCHEDULE.replace("  mu: 2e-1\n", "  mu: *a\n").replace(
        "  lam:\n    default: 1.0", "  lam: &a\n    default: 1.0"
    )
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(UsageError, match="cannot be changed in the text"):
        with_values(load(tmp_path / "recipe.yaml"), {"lam.default": 0.5})


@pytest.mark.parametrize("end", ["\r", "\r\n", "\n"])
def test_every_kind_of_line_end(tmp_path: Path, end: str) -> None:
    (tmp_path / "recipe.yaml").write_bytes(SCHEDULE.replace("\n", end).encode())
    text = with_values(load(tmp_path / "recipe.yaml"), {"mu": 0.5}).document.text
    assert text == SCHEDULE.replace("2e-1", "0.5").replace("\n", end)


def test_scratch_of_a_killed_run_is_removed(family: Path) -> None:
    scratch = family.parent / "s" / "scratch" / "model"
    sweep(family, ["lam=0"], "echo 1 #", family.parent / "s")
    scratch.mkdir(parents=True)
    (scratch / "model.safetensors").write_bytes(b"half")
    sweep(family, ["lam=0,1"], "echo 1 #", family.parent / "s")
    assert not scratch.parent.exists()


def test_an_interrupt_takes_the_command_along(family: Path) -> None:
    mark = family.parent / "alive"
    script = family.parent / "slow.sh"
    script.write_text(f"#!/bin/sh\ntouch {mark}.started\nsleep 3\ntouch {mark}\n")
    script.chmod(0o755)
    command = [
        sys.executable,
        "-m",
        "skillmerge",
        "sweep",
        str(family),
        "--set",
        "lam=0",
        "--score",
        f"{script}; true",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not Path(f"{mark}.started").exists():
        time.sleep(0.05)
    process.terminate()
    _, said = process.communicate()
    assert process.returncode == 143
    assert "candidates that were scored are kept" in said
    time.sleep(3.2)
    assert not mark.exists()


def test_damage_inside_a_journal_is_not_passed_over(family: Path) -> None:
    sweep(family, ["lam=0:1:0.25"], "echo 1 #", family.parent / "s")
    journal = family.parent / "s" / "journal.jsonl"
    lines = journal.read_text().split("\n")
    for damage in ([lines[0], "{", *lines[2:]], ["[]", *lines[1:]], ['{"a": 1}', "3", ""]):
        journal.write_text("\n".join(damage))
        with pytest.raises(UsageError, match=r"is damaged, or no sweep's|holds another sweep"):
            sweep(family, ["lam=0:1:0.25"], "echo 1 #", family.parent / "s")
    assert len(sweep(family, ["lam=0"], "echo 1 #", family.parent / "s", overwrite=True).trials) == 1


def test_a_search_with_other_bounds_is_another(family: Path) -> None:
    pytest.importorskip("optuna")
    options: dict[str, Any] = {"search": "random", "trials": 2, "output": family.parent / "s"}
    sweep(family, ["lam=0:2"], "echo 1 #", **options)
    with pytest.raises(UsageError, match="holds another sweep: axes"):
        sweep(family, ["lam=0:1"], "echo 1 #", **options)
    with pytest.raises(UsageError, match="minimise"):
        sweep(family, ["lam=0:2"], "echo 1 #", minimise=True, **options)


def test_no_place_for_the_best_recipe_is_told_first(family: Path) -> None:
    (family.parent / "s.best.yaml").mkdir()
    with pytest.raises(UsageError, match="is not a sweep's"):
        sweep(family, ["lam=0"], "echo 1 #", family.parent / "s")
    assert not (family.parent / "s").exists()
