"""Commands on a finished output: verify, gate, rebuild, sign, attest, push."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from skillmerge.cli import flags
from skillmerge.cli.flags import option
from skillmerge.cli.messages import TerminalReporter, tell
from skillmerge.cli.results import check_places, print_json
from skillmerge.errors import UsageError, visible


@click.command()
@click.argument("folder", type=click.Path())
@option("--load", is_flag=True, help="Also load it with transformers, in a separate process, and run it once.")
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
    load: bool,
    parent: str | None,
    signature: str | None,
    public_key: str | None,
    certificate_chain: tuple[str, ...],
    allow_nonfinite: bool,
    follow_links: bool,
    junit_file: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Check an output against its manifest, every byte of it; with --signature, also who signed it."""
    from skillmerge.cli.event_log import heard

    check_places(junit=junit_file)
    reporter, signed, model = TerminalReporter(quiet, verbose=False), None, None
    common: dict[str, Any] = {"load": load, "allow_nonfinite": allow_nonfinite, "reporter": reporter}
    with heard(reporter, junit=junit_file, suite=f"skillmerge verify {folder}"):
        if signature is not None or public_key is not None or certificate_chain:
            from skillmerge.verbs.verify import verify_signed

            trusted: dict[str, Any] = {"public_key": public_key, "certificate_chain": certificate_chain}
            signed = verify_signed(folder, signature or None, **trusted, **common)
            verdict = signed.verdict
        else:
            from skillmerge.verbs.verify import verify as run

            verdict = run(folder, **common)
        if parent is not None:
            from skillmerge.verbs.extract import check_parent

            model = check_parent(folder, parent, follow_links=follow_links)
    if as_json:
        print_json(
            {
                "ok": True,
                "folder": str(verdict.folder),
                "files": verdict.files,
                "tensors": verdict.tensors,
                "bytes": verdict.bytes,
                "load": verdict.load,
                "parent": model,
                "signature": signed.as_dict() if signed else None,
            }
        )
    elif not quiet:
        from skillmerge.cli.show import terminal

        terminal.show_verdict(verdict, terminal.console())
        if signed is not None:
            click.echo(visible(f"signed by {signed.signer}: {signed.files} files, as they are"))
        if parent is not None and model is not None:
            terminal.show_parent(parent, model, terminal.console())


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
    base_folder: str | None,
    follow_links: bool,
    events_file: str | None,
    junit_file: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Hold a finished output against gates: exit 3 where one does not hold."""
    from skillmerge.cli.event_log import heard
    from skillmerge.cli.show import terminal
    from skillmerge.study.gates import GateFailed
    from skillmerge.study.gates import gate as run

    check_places(junit=junit_file, events=events_file)
    reporter = TerminalReporter(quiet, verbose=False)
    with heard(reporter, events_file, junit_file, f"skillmerge gate {folder}"):
        outcomes = run(folder, gates_file, base=base_folder, follow_links=follow_links, reporter=reporter)
        if not all(outcome.passed for outcome in outcomes):
            raise GateFailed(outcomes)
    rows = [outcome.as_dict() for outcome in outcomes]
    if as_json:
        print_json({"ok": True, "folder": folder, "gates": rows})
    elif not quiet:
        terminal.show_gates(rows, terminal.console())


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
def rebuild(
    folder: str,
    check: bool,
    sample: float,
    seed: int,
    output: str | None,
    base_folder: str | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Build an output again from its manifest and the models that this names, or check that it would be the same.

    A difference is exit 3, models that have changed since are exit 7.
    """
    from skillmerge.cli.show import terminal
    from skillmerge.engine.runner import Work
    from skillmerge.verbs.rebuild import How, check_rebuild
    from skillmerge.verbs.rebuild import rebuild as run

    if check == (output is not None):
        raise UsageError("say what to do", fix="give --check (compare, write nothing) or --output NEW (build it again)")
    reporter = TerminalReporter(quiet, verbose=False, doing="rebuilding")
    work = Work(options.pop("device"), options.pop("threads"), options.pop("memory_limit"))
    base = Path(base_folder) if base_folder is not None else None
    how = How(base=base, work=work, reporter=reporter, **options)
    made = run(folder, output, how) if output is not None else check_rebuild(folder, sample=sample, seed=seed, how=how)
    if as_json:
        print_json({"ok": True, **made.as_dict()})
    elif not quiet:
        terminal.show_rebuilt(made, terminal.console())


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
    from skillmerge.outputs.sign import sign as run

    if private_key is None:
        raise UsageError("a signature is made with a key", fix="give --private-key KEY")
    signed = run(folder, private_key=private_key, password=flags.password(password_file), **options)
    if as_json:
        print_json({"ok": True, "folder": folder, **signed.as_dict()})
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
    from skillmerge.outputs.attest import attest as run

    given = {name: value for name, value in options.items() if value is not None}
    attested = run(folder, password=flags.password(password_file), **given)
    if as_json:
        print_json({"ok": True, "folder": folder, **attested.as_dict()})
    elif not quiet:
        for path in (attested.attestation, attested.bom):
            if path is not None:
                click.echo(visible(f"wrote {path}"))
    if attested.unpinned and not quiet:
        names = ", ".join(attested.unpinned)
        tell("note", f"no digests of these inputs are known (apply --hash-inputs): {names}")


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
    from skillmerge.outputs.push import push as run

    published = run(folder, repository, **options)
    if as_json:
        print_json({"ok": True, **published.as_dict()})
    elif not quiet:
        from skillmerge.cli.show import terminal

        terminal.show_published(published, terminal.console())
