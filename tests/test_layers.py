"""The house: rooms from top to bottom, floors inside each, what may import what, and how large things may grow."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import skillmerge

PACKAGE = Path(__file__).parent.parent / "skillmerge"

# A module imports only from rooms below its own, and in its own room only from floors below its own.
ROOMS: dict[str, tuple[str, ...]] = {
    "cli": (
        "main",
        "commands.clusters commands.merging commands.proving commands.starting commands.studying",
        "results",
        "show.inspection show.report.notebook show.report.page",
        "show.merging show.report.headlines show.report.sweeps",
        "show.report.charts show.report.heat_maps show.report.remarks show.report.tables show.report.tensor_table",
        "show.markdown show.proving show.sentences show.starting show.studying",
        "event_log flags show.listings show.report.html show.table",
        "completion console doctor help show.figures show.sarif usage",
        "messages",
    ),
    "verbs": (
        "demo.demo",
        "sweep.sweep tasks.finish verify",
        "export.export extract rebuild sweep.in_folder sweep.in_memory sweep.setting",
        "apply export.lora export.patch plan sweep.search",
        "tasks.on_ray",
        "tasks.shard",
        "tasks.buckets",
        "demo.miniature elsewhere result source sweep.journal target tasks.collect",
        "records sweep.candidates tasks.cluster tasks.index",
    ),
    "study": (
        "gates",
        "gate_obstacles",
        "inspect loads.load_probe loads.loading scoring.scorers",
        "loads.tokenizer_probe loads.vllm_probe scoring.built_in spectrum update_pass",
        "forecast groups loads.child loads.generation scoring.scores subjects update_metrics",
        "adapters places",
    ),
    "outputs": (
        "hub.push proof.attest",
        "buckets.sending hub.rehearsal proof.sign",
        "sending",
        "measured proof.bom verify",
        "comparison hub.card hub.commit output trials",
        "buckets.at_hand buckets.prefix manifest",
        "staging",
        "attempts",
        "tasks.headers tasks.news",
        "canonical hub.published journal shard_file",
    ),
    "engine": (
        "runners.table",
        "runners.threads",
        "shards skill_shards",
        "runner skill_file",
        "destination worker",
        "measures.cells measures.preparing measures.skill_statistics",
        "device rounding_statistics stream tiles values warm_up",
        "measures.input_rounding measures.update_size",
    ),
    "plans": (
        "tasks.part",
        "tasks.opening",
        "opening",
        "aligned models.adapting planner",
        "models.actions adapters.planning",
        "adapters.peft_config",
        "adapters.joining",
        "adapters.formula advice.heads budget compare.skill_tokens layout saved",
        "plan",
        "compare.models",
        "stacks.compare vocabulary.by_token",
        "vocabulary.readers",
        "accounting dtypes.kept dtypes.quantised stacks.build",
        "advice.causes advice.oddities advice.shares compare.complete compare.config compare.rows compare.tokens "
        "stacks.forms",
        "stacks.config",
        "advice.arrangement advice.names compare.config_values",
        "compare.table stacks.order vocabulary.picture",
        "changes depth mapping models.coefficients side_files tasks.division",
        "models.experts",
        "compare.architectures compare.found compare.roles stacks.keys",
    ),
    "recipes": (
        "starter",
        "lint mergekit.importing",
        "parse",
        "recipe",
        "gate_table mergekit.methods mergekit.writing",
        "mergekit.translation schema",
        "mergekit.output mergekit.settings mergekit.stacks mergekit.vocabulary",
        "entries formula.bind formula.donor formula.parser lint_rules lock mergekit.config source",
        "foreign.documents foreign.near_misses formula.catalog mergekit.notes schedules tables.recipe",
        "formula.arguments yamltext foreign.spellings tables.gates tables.models tables.schedules",
        "formula.tree tables.values",
    ),
    "checkpoints": (
        "kinds.lora.joined views.adapted",
        "kinds.table views.low_rank views.unpacking",
        "views.fitting",
        "kinds.lora.adapter kinds.lora.tied kinds.skill schemes",
        "kinds.dense kinds.lora.parts kinds.patch kinds.skill_planes",
        "stores.headed stores.hub stores.memory stores.objects",
        "tokenizers.tokenizer views.arranged views.by_token views.renamed views.spooled views.stacked",
        "kinds.lora.config tokenizers.vocabulary views.bands views.widened",
        "tokenizers.small_files",
        "checkpoint stores.edited stores.folder stores.overlaid",
        "kinds.lora.patterns store stores.http_ranges tokenizers.matching tokenizers.placeholders",
        "tokenizers.tokenization",
        "kinds.sparse missing model_config safetensors stores.hub_client stores.object_client views.relations",
        "foreign place stores.retries",
    ),
    "methods": (
        "preparation",
        "rounding",
        "evaluate",
        "linear",
        "table terms",
        "families.average",
        "families.elect families.spherical",
        "families.sparsify folds",
        "method",
    ),
    "ground": (
        "claim",
        "bits durable",
        "brief errors naming remarks reporter tensors threads version",
    ),
}
OUTSIDE = {"", "__main__"}
"""The package itself and `python -m skillmerge`: doors, which nothing inside imports."""

MODULES_A_FOLDER, LINES, FUNCTION_LINES, ARGUMENTS = 12, 400, 50, 8

LONG_FUNCTIONS = {"verbs.apply.apply": "25 keywords, each on a line of its own, and what they mean"}
"""Functions above FUNCTION_LINES, at most five, each with its reason."""

HOMES = {
    "numpy": {"checkpoints.kinds.sparse"},
    "click": {
        "cli.main", "cli.completion", "cli.flags", "cli.help", "cli.results", "cli.usage", "cli.commands.merging",
        "cli.commands.studying", "cli.commands.proving", "cli.commands.starting", "cli.commands.clusters",
    },
    "rich": {
        "cli.console", "cli.show.inspection", "cli.show.merging", "cli.show.proving", "cli.show.starting",
        "cli.show.studying", "cli.show.table",
    },
    "tqdm": {"cli.messages"},
    "ruamel": {"recipes.yamltext"},
    "pydantic": {
        "recipes.schema", "recipes.tables.gates", "recipes.tables.models", "recipes.tables.recipe",
        "recipes.tables.schedules", "recipes.tables.values", "outputs.manifest",
    },
    "safetensors": {"outputs.verify"},
    "transformers": {
        "study.loads.load_probe", "study.loads.tokenizer_probe", "study.scoring.built_in", "verbs.sweep.in_memory",
    },
    "vllm": {"study.loads.vllm_probe"},
    "tokenizers": {"study.loads.tokenizer_probe"},
    "optuna": {"verbs.sweep.search"},
    "ray": {"verbs.tasks.cluster"},
    "lm_eval": {"study.scoring.built_in"},
    "model_signing": {"outputs.proof.sign"},
    "cryptography": {"outputs.proof.sign"},
    "securesystemslib": {"outputs.proof.attest"},
    "in_toto_attestation": {"outputs.proof.attest"},
    "google": {"outputs.proof.attest"},
    "cyclonedx": {"outputs.proof.bom"},
    "packageurl": {"outputs.proof.bom"},
    "obstore": {"checkpoints.stores.objects", "checkpoints.stores.object_client", "outputs.buckets.prefix"},
    "boto3": {"checkpoints.stores.object_client"},
    "huggingface_hub": {
        "checkpoints.stores.hub", "checkpoints.stores.hub_client", "checkpoints.stores.http_ranges",
        "outputs.hub.commit", "outputs.hub.card", "cli.doctor",
    },
}  # fmt: skip
TORCH_ROOMS = {"methods", "engine", "study", "verbs"}
"""Rooms whose modules may import torch; below are the others that do."""
TORCH_MODULES = {
    "bits", "checkpoints.kinds.sparse", "checkpoints.kinds.patch", "checkpoints.kinds.skill_planes",
    "checkpoints.views.adapted", "checkpoints.views.arranged", "checkpoints.views.bands", "checkpoints.views.by_token",
    "checkpoints.kinds.lora.joined",
    "checkpoints.views.low_rank", "checkpoints.views.widened", "outputs.verify",
}  # fmt: skip


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name, `skillmerge.` left out; packages stand for their `__init__`."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")
        found[name.removesuffix("__init__").rstrip(".")] = path
    return found


MODULES = modules()
ROOM_PACKAGES = {name for name, path in MODULES.items() if path.name == "__init__.py" and name}
LEVELS = {
    (module if room == "ground" else f"{room}.{module}"): (-height, -floor)
    for height, (room, floors) in enumerate(ROOMS.items())
    for floor, row in enumerate(floors)
    for module in row.split()
}


def imports(path: Path) -> Iterator[str]:
    """Every dotted module that a file imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name.removeprefix("skillmerge.") in LEVELS else node.module for name in inner)


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    taken = function.args
    return [it.arg for it in (*taken.posonlyargs, *taken.args, *taken.kwonlyargs) if it.arg not in ("self", "cls")]


