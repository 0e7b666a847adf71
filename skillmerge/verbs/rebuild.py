"""The verb rebuild: recreate an output from its manifest, or check that it would be identical.

The check writes nothing: the engine's bytes are compared with the files in place.
"""

from __future__ import annotations

import json
import math
import operator
import os
import random
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from skillmerge.brief import brief, drawn
from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.checkpoints.place import Bucket
from skillmerge.checkpoints.tokenizers.vocabulary import SKILL_TOKENS
from skillmerge.engine.destination import ShardRecord
from skillmerge.engine.runner import Job, Work, check_words, handed
from skillmerge.engine.runners.table import runner_for
from skillmerge.errors import CheckFailed, StalePlan, UsageError, some
from skillmerge.outputs import comparison, manifest
from skillmerge.outputs.buckets.at_hand import at_hand
from skillmerge.outputs.manifest import Manifest
from skillmerge.outputs.output import MOVED, Output, check_folder
from skillmerge.outputs.verify import check_structure, input_digests
from skillmerge.plans import changes as changes_module
from skillmerge.plans import saved
from skillmerge.plans.compare.skill_tokens import token_files
from skillmerge.plans.opening import Access, planned
from skillmerge.plans.plan import Plan, ShardPlan
from skillmerge.plans.side_files import SideFile, fetch
from skillmerge.reporter import Reporter, default_reporter
from skillmerge.tensors import DTYPES, StoredTensor
from skillmerge.threads import hash_file
from skillmerge.verbs.apply import merge
from skillmerge.verbs.records import Checks, Publish


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """What was recreated: `tensors` of `of` tensors, and their bytes. output: the folder, or None for a check.

    place: the bucket that the original is in, if the folder is a copy.
    """

    folder: Path
    tensors: int
    of: int
    bytes: int
    output: Path | Bucket | None = None
    place: str = ""

    __repr__ = brief
    _repr_html_ = drawn

    def as_dict(self) -> dict[str, Any]:
        output = str(self.output) if self.output is not None else None
        return {
            "folder": self.place or str(self.folder),
            "tensors": self.tensors,
            "of": self.of,
            "bytes": self.bytes,
            "output": output,
        }


@dataclass(frozen=True, slots=True)
class How:
    """How to run; nothing in it changes a byte. base: the folder that the recipe's relative paths now start from."""

    base: Path | None = None
    work: Work = field(default_factory=Work)
    follow_links: bool = False
    hub: str = "stream"
    reporter: Reporter = field(default_factory=Reporter)


def rebuild(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    check: bool = False,
    sample: float = 1.0,
    seed: int = 0,
    base_folder: str | os.PathLike[str] | None = None,
    device: str = "auto",
    threads: int | None = None,
    memory_limit: int | None = None,
    follow_links: bool = False,
    hub: str = "stream",
    reporter: Reporter | None = None,
) -> Rebuilt:
    """Recreate the output in `folder` as `output`, or `check` that it would be identical.

    sample: the share of tensors that `check` recomputes, chosen by `seed`. base_folder: the folder that the recipe's
    relative paths start from, if it was moved. The other arguments are those of `apply`. Raises CheckFailed for a
    difference, StalePlan if models have changed, and what `apply` raises.
    """
    if check == (output is not None):
        raise UsageError(
            "a rebuild takes either `check` or `output`",
            fix="pass `--check` to compare and write nothing, or `--output NEW` to recreate it",
        )
    check_words(sample=sample, seed=seed, device=device, threads=threads, memory_limit=memory_limit, hub=hub)
    base = Path(base_folder) if base_folder is not None else None
    how = How(base, Work(device, threads, memory_limit), follow_links, hub, reporter or default_reporter("rebuilding"))
    with at_hand(folder, whole=output is None, reporter=how.reporter) as found:
        root = found.folder if found.place else folder
        if output is not None:
            made = rebuild_into(root, output, how)
        else:
            made = check_rebuild(root, sample=sample, seed=operator.index(seed), how=how)
        return replace(made, place=found.place)


def rebuild_into(folder: str | os.PathLike[str], output: str | os.PathLike[str], how: How | None = None) -> Rebuilt:
    """Recreate the output whose manifest is in `folder` as `output`, and compare the manifests.

    Raises CheckFailed for an invalid manifest or a rebuild that differs, StalePlan if its models have changed, and what
    `apply` raises.
    """
    how = how or How()
    root = check_folder(folder)
    if Path(output).resolve() == root.resolve():
        raise UsageError(f"{root} cannot be rebuilt in place", fix="choose another folder with `--output`")
    made = Output.open(root)
    proof, environment = made.manifest, made.manifest.environment
    recipe, commits = made.recipe(how.base)
    with _planned_again(made, how):
        pass  # Check the models before hours of work.
    recipe = replace(recipe, gates=(), output=replace(recipe.output, push=None))
    access = Access(how.follow_links, download=how.hub == "download", commits=commits, allow_code=_runs_code(made))
    hashed = proof.inputs_hashed
    checks = Checks(environment.stats, environment.allow_nonfinite, hashed, full=True, expected=proof)
    with _blamed_on_inputs(proof):
        result = merge(recipe, output, access, how.work, checks, Publish(), how.reporter)
        comparison.compare(root, proof, result.manifest)  # for an output that already existed
    count = len(proof.tensors)
    return Rebuilt(root, count, count, proof.size, result.output)


