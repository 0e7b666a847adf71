"""The table of lint rules: each with its level, reason and fix."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LintRule:
    """A rule of lint. title: a few words; help: the reason and the fix."""

    id: str
    level: str
    title: str
    help: str


RULES = {
    rule.id: rule
    for rule in (
        LintRule(
            "invalid-recipe", "error", "The recipe cannot be read",
            "The file cannot be read, is not YAML, or has something that the format of recipes does not allow. `plan` "
            "and `apply` refuse it. The reference lists every key; `skillmerge schema` prints the format for editors.",
        ),
        LintRule(
            "not-one-model", "error", "The expression is not one model",
            "Whatever the coefficients are, the factors of the models do not add up to 1 (to 0 for a skill), or the "
            "expression divides by zero. Write `target + lam * (rl - sft)`, or `(a + b) / 2` for an average.",
        ),
        LintRule(
            "unpinned-revision", "warning", "A model on the Hub can change",
            "A branch or tag may later refer to other weights. Write the commit (`hf://org/name@<commit>`), or keep a "
            "lock beside the recipe: `skillmerge plan RECIPE --lock`.",
        ),
        LintRule(
            "stale-lock", "warning", "The lock file does not match the recipe",
            "The lock beside the recipe cannot be read, or names another place or commit than the recipe does, and "
            "`plan` and `apply` refuse that. Write it again: `skillmerge plan RECIPE --lock`.",
        ),
        LintRule(
            "unused-name", "warning", "A model or coefficient does nothing",
            "It is defined, and no expression, `copy`, `like`, patch or gate uses it. Remove it, or use it.",
        ),
        LintRule(
            "same-model", "warning", "Two names mean the same model",
            "Two models that are used have the same place, so that their difference is zero. One of them is probably "
            "meant to be another.",
        ),
        LintRule(
            "hidden-rule", "warning", "A later rule hides this one",
            "The last rule that matches a tensor wins, and a later rule of the schedule matches everything that this "
            "one does. Put general rules first, or remove this one.",
        ),
        LintRule(
            "large-factor", "warning", "A model is multiplied by more than 10",
            "With these coefficients a model's weights count more than tenfold. Published merges stay below 2: look "
            "for a lost decimal point.",
        ),
        LintRule(
            "negative-weight", "warning", "A weight of an election is negative",
            "A negative weight turns the signs of its difference around, and lowers the sum of weights that a "
            "normalized result is divided by, perhaps to nearly 0. Write the difference the other way around, with a "
            "positive weight.",
        ),
        LintRule(
            "accidental-model", "warning", "The expression is a model only where a coefficient is 1",
            "With any other number of the coefficient the factors of the models do not add up to 1. Put the difference "
            "in parentheses: `target + lam * (rl - sft)`.",
        ),
        LintRule(
            "unclear-donor", "warning", "The formula does not show which model is the donor",
            "A sum subtracts a model and adds two others without a coefficient, and the output takes its names, config "
            "and tokenizer from the first of them. Name it with `output.like`, or put the difference in parentheses.",
        ),
        LintRule(
            "odd-size", "warning", "A size without a unit",
            "A plain number is a number of bytes, and so few of them are hardly meant. Write a unit: `5GB`.",
        ),
        LintRule(
            "missing-model", "note", "A model's folder is not there",
            "No folder is at the place that the recipe names, seen from here: a file is there, or a name near it or "
            "the form of a name on the Hub tells what was probably meant. `plan` and `apply` need a folder.",
        ),
        LintRule(
            "no-output", "warning", "The recipe does not say where its output goes",
            "Without `output.path` or `output.push`, `apply` needs --output or --push. Allow this rule where the "
            "command line always says it.",
        ),
    )
}  # fmt: skip
