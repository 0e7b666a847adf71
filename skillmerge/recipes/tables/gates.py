"""The tables of `gates:`: what a merged model must pass before it is published. `gate_table` gives them meaning."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, FiniteFloat, Tag

from skillmerge.recipes.tables.values import PLAIN_OR_LIST, Kinds, Table

Runtime = Literal["transformers", "vllm"]
Runtimes = Annotated[
    Annotated[bool, Tag("plain")] | Annotated[list[Runtime], Field(min_length=1), Tag("list")], PLAIN_OR_LIST
]


class RangeTable(Table):
    """The range that a measured number must be in."""

    min: Annotated[FiniteFloat | None, Field(description="Smallest value that passes.", examples=[0.01])] = None
    max: Annotated[FiniteFloat | None, Field(description="Largest value that passes.", examples=[0.2])] = None
    modules: Annotated[
        Kinds | None,
        Field(
            description="Measure each of these kinds of module separately. By default: the whole model.",
            examples=["mlp", ["attention", "mlp"]],
        ),
    ] = None


class FigureTable(RangeTable):
    """The range that a number of the merge must be in."""

    by: Annotated[
        Literal["block"] | None,
        Field(
            description="With `block`, each kind of module in each layer must pass. By default: the whole model.",
            examples=["block"],
        ),
    ] = None


class CosineTable(RangeTable):
    """The range that the cosine must be in, in standard deviations from chance."""

    base: Annotated[
        str | None,
        Field(
            min_length=1,
            description="Model that the target was trained from: a name in `models`, a folder or an `hf://` place. "
            "By default: the model that the skill subtracts.",
            examples=["./base", "hf://acme/base"],
        ),
    ] = None


class PerplexityTable(Table):
    """The largest perplexity that passes, alone or relative to another model."""

    text: Annotated[
        str,
        Field(
            min_length=1, description="Text file to measure, relative to the recipe's folder.", examples=["./text.txt"]
        ),
    ]
    max: Annotated[FiniteFloat | None, Field(gt=0, description="Largest perplexity that passes.", examples=[12.0])] = (
        None
    )
    max_ratio: Annotated[
        FiniteFloat | None,
        Field(gt=0, description="Largest perplexity that passes, divided by that of model `of`.", examples=[1.05]),
    ] = None
    of: Annotated[
        str | None,
        Field(
            description="Model of the recipe to compare with, for `max_ratio`. By default: the donor.",
            examples=["target"],
        ),
    ] = None


class CommandTable(Table):
    """A command that prints a number, and the range that this number must be in."""

    run: Annotated[
        str,
        Field(
            min_length=1,
            description="Command whose last line is a number or a JSON object. `{}` becomes the model's folder.",
            examples=["python eval.py {}"],
        ),
    ]
    name: Annotated[str | None, Field(min_length=1, description="Name in the results.", examples=["accuracy"])] = None
    score: Annotated[
        str | None,
        Field(
            min_length=1,
            description="Key of the score, for a command that prints a JSON object.",
            examples=["accuracy"],
        ),
    ] = None
    min: Annotated[FiniteFloat | None, Field(description="Smallest score that passes.", examples=[0.6])] = None
    max: Annotated[FiniteFloat | None, Field(description="Largest score that passes.", examples=[0.1])] = None
    timeout: Annotated[FiniteFloat, Field(gt=0, description="Time limit in seconds.", examples=[600])] = 3600.0


class GatesTable(Table):
    """Gates are checks that a merged model must pass before it is published."""

    changed: Annotated[
        FigureTable | None,
        Field(
            description="Share of all elements that differ from the donor. By default: more than 0.",
            examples=[{"min": 0.01}],
        ),
    ] = None
    vanished: Annotated[
        FigureTable | None,
        Field(
            description="Share of nonzero update elements that left the weight unchanged: what rounding lost.",
            examples=[{"max": 0.2}],
        ),
    ] = None
    realised: Annotated[
        FigureTable | None,
        Field(
            description="How much of the requested update is left after rounding; 1 is all of it.",
            examples=[{"min": 0.9, "max": 1.1, "by": "block"}],
        ),
    ] = None
    realised_lambda: Annotated[
        FigureTable | None,
        Field(description="Effective lambda: the lambda left after rounding.", examples=[{"min": 0.6, "max": 0.8}]),
    ] = None
    norm_ratio: Annotated[
        FigureTable | None,
        Field(
            description="Norm of the change divided by the norm of the donor's weights, for each kind of module.",
            examples=[{"max": 0.05}],
        ),
    ] = None
    cosine_z: Annotated[
        CosineTable | None,
        Field(
            description="Cosine between the skill and the target's own update, in standard deviations from chance.",
            examples=[{"max": 5, "base": "./base"}],
        ),
    ] = None
    finite: Annotated[bool, Field(description="Require that no weight is NaN or Inf.", examples=[True])] = False
    loads: Annotated[
        Runtimes,
        Field(
            description="Require that the model and its tokenizer load in these runtimes. `true` means transformers.",
            examples=[True, ["transformers", "vllm"]],
        ),
    ] = False
    finite_logits: Annotated[
        bool, Field(description="Require finite logits for a short input, computed by transformers.", examples=[True])
    ] = False
    perplexity: Annotated[
        PerplexityTable | None,
        Field(
            description="Perplexity of a text, alone or relative to another model.",
            examples=[{"text": "./text.txt", "max_ratio": 1.05}],
        ),
    ] = None
    commands: Annotated[
        list[CommandTable],
        Field(
            description="Your own checks: commands that print a number.",
            examples=[[{"name": "accuracy", "run": "python eval.py {}", "min": 0.6}]],
        ),
    ] = []
