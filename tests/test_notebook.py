"""Notebooks: results draw themselves small and alone, progress shows, and the example of the docs runs."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from browser import AXE, CHROMIUM, SCHEMES, browser
from conftest import run_cli
from sample_pages import deep, experts, family, made_sweep

import skillmerge
from skillmerge.cli.messages import NotebookReporter
from skillmerge.outputs.hub.published import Published
from skillmerge.reporter import Reporter, default_reporter
from skillmerge.study.gates import GateReport

pytestmark = pytest.mark.xdist_group("notebook")

EXAMPLE = Path(__file__).parent.parent / "docs" / "notebook.ipynb"
BYTES = 30_000


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the verbs return of a model of 80 layers."""
    folder = tmp_path_factory.mktemp("notebook")
    recipe = family(folder / "layers", deep())
    plan, done = skillmerge.plan(recipe), skillmerge.apply(recipe)
    skill = skillmerge.extract(folder / "layers" / "rl", folder / "layers" / "sft", folder / "skill")
    return {
        "plan": plan,
        "apply": done,
        "extract": skill,
        "inspect": skillmerge.inspect(recipe, base=str(folder / "layers" / "base")),
        "experts": skillmerge.plan(family(folder / "experts", experts())),
        "sweep": made_sweep(plan),
        "gate": GateReport("merged", done.gates),
        "verify": skillmerge.verify(done.output),
        "lint": skillmerge.lint([str(recipe)]),
        "doctor": skillmerge.doctor(),
        "push": Published("acme/model", "0123abc", "https://huggingface.co/acme/model", None, False),
    }


def test_results_are_small_in_a_notebook_and_in_a_script(results: dict[str, Any]) -> None:
    for name, result in results.items():
        assert len(result._repr_html_().encode()) < BYTES, name
        assert len(repr(result)) < 24 * 80, name


def test_results_show_headlines_tables_and_maps(results: dict[str, Any]) -> None:
    shown = {name: result._repr_html_() for name, result in results.items()}
    assert re.findall(r"</b> <span>(.*?)</span>", shown["apply"]) == ["effective λ", "lost", "changed"]
    assert re.findall(r"</b> <span>(.*?)</span>", shown["plan"]) == ["merged", "read", "warnings"]
    assert re.findall(r"<caption><b>(.*?)</b>", shown["apply"]) == ["effective λ / requested λ", "lost"]
    assert re.findall(r"<caption><b>(.*?)</b>", shown["inspect"])[0] == "changed"
    assert "<b>best</b>" in shown["sweep"]
    assert "<th scope=row>tensors<td class=text>483" in shown["verify"]


def test_styles_of_results_reach_nothing_else(results: dict[str, Any]) -> None:
    for name, result in results.items():
        text = result._repr_html_()
        assert text.startswith('<div class="skillmerge"><style>')
        assert "<script" not in text
        (style,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
        rules = re.findall(r"(?:^|\}\s)([^{}\s][^{}]*) \{", style, re.MULTILINE)
        assert rules
        assert all(rule.startswith((".skillmerge", ".p", ".n")) for rule in rules), name


@pytest.mark.skipif(CHROMIUM is None or not AXE.exists(), reason="no Chromium or no axe-core here")
def test_results_are_readable_in_light_and_dark_notebooks(results: dict[str, Any], tmp_path: Path) -> None:
    shown = "".join(results[name]._repr_html_() for name in ("plan", "apply", "inspect", "sweep"))
    with browser() as chromium:
        # JupyterLab's own colors, which do not follow the system's.
        for scheme, colors in zip(SCHEMES, ("#fff; color: rgba(0, 0, 0, .87)", "#111; color: #fff"), strict=True):
            page = tmp_path / f"{scheme}.html"
            page.write_text(
                f"<!doctype html><html lang=en><title>notebook</title><body style='background: {colors}'>"
                f"<style>table {{ border: 0 }}</style><main><h1>notebook</h1>{shown}</main>"
            )
            chromium.open(page, 900, "light")
            assert chromium.serious() == []


# ---------------------------------------------------------------------------------------------------------- progress


def test_default_reporter_is_silent_in_scripts_and_shows_progress_in_notebooks(monkeypatch: pytest.MonkeyPatch) -> None:
    for shell in ("TerminalInteractiveShell", "ZMQInteractiveShell"):
        module = SimpleNamespace(get_ipython=type(shell, (), {}))
        monkeypatch.setitem(sys.modules, "IPython", module)  # type: ignore[arg-type]
        made = default_reporter("inspecting")
        assert type(made) is (NotebookReporter if shell == "ZMQInteractiveShell" else Reporter)
    assert made.doing == "inspecting"
    monkeypatch.delitem(sys.modules, "IPython")
    assert type(default_reporter()) is Reporter


def test_a_call_in_a_notebook_shows_warnings_and_a_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = family(tmp_path / "small")
    skillmerge.apply(recipe)
    assert capsys.readouterr().err == ""
    module = SimpleNamespace(get_ipython=type("ZMQInteractiveShell", (), {}))
    monkeypatch.setitem(sys.modules, "IPython", module)  # type: ignore[arg-type]
    skillmerge.apply(recipe, tmp_path / "other")
    shown = capsys.readouterr().err
    assert "merging:   0%|" in shown
    assert "warning: layer 0 attention: effective lambda is 0.31 of what was requested" in shown


# ------------------------------------------------------------------------------------------------------- the example


def test_the_example_is_stored_without_outputs() -> None:
    cells = json.loads(EXAMPLE.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 6
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def test_the_example_runs(tmp_path: Path) -> None:
    for name in ("nbclient", "ipykernel", "transformers"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"no {name} here")
    import nbclient
    import nbformat

    notebook = nbformat.read(EXAMPLE, as_version=4)
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert any(
        "application/vnd.jupyter.widget-view+json" in output.get("data", {})
        for cell in notebook.cells
        for output in cell.get("outputs", ())
    ), "no bar"
    shown = [
        output["data"]["text/html"]
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if "text/html" in output.get("data", {})
    ]
    assert "Questions answered correctly" in shown[0]
    titles = [found[1] for text in shown if (found := re.search(r"<p><b>(.*?)</b> <code>", text))]
    assert titles == ["Plan of recipe", "Merge of recipe", "Inspection of recipe", "Sweep of recipe"]
    assert (tmp_path / "merged" / "model.safetensors").exists()
    printed = "".join(output.get("text", "") for output in notebook.cells[-1]["outputs"])
    assert "stf" in printed
    assert "help: " in printed
    assert run_cli("verify", tmp_path / "merged").returncode == 0
