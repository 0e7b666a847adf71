"""The tables of a recipe's coefficients: a number, or rules by layer, expert, module and name."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, FiniteFloat, Tag

from skillmerge.recipes.tables.values import PLAIN_OR_TABLE, Globs, Kinds, Numbers, Table


class RuleTable(Table):
    """The coefficient of some tensors. Selectors of one rule must all match."""

    layers: Annotated[
        Numbers | None,
        Field(description="Select layers, counted from 0.", examples=[7, "0-3", "4-", ["0-3", "8-11"]]),
    ] = None
    experts: Annotated[
        Numbers | None,
        Field(
            description="Select experts of a mixture of experts, counted from 0, packed or one by one.",
            examples=[7, "0-3", "4-", ["0-3", "8-11"]],
        ),
    ] = None
    tensors: Annotated[
        Globs | None,
        Field(description="Select tensors by globs over whole names.", examples=["*embed_tokens*", ["*.bias"]]),
    ] = None
    modules: Annotated[
        Kinds | None, Field(description="Select kinds of module.", examples=["mlp", ["embedding", "head"]])
    ] = None
    value: Annotated[
        FiniteFloat | None, Field(description="Coefficient of the selected tensors.", examples=[0.0, 0.5])
    ] = None
    ramp: Annotated[
        list[FiniteFloat] | None,
        Field(
            min_length=2,
            description="Coefficients of the first and the last selected layer, linear in between. Points between the "
            "ends are evenly spaced.",
            examples=[[0.5, 1.0], [0.2, 1.0, 0.2]],
        ),
    ] = None


class ScheduleTable(Table):
    """A coefficient that varies by layer or module."""

    default: Annotated[FiniteFloat, Field(description="Coefficient where no rule matches.", examples=[0.0, 1.0])] = 1.0
    rules: Annotated[
        list[RuleTable],
        Field(
            description="Coefficients of some tensors. The last rule that matches a tensor wins.",
            examples=[[{"layers": "0-3", "value": 0.0}, {"modules": "mlp", "value": 0.8}]],
        ),
    ] = []


CoefficientEntry = Annotated[
    Annotated[FiniteFloat, Tag("plain")] | Annotated[ScheduleTable, Tag("table")],
    PLAIN_OR_TABLE,
    Field(
        description="A number, or a schedule that varies by layer or module.",
        examples=[0.7, {"default": 1.0, "rules": [{"layers": "0-3", "value": 0.0}]}],
    ),
]
