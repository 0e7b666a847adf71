"""Other runtimes and processes that load a model: statuses and messages.

vLLM is a small stand-in here, a module of that name on the path of the process that loads: only what is done with its
answers is tested. The real one is run by `make runtimes` (tests/runtimes).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from command_server import Commands, is_running, wait_for
from conftest import run_cli, write_recipe

import skillmerge
from skillmerge.errors import CheckFailed, RecipeError, ResourceError, UsageError
from skillmerge.recipes.parse import load_gates
from skillmerge.recipes.tables.gates import Runtime
from skillmerge.reporter import Reporter
from skillmerge.study.loads import child
from skillmerge.study.loads.generation import TOKENS, compare, first_difference
from skillmerge.study.loads.loading import RUNTIMES, asked_runtimes, check_generation, check_load, load

pytestmark = pytest.mark.xdist_group("transformers")

FAKE = """
import os, signal, time
from types import SimpleNamespace as Some
__version__ = "0.0-fake"
mode, _, rest = os.environ["FAKE_VLLM"].partition(" ")
assert os.environ["HF_HUB_OFFLINE"] == "1"
if mode == "broken":
    raise ImportError("libnuma.so.1: cannot open shared object file")
print("vLLM prints what it likes")

class SamplingParams:
    def __init__(self, temperature, max_tokens, ignore_eos, logprobs, detokenize):
        assert (temperature, ignore_eos) == (0.0, True)
        self.count = max_tokens

class LLM:
    def __init__(self, model, trust_remote_code, **keys):
        assert os.path.isabs(model) and not trust_remote_code
        if mode == "refuses":
            raise ValueError(rest)
        if mode == "dies":
            os.kill(os.getpid(), int(rest))
        if mode == "sleeps":
            open(rest, "w").write(str(os.getpid()))
            time.sleep(100)

    def generate(self, prompts, settings, use_tqdm):
        tokens = [int(token) for token in rest.split()] or list(range(settings.count))
        rows = [{token: Some(logprob=-1.0), token + 1: Some(logprob=-1.001)} for token in tokens]
        return [Some(outputs=[Some(token_ids=tokens, logprobs=rows)])]
