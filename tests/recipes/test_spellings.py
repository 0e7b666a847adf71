"""What people write that means something elsewhere: the place, and the way out, in plan and in lint."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import run_cli, write_family

_HEAD = "skillmerge: 1\nmodels: {target: ./target, rl: ./rl, sft: ./sft}\n"
_LAM = _HEAD + "coefficients: {lam: @}\nmerge: target + lam * (rl - sft)\noutput: {path: out}\n"
_OUT = _HEAD + "merge: target + rl - sft\noutput: {path: out, @}\n"
_MERGE = _HEAD + "coefficients: {lam: 1}\nmerge: @\noutput: {path: out}\n"
_DTYPE = "`dtype` must be `same`, `bfloat16`, `float16` or `float32`, not "
_NONE = "which is no method of this version"
_ALONE = "write the arithmetic alone, such as target + lam * (rl - sft)"
MISTAKES = {
    (_LAM, "[0, .3, 1]"): (
        "3:21", "`lam` must be a number, not a list",
        "to change it over the layers, write `lam: {rules: [{layers: 0-, ramp: [0, 0.3, 1]}]}`; to try each: "
        "`skillmerge sweep RECIPE --set lam=0,0.3,1`",
    ),
    (_LAM, "50%"): ("3:21", "`lam` must be a number, not the text '50%'", "write 0.5"),
    (_LAM, "0,5"): ("3:24", "`5` must be a number, not empty", "write decimals with a point, such as 0.5"),
    (_LAM, '"0,5"'): ("3:21", "`lam` must be a number, not the text '0,5'", "write 0.5"),
    (_LAM, "1/2"): ("3:21", "`lam` must be a number, not the text '1/2'", "write 0.5"),
    (_LAM, "1_000"): ("3:21", "`lam` must be a number, not the text '1_000'", "write 1000"),
    (_LAM, "−0.5"): ("3:21", "`lam` must be a number, not the text '−0.5'", "write -0.5"),
    (_LAM, "null"): ("3:21", "`lam` must be a number, not empty", "write a number, such as 1"),
    (_LAM, "true"): ("3:21", "`lam` must be a number, not true", "write a number, such as 1"),
    (_LAM, "{value: 1}"): ("3:22", "unknown key `value`", "did you mean `default`?"),
    (_OUT, "dtype: fp16"): ("4:28", f"{_DTYPE}'fp16'", "did you mean `float16`?"),
    (_OUT, "dtype: fp32"): ("4:28", f"{_DTYPE}'fp32'", "did you mean `float32`?"),
    (_OUT, "dtype: float"): ("4:28", f"{_DTYPE}'float'", "did you mean `float32`?"),
    (_OUT, "dtype: bf16"): ("4:28", f"{_DTYPE}'bf16'", "did you mean `bfloat16`?"),
    (_OUT, "dtype: int4"): (
        "4:28", f"{_DTYPE}'int4'", "write weights of 16 or 32 bits, and quantize the output afterwards"
    ),
    (_OUT, "torch_dtype: bf16"): ("4:21", "unknown key `torch_dtype`", "did you mean `dtype`?"),
    (_OUT, "kind: task_vector"): (
        "4:27", "`kind` must be `model`, `skill` or `adapter`, not 'task_vector'", "did you mean `skill`?"
    ),
    (_OUT, "kind: lora"): (
        "4:27", "`kind` must be `model`, `skill` or `adapter`, not 'lora'", "did you mean `adapter`?",
    ),
    (_OUT, "keep: 3"): ("4:27", "`keep` must be less than or equal to 1, not 3", "write a share: `keep: 0.03` for 3%"),
    (_OUT, "push: {repo: x}"): ("4:34", "`repo` must be org/name, not 'x'", "write `repo: org/name`"),
    (_MERGE, "dare_ties(target, rl, sft)"): (
        "4:8", f"the expression calls `dare_ties`, {_NONE}",
        "write base + elect(drop(a - base, density=0.5), drop(b - base, density=0.5))",
    ),
    (_MERGE, "slerp(target, rl, 0.5)"): (
        "4:26", "the expression gives a number to `slerp` as an operand",
        "name it: `slerp(a, b, t=, linear_above=0.9995, scope=matrix)`",
    ),
    (_MERGE, "mean(target, rl)"): ("4:8", f"the expression calls `mean`, {_NONE}", "for an average write (a + b) / 2"),
    (_MERGE, "frob(target, rl)"): (
        "4:8", f"the expression calls `frob`, {_NONE}", "`skillmerge methods` lists those that there are"
    ),
    (_MERGE, "target + lambda * (rl - sft)"): (
        "4:17", "the expression names `lambda`, which is neither a model nor a coefficient", "did you mean `lam`?"
    ),
    (_MERGE, "target + alpha * (rl - sft)"): (
        "4:17", "the expression names `alpha`, which is neither a model nor a coefficient",
        "add `coefficients: {alpha: 1}`, or use: target, rl, sft, lam",
    ),
    (_MERGE, "target + lam ** 2 * (rl - sft)"): (
        "4:21", "the expression has `**`", "there are no powers: write lam * lam"
    ),
    (_MERGE, "target + lam^2 * (rl - sft)"): (
        "4:20", "the expression has an unexpected character '^'", "there are no powers: write lam * lam"
    ),
    (_MERGE, "target + 50% * (rl - sft)"): (
        "4:19", "the expression has an unexpected character '%'", "write percent as a number: 0.5 for 50%"
    ),
    (_MERGE, "target + 0,5 * (rl - sft)"): ("4:17", "the expression has a decimal comma", "write 0.5"),
    (_MERGE, "target = rl"): ("4:15", "the expression has an unexpected character '='", _ALONE),
    (_MERGE, "(target + rl"): ("4:8", "the expression has a `(` that is never closed", "close it with `)`"),
    (_MERGE, "target + rl)"): (
        "4:19", "the expression has `)` where an operator or the end is expected", "remove it, or open it with `(`"
    ),
    (_MERGE, "target +"): (
        "4:16", "the expression has nothing where a model, a number or `(` is expected",
        "write one, or leave `+` out",
    ),
    (_MERGE, '""'): ("4:8", "`merge` is empty", "write target + lam * (rl - sft)"),
}  # fmt: skip
WARNINGS = {
    (_MERGE, "target + lam * rl - sft"): (
        "4:1", 4, "the expression is one model only where `lam` is 1",
        "did you mean `target + lam * (rl - sft)`?", "accidental-model",
    ),
    (_LAM, "100"): (
        "3:16", 3, "with this `lam`, a model is multiplied by 100", "published merges stay below 2", "large-factor"
    ),
    (_OUT, "shard_size: 5"): ("4:21", 4, "`shard_size: 5` is 5 bytes", "did you mean `5GB`?", "odd-size"),
    (_OUT, "shard_size: 5000"): (
        "4:21", 4, "`shard_size: 5000` is 5000 bytes", "write a unit, such as 5GB", "odd-size"
    ),
    (_MERGE, "target + rl - sft"): ("3:16", 3, "coefficient `lam` does nothing", "remove it", "unused-name"),
    (_LAM, "{rules: [{layers: 0, value: 2}, {layers: 0-, value: 1}]}"): (
        "3:30", 3, "this rule of `lam` has no effect: the one on line 3 matches everything that it matches",
        "put general rules first", "hidden-rule",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("spellings"), config={"model_type": "odd"}).parent


@pytest.mark.parametrize("mistake", MISTAKES)
def test_spelling_of_others_is_told_with_the_way_out(folder: Path, mistake: tuple[str, str]) -> None:
    template, text = mistake
    (folder / "r.yaml").write_text(template.replace("@", text))
    place, message, fix = MISTAKES[mistake]
    advice = f"help: {fix}\n" if fix else ""
    for command in ("plan", "apply", "inspect"):
        process = run_cli(command, "r.yaml", cwd=folder)
        lines = process.stderr.splitlines()
        assert (process.returncode, lines[0]) == (2, f"error: r.yaml:{place}: {message}"), command
        assert lines[2].strip(" |^") == ""
        assert "".join(f"{line}\n" for line in lines[3:]) == advice
    process = run_cli("lint", "r.yaml", cwd=folder)
    assert process.returncode == 2
    assert f"r.yaml:{place}: error: {message} [invalid-recipe]\n" in process.stdout
    assert advice in process.stdout


@pytest.mark.parametrize("mistake", WARNINGS)
def test_warnings_of_lint_are_those_of_plan_and_apply(folder: Path, mistake: tuple[str, str]) -> None:
    template, text = mistake
    (folder / "r.yaml").write_text(template.replace("@", text))
    place, line, message, fix, rule = WARNINGS[mistake]
    told = f"warning: line {line} of the recipe: {message}\nhelp: {fix}\n"
    linted = run_cli("lint", "r.yaml", cwd=folder).stdout
    assert f"r.yaml:{place}: warning: {message} [{rule}]\n" in linted
    assert f"help: {fix}\n" in linted
    assert told in run_cli("plan", "r.yaml", cwd=folder).stdout
    assert told in run_cli("apply", "r.yaml", "-q", "--overwrite", "-o", "out", cwd=folder).stderr
    assert run_cli("plan", "r.yaml", "--strict", cwd=folder).returncode == 2


def test_a_factor_that_does_not_stand_before_parentheses_is_told(folder: Path) -> None:
    (folder / "r.yaml").write_text(_MERGE.replace("@", "target + 0.5 * rl - sft"))
    process = run_cli("plan", "r.yaml", cwd=folder)
    assert process.returncode == 2
    assert process.stderr.endswith("help: did you mean `target + 0.5 * (rl - sft)`?\n")


@pytest.mark.parametrize("size", ["2", "999999"])
def test_a_memory_limit_without_a_unit_is_told(folder: Path, size: str) -> None:
    for command in ("plan", "apply"):
        process = run_cli(command, "r.yaml", "--memory-limit", size, cwd=folder)
        told = f"`--memory-limit`: `{size}` is {size} bytes; write it like {size}GB"
        assert (process.returncode, process.stderr) == (
            2, f"error: {told}\nhelp: run `skillmerge {command} --help`\n"
        )  # fmt: skip


def test_a_rule_for_the_head_of_a_tied_model_leads_to_the_embedding(tmp_path: Path) -> None:
    from conftest import tensor_shapes

    shapes = {name: shape for name, shape in tensor_shapes().items() if name != "lm_head.weight"}
    write_family(tmp_path, shapes, config={"tie_word_embeddings": True})
    for rule in ("{modules: head, value: 0}", '{tensors: "lm_head.weight", value: 0}'):
        (tmp_path / "r.yaml").write_text(_LAM.replace("@", f"{{rules: [{rule}]}}"))
        process = run_cli("plan", "r.yaml", cwd=tmp_path)
        assert (process.returncode, process.stderr.splitlines()[0]) == (
            2, "error: r.yaml:3:30: this rule matches no tensor"
        )  # fmt: skip
        assert process.stderr.splitlines()[-1] == (
            "help: the head is the embedding here (`tie_word_embeddings`): write `modules: embedding`, or leave this "
            "rule out"
        )
