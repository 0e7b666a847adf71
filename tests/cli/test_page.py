"""The HTML report: one small file, nothing from a network, and in a real browser it does what it should."""

from __future__ import annotations

import dataclasses
import hashlib
import html
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM
from conftest import random_tensors, run_cli, write_checkpoint, write_family, write_recipe

import skillmerge
from skillmerge.cli.show.figures import FIGURES, FORECAST, SPECTRAL
from skillmerge.cli.show.report.charts import _ticks
from skillmerge.cli.show.report.heat_maps import HeatMap, _over_experts, draw
from skillmerge.cli.show.report.html import prose, without_paths
from skillmerge.cli.show.report.page import build
from skillmerge.outputs.manifest import MANIFEST_FILE
from skillmerge.plans.depth import number
from skillmerge.remarks import Remark
from skillmerge.study import spectrum
from skillmerge.study.groups import groups_of
from skillmerge.study.inspect import inspect
from skillmerge.study.update_metrics import Pair, Update, describe_all

LISTEN = "<script>window.problems = []; addEventListener('error', (event) => problems.push(event.message));</script>"
TRY = """<script>
const table = document.querySelector("table.sortable"), rows = () => [...table.tBodies[0].rows];
const head = (text) => [...table.tHead.rows[0].cells].find((cell) => cell.textContent.trim().startsWith(text));
const column = (text) => { const at = head(text).cellIndex; return rows().map((row) => row.cells[at].textContent); };
const click = (text) => head(text).querySelector("button").click();
const filter = document.querySelector("input[type=search]");
const wide = (limit) => [...document.querySelectorAll("body *")].filter((element) => !element.closest(".scroll, pre")
  && !["SCRIPT", "STYLE"].includes(element.tagName) && element.getBoundingClientRect().right > limit + 1)
  .map((element) => element.tagName + ":" + element.textContent.slice(0, 40));
const result = { rows: rows().length };
click("tensor"); result.up = column("tensor"); result.sort = head("tensor").getAttribute("aria-sort");
click("tensor"); result.down = column("tensor");
if (head("norm")) {
  click("norm");
  result.norms = rows().map((row) => Number(row.cells[head("norm").cellIndex].dataset.v));
}
filter.value = "norm layers.1."; filter.dispatchEvent(new Event("input"));
result.filtered = rows().filter((row) => !row.hidden).map((row) => row.cells[0].textContent);
result.count = document.querySelector("output").textContent;
filter.value = ""; filter.dispatchEvent(new Event("input"));
document.querySelector("button.theme").click();
result.theme = document.documentElement.dataset.theme;
result.background = getComputedStyle(document.body).backgroundColor;
document.querySelector("button.theme").click();
result.other = getComputedStyle(document.body).backgroundColor;
result.focusable = document.querySelectorAll("button, input, [tabindex='0']").length;
result.wide = wide(innerWidth);
document.documentElement.style.width = "400px"; document.body.style.width = "400px";
result.narrow = wide(400);
result.problems = problems;
const out = document.createElement("pre"); out.id = "result"; out.textContent = JSON.stringify(result);
document.body.append(out);
</script>"""


