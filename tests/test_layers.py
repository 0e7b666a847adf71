"""Imports point downward only, and each library has one home."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "skillmerge"

# Each module may import, at any place in it, only from rows below its own (and from its own row where marked).
LAYERS = [
    {"cli"},
    {"commands.merging", "commands.studying", "commands.proving", "commands.starting"},
    {"commands.results"},
    {"report", "page", "flags", "markdown"},
    {"events"},
    {"messages"},
    {"gating", "rebuilding"},
    {"figures"},
    {"sweep"},
    {"inplace", "candidates", "deriving"},
    {"exporting", "patching"},
    {"extraction"},
    {"merge"},
    {"attestation"},
    {"sarif"},
    {"linting"},
    {"pushing", "savedplan", "gates", "bom"},
    {"loading", "inspection", "signing"},
    {"scoring"},
    {"card", "publishing"},
    {"sources"},
    {"lockfile"},
    {"verification", "demo", "doctor"},
    {"miniature"},
    {"engine", "cutting"},
    {"checkpoints.skill", "checkpoints.patch"},
    {"forecasting"},
    {"metrics", "spectrum"},
    {"sparse"},
    {"worker"},
    {"reading"},
    {"manifest", "writer", "resources", "statistics", "arithmetic"},
    {"planning"},
    {"accounting"},
    {"recipe", "sidefiles", "modelconfig"},
    {"criteria"},
    {"schema"},
    {"program"},
    {"checkpoints.repository"},
    {"checkpoints.storage"},
    {"checkpoints.folder", "checkpoints.hubclient"},
    {"yamltext", "expression", "coefficients", "checkpoints.checkpoint", "checkpoints.location", "depth"},
    {"checkpoints.safetensors_header"},
    {"naming", "tensors", "parallel"},
    {"errors", "reporter", "starter", "checkpoints", "commands", ""},
]
WITHIN_ROW = {
    ("manifest", "statistics"),
    ("manifest", "writer"),
    ("statistics", "arithmetic"),
    ("arithmetic", "statistics"),
    ("recipe", "modelconfig"),
}
HOMES = {
    "numpy": {"sparse"},
    "click": {
        "cli",
        "flags",
        *(f"commands.{name}" for name in ("merging", "studying", "proving", "starting", "results")),
    },
    "rich": {"report"},
    "tqdm": {"messages"},
    "ruamel": {"yamltext"},
    "pydantic": {"schema"},
    "safetensors": {"verification"},
    "transformers": {"loading", "inplace", "scoring"},
    "optuna": {"sweep"},
    "lm_eval": {"scoring"},
    "model_signing": {"signing"},
    "cryptography": {"signing"},
    "securesystemslib": {"attestation"},
    "in_toto_attestation": {"attestation"},
    "google": {"attestation"},
    "cyclonedx": {"bom"},
    "packageurl": {"bom"},
    "torch": {
        "inspection",
        "metrics",
        "forecasting",
        "spectrum",
        "exporting",
        "reading",
        "cutting",
        "sparse",
        "checkpoints.skill",
        "checkpoints.patch",
        "patching",
        "engine",
        "worker",
        "arithmetic",
        "statistics",
        "verification",
        "demo",
        "miniature",
        "inplace",
        "sweep",
        "scoring",
        "loading",
    },
    "huggingface_hub": {
        "checkpoints.repository",
        "checkpoints.storage",
        "checkpoints.hubclient",
        "publishing",
        "card",
        "doctor",
    },
}


def imports(path: Path) -> set[str]:
    """Every dotted module that a file imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def modules() -> dict[str, Path]:
    files = {
        path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path for path in PACKAGE.rglob("*.py")
    }
    return {name.removesuffix("__init__").rstrip("."): path for name, path in files.items()}


def test_every_module_has_a_layer() -> None:
    assert set().union(*LAYERS) == set(modules())


def test_imports_point_downward_only() -> None:
    level = {name: number for number, row in enumerate(LAYERS) for name in row}
    wrong = []
    for name, path in modules().items():
        if name == "":
            continue
        for other in imports(path):
            target = other.removeprefix("skillmerge.") if other.startswith("skillmerge.") else None
            if target in level and level[target] <= level[name] and (name, target) not in WITHIN_ROW:
                wrong.append(f"{name} imports {target}")
    assert wrong == []


def test_each_library_has_one_home() -> None:
    wrong = []
    for name, path in modules().items():
        for other in imports(path):
            home = HOMES.get(other.split(".")[0])
            if home is not None and name not in home:
                wrong.append(f"{name} imports {other}")
    assert wrong == []


def test_every_module_says_what_it_knows() -> None:
    for name, path in modules().items():
        docstring = ast.get_docstring(ast.parse(path.read_text()))
        assert docstring, name
        assert len(docstring) > 60, name
