"""Kinds of values that several keys of a recipe share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

# Unions are told apart by the YAML shape of the value, so that an error speaks of the member that was meant.
PLAIN_OR_LIST = Discriminator(lambda value: "list" if isinstance(value, list) else "plain")
PLAIN_OR_TABLE = Discriminator(lambda value: "table" if isinstance(value, dict) else "plain")

Kind = Literal["attention", "mlp", "norm", "embedding", "head", "router", "expert"]
Glob = Annotated[str, Field(min_length=1, max_length=1000)]
Globs = Annotated[
    Annotated[Glob, Tag("plain")] | Annotated[list[Glob], Field(min_length=1), Tag("list")], PLAIN_OR_LIST
]
Kinds = Annotated[
    Annotated[Kind, Tag("plain")] | Annotated[list[Kind], Field(min_length=1), Tag("list")], PLAIN_OR_LIST
]
Numbers = Annotated[
    Annotated[str | int, Tag("plain")] | Annotated[list[str | int], Field(min_length=1), Tag("list")],
    PLAIN_OR_LIST,
]


class Table(BaseModel):
    """A table without unknown keys, whose values are of the type that the text has."""

    model_config = ConfigDict(extra="forbid", strict=True)
