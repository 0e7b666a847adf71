"""Which formulas one adapter can hold: sums of adapters on one base, each with its factor. By text and places alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from skillmerge.checkpoints.kinds.lora.adapter import Adapter
from skillmerge.checkpoints.place import Local
from skillmerge.errors import RecipeError, some
from skillmerge.methods.terms import Term, calls, degree, model_of, weights
from skillmerge.recipes.formula.tree import names_in
from skillmerge.recipes.recipe import Recipe

ANY_RANK = (
    "for a model, leave `output.kind` out; for the nearest adapter of a rank, store the formula as a skill "
    "(`kind: skill`), then run `skillmerge export SKILL --lora-rank R`"
)


def base_of(recipe: Recipe) -> str | None:
    """Return the model that the formula's adapters are put onto, or that they are added to; None if it names none.

    Raises RecipeError for a formula with something else than adapters on one model.
    """
    named = list(dict.fromkeys(it.name for it in names_in(recipe.expression) if it.is_model))
    for name in named:
        kind = recipe.entries[_root(recipe, name)].kind
        if kind in ("skill", "patch"):
            raise _not_one(recipe, f"`{name}` is a {kind}, whose difference may be of any rank")
    if not any(recipe.entries[name].kind == "adapter" for name in named):
        raise _not_one(recipe, "the formula names no adapter")
    roots = {name: root for name in named if recipe.entries[root := _root(recipe, name)].kind in ("path", "stack")}
    beneath = {name: root for name, root in roots.items() if root != name}
    bases = {_place(recipe, root): root for root in (beneath or roots).values()}
    if len(bases) > 1 and beneath:
        (one, first), (other, second) = list({root: name for name, root in beneath.items()}.items())[:2]
        what = f"`{first}` is put onto `{one}`, and `{second}` onto `{other}`: an adapter has one base"
        raise _not_one(recipe, what)
    whole = [name for name, root in roots.items() if root == name and _place(recipe, root) not in bases]
    if whole or len(bases) > 1:
        name = (whole or list(roots))[-1]
        base = f"`{next(iter(bases.values()))}`, which the adapters are on," if beneath else "any other"
        raise _not_one(recipe, f"`{name}` is a whole model, whose difference from {base} may be of any rank")
    return next(iter(bases.values()), None)


def factors_of(recipe: Recipe, values: Mapping[str, float], term: Term | None, tensor: str) -> dict[str, float]:
    """Return the factor of each adapter in one tensor's term. Raises RecipeError for a term that is no sum of them, or
    neither a difference nor one model."""
    if call := next(iter(calls(term)), None):
        raise _not_one(
            recipe, f"`{call.method.name}` is no sum of models with factors, and its result may be of any rank"
        )
    found = degree(term)
    if found not in recipe.degrees:
        asked = ", ".join(f"{name} = {value:g}" for name, value in values.items())
        raise recipe.error(
            ("merge",),
            f"the expression gives {found:g} models' worth of weights for tensor `{tensor}`"
            + (f" (with {asked})" if asked else ""),
            "an adapter is a difference, or one model with adapters on it: base + lam * v",
        )
    total: dict[str, float] = {}
    for name, factor in weights(term).items():
        at: str | None = name if name == model_of(name) else None
        while at is not None and recipe.entries[at].kind == "adapter":
            total[at] = total.get(at, 0.0) + factor
            at = recipe.entries[at].onto
    return total


def check_bases(recipe: Recipe, adapters: Mapping[str, Adapter]) -> None:
    """Raise RecipeError if adapters say that they were trained on different models, unless the recipe puts each onto
    the same one."""
    free = any(recipe.entries[name].onto is None for name in adapters)
    said = {adapter.lora.base.rstrip("/"): name for name, adapter in adapters.items() if adapter.lora.base}
    if free and len(said) > 1:
        (one, first), (other, second), *_ = said.items()
        raise recipe.error(
            ("merge",),
            f"`{first}` says that it was trained on `{one}`, and `{second}` on `{other}`: an adapter has one base",
            "if these are the same weights, give each adapter `onto:` that model, and write base + lam * (v - base) "
            "for each; otherwise leave `output.kind` out, and add them to a model: target + lam * v",
        )


def refused(recipe: Recipe, name: str, parts: Iterable[str], what: str) -> RecipeError:
    """Return the error about parts of the adapter `name` that no concatenation can hold. parts: tensors."""
    fix = "for a model, leave `output.kind` out; or leave these tensors out with `ignore`"
    return recipe.error(
        recipe.place_path(name), f"adapter `{name}` {what}: {some([f'`{it}`' for it in parts], 2)}", fix
    )


def _not_one(recipe: Recipe, why: str) -> RecipeError:
    return recipe.error(("merge",), f"the output cannot be an adapter: {why}", ANY_RANK)


def _root(recipe: Recipe, name: str) -> str:
    """Return the model beneath the adapters that are put onto each other; itself for any other kind, and for an
    adapter that is put onto nothing."""
    while recipe.entries[name].kind == "adapter" and (onto := recipe.entries[name].onto) is not None:
        name = onto
    return name


def _place(recipe: Recipe, name: str) -> str:
    """Return where a model is; of a stack its name, as it is nowhere."""
    if recipe.entries[name].stack:
        return name
    place = recipe.model_place(name)
    return str(place.path.resolve()) if isinstance(place, Local) else f"{place}@{place.revision}"
