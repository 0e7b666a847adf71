"""Readable factories: tiny checkpoints of any dtype and shard layout, families of them, and recipes.

Weights are written with the safetensors library, never with skillmerge's own byte layer.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

# Before torch: its idle threads would spin, and take the cores from what runs beside them.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import huggingface_hub.constants  # noqa: F401 - made of the environment: before any test changes it
import ml_dtypes
import pytest
import torch
from bucket_server import s3  # noqa: F401 - a fixture
from command_server import Commands
from hub_server import HubServer
from model_families import FAMILIES, LAM, save_models
from observing import SHARDS, MergeServer, wide_shapes
from safetensors.torch import load_file, save_file

import skillmerge

PEAK_MEMORY = "1024 * int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
"""An expression for a process's own peak in bytes; ru_maxrss would begin with its parent's."""

LOADER = """import json, sys
from skillmerge.study.loads.load_probe import main
for line in sys.stdin:
    print(json.dumps(main(line.strip())), flush=True)
"""
PAST = "target + lam * (rl - sft)"
MODELS = ("target", "rl", "sft")


def tensor_shapes(layers: int = 3, hidden: int = 16, vocabulary: int = 32) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        block = f"model.layers.{layer}"
        shapes[f"{block}.self_attn.q_proj.weight"] = (hidden, hidden)
        shapes[f"{block}.mlp.up_proj.weight"] = (2 * hidden, hidden)
        shapes[f"{block}.input_layernorm.weight"] = (hidden,)
    return {**shapes, "model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def random_tensors(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.bfloat16, seed: int = 0, scale: float = 0.02
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(shape, generator=generator) * scale).to(dtype) for name, shape in shapes.items()}


def write_checkpoint(
    folder: Path, tensors: Mapping[str, torch.Tensor], *, shards: int = 1, config: Mapping[str, Any] | None = None
) -> Path:
    """A checkpoint folder as save_pretrained would write it."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    count = -(-len(names) // shards)
    weight_map = {}
    for number in range(shards):
        part = {name: tensors[name].contiguous() for name in names[number * count : (number + 1) * count]}
        file = "model.safetensors" if shards == 1 else f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(dict(config or {}), indent=2))
    return folder


def read_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, read with the safetensors library."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def numpy_of(folder: Path) -> dict[str, Any]:
    return {
        name: tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if tensor.dtype == torch.bfloat16
        else tensor.numpy()
        for name, tensor in read_checkpoint(folder).items()
    }  # fmt: skip


def copy_with(
    source: Path, folder: Path, drop: str = "", config: Mapping[str, Any] | None = None, **changed: torch.Tensor
) -> Path:
    """A copy of a model without one tensor, or with some added or replaced, or with other config keys."""
    tensors = {name: tensor for name, tensor in read_checkpoint(source).items() if name != drop} | changed
    document = json.loads((source / "config.json").read_text())
    return write_checkpoint(folder, tensors, config={**document, **(config or {})})


def flip(path: Path, position: int = -1, bit: int = 0, *, keep_times: bool = False) -> None:
    """Flip one bit of a file in place, with or without a trace in its times."""
    before = path.stat()
    with open(path, "rb+", buffering=0) as stream:
        place = position % before.st_size
        byte = os.pread(stream.fileno(), 1, place)[0]
        os.pwrite(stream.fileno(), bytes([byte ^ 1 << bit]), place)
    if keep_times:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def write_recipe(folder: Path, merge: str = PAST, **keys: Any) -> Path:
    """A recipe over folders target, rl and sft beside it; JSON is YAML."""
    document: dict[str, Any] = {
        "skillmerge": 1,
        "models": {"target": "target", "rl": "rl", "sft": "sft"},
        "coefficients": {"lam": 0.7},
        "merge": merge,
        "output": {"path": "merged"},
    }
    document |= keys
    path = folder / "recipe.yaml"
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not None}, indent=1))
    return path