SECRET = "ada-the-user"
"""A part of every path on this machine: a user's name, as in `/home/NAME`."""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The reports of inspect, plan and apply of one recipe."""
    folder = tmp_path_factory.mktemp("pages") / SECRET
    folder.mkdir()
    shapes = {"model.embed_tokens.weight": (64, 16), "lm_head.weight": (64, 16), "model.norm.weight": (16,)}
    for layer in range(6):
        for part, shape in (("self_attn.q_proj", (16, 16)), ("mlp.up_proj", (64, 16)), ("input_layernorm", (16,))):
            shapes[f"model.layers.{layer}.{part}.weight"] = shape
    write_family(folder, shapes)
    rules = [{"layers": "0-2", "value": 0.5}, {"modules": "norm", "value": 0.0}]
    models = {name: str(folder / name) for name in ("target", "rl", "sft")}
    recipe = write_recipe(folder, models=models, coefficients={"lam": {"default": 1.0, "rules": rules}})
    for command in ("inspect", "plan", "apply"):
        process = run_cli(command, recipe, "--report", folder / f"{command}.html")
        assert process.returncode == 0, process.stderr
        assert "wrote" in process.stderr
    return {command: folder / f"{command}.html" for command in ("inspect", "plan", "apply")}


@pytest.mark.parametrize("command", ["inspect", "plan", "apply"])
def test_report_asks_nothing_of_a_network(pages: dict[str, Path], command: str) -> None:
    text = pages[command].read_text()
    assert re.findall(r"(?:src|href)=\W?([^\s\"'>]+)", text) == ["data:,"]
    assert "url(" not in text
    assert "@import" not in text
    assert "fetch(" not in text


def test_report_says_what_it_should(pages: dict[str, Path]) -> None:
    text = html.unescape(pages["inspect"].read_text())
    for figure in (*FIGURES.values(), *FORECAST.values()):
        assert figure.label in text
        assert figure.formula in text
        assert figure.meaning in text
    wanted = ["target + lam * (rl - sft)", "target - sft", "Forecast of rounding", "they do not predict"]
    for told in (*wanted, '"layers": "0-2"', "← 9 tensors", "← 7 tensors"):
        assert told in text, told
    plan = pages["plan"].read_text()
    assert "lam, as requested" in plan
    assert "what happens" in plan
    done = pages["apply"].read_text()
    assert "Effect of rounding" in done
    assert "effective / requested λ" in done


@pytest.mark.parametrize("command", ["inspect", "plan", "apply"])
def test_report_has_no_path_of_the_machine(pages: dict[str, Path], command: str) -> None:
    text = html.unescape(pages[command].read_text())
    for private in (SECRET, str(pages[command].parent), str(Path.home()), tempfile.gettempdir()):
        assert private not in text


def test_report_begins_with_provenance_and_headlines(pages: dict[str, Path]) -> None:
    text = pages["apply"].read_text()
    assert "<title>Merge of recipe.yaml · skillmerge</title>" in text
    manifest = (pages["apply"].parent / "merged" / MANIFEST_FILE).read_bytes()
    facts = dict(re.findall(r"<div><dt>(.*?)<dd>(.*?)</div>", text))
    assert list(facts) == [
        "expression", "target (donor)", "rl", "sft", "date", "device", "manifest sha256", "skillmerge",
    ]  # fmt: skip
    assert facts["expression"] == "<code>target + lam * (rl - sft)</code>"
    assert facts["manifest sha256"] == f"<code>{hashlib.sha256(manifest).hexdigest()}</code>"
    assert (facts["device"], facts["skillmerge"]) == ("cpu", skillmerge.__version__)
    for command, labels in {
        "plan": ["merged", "read", "warnings"],
        "apply": ["effective λ", "lost", "changed"],
        "inspect": ["changed", "in mlp", "cosine", "effective λ"],
    }.items():
        cards = re.findall(r"<li><b>([^<]+)</b> <span>([^<]+)</span><p>(.*?)(?=<li>|</ul>)", pages[command].read_text())
        assert [label for _, label, _ in cards] == labels
        assert all(figure in sentence or figure == "0" for figure, _, sentence in cards)


def test_models_of_the_hub_are_shown_with_their_commits(family: Path) -> None:
    made = skillmerge.plan(family)
    inputs = [dataclasses.replace(item, uri=f"hf://acme/{item.name}", revision="0123456789abcdef" * 2)
              for item in made.inputs]  # fmt: skip
    text = build(plan=dataclasses.replace(made, inputs=tuple(inputs)))
    assert "<dt>rl<dd>hf://acme/rl at <code>0123456789ab</code></div>" in text


def test_inspections_without_a_recipe_are_called_after_their_models(family: Path) -> None:
    found = inspect(family.parent / "sft", family.parent / "rl")
    assert "<h1>Inspection from …/sft to …/rl</h1>" in build(inspection=found)


def test_a_warning_comes_with_its_fix(family: Path) -> None:
    made = skillmerge.plan(family)
    warned = dataclasses.replace(made, warnings=(Remark("warning", "`lam` is odd", "set `lam` to 1"),))
    assert (
        '<li class="warning"><b>warning</b> <code>lam</code> is odd<br><b>help</b> set <code>lam</code> to 1'
        in build(plan=warned)
    )
    assert "<b>1</b> <span>warning</span><p>1 warning needs attention." in build(plan=warned)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/ada/models/sft", "…/sft"),
        ("`/home/ada/my models/sft` is missing", "`…/sft` is missing"),
        ("~/models/sft, file:///data/x/y; (/a/b/c)", "…/sft, …/y; (…/c)"),
        ("hf://acme/rl and https://huggingface.co/acme/rl", "hf://acme/rl and https://huggingface.co/acme/rl"),
        ("||v|| / ||w||, k / rows, ./rl, and/or", "||v|| / ||w||, k / rows, ./rl, and/or"),
        ('{"rl": "/data/a b/rl", "x": "/y/z"}', '{"rl": "…/rl", "x": "…/z"}'),
    ],
)
def test_paths_are_cut_to_their_last_part(text: str, shown: str) -> None:
    assert without_paths(text) == shown


def test_backticks_become_code(pages: dict[str, Path]) -> None:
    assert prose("`lam` is <1, not `2`: a lone ` stays") == (
        "<code>lam</code> is &lt;1, not <code>2</code>: a lone &#96; stays"
    )
    for page in pages.values():
        assert "`" not in re.sub(r"<script>.*?</script>|<pre.*?</pre>", "", page.read_text(), flags=re.DOTALL)


def test_a_map_of_shares_of_lambda_has_no_color_at_1() -> None:
    values = {("model.layers 0", "mlp"): 1.0, ("model.layers 1", "mlp"): 0.8, ("model.layers 2", "mlp"): 1.1}
    text = draw(HeatMap("effective λ / requested λ", "", values, center=1.0, off={("model.layers 1", "mlp")}))
    assert re.findall("<th scope=row>(.)<td(.*?)>(.*?)(?=<tr>|</table>)", text) == [
        ("0", "", "1"), ("1", " class=n10", "<b>0.8</b>"), ("2", " class=p5", "1.1"),
    ]  # fmt: skip
    assert re.findall("<i(.*?)>(.*?)</i>", text) == [
        (" class=n10", "0.8"), (" class=n5", "0.9"), ("", "1"), (" class=p5", "1.1"), (" class=p10", "1.2"),
    ]  # fmt: skip


def test_a_map_of_signed_figures_has_no_color_at_0_and_equal_layers_share_a_row() -> None:
    values = {(f"model.layers {layer}", "mlp"): 0.5 if layer else -1.0 for layer in range(12)}
    text = draw(HeatMap("cosine z", "", values, "signed"))
    assert re.findall("<th scope=row>(.*?)<td(.*?)>(.*?)(?=<tr>|</table>)", text) == [
        ("0", " class=n10", "-1"), ("1–11", " class=p5", "0.5"),
    ]  # fmt: skip


def run_in_browser(page: Path, folder: Path, *options: str) -> tuple[dict[str, Any], str]:
    """What the page says of itself after its buttons were pressed, and the browser's console."""
    assert CHROMIUM is not None
    text = page.read_text().replace("<head>", f"<head>{LISTEN}", 1).replace("</body>", f"{TRY}</body>", 1)
    (folder / "tried.html").write_text(text)
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync",
        "--disable-component-update", "--no-first-run", "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", *options, "--dump-dom",
        f"file://{folder / 'tried.html'}",
    ]  # fmt: skip
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="result">(.*?)</pre>', process.stdout, re.DOTALL)
    assert found is not None, process.stderr[-2000:]
    return json.loads(html.unescape(found[1])), process.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("command", ["inspect", "plan", "apply"])
