"""Gates: each against an independent figure, both verdicts, alone and before publication."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import time
import xml.etree.ElementTree as xml
from pathlib import Path
from typing import Any

import pytest
import torch
from command_server import Commands, is_running, wait_for
from conftest import read_checkpoint, run_cli, write_recipe

import skillmerge
from skillmerge.errors import CheckFailed, RecipeError, UsageError
from skillmerge.reporter import Reporter
from skillmerge.study.gates import GateFailed, Outcome, gate
from skillmerge.verbs.demo.miniature import FAMILY

pytestmark = pytest.mark.xdist_group("transformers")

TEXT = "mira is a baker . mira lives in oslo . "


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four small trained models, which transformers loads, and a text."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(FAMILY, folder, dirs_exist_ok=True)
    (folder / "text.txt").write_text(TEXT * 30)
    return folder


def recipe_with(folder: Path, gates: dict[str, Any], output: str = "merged", **keys: Any) -> Path:
    models = {"target": "target-sft", "rl": "source-rl", "sft": "source-sft"}
    return write_recipe(folder, models=models, output={"path": output}, gates=gates, **keys)


def gates_file(folder: Path, gates: dict[str, Any]) -> Path:
    path = folder / "gates.yaml"
    path.write_text(json.dumps({"gates": gates}))
    return path


@pytest.fixture(scope="module")
def judged(trained: Path) -> Path:
    return skillmerge.apply(recipe_with(trained, {}, "finished"), stats="full").output


def measured(outcomes: list[Outcome]) -> dict[str, float | None]:
    return {outcome.gate: outcome.measured for outcome in outcomes}


def whole(folder: Path, *models: str) -> list[torch.Tensor]:
    """Every element of some models as one vector each, in float64."""
    found = [read_checkpoint(folder / model) for model in models]
    return [torch.cat([tensors[name].flatten().double() for name in sorted(found[0])]) for tensors in found]


# ---------------------------------------------------------------------------------------------- what is measured


def test_figures_are_those_of_whole_models(trained: Path, judged: Path) -> None:
    everything = {"min": -1e9, "max": 1e9}
    kinds = ("changed", "vanished", "realised", "realised_lambda")
    gates = dict.fromkeys(kinds, everything)
    found = measured(gate(judged, gates_file(trained, gates)).outcomes)
    t, r, s, y = whole(trained, "target-sft", "source-rl", "source-sft", "finished")
    v, moved = r - s, r != s
    assert found["changed"] == pytest.approx(float((y != t).double().mean()))
    assert found["vanished"] == pytest.approx(float((y == t)[moved].double().mean()))
    realised = float(torch.dot(y - t, 0.7 * v) / torch.dot(0.7 * v, 0.7 * v))
    assert found["realised"] == pytest.approx(realised, rel=1e-5)
    assert found["realised_lambda"] == pytest.approx(0.7 * realised, rel=1e-5)


def test_norm_ratio_is_of_every_module(trained: Path, judged: Path) -> None:
    outcomes = gate(judged, gates_file(trained, {"norm_ratio": {"max": 0.02}})).outcomes
    target, output = read_checkpoint(trained / "target-sft"), read_checkpoint(judged)
    for kind, part in (("mlp", "mlp"), ("attention", "self_attn"), ("embedding", "embed")):
        names = [name for name in target if part in name]
        moved = math.fsum(float((output[name].double() - target[name].double()).norm() ** 2) for name in names)
        before = math.fsum(float(target[name].double().norm() ** 2) for name in names)
        outcome = next(item for item in outcomes if item.gate == f"norm_ratio {kind}")
        assert outcome.measured == pytest.approx(math.sqrt(moved / before), rel=1e-6)
        assert outcome.passed == (math.sqrt(moved / before) <= 0.02)


def test_cosine_is_that_of_inspect(trained: Path, judged: Path) -> None:
    recipe = recipe_with(trained, {}, "finished")
    wanted = skillmerge.inspect(recipe, base=str(trained / "base"))
    gates = {"cosine_z": {"max": wanted.total["cosine_z"] + 1e-6, "base": "base"}}
    (default, outcome) = gate(judged, gates_file(trained, gates)).outcomes
    assert default.passed
    assert outcome.measured == wanted.total["cosine_z"]
    assert outcome.passed
    gates = {"cosine_z": {"max": 1e9, "modules": ["mlp", "expert"]}}
    found = {item.gate: item for item in gate(judged, gates_file(trained, gates)).outcomes}
    assert found["cosine_z mlp"].measured is not None
    assert not found["cosine_z expert"].passed


@pytest.mark.usefixtures("quick_loads")
def test_perplexity_is_that_of_the_model_and_its_parent(trained: Path, judged: Path) -> None:
    transformers = pytest.importorskip("transformers")

    def perplexity(folder: Path) -> float:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        tokens = tokenizer(TEXT * 30, return_tensors="pt", add_special_tokens=False)["input_ids"]
        window = model.config.max_position_embeddings
        total, count = 0.0, 0
        for piece in tokens.split(window, dim=1):
            with torch.inference_mode():
                logits = model(input_ids=piece).logits[0, :-1].double()
            total -= float(logits.log_softmax(-1).gather(1, piece[0, 1:, None]).sum())
            count += piece.shape[1] - 1
        return math.exp(total / count)

    ours, theirs = perplexity(judged), perplexity(trained / "source-rl")
    asked = {"text": "text.txt", "max": ours * 1.01, "max_ratio": ours / theirs * 0.99, "of": "rl"}
    gates = {"perplexity": asked, "loads": True, "finite_logits": True, "finite": True}
    found = {item.gate: item for item in gate(judged, gates_file(trained, gates)).outcomes}
    assert found["perplexity"].measured == pytest.approx(ours, rel=1e-3)
    assert found["perplexity"].passed
    assert found["perplexity ratio"].measured == pytest.approx(ours / theirs, rel=2e-3)
    assert not found["perplexity ratio"].passed
    assert all(found[kind].passed for kind in ("loads", "finite_logits", "finite"))


COMMANDS: list[tuple[str, dict[str, Any], float | None, bool]] = [
    ("echo 0.75 #", {"min": 0.7}, 0.75, True),
    ("echo 0.75 #", {"max": 0.7}, 0.75, False),
    ("ls {} | grep -c config.json", {"min": 1, "max": 3}, 3, True),
    ("ls here.txt && echo 3 #", {"min": 3}, 3, True),
    ("""echo '{"a": 1, "b": 2}' #""", {"min": 2, "score": "b"}, 2, True),
    ("""echo '{"a": 1, "b": 2}' #""", {"min": 0}, None, False),
    ("echo nan #", {"min": 0}, None, False),
    ("echo 1; exit 9 #", {"min": 0}, None, False),
    ("echo nothing", {"min": 0}, None, False),
    ("(sleep 100 &) ; echo 4 #", {"min": 1}, 4, True),
    ("yes | head -c 3000000; echo 5 #", {"min": 1}, 5, True),
    ("cat; echo 6 #", {"min": 1}, 6, True),
    ("sleep 60 #", {"min": 0, "timeout": 0.2}, None, False),
]


