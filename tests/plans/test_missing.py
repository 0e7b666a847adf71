"""Models that are not where a recipe or a command says: what is said of it, whole, in every command."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import run_cli, write_family

from skillmerge.checkpoints.missing import missing, near_path
from skillmerge.checkpoints.place import instead_on_hub

RECIPE = """skillmerge: 1
models:
  target: ../m/target
  rl: {rl}
  sft: ../m/sft
coefficients: {{lam: 1}}
merge: target + lam * (rl - sft)
output: {{path: ./out}}
"""
HUB = "to read it from the Hub, write `hf://Qwen/Qwen2.5-7B`"
PLACES = {
    "../m/rll": ("model `rl`: folder `../m/rll` does not exist", "did you mean `../m/rl`?", 4),
    "../M/rl": ("model `rl`: folder `../M/rl` does not exist", "did you mean `../m/rl`?", 4),
    "../m/other": ("model `rl`: folder `../m/other` does not exist", "`../m` holds `rl`, `sft`, `target`", 4),
    "nowhere/at/all": (
        "model `rl`: folder `nowhere/at/all` does not exist",
        "a model is a folder with *.safetensors and config.json", 4,
    ),
    "../m/rl/model.safetensors": (
        "model `rl`: `../m/rl/model.safetensors` is a file, not a folder", "name its folder: `../m/rl`", 4
    ),
    "Qwen/Qwen2.5-7B": ("model `rl`: folder `Qwen/Qwen2.5-7B` does not exist", HUB, 4),
    "Qwen/Qwen2.5-7B@v1": (
        "model `rl`: folder `Qwen/Qwen2.5-7B@v1` does not exist",
        "to read it from the Hub, write `hf://Qwen/Qwen2.5-7B@v1`", 4,
    ),
    "huggingface.co/Qwen/Qwen2.5-7B": ("model `rl`: folder `huggingface.co/Qwen/Qwen2.5-7B` does not exist", HUB, 4),
    "https://huggingface.co/Qwen/Qwen2.5-7B": ("`https://` is not a place that skillmerge reads", HUB, 2),
    "hf://Qwen": (
        "`hf://Qwen` is not a model on the Hub",
        "write `hf://org/name`, `hf://org/name@revision` or `hf://org/name@revision/subfolder`", 2,
    ),
    "hf://Qwen/Qwen2.5-7B/tree/main": (
        "`hf://Qwen/Qwen2.5-7B/tree/main` is the address of a page, not of a model", HUB, 2
    ),
    "file:///data/rl": ("`file://` is not a place that skillmerge reads", "write the path alone: `/data/rl`", 2),
    "hff://a/b": ("`hff://` is not a place that skillmerge reads", "did you mean `hf://a/b`?", 2),
    "hf://datasets/a/b": ("`hf://datasets/a/b` is a data set, not a model", "name a model: `hf://org/name`", 2),
    "hf://spaces/a/b": ("`hf://spaces/a/b` is a Space, not a model", "name a model: `hf://org/name`", 2),
    "hf://buckets/a/b/c": ("`hf://buckets/a/b/c` is a storage bucket, not a model", "name a model: `hf://org/name`", 2),
    "hf://models/a/b": (
        "`hf://models/a/b` is the address of a page, not a model", "to read the model, write `hf://a/b`", 2
    ),
    "hf://a/b@v1/sub/model.safetensors": (
        "`hf://a/b@v1/sub/model.safetensors` is a file, not a model", "name its folder: `hf://a/b@v1/sub`", 2
    ),
    "hf:///a/b": ("`hf:///a/b` is not a model on the Hub", "to read it from the Hub, write `hf://a/b`", 2),
    "hf://a/b?x=1": ("`hf://a/b?x=1` is not a model on the Hub", "to read it from the Hub, write `hf://a/b`", 2),
    "hf://a/b:v1": ("`hf://a/b:v1` is not a model on the Hub", "to read it from the Hub, write `hf://a/b@v1`", 2),
    "hf://a/b/../c": (
        "`hf://a/b/../c` has a revision or subfolder that cannot be",
        "write `hf://org/name`, `hf://org/name@revision` or `hf://org/name@revision/subfolder`", 2,
    ),
    "HF://a/b": ("`HF://` is not a place that skillmerge reads", "did you mean `hf://a/b`?", 2),
    "ftp://host/rl": (
        "`ftp://` is not a place that skillmerge reads",
        "a model is a folder, `hf://org/name` on the Hub, or `s3://`, `gs://` or `az://` and a bucket's name", 2,
    ),
}  # fmt: skip
ADDRESSES = {
    "https://huggingface.co/a/b": "hf://a/b",
    "https://huggingface.co/a/b/": "hf://a/b",
    "https://huggingface.co/a/b/tree/main": "hf://a/b",
    "https://huggingface.co/a/b/tree/v1/sub/dir": "hf://a/b@v1/sub/dir",
    "https://huggingface.co/a/b/tree/x%2Fy": "hf://a/b@x%2Fy",
    "https://huggingface.co/a/b/blob/main/config.json": "hf://a/b",
    "https://huggingface.co/a/b/resolve/abc/sub/model.safetensors?download=true": "hf://a/b@abc/sub",
    "https://huggingface.co/a/b/commit/abc": "hf://a/b@abc",
    "https://huggingface.co/a/b/discussions/3": "hf://a/b",
    "https://huggingface.co/api/models/a/b": "hf://a/b",
    "https://hf.co/a/b/tree/refs%2Fpr%2F3": "hf://a/b@refs/pr/3",
    "https://hf-mirror.com/a/b": "hf://a/b",
    "git@hf.co:a/b.git": "hf://a/b",
    "hf:a/b": "hf://a/b",
    "hf.co/a/b": "hf://a/b",
}


@pytest.fixture
def trees(tmp_path: Path) -> Path:
    write_family(tmp_path / "m", shards=1)
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "recipe.yaml").write_text(RECIPE.format(rl="../m/rl"))
    return tmp_path


def shown(place: str, message: str, fix: str) -> str:
    width = len(place)
    return f"error: recipe.yaml:4:7: {message}\n    4 |   rl: {place}\n      |       {'^' * width}\nhelp: {fix}\n"


@pytest.mark.parametrize("place", PLACES)
def test_missing_model_is_told_at_its_place_in_every_command(trees: Path, place: str) -> None:
    work, (message, fix, status) = trees / "w", PLACES[place]
    (work / "recipe.yaml").write_text(RECIPE.format(rl=place))
    commands = (
        "plan recipe.yaml", "apply recipe.yaml -q", "inspect recipe.yaml",
        "sweep recipe.yaml --set lam=0:1:1 --score true",
    )  # fmt: skip
    for command in commands:
        process = run_cli(*command.split(), cwd=work)
        told = shown(place, message, fix)
        assert (process.returncode, process.stderr) == (status, told), command


@pytest.mark.parametrize("place", PLACES)
def test_missing_model_on_the_command_line_is_told_by_its_path(trees: Path, place: str) -> None:
    message, fix, status = PLACES[place]
    told = f"error: {message.removeprefix('model `rl`: ')}\nhelp: {fix}\n"
    for command in (f"extract --from {place} --minus ../m/sft -o out", f"inspect ../m/sft {place}"):
        process = run_cli(*command.split(), cwd=trees / "w")
        assert (process.returncode, process.stderr) == (status, told)


@pytest.mark.parametrize("address", ADDRESSES)
def test_missing_address_of_the_hub_has_a_form_of_ours(address: str) -> None:
    assert instead_on_hub(address) == f"to read it from the Hub, write `{ADDRESSES[address]}`"


def test_missing_address_that_is_none_of_the_hubs_stays_unknown() -> None:
    for address in ("https://example.com/a/b", "a/b", "./a/b", "https://huggingface.co/gpt2", "https://huggingface.co"):
        assert instead_on_hub(address) is None
    assert instead_on_hub("https://huggingface.co/datasets/a/b") == "name a model: this is a data set"


OUTPUTS = {
    "verify ot": "folder ot does not exist", "gate ot": "folder ot does not exist",
    "rebuild ot --check": "folder ot does not exist", "push ot a/b": "folder ot does not exist",
    "sign ot --private-key k": "folder ot does not exist", "attest ot": "folder ot does not exist",
}  # fmt: skip


@pytest.mark.parametrize("command", OUTPUTS)
def test_missing_output_is_told_with_names_near_it(trees: Path, command: str) -> None:
    (trees / "w" / "out").mkdir()
    process = run_cli(*command.split(), cwd=trees / "w")
    assert (process.returncode, process.stderr) == (2, f"error: {OUTPUTS[command]}\nhelp: did you mean `out`?\n")
    told = run_cli(*command.replace("ot", "hf://a/b", 1).split(), cwd=trees / "w").stderr
    fetch = "fetch it first: `hf download a/b --local-dir FOLDER`"
    assert told == f"error: hf://a/b is on the Hub, not a folder\nhelp: {fetch}\n"


@pytest.mark.parametrize("command", ["plan", "apply", "inspect", "lint"])
def test_missing_recipe_is_told_with_names_near_it(trees: Path, command: str) -> None:
    process = run_cli(command, "recip.yaml", cwd=trees / "w")
    assert process.returncode == 2
    message, fix = "recip.yaml does not exist", "did you mean `recipe.yaml`?"
    if command == "lint":
        assert process.stdout.startswith(f"recip.yaml: error: does not exist [invalid-recipe]\nhelp: {fix}\n")
    else:
        assert process.stderr == f"error: {message}\nhelp: {fix}\n"


def test_missing_models_of_a_moved_output_name_the_option_that_finds_them(trees: Path) -> None:
    assert run_cli("apply", "recipe.yaml", cwd=trees / "w").returncode == 0
    (trees / "a" / "b").mkdir(parents=True)
    shutil.copytree(trees / "w" / "out", trees / "a" / "b" / "out")
    process = run_cli("rebuild", "out", "--check", cwd=trees / "a" / "b")
    assert (process.returncode, process.stderr) == (
        4,
        "error: the recipe in the manifest:3:11: model `target`: folder `../m/target` does not exist\n"
        "    3 |   target: ../m/target\n      |           ^^^^^^^^^^^\n"
        "help: pass `--base-folder FOLDER`, the folder that the recipe's relative paths now start from\n",
    )
    assert run_cli("rebuild", "out", "--check", "--base-folder", trees / "w", cwd=trees / "a" / "b").returncode == 0


def test_missing_model_below_a_misspelt_folder_keeps_what_is_below(trees: Path) -> None:
    (trees / "models").symlink_to("m")
    process = run_cli("inspect", "../model/sft", "../m/rl", cwd=trees / "w")
    assert process.stderr == "error: folder `../model/sft` does not exist\nhelp: did you mean `../models/sft`?\n"


def test_misspelt_folder_above_what_was_written_is_not_guessed_at(tmp_path: Path) -> None:
    """Found by flipping bits of a saved plan: a recipe's own folder was gone, and looking for near names failed."""
    (tmp_path / "models").mkdir()
    assert near_path(tmp_path / "modelz" / "deep" / "target", "target") is None


