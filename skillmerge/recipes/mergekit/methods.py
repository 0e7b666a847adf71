"""The methods of mergekit, put together from ours: the expression of each, from its parameters.

What differs is noted. Written from the published descriptions and from runs of version 0.1.5.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from skillmerge.errors import did_you_mean
from skillmerge.recipes.mergekit.config import Config, Level, Region
from skillmerge.recipes.mergekit.notes import Notes, Refused
from skillmerge.recipes.mergekit.settings import cells, choices, is_close, value_in
from skillmerge.recipes.mergekit.translation import Translation, number_of, times, total, written

_TIES = "elements that tie at the threshold all stay; mergekit keeps some of them"
_NO_SCALE = "a model has to come out as one model"
_ONE = "list one model in each slice, or name a method that merges several"
_MERGEKIT = "remove it, or merge with mergekit"


def expression(given: Translation) -> str:
    """Return the expression of a document. Raises Refused."""
    method = given.config.method
    if method == "arcee_fusion":
        raise Refused(
            "arcee_fusion is not offered: on updates of RL's size its float32 scores are noise",
            "merge_method",
            fix="use `ram` or `ties`",
        )
    if method not in METHODS:
        near = did_you_mean(method, [*METHODS])
        raise Refused(f"`{method}` is not a method of mergekit 0.1.5", "merge_method", fix=near)
    if method != "passthrough":
        _check_slices(given)
    return METHODS[method](given)


def passed_through(config: Config, notes: Notes) -> Config:
    """Return a linear merge as passthrough if each slice has one model that counts, and slices have other models.

    People list a second one with a weight of 0, so that mergekit matches rows by token.
    """
    alike = len({frozenset(it.sources) for it in config.regions}) < 2
    if config.method != "linear" or alike or config.base not in (None, *config.models):
        return config
    regions = []
    for region in config.regions:
        try:
            weights = {model: _weights(region, model) for model in region.sources}
        except Refused:
            return config  # which is said again, with its model
        counting = [model for model, points in weights.items() if any(points)]
        scaled = any("normalize" in level.table for level in region.levels_of(None))
        if len(counting) != 1 or min(map(abs, weights[counting[0]])) < 1e-9 or scaled:
            return config
        [model] = counting
        level = region.sources[model]
        own = Level({key: value for key, value in level.table.items() if key != "weight"}, level.path)
        regions.append(replace(region, sources={model: own}, levels=(), taken={model: region.taken[model]}))
    notes.note("in each slice one model counts, which is passed through", "merge_method")
    models = dict.fromkeys(model for region in regions for model in region.sources)
    return replace(config, method="passthrough", models=tuple(models), regions=tuple(regions))


def _weights(region: Region, model: str) -> list[float]:
    found = choices(region.levels_of(model), "weight", None, lambda value, *path: number_of(value, "weight", *path))
    return [point for choice in found for point in choice.points]


def _check_slices(given: Translation) -> None:
    first = given.config.regions[0].sources
    for region in given.config.regions[1:]:
        if set(region.sources) != set(first):
            path = next(iter(region.sources.values())).path[:-2]
            raise Refused("this slice merges other models than the first", *path, fix="import one recipe for each")


def _passthrough(given: Translation) -> str:
    for region in given.config.regions:
        for model, level in region.sources.items():
            if len(region.sources) > 1:
                raise Refused("passthrough takes one model for each layer", *level.path[:-2], fix=_ONE)
            scales = given.setting("scale", model, 1)
            if any(not is_close(point, 1) for part in scales for choice in part for point in choice.points):
                raise Refused("`scale` has no counterpart: " + _NO_SCALE, *level.path, "scale", fix=_MERGEKIT)
    base = given.config.base
    if base is not None and base not in given.config.models:
        raise Refused("passthrough takes one model, and `base_model` is a second one", "base_model", fix="remove it")
    models = given.config.models
    if len({given.name(model) for model in models}) == 1:  # one model, or a stack of several
        return given.name(models[0])
    return total([f"{given.share(model)} * {given.name(model)}" for model in models])


def _linear(given: Translation) -> str:
    config = given.config
    if config.base is not None and not config.listed:
        raise Refused(
            f"there is no weight for `{given.base}`, which mergekit refuses too", "base_model",
            fix="list it under `models`, or remove `base_model`",
        )  # fmt: skip
    weights = [given.number("weight", model) for model in config.models]
    sums = given.sums("weight")
    if given.flag("normalize", True):
        if any(abs(found) < 1e-9 for _, found in sums):
            raise Refused("the weights add up to 0")
    elif (wrong := next((found for _, found in sums if not is_close(found, 1)), None)) is not None:
        fix = "remove `normalize: false`, or write weights that add up to 1"
        raise Refused(f"factors add up to {wrong:g}; mergekit scales the model by it", fix=fix)
    names = [given.name(model) for model in config.models]
    if len(names) == 1:
        return names[0]
    if len(set(weights)) == 1 and not given.coefficients:
        return f"({total(names)}) / {len(names)}"
    terms = total([times(weight, name) for weight, name in zip(weights, names, strict=True)])
    return (
        terms if all(is_close(found, 1) for _, found in sums) else f"({terms}) / {_sum_of(given, weights, sums[0][1])}"
    )


def _sum_of(given: Translation, weights: list[str], constant: float) -> str:
    if any(weight in given.coefficients for weight in weights):
        return f"({total(weights)})"
    return written(round(constant, 12))


def _tasks(sparse: str, elects: bool, normalize: bool, rescale: bool) -> Callable[[Translation], str]:
    """The family of task arithmetic: updates are made sparse, weighted, and added or elected."""

    def build(given: Translation) -> str:
        base = given.base
        how = "l1" if given.flag("rescale", rescale) else "none"
        divides = given.flag("normalize", normalize)
        lam = given.number("lambda", default=1)
        weights = [given.number("weight", model) for model in given.config.others]
        updates = [_sparse(given, model, sparse, how) for model in given.config.others]
        if not updates:
            return base
        if elects:
            return total([base, times(lam, _elected(given, updates, weights, divides))])
        terms = [times(weight, update) for weight, update in zip(weights, updates, strict=True)]
        divisor = _divisor(given, weights) if divides else "1"
        if lam == "1" and divisor == "1":
            return total([base, *terms])
        inner = total(terms)
        inner = inner if len(terms) == 1 else f"({inner})"
        return total([base, times(lam, inner) + (f" / {divisor}" if divisor != "1" else "")])

    return build


def _sparse(given: Translation, model: str, sparse: str, how: str) -> str:
    """Return an update, made sparse. A density of 1 keeps it as it is."""
    update = f"{given.name(model)} - {given.base}"
    density = given.number("density", model, 1, check=_share) if sparse else "1"
    keywords = [f"density={density}"]
    if sparse == "band":
        gamma = given.number("gamma", model, 0.01, check=_share)
        keywords += [f"gamma={gamma}"] if gamma != "0.01" else []
    if sparse == "della":
        spread = given.number("epsilon", model, 0.15, check=_size)
        if density != "1":
            _check_spread(given, model)
        keywords += [f"spread={spread}"]
    if density == "1":
        return f"({update})"
    drops = sparse in ("drop", "della")
    if drops:
        given.notes.warn("`drop` draws other lots than mergekit, by the same law")
    elif sparse:
        given.notes.warn(_TIES)
    keywords += [f"rescale={how}"] if drops or how != "none" else []
    name = {"della": "drop", "ties": "trim"}.get(sparse, sparse)
    return f"{name}({', '.join([update, *keywords])})"


def _check_spread(given: Translation, model: str) -> None:
    settings = [given.setting(key, model, default) for key, default in (("density", 1), ("epsilon", 0.15))]
    for cell in cells(given.config.regions, settings):
        density, spread = (value_in(setting, cell) for setting in settings)
        if not (density - spread > 0 and (density + spread < 1 or density >= 1)):
            what = f"density {density:g} with epsilon {spread:g} leaves the range from 0 to 1"
            path = next((choice.path for part in settings[0] for choice in part if choice.path), ("merge_method",))
            raise Refused(what + ", which mergekit refuses too", *path, fix="lower `epsilon`")


def _elected(given: Translation, updates: list[str], weights: list[str], normalize: bool) -> str:
    """Return an election. The trimmed updates of TIES are one call where their densities are the same."""
    trimmed = [update.removeprefix("trim(").removesuffix(")").split(", ", 1) for update in updates]
    together = all(update.startswith("trim(") for update in updates) and len({how for _, how in trimmed}) == 1
    operands = [update for update, _ in trimmed] if together else [_bare(update) for update in updates]
    keywords = [trimmed[0][1]] if together else []
    settings = [given.setting("weight", model) for model in given.config.others]
    if any(point < 0 for setting in settings for part in setting for choice in part for point in choice.points):
        given.notes.warn("a negative weight turns the signs of its update around in the election, as in mergekit")
    if len({*weights}) > 1:
        keywords += [f"weights=[{', '.join(weights)}]"]
    elif weights[0] != "1":
        keywords += [f"weights={weights[0]}"]
    keywords += [] if normalize else ["normalize=no"]
    return f"{'ties' if together else 'elect'}({', '.join([*operands, *keywords])})"


def _bare(update: str) -> str:
    return update[1:-1] if update.startswith("(") else update


def _divisor(given: Translation, weights: list[str]) -> str:
    """Return what the weights add up to; of nearly 0 mergekit makes 1."""
    sums = [found for _, found in given.sums("weight")]
    if any(weight in given.coefficients for weight in weights):
        if any(abs(found) < 1e-8 for found in sums):
            fix = "write `normalize: false`, or other weights"
            raise Refused("the weights add up to 0 in some layers, where mergekit takes 1", "parameters", fix=fix)
        return f"({total(weights)})"
    return written(round(sums[0], 12)) if abs(sums[0]) >= 1e-8 else "1"


def _updates(given: Translation, least: int = 1) -> list[str]:
    base = given.base
    found = [f"{given.name(model)} - {base}" for model in given.config.others]
    if len(found) < least:
        raise Refused(f"`{given.config.method}` takes {least} models or more besides the base", "merge_method")
    return found


def _call(name: str, operands: list[str], *keywords: str) -> str:
    return f"{name}({', '.join([*operands, *filter(None, keywords)])})"


def _unless(default: str, keyword: str, value: str) -> str:
    return f"{keyword}={value}" if value != default else ""


def _sce(given: Translation) -> str:
    select = given.number("select_topk", default=1, check=_share)
    given.notes.note("`floor=1e-6` is mergekit's: updates whose mean squares add up to less weigh all alike there")
    if select != "1":
        given.notes.warn(_TIES)
    return f"{given.base} + " + _call("sce", _updates(given, 2), _unless("1", "select", select), "floor=1e-6")


def _model_stock(given: Translation) -> str:
    scope = "scope=row" if given.flag("filter_wise", False) else ""
    given.notes.warn("mergekit also shortens updates whose norms multiply to less than 1e-6")
    return f"{given.base} + " + _call("model_stock", _updates(given, 2), scope, "negative=keep")


def _two(given: Translation) -> tuple[str, str]:
    base, others = given.base, given.config.others
    if len(others) != 1:
        what = f"`{given.config.method}` takes the base and one other model"
        raise Refused(what, "models", fix="name one of two models as `base_model`")
    return base, given.name(others[0])


def _slerp(given: Translation) -> str:
    return _call("slerp", [*_two(given)], f"t={given.number('t')}")


def _nearswap(given: Translation) -> str:
    a, b = _two(given)
    return f"{a} + clip({b} - {a}, at={given.number('t', check=_size)})"


def _nuslerp(given: Translation) -> str:
    others = given.config.others
    if len(others) != 2:
        raise Refused("`nuslerp` takes two models besides the base", "models")
    flat, columns = given.flag("nuslerp_flatten", True), given.flag("nuslerp_row_wise", False)
    if columns and not flat:
        fix = "leave it out to merge rows"
        raise Refused("`nuslerp_row_wise` goes by columns, which is not offered", "parameters", fix=fix)
    one, other = (given.number("weight", model) for model in others)
    sums = [found for _, found in given.sums("weight")]
    if any(abs(found) < 1e-6 for found in sums):
        if any(abs(found) >= 1e-6 for found in sums):
            raise Refused("the weights add up to 0 in some layers, where mergekit goes half the way")
        t = "0.5"
    elif given.coefficients:
        t = f"{other} / ({total([one, other])})"
    else:
        t = written(float(other) / sums[0])
    keywords = (f"t={t}", "linear_above=1", "" if flat else "scope=row")
    if given.config.base is None:
        return _call("slerp", [given.name(model) for model in others], *keywords)
    return f"{given.base} + " + _call("slerp", _updates(given), *keywords)


def _multislerp(given: Translation) -> str:
    others, based = given.config.others, given.config.base is not None
    weights = [given.number("weight", model) for model in others]
    given.setting("eps", default=0)
    sums = [found for _, found in given.sums("weight")]
    if not given.flag("normalize_weights", True) and not all(is_close(found, 1) for found in sums):
        what = "`normalize_weights: false` with weights that do not add up to 1 has no counterpart"
        raise Refused(what, "parameters", "normalize_weights", fix="remove it, or write weights that add up to 1")
    if any(abs(found) < 1e-9 for found in sums):
        raise Refused("the weights add up to 0")
    if len(others) == 1:
        return given.name(others[0])
    same = "" if len({*weights}) == 1 else f"weights=[{', '.join(weights)}]"
    operands = _updates(given) if based else [given.name(model) for model in others]
    return (f"{given.base} + " if based else "") + _call("multislerp", operands, same)


def _karcher(given: Translation) -> str:
    config = given.config
    points = config.models if config.base is None or config.listed else (*config.models, config.base)
    if config.base is not None:
        given.notes.note("mergekit takes the base as one more point, and so does this recipe")
    steps, tolerance = (
        given.number("max_iter", default=10, check=_steps),
        given.number("tol", default=1e-5, check=_size),
    )
    names = [given.name(model) for model in points]
    return _call("karcher", names, _unless("10", "steps", steps), _unless("1e-05", "tolerance", tolerance))


def _ram(plus: bool) -> Callable[[Translation], str]:
    def build(given: Translation) -> str:
        threshold = given.number("epsilon", default=1e-5, check=_size)
        keywords = [f"threshold={threshold}"]
        if plus:
            boost, cap = given.number("r", default=0.1, check=_size), given.number("alpha", default=0.2, check=_size)
            keywords += [f"boost={boost}", f"cap={cap}"]
        if not given.config.others:
            return given.base
        return f"{given.base} + " + _call("ram", _updates(given), *keywords)

    return build


def _share(value: float) -> float:
    if value < 0:
        raise ValueError("a share from 0 to 1")
    return min(value, 1.0)


def _steps(value: float) -> float:
    if value != int(value) or not 1 <= value <= 1000:
        raise ValueError("a whole number from 1 to 1000")
    return value


def _size(value: float) -> float:
    if value < 0:
        raise ValueError("a number of at least 0")
    return value


METHODS: dict[str, Callable[[Translation], str]] = {
    "linear": _linear,
    "task_arithmetic": _tasks("", elects=False, normalize=False, rescale=False),
    "ties": _tasks("ties", elects=True, normalize=True, rescale=False),
    "breadcrumbs": _tasks("band", elects=False, normalize=False, rescale=False),
    "breadcrumbs_ties": _tasks("band", elects=True, normalize=False, rescale=False),
    "dare_linear": _tasks("drop", elects=False, normalize=False, rescale=True),
    "dare_ties": _tasks("drop", elects=True, normalize=False, rescale=True),
    "della": _tasks("della", elects=True, normalize=True, rescale=True),
    "della_linear": _tasks("della", elects=False, normalize=False, rescale=True),
    "sce": _sce,
    "model_stock": _model_stock,
    "slerp": _slerp,
    "nuslerp": _nuslerp,
    "multislerp": _multislerp,
    "karcher": _karcher,
    "nearswap": _nearswap,
    "ram": _ram(plus=False),
    "ramplus_tl": _ram(plus=True),
    "passthrough": _passthrough,
}
"""mergekit's methods -> the expression of a document."""