@pytest.mark.parametrize(("run", "limits", "number", "passed"), COMMANDS)
def test_command_is_judged_by_the_number_it_prints(
    trained: Path, judged: Path, run: str, limits: dict[str, Any], number: float | None, passed: bool
) -> None:
    (trained / "here.txt").touch()
    command = {"run": run, "name": "it", **limits}
    outcome = gate(judged, gates_file(trained, {"commands": [command]})).outcomes[-1]
    assert (outcome.gate, outcome.measured, outcome.passed) == ("command it", number, passed)
    assert number is not None or outcome.detail


def test_values_that_are_not_finite_are_found(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "target-sft", tmp_path / "target-sft")
    shutil.copytree(trained / "source-rl", tmp_path / "source-rl")
    shutil.copytree(trained / "source-sft", tmp_path / "source-sft")
    path = tmp_path / "target-sft" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-2:] = b"\x80\x7f"  # bfloat16's infinity
    path.write_bytes(data)
    recipe = recipe_with(tmp_path, {"finite": True})
    with pytest.raises(GateFailed) as caught:
        skillmerge.apply(recipe, allow_nonfinite=True)
    assert [item.gate for item in caught.value.outcomes if not item.passed] == ["finite"]
    assert "NaN or Inf" in caught.value.outcomes[-1].detail


