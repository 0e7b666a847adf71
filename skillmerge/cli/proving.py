"""Commands on a finished output: verify, gate, rebuild, sign, attest, push."""

from __future__ import annotations

from typing import Any

import click

from skillmerge.cli import flags
from skillmerge.cli.flags import option
from skillmerge.cli.messages import TerminalReporter, log
from skillmerge.cli.results import check_places, print_result
from skillmerge.errors import UsageError, visible


@click.command(cls=flags.LoadCommand)
@click.argument("folder", type=click.Path())
@option(
    "--load", type=flags.Runtime(), multiple=True, metavar="[RUNTIME]",
    help="Also load it with transformers or vllm, in a process of its own, and run it. May be given again.",
)  # fmt: skip
@option("--parent", metavar="MODEL", help="Of a skill: prove that it was cut from this model.")
@option(
    "--signature", is_flag=False, flag_value="", metavar="[FILE]",
    help="Demand a signature that holds: its own model.sig, or this file.",
)  # fmt: skip
@option("--public-key", type=click.Path(), help="Of the key that has to have signed it.")
@flags.certificate_chain
@flags.nonfinite
@flags.links
@flags.junit
@flags.as_json
@option("--quiet", "-q", is_flag=True, help="Only errors.")
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
    """Check an output against its manifest, every byte of it; with --signature, also who signed it."""
    from skillmerge.cli.event_log import recorded
    from skillmerge.verbs.verify import verify as run

    check_places(junit=junit_file)
    reporter = TerminalReporter(quiet, verbose=False)
    runtimes = [name for name in load if name]
    own = True if signature == "" else signature  # without a value: the output's own
    with recorded(reporter, junit=junit_file, suite=f"skillmerge verify {folder}"):
        verdict = run(folder, parent=parent, signature=own, load=runtimes, reporter=reporter, **options)
    if as_json:
        print_result(verdict)
    elif not quiet:
        from skillmerge.cli.show.proving import show_parent, show_verdict
        from skillmerge.cli.show.table import console

        show_verdict(verdict, console())
        if verdict.signature is not None:
            click.echo(visible("signed by {signer}: {files} files, as they are".format(**verdict.signature)))
        if parent is not None and verdict.parent is not None:
            show_parent(parent, verdict.parent, console())


