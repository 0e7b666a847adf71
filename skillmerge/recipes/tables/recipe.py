"""The tables of a recipe: coefficients, the arithmetic, the output. `parse` gives them meaning."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, FiniteFloat, JsonValue

from skillmerge.recipes.tables.gates import GatesTable
from skillmerge.recipes.tables.models import ModelEntry
from skillmerge.recipes.tables.schedules import CoefficientEntry
from skillmerge.recipes.tables.values import Glob, Globs, Table
from skillmerge.remarks import ACCEPTABLE

_MEANINGS: list[JsonValue] = [f"{meaning[0].upper()}{meaning[1:]}." for meaning in ACCEPTABLE.values()]


def _plain_version(value: object) -> object:
    """`true` and `1.0` equal 1 in Python, and are not it."""
    return value if type(value) in (int, str) else repr(value)


class CopyTable(Table):
    """Tensors that the output takes from one model, unchanged."""

    tensors: Annotated[
        Globs, Field(description="Globs over whole tensor names.", examples=["model.visual.*", ["lm_head.weight"]])
    ]
    from_: Annotated[
        str, Field(alias="from", description="Model of this recipe to copy them from.", examples=["target"])
    ]


class TokenTable(Table):
    """Where the row of a token is from."""

    from_: Annotated[str, Field(alias="from", description="Model of this recipe to take it from.", examples=["rl"])]


class PushTable(Table):
    """Where to publish the output on the Hugging Face Hub."""

    repo: Annotated[
        str, Field(pattern=r"^[^/\s]+/[^/\s]+$", description="Repository on the Hub.", examples=["acme/merged"])
    ]
    private: Annotated[
        bool | None,
        Field(description="Make a new repository private. By default: as the account is set.", examples=[True]),
    ] = None
    revision: Annotated[
        str | None,
        Field(min_length=1, description="Branch to commit to. By default: `main`.", examples=["main", "v2"]),
    ] = None
    pull_request: Annotated[
        bool | None,
        Field(description="Open a pull request. By default: if the repository has a model.", examples=[True, False]),
    ] = None
    message: Annotated[
        str | None,
        Field(
            min_length=1,
            description="Commit message, and title of a pull request. By default: names the expression and the plan.",
            examples=["Add the math skill"],
        ),
    ] = None
    tags: Annotated[list[str], Field(description="Tags of the model card.", examples=[["math"]])] = []
    new_version: Annotated[
        str | None, Field(description="Model that supersedes this one, for its card.", examples=["acme/merged-v2"])
    ] = None


class OutputTable(Table):
    """The model or the skill that a recipe makes."""

    path: Annotated[
        str | None,
        Field(
            min_length=1,
            description="Folder to write, relative to the recipe's own, or `s3://bucket/prefix`; "
            "`--output` replaces it.",
            examples=["./merged"],
        ),
    ] = None
    dtype: Annotated[
        Literal["same", "bfloat16", "float16", "float32"],
        Field(description="Dtype of the output. `same`: the donor's, tensor by tensor.", examples=["bfloat16"]),
    ] = "same"
    rounding: Annotated[
        Literal["nearest", "stochastic"],
        Field(
            description="Rounding to the output's dtype. `nearest`: ties to even. "
            "`stochastic`: unbiased and seeded, so that small updates are not lost on average.",
            examples=["stochastic"],
        ),
    ] = "nearest"
    seed: Annotated[int, Field(ge=0, lt=1 << 63, description="Seed of stochastic rounding.", examples=[0, 1])] = 0
    like: Annotated[
        str | None,
        Field(
            description="Donor: the model whose tensor names, shapes, dtypes, sharding and side files the output "
            "copies. By default: read off `merge`.",
            examples=["target"],
        ),
    ] = None
    keep_dtype: Annotated[
        list[Glob],
        Field(description="Globs over tensors that keep the donor's dtype despite `dtype`.", examples=[["*.A_log"]]),
    ] = []
    shard_size: Annotated[
        str | int,
        Field(description="Largest size of a file. `same`: the donor's sharding.", examples=["same", "5GB"]),
    ] = "same"
    kind: Annotated[
        Literal["model", "skill", "adapter"],
        Field(
            description="`model`: a checkpoint. `skill`: a difference, to reuse in recipes. `adapter`: a LoRA "
            "adapter, of a formula that only adds adapters.",
            examples=["skill", "adapter"],
        ),
    ] = "model"
    keep: Annotated[
        FiniteFloat | None,
        Field(
            gt=0,
            le=1,
            description="For skills: keep this share of each tensor's elements, the largest ones, rescaled to the "
            "tensor's norm. By default: all.",
            examples=[0.2],
        ),
    ] = None
    compression: Annotated[
        Literal["none", "zstd"],
        Field(description="For skills: compress the files; needs `skillmerge[zstd]`.", examples=["zstd"]),
    ] = "none"
    license: Annotated[
        str | None,
        Field(
            min_length=1,
            description="License of the output, for its model card. Required if the models' licenses differ or are "
            "missing. By default: theirs.",
            examples=["apache-2.0"],
        ),
    ] = None
    card: Annotated[
        str | None,
        Field(
            min_length=1,
            description="Model card of your own, relative to the recipe's folder. By default: written for you.",
            examples=["./card.md"],
        ),
    ] = None
    push: Annotated[
        PushTable | None,
        Field(
            description="Where to publish the output on the Hugging Face Hub. `--push` replaces it.",
            examples=[{"repo": "acme/merged", "private": True}],
        ),
    ] = None


TokenEntry = Annotated[TokenTable, Field(description="Where the row of this token is from.", examples=[{"from": "rl"}])]


class RecipeTable(Table):
    """A skillmerge recipe, format version 1."""

    skillmerge: Annotated[
        Literal[1], BeforeValidator(_plain_version), Field(description="Version of the recipe format.", examples=[1])
    ]
    models: Annotated[
        dict[str, ModelEntry],
        Field(
            min_length=1,
            description="Names of your choice, and where each checkpoint is: a folder relative to this file, "
            "`hf://org/name[@revision][/subfolder]`, or a table such as `{skill: ./math-skill}`.",
            examples=[{"target": "./target-sft", "rl": "./source-rl", "sft": "./source-sft"}],
        ),
    ]
    coefficients: Annotated[
        dict[str, CoefficientEntry],
        Field(
            description="Names of your choice, and a number or a schedule for each.",
            examples=[{"lam": 0.7}, {"lam": {"default": 1.0, "rules": [{"layers": "0-3", "value": 0.0}]}}],
        ),
    ] = {}
    merge: Annotated[
        str,
        Field(
            min_length=1,
            description="The arithmetic: models, coefficients and numbers with `+ - * /`, parentheses, and calls of "
            "methods, which `skillmerge methods` lists. The factors of whole models must add up to 1.",
            examples=[
                "target + lam * (rl - sft)",
                "(a + b) / 2",
                "base + lam * ties(a - base, b - base, density=0.3)",
                "slerp(a, b, t=0.5)",
            ],
        ),
    ]
    copy_: Annotated[
        list[CopyTable],
        Field(
            alias="copy",
            description="Tensors that the output takes from one model, unchanged.",
            examples=[[{"tensors": "model.visual.*", "from": "target"}]],
        ),
    ] = []
    ignore: Annotated[
        list[Glob],
        Field(description="Globs over tensors of other models to leave out.", examples=[["lm_head.weight"]]),
    ] = []
    accept: Annotated[
        list[Annotated[str, Field(json_schema_extra={"enum": list(ACCEPTABLE), "enumDescriptions": _MEANINGS})]],
        Field(
            description="Differences between the models that you have checked and accept, by name.",
            examples=[["tokenizer", "chat-template"]],
        ),
    ] = []
    vocabulary: Annotated[
        Literal["by-id", "by-token"],
        Field(
            description="Rows of embedding and head. `by-id`: as they are numbered. `by-token`: each of the donor's "
            "tokens with its own row of every model, and the donor's row where a model lacks the token.",
            examples=["by-token"],
        ),
    ] = "by-id"
    tokens: Annotated[
        dict[str, TokenEntry],
        Field(
            description="Tokens of the donor whose rows are another model's, unchanged. Needs `vocabulary: by-token`.",
            examples=[{"<think>": {"from": "rl"}}],
        ),
    ] = {}
    output: Annotated[
        OutputTable,
        Field(description="What to write, and where.", examples=[{"path": "./merged"}]),
    ] = OutputTable()
    gates: Annotated[
        GatesTable | None,
        Field(
            description="Checks that the output must pass before it is published.",
            examples=[{"vanished": {"max": 0.2}, "loads": True}],
        ),
    ] = None


class GatesFileTable(Table):
    """Gates in a file of their own."""

    gates: Annotated[
        GatesTable, Field(description="Checks that an output must pass.", examples=[{"vanished": {"max": 0.2}}])
    ]
