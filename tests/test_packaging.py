"""What is shipped: sdist and wheel, the Dockerfile's steps, the lint hook, citation, issue forms, changelog."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path

import pytest
from action_runner import load_yaml
from schemas import fits

import skillmerge

ROOT = Path(__file__).parent.parent
RECIPES = {path.name: path.read_text() for path in (ROOT / "recipes").glob("*.yaml")}
CACHES = shutil.ignore_patterns("__pycache__")
SHIPPED = [
    ".dockerignore", ".github", ".gitignore", ".pre-commit-hooks.yaml", "CHANGELOG.md", "CITATION.cff",
    "CONTRIBUTING.md", "Dockerfile", "LICENSE", "MANIFEST.in", "Makefile", "README.md", "SECURITY.md", "action.yml",
    "benchmarks", "constraints.txt", "docs", "experiments", "mkdocs.yml", "pyproject.toml", "recipes",
    "skillmerge", "tests",
]  # fmt: skip
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command and return what it printed; its errors are the test's."""
    process = subprocess.run(
        [str(word) for word in command], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True, ignore=CACHES)
    else:
        shutil.copy(source, target)


# ---------------------------------------------------------------------------------------- sdist and wheel


def test_sdist_and_wheel_hold_what_they_should(tmp_path: Path) -> None:
    """From a copy, since building leaves folders; the wheel is built from the sdist, as installers do."""
    source, made = tmp_path / "source", tmp_path / "made"
    source.mkdir()
    for name in SHIPPED:
        copy(ROOT / name, source / name)
    run(sys.executable, "-c", BUILD, "build_sdist", made, cwd=source)
    (archive,) = made.iterdir()
    assert archive.name == f"skillmerge-{skillmerge.__version__}.tar.gz"
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path, filter="data")
    unpacked = tmp_path / archive.name.removesuffix(".tar.gz")
    shipped = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    assert {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()} <= shipped

    run(sys.executable, "-c", BUILD, "build_wheel", made, cwd=unpacked)
    (wheel,) = made.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(tmp_path / "installed")
        metadata = Parser().parsestr(opened.read(f"skillmerge-{skillmerge.__version__}.dist-info/METADATA").decode())
    assert (metadata["Author"], metadata["License-Expression"]) == ("skillmerge contributors", "Apache-2.0")
    assert metadata.get_all("Project-URL") is metadata["Home-page"] is None
    installed = tmp_path / "installed" / "skillmerge"
    gallery = installed / "recipes" / "gallery"
    assert {path.name: path.read_text() for path in gallery.iterdir()} == RECIPES
    python = {path.relative_to(ROOT) for path in (ROOT / "skillmerge").rglob("*.py")}
    assert python == {path.relative_to(installed.parent) for path in installed.rglob("*.py")}
    text = run(sys.executable, "-m", "skillmerge", "init", "-", "--from", "past", cwd=tmp_path / "installed")
    assert text == RECIPES["past.yaml"]


# ------------------------------------------------------------------------------------------- Dockerfile


