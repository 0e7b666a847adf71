"""Commands for the tasks of a cluster: shard, and finish."""

from __future__ import annotations

from typing import Any

import click

from skillmerge.cli import flags, results
from skillmerge.cli.help import command, option
from skillmerge.cli.messages import TerminalReporter
from skillmerge.cli.results import check_places, print_line, print_result

TASK = "Task"


@command("shard plan.json -o /shared/merged", "shard plan.json -o /shared/merged --index 0 --of 64")
@click.argument("plan", type=click.Path())
@option(
    "--index", group=TASK, type=click.IntRange(0), metavar="I",
    help="Which task this is, counted from 0  [default: the scheduler's]",
)  # fmt: skip
@option(
    "--of", group=TASK, type=click.IntRange(1), metavar="N", help="How many tasks there are  [default: the scheduler's]"
)
@flags.device
@flags.threads
@flags.memory
@flags.stats
@flags.hub
@flags.links
@flags.nonfinite
@flags.output
@flags.push
@flags.no_local
@flags.private
@flags.revision
@flags.result_file
@flags.events
@flags.as_json
@flags.quiet
@flags.verbose
def shard(
    plan: str, result_file: str | None, events_file: str | None, as_json: bool, quiet: bool, verbose: bool,
    **options: Any,
) -> None:  # fmt: skip
    """Make one task's share of the shards of a saved plan.

    Tasks need no lock, and may run twice. Without --index, Slurm, AWS Batch, Kubernetes or torchrun say which it is.
    """
    from skillmerge.cli.event_log import recorded
    from skillmerge.tensors import format_bytes
    from skillmerge.verbs.tasks.shard import shard as run

    with results.result_file(result_file) as write_result:
        printed = check_places(json=as_json, result_file=result_file, events=events_file)
        reporter = TerminalReporter(quiet, verbose)
        with results.reserved(printed), recorded(reporter, events_file, None, f"skillmerge shard {plan}"):
            done = run(plan, reporter=reporter, **options)
        if as_json:
            print_result(done)
        elif not quiet and not printed:
            count, made = len(done.shards), len(done.made)
            there = f", {count - made} there already" if made < count else ""
            print_line(
                f"task {done.index} of {done.of}: {count} shard{'' if count == 1 else 's'}, "
                f"{format_bytes(done.size)}: {made} made in {done.seconds:.1f} s{there}"
            )
        write_result(done)


@command("finish plan.json -o /shared/out", "finish plan.json -o /shared/out --wait-limit 6h --push org/name")
@click.argument("plan", type=click.Path())
@option("--wait", group=TASK, is_flag=True, help="Wait until the tasks have made every shard")
@option(
    "--wait-limit",
    group=TASK,
    type=flags.Duration(),
    metavar="TIME",
    help="Wait no longer than this: 90s, 30m, 6h or 2d",
)
@option("--verify", group=TASK, is_flag=True, help="Reread every shard, also those whose size and time are unchanged")
@flags.strict
@flags.hub
@flags.hash_inputs
@flags.links
@flags.code
@flags.output
@flags.overwrite
@flags.keep_failed
@flags.push
@flags.no_local
@flags.private
@flags.revision
@flags.pull_request
@flags.message
@flags.report
@flags.result_file
@flags.events
@flags.junit
@flags.as_json
@flags.quiet
@flags.verbose
def finish(plan: str, **options: Any) -> None:
    """Check and publish an output whose shards tasks have made.

    Exits 75 and names the missing shards, if there are any. Gates, report and publication are those of apply.
    """
    from skillmerge.verbs.tasks.finish import finish as run

    results.merge(run, plan, "finish", options)
