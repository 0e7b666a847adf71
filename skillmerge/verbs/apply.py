"""The verb apply, the main job: recipe -> plan -> shards -> check -> publish."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from skillmerge.checkpoints.tokenizers.vocabulary import SKILL_TOKENS
from skillmerge.engine.destination import ShardRecord
from skillmerge.engine.runner import Job, Runner, Work, check_words, handed
from skillmerge.engine.runners.table import runner_for
from skillmerge.errors import UnusableWeights, UsageError, machine_errors
from skillmerge.outputs import comparison, manifest
from skillmerge.outputs.buckets.at_hand import at_hand
from skillmerge.outputs.buckets.sending import work_folder
from skillmerge.outputs.manifest import Manifest, ManifestBody
from skillmerge.outputs.measured import settled, strict_outcome, warnings_of
from skillmerge.outputs.output import Outcome, Output, RunLog
from skillmerge.outputs.staging import MANIFEST_FILE, Staging
from skillmerge.outputs.verify import check_structure, checked, input_digests, is_intact, verify_files
from skillmerge.plans.accounting import prove_ties
from skillmerge.plans.budget import budget, check_disk
from skillmerge.plans.compare.skill_tokens import token_files
from skillmerge.plans.opening import Access
from skillmerge.plans.saved import SavedPlan
from skillmerge.plans.side_files import SideFile, fetch
from skillmerge.recipes.recipe import Recipe
from skillmerge.recipes.source import RecipeSource
from skillmerge.remarks import Remark
from skillmerge.reporter import Reporter, default_reporter
from skillmerge.study.gate_obstacles import IN_A_BUCKET, NO_LOCAL, prepare
from skillmerge.study.gates import GateFailed, GateInput, check
from skillmerge.verbs.elsewhere import into_a_bucket, sender
from skillmerge.verbs.records import Checks, Publish, is_published
from skillmerge.verbs.result import Result
from skillmerge.verbs.source import planned_to_apply, read_source, source_name
from skillmerge.verbs.target import finished_output, output_bucket, output_folder, refuse_existing
from skillmerge.verbs.tasks.cluster import check_cluster
from skillmerge.verbs.tasks.collect import Tasks
from skillmerge.verbs.tasks.on_ray import OnRay
from skillmerge.version import __version__

if TYPE_CHECKING:
    from skillmerge.outputs.sending import Sender


@machine_errors()
def apply(
    recipe: RecipeSource | Recipe,
    output: str | os.PathLike[str] | None = None,
    *,
    coefficients: Mapping[str, float] | None = None,
    device: str = "auto",
    threads: int | None = None,
    memory_limit: int | None = None,
    on: str | None = None,
    stats: str = "sampled",
    overwrite: bool = False,
    full: bool = False,
    keep_failed: bool = False,
    strict: bool = False,
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
    expected: Manifest | None = None,
    reporter: Reporter | None = None,
) -> Result:
    """Merge models, check the result, and write the output folder; with `push`, also publish on the Hub.

    recipe: path of a recipe or a saved plan, or a recipe as a dict. output: the output folder; replaces `output.path`.
    coefficients: numbers that replace the recipe's. device: auto, cpu, cuda or cuda:N. memory_limit: bytes.
    on: ray or ray://HOST:PORT, whose tasks make the shards; threads are the CPUs of each, and a CUDA device is a GPU.
    stats: full, sampled or off. full: reread every byte of an existing output before reusing it. keep_failed: keep an
    output that fails a gate, in the staging folder. strict: treat warnings as problems, and those of the finished
    weights as a gate. hub: stream or download. push: org/name; replaces `output.push.repo`, as private, revision,
    pull_request and message replace theirs. no_local: upload shards as they finish and remove them here. commits: the
    commits to use for revisions on the Hub. expected: a manifest that the output must equal, except its environment.
    Raises a subclass of SkillmergeError for each kind of failure; see `skillmerge.errors`.
    """
    reporter = reporter or default_reporter()
    reporter.event("started", skillmerge=__version__, recipe=source_name(recipe))
    check_words(device=device, threads=threads, memory_limit=memory_limit, stats=stats, hub=hub)
    check_cluster(on, no_local)
    if keep_failed and no_local:
        raise UsageError("`no_local` keeps no files, so `keep_failed` cannot apply", fix="leave one of them out")
    source, work = read_source(recipe, coefficients), Work(device, threads, memory_limit)
    access = Access(follow_links, locked, download=hub == "download", commits=commits or {}, allow_code=allow_code)
    return merge(
        source,
        output,
        access,
        work,
        Checks(stats, allow_nonfinite, hash_inputs, full, keep_failed, expected, strict),
        Publish(overwrite, push, no_local, private, revision, pull_request, message),
        reporter,
        OnRay(on, source, output, access, work, reporter) if on is not None else None,
    )


def merge(
    source: Recipe | SavedPlan,
    output: str | os.PathLike[str] | None,
    access: Access,
    work: Work,
    checks: Checks,
    publish: Publish,
    reporter: Reporter,
    tasks: Tasks | None = None,
) -> Result:
    """Do the work of `apply`; its arguments are sorted into records. tasks: who makes the shards, if not this run."""
    started = time.monotonic()
    bucket = output_bucket(source if isinstance(source, Recipe) else source.recipe, output)
    if bucket is not None:
        publish = into_a_bucket(source, publish, checks)
    with planned_to_apply(source, access, checks, reporter) as (plan, checkpoints):
        if tasks is not None and (bucket is not None or not is_published(sender(plan, publish, bucket), publish)):
            checks = tasks.settle(bucket or output_folder(plan.recipe, output, checkpoints), checks)
        left = IN_A_BUCKET if bucket is not None else NO_LOCAL if publish.no_local else None
        prepare(plan.recipe.gates, checks.stats, left, plan)
        target = work_folder(bucket) if bucket is not None else output_folder(plan.recipe, output, checkpoints)
        reporter.event(
            "planned", plan=plan.digest, output=str(bucket or target), tensors=len(plan.tensors),
            shards=len(plan.shards), bytes_read=plan.bytes_read, bytes_written=plan.bytes_written,
        )  # fmt: skip
        budget(plan, threads=work.threads, memory_limit=work.memory_limit)  # what cannot fit is refused here
        push = sender(plan, publish, bucket)
        with closing(Staging(target, reporter)) as staging, staging.working():
            room = push.room if push is not None else None
            job = Job(plan, checkpoints, staging, checks.stats, checks.allow_nonfinite, room)
            run = _Merge(job, staging, access, checks, publish, push, reporter, started, tasks)
            try:
                result = run.find_published() or run.find_finished() or run.make(work)
                return run.published(result)
            except KeyboardInterrupt as error:
                error.args = ("finished shards",) * bool(staging.finished)
                raise


@dataclass(frozen=True, slots=True)
class _Merge:
    """One merge: its plan, its staging folder, its checks, its destination."""

    job: Job
    staging: Staging
    access: Access
    checks: Checks
    publish: Publish
    push: Sender | None
    reporter: Reporter
    started: float
    tasks: Tasks | None = None

    @property
    def conditions(self) -> dict[str, Any]:
        """The conditions that must be the same to continue an earlier run."""
        job = self.job
        conditions = {"inputs": job.plan.versions, "stats": job.stats, "allow_nonfinite": job.allow_nonfinite}
        if self.push is not None and self.publish.no_local:
            conditions["only_on"] = self.push.destination
        return conditions

    @property
    def judged(self) -> str:
        """What decides whether an output passes: the plan, which has its gates, and `strict`."""
        return self.job.plan.digest + ("+strict" if self.checks.strict else "")

    def find_published(self) -> Result | None:
        """Return the result if the output goes to the Hub alone and is already there."""
        if self.push is None or not self.publish.no_local or self.publish.overwrite:
            return None
        found = self.push.find(self.conditions)
        if found is None:
            return None
        if self.push.place is not None and self.checks.full:
            with at_hand(str(self.push.place), whole=False, reporter=self.reporter) as made:
                verify_files(made.folder, allow_nonfinite=True, reporter=self.reporter, contents=made.open)
        self._warn(found[1], there=True)
        self.staging.discard()
        return self._result(found[1], already=True, published=found[0])

    def find_finished(self) -> Result | None:
        """Return the result if the output exists and is up to date."""
        plan, target = self.job.plan, self.staging.output
        recovered = self.staging.recover(plan.weights_digest, self.conditions, self.publish.overwrite, self.judged)
        if self.publish.no_local:
            return None
        proof = finished_output(target, plan.digest, self.conditions, self.checks.hash_inputs)
        # With --overwrite the existing output may be damaged.
        trusted = recovered or not (self.publish.overwrite or self.checks.full)
        if proof is None or not (trusted or is_intact(target, proof)):
            return None
        if not recovered and self._keeps_other_tokens(proof):
            if self.publish.overwrite:
                return None
            told = f"the tokens that {target} keeps are not those that its models' tokenizer files name now"
            self.reporter.note(f"{told}; to make it again, pass `--overwrite`")
        if self.staging.unfinished:
            self.reporter.note(f"{self.staging.folder} holds an unfinished run, which this output does not need")
        self._warn(proof, there=True)
        return self._result(proof, already=True, gates=RunLog.read(target).gates)

    def make(self, work: Work) -> Result:
        """Start or resume the merge, check the result, and move it into place."""
        if not self.publish.no_local:
            refuse_existing(self.staging.output, self.publish.overwrite)
        runner = self.tasks or runner_for(work, self.reporter)
        side_files = self._begin()
        if self.staging.sealed:  # complete except for its commit
            proof = manifest.read(self.staging.files)
            self._warn(proof, there=True)
        else:
            with nullcontext() if self.checks.allow_nonfinite else checked(self.reporter, "finite values"):
                self._make_shards(runner)
            body, remarks = self._describe(side_files)
            outcomes = self._judge(body, remarks)
            proof = self._prove(body, runner.device, outcomes)
        gates = RunLog.read(self.staging.files).gates
        if not self.publish.no_local:
            with checked(self.reporter, "files, index and headers"):
                check_structure(self.staging.files, proof)
            self.staging.put_in_place(self.publish.overwrite, self.judged)
        return self._result(proof, device=runner.device, gates=gates)

    def published(self, result: Result) -> Result:
        """Publish on the Hub if requested, and return the final result."""
        if self.push is not None and result.published is None and not (result.already and result.place):
            files = self.staging.files if self.publish.no_local else self.staging.output
            commit = self.push.publish(Output(files, result.manifest), verified=not result.already)
            result = replace(result, published=commit, manifest=self.push.proof or result.manifest)
            if self.publish.no_local:
                self.staging.discard()
        result = replace(result, seconds=time.monotonic() - self.started, warnings=tuple(self.reporter.warnings))
        on_hub = result.published.as_dict() if result.published is not None else None
        where = {"output": result.shown, "hub": on_hub, "already": result.already}
        self.reporter.event("published", **where, seconds=round(result.seconds, 3))
        return result

    def _warn(self, body: ManifestBody, there: bool = False, remarks: Sequence[Remark] | None = None) -> None:
        """Report warnings about the weights. there: of an existing output, whose gates are not run again. remarks: the
        warnings, where they are known."""
        for remark in warnings_of(body) if remarks is None else remarks:
            self.reporter.warn(remark.message, remark.fix)
        if there and self.checks.strict and not (outcome := strict_outcome(body)).passed:
            fix = f"{self.staging.output} was made without `--strict`; check it, then remove it or leave `--strict` out"
            raise GateFailed([outcome], fix=fix, plan=self.job.plan, body=body)

    def _result(self, proof: Manifest, **what: Any) -> Result:
        place = str(self.push.place) if self.push is not None and self.push.place is not None else ""
        return Result(self.staging.output, proof, 0.0, plan=self.job.plan, place=place, **what)

    def _begin(self) -> list[SideFile]:
        """Pick up what an earlier run left. Returns the output's side files."""
        plan, staging, push = self.job.plan, self.staging, self.push
        if self.tasks is not None:
            remark = self.tasks.begin(self.job, staging, self.conditions)
        else:
            remark = staging.begin(plan.weights_digest, self.conditions, plan.digest)
        if remark:
            self.reporter.note(remark)
        side_files: list[SideFile] = []
        if not staging.sealed:
            needed = plan.bytes_written - staging.finished_bytes
            if plan.makes_skill:
                needed //= 2  # Sparsity is unknown until the skill is encoded.
            if self.tasks is None:
                check_disk(staging.folder, push.disk_needed(needed) if push else needed, "the output")
            side_files += fetch(self.job.checkpoints[plan.donor], plan.side_files, self.access.allow_code)
            side_files += self._tokens()
            prove_ties(plan.ties, self.job.checkpoints)
        if push is not None:
            push.attach(staging)
        return side_files

    def _tokens(self) -> tuple[SideFile, ...]:
        """Return the file with a skill's tokens; none if the manifest that the output must equal has none."""
        plan, expected = self.job.plan, self.checks.expected
        if not plan.makes_skill or (expected is not None and SKILL_TOKENS not in expected.file_names):
            return ()
        return token_files(plan, self.job.checkpoints)

    def _keeps_other_tokens(self, proof: Manifest) -> bool:
        """Return whether a skill's tokens, which are not part of its plan, would be others now."""
        kept = [("sha256", file.sha256) for file in proof.files if file.name == SKILL_TOKENS]
        return kept != [file.digest for file in self._tokens()]

    def _make_shards(self, runner: Runner) -> None:
        plan, staging, push = self.job.plan, self.staging, self.push
        missing = [shard for shard in plan.shards if shard.file not in staging.finished]

        def record(done: ShardRecord) -> None:
            if done.file not in staging.finished:  # else an upload may have recorded more about it
                staging.record(done)

        try:
            with handed(runner.run(self.job, missing), record) as records:
                for done in records:
                    staging.record(done)
                    self.reporter.event(
                        "shard_finished", file=done.file, size=done.size, sha256=done.sha256,
                        finished=len(staging.finished), shards=len(plan.shards),
                    )  # fmt: skip
                    if push is not None:
                        push.send(done)
            if push is not None:
                push.settle(failed=False)
        except BaseException as error:
            if push is not None:
                push.settle(failed=True)
            if isinstance(error, UnusableWeights):
                staging.discard()
            raise

    def _describe(self, side_files: list[SideFile]) -> tuple[ManifestBody, list[Remark]]:
        """Write the side files. Returns the part of the manifest that does not depend on where and when it was made,
        and the warnings about its weights."""
        plan, checkpoints, staging = self.job.plan, self.job.checkpoints, self.staging
        digests = input_digests(checkpoints) if self.checks.hash_inputs else {}
        with checked(self.reporter, "models unchanged since planning"):
            for checkpoint in checkpoints.values():
                checkpoint.check_unchanged()
        if plan.makes_skill:
            from skillmerge.engine.skill_file import describe_skill

            side_files = [*side_files, SideFile.of(*describe_skill(plan, checkpoints, staging.finished))]
        for file in side_files:
            staging.write_file(file.name, file.content or b"")
        body = manifest.build(plan, staging.finished, side_files, self.checks.stats, digests)
        body = settled(body, plan.recipe.accept)
        remarks = warnings_of(body)
        body = replace(body, warnings=tuple(it.message for it in (*plan.warnings, *remarks)))
        if self.checks.expected is not None:
            comparison.compare(staging.output, self.checks.expected, body)
        return body, remarks

    def _judge(self, body: ManifestBody, remarks: Sequence[Remark]) -> list[Outcome]:
        """Run the recipe's gates and return their outcomes. Raises GateFailed, unless a failed output is to be kept."""

        def report(outcome: Outcome) -> None:
            self.reporter.event("gate", **outcome.as_dict())

        plan, staging = self.job.plan, self.staging
        opened = (plan, self.job.checkpoints)
        patched = plan.recipe.entries[plan.donor].is_made
        given = GateInput(staging.files, body, lambda: nullcontext(opened), self.access, self.reporter, patched=patched)
        self._warn(body, remarks=remarks)
        outcomes = check(plan.recipe.gates, given, report)
        if self.checks.strict:
            outcomes.append(strict_outcome(body))
            report(outcomes[-1])
        if all(outcome.passed for outcome in outcomes) or self.checks.keep_failed:
            return outcomes
        fix = "fix what could not be measured, then rerun to continue"
        if not any(outcome.unmeasured for outcome in outcomes):
            staging.discard()
            fix = "pass `--keep-failed` to keep the output for inspection"
            if self.push is not None and self.push.place is not None:
                fix = "fix the recipe or its gates, and choose another prefix, or remove the shards that were sent"
        raise GateFailed(outcomes, fix=fix, plan=plan, body=body)

    def _prove(self, body: ManifestBody, device: str, outcomes: Sequence[Outcome]) -> Manifest:
        """Write run log and manifest, remove files that the manifest does not name, and return the manifest.

        Raises GateFailed for an output that is kept although it failed a gate.
        """
        plan, staging = self.job.plan, self.staging
        finished, seconds = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), time.monotonic() - self.started
        run_log = RunLog(finished, round(seconds, 3), tuple(outcomes)).to_bytes()
        passed = all(outcome.passed for outcome in outcomes)
        output = staging.output if passed else staging.files
        folder = os.path.relpath(plan.recipe.folder.resolve(), output.parent.resolve() / output.name)
        if self.push is not None and self.push.place is not None:
            folder = "."  # nothing leads from a bucket to a folder
        where = {"device": device.split(": ")[0], "recipe_folder": folder, **self.conditions}
        proof, content = manifest.sealed(body, {**manifest.versions(), **where}, run_log)
        staging.write_file(manifest.RUN_LOG_FILE, run_log)
        staging.write_file(MANIFEST_FILE, content)
        staging.drop_strangers(proof.file_names)
        if not passed:
            fix = f"the output is kept in {staging.files}; rerun to continue from there"
            raise GateFailed(outcomes, fix=fix, plan=plan, body=body)
        if self.publish.no_local:
            staging.seal(plan.digest)
        return proof