"""


def generated(*tokens: int, gap: float = 0.001) -> dict[str, Any]:
    """What transformers generates: each step with its token and the one before as the likely ones."""
    steps = [{"likely": [[token, -1.0], [token - 1, -1.0 - gap]], "largest": 1.0} for token in tokens]
    return {"prompt": [1, 2], "dtype": "bfloat16", "tokens": list(tokens), "steps": steps}


REPORT = {"class": "LlamaForCausalLM", "tokenizer": {"notes": []}, "generated": generated(*range(TOKENS))}


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """fake("refuses WORDS") installs a stand-in of vLLM that does that."""
    library = tmp_path / "library"
    (library / "vllm").mkdir(parents=True)
    (library / "vllm" / "__init__.py").write_text(FAKE)
    monkeypatch.syspath_prepend(str(library))
    monkeypatch.setenv("PYTHONPATH", str(library), prepend=":")

    def install(does: str) -> None:
        monkeypatch.setenv("FAKE_VLLM", does)

    return install


# --------------------------------------------------------------------------------------------------------- the answers


def test_runtime_that_generates_the_same_passes(fake: Callable[[str], None], tmp_path: Path) -> None:
    fake("alike")
    found = check_generation(tmp_path, REPORT, "vllm")
    assert (found["version"], found["same"], found["tokens"]) == ("0.0-fake", TOKENS, list(range(TOKENS)))
    assert "notes" not in found


def test_runtime_that_generates_something_else_fails(fake: Callable[[str], None], tmp_path: Path) -> None:
    fake("other 0 1 2 9 9 9 9 9")
    with pytest.raises(CheckFailed) as caught:
        check_generation(tmp_path, REPORT, "vllm")
    assert caught.value.message == (
        f"{tmp_path}: vllm generates different tokens than transformers: token 4 is 9, and 3 in transformers; "
        "log probabilities of 3 and 9: -1.0000 and not likely in transformers, not likely and -1.0000 in vllm"
    )


def test_near_tie_is_a_note(fake: Callable[[str], None], tmp_path: Path) -> None:
    fake("other 0 1 2 2 9 9 9 9")
    found = check_generation(tmp_path, REPORT, "vllm")
    assert found["notes"] == [
        "vllm and transformers differ where two tokens are equally likely within rounding: token 4 is 2, and 3 in "
        "transformers; log probabilities of 3 and 2: -1.0000 and -1.0010 in transformers, -1.0010 and -1.0000 in vllm"
    ]


@pytest.mark.parametrize(("gap", "tie"), [(0.0, True), (0.03, True), (0.032, False), (1.0, False)])
def test_tie_is_within_four_units_of_the_largest_logit(gap: float, tie: bool) -> None:
    """One unit of bfloat16 at 1 is 1/128."""
    theirs = {"tokens": [4], "steps": [{"likely": [[4, -1.0], [5, -1.001]]}]}
    found = compare(generated(5, gap=gap), theirs)
    assert found["difference"]["noise"] == 4 / 128
    assert found["difference"]["tie"] is tie
    assert found["same"] == 0
    assert "token 1 is 4, and 5 in transformers" in first_difference(found, "vllm")


def test_float32_ties_are_narrow() -> None:
    theirs = {"tokens": [4], "steps": [{"likely": [[4, -1.0], [5, -1.001]]}]}
    found = compare({**generated(5), "dtype": "float32"}, theirs)
    assert found["difference"]["tie"] is False
    assert found["furthest"] == pytest.approx(0.001)


REFUSALS: list[tuple[str, type[Exception], str]] = [
    ("refuses Model architectures ['X'] are not supported", CheckFailed,
     "vllm cannot load it: ValueError: Model architectures ['X'] are not supported"),
    ("refuses CUDA out of memory. Tried to allocate 2 GiB", ResourceError,
     "this machine could not load it with vllm: ValueError: CUDA out of memory. Tried to allocate 2 GiB"),
    ("refuses No available memory for the cache blocks", ResourceError, "No available memory for the cache blocks"),
    ("refuses No usable temporary directory found in ['/tmp']", ResourceError, "No usable temporary directory"),
    ("dies 9", ResourceError, "this machine could not load it with vllm: the loading process was killed by signal 9"),
    ("dies 4", ResourceError, "the loading process was killed by signal 4"),
    ("dies 11", CheckFailed, "vllm could not load it, the loading process was killed by signal 11"),
    ("broken", ResourceError, "the installed vLLM cannot be imported: ImportError: libnuma.so.1"),
]  # fmt: skip


@pytest.mark.parametrize(("does", "kind", "message"), REFUSALS)
def test_refusal_blames_the_model_and_a_fault_the_machine(
    fake: Callable[[str], None], tmp_path: Path, does: str, kind: type[Exception], message: str
) -> None:
    fake(does)
    with pytest.raises(kind) as caught:
        check_generation(tmp_path, REPORT, "vllm")
    assert message in str(caught.value)


def test_load_that_takes_too_long_is_ended(
    fake: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flag = tmp_path / "pid"
    fake(f"sleeps {flag}")
    monkeypatch.setattr(child, "TIMEOUT", 6.0)
    with pytest.raises(ResourceError) as caught:
        check_generation(tmp_path, REPORT, "vllm")
    assert str(caught.value) == (
        f"{tmp_path}: this machine could not load it with vllm: it took longer than 6 seconds\n"
        "rerun on an idle or faster machine; the model may be valid"
    )
    assert not flag.exists() or not is_running(int(flag.read_text()))


def test_model_that_writes_no_text_has_nothing_to_compare(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="BertForMaskedLM generates no text from text, so vllm has nothing to compare"):
        check_generation(tmp_path, {"class": "BertForMaskedLM", "generated": None}, "vllm")


# -------------------------------------------------------------------------------------------- faults with transformers


@pytest.mark.parametrize(
    ("does", "kind", "message"),
    [
        ("import os; os.kill(os.getpid(), 9)", ResourceError, "killed by signal 9"),
        ("raise BaseException('Rust panics')", CheckFailed, "could not load it cleanly: BaseException: Rust panics"),
        ("raise MemoryError", ResourceError, "could not load it with transformers: MemoryError"),
        ("raise OSError(28, 'No space left on device')", ResourceError, "No space left on device"),
        ("import a_library_that_is_missing", ResourceError, "transformers cannot be imported: No module named 'a_lib"),
        ("import os; os.kill(os.getpid(), 11)", CheckFailed, "transformers could not load it, the loading process"),
        ("import os; os._exit(1)", CheckFailed, "the loading process ended without a message"),
    ],
)
def test_fault_of_the_machine_never_blames_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, does: str, kind: type[Exception], message: str
) -> None:
    (tmp_path / "transformers.py").write_text(does)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    with pytest.raises(kind, match=message):
        check_load(tmp_path)


def test_no_temporary_folder_is_status_5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "recipe.yaml"))
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(ResourceError) as caught:
        load(tmp_path)
    assert caught.value.message == "no temporary file can be made: Not a directory"
    assert caught.value.exit_status == 5


# ------------------------------------------------------------------------------------------------------- what is asked


def test_every_word_for_runtimes_is_the_same() -> None:
    assert tuple(RUNTIMES) == get_args(Runtime)
    assert asked_runtimes(False) == asked_runtimes([]) == ()
    assert asked_runtimes(True) == asked_runtimes("transformers") == ("transformers",)
    assert asked_runtimes(["vllm", "transformers", "vllm"]) == ("transformers", "vllm")
    with pytest.raises(UsageError) as caught:
        asked_runtimes("vlm")
    assert str(caught.value) == "`vlm` is not a runtime\ndid you mean `vllm`?"


def gates_of(folder: Path, loads: Any) -> list[str]:
    path = folder / "gates.yaml"
    path.write_text(json.dumps({"gates": {"changed": {"min": 0}, "loads": loads}}))
    return [gate.told for gate in load_gates(path)][1:]


def test_gate_names_runtimes(tmp_path: Path) -> None:
    assert gates_of(tmp_path, False) == []
    assert gates_of(tmp_path, True) == gates_of(tmp_path, ["transformers"]) == ["loads: yes"]
    assert gates_of(tmp_path, ["vllm", "transformers"]) == ["loads vllm: yes", "loads: yes"]
    for wrong, message in (
        (["vlm"], "did you mean `vllm`"),
        ([], "`loads` is empty"),
        ("vllm", "must be true or false"),
    ):
        with pytest.raises(RecipeError, match=message):
            gates_of(tmp_path, wrong)


def test_runtime_that_is_not_installed_is_told_before_any_work(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skillmerge.study.loads.loading.find_spec", lambda name: None if name == "vllm" else sys)
    process = run_cli("apply", write_recipe(family.parent, gates={"loads": ["vllm"]}))
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.endswith("\nerror: the gate `loads vllm` needs vllm\nhelp: pip install vllm\n")
    assert not (family.parent / "merged.partial").exists()
    assert run_cli("apply", write_recipe(family.parent)).returncode == 0
    process = run_cli("verify", "--load", "vllm", family.parent / "merged")
    assert (process.returncode, process.stderr) == (2, "error: this needs vllm\nhelp: pip install vllm\n")


# ------------------------------------------------------------------------------------------------- as a person meets it


def test_verify_and_the_gate_with_a_runtime(
    fake: Callable[[str], None], families: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a real model: the stand-in first generates something else, then what transformers was seen to generate."""
    output = families("llama") / "merged"
    report = load(output, tokens=TOKENS)
    tokens = report["generated"]["tokens"]
    # What transformers makes of it does not change: it is loaded once.
    monkeypatch.setattr("skillmerge.study.loads.loading.load", lambda *rest, **keys: dict(report))
    monkeypatch.setattr("skillmerge.study.gates.load", lambda *rest, **keys: dict(report))
    fake(f"other {' '.join(['63'] * TOKENS)}")
    process = run_cli("verify", output, "--load", "vllm", "--junit", tmp_path / "checks.xml")
    assert process.returncode == 3
    assert (
        f"{output}: vllm generates different tokens than transformers: token 1 is 63, and {tokens[0]}" in process.stderr
    )
    assert 'name="loads in vllm"' in (tmp_path / "checks.xml").read_text()
    fake(f"alike {' '.join(map(str, tokens))}")
    process = run_cli("verify", output, "--load", "transformers", "--load", "vllm")
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[1:] == [
        "loaded as LlamaForCausalLM: no missing, unexpected or mismatched keys; finite output",
        "loaded in vLLM 0.0-fake: all of 8 tokens match transformers, in bfloat16",
        "note: no tokenizer files; no tokenizer was loaded",
    ]
    gates = tmp_path / "gates.yaml"
    gates.write_text("gates: {changed: {min: 0}, loads: [transformers, vllm]}\n")
    process = run_cli("gate", output, "--gates", gates, "--json")
    assert process.returncode == 0, process.stderr
    assert [row["gate"] for row in json.loads(process.stdout)["gates"]] == ["changed", "loads", "loads vllm"]
    fake("refuses not this one")
    process = run_cli("gate", output, "--gates", gates)
    assert process.returncode == 3
    assert "1 of 3 gates failed: loads vllm: " in process.stderr
    assert "vllm cannot load it: ValueError: not this one" in process.stderr
    fake("dies 9")
    assert run_cli("gate", output, "--gates", gates).returncode == 5