def the_map() -> str:
    """The rooms on one screen, for whoever has to find the place of something."""
    return "\n".join(f"{room:12} {' | '.join(floors)}" for room, floors in ROOMS.items())


def the_full_map() -> str:
    """Every module and the first line of its docstring, room by room: what CONTRIBUTING has."""
    lines = []
    for room, floors in ROOMS.items():
        lines += [f"**{room}**", "", "| module | |", "| --- | --- |"]
        for module in sorted(" ".join(floors).split()):
            path = MODULES[module if room == "ground" else f"{room}.{module}"]
            said = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0].replace("\n", " ")
            lines.append(f"| `{path.relative_to(PACKAGE).as_posix()}` | {said.replace('|', chr(92) + '|')} |")
        lines.append("")
    return "\n".join(lines)


def test_every_module_has_a_place() -> None:
    assert set(LEVELS) == set(MODULES) - OUTSIDE - ROOM_PACKAGES, f"the rooms are\n{the_map()}"


def test_imports_point_downward_only() -> None:
    wrong = [
        f"{name} imports {target}"
        for name in LEVELS
        for target in (other.removeprefix("skillmerge.") for other in imports(MODULES[name]))
        if (target in LEVELS and LEVELS[target] >= LEVELS[name]) or target == "skillmerge"
    ]
    assert not wrong, "\n".join([*wrong, "a module imports only what is below it:", the_map()])