def check_rebuild(
    folder: str | os.PathLike[str], *, sample: float = 1.0, seed: int = 0, how: How | None = None
) -> Rebuilt:
    """Check that the manifest in `folder` and its models give exactly the output's bytes.

    sample: the share of tensors to recompute, chosen by `seed`. Side files are always compared, and with a share of 1
    the manifest too. Raises as `rebuild` does; CheckFailed names the first difference.
    """
    how = how or How()
    made = Output.open(folder)
    root, proof, environment = made.folder, made.manifest, made.manifest.environment
    check_structure(root, proof)
    with _planned_again(made, how) as (plan, checkpoints):
        names = [spec.name for shard in plan.shards for spec in shard.specs]
        # The offsets of a skill's parts depend on all parts before them.
        count = len(names) if plan.makes_skill else math.ceil(sample * len(names))
        chosen = set(random.Random(seed).sample(sorted(names), count))
        shards = plan.shards if len(chosen) == len(names) else _shards_of(plan, chosen)
        side_files = list(fetch(checkpoints[plan.donor], plan.side_files, _runs_code(made)))
        original = _Original(root)
        job = Job(plan, checkpoints, original, environment.stats, environment.allow_nonfinite)
        run = runner_for(how.work, how.reporter).run(job, shards)
        with _blamed_on_inputs(proof), handed(run, original.record) as records:
            for done in records:
                original.record(done)
        if plan.makes_skill:
            from skillmerge.engine.skill_file import describe_skill

            side_files.append(SideFile.of(*describe_skill(plan, checkpoints, original.finished)))
            side_files += token_files(plan, checkpoints) if SKILL_TOKENS in proof.file_names else ()
        for file in side_files:
            _compare_file(root / file.name, file.content or b"")
        if shards is plan.shards:
            digests = _recorded_digests(proof)
            body = manifest.build(plan, original.finished, side_files, environment.stats, digests)
            comparison.compare(root, proof, body)
        weights = sum(spec.nbytes for shard in shards for spec in shard.specs)
        size = proof.size if plan.makes_skill else weights
        return Rebuilt(root, len(chosen), len(names), size)


@contextmanager
def _planned_again(made: Output, how: How) -> Iterator[tuple[Plan, Mapping[str, Checkpoint]]]:
    """Yield the plan that the manifest was made from, over the models as they are now. Raises StalePlan if these or
    skillmerge have changed."""
    root, proof = made.folder, made.manifest
    recipe, commits = made.recipe(how.base)
    access = Access(
        how.follow_links, download=how.hub == "download", commits=commits, allow_code=_runs_code(made), moved=MOVED
    )
    with planned(recipe, None, access, how.reporter.note, lenient=True) as (plan, checkpoints):
        for remark in plan.warnings:
            how.reporter.warn(remark.message, remark.fix)
        plan.refuse_problems()
        if plan.digest != proof.plan_digest:
            now = json.loads(json.dumps(saved.describe(plan)))
            then = {**proof.as_dict(), "recipe_sha256": proof.recipe.sha256, "side_files": _side_files(proof, now)}
            version = proof.tool.version
            changes = changes_module.differences(then, now) or [
                f"skillmerge {version}, which wrote it, planned differently"
            ]
            raise StalePlan(
                f"{root} cannot be rebuilt from the current files: {'; '.join(changes[:8])}",
                fix=f"if the models have moved, {MOVED}",
            )
        if proof.inputs_hashed:
            now = input_digests(checkpoints)
            recorded = _recorded_digests(proof)
            if other := ["/".join(key) for key, digest in recorded.items() if now[key] != digest]:
                raise StalePlan(f"{root} cannot be rebuilt: these files have different weights now: {some(other)}")
        _refuse_other_tokens(made, plan, checkpoints)
        yield plan, checkpoints


def _refuse_other_tokens(made: Output, plan: Plan, checkpoints: Mapping[str, Checkpoint]) -> None:
    """Raise StalePlan if a skill's rows belong to other tokens now: the plan, which is older, does not have these."""
    recorded = [("sha256", file.sha256) for file in made.manifest.files if file.name == SKILL_TOKENS]
    if recorded and plan.makes_skill and recorded != [file.digest for file in token_files(plan, checkpoints)]:
        raise StalePlan(
            f"{made.folder} cannot be rebuilt: the tokenizer files of its models name other tokens than {SKILL_TOKENS}",
            fix="restore the models' tokenizer files, or extract the skill again with `--overwrite`",
        )


