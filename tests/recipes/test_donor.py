"""The donor: read off the recipe's text, whatever its numbers are."""

from __future__ import annotations

import random
import re
from fractions import Fraction
from pathlib import Path

import pytest
from conftest import run_cli, write_family, write_recipe

import skillmerge
from skillmerge.recipes.formula.donor import donor_of, is_donor_unclear
from skillmerge.recipes.formula.parser import parse

MODELS, SKILLS, COEFFICIENTS = ["target", "rl", "sft"], ["skill"], ["lam", "mu"]


def donor(text: str) -> str | None:
    return donor_of(parse(text, MODELS + SKILLS, COEFFICIENTS), SKILLS)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("target + rl - sft", "target"),
        ("target - sft + rl", "target"),
        ("target + lam * rl - lam * sft", "target"),
        ("lam * rl - lam * sft + target", "target"),
        ("target + lam * (rl - sft)", "target"),
        ("(rl - sft) + target", "target"),
        ("lam * (rl - sft) + target", "target"),
        ("-(sft - rl) * lam + target", "target"),
        ("-sft + target + rl", "target"),
        ("rl - sft + target", "rl"),
        ("(lam * rl - lam * sft) + target", "target"),
        ("(0.1 * rl + 0.2 * rl - 0.3 * sft) + target", "target"),
        ("((rl - sft) + target)", "target"),
        ("(target + rl) / 2", "target"),
        ("(rl + target) / 2", "rl"),
        ("0.5 * rl + 0.5 * target", "rl"),
        ("lam * target + (1 - lam) * rl", "target"),
        ("(1 - lam) * rl + lam * target", "rl"),
        ("-lam * rl + mu * sft + target - mu * sft", "target"),
        ("target / lam + rl - rl / lam", "rl"),
        ("0 * rl + target", "target"),
        ("-(-0.5) * rl + 0.5 * target", "rl"),
        ("(0.5 - 0.7) * rl + 1.2 * target", "target"),
        ("skill + target", "target"),
        ("target + lam * skill", "target"),
        ("(target - sft) + rl", "rl"),
        ("(target + lam * rl) - lam * sft", "target"),
        # Of what is stored as a difference: nothing but differences is there.
        ("rl - sft", "rl"),
        ("lam * (rl - sft)", "rl"),
        ("-sft + rl", "rl"),
        ("lam * -(sft - rl)", "rl"),
        ("lam * skill - (rl - sft)", "skill"),
    ],
)
def test_donor_is_read_off_the_text(text: str, wanted: str) -> None:
    assert donor(text) == wanted


@pytest.mark.parametrize("text", ["0 * target", "(target - rl) * 0", "target / 0", "(1 / 0) * target"])
def test_what_is_multiplied_by_zero_has_no_donor(text: str) -> None:
    assert donor(text) is None


@pytest.mark.parametrize("text", ["-rl - sft", "-lam * rl"])
def test_what_only_subtracts_is_left_to_those_who_refuse_it(text: str) -> None:
    assert donor(text) == "rl"


@pytest.mark.parametrize(
    ("text", "unclear"),
    [
        ("target + rl - sft", True),
        ("target - sft + rl", True),
        ("rl - sft + target", True),
        ("(target + rl - sft)", True),
        ("target + rl - lam * sft", True),
        ("(target + rl) / 2", False),
        ("target + (rl - sft)", False),
        ("target + lam * rl - lam * sft", False),
        ("target - lam * (rl - sft)", False),
        ("target + skill - (rl - sft)", False),
        ("rl - sft", False),
    ],
)
def test_sum_that_does_not_show_its_donor_is_known(text: str, unclear: bool) -> None:
    assert is_donor_unclear(parse(text, MODELS + SKILLS, COEFFICIENTS), SKILLS) is unclear


def _scalar(chance: random.Random) -> str:
    return chance.choice(["lam", "mu", "(1 - lam)", "0.5", "2", "-lam", "-0.25", "lam * mu", "(lam / 2)", "0", "1"])


def _some_sum(chance: random.Random, depth: int) -> str:
    text = chance.choice(["", "", "-"]) + _some_term(chance, depth)
    for _ in range(chance.randrange(3)):
        text += chance.choice([" + ", " - "]) + _some_term(chance, depth)
    return text


def _some_term(chance: random.Random, depth: int) -> str:
    if depth and chance.random() < 0.5:
        inner = f"({_some_sum(chance, depth - 1)})"
        if chance.random() < 0.4:  # a difference, now and then with a coefficient in it
            by = chance.choice(["", "lam * ", "0.7 * "])
            inner = f"({by}{chance.choice(MODELS)} - {by}{chance.choice(MODELS)})"
    else:
        inner = chance.choice(MODELS + SKILLS)
    form = chance.choice(["{inner}", "{inner}", "{scalar} * {inner}", "{inner} * {scalar}", "{inner} / 2", "-{inner}"])
    return form.format(inner=inner, scalar=_scalar(chance))