def test_report_works_in_a_browser(pages: dict[str, Path], tmp_path: Path, command: str) -> None:
    result, console = run_in_browser(pages[command], tmp_path, "--window-size=1280,900")
    assert result["problems"] == []
    assert "CONSOLE" not in console
    assert result["rows"] == 21
    assert result["up"] == sorted(result["up"], key=lambda name: [int(p) if p.isdigit() else p for p in
                                                                   re.split(r"(\d+)", name)])  # fmt: skip
    assert result["down"] == result["up"][::-1]
    assert result["sort"] == "ascending"
    if command == "inspect":
        assert result["norms"] == sorted(result["norms"])
        assert len(set(result["norms"])) > 10
    assert result["filtered"] == ["model.layers.1.input_layernorm.weight"]
    assert result["count"] == "1 of 21 rows"
    assert result["theme"] in ("light", "dark")
    assert result["background"] != result["other"]
    assert result["focusable"] > 5
    assert result["wide"] == [], "cut off at 1280 pixels"
    assert result["narrow"] == [], "cut off at 400 pixels"


def test_report_of_80_layers_is_small(tmp_path: Path) -> None:
    shapes = {"model.embed_tokens.weight": (8, 4)}
    for layer in range(80):
        parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj",
                 "mlp.gate_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm")  # fmt: skip
        shapes |= {f"model.layers.{layer}.{part}.weight": (4, 4) for part in parts}
    for seed, name in enumerate(("target", "rl", "sft")):
        write_checkpoint(tmp_path / name, random_tensors(shapes, seed=seed))
    found = inspect(write_recipe(tmp_path))
    text = build(plan=found.plan, inspection=found)
    assert len(text.encode()) < 1_000_000
    assert text.count("<tr>") > 721


