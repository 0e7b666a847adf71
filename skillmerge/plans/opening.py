"""A recipe's models -> open checkpoints: folders, and repositories at a commit that is known from then on; and the
plan that is made over them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from skillmerge.checkpoints.checkpoint import INDEX_FILE, Checkpoint, named
from skillmerge.checkpoints.kinds.lora.adapter import Adapter
from skillmerge.checkpoints.kinds.table import open_as
from skillmerge.checkpoints.missing import missing
from skillmerge.checkpoints.place import Local, ModelPlace
from skillmerge.checkpoints.schemes import open_store
from skillmerge.checkpoints.store import Store
from skillmerge.checkpoints.stores.headed import Headed
from skillmerge.checkpoints.views.fitting import Model
from skillmerge.checkpoints.views.renamed import idle_rule, prefixes_of, read_as, wrappers_of
from skillmerge.errors import InputError, StalePlan, UsageError, did_you_mean, some
from skillmerge.methods.terms import model_of
from skillmerge.plans.adapters.formula import base_of
from skillmerge.plans.aligned import aligned
from skillmerge.plans.dtypes.quantised import refuse_unequal
from skillmerge.plans.models.adapting import as_differences, put_onto
from skillmerge.plans.plan import Plan
from skillmerge.plans.planner import plan_recipe
from skillmerge.plans.stacks.build import with_stacks
from skillmerge.plans.vocabulary.by_token import by_token
from skillmerge.recipes import lock as lockfile
from skillmerge.recipes.lock import LOCK_VERSION, LockedModel
from skillmerge.recipes.parse import load
from skillmerge.recipes.recipe import Recipe
from skillmerge.recipes.source import RecipeSource


def to_bytes(plan: Plan, checkpoints: Mapping[str, Checkpoint]) -> bytes:
    """Return a lock for the plan's models on the Hub."""
    models = {}
    for item in plan.inputs:
        checkpoint = checkpoints[item.name].own
        if not checkpoint.at.remote or item.revision is None:
            continue
        names = checkpoint.store.list().keys()
        used = {*checkpoint.files, *({INDEX_FILE, "config.json"} & names)}
        if item.name == plan.donor:
            used |= {file.name for file in plan.side_files} & names
        files = []
        for name in sorted(used):
            known = checkpoint.stated(name)
            if known is not None:
                files.append({"name": name, "size": known[0], known[1][0]: known[1][1]})
        models[item.name] = {"uri": item.uri, "commit": item.revision, "files": files}
    return (json.dumps({"lock_version": LOCK_VERSION, "models": models}, indent=1) + "\n").encode()


@dataclass(frozen=True, slots=True)
class Access:
    """Settings for opening models.

    follow_links: links may lead out of a folder. locked: a revision that can change must be in the lock file.
    relock: the lock file is not looked at. download: repositories go through the Hub's cache instead of being
    streamed. commits: what revisions of models stand for, whatever the lock says (of a saved plan). headers: of files
    at these commits, by model and file, as far as they are known. allow_code: a model may name code of its own,
    which is carried. moved: what to do where a folder is not there, in place of a guess.
    """

    follow_links: bool = False
    locked: bool = False
    relock: bool = False
    download: bool = False
    commits: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, Mapping[str, bytes]] = field(default_factory=dict)
    allow_code: bool = False
    moved: str | None = None