# ---------------------------------------------------------------------------------------- before anything is seen


def test_nothing_is_published_where_a_gate_fails(trained: Path) -> None:
    recipe = recipe_with(trained, {"changed": {"max": 0.001}, "vanished": {"max": 1}})
    process = run_cli("apply", recipe)
    assert process.returncode == 3
    assert not (trained / "merged").exists()
    assert not (trained / "merged.partial").exists()
    for word in ("changed", "at most 0.001", "FAILED", "vanished", "passed"):
        assert word in process.stdout
    assert "1 of 2 gates failed: changed: 0.9" in process.stderr
    document = json.loads(run_cli("apply", recipe, "--json").stdout)
    assert [row["passed"] for row in document["gates"]] == [False, True]
    assert document["exit_status"] == 3


def test_report_tells_the_gates_of_a_refused_output(trained: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    recipe = recipe_with(trained, {"changed": {"max": 0.001}, "vanished": {"max": 1}}, "reported")
    assert run_cli("apply", recipe, "--report", page).returncode == 3
    text = page.read_text()
    assert "1 of 2 failed: nothing was published." in text
    assert text.index("FAILED") < text.index("passed")
    assert "at most 0.001" in text


def test_failed_output_is_kept_and_gone_on_from(trained: Path, tmp_path: Path) -> None:
    class Shards(Reporter):
        def __init__(self) -> None:
            super().__init__()
            self.finished: list[str] = []

        def event(self, name: str, **what: Any) -> None:
            self.finished += [what["file"]] if name == "shard_finished" else []

    recipe = recipe_with(trained, {"changed": {"max": 0.001}}, "kept")
    with pytest.raises(GateFailed):
        skillmerge.apply(recipe, keep_failed=True)
    staged = trained / "kept.partial" / "files"
    skillmerge.verify(staged)
    outcomes = gate(staged, gates_file(trained, {"cosine_z": {"max": 1e9}})).outcomes
    assert outcomes[-1].passed, "the models that went in are found from there too"
    told = Shards()
    result = skillmerge.apply(recipe_with(trained, {"changed": {"min": 0.001}}, "kept"), reporter=told)
    assert told.finished == [], "only the words of the recipe have changed"
    assert [outcome.passed for outcome in result.gates] == [True]
    skillmerge.verify(result.output)
    plain = skillmerge.apply(recipe_with(trained, {}, "plain"))
    for file in result.output.glob("*.safetensors"):
        assert file.read_bytes() == (plain.output / file.name).read_bytes()


def test_gates_of_a_finished_output_are_told_again(trained: Path) -> None:
    recipe = recipe_with(trained, {"commands": [{"run": "date +%s%N #", "min": 0, "name": "now"}]}, "again")
    first = skillmerge.apply(recipe)
    second = skillmerge.apply(recipe)
    assert second.already
    assert second.gates == first.gates
    assert len(first.gates) == 2


def test_merge_that_did_nothing_fails_unless_allowed(trained: Path) -> None:
    nothing = {"merge": "target + lam * (rl - rl)"}
    with pytest.raises(GateFailed, match=r"changed: 0 \(required: more than 0\)"):
        skillmerge.apply(recipe_with(trained, {}, "nothing", **nothing))
    with pytest.raises(GateFailed, match=r"changed: 0 \(required"):
        skillmerge.apply(recipe_with(trained, {}, "nothing"), coefficients={"lam": 0.0})
    allowed = recipe_with(trained, {"changed": {"min": 0}}, "nothing", **nothing)
    assert skillmerge.apply(allowed).gates[0].passed
    taken = recipe_with(trained, {}, "taken", merge="rl")
    taken.write_text(json.dumps({**json.loads(taken.read_text()), "output": {"path": "taken", "like": "target"}}))
    assert skillmerge.apply(taken).gates[0].measured == 1.0, "all of it is another model's"


@pytest.mark.parametrize(
    ("gates", "options", "message"),
    [
        ({}, {"stats": "off"}, "needs statistics"),
        ({"perplexity": {"text": "absent.txt", "max": 3}}, {}, "absent.txt is not a nonempty text file"),
        ({"loads": True}, {"no_local": True, "push": "acme/model"}, "--no-local keeps none"),
    ],
)
def test_gate_that_cannot_be_measured_is_told_before_any_work(
    trained: Path, gates: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        skillmerge.apply(recipe_with(trained, gates, "never"), **options)
    assert not (trained / "never.partial").exists()


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        ({"vanishd": {"max": 1}}, "did you mean `vanished`"),
        ({"vanished": {}}, "requires nothing"),
        ({"vanished": {"least": 1}}, "known keys here: min, max"),
        ({"realised": {"min": 2, "max": 1}}, "can never pass"),
        ({"vanished": {"max": 1, "modules": "mpl"}}, "did you mean `mlp`"),
        ({"perplexity": {"text": "text.txt"}}, "requires nothing"),
        ({"perplexity": {"text": "text.txt", "max_ratio": 1, "of": "traget"}}, "not a whole model"),
        ({"commands": [{"run": "true"}]}, "requires nothing"),
        ({"loads": "yes"}, "must be true or false"),
    ],
)
def test_gates_that_make_no_sense_are_errors_with_a_place(trained: Path, gates: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        skillmerge.plan(recipe_with(trained, gates))
    assert re.search(r"recipe\.yaml:1[5-9]:|recipe\.yaml:2\d:", caught.value.message)


def test_skill_has_no_gates(trained: Path) -> None:
    recipe = write_recipe(
        trained, "rl - sft", models={"rl": "source-rl", "sft": "source-sft"}, coefficients={},
        output={"path": "skill", "kind": "skill"}, gates={},
    )  # fmt: skip
    with pytest.raises(RecipeError, match="a skill has no `gates`"):
        skillmerge.plan(recipe)


# ------------------------------------------------------------------------------------------------- the verb gate


def test_gate_command_judges_a_finished_folder(trained: Path, judged: Path, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("gates:\n  changed: {min: 0.5}\n")
    bad.write_text("gates:\n  changed: {min: 0.999999}\n")
    process = run_cli("gate", judged, "--gates", good)
    assert process.returncode == 0, process.stderr
    assert "passed" in process.stdout
    junit = tmp_path / "junit.xml"
    process = run_cli("gate", judged, "--gates", bad, "--json", "--junit", junit)
    assert process.returncode == 3
    assert json.loads(process.stdout)["gates"][0]["passed"] is False
    suite = xml.parse(junit).getroot()[0]
    assert suite.attrib["failures"] == "1"
    assert suite[0][0].tag == "failure"


def test_gate_command_needs_gates_and_a_sound_output(trained: Path, judged: Path, tmp_path: Path) -> None:
    process = run_cli("gate", trained / "base", "--gates", gates_file(tmp_path, {}))
    assert process.returncode == 3
    moved = tmp_path / "moved"
    shutil.copytree(judged, moved)
    file = gates_file(tmp_path, {"cosine_z": {"max": 9}})
    process = run_cli("gate", moved, "--gates", file)
    assert process.returncode == 3
    assert "does not exist" in process.stderr
    assert run_cli("gate", moved, "--gates", file, "--base-folder", trained).returncode == 0
    (moved / "config.json").write_text("{}")
    assert run_cli("gate", moved, "--gates", file).returncode == 3


def test_commands_of_a_manifest_are_not_run(trained: Path, tmp_path: Path) -> None:
    """Whoever made a model that was downloaded wrote them."""
    trace = tmp_path / "trace"
    gates = {"commands": [{"run": f"touch {trace}; echo 1 #", "min": 0}]}
    made = skillmerge.apply(recipe_with(trained, gates, "commanded")).output
    trace.unlink()
    process = run_cli("gate", made)
    assert process.returncode == 2
    assert "written by its author" in process.stderr
    assert not trace.exists()
    assert run_cli("gate", made, "--gates", gates_file(trained, gates)).returncode == 0
    assert trace.exists()


def test_command_that_changes_the_model_ends_the_run(trained: Path) -> None:
    gates = {"commands": [{"run": "sed -i s/true/TRUE/ {}/config.json; touch {}/cache; echo 1 #", "min": 0}]}
    with pytest.raises(CheckFailed, match="changed the model's files"):
        skillmerge.apply(recipe_with(trained, gates, "touched"))
    assert not (trained / "touched").exists()
    harmless = {"commands": [{"run": "touch {}/cache; echo 1 #", "min": 0}]}
    output = skillmerge.apply(recipe_with(trained, harmless, "touched")).output
    assert not (output / "cache").exists()
    skillmerge.verify(output)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_during_a_gate_ends_it_and_loses_nothing(
    commands: Commands, trained: Path, number: int, status: int
) -> None:
    flag = trained / "running"
    flag.unlink(missing_ok=True)
    gates = {"commands": [{"run": f"sleep 0.3; echo $$ > {flag}; sleep 100; echo 1 #", "min": 0}]}
    recipe, log = recipe_with(trained, gates, f"ended-{status}"), trained / f"{status}.jsonl"
    process = commands.start("apply", recipe, "--events", log)
    wait_for(lambda: flag.exists() and flag.read_text().strip(), process)
    started = time.monotonic()
    process.send_signal(number)
    ended = process.wait()
    assert time.monotonic() - started < 10
    assert ended.returncode == status
    assert "rerun to continue" in ended.stderr
    assert not is_running(int(flag.read_text()))
    last = json.loads(log.read_text().splitlines()[-1])
    assert (last["event"], last["exit_status"]) == ("failed", status)
    easy = recipe_with(trained, {"changed": {"min": 0.1}}, f"ended-{status}")
    assert run_cli("apply", easy, "--events", log).returncode == 0
    events = [json.loads(line)["event"] for line in log.read_text().splitlines()]
    assert events.count("shard_finished") == 1, "the shard of the run that was ended was kept"


def test_refused_output_is_nobodys_release(trained: Path) -> None:
    recipe = recipe_with(trained, {"changed": {"max": 0.001}}, "refused")
    with pytest.raises(GateFailed):
        skillmerge.apply(recipe, keep_failed=True)
    (trained / "refused.partial" / "files").rename(trained / "refused")
    assert run_cli("plan", recipe, "--detailed-exitcode").returncode == 10
    assert run_cli("apply", recipe).returncode == 2
    with pytest.raises(CheckFailed, match="failed its gates: changed"):
        skillmerge.push(trained / "refused", "acme/refused")


def test_what_a_command_leaves_running_ends_with_it(trained: Path) -> None:
    left = trained / "pid of what is left"
    run = f"(sleep 100; echo x >> {{}}/config.json) > /dev/null 2>&1 & echo $! > '{left}'; echo 1 #"
    output = skillmerge.apply(recipe_with(trained, {"commands": [{"run": run, "min": 0}]}, "left")).output
    wait_for(lambda: not is_running(int(left.read_text())), seconds=5)
    skillmerge.verify(output)


def test_what_a_command_complains_of_is_in_no_file(trained: Path, tmp_path: Path) -> None:
    gates = {"commands": [{"run": "echo hf_canary >&2; exit 3 #", "min": 0}]}
    recipe = recipe_with(trained, gates, "complains")
    files = [tmp_path / name for name in ("e.jsonl", "j.xml", "r.html")]
    options = ("--events", files[0], "--junit", files[1], "--report", files[2], "--keep-failed")
    process = run_cli("apply", recipe, *options)
    assert process.returncode == 3
    assert "note: command" in process.stderr
    written = [*files, *(path for path in (trained / "complains.partial").rglob("*") if path.is_file())]
    told = [path.name for path in written if b"hf_canary\n" in path.read_bytes()]
    assert told == []


def test_output_that_could_not_be_measured_is_not_thrown_away(trained: Path) -> None:
    recipe = recipe_with(trained, {"commands": [{"run": "exit 9 #", "min": 0}]}, "unmeasured")
    with pytest.raises(GateFailed, match="exit status 9"):
        skillmerge.apply(recipe)
    assert list((trained / "unmeasured.partial" / "files").glob("*.safetensors"))


@pytest.mark.parametrize("option", ["--junit", "--events", "--result-file", "--report"])
@pytest.mark.parametrize(
    "precious", ["recipe.yaml", "target-sft/config.json", "finished/model.safetensors", "finished/new"]
)
def test_file_for_programs_takes_no_others_place(trained: Path, judged: Path, option: str, precious: str) -> None:
    recipe = recipe_with(trained, {}, "placed")
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    process = run_cli("apply", recipe, option, trained / precious)
    assert process.returncode == 2, process.stderr
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before


def test_result_file_says_that_a_run_failed(trained: Path, tmp_path: Path) -> None:
    """It would otherwise still say that an earlier run was fine."""
    written = tmp_path / "result.json"
    good, failing = {"changed": {"min": 0.001}}, {"changed": {"max": 0.001}}
    for gates, size, ok in ((good, "9GB", True), (failing, "9GB", False), (good, "9GB", True), (good, "1MB", False)):
        recipe = recipe_with(trained, gates, "resulting")
        run = run_cli("apply", recipe, "--result-file", written, "--json", "--overwrite", "--memory-limit", size)
        assert json.loads(written.read_text()) == json.loads(run.stdout)
        assert json.loads(run.stdout)["ok"] is ok
    printed = run_cli("apply", recipe_with(trained, failing, "resulting"), "--result-file", "-", "--overwrite")
    assert json.loads(printed.stdout)["gates"][0]["passed"] is False


def test_gates_without_a_line_have_the_default(trained: Path) -> None:
    """Every line of the table is a comment, say."""
    recipe = recipe_with(trained, {}, "null", merge="target + lam * (rl - rl)")
    recipe.write_text(recipe.read_text().replace('"gates": {}', '"gates": null'))
    with pytest.raises(GateFailed, match="changed: 0"):
        skillmerge.apply(recipe)


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        ({"cosine_z": {"max": 1, "base": "nowhere"}}, "nowhere is not a folder"),
        ({"vanished": {"max": 1, "modules": "router"}}, "the model has no router"),
        ({"perplexity": {"text": "empty.txt", "max": 3}}, "not a nonempty text file"),
    ],
)
def test_gate_on_what_is_not_there_is_told_by_plan_and_apply(
    trained: Path, gates: dict[str, Any], message: str
) -> None:
    (trained / "empty.txt").touch()
    recipe = recipe_with(trained, gates, "never")
    process = run_cli("plan", recipe)
    assert process.returncode == 0
    with pytest.raises(RecipeError, match=message) as caught:
        skillmerge.apply(recipe)
    assert f"warning: apply would fail: {caught.value.message}\nhelp: {caught.value.fix}\n" in process.stdout
    assert re.search(r"recipe\.yaml:\d+:\d+: ", caught.value.message)
    assert run_cli("plan", recipe, "--strict").returncode == 2


def test_failed_output_cannot_be_kept_where_nothing_is(trained: Path) -> None:
    with pytest.raises(UsageError, match="keeps no files"):
        skillmerge.apply(recipe_with(trained, {}, "never"), keep_failed=True, no_local=True, push="acme/model")