def test_a_home_folder_is_told_as_it_was_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    found = missing(Path("~/rl").expanduser(), "~/rl")
    assert found is not None
    assert found[0] == f"folder `~/rl` (`{tmp_path}/rl`) does not exist"


def test_base_beside_the_recipe_is_suggested(tmp_path: Path) -> None:
    """Found by a newcomer: `--base` starts at the working folder, which holds something else."""
    write_family(tmp_path / "demo")
    for index in range(30):
        (tmp_path / f"other{index:02}").mkdir()
    shutil.copytree(tmp_path / "demo" / "sft", tmp_path / "demo" / "ancestor")
    done = run_cli("inspect", "demo/recipe.yaml", "--base", "ancestor", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (
        4,
        "error: folder `ancestor` does not exist\nhelp: did you mean `demo/ancestor`? `--base` starts at the working "
        "folder, paths in a recipe start at the recipe's\n",
    )
    assert run_cli("inspect", "demo/recipe.yaml", "--base", "demo/ancestor", cwd=tmp_path).returncode == 0
    done = run_cli("inspect", "demo/recipe.yaml", "--base", "nothing", cwd=tmp_path)
    assert done.stderr.splitlines()[1] == (
        "help: `.` holds `demo`, `other00`, `other01`, `other02`, `other03` … and 26 more"
    )
