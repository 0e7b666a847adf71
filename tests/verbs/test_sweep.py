"""Sweeps: the best candidate, journals that survive, searches, and what is told."""

from __future__ import annotations

import json
import math
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from command_server import Commands, is_running, wait_for
from conftest import qa, random_tensors, run_cli, tensor_shapes, write_checkpoint

from skillmerge.claim import hold
from skillmerge.errors import CheckFailed, OutputLocked, UsageError
from skillmerge.reporter import Reporter
from skillmerge.study.scoring.scorers import find_scorer
from skillmerge.study.scoring.scores import Score
from skillmerge.verbs.demo.miniature import questions
from skillmerge.verbs.sweep.journal import Trial
from skillmerge.verbs.sweep.sweep import Sweep, sweep

pytestmark = pytest.mark.xdist_group("transformers")

transformers = pytest.importorskip("transformers")


# ----------------------------------------------------------------------------------------------------------- sweeps


def test_sweep_finds_a_lambda_that_holds(demo: Path) -> None:
    """What was chosen by one half of the questions is as good on the other as lambda = 1 is."""
    found = sweep(demo / "recipe.yaml", ["lam=0:2:0.5"], f"qa:{demo / 'choose.jsonl'}", demo / "a")
    assert len(found.trials) == 5
    held = sweep(found.best_recipe, ["lam=1"], f"qa:{demo / 'held.jsonl'}", demo / "b")
    best = sweep(demo / "recipe.yaml", [f"lam={found.best.values['lam']}"], f"qa:{demo / 'held.jsonl'}", demo / "c")
    assert best.best.scores["accuracy"].value >= held.best.scores["accuracy"].value
    assert found.trials[0].scores["accuracy"].value < 0.2
    text = (demo / "a.best.yaml").read_text()
    assert text.startswith("# Found by `skillmerge sweep`")
    assert "candidates" in text


def test_command_gives_the_same_scores_as_memory(demo: Path, tmp_path: Path, commands: Commands) -> None:
    script = tmp_path / "score.py"
    script.write_text(
        "import sys, transformers\n"
        "from skillmerge.study.scoring.scorers import find_scorer\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype='auto').eval()\n"
        "tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(sys.argv[1])\n"
        f"print(find_scorer('qa:{demo / 'choose.jsonl'}').function(model, tokenizer, 0)['accuracy'].value)\n"
    )
    command = f"{commands.python} {script} {{}}"
    one = sweep(demo / "recipe.yaml", ["lam=1.75"], command, tmp_path / "command")
    two = sweep(demo / "recipe.yaml", ["lam=1.75"], f"qa:{demo / 'choose.jsonl'}", tmp_path / "memory")
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


def test_a_killed_sweep_repeats_nothing(commands: Commands, family: Path) -> None:
    log, folder = family.parent / "log", family.parent / "s"
    command = COUNTING % (log, 0.1)
    process = commands.start("sweep", family, "--set", "lam=0:1:0.1", "--score", command, "-o", folder, "-q")
    wait_for(lambda: log.exists() and len(log.read_text().split()) >= 4, process)
    process.kill()
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
        with pytest.raises(UsageError, match="holds a different sweep"):
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
    with pytest.raises(UsageError, match="is not a sweep"):
        sweep(family, ["lam=0,1"], "echo 1 #", family.parent / "mine", overwrite=True)
    (family.parent / "t.best.yaml").write_text("mine")
    with pytest.raises(UsageError, match="was not written by a sweep"):
        sweep(family, ["lam=0,1"], "echo 1 #", family.parent / "t")


def test_one_sweep_at_a_time(family: Path) -> None:
    folder = family.parent / "s"
    sweep(family, ["lam=0,1"], "echo 1 #", folder)
    with hold(folder, Reporter()), pytest.raises(OutputLocked):
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
    assert "<h1>Sweep of recipe.yaml</h1>" in page
    assert "effective λ" in page
    process = run_cli(*arguments, "--json", cwd=folder)
    document = json.loads(process.stdout)
    assert (document["by"], document["resumed"], len(document["trials"])) == ("kept", 5, 5)
    assert json.loads((folder / "recipe.sweep" / "results.json").read_text())["best"] == document["best"]
    assert run_cli(*arguments[:-3], "--by", "nothing", cwd=folder).returncode == 2
    assert run_cli("sweep", family, "--set", "nu=1", "--score", "true", cwd=folder).returncode == 2
    assert run_cli("sweep", family, "--set", "lam=1:x", "--score", "true", cwd=folder).returncode == 2


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
        ("names", "scores of different names"),
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


def test_scratch_of_a_killed_run_is_removed(family: Path) -> None:
    scratch = family.parent / "s" / "scratch" / "model"
    sweep(family, ["lam=0"], "echo 1 #", family.parent / "s")
    scratch.mkdir(parents=True)
    (scratch / "model.safetensors").write_bytes(b"half")
    sweep(family, ["lam=0,1"], "echo 1 #", family.parent / "s")
    assert not scratch.parent.exists()


def test_an_interrupt_takes_the_command_along(commands: Commands, family: Path) -> None:
    mark = family.parent / "alive"
    process = commands.start("sweep", family, "--set", "lam=0", "--score", f"sleep 0.3; echo $$ > {mark}; sleep 100; #")
    wait_for(lambda: mark.exists() and mark.read_text().strip(), process)
    process.send_signal(signal.SIGTERM)
    ended = process.wait()
    assert ended.returncode == 143
    assert "finished candidates are kept; rerun" in ended.stderr
    wait_for(lambda: not is_running(int(mark.read_text())), seconds=5)


def test_damage_inside_a_journal_is_not_passed_over(family: Path) -> None:
    sweep(family, ["lam=0:1:0.25"], "echo 1 #", family.parent / "s")
    journal = family.parent / "s" / "journal.jsonl"
    lines = journal.read_text().split("\n")
    for damage in ([lines[0], "{", *lines[2:]], ["[]", *lines[1:]], ['{"a": 1}', "3", ""]):
        journal.write_text("\n".join(damage))
        with pytest.raises(UsageError, match=r"is damaged, or not a sweep's|holds a different sweep"):
            sweep(family, ["lam=0:1:0.25"], "echo 1 #", family.parent / "s")
    assert len(sweep(family, ["lam=0"], "echo 1 #", family.parent / "s", overwrite=True).trials) == 1


def test_a_search_with_other_bounds_is_another(family: Path) -> None:
    pytest.importorskip("optuna")
    options: dict[str, Any] = {"search": "random", "trials": 2, "output": family.parent / "s"}
    sweep(family, ["lam=0:2"], "echo 1 #", **options)
    with pytest.raises(UsageError, match="holds a different sweep: axes"):
        sweep(family, ["lam=0:1"], "echo 1 #", **options)
    with pytest.raises(UsageError, match="minimise"):
        sweep(family, ["lam=0:2"], "echo 1 #", minimise=True, **options)


def test_no_place_for_the_best_recipe_is_told_first(family: Path) -> None:
    (family.parent / "s.best.yaml").mkdir()
    with pytest.raises(UsageError, match="was not written by a sweep"):
        sweep(family, ["lam=0"], "echo 1 #", family.parent / "s")
    assert not (family.parent / "s").exists()