def test_a_folder_has_few_modules() -> None:
    folders: dict[Path, int] = {}
    for name in LEVELS:
        folders[MODULES[name].parent] = folders.get(MODULES[name].parent, 0) + 1
    crowded = {folder.name: count for folder, count in folders.items() if count > MODULES_A_FOLDER}
    assert not crowded, f"at most {MODULES_A_FOLDER} modules a folder:\n{the_map()}"


def test_modules_are_short() -> None:
    long = {name: lines for name in LEVELS if (lines := len(MODULES[name].read_text().splitlines())) > LINES}
    assert not long


def test_functions_are_short() -> None:
    long = {
        f"{name}.{function.name}"
        for name in LEVELS
        for function in functions(MODULES[name])
        if (function.end_lineno or 0) - function.lineno >= FUNCTION_LINES
    }
    assert long == set(LONG_FUNCTIONS)
    assert len(LONG_FUNCTIONS) <= 5


def test_functions_take_few_arguments() -> None:
    """Verbs and click callbacks take what a person can say; they sort it into the records that the rest takes."""
    verbs = {f"{home}.{verb}" for verb, home in skillmerge._HOMES.items()}
    commands = {f"{name}.{verb}" for name in LEVELS if name.startswith("cli.") for verb in skillmerge._HOMES}
    wide = {
        f"{name}.{function.name}"
        for name in LEVELS
        for function in functions(MODULES[name])
        if len(arguments(function)) > ARGUMENTS
    }
    assert wide <= verbs | commands


def test_each_library_has_one_home() -> None:
    wrong = []
    for name in LEVELS:
        for library in {other.split(".")[0] for other in imports(MODULES[name])}:
            if library in HOMES and name not in HOMES[library]:
                wrong.append(f"{name} imports {library}, whose home is {', '.join(sorted(HOMES[library]))}")
            if library == "torch" and name.split(".")[0] not in TORCH_ROOMS and name not in TORCH_MODULES:
                wrong.append(f"{name} imports torch")
    assert wrong == []


def test_every_module_says_what_it_knows() -> None:
    for name, path in MODULES.items():
        docstring = ast.get_docstring(ast.parse(path.read_text()))
        assert docstring, name
        assert len(docstring) > 35, name


def test_contributing_has_the_map() -> None:
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text()
    assert the_full_map() in text, "write the map anew: python tests/test_layers.py"


if __name__ == "__main__":
    contributing = PACKAGE.parent / "CONTRIBUTING.md"
    begin, end = "<!-- map -->\n", "<!-- end of map -->"
    head, rest = contributing.read_text().split(begin)
    contributing.write_text(head + begin + the_full_map() + end + rest.split(end)[1])