@pytest.mark.parametrize(
    ("words", "loads"),
    [
        (("--load", "DIR"), True),
        (("DIR", "--load"), True),
        (("--load=transformers", "DIR"), True),
        (("--load", "transformers", "--load", "DIR"), True),
        (("--load", "-q", "DIR"), True),
        (("--load", "--", "DIR"), True),
        (("DIR",), False),
    ],
)
def test_load_may_stand_without_a_value(
    monkeypatch: pytest.MonkeyPatch, merged: Path, words: tuple[str, ...], loads: bool
) -> None:
    asked: list[tuple[str, ...]] = []

    def check(root: Path, runtimes: tuple[str, ...], reporter: Reporter) -> dict[str, Any]:
        asked.append(runtimes)
        return {"class": "X", "tokenizer": {"notes": []}}

    monkeypatch.setattr("skillmerge.verbs.verify.check_load", check)
    process = run_cli("verify", *(str(merged) if word == "DIR" else word for word in words))
    assert process.returncode == 0, process.stderr
    assert asked == [("transformers",)] * loads


def test_warning_of_a_load_is_printed_with_its_fix(monkeypatch: pytest.MonkeyPatch, merged: Path) -> None:
    warnings = [{"message": "other ids", "fix": "load it otherwise"}]
    report = {"ok": True, "class": "X", "tokenizer": {"notes": [], "warnings": warnings}}
    monkeypatch.setattr("skillmerge.study.loads.loading.load", lambda root, tokens: report)
    process = run_cli("verify", merged, "--load", "-q")
    assert (process.returncode, process.stderr) == (0, "warning: other ids\nhelp: load it otherwise\n")


