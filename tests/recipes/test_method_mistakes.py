"""Mistakes in calls of methods: the place, what is wrong, and the way out, as plan, apply and lint say it."""

from __future__ import annotations

import re
import resource
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import run_cli, write_family
from in_memory import bound

from skillmerge.methods.linear import compile_term
from skillmerge.methods.method import Number, Numbers, Operand, Word
from skillmerge.methods.table import METHODS
from skillmerge.methods.terms import Leaf, calls, degree
from skillmerge.recipes.formula.tree import ExpressionError

RECIPE = """\
skillmerge: 1
models: {target: ./target, rl: ./rl, sft: ./sft}
coefficients: {lam: 1}
merge: "@"
output: {path: out}
"""
_UNFIT = "has a call that does not fit: "
MISTAKES = {
    "target + ties(rl - sft, target)": ("4:18", "calls `ties` without `density`", "write `<ties>`"),
    "target + ties(rl, target - sft, density=.3)": (
        "4:18", _UNFIT + "`ties` combines differences, and its 1st operand is a model",
        "write a difference, such as `b - base`",
    ),
    "target + trim(rl, density=.3)": (
        "4:18", _UNFIT + "`trim` combines differences, and its 1st operand is a model",
        "write a difference, such as `b - base`",
    ),
    "target + trim(rl + sft, density=.3)": (
        "4:18", _UNFIT + "`trim` combines differences, and its 1st operand has 2 models' worth of weights",
        "write a difference, such as `b - base`",
    ),
    "slerp(target, rl - sft, t=.5)": (
        "4:9", _UNFIT + "`slerp` combines models or differences, and its 2nd operand is a difference",
        "give it models only, or differences only",
    ),
    "slerp(target + rl, sft, t=.5)": (
        "4:9", _UNFIT + "`slerp` combines models or differences, and its 1st operand has 2 models' worth of weights",
        "give it models only, or differences only",
    ),
    "median(target, rl - sft)": (
        "4:9", _UNFIT + "`median` combines models or differences, and its 2nd operand is a difference",
        "give it models only, or differences only",
    ),
    "karcher(2 * target, rl)": (
        "4:9", _UNFIT + "`karcher` combines models or differences, and its 1st operand has 2 models' worth of weights",
        "give it models only, or differences only",
    ),
    "target + match(rl - sft, to=target)": (
        "4:18", _UNFIT + "`match` combines differences, and its `to` is a model",
        "write a difference, such as `b - base`",
    ),
    "target + project(rl - sft, off=rl)": (
        "4:18", _UNFIT + "`project` combines differences, and its `off` is a model",
        "write a difference, such as `b - base`",
    ),
    "target + trim(rl - sft)": ("4:18", "calls `trim` without `density`", "write `<trim>`"),
    "target + trim(density=.3)": ("4:18", "gives 0 operands to `trim`, which takes 1 operand", "write `<trim>`"),
    "target + trim(rl - sft, sft - rl, density=.3)": (
        "4:18", "gives 2 operands to `trim`, which takes 1 operand", "write `<trim>`",
    ),
    "slerp(target, rl)": ("4:9", "calls `slerp` without `t`", "write `<slerp>`"),
    "slerp(target, t=.5)": ("4:9", "gives 1 operand to `slerp`, which takes 2 operands", "write `<slerp>`"),
    "slerp(target, rl, sft, t=.5)": ("4:9", "gives 3 operands to `slerp`, which takes 2 operands", "write `<slerp>`"),
    "slerp(target, rl, .5)": ("4:27", "gives a number to `slerp` as an operand", "name it: `<slerp>`"),
    "model_stock(rl - sft)": (
        "4:9", "gives 1 operand to `model_stock`, which takes 2 or more operands", "write `<model_stock>`",
    ),
    "target + sce(rl - sft)": ("4:18", "gives 1 operand to `sce`, which takes 2 or more operands", "write `<sce>`"),
    "multislerp(target)": (
        "4:9", "gives 1 operand to `multislerp`, which takes 2 or more operands", "write `<multislerp>`",
    ),
    "target + match(rl - sft)": ("4:18", "calls `match` without `to`", "write `<match>`"),
    "target + trim(rl - sft, .3)": ("4:33", "gives a number to `trim` as an operand", "name it: `<trim>`"),
    "target + trim(density=.3, rl - sft)": (
        "4:35", "has an operand of `trim` behind its keywords", "write operands first: `<trim>`",
    ),
    "target + trim(rl - sft, density=0.3, density=.5)": (
        "4:46", "gives `density` twice to `trim`", "leave one of them out",
    ),
    "target + trim(rl - sft, topk=.3)": (
        "4:33", "gives `trim` a keyword it does not have, `topk`", "did you mean `density=`?",
    ),
    "target + trim(rl - sft, k=.3)": (
        "4:33", "gives `trim` a keyword it does not have, `k`", "did you mean `density=`?",
    ),
    "target + trim(rl - sft, denisty=.3)": (
        "4:33", "gives `trim` a keyword it does not have, `denisty`", "did you mean `density`?",
    ),
    "target + trim(rl - sft, density=.3, seed=1)": (
        "4:45", "gives `trim` a keyword it does not have, `seed`", "it takes density, rescale, scope",
    ),
    "target + pick(rl - sft, density=.3)": (
        "4:33", "gives `pick` a keyword it does not have, `density`", "it takes no keywords",
    ),
    "target + trim(rl - sft, density=[.3])": (
        "4:41", "has a list for `density`, which is a number from 0 to 1", "leave the `[` and `]` out",
    ),
    "target + trim(rl - sft, density=rl)": (
        "4:41", "has a value that does not fit: `density` is a number from 0 to 1, and this is made of models",
        "write a number",
    ),
    "target + trim(rl - sft, density=half)": (
        "4:41", "names `half`, which is neither a model nor a coefficient",
        "add `coefficients: {half: 1}`, or use: target, rl, sft, lam",
    ),
    "target + trim(rl - sft, density=1.5)": (
        "4:33", "has `density=1.5` in `trim`", "`density` is a number from 0 to 1",
    ),
    "target + trim(rl - sft, density=-.1)": (
        "4:33", "has `density=-0.1` in `trim`", "`density` is a number from 0 to 1",
    ),
    "target + trim(rl - sft, density=lam * 2)": (
        "4:33", "has `density=2` in `trim`", "`density` is a number from 0 to 1",
    ),
    "target + trim(rl - sft, density=1 / 0)": ("4:43", "divides by zero", ""),
    "target + trim(rl - sft, density=1e999)": ("4:41", "has a number that is not finite", ""),
    "target + trim(rl - sft, density=.3, rescale=l3)": ("4:53", "has `l3` for `rescale`", "write none, l1 or l2"),
    "target + trim(rl - sft, density=.3, rescale=probability)": (
        "4:53", "has `probability` for `rescale`", "write none, l1 or l2",
    ),
    "target + trim(rl - sft, density=.3, rescale=1)": ("4:53", "has `1` for `rescale`", "did you mean `l1`?"),
    "target + trim(rl - sft, density=.3, scope=tensor)": ("4:51", "has `tensor` for `scope`", "write matrix or model"),
    "target + drop(rl - sft, density=.5, seed=1.5)": (
        "4:45", "has `seed=1.5` in `drop`", "`seed` is a whole number from 0 to 2^53",
    ),
    "target + drop(rl - sft, density=.5, seed=-1)": (
        "4:45", "has `seed=-1` in `drop`", "`seed` is a whole number from 0 to 2^53",
    ),
    "target + drop(rl - sft, density=.5, seed=1e30)": (
        "4:45", "has `seed=1e+30` in `drop`", "`seed` is a whole number from 0 to 2^53",
    ),
    "target + drop(rl - sft, density=.5, epsilon=.1)": (
        "4:45", "gives `drop` a keyword it does not have, `epsilon`", "did you mean `spread=`?",
    ),
    "target + drop(rl - sft, density=.5, spread=1)": (
        "4:45", "has `spread=1` in `drop`", "`spread` is a number from 0 to below 1",
    ),
    "target + drop(rl - sft, density=.5, spread=.6)": (
        "4:18", _UNFIT + "with density 0.5 and spread 0.6 `drop` keeps by chances outside 0 to 1",
        "lower `spread`",
    ),
    "target + band(rl - sft, density=.5, gamma=2)": (
        "4:45", "has `gamma=2` in `band`", "`gamma` is a number from 0 to 1",
    ),
    "target + clip(rl - sft, at=-1)": ("4:33", "has `at=-1` in `clip`", "`at` is a number of at least 0"),
    "target + clip(rl - sft)": ("4:18", "calls `clip` without `at`", "write `<clip>`"),
    "target + elect(rl - sft, target - sft, weights=[1])": (
        "4:48", "has 1 weights for the 2 operands of `elect`", "give one for each operand, in their order",
    ),
    "target + elect(rl - sft, target - sft, weights=[1, 2, 3])": (
        "4:48", "has 3 weights for the 2 operands of `elect`", "give one for each operand, in their order",
    ),
    "target + elect(rl - sft, target - sft, weights=[])": (
        "4:48", "has 0 weights for the 2 operands of `elect`", "give one for each operand, in their order",
    ),
    "target + elect(rl - sft, target - sft, weights=[1, rl])": (
        "4:56", "has a model in the list of `weights`", "write numbers",
    ),
    "target + elect(rl - sft, target - sft, weights=[1, 2)": (
        "4:61", "has `)` where a model, a number or `(` is expected", "write one, or leave `)` out",
    ),
    "target + elect(rl - sft, target - sft, weights=[1 2])": (
        "4:59", "lacks an operator before `2`", "did you mean `*`?",
    ),
    "target + elect(rl - sft, target - sft, normalize=maybe)": (
        "4:58", "has `maybe` for `normalize`", "write yes or no",
    ),
    "target + elect(rl - sft, target - sft, normalise=no)": (
        "4:48", "gives `elect` a keyword it does not have, `normalise`", "did you mean `normalize`?",
    ),
    "target + elect(rl - sft, target - sft, pick=min)": ("4:53", "has `min` for `pick`", "write mean or max"),
    "target + elect(rl - sft, target - sft, zero=minus)": ("4:53", "has `minus` for `zero`", "write plus or majority"),
    "target + ram(rl - sft, target - sft, threshold=-1)": (
        "4:46", "has `threshold=-1` in `ram`", "`threshold` is a number of at least 0",
    ),
    "target + ram(rl - sft, target - sft, boost=-1)": (
        "4:46", "has `boost=-1` in `ram`", "`boost` is a number of at least 0",
    ),
    "target + ram(rl - sft, target - sft, cap=-1)": (
        "4:46", "has `cap=-1` in `ram`", "`cap` is a number of at least 0",
    ),
    "target + sce(rl - sft, target - sft, select=2)": (
        "4:46", "has `select=2` in `sce`", "`select` is a number from 0 to 1",
    ),
    "target + sce(rl - sft, target - sft, select_topk=.5)": (
        "4:46", "gives `sce` a keyword it does not have, `select_topk`", "did you mean `select=`?",
    ),
    "target + sce(rl - sft, target - sft, floor=-1)": (
        "4:46", "has `floor=-1` in `sce`", "`floor` is a number of at least 0",
    ),
    "target + model_stock(rl - sft, target - sft, negative=drop)": (
        "4:63", "has `drop` for `negative`", "write zero or keep",
    ),
    "target + model_stock(rl - sft, 0 * (target - sft))": (
        "4:42", "gives `model_stock` a 2nd operand that is zero", "leave it out, or use another coefficient than 0",
    ),
    "slerp(target, rl, t=.5, linear_above=2)": (
        "4:33", "has `linear_above=2` in `slerp`", "`linear_above` is a number from 0 to 1",
    ),
    "slerp(target, rl, t=.5, scope=column)": ("4:39", "has `column` for `scope`", "write matrix or row"),
    "slerp(target, 0 * rl, t=.5)": (
        "4:25", "gives `slerp` a 2nd operand that is zero", "leave it out, or use another coefficient than 0",
    ),
    "multislerp(target, rl, weights=[1, -1])": (
        "4:9", _UNFIT + "the weights of `multislerp` add up to 0", "give weights with another sum",
    ),
    "karcher(target, rl, steps=0)": ("4:29", "has `steps=0` in `karcher`", "`steps` is a whole number from 1 to 1000"),
    "karcher(target, rl, steps=2.5)": (
        "4:29", "has `steps=2.5` in `karcher`", "`steps` is a whole number from 1 to 1000",
    ),
    "karcher(target, rl, steps=1001)": (
        "4:29", "has `steps=1001` in `karcher`", "`steps` is a whole number from 1 to 1000",
    ),
    "karcher(target, rl, tolerance=-1)": (
        "4:29", "has `tolerance=-1` in `karcher`", "`tolerance` is a number of at least 0",
    ),
    "karcher(target, rl, max_iter=5)": (
        "4:29", "gives `karcher` a keyword it does not have, `max_iter`", "did you mean `steps=`?",
    ),
    "median()": ("4:9", "gives 0 operands to `median`, which takes 1 or more operands", "write `<median>`"),
    "target + trim(rl - sft, density=.3": ("4:18", "has a call of `trim` that does not end well", "close it with `)`"),
    "target + trim(rl - sft density=.3)": ("4:32", "lacks an operator before `density`", "did you mean `*`?"),
    "target + trim(rl - sft, density=)": (
        "4:41", "has `)` where a model, a number or `(` is expected", "write one, or leave `)` out",
    ),
    "target + trim(rl - sft, =.3)": (
        "4:33", "has `=` where a model, a number or `(` is expected", "write one, or leave `=` out",
    ),
    "target + trim(rl - sft, density==.3)": (
        "4:41", "has `=` where a model, a number or `(` is expected", "write one, or leave `=` out",
    ),
    "target + trim[rl - sft]": ("4:22", "has an unexpected character '['", "write parentheses: ( and )"),
    "target + trim": (
        "4:18", "names `trim`, which is neither a model nor a coefficient", "`<trim>` is a method: call it",
    ),
    "target + Trim(rl - sft, density=.3)": (
        "4:18", "calls `Trim`, which is no method of this version", "did you mean `trim`?",
    ),
    "target + tries(rl - sft, density=.3)": (
        "4:18", "calls `tries`, which is no method of this version", "did you mean `ties`?",
    ),
    "target + derive(rl - sft, target - sft)": (
        "4:18", "calls `derive`, which is no method of this version",
        "write match(v, to=u) for the size of another update, project(v, off=u) to take its direction away",
    ),
    "target + dare_ties(rl - sft, target - sft)": (
        "4:18", "calls `dare_ties`, which is no method of this version",
        "write base + elect(drop(a - base, density=0.5), drop(b - base, density=0.5))",
    ),
    "trim(rl - sft, density=.5)": (
        "4:8", "gives a difference, not a model, for tensor `model.embed_tokens.weight` (with lam = 1)",
        "add it to a model: target + lam * (rl - sft); or store it with `output: {kind: skill}`",
    ),
    "target + slerp(target, rl, t=.5)": (
        "4:8", "gives 2 models' worth of weights for tensor `model.embed_tokens.weight` (with lam = 1)",
        "did you mean the average, (a + b) / 2?",
    ),
    "0 * target + trim(rl - sft, density=0)": (
        "4:8", "gives a difference, not a model, for tensor `model.embed_tokens.weight` (with lam = 1)",
        "add it to a model: target + lam * (rl - sft); or store it with `output: {kind: skill}`",
    ),
    "target + lam * frob(trim(rl - sft, density=.5))": (
        "4:24", "calls `frob`, which is no method of this version", "`skillmerge methods` lists those that there are",
    ),
    "target + match(rl - sft, to=0 * (target - sft))": (
        "4:34", "gives `match` a `to` that is zero", "leave it out, or use another coefficient than 0",
    ),
    "target + trim(rl - sft, density=0,5)": ("4:41", "has a decimal comma", "write 0.5"),
    "target + trim(rl - sft, density=0,5, rescale=l2)": ("4:41", "has a decimal comma", "write 0.5"),
    "slerp(target, rl, t=0,25)": ("4:29", "has a decimal comma", "write 0.25"),
    "target + 1,5 * trim(rl - sft, density=.5)": ("4:18", "has a decimal comma", "write 1.5"),
    "target + elect(0,5 * (rl - sft), target - sft)": ("4:24", "has a decimal comma", "write 0.5"),
    "target + trim(rl - sft, density=1.0000001)": (
        "4:33", "has `density=1.0000001` in `trim`", "`density` is a number from 0 to 1",
    ),
    "target + elect(target)": (
        "4:18", _UNFIT + "`elect` combines differences, and its 1st operand is a model",
        "write a difference, such as `b - base`",
    ),
    "target + elect(0 * (rl - sft), target)": (
        "4:18", _UNFIT + "`elect` combines differences, and its 2nd operand is a model",
        "write a difference, such as `b - base`",
    ),
    "slerp(target, rl - sft, t=0)": (
        "4:9", _UNFIT + "`slerp` combines models or differences, and its 2nd operand is a difference",
        "give it models only, or differences only",
    ),
    "target + trim(rl - sft,, density=.5)": (
        "4:32", "has `,` where a model, a number or `(` is expected", "write one, or leave `,` out",
    ),
    "target + trim(,rl - sft, density=.5)": (
        "4:23", "has `,` where a model, a number or `(` is expected", "write one, or leave `,` out",
    ),
}  # fmt: skip
"""Expression -> place, what it does, help. `<trim>` is the usage of `trim`."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("calls"), config={"model_type": "odd"}).parent


def with_usage(fix: str) -> str:
    return re.sub(r"`<(\w+)>`", lambda found: f"`{METHODS[found[1]].usage}`", fix)


@pytest.mark.parametrize("text", MISTAKES)
def test_mistake_in_a_call_is_told_with_the_way_out(folder: Path, text: str) -> None:
    place, message, fix = MISTAKES[text]
    (folder / "r.yaml").write_text(RECIPE.replace("@", text))
    process = run_cli("plan", "r.yaml", cwd=folder)
    lines = process.stderr.splitlines()
    assert (process.returncode, lines[0]) == (2, f"error: r.yaml:{place}: the expression {message}")
    assert lines[2].strip(" |^") == ""
    assert "\n".join(lines[3:]) == (f"help: {with_usage(fix)}" if fix else "")


@pytest.mark.parametrize("text", [text for text in MISTAKES if "for tensor" not in MISTAKES[text][1]][::9])
def test_mistake_in_a_call_is_the_same_for_apply_and_lint(folder: Path, text: str) -> None:
    place, message, fix = MISTAKES[text]
    (folder / "r.yaml").write_text(RECIPE.replace("@", text))
    process = run_cli("apply", "r.yaml", cwd=folder)
    assert process.stderr.startswith(f"error: r.yaml:{place}: the expression {message}\n")
    linted = run_cli("lint", "r.yaml", cwd=folder)
    assert linted.returncode == 2
    assert f"r.yaml:{place}: error: the expression {message} [" in linted.stdout
    assert with_usage(fix) in linted.stdout


# --------------------------------------------------------------------------------------------- every keyword there is


def call(name: str, keyword: str, value: str) -> str:
    """A call that is right but for one keyword."""
    method = METHODS[name]
    operand = "(rl - sft)" if method.differences else "rl"
    needed = {key: "(target - sft)" if isinstance(kind, Operand) else ".5"
              for key, kind in method.keywords.items() if key not in method.defaults and key != keyword}  # fmt: skip
    given = [f"{key}={text}" for key, text in {**needed, keyword: value}.items()]
    return f"{name}({', '.join([operand] * method.least + given)})"


KEYWORDS = [(name, keyword) for name, method in METHODS.items() for keyword in method.keywords]


def bad_values(name: str, keyword: str) -> list[str]:
    kind, count = METHODS[name].keywords[keyword], METHODS[name].least
    if isinstance(kind, Operand):
        return ["1", "lam", "[1]", "[rl - sft]", "rl", "yes", "", "0 * (rl - sft)"]
    if isinstance(kind, Word):
        return ["1", "[yes]", "rl", "lam", "(yes)", "Yes", "", "nothing", "-"]
    found = ["rl", "rl - sft", "word", "", "1 / 0", "1e400", "nan", "inf", "[1", "-"]
    assert isinstance(kind, Number)
    found += [f"{kind.least - 1:g}"] if kind.least > -1e300 else []
    found += [f"{kind.most * 1.01 + 1:g}"] if kind.most < 1e300 else []
    found += [f"{kind.least:g}"] if kind.above else []
    found += [f"{kind.most:g}"] if kind.below else []
    found += ["1.5"] if kind.whole else []
    wrong_lists = ["[]", f"[{', '.join(['1'] * (count + 1))}]", "[rl]"]
    return found + (wrong_lists if isinstance(kind, Numbers) else ["[.5]", "[]"])


@pytest.mark.parametrize(("name", "keyword"), KEYWORDS)
def test_bad_value_of_a_keyword_is_a_mistake_at_its_place(name: str, keyword: str) -> None:
    for value in bad_values(name, keyword):
        text = call(name, keyword, value)
        with pytest.raises(ExpressionError) as caught:
            bound(text, ["target", "rl", "sft"], lam=1.0)
        error, begin = caught.value, text.index(f"{keyword}=")
        assert error.position in (0, *range(begin, len(text) + 1)), (text, str(error), error.position)


@pytest.mark.parametrize(("name", "keyword"), KEYWORDS)
def test_good_value_of_a_keyword_is_a_number_of_the_recipe(name: str, keyword: str) -> None:
    """Every number may be a coefficient, and so a schedule, `--set` and a sweep."""
    kind = METHODS[name].keywords[keyword]
    if isinstance(kind, Operand):
        bound(call(name, keyword, "rl - target"), ["target", "rl", "sft"])
    elif isinstance(kind, Word):
        for word in kind.words:
            bound(call(name, keyword, word), ["target", "rl", "sft"])
    else:
        value = 1.0 if kind.whole else 0.5 if keyword != "spread" else 0.25
        texts = [call(name, keyword, "lam"), call(name, keyword, "2 * lam - lam / 1")]
        if isinstance(kind, Numbers):
            texts.append(call(name, keyword, f"[{', '.join(['lam'] * METHODS[name].least)}]"))
        for text in texts:
            term = bound(text, ["target", "rl", "sft"], lam=value)
            for made in calls(term):
                assert dict(made.arguments)[keyword] in (value, (value,) * METHODS[name].least)


def test_range_is_checked_for_every_tensor(folder: Path) -> None:
    rules = "{default: .5, rules: [{layers: 2, value: 1.5}]}"
    text = RECIPE.replace("lam: 1", f"lam: {rules}").replace("@", "target + trim(rl - sft, density=lam)")
    (folder / "r.yaml").write_text(text)
    process = run_cli("plan", "r.yaml", cwd=folder)
    assert process.returncode == 2
    assert "r.yaml:4:33: the expression has `density=1.5` in `trim`\n" in process.stderr
    (folder / "r.yaml").write_text(text.replace("1.5", "1"))
    assert run_cli("plan", "r.yaml", cwd=folder).returncode == 0
    process = run_cli("plan", "r.yaml", "--set", "lam=-2", cwd=folder)
    assert "r.yaml:4:33: the expression has `density=-2` in `trim`\n" in process.stderr


# -------------------------------------------------------------------------------------------------- nesting and sizes


def nested(levels: int) -> str:
    return "trim(" * levels + "a - b" + ", density=.5)" * levels


HOSTILE = [
    nested(49), nested(50), nested(5000), "trim(" * 2000, "slerp(" * 40 + "a, b, t=.5" + "), b, t=.5" * 39 + ")",
    f"karcher({', '.join(['a'] * 149)})", f"karcher({', '.join(['a'] * 3000)})",
    f"elect({', '.join(['a - b'] * 70)}, weights=[{', '.join(['1'] * 70)}])",
    f"elect(a - b, weights=[{', '.join(['1'] * 2000)}])", f"elect(a - b, weights=[{'(' * 3000}",
    "trim(a - b, density=" + "(" * 45 + ".5" + ")" * 45 + ")", "trim(a - b, density=" + "-" * 200 + "1)",
    "+".join(["pick(a - b, b - a)"] * 37), "median(" + "a," * 140 + ")",
    "trim(a - b, density=.5" + ", density=.5" * 500 + ")", "multislerp(a, b, weights=[1e308, 1e308])",
    "multislerp(a, b, weights=[1e-320, 1e-320])", "elect(a - b, b - a, weights=[1e308, 1e308])",
    "match(a - b, to=" * 40 + "a - b" + ")" * 40, "slerp(a, b, t=1e308)", "ram(a - b, boost=1e308, cap=1e308)",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: f"{text[:20]} ({len(text)})")
def test_hostile_expression_is_refused_or_planned_within_bounds(text: str) -> None:
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.thread_time()
    with suppress(ExpressionError):
        term = bound(text, ["a", "b"])
        assert term is not None
        degree(term)
        assert compile_term(term).registers <= 150
    assert time.thread_time() - started < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_nesting_and_sizes_within_bounds_are_taken() -> None:
    assert len(list(calls(bound(nested(49), ["a", "b"])))) == 49
    with pytest.raises(ExpressionError, match="nested deeper than 50"):
        bound(nested(50), ["a", "b"])
    assert len(bound(f"karcher({', '.join(['a'] * 149)})", ["a"]).operands) == 149
    with pytest.raises(ExpressionError, match="more than 150 operations"):
        bound("+".join(["pick(a - b, b - a)"] * 38), ["a", "b"])


def test_model_may_have_the_name_of_a_method() -> None:
    assert bound("trim + 0 * (ties - trim)", ["trim", "ties"]) == Leaf("trim")
    with pytest.raises(ExpressionError):
        bound("trim(ties - trim, density=.5)", ["trim", "ties"])
    assert bound("elect(trim - ties)", ["trim", "ties"]) == bound("trim - ties", ["trim", "ties"])
