"""The tables of `models:`: what each name stands for. `entries` gives them meaning."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, Tag

from skillmerge.recipes.tables.values import PLAIN_OR_TABLE, Numbers, Table


class RenameTable(Table):
    """A prefix of tensor names, and what replaces it."""

    from_: Annotated[
        str,
        Field(
            alias="from",
            max_length=1000,
            description="Prefix of the names that change. An empty text matches every name.",
            examples=["model.language_model."],
        ),
    ]
    to: Annotated[str, Field(max_length=1000, description="Prefix that replaces it.", examples=["model."])]


class StackTable(Table):
    """Layers of one model, which come next in a stack."""

    from_: Annotated[
        str, Field(alias="from", description="Model of this recipe whose layers come next.", examples=["base"])
    ]
    layers: Annotated[
        Numbers | None,
        Field(description="Its layers, counted from 0, in this order. By default: all.", examples=["0-23", 7]),
    ] = None


class ModelTable(Table):
    """A checkpoint, a stored skill, a sparse patch, a LoRA adapter or a stack of layers, and how to read it."""

    path: Annotated[
        str | None,
        Field(
            min_length=1,
            description="Checkpoint: a folder relative to the recipe's own, `hf://org/name[@revision][/subfolder]`, or "
            "`s3://bucket/prefix` (also `gs://`, `az://`).",
            examples=["./target-sft", "hf://acme/target-sft@v1"],
        ),
    ] = None
    skill: Annotated[
        str | None,
        Field(
            min_length=1,
            description="Stored skill, a difference that `skillmerge extract` wrote: a folder or an `hf://` place.",
            examples=["./math-skill", "hf://acme/math-skill"],
        ),
    ] = None
    patch: Annotated[
        str | None,
        Field(
            min_length=1,
            description="Sparse patch, which `skillmerge export --onto` writes: a folder or an `hf://` place.",
            examples=["./math-patch"],
        ),
    ] = None
    adapter: Annotated[
        str | None,
        Field(
            min_length=1,
            description="LoRA adapter that PEFT saved: a folder or an `hf://` place. Alone it is a difference; with "
            "`onto` it is that model with the adapter on it.",
            examples=["./rl-adapter", "hf://acme/rl-adapter"],
        ),
    ] = None
    name: Annotated[
        str | None,
        Field(
            min_length=1,
            description="Adapter to take from a folder with several: the subfolder that it is in. By default: the one "
            "at the top.",
            examples=["rl"],
        ),
    ] = None
    onto: Annotated[
        str | None,
        Field(
            min_length=1,
            description="Model of this recipe that the patch or the adapter is put onto.",
            examples=["sft"],
        ),
    ] = None
    stack: Annotated[
        list[StackTable] | None,
        Field(
            min_length=1,
            max_length=1000,
            description="Layers of other models of this recipe on top of each other. What is outside the layers is the "
            "first one's.",
            examples=[[{"from": "base", "layers": "0-23"}, {"from": "base", "layers": "8-31"}]],
        ),
    ] = None
    rename: Annotated[
        list[RenameTable] | None,
        Field(
            min_length=1,
            description="Read the tensors under other names. The first rule that matches a name wins.",
            examples=[
                [{"from": "model.language_model.", "to": "model."}],
                [{"from": "", "to": "model."}],
            ],
        ),
    ] = None


ModelEntry = Annotated[
    Annotated[str, Field(min_length=1), Tag("plain")] | Annotated[ModelTable, Tag("table")],
    PLAIN_OR_TABLE,
    Field(
        description="A folder, `hf://org/name[@revision][/subfolder]`, or a table: `{skill: ./math-skill}`.",
        examples=["./source-rl", {"skill": "./math-skill"}],
    ),
]