def about_model(recipe: Path, name: str, message: str) -> str:
    """An error about a model of a recipe that `write_recipe` wrote: its place, the line, and a marker under it."""
    for number, line in enumerate(recipe.read_text().splitlines(), 1):
        if found := re.match(rf'\s*"{name}": ("[^"]*")', line):
            marker = " " * found.start(1) + "^" * len(found[1])
            return f"{recipe}:{number}:{found.start(1) + 1}: {message}\n{number:>5} | {line}\n      | {marker}"
    raise AssertionError(f"no model {name} in {recipe}")


def write_family(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    shards: int = 2,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """target, sft and rl in `folder`, and the PaST recipe over them; the recipe's path."""
    shapes = shapes or tensor_shapes()
    base = random_tensors(shapes, torch.float32)
    noise = {name: random_tensors(shapes, torch.float32, seed, 1e-3) for seed, name in enumerate(("target", "sft"), 1)}
    step = random_tensors(shapes, torch.float32, 9, 3e-4)
    for name in ("target", "sft", "rl"):
        added = noise["target" if name == "target" else "sft"]
        tensors = {key: value + added[key] + (step[key] if name == "rl" else 0) for key, value in base.items()}
        write_checkpoint(
            folder / name, {key: value.to(dtype) for key, value in tensors.items()}, shards=shards, config=config
        )
    return write_recipe(folder)


def put_family(hub: HubServer, folder: Path, *, shards: int = 2, **shapes: int) -> Path:
    """The same family as folders below `folder` and as repositories acme/...; the recipe of the folders."""
    for seed, model in enumerate(MODELS):
        tensors = random_tensors(tensor_shapes(**shapes), seed=seed)
        path = write_checkpoint(folder / model, tensors, shards=shards, config={"model_type": "odd"})
        (path / "tokenizer.json").write_text('{"x": "' + "y" * 20_000 + '"}')
        (path / "generation_config.json").write_text("{}")
        hub.create_from(f"acme/{model}", path)
    return write_recipe(folder)


def hub_recipe(folder: Path, **revisions: str) -> Path:
    """A recipe over the repositories of `put_family`."""
    folder.mkdir(exist_ok=True)
    models = {model: f"hf://acme/{model}{revisions.get(model, '')}" for model in MODELS}
    return write_recipe(folder, models=models)


def weights(folder: Path) -> dict[str, bytes]:
    """The files of an output that do not speak of how and where it was made."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith("skillmerge.")}


def qa(folder: Path, rows: list[dict[str, Any]]) -> str:
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    return f"qa:{folder / 'rows.jsonl'}"


def run_cli(*arguments: str | Path, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line as its user sees it, run in this process: exit status, stdout, stderr.

    Whatever the command starts prints into the same two. Environment, folder and torch's threads are as before.
    """
    from skillmerge.cli.main import run

    command, before, threads = ["skillmerge", *map(str, arguments)], dict(os.environ), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch, captured() as files:
        patch.setattr(sys, "argv", command)
        patch.chdir(cwd or Path.cwd())
        os.environ.update({"NO_COLOR": "1", "COLUMNS": "120", **environment})
        try:
            status = run()
        finally:
            os.environ.clear()
            os.environ.update(before)
            torch.set_num_threads(threads)
    _refuse_foreign_options(command, files[1])
    return subprocess.CompletedProcess(command, status, *files)


def _refuse_foreign_options(command: list[str], stderr: str) -> None:
    """What an error advises has to be possible: no option that the command lacks, but in a command line of its own."""
    from skillmerge.cli.main import cli
    from skillmerge.cli.usage import options_of

    own = options_of(next((cli.commands[word] for word in command[1:] if word in cli.commands), cli))
    for advice in re.findall(r"^help: (.*?)(?=^\w+: |\Z)", stderr, re.MULTILINE | re.DOTALL):
        outside = re.sub(r"`[a-z]\w* [^`]*`|\b(skillmerge|hf|openssl|pip|ulimit) .*", "", advice)
        foreign = {*re.findall(r"(?<![\w-])--?[a-z][\w-]*", outside)} - {*own}
        assert not foreign, f"{' '.join(command)}: it has no {foreign}: {advice}"


@contextmanager
def captured() -> Iterator[list[str]]:
    """Collect what the body and every process that it starts write to stdout and to stderr: two texts, at its end."""
    texts: list[str] = []
    with ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8")) for _ in range(2)]
        for number, file in enumerate(files, 1):
            file.reconfigure(errors="backslashreplace")
            kept = os.dup(number)
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, number)
            os.dup2(file.fileno(), number)
        with redirect_stdout(files[0]), redirect_stderr(files[1]):
            yield texts
        for file in files:
            file.flush()
            file.seek(0)
            texts.append(file.read())