def instructions() -> Iterator[tuple[str, str]]:
    """The Dockerfile's instructions, continued lines joined."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        if line:
            yield tuple(line.split(" ", 1))  # type: ignore[misc]


def inside(text: str, image: Path) -> str:
    """The same text with each absolute path inside the image."""
    return re.sub(r"(?<![\w:/.$])/(?=[a-z])", f"{image}/", text)


def test_steps_of_the_dockerfile_give_a_skillmerge_that_runs(tmp_path: Path) -> None:
    """Its own commands in a folder that stands for the image. The packages that pip would fetch are this environment's,
    and apt-get only says what it was called with; pip, venv and the copied files are real."""
    image, programs = tmp_path / "image", tmp_path / "programs"
    (image / "var/lib/apt/lists").mkdir(parents=True)
    programs.mkdir()
    (programs / "apt-get").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/apt\n')
    (programs / "apt-get").chmod(0o755)
    here = next(path for path in sys.path if path.endswith("site-packages"))
    path = f"{programs}:{Path(sys.executable).parent}:/usr/bin:/bin"
    environment = {"PATH": path, "PYTHONPATH": here, "PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0"}
    folder, entry = image, [""]
    for name, words in instructions():
        if name == "ARG" and words.startswith("TORCH_INDEX="):
            environment["TORCH_INDEX"] = words.split("=", 1)[1]
        elif name == "WORKDIR":
            folder = Path(inside(words, image))
            folder.mkdir(parents=True, exist_ok=True)
        elif name == "COPY":
            *sources, target = words.split()
            for source in sources:
                copy(ROOT / source, folder / target)
        elif name == "RUN":
            run("sh", "-ec", inside(words, image), cwd=folder, **environment)
        elif name == "ENV":
            variable, value = words.split("=", 1)
            environment[variable] = inside(json.loads(value), image).replace("$PATH", environment["PATH"])
        elif name == "ENTRYPOINT":
            entry = json.loads(words)
        else:
            assert name in ("ARG", "FROM", "USER", "CMD"), name
    assert (
        "install --yes --no-install-recommends ca-certificates python3 python3-venv" in (tmp_path / "apt").read_text()
    )
    assert folder == image / "models"
    assert shutil.which(entry[0], path=environment["PATH"]) == str(image / "opt/venv/bin/skillmerge")
    installed = {"PATH": environment["PATH"], "PYTHONPATH": here}
    assert run(*entry, "--version", cwd=folder, **installed) == f"skillmerge, version {skillmerge.__version__}\n"
    assert run(*entry, "init", "-", "--from", "past", cwd=folder, **installed) == RECIPES["past.yaml"]
    assert list((image / "opt/venv/lib").glob("python3*/site-packages/skillmerge/__init__.py"))


def test_docker_build_sees_what_it_copies_and_nothing_else() -> None:
    sources = {word for name, words in instructions() if name == "COPY" for word in words.split()[:-1]}
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert {line[1:] for line in lines if line.startswith("!")} == sources
    assert "*" in lines


def test_dockerfile_is_linted() -> None:
    hadolint = shutil.which("hadolint", path=f"{sys.prefix}/bin:{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not here: the extra `dev` has it for Linux")
    text = (ROOT / "Dockerfile").read_text()
    for found, wrong in ((text, False), (text.replace("# hadolint ignore=DL3008\n", ""), True)):
        process = subprocess.run([hadolint, "-"], input=found, capture_output=True, text=True, check=False)
        assert (process.returncode != 0) == wrong, process.stdout
        assert ("DL3008" in process.stdout) == wrong


# ------------------------------------------------------------------------------------------ the lint hook


def test_lint_hook_pins_what_constraints_pin() -> None:
    """Versions that pip has found to fit each other: with --no-deps it does not look."""
    (hook,) = load_yaml((ROOT / ".pre-commit-hooks.yaml").read_text())
    pins = set(hook["additional_dependencies"]) - {"--no-deps"}
    assert {pin.split("==")[0] for pin in pins} >= {"click", "pydantic", "pydantic-core", "rich", "ruamel.yaml"}
    assert pins <= set((ROOT / "constraints.txt").read_text().splitlines())


# -------------------------------------------------------------------------------- files about the project


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("CITATION.cff", "vendor.citation-file-format"),
        (".github/ISSUE_TEMPLATE/bug_report.yml", "vendor.github-issue-forms"),
        (".github/ISSUE_TEMPLATE/feature_request.yml", "vendor.github-issue-forms"),
    ],
)
def test_file_follows_the_published_schema(path: str, kind: str) -> None:
    document = json.loads(json.dumps(load_yaml((ROOT / path).read_text()), default=str))
    fits(document, kind)


def test_version_and_date_are_the_same_everywhere() -> None:
    citation = load_yaml((ROOT / "CITATION.cff").read_text())
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    released = [heading for heading in headings if heading != "Unreleased"]
    assert all(re.fullmatch(r"\d+\.\d+\.\d+ - \d{4}-\d{2}-\d{2}", heading) for heading in released)
    assert released[0] == f"{skillmerge.__version__} - {citation['date-released']}"
    assert citation["version"] == skillmerge.__version__
    assert f"such as `{skillmerge.__version__}`" in (ROOT / "action.yml").read_text()
    dates = [heading.split(" - ")[1] for heading in released]
    assert dates == sorted(dates, reverse=True)


def test_versions_in_the_docs_are_this_one() -> None:
    ours = re.compile(r"skillmerge(?:, version |@v|==|:)(\d+\.\d+\.\d+)|^ *rev: v(\d+\.\d+\.\d+)", re.M)
    texts = [(path, path.read_text()) for path in (ROOT / "docs").glob("*.md") if path.name != "changelog.md"]
    found = {(path.name, a or b) for path, text in texts for a, b in ours.findall(text)}
    assert {name for name, _ in found} == {"clusters.md", "install.md", "pipelines.md"}
    assert {version for _, version in found} == {skillmerge.__version__}
