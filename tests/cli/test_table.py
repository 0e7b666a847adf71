"""Tables on terminals of every width: no number is cut, and what has no room is named."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from skillmerge.cli.messages import SPELLED
from skillmerge.cli.show.table import Table

HEAD = ("module", "tensors", "elements", "changed", "norm", "relative norm", "remark")
ROWS = (
    ("attention", "112", "4,587,520", "11.0%", "0.0982", "0.00229", "largest of all"),
    ("mlp", "84", "16,515,072", "16.1%", "0.226", "0.00278", "model.layers.27.mlp.down_proj.weight"),
)


def printed(table: Table, width: int) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=width, highlight=False).print(table)
    return [line.rstrip() for line in stream.getvalue().splitlines()]


def example(**options: object) -> Table:
    table = Table(HEAD, "Update", text=("module", "remark"), **options)  # type: ignore[arg-type]
    for row in ROWS:
        table.add_row(*row)
    return table


@pytest.mark.parametrize("width", range(30, 140))
def test_number_is_whole_or_its_column_is_named(width: int) -> None:
    lines = printed(example(), width)
    assert all(len(line) <= width for line in lines)
    text = "\n".join(lines)
    left_out = " ".join(lines).partition("no room for: ")[2].partition(" (")[0].split(", ")
    for row in ROWS:
        for head, cell in zip(HEAD[:6], row, strict=False):
            shown = cell in text.split() or cell in text
            assert shown != (head in left_out), (head, cell)


def test_wide_terminal_has_every_column_on_one_line_a_row() -> None:
    lines = printed(example(), 120)
    assert lines[0] == "Update"
    assert " module      tensors     elements   changed     norm   relative norm   remark" in lines
    assert not any("no room" in line for line in lines)


def test_columns_leave_in_the_order_that_was_given() -> None:
    assert any("no room for: elements (" in line for line in printed(example(drop=("elements",)), 79))
    assert any("no room for: remark (" in line for line in printed(example(), 70))


def test_headings_wrap_before_a_column_leaves() -> None:
    table = Table(("module", "share of the elements that changed"), text=("module",))
    table.add_row("mlp", "16.1%")
    lines = printed(table, 30)
    assert not any("no room" in line for line in lines)
    assert any(line.endswith("16.1%") for line in lines)


def test_long_word_of_text_wraps_without_losing_a_character() -> None:
    lines = printed(example(drop=HEAD[1:6]), 40)
    inside = "".join(line.split()[-1] for line in lines if "mlp" in line or "down" in line or "weight" in line)
    assert "model.layers.27.mlp.down_proj.weight" in inside


def test_two_columns_of_one_heading_are_two_columns() -> None:
    table = Table(("λ", "lost", "lost"), text=())
    table.add_row("0.5", "1.0%", "2.0%")
    assert any("1.0%" in line and "2.0%" in line for line in printed(table, 40))


def test_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="2 cells for 7 columns"):
        example().add_row("a", "b")


def test_control_characters_of_a_name_are_written_out() -> None:
    table = Table(("name",))
    table.add_row("a\x1b]0;b")
    assert any("a\\x1b]0;b" in line for line in printed(table, 60))


def test_title_is_text_not_markup() -> None:
    table = Table(("module with a long heading",), "Update, a[/b] + c[red]:fire:")
    table.add_row("model.layers.0.mlp[bold]")
    text = " ".join(printed(table, 60))
    assert "Update, a[/b] + c[red]:fire:" in text
    assert "model.layers.0.mlp[bold]" in text


def test_column_without_heading_stays() -> None:
    """Its absence could not be named."""
    table = Table(("lam", "accuracy", "effective λ", ""), text=("",))
    table.add_row("0.5", "0.9844 ± 0.049", "0.498", "best")
    lines = printed(table, 34)
    assert any("no room for: effective λ (" in line for line in lines), lines
    assert any(line.endswith("best") for line in lines), lines


def test_numbers_in_text_are_not_broken() -> None:
    table = Table(("gate", "required", "names"))
    table.add_row("norm_ratio attention", "at most 0.03", "model.layers.0.input_layernorm.weight")
    for width in range(40, 60):
        text = "\n".join(printed(table, width))
        assert "0.03" in text, text
    assert "input_layernorm." in text


@pytest.mark.parametrize("width", range(30, 70))
def test_signs_that_the_terminal_spells_out_keep_the_columns(width: int) -> None:
    """`…` was written as `...` after the columns had been measured."""
    stream = io.TextIOWrapper(io.BytesIO(), "ascii", errors=SPELLED)
    table = Table(("requested λ", "names", "accuracy"), text=("names",))
    table.add_row("0.5", "model.embed_tokens.weight … and 24 more", "0.98 ± 0.049")
    table.add_row("1", "all", "1")
    Console(file=stream, width=width, highlight=False).print(table)
    stream.flush()
    lines = stream.buffer.getvalue().decode().splitlines()  # type: ignore[attr-defined]
    assert len({len(line) for line in lines if line[:1] in "|+"}) == 1, lines
    assert max(map(len, lines)) <= width
