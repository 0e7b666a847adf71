"""Commands on a finished output: verify, gate, rebuild, sign, attest, push."""

from __future__ import annotations

from typing import Any

import click

from skillmerge.cli import flags
from skillmerge.cli.help import command, option
from skillmerge.cli.messages import TerminalReporter, log, log_error
from skillmerge.cli.results import check_places, print_line, print_result, refuse_standard_output, reserved
from skillmerge.errors import UsageError


@command("verify merged", "verify merged --load", cls=flags.LoadCommand)
@click.argument("folder", type=click.Path())
@option(
    "--load", group="Checks", type=flags.Runtime(), multiple=True, metavar="[RUNTIME]",
    help="Also load and run it in transformers or vllm; repeatable",
)  # fmt: skip
@option("--parent", group="Checks", metavar="MODEL", help="Prove that a skill was extracted from this model or adapter")
@option(
    "--shard", group="Checks", type=flags.Part(), metavar="I/N",
    help="Read only part I of N, counted from 0, as one of N tasks",
)  # fmt: skip
@flags.nonfinite
@flags.links
@option(
    "--signature", group=flags.SIGNATURE, is_flag=False, flag_value="", metavar="[FILE]",
    help="Require a valid signature: model.sig, or FILE",
)  # fmt: skip
@option("--public-key", group=flags.SIGNATURE, type=click.Path(), metavar="FILE", help="Public key of the signer")
@flags.certificate_chain
@flags.junit
@flags.as_json
@flags.quiet
def verify(
    folder: str,
    parent: str | None,
    signature: str | None,
    load: tuple[str | None, ...],
    junit_file: str | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Check every byte of an output against its manifest.

    A difference exits 3.
    """
    from skillmerge.cli.event_log import recorded
    from skillmerge.verbs.verify import verify as run

    printed = check_places(json=as_json, junit=junit_file)
    reporter = TerminalReporter(quiet, verbose=False)
    runtimes = [name for name in load if name]
    own = True if signature == "" else signature  # without a value: the output's own
    with recorded(reporter, junit=junit_file, suite=f"skillmerge verify {folder}"):
        verdict = run(folder, parent=parent, signature=own, load=runtimes, reporter=reporter, **options)
    if as_json:
        print_result(verdict)
    elif not quiet and not printed:
        from skillmerge.cli.console import console
        from skillmerge.cli.show.proving import show_parent, show_verdict

        show_verdict(verdict, console())
        if verdict.signature is not None:
            print_line("signed by {signer}: {files} files, as they are".format(**verdict.signature))
        if parent is not None and verdict.parent is not None:
            show_parent(parent, verdict.parent, console())


@command("gate merged --gates gates.yaml")
@click.argument("folder", type=click.Path())
@option(
    "--gates",
    "gates_file",
    group="Checks",
    type=click.Path(),
    metavar="FILE",
    help="File with `gates:`  [default: the recipe's gates]",
)
@flags.base_folder
@flags.links
@flags.events
@flags.junit
@flags.as_json
@flags.quiet
def gate(
    folder: str,
    gates_file: str | None,
    events_file: str | None,
    junit_file: str | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Run quality gates on an output.

    A gate that fails exits 3.
    """
    from skillmerge.cli.console import console
    from skillmerge.cli.event_log import recorded
    from skillmerge.cli.show.proving import show_gates
    from skillmerge.study.gates import GateFailed
    from skillmerge.study.gates import gate as run

    printed = check_places(json=as_json, junit=junit_file, events=events_file)
    reporter = TerminalReporter(quiet, verbose=False)
    with reserved(printed), recorded(reporter, events_file, junit_file, f"skillmerge gate {folder}"):
        report = run(folder, gates_file, reporter=reporter, **options)
        if not report.ok:
            raise GateFailed(report.outcomes)
    if as_json:
        print_result(report)
    elif not quiet and not printed:
        show_gates(report.outcomes, console())


@command("rebuild merged --check", "rebuild merged --check --sample 5%", "rebuild merged -o again")
@click.argument("folder", type=click.Path())
@option("--check", group="Checks", is_flag=True, help="Write nothing: compare with the existing bytes")
@option(
    "--sample",
    group="Checks",
    type=flags.Share(),
    default="100%",
    metavar="SHARE",
    help="Share of the tensors to check  [default: 100%]",
)
@option(
    "--seed", group="Checks", type=click.IntRange(0), default=0, metavar="N", help="Seed of the sample  [default: 0]"
)
@flags.device
@flags.threads
@flags.memory
@flags.base_folder
@flags.hub
@flags.links
@option(
    "--output", "-o", group=flags.OUTPUT, type=click.Path(), metavar="DIR", help="New folder for the rebuilt output"
)
@flags.as_json
@flags.quiet
def rebuild(folder: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Reproduce an output from its manifest.

    A difference exits 3; models that have changed exit 7.
    """
    from skillmerge.cli.console import console
    from skillmerge.cli.show.proving import show_rebuilt
    from skillmerge.verbs.rebuild import rebuild as run

    made = run(folder, reporter=TerminalReporter(quiet, verbose=False, doing="rebuilding"), **options)
    if as_json:
        print_result(made)
    elif not quiet:
        show_rebuilt(made, console())


@command("sign merged --private-key key.pem")
@click.argument("folder", type=click.Path())
@flags.private_key
@flags.password_file
@option(
    "--signing-certificate", group=flags.SIGNATURE, type=click.Path(), metavar="FILE", help="Certificate of the key"
)
@flags.certificate_chain
@option(
    "--signature",
    group=flags.OUTPUT,
    type=click.Path(),
    metavar="FILE",
    help="Signature file  [default: model.sig in FOLDER]",
)
@flags.nonfinite
@flags.as_json
@flags.quiet
def sign(
    folder: str, private_key: str | None, password_file: str | None, as_json: bool, quiet: bool, **options: Any
) -> None:
    """Sign every file of an output.

    Verifies the output first, then writes an OpenSSF Model Signing signature. Needs no network.
    """
    from skillmerge.outputs.proof.sign import sign as run

    refuse_standard_output(signature=options["signature"])
    if private_key is None:
        raise UsageError("a signature is made with a key", fix="give --private-key KEY")
    reporter = TerminalReporter(quiet, verbose=False)
    signed = run(folder, private_key=private_key, password=flags.password(password_file), reporter=reporter, **options)
    if as_json:
        print_result(signed)
    elif not quiet:
        print_line(f"signed {signed.files} files as {signed.signer}\nwrote {signed.path}")


@command("attest merged --bom bom.json", "attest merged --private-key key.pem")
@click.argument("folder", type=click.Path())
@option("--builder-id", group="Provenance", metavar="URI", help="Identity of the pipeline that ran the merge")
@option("--invocation-id", group="Provenance", metavar="ID", help="Run of that pipeline")
@flags.private_key
@flags.password_file
@option(
    "--output",
    "-o",
    group=flags.OUTPUT,
    type=click.Path(),
    metavar="FILE",
    help="Attestation  [default: NAME.intoto.json beside FOLDER]",
)
@option(
    "--bom",
    "bom_file",
    group=flags.OUTPUT,
    type=click.Path(),
    metavar="FILE",
    help="Also write a CycloneDX bill of materials",
)
@flags.nonfinite
@flags.as_json
@flags.quiet
def attest(folder: str, password_file: str | None, as_json: bool, quiet: bool, **options: Any) -> None:
    """Write provenance and a bill of materials.

    Verifies the output first, then writes an in-toto attestation with SLSA provenance. A key signs it as a DSSE
    envelope. Needs no network.
    """
    from skillmerge.outputs.proof.attest import attest as run

    refuse_standard_output(output=options["output"], bom=options["bom_file"])
    given = {name: value for name, value in options.items() if value is not None}
    reporter = TerminalReporter(quiet, verbose=False)
    attested = run(folder, password=flags.password(password_file), reporter=reporter, **given)
    if as_json:
        print_result(attested)
    elif not quiet:
        for path in (attested.attestation, attested.bom):
            if path is not None:
                print_line(f"wrote {path}")
    if attested.unpinned and not quiet:
        names = ", ".join(attested.unpinned)
        log("note", f"no digests of these inputs are known (apply --hash-inputs): {names}")


@command("push merged org/name --private", "push merged org/name --dry-run")
@click.argument("folder", type=click.Path())
@click.argument("repository", metavar="ORG/NAME")
@flags.private
@flags.revision
@flags.pull_request
@flags.message
@flags.dry_run
@option("--card", group="Model card", type=click.Path(), metavar="FILE", help="Model card to use as it is")
@option("--license", group="Model card", metavar="ID", help="License  [default: the recipe's]")
@option("--tag", "tags", group="Model card", multiple=True, metavar="TAG", help="Tag; repeatable")
@flags.nonfinite
@flags.as_json
@flags.quiet
def push(folder: str, repository: str, dry_run: bool, as_json: bool, quiet: bool, **options: Any) -> int:
    """Publish an output on the Hugging Face Hub.

    Verifies the output first, then publishes it in one commit. Opens a pull request if the repository has a model.
    Rerun to resume.
    """
    if dry_run:
        return _rehearse_push(folder, repository, as_json, quiet, **options)
    from skillmerge.outputs.hub.push import push as run

    published = run(folder, repository, reporter=TerminalReporter(quiet, verbose=False), **options)
    if as_json:
        print_result(published)
    elif not quiet:
        from skillmerge.cli.console import console
        from skillmerge.cli.show.merging import show_published

        show_published(published, console())
    return 0


def _rehearse_push(folder: str, repository: str, as_json: bool, quiet: bool, **options: Any) -> int:
    """Show what a push would publish, and every reason why it would be refused. Return the push's exit status."""
    from skillmerge.cli.console import console
    from skillmerge.cli.show.proving import show_rehearsal
    from skillmerge.outputs.hub.push import rehearse_push

    rehearsal = rehearse_push(folder, repository, reporter=TerminalReporter(quiet, verbose=False), **options)
    if as_json:
        print_result(rehearsal)
    elif not quiet:
        show_rehearsal(rehearsal, console())
    for error in rehearsal.refused:
        log_error(error)
    return rehearsal.refused[0].exit_status if rehearsal.refused else 0