def _side_files(proof: Manifest, now: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the manifest's side files as a plan has them: the plan's own rows if they agree."""
    shards = {tensor.file for tensor in proof.tensors}
    rows = {row["name"]: row for row in now["side_files"]}
    found = []
    for file in proof.files:
        if file.name not in shards:
            row = rows.get(file.name, {})
            same = row.get("size") == file.size and row.get("sha256", file.sha256) == file.sha256
            found.append(row if same else file.as_dict())
    return found


@contextmanager
def _blamed_on_inputs(proof: Manifest) -> Iterator[None]:
    """Add to a difference that a model's weights may have changed, if they were not hashed."""
    try:
        yield
    except CheckFailed as error:
        if proof.inputs_hashed:
            raise
        fix = "or a model's weights have changed since: they were not hashed (`skillmerge apply RECIPE --hash-inputs`)"
        raise CheckFailed(error.message, fix=fix) from error


def _recorded_digests(proof: Manifest) -> dict[tuple[str, str], str]:
    """Return the recorded digests of the inputs' files that were hashed."""
    return {(item.name, file.name): file.sha256 for item in proof.inputs for file in item.files if file.sha256}


def _runs_code(made: Output) -> bool:
    """Return whether it was made with --allow-code."""
    names = [file.name for file in made.manifest.files]
    config = made.folder / "config.json"
    return any(name.endswith(".py") for name in names) or (config.is_file() and b'"auto_map"' in config.read_bytes())


def _shards_of(plan: Plan, chosen: set[str]) -> tuple[ShardPlan, ...]:
    """Return each chosen tensor as a shard of its own, at its place in its file."""
    return tuple(
        ShardPlan(f"{shard.file}: {spec.name}", shard.header, (spec,))
        for shard in plan.shards
        for spec in shard.specs
        if spec.name in chosen
    )


class _Original:
    """The finished output as a destination of the engine: every byte must equal the existing one."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.finished: dict[str, ShardRecord] = {}

    def open_shard(self, shard: ShardPlan) -> _ComparedFile:
        return _ComparedFile(self.root / shard.specs[0].file if shard.specs else self.root / shard.file, shard)

    def open_stream(self, shard: ShardPlan, start: int) -> _ComparedStream:
        return _ComparedStream(self.root / shard.file, start)

    def record(self, done: ShardRecord) -> None:
        """Record nothing: a comparison needs no journal."""
        self.finished[done.file] = done


class _ComparedFile:
    """A file of the output that accepts only the bytes it already has."""

    def __init__(self, path: Path, shard: ShardPlan) -> None:
        self._path, self._specs = path, shard.specs
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.write(memoryview(shard.header), 0)
        except BaseException:
            self.close()
            raise

    def write(self, data: memoryview, offset: int) -> None:
        """Raise CheckFailed, naming the first element, if the file has different bytes at `offset`."""
        place = 0
        while place < len(data):
            there = os.pread(self._descriptor, len(data) - place, offset + place)
            wanted = bytes(data[place : place + len(there)])
            if there != wanted or not there:
                pairs = zip(there, wanted, strict=True)
                first = next((index for index, (old, new) in enumerate(pairs) if old != new), len(there))
                raise CheckFailed(self._difference(offset + place + first))
            place += len(there)

    def _difference(self, position: int) -> str:
        spec: StoredTensor | None = next((spec for spec in self._specs if spec.start <= position < spec.end), None)
        if spec is None:
            return f"{self._path}: byte {position} differs when rebuilt from the manifest"
        element = (position - spec.start) // DTYPES[spec.dtype].itemsize
        return f"{self._path}: tensor `{spec.name}` differs from element {element} on when rebuilt"

    def finish(self) -> None:
        self.close()

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class _ComparedStream:
    """A compared file whose size is known only at its end."""

    def __init__(self, path: Path, start: int) -> None:
        self._path, self._position = path, start
        self._stream = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by finish and close

    def append(self, data: memoryview) -> None:
        self.put(data, self._position)
        self._position += len(data)

    def put(self, data: bytes | memoryview, offset: int) -> None:
        """Raise CheckFailed if the file has different bytes at `offset`."""
        left = memoryview(data).cast("B")  # views of other formats equal no bytes
        while left:
            there = os.pread(self._stream.fileno(), len(left), offset)
            if not there or there != bytes(left[: len(there)]):
                raise CheckFailed(f"{self._path} differs when rebuilt")
            left, offset = left[len(there) :], offset + len(there)

    def finish(self, stop: threading.Event) -> tuple[int, str]:
        size = os.fstat(self._stream.fileno()).st_size
        self.close()
        if size != self._position:
            raise CheckFailed(f"{self._path} differs when rebuilt")
        return size, hash_file(self._path, stop)

    def close(self) -> None:
        self._stream.close()


def _compare_file(path: Path, wanted: bytes) -> None:
    if path.read_bytes() != wanted:
        raise CheckFailed(f"{path} differs when rebuilt")