def test_report_of_many_experts_is_small_and_sums_them_up(family: Path) -> None:
    rows: dict[str, tuple[Update, Pair | None]] = {}
    for layer in range(61):
        block = f"model.layers.{layer}"
        experts = [f"{block}.mlp.experts.{expert}" for expert in range(256)]
        names = [f"{expert}.{part}_proj.weight" for expert in experts for part in ("up", "gate", "down")]
        names += [f"{block}.self_attn.{part}.weight" for part in ("q_a", "q_b", "kv_a", "kv_b", "o")]
        for name in names:
            rows[name] = (Update(100, 10, 9, 8, [10] + [0] * 7, [1.0], [4.0], 0.5), Pair([1.0], [0.1], [0.2], 20, 5, 2))
    groups = groups_of(rows)
    found = dataclasses.replace(
        inspect(family), plan=None, forecast=None, tensors={key: {} for key in rows}, spectra={},
        **{key: describe_all(rows, groups[key]) for key in ("modules", "layers", "cells", "summaries")},
    )  # fmt: skip
    text = build(inspection=found)
    assert len(text.encode()) < 1_000_000
    assert text.count("mlp.experts.*.up_proj.weight") == 61
    assert found.summaries["model.layers.7.mlp.experts.*.up_proj.weight"]["elements"] == 25_600


def test_experts_that_differ_are_counted(tmp_path: Path) -> None:
    shapes = {f"model.layers.0.mlp.experts.{expert}.up_proj.weight": (8, 8) for expert in range(4)}
    rules = [{"tensors": "*.experts.0.*", "value": 0.9}, {"tensors": "*.experts.3.*", "value": 0.0}]
    recipe = write_family(tmp_path, shapes, shards=1)
    recipe = write_recipe(tmp_path, coefficients={"lam": {"default": 0.5, "rules": rules}})
    found = inspect(recipe, spectral=2)
    text = build(plan=found.plan, inspection=found)
    (row,) = (line for line in text.split("<tr>") if "mlp.experts.*.up_proj.weight" in line and "class=text" in line)
    assert "merge ×3, copy ×1" in row
    assert ">0 to 0.9" in row
    ranks = [values["stable_rank"] for values in found.spectra.values()]
    assert number(sum(ranks) / 4) in row  # type: ignore[arg-type]


def test_two_rules_on_one_line_are_both_counted(tmp_path: Path) -> None:
    write_family(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    rules = "[{layers: 0, value: 0.5}, {modules: [norm], value: 0}]"
    models = "{target: ./target, rl: ./rl, sft: ./sft}"
    recipe.write_text(
        f"skillmerge: 1\nmodels: {models}\ncoefficients: {{lam: {{rules: {rules}}}}}\n"
        "merge: target + lam * (rl - sft)\n"
    )
    found = re.search(r"← (\d+) tensors?, (\d+) tensors?", build(plan=skillmerge.plan(recipe)))
    assert found is not None


def test_a_report_is_not_put_into_an_output(family: Path) -> None:
    assert run_cli("apply", family, "-q").returncode == 0
    process = run_cli("plan", family, "--report", family.parent / "merged" / "report.html")
    assert process.returncode == 2
    assert "inside an output" in process.stderr
    assert run_cli("verify", family.parent / "merged").returncode == 0


def test_names_and_words_are_escaped(tmp_path: Path) -> None:
    name = "model.layers.0.<img src=x onerror=alert(1)>\"'&.weight"
    for seed, model in enumerate(("target", "rl", "sft")):
        write_checkpoint(tmp_path / model, random_tensors({name: (4, 4)}, seed=seed))
    recipe = write_recipe(tmp_path).rename(tmp_path / "<script>alert(3).yaml")
    recipe.write_text(recipe.read_text() + "# </pre><script>alert(2)</script>\n")
    found = inspect(recipe)
    text = build(plan=found.plan, inspection=found)
    assert "<img" not in text
    assert "<script>alert" not in text
    assert html.escape(name) in text


def test_report_replaces_reports_only(family: Path) -> None:
    (family.parent / "notes.html").write_text("my notes")
    process = run_cli("plan", family, "--report", family.parent / "notes.html")
    assert process.returncode == 2
    assert "is not what --report writes" in process.stderr
    assert (family.parent / "notes.html").read_text() == "my notes"
    process = run_cli("inspect", family, "--report", family.parent / "nowhere" / "report.html")
    assert process.returncode == 2
    assert "is not a folder" in process.stderr
    assert process.stdout == ""
    assert run_cli("plan", family, "--report", "x" * 300 + ".html").returncode == 2
    for _ in range(2):
        assert run_cli("plan", family, "--report", family.parent / "report.html").returncode == 0
    skill = skillmerge.extract(str(family.parent / "rl"), str(family.parent / "sft"), family.parent / "math").output
    assert run_cli("inspect", skill, "--report", family.parent / "skill.html").returncode == 0


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0.0009), (-3.2, 8), (0, 0), (0, 1e6), (-5, -1), (0, 99)])
def test_ticks_are_few_and_hold_the_values(low: float, high: float) -> None:
    ticks = _ticks(low, high)
    assert 2 <= len(ticks) <= 8
    assert ticks[0] <= low + 1e-12
    assert ticks[-1] >= high - 1e-12