@click.command()
@click.argument("folder", type=click.Path())
@option("--gates", "gates_file", type=click.Path(), help="A file with `gates:`, in place of those of the recipe.")
@flags.base_folder
@flags.links
@flags.events
@flags.junit
@flags.as_json
@option("--quiet", "-q", is_flag=True, help="Only errors.")
def gate(
    folder: str,
    gates_file: str | None,
    events_file: str | None,
    junit_file: str | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Hold a finished output against gates: exit 3 where one does not hold."""
    from skillmerge.cli.event_log import recorded
    from skillmerge.cli.show.proving import show_gates
    from skillmerge.cli.show.table import console
    from skillmerge.study.gates import GateFailed
    from skillmerge.study.gates import gate as run

    check_places(junit=junit_file, events=events_file)
    reporter = TerminalReporter(quiet, verbose=False)
    with recorded(reporter, events_file, junit_file, f"skillmerge gate {folder}"):
        report = run(folder, gates_file, reporter=reporter, **options)
        if not report.ok:
            raise GateFailed(report.outcomes)
    if as_json:
        print_result(report)
    elif not quiet:
        show_gates(report.outcomes, console())


@click.command()
@click.argument("folder", type=click.Path())
@option("--check", is_flag=True, help="Write nothing: compare with the bytes that are there.")
@option("--sample", type=flags.Share(), default="100%", show_default=True, help="How many of the tensors to check.")
@option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the choice of these tensors.")
@flags.output
@flags.base_folder
@option("--device", type=flags.Device(), default="auto", show_default=True, help="Where to compute.")
@flags.threads
@flags.memory
@flags.hub
@flags.links
@flags.as_json
@option("--quiet", "-q", is_flag=True, help="Only errors.")
def rebuild(folder: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Build an output again from its manifest and the models that this names, or check that it would be the same.

    A difference is exit 3, models that have changed since are exit 7.
    """
    from skillmerge.cli.show.proving import show_rebuilt
    from skillmerge.cli.show.table import console
    from skillmerge.verbs.rebuild import rebuild as run

    made = run(folder, reporter=TerminalReporter(quiet, verbose=False, doing="rebuilding"), **options)
    if as_json:
        print_result(made)
    elif not quiet:
        show_rebuilt(made, console())


@click.command()
@click.argument("folder", type=click.Path())
@flags.private_key
@flags.password_file
@option("--signing-certificate", type=click.Path(), help="Of that key, where it has one.")
@flags.certificate_chain
@option("--signature", type=click.Path(), metavar="FILE", help="Where to write it. Default: model.sig in the folder.")
@flags.nonfinite
@flags.as_json
@option("--quiet", "-q", is_flag=True, help="Only errors.")
def sign(
    folder: str, private_key: str | None, password_file: str | None, as_json: bool, quiet: bool, **options: Any
) -> None:
    """Verify an output and sign every file of it, for OpenSSF Model Signing.

    Nothing is asked of a network. An encrypted key's password is read from SKILLMERGE_KEY_PASSWORD or from a file.
    """
    from skillmerge.outputs.proof.sign import sign as run

    if private_key is None:
        raise UsageError("a signature is made with a key", fix="give --private-key KEY")
    signed = run(folder, private_key=private_key, password=flags.password(password_file), **options)
    if as_json:
        print_result(signed)
    elif not quiet:
        click.echo(visible(f"signed {signed.files} files as {signed.signer}\nwrote {signed.path}"))


@click.command()
@click.argument("folder", type=click.Path())
@option("--output", "-o", type=click.Path(), metavar="FILE", help="Default: NAME.intoto.json beside the folder.")
@option("--bom", "bom_file", type=click.Path(), metavar="FILE", help="Also write a CycloneDX bill of materials.")
@option("--builder-id", metavar="URI", help="Who is trusted to have run the merge, such as a pipeline's address.")
@option("--invocation-id", metavar="ID", help="The run of the merge, in the builder's words.")
@flags.private_key
@flags.password_file
@flags.nonfinite
@flags.as_json
@option("--quiet", "-q", is_flag=True, help="Only errors.")
def attest(folder: str, password_file: str | None, as_json: bool, quiet: bool, **options: Any) -> None:
    """Verify an output and write where it came from, as an in-toto attestation with SLSA provenance.

    With --private-key it is signed, as a DSSE envelope. Nothing is asked of a network.
    """
    from skillmerge.outputs.proof.attest import attest as run

    given = {name: value for name, value in options.items() if value is not None}
    attested = run(folder, password=flags.password(password_file), **given)
    if as_json:
        print_result(attested)
    elif not quiet:
        for path in (attested.attestation, attested.bom):
            if path is not None:
                click.echo(visible(f"wrote {path}"))
    if attested.unpinned and not quiet:
        names = ", ".join(attested.unpinned)
        log("note", f"no digests of these inputs are known (apply --hash-inputs): {names}")


@click.command()
@click.argument("folder", type=click.Path())
@click.argument("repository", metavar="ORG/NAME")
@flags.private
@flags.revision
@flags.pull_request
@flags.message
@option("--tag", "tags", multiple=True, help="Of the model card; may be given again.")
@option("--license", help="Of the merge, for its model card, in place of the recipe's.")
@option("--card", type=click.Path(), help="A model card written by hand.")
@flags.nonfinite
@flags.as_json
@option("--quiet", "-q", is_flag=True, help="Only errors.")
def push(folder: str, repository: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Verify an output and publish it on the Hugging Face Hub, in one commit.

    A repository that has a model already gets a pull request. An interrupted push is continued by the same
    command.
    """
    from skillmerge.outputs.hub.push import push as run

    published = run(folder, repository, **options)
    if as_json:
        print_result(published)
    elif not quiet:
        from skillmerge.cli.show.merging import show_published
        from skillmerge.cli.show.table import console

        show_published(published, console())