def run_process(
    *arguments: str | Path, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, for what is about processes; see `run_cli`."""
    return subprocess.run(
        [sys.executable, "-m", "skillmerge", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "120", **environment},
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="session")
def server() -> Iterator[MergeServer]:
    process = MergeServer()
    yield process
    process.close()


@pytest.fixture(scope="session")
def commands() -> Iterator[Commands]:
    """Starts commands quickly, for scripts and for tests that kill and interrupt; nothing is started until then."""
    with TemporaryDirectory(prefix="skillmerge-") as name:  # the path of a socket has to be short
        server = Commands(Path(name))
        yield server
        server.close()


@pytest.fixture
def quick_loads(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:  # forks have imported transformers
    monkeypatch.setattr("skillmerge.study.loads.child.sys", SimpleNamespace(executable=commands.python))


@pytest.fixture(scope="session")
def transformers() -> Any:
    library = pytest.importorskip("transformers")
    library.utils.logging.disable_progress_bar()
    return library


@pytest.fixture(scope="session")
def families(transformers: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with target, sft, rl and merged of a family of `model_families`, made when first asked for."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            save_models(transformers, root, FAMILIES[name])
            skillmerge.apply(write_recipe(root, coefficients={"lam": LAM}), device="cpu")
            made[name] = root
        return made[name]

    return folder


@pytest.fixture(scope="session")
def load() -> Iterator[Callable[[Path], dict[str, Any]]]:
    """The load probe in a process of its own, which serves all loads: starting transformers takes seconds."""
    pytest.importorskip("transformers")
    pipe, environment = subprocess.PIPE, {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOADER]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(folder: Path) -> dict[str, Any]:
            print(folder, file=process.stdin, flush=True)
            return dict(json.loads(process.stdout.readline()))

        yield ask
        process.stdin.close()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built-in family, with half of the questions to choose by and half held out."""
    from skillmerge.verbs.demo.demo import write_family as write_demo
    from skillmerge.verbs.demo.miniature import questions

    folder = tmp_path_factory.mktemp("sweep") / "demo"
    write_demo(folder)
    rows = [
        json.dumps({"question": " ".join(question.words), "answer": question.wanted, "pattern": r"(\S+)$"})
        for question in questions()
    ]
    (folder / "choose.jsonl").write_text("\n".join(rows[0:256:2]) + "\n")
    (folder / "held.jsonl").write_text("\n".join(rows[1:256:2]) + "\n")
    return folder


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    write_family(folder / "wide", wide_shapes(3 * SHARDS), shards=SHARDS)
    write_family(folder / "small", wide_shapes(3, 1024), shards=3)
    return folder


@pytest.fixture
def wide(sharded: Path, tmp_path: Path) -> Path:
    """The recipe of a family of 8 shards, each of which takes three writes."""
    return Path(shutil.copytree(sharded / "wide", tmp_path, dirs_exist_ok=True)) / "recipe.yaml"


@pytest.fixture
def small(sharded: Path, tmp_path: Path) -> Path:
    """The recipe of a family of three small shards."""
    return Path(shutil.copytree(sharded / "small", tmp_path, dirs_exist_ok=True)) / "recipe.yaml"


@pytest.fixture
def mount_disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mount a small disk at tmp_path/disk; where that is not permitted the test is skipped."""
    place = tmp_path / "disk"

    def mount(options: str) -> Path:
        place.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        try:
            done = subprocess.run(command, capture_output=True, check=False).returncode == 0
        except FileNotFoundError:
            done = False
        if not done:
            pytest.skip("mounting a small disk is not permitted here")
        return place

    yield mount
    if place.is_mount():
        subprocess.run(["umount", str(place)], check=True)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub that this process uses, with waits between tries that no test has time for taken out."""
    sleepless = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    monkeypatch.setattr("skillmerge.checkpoints.stores.retries.FIRST_WAIT", 0.001)
    monkeypatch.setattr("huggingface_hub.utils._http.time", sleepless)
    with HubServer(tmp_path / "hub") as server, server.environment(monkeypatch):
        yield server


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process no connection leaves the machine; other processes meet a proxy that is not there."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        assert self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "localhost", "::1"), address
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")


@pytest.fixture
def hide(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """hide("cyclonedx") makes a package one that is not installed."""

    def make_absent(package: str) -> None:
        parts = [name for name in sys.modules if name.startswith(f"{package}.")]
        for name in (package, *parts):
            monkeypatch.setitem(sys.modules, name, None)

    return make_absent


@pytest.fixture
def family(tmp_path: Path) -> Path:
    """The recipe of a small bfloat16 family in two shards."""
    return write_family(tmp_path)


@pytest.fixture(scope="session")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output in two shards, with config, tokenizer and a folder, and its models beside it. Only to be read."""
    config = {"vocab_size": 32, "num_hidden_layers": 1, "torch_dtype": "bfloat16"}
    recipe = write_family(tmp_path_factory.mktemp("family"), tensor_shapes(layers=1, hidden=8), config=config)
    target = recipe.parent / "target"
    (target / "tokenizer.json").write_text('{"version": "1.0", "model": {"vocab": {"a": 0}}}')
    (target / "1_Pooling").mkdir()
    (target / "1_Pooling" / "config.json").write_text("{}")
    return Path(skillmerge.apply(recipe).output)


@pytest.fixture
def output(merged: Path, tmp_path: Path) -> Path:
    """A copy of an output, to be damaged."""
    return Path(shutil.copytree(merged, tmp_path / "merged"))


@pytest.fixture
def licensed(tmp_path: Path) -> Path:
    """The recipe of a small family with configs, and cards that name one licence."""
    recipe = write_family(tmp_path / "family", config={"model_type": "odd"})
    for model in MODELS:
        (recipe.parent / model / "README.md").write_text("---\nlicense: mit\n---\n# A parent\n")
    return recipe


@pytest.fixture
def finished(licensed: Path) -> Path:
    """The output of a small family, with its models beside it."""
    return Path(skillmerge.apply(licensed).output)


@pytest.fixture
def edit() -> Callable[..., Path]:
    """Rewrite a JSON recipe: edit(path, merge="target") sets keys, None removes them."""

    def change(path: Path, **keys: Any) -> Path:
        document = {**json.loads(path.read_text()), **keys}
        path.write_text(json.dumps({key: value for key, value in document.items() if value is not None}, indent=1))
        return path

    return change


def pytest_addoption(parser: pytest.Parser) -> None:
    for name, what in (("runtimes", "load outputs there"), ("slurm", "run a real one"), ("long", "torture at length")):
        parser.addoption(f"--{name}", action="store_true", help=what)


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Counts to be told at the end of the run: tally(kills=200)."""

    def count(**counts: int | str) -> None:
        request.node.user_properties.append(("torture", counts))

    return count


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, ())]
    for report in reports:
        counts = [value for key, value in report.user_properties if key == "torture"] if report.when == "call" else []
        for row in counts:
            said = ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in row.items())
            terminalreporter.write_line(f"{report.nodeid.split('/')[-1]}: {said}; {report.duration:.0f} s")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: "torture" not in item.nodeid and "test_crash" not in item.nodeid)  # they wait most
