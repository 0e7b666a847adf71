"""Verified, gated and recreated outputs for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from skillmerge.cli.console import Text
from skillmerge.cli.show import listings
from skillmerge.cli.show.table import Table
from skillmerge.outputs.output import Outcome
from skillmerge.outputs.verify import Verdict
from skillmerge.tensors import format_bytes

if TYPE_CHECKING:
    from skillmerge.outputs.hub.rehearsal import Rehearsal
    from skillmerge.verbs.rebuild import Rebuilt


def show_gates(outcomes: Sequence[Outcome], out: Console) -> None:
    """Show what each gate requires, what was measured, and the result."""
    table = Table(listings.GATE_COLUMNS, text={*listings.GATE_COLUMNS} - {"measured"}, drop=("required", "measured"))
    for outcome in outcomes:
        measured = f"{outcome.measured:.4g}" if outcome.measured is not None else "-"
        verdict = Text("passed", "green") if outcome.passed else Text("FAILED", "bold red")
        table.add_row(Text(outcome.gate), Text(outcome.asked), measured, verdict, Text(outcome.detail))
    out.print(table)


def show_verdict(verdict: Verdict, out: Console) -> None:
    out.print(
        Text(
            f"{verdict.output.shown}: verified: {verdict.files} files, {verdict.tensors} tensors, "
            f"{format_bytes(verdict.bytes)}: digests, index, headers, shapes, dtypes, finite values"
        ),
        soft_wrap=True,
    )
    if verdict.load is not None:
        _show_load(verdict.load, out)


def _show_load(report: Mapping[str, Any], out: Console) -> None:
    """Show what loaded the model and its tokenizer, and what other runtimes generated."""
    lines = [f"loaded as {report['class']}: no missing, unexpected or mismatched keys; finite output"]
    tokenizer, vllm = report["tokenizer"], report.get("vllm", {})
    if "texts" in tokenizer:
        size = f"{tokenizer['tokens']} tokens for {tokenizer['rows']} rows"
        again = f"{tokenizer['texts']} texts decode and encode to the same ids"
        lines.append(f"tokenizer {tokenizer['class']}: {size}; {again}")
    if vllm:
        count = len(vllm["tokens"])
        same = "all" if vllm["same"] == count else f"the first {vllm['same']}"
        alike = f"{same} of {count} tokens match transformers, in {vllm['dtype']}"
        lines.append(f"loaded in vLLM {vllm['version']}: {alike}")
    for line in lines:
        out.print(Text(line), soft_wrap=True)
    for note in (*tokenizer["notes"], *vllm.get("notes", ())):
        out.print(Text(f"note: {note}", style="yellow"), soft_wrap=True)


def show_rehearsal(rehearsal: Rehearsal, out: Console) -> None:
    """Show what a push would publish: where, as what, the files, and the model card."""
    push = rehearsal.push
    visibility = {True: "private", False: "public", None: "your account's default, usually public"}[push.private]
    where = f"branch `{push.revision}`" if push.revision else "a pull request" if push.pull_request else "`main`"
    if not push.revision and push.pull_request is None:
        where += ", or a pull request if the repository has a model"
    for line in (
        f"would publish {rehearsal.output.shown} as {push.repository} (if it is new: {visibility})",
        f"to: {where}",
        f"commit message: {rehearsal.title}",
    ):
        out.print(Text(line), soft_wrap=True)
    table = Table(("file", "size"), text=("file",))
    files = rehearsal.files
    for name, size in files.items():
        table.add_row(Text(name), format_bytes(size))
    table.add_row(f"{len(files)} files", format_bytes(sum(files.values())))
    out.print(table)
    if rehearsal.card is not None:
        out.print(Text("the model card, README.md:", style="bold"))
        out.print(Text(rehearsal.card), soft_wrap=True)
    unknown = f"whether {push.repository} exists, nor what your token allows"
    out.print(Text(f"nothing was sent, and the Hub was not asked {unknown}", style="bold"), soft_wrap=True)


def show_parent(parent: str, model: str, out: Console) -> None:
    out.print(Text(f"{parent} is `{model}` of this skill: the digests of all tensors match"))


def show_rebuilt(made: Rebuilt, out: Console) -> None:
    """Show how many tensors were recreated identically."""
    what = "all" if made.tensors == made.of else f"{made.tensors} of"
    told = f"{made.place or made.folder}: {what} {made.of} tensors ({format_bytes(made.bytes)})"
    told += " are byte-identical when rebuilt"
    out.print(Text(told if made.output is None else f"{told}, in {made.output}", style="bold"), soft_wrap=True)
