"""The tensors of an output that is an adapter: the matrices of the formula's adapters side by side.

    M.lora_A.weight [r,in]    A1 above A2 …, with r the sum of the ranks; of E experts in each expert's part
    M.lora_B.weight [out,r]   f1 s1 B1 beside f2 s2 B2 …
    M.lora_embedding_A, _B    the same
    M.lora_B.bias             f1 s1 bias1 + f2 s2 bias2 + …

f is the formula's factor of an adapter, s its own scale; the output's scale is 1. An adapter whose factor for a module
is 0 is left out of that module.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.checkpoints.kinds.lora.adapter import Adapter
from skillmerge.checkpoints.kinds.lora.config import MOST_RANK
from skillmerge.checkpoints.kinds.lora.joined import Block, Joined
from skillmerge.checkpoints.kinds.lora.parts import PREFIX
from skillmerge.checkpoints.views.adapted import check_fit
from skillmerge.checkpoints.views.fitting import Change, Model, Product, changes_of, own_tensors
from skillmerge.checkpoints.views.relations import layouts
from skillmerge.checkpoints.views.renamed import replaced
from skillmerge.checkpoints.views.unpacking import products_of
from skillmerge.errors import RecipeError, some
from skillmerge.methods.terms import degree
from skillmerge.plans.adapters.formula import ANY_RANK, base_of, check_bases, factors_of, refused
from skillmerge.plans.models.coefficients import kept_coefficients
from skillmerge.plans.models.experts import by_tensor
from skillmerge.recipes.formula.tree import ExpressionError
from skillmerge.recipes.recipe import Recipe
from skillmerge.tensors import TensorSpec


@dataclass(frozen=True, slots=True)
class Module:
    """What the output has for one tensor of the model. named: the module in the names of tensors. parameter: of the
    module, if it is not its `weight`. product: that of its first adapter."""

    tensor: str
    name: str
    named: str
    parameter: str
    rank: int
    product: Product

    @property
    def target(self) -> str:
        """What PEFT's configuration calls it."""
        return f"{self.name}.{self.parameter}" if self.parameter else self.name


@dataclass(slots=True)
class Output:
    """An adapter to be written. tensors: its shapes. parts: which adapters have a share in a tensor, and where.
    of: the model's tensor that each changes. values: that one's coefficients."""

    base: str | None
    adapters: Mapping[str, Adapter]
    biases: bool = False
    modules: list[Module] = field(default_factory=list)
    tensors: dict[str, tuple[int, ...]] = field(default_factory=dict)
    parts: dict[str, dict[str, Block]] = field(default_factory=dict)
    of: dict[str, str] = field(default_factory=dict)
    values: dict[str, tuple[float, ...]] = field(default_factory=dict)

    def add(self, name: str, of: str, shape: tuple[int, ...], parts: Mapping[str, Block]) -> None:
        name = f"{PREFIX}{name}"
        self.tensors[name], self.of[name], self.parts[name] = shape, of, dict(parts)


Shares = Mapping[str, tuple[Change, float]]
"""Adapter -> what it does to a tensor, and its factor."""


