"""Reports of every kind, of small models: each command, many layers, two stacks, experts, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from conftest import random_tensors, tensor_shapes, write_checkpoint, write_family, write_recipe

import skillmerge
from skillmerge.cli.show.report.page import build
from skillmerge.outputs.output import Outcome
from skillmerge.plans.plan import Plan
from skillmerge.study.scoring.scores import Score
from skillmerge.verbs.sweep.journal import Trial
from skillmerge.verbs.sweep.sweep import Sweep

Shapes = dict[str, tuple[int, ...]]
PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm")


def deep(layers: int = 80) -> Shapes:
    """A model with many layers."""
    shapes: Shapes = {"model.embed_tokens.weight": (32, 8)}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{part}.weight": (8,) if "norm" in part else (8, 8) for part in PARTS}
    return {**shapes, "model.norm.weight": (8,), "lm_head.weight": (32, 8)}


def stacks() -> Shapes:
    """A model that sees: two stacks of layers."""
    seen: Shapes = {f"visual.blocks.{layer}.{part}.weight": (8, 8) for layer in range(4) for part in PARTS[:5]}
    return {**seen, **tensor_shapes(layers=6)}


def experts() -> Shapes:
    shapes = tensor_shapes(layers=4)
    for layer in range(4):
        shapes[f"model.layers.{layer}.mlp.gate.weight"] = (4, 16)
        shapes |= {f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight": (8, 16) for expert in range(4)}
    return shapes


def family(folder: Path, shapes: Shapes | None = None) -> Path:
    """Three models, a base, and a recipe with rules; the recipe's path."""
    folder.mkdir(parents=True)
    write_family(folder, shapes)
    write_checkpoint(folder / "base", random_tensors(shapes or tensor_shapes(), seed=7))
    rules = [{"layers": "0-1", "value": 0.05}, {"modules": "norm", "value": 0.0}]
    return write_recipe(folder, coefficients={"lam": {"default": 1.0, "rules": rules}})


def made_sweep(plan: Plan, axes: tuple[str, ...] = ("lam",)) -> Sweep:
    """A sweep as it could have come out, of two scores with their noise."""
    trials = []
    for step in range(9):
        values = dict.fromkeys(axes, step / 4)
        score = 0.9 - (step / 4 - 1.2) ** 2 / 2
        scores = {"accuracy": Score(score, 0.03), "kept": Score(1 - step / 20, 0.01)}
        trials.append(Trial(values, scores, step / 4 * 0.98, 1.5))
    trials.append(Trial(dict.fromkeys(axes, 3.0), {}, None, 1.0, "the score is `nan`, not a number"))
    where = Path("/home/ada/sweeps/out")
    return Sweep(
        where, plan.recipe, where / "best.yaml", "qa:questions.jsonl", axes, "accuracy", False, tuple(trials), 0
    )


def sample_pages(folder: Path, layers: int = 80) -> Mapping[str, str]:
    """Every kind of page by a name for its file. layers: of the deep model."""
    recipe = family(folder / "small")
    plan, done = skillmerge.plan(recipe), skillmerge.apply(recipe)
    skill = skillmerge.extract(folder / "small" / "rl", folder / "small" / "sft", folder / "skill")
    lost = [
        Outcome("probe `python check.py`", "at most 1", 1.7, False, "of `answers`"),
        Outcome("lost", "below 50%", 0.2, True, ""),
    ]
    pages = {
        "plan": build(plan=plan),
        "apply": build(plan=done.plan, manifest=done.manifest),
        "refused": build(plan=done.plan, manifest=done.manifest, gates=lost),
        "skill": build(plan=skill.plan, manifest=skill.manifest),
        "sweep": build(sweep=made_sweep(plan)),
    }
    for name, shapes in {"small": None, "layers": deep(layers), "stacks": stacks(), "experts": experts()}.items():
        path = recipe if shapes is None else family(folder / name, shapes)
        found = skillmerge.inspect(path, base=str(path.parent / "base"), spectral=2 if shapes is None else None)
        pages[f"inspect-{name}"] = build(plan=found.plan, inspection=found)
    many = skillmerge.apply(folder / "layers" / "recipe.yaml")
    pages["apply-layers"] = build(plan=many.plan, manifest=many.manifest)
    return pages