def open_models(
    recipe: Recipe, access: Access, warn: Callable[[str], None], shape: Model | None = None
) -> dict[str, Checkpoint]:
    """Return the models that the recipe uses, open, in its order. shape: what the differences of adapters look like, if
    not the donor.

    Raises RecipeError, UsageError, InputError, StalePlan, TemporaryError.
    """
    if recipe.makes_adapter:
        base_of(recipe)  # what its text alone shows needs no files
    places = {name: recipe.model_place(name) for name in recipe.stored_models()}
    refuse_missing(recipe, places, access)
    lock_path = lockfile.path_of(Path(recipe.document.name))
    lock = None
    if not access.relock and not access.commits and any(place.versioned for place in places.values()):
        lock = lockfile.read(lock_path)
    wanted = {name: _locked(recipe, name, place, lock, lock_path, access) for name, place in places.items()}
    checkpoints = open_all(recipe, wanted, access)
    try:
        for name, place in places.items():
            if not place.versioned:
                continue
            if lock is not None and name in lock:
                lock[name].compare(lock_path, name, checkpoints[name])
            elif not place.pinned and not access.relock and name not in access.commits:
                pinned = place.at(checkpoints[name].at.revision or "")
                if recipe.of_command:
                    warn(f"`{place}` can change; pinned, it is `{pinned}`")
                else:
                    key = next(iter(recipe.place_path(name)[2:]), None)
                    written = f"{{{key}: {pinned}, …}}" if key is not None else pinned
                    warn(f"model `{name}`: {place} can change; to pin it, write\n  {name}: {written}")
        with _placed(recipe, checkpoints):
            found = as_differences(recipe, aligned(recipe, as_read(recipe, checkpoints)), shape)
            return by_token(recipe, found)
    except BaseException:
        close_all(checkpoints)
        raise


@contextmanager
def planned(
    recipe: RecipeSource | Recipe,
    coefficients: Mapping[str, float] | None,
    access: Access,
    note: Callable[[str], None],
    *,
    lenient: bool = False,
) -> Iterator[tuple[Plan, dict[str, Checkpoint]]]:
    """Yield the plan of a recipe and its checkpoints, open while the context lasts. lenient: see `plan_recipe`."""
    parsed = recipe if isinstance(recipe, Recipe) else load(recipe, coefficients)
    checkpoints = open_models(parsed, access, note)
    try:
        with _placed(parsed, checkpoints):
            plan = plan_recipe(parsed, checkpoints, allow_code=access.allow_code, lenient=lenient)
            refuse_unequal(parsed, {name: (it.action, it.sources) for name, it in plan.tensors.items()}, checkpoints)
        yield plan, checkpoints
    finally:
        close_all(checkpoints)