@pytest.mark.parametrize(
    ("value", "asked"),
    [("1", ["transformers"]), ("true", ["transformers"]), ("0", []), ("transformers vllm", ["transformers", "vllm"])],
)
def test_variable_of_load_is_as_it_was(
    monkeypatch: pytest.MonkeyPatch, merged: Path, value: str, asked: list[str]
) -> None:
    found: list[Any] = []
    monkeypatch.setattr("skillmerge.verbs.verify.verify", lambda *rest, load, **keys: found.append(load) or 1 / 0)
    assert run_cli("verify", merged, SKILLMERGE_LOAD=value).returncode == 1
    assert found == [asked]


def test_unknown_runtime_is_told(merged: Path) -> None:
    process = run_cli("verify", merged, "--load=vlm")
    assert process.returncode == 2
    assert "`vlm` is not a runtime" in process.stderr


def test_signal_during_a_load_ends_it(commands: Commands, merged: Path, tmp_path: Path) -> None:
    flag = tmp_path / "pid"
    sleeps = f"import os, time\nopen({str(flag)!r}, 'w').write(str(os.getpid()))\ntime.sleep(100)"
    (tmp_path / "transformers.py").write_text(sleeps)
    process = commands.start("verify", merged, "--load", PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]))
    wait_for(lambda: flag.exists() and flag.read_text().strip(), process)
    process.send_signal(signal.SIGINT)
    assert process.wait().returncode == 130
    wait_for(lambda: not is_running(int(flag.read_text())), seconds=5)


def test_api_takes_the_same_words(merged: Path) -> None:
    with pytest.raises(UsageError, match="`tgi` is not a runtime"):
        skillmerge.verify(merged, load=["tgi"])
