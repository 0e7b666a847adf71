"""Every console block of the docs, run as it stands against the small trained models: commands, and what they print.

SKILLMERGE_RECORD=1 writes what they print now into the pages.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
from pathlib import Path

import pytest
from command_server import Commands
from console_pages import CONSOLE, DOCS, commands, played, steady

NOT_RUN = {
    ("CONTRIBUTING.md", "pip install click pydantic rich ruamel.yaml"): "downloads packages",
    ("README.md", "pip install torch --index-url https://download.pytorch.org/whl/cpu"): "downloads packages",
    ("filesystems.md", "skillmerge doctor /mnt/models"): "shows a filesystem without locks",
    ("index.md", "pip install '.[transformers]'"): "downloads packages",
    ("install.md", "pip install '.[transformers]'"): "downloads packages",
    ("install.md", "pip install torch --index-url https://download.pytorch.org/whl/cpu"): "downloads packages",
    ("install.md", "pip install click pydantic rich ruamel.yaml"): "downloads packages",
    ("install.md", "docker build -t skillmerge ."): "needs Docker",
}
"""Page and first command of each block that is not run -> why."""

NEEDS: dict[str, list[str]] = {
    "choosing-lambda.md": ["transformers", "optuna"],
    "first-merge.md": ["transformers"],
    "object-stores.md": ["obstore", "moto"],
    "skills.md": ["transformers", "peft"],
    "walkthrough.md": ["transformers", "model_signing", "cyclonedx", "in_toto_attestation"],
    "proof.md": ["model_signing", "cyclonedx", "in_toto_attestation"],
}
"""Libraries without which a page is skipped."""

TOGETHER = pytest.mark.xdist_group("pages")
"""One server imports transformers for their scripts."""

INCLUDED = [DOCS.parent / name for name in runpy.run_path(str(DOCS / "hooks.py"))["INCLUDED"].values()]
README = DOCS.parent / "README.md"
PAGES = [path for path in [README, *sorted(DOCS.glob("*.md")), *INCLUDED] if CONSOLE.search(path.read_text())]


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[TOGETHER] if "transformers" in NEEDS.get(page.name, []) else []) for page in PAGES],
    ids=lambda page: page.stem,
)
def test_page_prints_what_it_says(page: Path, tmp_path: Path, commands: Commands) -> None:
    for needed in NEEDS.get(page.name, []):
        pytest.importorskip(needed)
    if not all(shutil.which(program) for program in ("bash", "openssl")):
        pytest.skip("needs bash and openssl")
    found = played(page, tmp_path, commands, lambda block: reason(page, block) is not None)
    assert "Traceback" not in found
    same = steady(found) == steady(page.read_text())
    if os.environ.get("SKILLMERGE_RECORD") and not same:
        page.write_text(found)
    assert same or steady(found) == steady(page.read_text())


def reason(page: Path, block: str) -> str | None:
    """Why a block is not run; None for one that is."""
    return NOT_RUN.get((page.name, commands(block)[0]))


@TOGETHER
@pytest.mark.usefixtures("quick_loads")
def test_python_of_the_readme_runs_after_its_commands(
    tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    played(README, tmp_path, commands, lambda block: reason(README, block) is not None)
    monkeypatch.chdir(tmp_path / "work/skillmerge-demo")  # where its reader is by then
    (block,) = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.M | re.S)
    exec(compile(block, "README.md", "exec"), {})
    assert Path("from-python/model.safetensors").exists()


def test_what_is_not_run_is_there() -> None:
    blocks = {(page.name, commands(block)[0]) for page in PAGES for block in CONSOLE.findall(page.read_text())}
    assert set(NOT_RUN) <= blocks


def test_commands_are_in_console_blocks() -> None:
    """Where the tests find them."""
    for page in DOCS.glob("*.md"):
        text = re.sub(
            r"<!-- commands -->.*<!-- end of commands -->", "", page.read_text(), flags=re.S
        )  # examples of --help
        blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
        others = [block for kind, block in blocks if kind != "console"]
        assert [block for block in others if re.search(r"^ *\$ ", block, re.M)] == [], page.name
        assert [kind for kind, _ in blocks if not kind] == [], page.name
