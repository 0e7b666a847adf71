"""The main job on one screen: recipe -> plan -> shards -> check -> publish."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.checkpoints.kinds.skill_planes import check_zstandard
from skillmerge.engine.destination import ShardRecord
from skillmerge.engine.warm_up import reading_ahead, signals_waiting
from skillmerge.errors import CheckFailed, UnusableWeights, UsageError, memory_errors, some
from skillmerge.outputs import manifest
from skillmerge.outputs.staging import MANIFEST_FILE, Staging
from skillmerge.outputs.verify import check_structure, input_digests, is_intact
from skillmerge.plans import saved as savedplan
from skillmerge.plans.accounting import prove_ties
from skillmerge.plans.budget import budget, check_disk
from skillmerge.plans.opening import Access, planned
from skillmerge.plans.plan import Plan
from skillmerge.plans.side_files import SideFile, fetch
from skillmerge.recipes.recipe import Recipe
from skillmerge.reporter import Reporter
from skillmerge.study.gates import GateFailed, Outcome, Subject, check, prepare
from skillmerge.verbs.result import Result
from skillmerge.version import __version__

if TYPE_CHECKING:
    from skillmerge.outputs.push import Publication


@memory_errors()
def apply(
    recipe: str | os.PathLike[str] | Recipe,
    output: str | os.PathLike[str] | None = None,
    *,
    coefficients: Mapping[str, float] | None = None,
    device: str = "auto",
    threads: int | None = None,
    memory_limit: int | None = None,
    stats: str = "sampled",
    overwrite: bool = False,
    full: bool = False,
    keep_failed: bool = False,
    hash_inputs: bool = False,
    allow_nonfinite: bool = False,
    allow_code: bool = False,
    follow_links: bool = False,
    locked: bool = False,
    commits: Mapping[str, str] | None = None,
    hub: str = "stream",
    push: str | None = None,
    no_local: bool = False,
    private: bool | None = None,
    revision: str | None = None,
    pull_request: bool | None = None,
    message: str | None = None,
    expected: Mapping[str, Any] | None = None,
    reporter: Reporter | None = None,
) -> Result:
    """Plan, merge, check, and publish into the output folder; with `push`, on the Hub too.

    recipe: path of the recipe, or of a saved plan, or one that was read. output: the folder, in place of `output.path`.
    coefficients: numbers in place of the recipe's. device: auto, cpu, cuda or cuda:N. memory_limit: bytes.
    stats: full, sampled or off. full: an output that is there already is read again, every byte. keep_failed: an
    output that a gate refuses stays in the staging folder. hub: stream or download. push: org/name, in place of
    `output.push.repo`; private, revision, pull_request and message likewise. no_local: shards are sent as they are
    finished and removed; only the Hub keeps them. commits: what the revisions of models on the Hub stand for.
    expected: a manifest that the output has to get, but for its environment.
    Raises SkillmergeError, whose subclasses say which kind of trouble it was; see `skillmerge.errors`.
    """
    started = time.monotonic()
    reporter = reporter or Reporter()
    reporter.event("started", skillmerge=__version__, recipe=_name_of(recipe))
    _check_arguments(device, threads, memory_limit, stats, hub)
    if keep_failed and no_local:
        raise UsageError("with no_local there is nothing to keep of a failed output", fix="leave out one of the two")
    access = Access(follow_links, locked, download=hub == "download", commits=commits or {})
    saved = savedplan.read(recipe) if not isinstance(recipe, Recipe) and savedplan.looks_saved(recipe) else None
    if saved is not None:
        if coefficients:
            raise UsageError("a saved plan has its coefficients", fix="leave --set out, or plan anew with it")
        recipe, access = saved.recipe, replace(access, commits=saved.commits)
    with planned(recipe, coefficients, allow_code, access, reporter.warn) as (plan, checkpoints):
        plan.refuse_problems()
        if saved is not None:
            saved.check(plan)
        for note in plan.notes:
            reporter.warn(note)
        if plan.recipe.output.compression != "none":
            check_zstandard()
        prepare(plan.recipe.gates, stats, no_local, plan)
        target = output_folder(plan.recipe, output, checkpoints)
        reporter.event(
            "planned", plan=plan.digest, output=str(target), tensors=len(plan.tensors), shards=len(plan.shards),
            bytes_read=plan.bytes_read, bytes_written=plan.bytes_written,
        )  # fmt: skip
        budget(plan, threads=threads, memory_limit=memory_limit)
        options = {"private": private, "revision": revision, "pull_request": pull_request, "message": message}
        publication = _publication(plan, push, no_local, options)
        conditions = {"inputs": plan.versions, "stats": stats, "allow_nonfinite": allow_nonfinite}
        if publication is not None and no_local:
            conditions["only_on"] = publication.repository
        with closing(Staging(target)) as staging:
            found = publication.find() if publication is not None and no_local and not overwrite else None
            if found is not None:
                staging.discard()
                seconds = time.monotonic() - started
                return _told(reporter, Result(target, found[1], seconds, already=True, published=found[0], plan=plan))
            recovered = staging.recover(plan.weights_digest, conditions, overwrite)
            proof = finished_output(target, plan, conditions, hash_inputs) if not no_local else None
            # Who overwrites may have a reason to, a damaged output for one.
            already = proof is not None and (recovered or not (overwrite or full) or is_intact(target, proof))
            where, passed = "", manifest.gate_outcomes(target) if already else []
            if proof is None or not already:
                if not no_local:
                    _refuse_existing(target, overwrite)
                run = _Run(
                    plan,
                    checkpoints,
                    staging,
                    conditions,
                    publication,
                    access,
                    keep_failed,
                    expected,
                    reporter,
                    started,
                )
                where, proof = run.finish(device, threads, memory_limit, allow_code, hash_inputs)
                passed = manifest.gate_outcomes(staging.files)
                if not no_local:
                    check_structure(staging.files, proof)
                    staging.publish(overwrite)
            elif staging.unfinished:
                reporter.warn(f"{staging.folder} holds an unfinished run of another plan")
            published = None
            if publication is not None:
                published = publication.publish(staging.files if no_local else target, proof, verified=not already)
                if no_local:
                    staging.discard()
    seconds = time.monotonic() - started
    return _told(reporter, Result(target, proof, seconds, where, already, published, plan, passed))


def _told(reporter: Reporter, result: Result) -> Result:
    on_hub = result.published.as_dict() if result.published is not None else None
    where = {"output": str(result.output), "hub": on_hub, "already": result.already}
    reporter.event("published", **where, seconds=round(result.seconds, 3))
    return result


def _name_of(recipe: str | os.PathLike[str] | Recipe) -> str:
    return recipe.document.name if isinstance(recipe, Recipe) else os.fspath(recipe)


@dataclass(frozen=True, slots=True)
class _Run:
    """The work between a plan and a checked output in the staging folder."""

    plan: Plan
    checkpoints: Mapping[str, Checkpoint]
    staging: Staging
    conditions: Mapping[str, Any]
    publication: Publication | None
    access: Access
    keep_failed: bool
    expected: Mapping[str, Any] | None
    reporter: Reporter
    started: float

    def finish(
        self, device: str, threads: int | None, memory_limit: int | None, allow_code: bool, hash_inputs: bool
    ) -> tuple[str, dict[str, Any]]:
        """Begin or continue. Returns where it was computed, and the manifest."""
        plan, staging = self.plan, self.staging
        if remark := staging.begin(plan.weights_digest, dict(self.conditions), plan.digest):
            self.reporter.warn(remark)
        needed = plan.bytes_written - staging.finished_bytes
        if plan.makes_skill:
            needed //= 2  # how much of it will be zero is not known yet
        if self.publication is not None:
            needed = self.publication.disk_needed(needed)
        if not staging.sealed:
            check_disk(staging.folder, needed, "the output")
            side_files = list(fetch(self.checkpoints[plan.donor], plan.side_files, allow_code))
            prove_ties(plan.ties, self.checkpoints)
        if self.publication is not None:
            self.publication.attach(staging)
        if staging.sealed:
            return "", manifest.read(staging.files)
        try:
            where = self._merge(device, threads, memory_limit)
        except BaseException:
            if self.publication is not None:
                self.publication.settle(failed=True)
            raise
        if self.publication is not None:
            self.publication.settle(failed=False)
        digests = input_digests(self.checkpoints) if hash_inputs else {}
        for checkpoint in self.checkpoints.values():
            checkpoint.check_unchanged()
        if plan.makes_skill:
            from skillmerge.engine.skill_file import describe_skill

            side_files.append(SideFile.of(*describe_skill(plan, self.checkpoints, staging.finished)))
        for file in side_files:
            staging.write_file(file.name, file.content or b"")
        body = manifest.build(plan, staging.finished, side_files, self.conditions["stats"], digests)
        if self.expected is not None:
            manifest.compare(staging.output, self.expected, body)
        outcomes = self._measured(body)
        failed = not all(outcome.passed for outcome in outcomes)
        if failed and not self.keep_failed:
            fix = "mend what could not be measured; the same command goes on from here"
            if not any(outcome.unmeasured for outcome in outcomes):
                staging.discard()
                fix = "--keep-failed keeps the output where it can be looked at"
            raise GateFailed(outcomes, fix=fix, plan=plan, proof=body)
        proof = self._prove(body, where, outcomes)
        if failed:
            fix = f"it is kept in {staging.files}; the same command goes on from there"
            raise GateFailed(outcomes, fix=fix, plan=plan, proof=body)
        if self.publication is not None and self.publication.in_flight is not None:
            staging.seal(plan.digest)
        return where, proof

    def _measured(self, body: Mapping[str, Any]) -> list[Outcome]:
        """What becomes of the recipe's gates."""

        def tell(outcome: Outcome) -> None:
            self.reporter.event("gate", **outcome.as_dict())

        opened = (self.plan, self.checkpoints)
        subject = Subject(self.staging.files, body, lambda: nullcontext(opened), self.access, self.reporter.warn)
        return check(self.plan.recipe.gates, subject, tell)

    def _prove(self, body: Mapping[str, Any], where: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        """Write run log and manifest; nothing else but what it names stays in the output. Returns the manifest."""
        log = {
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seconds": round(time.monotonic() - self.started, 3),
            "gates": [outcome.as_dict() for outcome in outcomes],
        }
        run_log = (json.dumps(log) + "\n").encode()
        passed = all(outcome.passed for outcome in outcomes)
        output = self.staging.output if passed else self.staging.files
        folder = os.path.relpath(self.plan.recipe.folder.resolve(), output.parent.resolve() / output.name)
        environment = {**_versions(), "device": where.split(": ")[0], "recipe_folder": folder, **self.conditions}
        proof = manifest.seal(body, environment, run_log)
        self.staging.write_file(manifest.RUN_LOG_FILE, run_log)
        self.staging.write_file(MANIFEST_FILE, manifest.to_bytes(proof))
        self.staging.drop_strangers(manifest.file_names(proof))
        return proof

    def _merge(self, device: str, threads: int | None, memory_limit: int | None) -> str:
        # torch takes seconds to import: everything that can fail without it has been tried by now. Meanwhile the
        # disk has something to do.
        with signals_waiting(), reading_ahead(self.plan, self.checkpoints, self.staging.finished):
            from skillmerge.engine.device import choose_device
            from skillmerge.engine.shards import merge_shards
            from skillmerge.engine.skill_shards import cut_shards
        from skillmerge.engine.worker import Settings

        plan, publication = self.plan, self.publication
        where, why = choose_device("cpu" if plan.makes_skill else device)
        why = "a skill is cut there" if plan.makes_skill else why
        self.reporter.say(f"computing on {where}: {why}")
        chosen = budget(plan, threads=threads, memory_limit=memory_limit, cuda=where.type == "cuda")
        stats, allow_nonfinite = self.conditions["stats"], self.conditions["allow_nonfinite"]
        settings = Settings(where, chosen, stats, allow_nonfinite, self.reporter.warn)
        with self.reporter.bar(sum(shard.size for shard in plan.shards)) as progress:
            try:
                (cut_shards if plan.makes_skill else merge_shards)(
                    plan,
                    self.checkpoints,
                    self.staging,
                    settings,
                    progress=progress,
                    in_flight=publication.in_flight if publication is not None else None,
                    finished=self._finished,
                )
            except UnusableWeights:
                self.staging.discard()
                raise
        return f"{where}: {why}"

    def _finished(self, done: ShardRecord) -> None:
        """A shard is durable."""
        self.reporter.event(
            "shard_finished", file=done.file, size=done.size, sha256=done.sha256,
            finished=len(self.staging.finished) + 1, shards=len(self.plan.shards),
        )  # fmt: skip
        if self.publication is not None:
            self.publication.finished(done)


def _publication(plan: Plan, repository: str | None, no_local: bool, options: Mapping[str, Any]) -> Publication | None:
    """The push that the recipe or the caller asks for, checked before any work."""
    if repository is None and plan.recipe.output.push is None:
        if no_local:
            raise UsageError("without a push there would be no output at all", fix="add --push org/name")
        return None
    from skillmerge.outputs.push import Publication

    return Publication(plan, repository, no_local, options)


def _check_arguments(device: str, threads: int | None, memory_limit: int | None, stats: str, hub: str) -> None:
    """What the command line checks by itself."""
    for wrong, what in (
        (re.fullmatch(r"auto|cpu|cuda(:\d+)?", str(device)) is None, f"device {device!r}: auto, cpu, cuda or cuda:N"),
        (threads is not None and (type(threads) is not int or threads < 1), f"threads {threads!r}: a number from 1"),
        (memory_limit is not None and type(memory_limit) is not int, f"memory_limit {memory_limit!r}: bytes"),
        (stats not in ("full", "sampled", "off"), f"stats {stats!r}: full, sampled or off"),
        (hub not in ("stream", "download"), f"hub {hub!r}: stream or download"),
    ):
        if wrong:
            raise UsageError(what)


def output_folder(recipe: Recipe, output: str | os.PathLike[str] | None, checkpoints: Mapping[str, Checkpoint]) -> Path:
    """Where the output goes. Raises UsageError where that is nowhere, or would replace an input."""
    try:
        path = Path(output).expanduser() if output is not None else recipe.output.path
        str(path).encode()
    except (RuntimeError, UnicodeEncodeError) as error:
        raise UsageError(f"the output {os.fspath(output or '')!r} cannot be used: {error}") from error
    if path is None:
        raise UsageError("the recipe names no output", fix="add `output: {path: ./merged}` or use --output DIR")
    path = Path(os.path.abspath(path))
    try:
        path.resolve()
    except (OSError, RuntimeError) as error:
        raise UsageError(f"the output {path} cannot be used: {error}") from error
    precious = {"the recipe": Path(os.path.abspath(recipe.document.name))}
    precious |= {
        f"model `{name}`": Path(os.path.abspath(item.files.root))
        for name, item in checkpoints.items()
        if item.files.root is not None
    }
    for folder in path.parents:
        if os.path.isfile(folder / MANIFEST_FILE):
            raise UsageError(
                f"the output {path} lies inside a finished output, {folder}", fix="choose another --output"
            )
    here = Path.cwd()
    if path in (here, *here.parents):
        raise UsageError(f"the output {path} would replace the folder you are in", fix="choose another --output")
    for what, place in precious.items():
        for ours in (path, Staging.folder_of(path)) if path.name else (path,):
            for inner, outer in ((place, ours), (place.resolve(), ours.resolve())):
                if inner == outer or outer in inner.parents:
                    raise UsageError(f"the output {ours} would replace {what} ({place})", fix="choose another --output")
    return path


def finished_output(
    folder: Path, plan: Plan, conditions: Mapping[str, Any], hash_inputs: bool
) -> dict[str, Any] | None:
    """The manifest in `folder` where it is this very plan's, made from these very files as asked now, and whole
    as far as can be seen without reading the weights again (that is what `verify` does)."""
    if not (folder / MANIFEST_FILE).is_file():
        return None
    try:
        proof = manifest.read(folder)
        check_structure(folder, proof)
    except CheckFailed:
        return None
    if any(not row.get("passed") for row in manifest.gate_outcomes(folder)):
        return None  # it was refused, and somebody has put it here
    environment = proof["environment"]
    same = proof["plan_digest"] == plan.digest and all(environment.get(key) == conditions[key] for key in conditions)
    hashed = all(file["sha256"] for item in proof["inputs"] for file in item["files"])
    return proof if same and (hashed or not hash_inputs) else None


def is_done(plan: Plan, output: str | os.PathLike[str] | None = None, stats: str = "sampled") -> bool:
    """Whether the output is this plan's already, made from these very files, and every byte of it is as it was."""
    target = output if output is not None else plan.recipe.output.path
    if target is None:
        return False
    conditions = {"inputs": plan.versions, "stats": stats, "allow_nonfinite": False}
    proof = finished_output(Path(target), plan, conditions, hash_inputs=False)
    return proof is not None and is_intact(Path(target), proof)


def _refuse_existing(target: Path, overwrite: bool) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UsageError(f"{target} exists and is not a folder", fix="choose another place with --output")
    if target.is_mount():
        raise UsageError(
            f"{target} is a mount point, which cannot be replaced", fix="choose a folder in it with --output"
        )
    names = [path.name for path in target.iterdir()] if target.is_dir() else []
    if names and not overwrite:
        raise UsageError(f"{target} exists already", fix="replace it with --overwrite, or choose another --output")
    if names and not any(name == MANIFEST_FILE or name.endswith(".safetensors") for name in names):
        raise UsageError(
            f"{target} holds no model, and --overwrite replaces only models: it has {some(sorted(names), 4)}",
            fix="choose another --output, or remove that folder yourself",
        )


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.machine()}",
        "torch": version("torch"),
        "safetensors": version("safetensors"),
    }
