"""Lint: every mistake of every recipe with its place; warnings that are certain; the same as JSON and SARIF."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import run_cli, write_recipe
from schemas import fits_sarif

from skillmerge.cli.show.sarif import document
from skillmerge.errors import UsageError
from skillmerge.recipes.lint import lint
from skillmerge.recipes.lint_rules import RULES

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"

CLEAN = f"""\
skillmerge: 1
models:
  target: ./target
  rl: hf://acme/rl@{COMMIT}
  sft: ./sft
coefficients:
  lam: 0.7
merge: target + lam * (rl - sft)
output: {{path: ./merged}}
"""


def write(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def found(path: Path, *also: str) -> list[tuple[str, int | None, int | None]]:
    """Rule, line and column of each finding."""
    rows = [finding.as_dict() for finding in lint([path, *also]).findings]
    return [(row["rule"], row["line"], row["column"]) for row in rows]


def scheduled(rules: str, default: float = 1.0) -> str:
    return CLEAN.replace("  lam: 0.7", f"  lam:\n    default: {default}\n    rules:\n{rules}")


def test_lint_of_a_sound_recipe_finds_nothing(tmp_path: Path) -> None:
    assert found(write(tmp_path, CLEAN)) == []


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_ready_recipes_have_nothing_but_revisions_to_pin(path: Path) -> None:
    assert {rule for rule, _, _ in found(path)} <= {"unpinned-revision"}


def test_lint_tells_all_mistakes_of_all_recipes(tmp_path: Path) -> None:
    first = write(
        tmp_path,
        CLEAN.replace("  lam: 0.7", "  lam: high\n  mu: {default: 1, roles: []}").replace("path:", "paht:"),
    )
    second = write(
        tmp_path,
        scheduled("      - {value: 1}\n      - {layers: 4-2, value: 1}\n").replace("(rl - sft)", "(rl - stf)"),
        "second.yaml",
    )
    rows = [finding.as_dict() for finding in lint([first, second]).findings]
    assert [(Path(row["file"]).name, row["line"], row["column"]) for row in rows] == [
        ("recipe.yaml", 7, 8),
        ("recipe.yaml", 8, 20),
        ("recipe.yaml", 10, 10),
        ("second.yaml", 10, 9),
        ("second.yaml", 11, 18),
        ("second.yaml", 13, 29),
    ]
    assert {row["rule"] for row in rows} == {"invalid-recipe"}
    assert rows[2]["fix"] == "did you mean `path`?"


def test_a_misspelt_key_is_not_told_as_a_missing_one_too(tmp_path: Path) -> None:
    assert found(write(tmp_path, CLEAN.replace("\nmerge:", "\nmrege:"))) == [("invalid-recipe", 8, 1)]


def test_yaml_that_is_no_recipe_is_not_told_key_by_key(tmp_path: Path) -> None:
    path = write(tmp_path, "when: push\ntasks: {}\nsteps: []\n")
    first, second = lint([path]).findings
    assert first.message == "unknown key `when`"
    assert (second.message, second.fix) == ("missing key `skillmerge`", "start the recipe with `skillmerge: 1`")


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00", b"a: [", b"", b'{\n "ok": true}'])
def test_what_cannot_be_read_is_a_finding_and_does_not_stop_the_others(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "odd.yaml"
    if content is not None:
        path.write_bytes(content)
    other = write(tmp_path, CLEAN.replace("rl - sft", "rl - stf"))
    assert [rule for rule, _, _ in found(path, str(other))] == ["invalid-recipe", "invalid-recipe"]


def test_a_place_that_nothing_reads_is_an_error_even_where_it_is_not_used(tmp_path: Path) -> None:
    assert ("invalid-recipe", 3, 11) in found(write(tmp_path, CLEAN.replace("./target", "ftp://bucket/it")))
    assert ("invalid-recipe", 6, 8) in found(write(tmp_path, CLEAN.replace("coeff", "  old: hf://x\ncoeff")))


def test_a_revision_that_can_change_is_told_unless_it_is_locked(tmp_path: Path) -> None:
    path = write(tmp_path, CLEAN.replace(f"@{COMMIT}", "@main"))
    assert found(path) == [("unpinned-revision", 4, 3)]
    lock = {"lock_version": 1, "models": {"rl": {"uri": "hf://acme/rl@main", "commit": COMMIT, "files": []}}}
    (tmp_path / "recipe.lock").write_text(json.dumps(lock))
    assert found(path) == []
    write(tmp_path, CLEAN.replace(f"@{COMMIT}", "@other"))
    assert found(path) == [("stale-lock", 4, 3)]
    (tmp_path / "recipe.lock").write_text("{")
    assert found(path) == [("stale-lock", None, None)]


def test_a_lock_of_another_commit_than_the_pinned_one_is_stale(tmp_path: Path) -> None:
    path = write(tmp_path, CLEAN)
    lock = {"lock_version": 1, "models": {"rl": {"uri": f"hf://acme/rl@{COMMIT}", "commit": "f" * 40, "files": []}}}
    (tmp_path / "recipe.lock").write_text(json.dumps(lock))
    assert found(path) == [("stale-lock", 4, 3)]


def test_names_that_do_nothing_are_told_with_their_keys(tmp_path: Path) -> None:
    text = CLEAN.replace("coefficients:", "  old: ./old\ncoefficients:\n  \u00b5: 2")
    assert found(write(tmp_path, text)) == [("unused-name", 6, 3), ("unused-name", 8, 3)]


@pytest.mark.parametrize("gate", ["cosine_z: {max: 5, base: old}", "perplexity: {text: t, max_ratio: 2, of: old}"])
def test_a_model_of_a_gate_is_used(tmp_path: Path, gate: str) -> None:
    text = CLEAN.replace("coeff", "  old: ./old\ncoeff")
    assert found(write(tmp_path, text)) == [("unused-name", 6, 3)]
    assert found(write(tmp_path, f"{text}gates:\n  {gate}\n")) == []


def test_two_names_of_one_model_are_told(tmp_path: Path) -> None:
    assert found(write(tmp_path, CLEAN.replace("./sft", "./target"))) == [("same-model", 5, 3)]


@pytest.mark.parametrize(
    ("rule", "later", "hidden"),
    [
        ("layers: 0-3, value: 1", "layers: 0-5, value: 0", True),
        ("layers: 0-3, value: 1", "layers: 0-2, value: 0", False),
        ("layers: 0-6, value: 1", 'layers: "0-2,3-", value: 0', True),
        ("layers: 0-6, value: 1", 'layers: "0-2,4-", value: 0', False),
        ("layers: 4-, value: 1", "layers: 4-9, value: 0", False),
        ("tensors: '*.mlp.*', value: 1", "tensors: ['*.mlp.*', '*.norm.*'], value: 0", True),
        ("tensors: '*.mlp.*', value: 1", "tensors: '*.mlp.up*', value: 0", False),
        ("tensors: '*.mlp.*', value: 1", "tensors: '*', value: 0", True),
        ("modules: mlp, value: 1", "modules: [mlp, norm], value: 0", True),
        ("modules: [mlp, norm], value: 1", "modules: mlp, value: 0", False),
        ("modules: mlp, value: 1", "modules: mlp, layers: 0-, value: 0", False),
        ("modules: mlp, layers: 2, value: 1", "layers: 0-, value: 0", True),
        ("experts: 0-3, value: 1", "experts: 0-7, value: 0", True),
        ("experts: 0-3, value: 1", "experts: 0-2, value: 0", False),
        ("experts: 0-3, layers: 2, value: 1", "experts: 0-, value: 0", True),
        ("modules: expert, value: 1", "experts: 0-, value: 0", False),
        ("experts: 0-3, value: 1", "modules: expert, value: 0", False),
        ("experts: 0-3, value: 1", "layers: 0-, experts: 0-, value: 0", False),
        ("ramp: [0, 1], modules: mlp", "layers: 0-, value: 0", True),
        ("tensors: '*', value: 1", "layers: 0-, value: 0", False),
        ("tensors: '*', value: 1", "modules: mlp, ramp: [0, 1]", False),
        ("experts: 1-3, value: 1", "experts: 0-, value: 0", True),
        ("experts: 1-3, value: 1", "experts: '1,3', value: 0", False),
        ("experts: 1-3, value: 1", "modules: expert, experts: 0-, value: 0", False),
        ("layers: 2, value: 1", "layers: 2, experts: 0-, value: 0", False),
    ],
)
def test_a_rule_that_a_later_one_covers_is_told_and_no_other(
    tmp_path: Path, rule: str, later: str, hidden: bool
) -> None:
    path = write(tmp_path, scheduled(f"      - {{{rule}}}\n      - {{{later}}}\n"))
    assert found(path) == ([("hidden-rule", 10, 9)] if hidden else [])


@pytest.mark.parametrize(
    ("merge", "wrong"),
    [
        ("rl - sft", True),
        ("target + rl - lam * sft", True),
        ("target + lam * (rl - sft) / 0", True),
        ("(target + rl + sft) / 3 * lam / 0.7", False),
        ("target + lam * rl - lam * sft", False),
    ],
)
def test_an_expression_that_cannot_be_one_model_is_an_error(tmp_path: Path, merge: str, wrong: bool) -> None:
    rules = [rule for rule, _, _ in found(write(tmp_path, CLEAN.replace("target + lam * (rl - sft)", merge)))]
    assert ("not-one-model" in rules) == wrong


def test_an_expression_that_some_values_make_one_model_is_left_to_the_plan(tmp_path: Path) -> None:
    text = scheduled("      - {modules: mlp, value: 0}\n", 0.5).replace("lam * (rl - sft)", "lam * rl")
    assert found(write(tmp_path, text.replace("  sft: ./sft\n", ""))) == []


def test_a_skill_is_a_difference_and_a_model_is_none(tmp_path: Path) -> None:
    text = CLEAN.replace("{path: ./merged}", "{path: ./skill, kind: skill}")
    assert [rule for rule, _, _ in found(write(tmp_path, text))] == ["not-one-model"]
    assert found(write(tmp_path, text.replace("target + ", "").replace("  target: ./target\n", ""))) == []


def test_a_large_factor_is_told_where_it_is_given(tmp_path: Path) -> None:
    assert found(write(tmp_path, CLEAN.replace("lam: 0.7", "lam: 70"))) == [("large-factor", 7, 3)]
    text = scheduled("      - {layers: 0-3, value: 0.5}\n      - {layers: 4-, ramp: [1, 50]}\n")
    assert found(write(tmp_path, text)) == [("large-factor", 11, 22)]
    assert found(write(tmp_path, text.replace("lam *", "lam / 100 *"))) == []
    text = CLEAN.replace("lam: 0.7", "lam: 70").replace("(rl - sft)", "trim(rl - sft, density=0.3)")
    assert found(write(tmp_path, text)) == [("large-factor", 7, 3)]


def test_negative_weights_of_an_election_are_told_where_they_are_called(tmp_path: Path) -> None:
    merge = "target + lam * (rl - sft)"
    text = CLEAN.replace(merge, "target + elect(rl - sft, target - sft, weights=[1, lam])")
    assert found(write(tmp_path, text)) == []
    assert found(write(tmp_path, text.replace("0.7", "-0.7"))) == [("negative-weight", 8, 17)]
    rules = scheduled("      - {layers: 4-, ramp: [1, -0.1]}\n").replace(
        merge, "target + ties(rl - sft, density=1, weights=lam)"
    )
    (finding,) = lint([write(tmp_path, rules)]).findings
    assert finding.message == (
        "the expression has negative `weights` in `ties`: one turns the signs of its difference around and lowers "
        "what a normalized sum is divided by"
    )
    assert finding.fix == "if that is meant, write the difference the other way around, with a positive number"
    assert (
        found(
            write(
                tmp_path,
                text.replace("0.7", "-0.7").replace(
                    "elect(rl - sft, target - sft", "0.5 * multislerp(rl - sft, target - sft"
                ),
            )
        )
        == []
    )


def test_a_recipe_without_a_place_for_its_output_is_told(tmp_path: Path) -> None:
    text = CLEAN.replace("output: {path: ./merged}\n", "")
    assert [rule for rule, _, _ in found(write(tmp_path, text))] == ["no-output"]
    assert found(write(tmp_path, text + "output: {push: {repo: a/b}}\n")) == []


def test_lint_exits_2_for_errors_and_for_warnings_where_they_are_strict(tmp_path: Path) -> None:
    path = write(tmp_path, CLEAN.replace(f"@{COMMIT}", ""))
    process = run_cli("lint", path)
    assert process.returncode == 0
    assert f"{path}:4:3: warning: model `rl` is the default branch of acme/rl [unpinned-revision]" in process.stdout
    assert "      |   ^^" in process.stdout
    assert run_cli("lint", "--strict", path).returncode == 2
    assert run_cli("lint", "--strict", "--allow", "unpinned-revision", path).returncode == 0
    assert run_cli("lint", path, write(tmp_path, "a: 1", "b.yaml")).returncode == 2


@pytest.mark.parametrize("rule", ["invalid-recipe", "unpined-revision"])
def test_only_warnings_can_be_allowed(rule: str) -> None:
    with pytest.raises(UsageError, match=rule):
        lint([], allow=[rule])


def test_lint_prints_one_json_object(tmp_path: Path) -> None:
    path = write(tmp_path, CLEAN.replace("./target", "ftp://it"))
    process = run_cli("lint", path, "--json")
    result = json.loads(process.stdout)
    assert process.returncode == 2
    assert (result["ok"], result["files"], result["errors"], result["warnings"]) == (False, 1, 1, 0)
    assert result["findings"][0] == {
        "file": str(path), "line": 3, "column": 11, "end_column": 19, "level": "error", "rule": "invalid-recipe",
        "message": "`ftp://` is not a place that skillmerge reads",
        "fix": "a model is a folder, `hf://org/name` on the Hub, or `s3://`, `gs://` or `az://` and a bucket's name",
    }  # fmt: skip


def test_every_rule_of_lint_is_documented() -> None:
    text = (ROOT / "docs" / "commands.md").read_text()
    assert [rule for rule in RULES if f"`{rule}`" not in text] == []


def sarif(*paths: Path) -> dict[str, Any]:
    return document(lint(paths))


def test_sarif_names_places_relative_to_the_sources_and_fits_the_published_schema(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a b").mkdir()
    monkeypatch.chdir(tmp_path)
    bad = write(tmp_path / "a b", CLEAN.replace("path:", "paht:").replace("lam: 0.7", "lam: 70"), "ü.yaml")
    warned = write(tmp_path, CLEAN.replace(f"@{COMMIT}", ""))
    log = sarif(bad, warned, tmp_path / "none.yaml")
    fits_sarif(log)
    (run,) = log["runs"]
    results = run["results"]
    assert [result["ruleId"] for result in results] == ["invalid-recipe", "unpinned-revision", "invalid-recipe"]
    for result in results:
        assert run["tool"]["driver"]["rules"][result["ruleIndex"]]["id"] == result["ruleId"]
    places = [result["locations"][0]["physicalLocation"] for result in results]
    assert places[0]["artifactLocation"] == {"uri": "a%20b/%C3%BC.yaml", "uriBaseId": "%SRCROOT%"}
    assert places[0]["region"] == {"startLine": 9, "startColumn": 10, "endColumn": 14}
    assert places[2]["region"] == {"startLine": 1}
    assert results[1]["level"] == "warning"


def test_sarif_of_a_file_elsewhere_has_its_whole_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, CLEAN)
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    (artifact,) = sarif(path)["runs"][0]["artifacts"]
    assert artifact == {"location": {"uri": path.as_uri()}}


def test_sarif_is_written_also_where_nothing_is_wrong(tmp_path: Path) -> None:
    path = write(tmp_path, CLEAN)
    target = tmp_path / "lint.sarif"
    assert run_cli("lint", path, "--sarif", target).returncode == 0
    log = json.loads(target.read_text())
    assert log["runs"][0]["results"] == []
    fits_sarif(log)


def test_hook_manifest_is_what_pre_commit_reads_and_selects_recipes() -> None:
    clientlib = pytest.importorskip("pre_commit.clientlib")
    (hook,) = clientlib.load_manifest(str(ROOT / ".pre-commit-hooks.yaml"))
    assert (hook["id"], hook["language"], hook["types"]) == ("skillmerge-lint", "python", ["yaml"])
    import re

    def selects(name: str) -> bool:
        return re.search(hook["files"], name) is not None

    for name in ("recipe.yaml", "recipes/past.yaml", "a/recipes/b/c.yml", "past.recipe.yaml", "recipe-a.yml"):
        assert selects(name), name
    for name in ("docker-compose.yaml", ".github/workflows/a.yaml", "recipe.json", "notrecipe.yaml", "recipes.md"):
        assert not selects(name), name


ALONE = """
import sys