def joined(recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> dict[str, Checkpoint]:
    """Return the checkpoints with each adapter as its share of the output.

    Raises RecipeError for a formula that no adapter can hold, InputError for adapters that do not fit each other.
    """
    adapters = {name: it for name, it in checkpoints.items() if isinstance(it, Adapter)}
    output = output_of(recipe, checkpoints)
    found = dict(checkpoints)
    for name, adapter in adapters.items():
        blocks = {tensor: parts[name] for tensor, parts in output.parts.items() if name in parts}
        found[name] = Joined(adapter, output.tensors, blocks)
    return found


def output_of(recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> Output:
    """Return what the output consists of. checkpoints: as they were opened, or as `joined` has them."""
    adapters = {
        name: it.adapter if isinstance(it, Joined) else it
        for name, it in checkpoints.items()
        if isinstance(it, Adapter | Joined)
    }
    output = Output(base_of(recipe), adapters)
    check_bases(recipe, adapters)
    model = _model(recipe, adapters, checkpoints[output.base] if output.base is not None else None)
    own: dict[str, TensorSpec] = {}
    changes = {name: _changes(it, model, recipe.entries[name].renames, own) for name, it in adapters.items()}
    output.values = _values(recipe, model, own, {name for each in changes.values() for name in each})
    shares = _shares(recipe, changes, output.values)
    for tensor, share in shares.items():
        _check_parts(recipe, tensor, share)
    names = _Names(recipe, changes, shares)
    for tensor, share in shares.items():
        if next(iter(share.values()))[0].product is not None:
            _add_product(recipe, names, output, tensor, share)
    _add_biases(recipe, names, output, shares)
    if not output.tensors:
        raise recipe.error(("merge",), "the expression leaves nothing of any adapter: all of its factors are 0")
    return output


def _model(recipe: Recipe, adapters: Mapping[str, Adapter], base: Checkpoint | None) -> Model:
    """Return what the adapters are fitted to: their base, or what they describe themselves."""
    if base is not None:
        return Model(base.place, base.tensors, base.config)
    tensors: dict[str, TensorSpec] = {}
    for name, adapter in adapters.items():
        tensors |= own_tensors(adapter, recipe.entries[name].renames)
    described = frozenset(tensors)
    for name, adapter in adapters.items():
        for tensor, shape in _replaced(adapter):
            named = replaced(tensor, recipe.entries[name].renames)
            if named not in described:
                most = max(shape, tensors[named].shape) if named in tensors else shape
                tensors[named] = TensorSpec(named, "F32", most, adapter.file)
    return Model("another adapter", tensors, {})


def _replaced(adapter: Adapter) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the tensors that an adapter replaces, of which it describes at least as much as this: its highest row
    may be below another's. The output does without them, or is refused."""
    for name, stored in adapter.parts.replaced.items():
        yield name, stored.shape
    for rows in adapter.parts.rows:
        yield f"{rows.module}.weight", (max((row for row, _ in rows.rows), default=0) + 1, *rows.values.shape[1:])


def _changes(
    adapter: Adapter, model: Model, rename: Sequence[tuple[str, str]], own: dict[str, TensorSpec]
) -> dict[str, Change]:
    """Return what an adapter changes: by the model's names, or by its own where the model stores experts or projections
    in another layout. own: gets the latter's tensors."""
    found, left = changes_of(adapter, model, rename)
    if left:
        check_fit(adapter, model, rename)
        for name, (spec, product) in products_of(adapter, left, model, rename).items():
            if product is not None:
                found[name], own[name] = Change(product), spec
    return found


def _values(
    recipe: Recipe, model: Model, own: Mapping[str, TensorSpec], changed: Collection[str]
) -> dict[str, tuple[float, ...]]:
    """Return the coefficients of the model's tensors, and of those that adapters have in another layout: what the
    model's have there. Raises RecipeError where these differ, or those of the experts in a tensor that is changed."""
    given, kept = kept_coefficients(recipe, model.tensors, model.config)
    values, experts = by_tensor(given, kept, ())
    if unlike := [name for name in experts if name in changed]:
        raise _unequal(recipe, unlike[0], "its experts")
    stored, asked = layouts(own, model.tensors)
    holders = {part: tensor for tensor, parts in asked.holds.items() for part in parts}
    for name in own:
        rows: dict[tuple[float, ...] | None, str] = {}
        for part in stored.holds.get(name, ()):
            if part in holders:
                rows.setdefault(values.get(holders[part]), holders[part])
        if len(rows) > 1:
            raise _unequal(recipe, name, "its parts: " + some([f"`{it}`" for it in rows.values()], 2))
        row = next(iter(rows), None)
        if row is not None:
            values[name] = row
    return values


def _unequal(recipe: Recipe, name: str, parts: str) -> RecipeError:
    return recipe.error(
        ("merge",),
        f"the adapters have `{name}` as one, and coefficients differ between {parts}",
        "give all of them the same, or leave `output.kind` out, which makes a model",
    )


def _shares(
    recipe: Recipe, changes: Mapping[str, Mapping[str, Change]], rows: Mapping[str, tuple[float, ...]]
) -> dict[str, dict[str, tuple[Change, float]]]:
    """Return which adapters change each of the model's tensors in the output, and how. Raises RecipeError for a formula
    that is a difference of some tensors, and a model of others."""
    known: dict[tuple[float, ...], dict[str, float]] = {}
    degrees: dict[float, str] = {}
    shares: dict[str, dict[str, tuple[Change, float]]] = {}
    tied = {name: _tied(each) for name, each in changes.items()}
    for tensor, row in rows.items():
        if row not in known:
            values = dict(zip(recipe.coefficients, row, strict=True))
            try:
                term = recipe.term(values)
                known[row] = factors_of(recipe, values, term, tensor)
            except ExpressionError as error:
                raise recipe.expression_error(error) from error
            degrees.setdefault(degree(term), tensor)
        here = [name for name in changes if tensor in changes[name] and tensor not in tied[name]]
        found = {name: (changes[name][tensor], factor) for name in here if (factor := known[row].get(name, 0.0))}
        if found:
            shares[tensor] = found
    for name, heads in tied.items():
        for head, embedding in heads.items():
            if {head, embedding} <= rows.keys() and len(
                {known[rows[it]].get(name, 0.0) for it in (head, embedding)}
            ) > 1:
                raise recipe.error(
                    ("merge",),
                    f"coefficients differ between `{embedding}` and `{head}`, which the model ties to it",
                    "give both the same, or leave `output.kind` out, which makes a model",
                )
    if len(degrees) > 1:
        raise recipe.error(
            ("merge",),
            f"the expression gives a difference for tensor `{degrees[0]}`, and a model for `{degrees[1]}`",
            "write a model with the factor 1 in all of them: base + lam * v",
        )
    return shares


def _tied(changes: Mapping[str, Change]) -> dict[str, str]:
    """Return heads that follow an embedding that they are tied to, in the output as in the adapter; and that one."""
    first: dict[int, str] = {}
    return {name: it for name, change in changes.items() if (it := first.setdefault(id(change), name)) != name}


def _check_parts(recipe: Recipe, tensor: str, share: Shares) -> None:
    """Raise RecipeError for parts that are no sums, or do not stand in one tensor."""
    for name, (change, _) in share.items():
        if change.product is not None and change.product.pair.magnitude is not None:
            raise refused(recipe, name, [tensor], "scales the base's rows (DoRA), which cannot be put side by side")
        if change.same:
            raise refused(recipe, name, [tensor], "holds a head beside the embedding that it is tied to")
        if change.whole is not None or change.rows is not None:
            raise refused(recipe, name, [tensor], "replaces tensors, which cannot be put side by side")
    forms = {(product.experts, product.pair.embedding, product.transposed) for product in _products(share).values()}
    if len(forms) > 1:
        names = " and ".join(f"`{name}`" for name in share)
        raise refused(recipe, next(iter(share)), [tensor], f"({names}) holds it in another form than the others do")


def _products(share: Shares) -> dict[str, Product]:
    return {name: change.product for name, (change, _) in share.items() if change.product is not None}


class _Names:
    """How the output spells modules: as the adapters do, or as the model does where adapters are renamed differently.

    Two parameters of one module are told apart by how often `base_layer` is in their names. Which has more of them
    follows from the model's code, so that it has to be seen in an adapter with the same parameters.
    """

    def __init__(
        self, recipe: Recipe, changes: Mapping[str, Mapping[str, Change]], shares: Mapping[str, Shares]
    ) -> None:
        self._renames = {name: recipe.entries[name].renames for name in changes}
        self._alike = len(set(self._renames.values())) == 1
        self._wanted: dict[str, dict[str, str]] = {}
        for tensor, share in shares.items():
            for name, product in _products(share).items():
                self._note(self._wanted, tensor, name, product)
        self._seen: list[dict[str, dict[str, str]]] = []
        for name, found in changes.items():
            self._seen.append({})
            for tensor, change in found.items():
                if change.product is not None:
                    self._note(self._seen[-1], tensor, name, change.product)

    def module(self, name: str, product: Product) -> str:
        return self._spelled(name, product.pair.module)

    def parameter(self, tensor: str, name: str, product: Product) -> str:
        """Return the parameter of a module that a tensor is, "" for its weight."""
        whole = replaced(f"{product.pair.module}.weight", self._renames[name])
        return "" if tensor == whole else tensor.rpartition(".")[2]

    def of_tensors(self, tensor: str, name: str, product: Product) -> str | None:
        """Return the module as the names of tensors have it; None if that cannot be known."""
        if not self.parameter(tensor, name, product):
            return self._spelled(name, product.pair.named)
        module = self.module(name, product)
        wanted = self._wanted[module].keys()
        if len(wanted) == 1:
            return module
        return next((it[module][tensor] for it in self._seen if it.get(module, {}).keys() == wanted), None)

    def _spelled(self, name: str, written: str) -> str:
        return written if self._alike else replaced(written, self._renames[name])

    def _note(self, found: dict[str, dict[str, str]], tensor: str, name: str, product: Product) -> None:
        if self.parameter(tensor, name, product):
            named = self._spelled(name, product.pair.named)
            found.setdefault(self.module(name, product), {})[tensor] = named


def _add_product(recipe: Recipe, names: _Names, output: Output, tensor: str, share: Shares) -> None:
    """Add A and B of a module. Raises RecipeError where peft's names for them are not known."""
    products = _products(share)
    first, product = next(iter(products.items()))
    named = names.of_tensors(tensor, first, product)
    if named is None:
        what = (
            "changes other parameters of the same module than the others do, and how PEFT would call both is not known"
        )
        raise refused(recipe, first, [tensor], what)
    experts, rank = product.experts, sum(it.rank for it in products.values())
    if rank > MOST_RANK:
        raise recipe.error(
            ("merge",), f"the ranks of `{tensor}` add up to {rank:,}; the most is {MOST_RANK:,}", ANY_RANK
        )
    outputs, inputs = product.pair.b.shape[0], product.pair.a.shape[1]
    above: dict[str, Block] = {}
    beside: dict[str, Block] = {}
    at = 0
    for name, it in products.items():
        above[name] = Block(it.pair.a, experts, at * inputs)
        beside[name] = Block(it.pair.b, outputs, at * experts, share[name][1] * it.scale)
        at += it.rank
    a, b = ("embedding_A", "embedding_B") if product.pair.embedding else ("A.weight", "B.weight")
    if f"{PREFIX}{named}.lora_{a}" in output.tensors:
        raise refused(recipe, first, [tensor], "changes a module both as a matrix and by a parameter of it")
    output.add(f"{named}.lora_{a}", tensor, (experts * rank, inputs), above)
    output.add(f"{named}.lora_{b}", tensor, (outputs, rank * experts), beside)
    parameter = names.parameter(tensor, first, product)
    output.modules.append(Module(tensor, names.module(first, product), named, parameter, rank, product))


def _add_biases(recipe: Recipe, names: _Names, output: Output, shares: Mapping[str, Shares]) -> None:
    """Add what is added to biases. Raises RecipeError unless every module has some: peft has them in all or none."""
    biases = {tensor: share for tensor, share in shares.items() if next(iter(share.values()))[0].product is None}
    modules = {module.tensor.removesuffix(".weight"): module for module in output.modules}
    without = modules.keys() - {tensor.removesuffix(".bias") for tensor in biases}
    for tensor, share in biases.items():
        module = modules.get(tensor.removesuffix(".bias"))
        if without or module is None:
            what = "adds to biases (`lora_bias`), and the output would not in all of its modules: PEFT has all or none"
            raise refused(recipe, next(iter(share)), [tensor], what)
        parts = {
            name: Block(change.bias, 1, 0, factor * change.scale)
            for name, (change, factor) in share.items()
            if change.bias is not None
        }
        size = next(iter(parts.values())).stored.elements
        output.add(f"{module.named}.lora_B.bias", tensor, (size,), parts)
    output.biases = bool(biases)
