"""A merge in memory: a transformers model that gets the weights of one recipe after another.

The inputs are read once and kept. The workers of `apply` compute the weights, so they are the bytes that `apply`
would write.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from skillmerge.bits import torch_dtype
from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.checkpoints.stores.memory import Held
from skillmerge.checkpoints.tokenizers.small_files import SmallFiles
from skillmerge.checkpoints.views.adapted import AdapterPlane
from skillmerge.durable import scratch_folder
from skillmerge.engine.measures.preparing import Preparations
from skillmerge.engine.rounding_statistics import BlockStatistics, Statistics, summarise, total_of
from skillmerge.engine.runner import Work
from skillmerge.engine.stream import Stream
from skillmerge.engine.tiles import Buffer, Span, Tile, spans
from skillmerge.engine.worker import Settings, Worker
from skillmerge.errors import ResourceError, UsageError
from skillmerge.plans.budget import budget, free_memory
from skillmerge.plans.compare.roles import Roles, roles_of, token_matrices
from skillmerge.plans.opening import Access, close_all, open_models
from skillmerge.plans.plan import Plan
from skillmerge.plans.planner import plan_recipe
from skillmerge.plans.vocabulary.by_token import by_token, without_rows
from skillmerge.recipes.recipe import Recipe
from skillmerge.reporter import Reporter
from skillmerge.study.scoring.built_in import tokenizer_of
from skillmerge.study.scoring.scorers import Scorer
from skillmerge.study.scoring.scores import Scores
from skillmerge.tensors import DTYPES, PAGE, format_bytes
from skillmerge.verbs.apply import merge
from skillmerge.verbs.records import Checks, Publish


class MergedModel:
    """A transformers model and its tokenizer, in memory. `use` gives it the weights of a recipe.

    Raises when it is created: UsageError if transformers cannot load the model, ResourceError
    if the inputs do not fit into memory, and what `apply` raises.
    """

    def __init__(self, recipe: Recipe, access: Access, device: str, reporter: Reporter) -> None:
        self._access, self._reporter = access, reporter
        self._compared: list[Roles] = []
        self._files = SmallFiles()
        self._device = _device(device)
        self._opened = without_rows(open_models(recipe, access, reporter.note))
        self._checkpoints: Mapping[str, Checkpoint] = self._opened
        try:
            self.plan = self.planned(recipe)
            _check_memory(self._opened)
            self.model, self.tokenizer = self._loaded(recipe)
            self._in_place = self._has_the_files_tensors()
            if self._in_place:
                self._checkpoints = {
                    name: checkpoint if _is_nothing(checkpoint) else Held(checkpoint)
                    for name, checkpoint in self._opened.items()
                }
                self._in_place = self._has_the_files_values()
            if not self._in_place:
                self._checkpoints = self._opened
                reporter.note(
                    "the parameters of this architecture differ from its files' tensors, so each candidate is "
                    "loaded from files"
                )
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        close_all(self._opened)

    def planned(self, recipe: Recipe) -> Plan:
        """Return a candidate's plan. Its models are compared unless an earlier candidate used them in the same way.

        Raises InputError if they have problems.
        """
        plan = plan_recipe(recipe, self._read_by(recipe), compare=False)
        roles = _roles(plan, self._opened[plan.donor])
        if roles not in self._compared:
            compared = plan_recipe(recipe, by_token(recipe, self._opened, self._files))
            compared.refuse_problems()
            for remark in compared.warnings:
                self._reporter.warn(remark.message, remark.fix)
            self._compared.append(roles)
        plan.refuse_problems()
        return plan

    def use(self, recipe: Recipe) -> Statistics:
        """Give the model the recipe's weights. Returns the statistics of `apply --stats sampled`."""
        plan = self.planned(recipe)
        if not self._in_place:
            self.model, self.tokenizer = self._loaded(recipe)
            return self._last
        into = self._parameters()

        def put(tile: Tile, values: Tensor) -> None:
            into[tile.tensor.name].view(-1)[tile.first : tile.last].copy_(values)

        return compute(plan, self._read_by(recipe), put)

    def _read_by(self, recipe: Recipe) -> Mapping[str, Checkpoint]:
        """Return the models as a candidate reads them: which rows it merges depends on the models that have a part."""
        return by_token(recipe, self._checkpoints, self._files)

    def scored(self, scorer: Scorer, seed: int) -> Scores:
        torch.manual_seed(seed)
        return scorer.score(self.model, self.tokenizer, seed)

    def _parameters(self) -> dict[str, Tensor]:
        return {name: value.data for name, value in self.model.state_dict(keep_vars=True).items()}

    def _loaded(self, recipe: Recipe) -> tuple[Any, Any]:
        """Merge into a folder, and load the model from it."""
        import transformers

        log: Any = transformers.utils.logging
        log.disable_progress_bar()
        with scratch_folder() as scratch:
            into = scratch / "model"
            made = merge(recipe, into, self._access, Work("cpu"), Checks(), Publish(), Reporter())
            assert isinstance(made.manifest.statistics, Statistics)  # a sweep makes models only
            self._last = made.manifest.statistics
            kind = getattr(transformers, self._class_name(), transformers.AutoModelForCausalLM)
            try:
                with torch.device("cpu"):  # Ignore the caller's default device: transformers refuses `meta`.
                    model = kind.from_pretrained(made.output, dtype="auto")
                model = model.eval().requires_grad_(False).to(self._device)
                tokenizer = tokenizer_of(made.output)
            except Exception as error:
                raise UsageError(
                    f"transformers cannot load the merged model: {type(error).__name__}: {error}",
                    fix="score with a command instead",
                ) from error
        return model, tokenizer

    def _class_name(self) -> str:
        names = self._opened[self.plan.donor].config.get("architectures")
        return str(names[0]) if isinstance(names, list) and names else ""

    def _has_the_files_tensors(self) -> bool:
        """Return whether each tensor of the output is a separate parameter with its name, shape and dtype."""
        state = self._parameters()
        wanted = self.plan.tensors
        fit = all(
            name in state and tuple(state[name].shape) == plan.shape and state[name].dtype == torch_dtype(plan.dtype)
            for name, plan in wanted.items()
        )
        return fit and len({state[name].data_ptr() for name in wanted}) == len(wanted)

    def _has_the_files_values(self) -> bool:
        """Return whether the loaded model holds what the workers compute, so that loading changed nothing."""
        state, same = self._parameters(), []

        def compare(tile: Tile, values: Tensor) -> None:
            held = state[tile.tensor.name].view(-1)[tile.first : tile.last].cpu()
            same.append(torch.equal(held.view(torch.uint8), values.view(torch.uint8)))

        compute(self.plan, self._read_by(self.plan.recipe), compare)
        return all(same)