class OnlyWhatTheHookInstalls:
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top not in sys.stdlib_module_names | {allowed} and not top.startswith("_"):
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, OnlyWhatTheHookInstalls())
from skillmerge.cli.main import main
main()
"""


def test_hook_runs_under_pre_commit_with_only_what_it_installs(tmp_path: Path) -> None:
    """pre-commit itself, with its own choice of files. The environment is this one instead of a fresh one, and what the
    hook does not install cannot be imported: no torch, no numpy, no client of the Hub."""
    clientlib = pytest.importorskip("pre_commit.clientlib")
    (hook,) = clientlib.load_manifest(str(ROOT / ".pre-commit-hooks.yaml"))
    first, *pins = hook["additional_dependencies"]
    assert first == "--no-deps"
    allowed = {"skillmerge"} | {pin.split("==")[0].replace("-", "_").split(".")[0] for pin in pins}
    program = tmp_path / "alone.py"
    program.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{ALONE.replace('{allowed}', repr(allowed))}")
    entry = hook["entry"].replace("skillmerge", f"{sys.executable} {program}", 1)
    local = {key: hook[key] for key in ("id", "name", "files", "types", "require_serial")}
    config = {"repos": [{"repo": "local", "hooks": [{**local, "entry": entry, "language": "system"}]}]}
    (tmp_path / ".pre-commit-config.yaml").write_text(json.dumps(config))
    (tmp_path / "recipes").mkdir()
    write(tmp_path / "recipes", CLEAN, "a b.yaml")
    write(tmp_path, "not: a recipe\n", "other.yaml")
    environment = {**os.environ, "PRE_COMMIT_HOME": str(tmp_path / "cache"), "GIT_CONFIG_GLOBAL": os.devnull}

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    run("git", "init", "-q")
    run("git", "add", ".")
    passed = run(sys.executable, "-m", "pre_commit", "run", "--all-files")
    assert (passed.returncode, "Passed" in passed.stdout) == (0, True), passed.stdout + passed.stderr
    write(tmp_path / "recipes", CLEAN.replace("\nmerge:", "\nmrege:"), "bad.yaml")
    run("git", "add", ".")
    failed = run(sys.executable, "-m", "pre_commit", "run", "--all-files")
    assert failed.returncode == 1
    assert "recipes/bad.yaml:8:1: error: unknown key `mrege`" in failed.stdout
    assert "other.yaml" not in failed.stdout


def test_formula_that_does_not_show_its_donor_is_told(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "target + rl - sft", coefficients=None)
    (finding,) = lint(recipe).findings
    assert (finding.rule.id, finding.rule.level) == ("unclear-donor", "warning")
    assert finding.message.startswith("the donor is `target`, the first model that `target + rl - sft` adds")
    assert lint(write_recipe(tmp_path, "target + rl - sft", coefficients=None, accept=["donor"])).findings == ()
    assert lint(write_recipe(tmp_path, "target + (rl - sft)", coefficients=None)).findings == ()


def test_three_levels_are_counted_and_keep_their_names(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"x")
    changed = CLEAN.replace("./target", "./weights.safetensors").replace(f"@{COMMIT}", "")
    noted = write(tmp_path, changed, "noted.yaml")
    wrong = write(tmp_path, CLEAN.replace("path:", "paht:"), "wrong.yaml")
    process = run_cli("lint", "noted.yaml", "wrong.yaml", cwd=tmp_path)
    lines = process.stdout.splitlines()
    assert lines[0] == (
        "noted.yaml:3:3: note: model `target`: `./weights.safetensors` is a file, not a folder [missing-model]"
    )
    assert lines[3] == "help: name its folder: `.`"
    assert lines[-1] == "2 recipes: 1 error, 1 warning, 1 note"
    document = json.loads(run_cli("lint", noted, wrong, "--json").stdout)
    assert (document["errors"], document["warnings"], document["notes"]) == (1, 1, 1)
    (run,) = sarif(noted, wrong)["runs"]
    assert [result["level"] for result in run["results"]] == ["note", "warning", "error"]
    assert run_cli("lint", noted, "--strict", "--allow", "unpinned-revision").returncode == 0