def _value(text: str, models: list[int], numbers: dict[str, Fraction]) -> Fraction:
    """What the text comes to, as Python reads it, with a number for each place where a model stands."""
    left = iter(models)

    def put(match: re.Match[str]) -> str:
        word = match.group()
        if word in numbers:
            return f"F({str(numbers[word])!r})"
        return f"F({next(left) if word in MODELS + SKILLS else word!r})"

    return Fraction(eval(re.sub(r"[a-z]+|[\d.]+", put, text), {"F": Fraction}))


def _groups(text: str) -> list[tuple[int, int]]:
    opened, found = [], []
    for index, character in enumerate(text):
        if character == "(":
            opened.append(index)
        elif character == ")":
            found.append((opened.pop(), index + 1))
    return found


def stated(text: str) -> str | None:
    """The rule, told of the text: what each place of a model is multiplied by, tried out, and which parentheses
    come to nothing when every model is 1."""
    draws = [{"lam": Fraction(3, 7), "mu": Fraction(5, 11)}, {"lam": Fraction(2, 13), "mu": Fraction(7, 9)}]
    places = [match for match in re.finditer(r"[a-z]+", text) if match.group() in MODELS + SKILLS]
    inside = set()
    for start, end in _groups(text):
        within = [index for index, place in enumerate(places) if start <= place.start() < end]
        ones = [int(places[index].group() in MODELS) for index in within]
        if within and not any(_value(text[start:end], ones, numbers) for numbers in draws):
            inside |= set(within)
    inside |= {index for index, place in enumerate(places) if place.group() in SKILLS}
    factors = []
    for index in range(len(places)):
        alone = [int(other == index) for other in range(len(places))]
        factors.append([_value(text, alone, numbers) for numbers in draws])
    added = [index for index, factor in enumerate(factors) if factor[0] > 0]
    outside = [index for index in added if index not in inside]
    plain = [index for index in outside if factors[index][0] == factors[index][1]]
    chosen = plain or outside or added or [index for index, factor in enumerate(factors) if factor[0] != 0]
    return places[chosen[0]].group() if chosen else None


@pytest.mark.parametrize("seed", range(10))
def test_donor_is_the_one_that_the_rule_names(seed: int) -> None:
    chance = random.Random(seed)
    found = set()
    for _ in range(150):
        text = _some_sum(chance, 3)
        found.add(donor(text))
        assert donor(text) == stated(text), text
    assert found >= {*MODELS}


def test_files_of_the_output_are_those_of_the_first_model_that_is_added(tmp_path: Path) -> None:
    """Chat vectors written out: once the subtracted model gave its config, tokenizer, dtype and layout."""
    recipe = write_family(tmp_path)
    for model in MODELS:
        (tmp_path / model / "chat_template.jinja").write_text(f"the template of {model}")
    for merge in ("target + rl - sft", "target - sft + rl", "target + lam * rl - lam * sft"):
        for lam in (0.0, 0.9, 1.0, 2.0):
            write_recipe(tmp_path, merge)
            output = tmp_path / f"merged {merge} {lam}"
            result = skillmerge.apply(recipe, output, coefficients={"lam": lam})
            assert result.manifest.donor == "target"
            assert (output / "chat_template.jinja").read_text() == "the template of target"


def test_donor_that_the_text_does_not_show_is_told(tmp_path: Path) -> None:
    write_family(tmp_path)
    recipe = write_recipe(tmp_path, "target + rl - sft", coefficients=None)
    shown = run_cli("plan", recipe).stdout.splitlines()
    at = shown.index(
        "warning: the donor is `target`, the first model that `target + rl - sft` adds: the output takes its names, "
        "dtypes, config and tokenizer"
    )
    assert shown[at + 1] == (
        "help: confirm it with `output: {like: target}`, or put the difference in parentheses: target + (rl - sft)"
    )
    assert run_cli("plan", recipe, "--strict").returncode == 2
    output = skillmerge.apply(recipe).output
    assert skillmerge.rebuild(output, check=True)
    skillmerge.rebuild(output, tmp_path / "again")
    write_recipe(tmp_path, "target + rl - sft", coefficients=None, accept=["donor"])
    assert run_cli("plan", recipe, "--strict").returncode == 0
    (accepted,) = skillmerge.plan(recipe).compared.found
    assert (accepted.name, accepted.accepted) == ("donor", True)
    assert skillmerge.rebuild(skillmerge.apply(recipe, tmp_path / "accepted").output, check=True)
    write_recipe(tmp_path, "target + rl - sft", coefficients=None, output={"path": "merged", "like": "target"})
    shown = run_cli("plan", recipe)
    assert "the donor is" not in shown.stdout + shown.stderr