def test_figures_of_directions_are_those_that_are_computed() -> None:
    assert tuple(SPECTRAL) == spectrum.SPECTRUM_KEYS


def shapes_of_all_kinds() -> dict[str, tuple[int, ...]]:
    block = {"self_attn.q_proj": (8, 8), "mlp.up_proj": (8, 8), "input_layernorm": (8,), "extra.thing": (8, 8)}
    layers = {f"model.layers.{layer}.{name}.weight": shape for layer in (3, 10) for name, shape in block.items()}
    return {"model.embed_tokens.weight": (16, 8), **layers, "lm_head.weight": (16, 8)}


def test_report_shows_what_stands_in_backticks_as_code(tmp_path: Path) -> None:
    for seed, name in enumerate(("a", "b")):
        write_checkpoint(tmp_path / name, random_tensors({"model.layers.0.mlp.up_proj.weight": (8, 8)}, seed=seed))
    assert run_cli("inspect", "a", "b", "--report", "page.html", cwd=tmp_path).returncode == 0
    text = (tmp_path / "page.html").read_text()
    assert "<b>warning</b> <code>model.layers.0.mlp.up_proj.weight</code> changes by " in text


def test_report_has_a_lambda_where_the_recipe_has_none(tmp_path: Path) -> None:
    recipe = write_family(tmp_path, shapes_of_all_kinds())
    write_recipe(tmp_path, "(1 - lam) * target + lam * rl", models={"target": "target", "rl": "rl"})
    assert run_cli("apply", recipe, "--report", tmp_path / "page.html").returncode == 0
    text = (tmp_path / "page.html").read_text()
    rounding = text.partition("<h2>Effect of rounding</h2>")[2].partition("</section>")[0]
    assert "<th scope=row>mlp<td>1<td>" in rounding
    assert "–" not in rounding


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_maps_of_six_kinds_are_whole_at_1000_pixels(tmp_path: Path) -> None:
    recipe = write_family(tmp_path, shapes_of_all_kinds())
    assert run_cli("apply", recipe, "--report", tmp_path / "page.html").returncode == 0
    cut = """<script>document.title = "cut: " + [...document.querySelectorAll(".maps .scroll, .maps > *")]
      .filter((it) => it.scrollWidth > it.clientWidth + 1).length;</script>"""
    page = tmp_path / "tried.html"
    page.write_text((tmp_path / "page.html").read_text().replace("</body>", cut + "</body>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--window-size=1000,900", "--dump-dom", page.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    assert "<title>cut: 0</title>" in shown


def test_many_experts_share_columns() -> None:
    values = {(f"model.layers {layer}", expert): float(expert) for layer in range(2) for expert in range(70)}
    drawn = _over_experts("by expert", "", values)
    assert drawn.columns[:2] == ("0–2", "3–5")
    assert drawn.columns[-1] == "69"
    assert len(drawn.columns) == 24
    assert drawn.values["model.layers 1", "3–5"] == 4
    assert draw(drawn).count("<th scope=col>") == 25