class _Own:
    """One thread's worker, and the buffer that it fills."""

    def __init__(self, worker: Worker, size: int) -> None:
        self.worker, self.buffer = worker, Buffer(size, torch.device("cpu"))

    def close(self) -> None:
        self.worker.close()
        self.buffer.close()


def compute(plan: Plan, checkpoints: Mapping[str, Checkpoint], put: Callable[[Tile, Tensor], None]) -> Statistics:
    """Compute every tensor of the plan, and deliver it tile by tile, from any thread.

    Returns statistics by module and in all. Raises UnusableWeights.
    """
    chosen = budget(plan, threads=None, memory_limit=None)
    settings = Settings(torch.device("cpu"), chosen)
    widest = max(DTYPES[tensor.dtype].itemsize for tensor in plan.tensors.values())
    measured: dict[str, dict[int, BlockStatistics]] = {
        name: {} for name, tensor in plan.tensors.items() if tensor.action == "merge"
    }
    size = chosen.tile * widest + PAGE
    shared = Preparations(plan, checkpoints, chosen.tile)
    with Stream(checkpoints.values()) as stream:
        worker = partial(Worker, plan, checkpoints, settings, stream.stop, shared)
        shared.read_model(stream, worker, chosen.threads)

        def fill(span: Span) -> None:
            own = stream.own(lambda: _Own(worker(), size))
            own.worker.fill(span, own.buffer, measured)
            for tile in span.tiles:
                put(tile, own.buffer.typed(torch_dtype(tile.tensor.dtype), span.place(tile), tile.last - tile.first))

        work = (span for shard in plan.shards for span in spans(plan, shard, chosen.tile))
        for _ in stream.map(fill, work, threads=chosen.threads, ahead=4 * chosen.threads):
            pass
    rows = {name: total_of(plan.tensors[name], blocks) for name, blocks in measured.items() if blocks}
    return summarise(plan, rows, "sampled")


def _roles(plan: Plan, donor: Checkpoint) -> Roles:
    """Return what the formula does with each model at these numbers, which decides what is compared."""
    rows = {name: row for tensor in plan.tensors.values() for name, _, row in tensor.rows if row}
    terms = {row: plan.recipe.term(dict(zip(plan.coefficients, row, strict=True))) for row in {*rows.values()}}
    matrices = token_matrices(donor.tensors.values(), donor.config)
    return roles_of({name: terms[row] for name, row in rows.items()}, matrices=matrices)


def _device(asked: str) -> torch.device:
    from skillmerge.engine.device import choose_device

    return choose_device(asked)[0]


def _is_nothing(checkpoint: Checkpoint) -> bool:
    """Return whether all elements are zero, as those that are taken from an adapter: they need no memory."""
    return isinstance(checkpoint, AdapterPlane) and not checkpoint.changes


def _check_memory(checkpoints: Mapping[str, Checkpoint]) -> None:
    read = (item for item in checkpoints.values() if not _is_nothing(item))
    held = sum(spec.nbytes for item in read for spec in item.tensors.values())
    model = max(sum(spec.nbytes for spec in item.tensors.values()) for item in checkpoints.values())
    free = free_memory()
    if free is not None and held + model > free:
        raise ResourceError(
            f"scoring in memory needs {format_bytes(held + model)}; {format_bytes(free)} are free",
            fix="score with a command, which merges each candidate to a folder",
        )