def as_read(recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> dict[str, Checkpoint]:
    """Return the models under the names that they are read by, with adapters on those that they are put onto, and
    stacks."""
    found = {name: under_its_names(recipe, name, checkpoint) for name, checkpoint in checkpoints.items()}
    return with_stacks(recipe, put_onto(recipe, found))


def under_its_names(recipe: Recipe, name: str, checkpoint: Checkpoint) -> Checkpoint:
    """Return the model under the names that it is read by. Raises RecipeError for a rule of `rename` that renames
    nothing."""
    model = model_of(name)
    rename = recipe.entries[model].renames
    names: Sequence[str] = list(checkpoint.tensors)
    wrappers: tuple[str, ...] = ()
    if isinstance(checkpoint, Adapter):
        names = checkpoint.changed if rename else ()
    else:
        found = recipe.unwrapped
        wrappers = wrappers_of(names) if found is None else found.get(model, ())
    idle = idle_rule(names, rename, wrappers)
    if idle is not None:
        old, prefixes = rename[idle][0], prefixes_of(names, wrappers)
        earlier = any(prefix.startswith(old) for prefix in prefixes) or old in prefixes
        raise recipe.error(
            ("models", model, "rename", idle, "from"),
            f"no tensor of model `{model}` is left that begins with `{old}`: an earlier rule renames them"
            if earlier
            else f"no tensor of model `{model}` begins with `{old}`",
            "put this rule first; the first rule that matches wins"
            if earlier
            else did_you_mean(old, prefixes)
            or f"its names begin with {some([f'`{prefix}`' for prefix in prefixes], 4)}",
        )
    # The names of an adapter's tensors stay: `rename` is about what they change.
    return checkpoint if isinstance(checkpoint, Adapter) else read_as(name, checkpoint, rename, wrappers)


def close_all(checkpoints: Mapping[str, Checkpoint]) -> None:
    for checkpoint in checkpoints.values():
        checkpoint.close()


def refuse_missing(recipe: Recipe, places: Mapping[str, ModelPlace], access: Access) -> None:
    """Raise InputError if a model's folder is not there: at the place in the recipe that a person wrote."""
    for name, place in places.items():
        found = missing(place.path, recipe.models[name]) if isinstance(place, Local) else None
        if found is not None:
            raise _of_model(recipe, name, InputError(found[0], fix=access.moved or found[1]))


def _of_model(recipe: Recipe, name: str, error: InputError) -> InputError:
    """Return an error about a model with the model's name, at its place in the recipe, where a person wrote one."""
    if not recipe.document.by_hand:
        return error
    whose = f"model `{name}`"
    message = error.message if error.message.startswith(whose) else f"{whose}: {error.message}"
    found = recipe.error(recipe.place_path(name), message, error.fix)
    return type(error)(found.message, fix=found.fix)


@contextmanager
def _placed(recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> Iterator[None]:
    """Put errors that begin with a model's name or place at its place in the recipe."""
    try:
        yield
    except InputError as error:
        named = [name for name in checkpoints if error.message.startswith(f"model `{model_of(name)}`")]
        placed = {
            name: len(checkpoint.place)
            for name, checkpoint in checkpoints.items()
            if re.match(rf"{re.escape(checkpoint.place)}([/: ]|$)", error.message)
        }
        if not named and not placed:
            raise
        name = named[0] if named else max(placed, key=placed.__getitem__)  # a place may be inside another
        raise _of_model(recipe, model_of(name), error) from error


def _locked(
    recipe: Recipe,
    name: str,
    place: ModelPlace,
    lock: Mapping[str, LockedModel] | None,
    lock_path: Path,
    access: Access,
) -> ModelPlace:
    """Return the place with the commit of the lock, where there is one."""
    if not place.versioned:
        return place
    if name in access.commits:
        return place.at(access.commits[name])
    if lock is not None:
        found = lock.get(name)
        if found is None or found.uri != recipe.models[name]:
            what = f"holds {found.uri}" if found else "does not hold it"
            raise StalePlan(
                f"{lock_path} is stale: model `{name}` is {recipe.models[name]}, the lock {what}",
                fix=f"recreate it: `{recipe.command('plan')} --lock`",
            )
        if place.pinned and place.revision != found.commit:
            raise StalePlan(
                f"{lock_path} is stale: model `{name}` is pinned to {place.revision}, the lock to {found.commit}"
            )
        return place.at(found.commit)
    if access.locked and not place.pinned:
        raise UsageError(
            f"--locked: model `{name}` ({place}) has a revision that can change, but there is no {lock_path}",
            fix=f"create it: `{recipe.command('plan')} --lock`",
        )
    return place


def open_all(recipe: Recipe, places: Mapping[str, ModelPlace], access: Access) -> dict[str, Checkpoint]:
    """Open all models at once: most of the time is spent waiting for answers."""
    opening: list[Store] = []
    found: dict[str, Checkpoint] = {}

    def one(name: str) -> dict[str, Checkpoint] | Exception:
        entry = recipe.entries[name]
        word = "model" if entry.kind == "path" else entry.kind
        onto = entry.onto if word == "patch" else None
        try:
            if onto is not None and onto not in found:
                return {}  # its model says what is wrong
            # For a small model in small pieces, most of the time would go into requests.
            download = access.download or word != "model"
            store = open_store(places[name], follow_links=access.follow_links, download=download)
            if name in access.headers and store.at.remote:
                store = Headed(store, access.headers[name])
            opening.append(store)
            try:
                base = found[onto] if onto is not None else None
                return named(name, open_as(word, entry.place, store, base, name=entry.adapter))
            except BaseException:
                store.close()
                raise
        except InputError as error:
            return _of_model(recipe, name, error)
        except Exception as error:
            return error

    pool = ThreadPoolExecutor(max(1, len(places)))
    opened: dict[str, dict[str, Checkpoint] | Exception] = {}
    try:
        for patches in (False, True):
            names = [name for name in places if (recipe.entries[name].kind == "patch") == patches]
            opened |= zip(names, pool.map(one, names), strict=True)
            for item in opened.values():
                found |= item if isinstance(item, dict) else {}
    except BaseException as error:  # an interrupt, or no thread is available
        for store in opening:
            store.cancel()
        pool.shutdown(wait=not isinstance(error, KeyboardInterrupt), cancel_futures=True)
        raise
    pool.shutdown()
    for item in opened.values():
        if isinstance(item, Exception):
            close_all(found)
            raise item
    return {name: found[name] for model in places for name in found if model_of(name) == model}
