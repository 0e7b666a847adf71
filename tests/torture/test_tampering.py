"""Whatever is done to whichever file of a finished output, `verify` refuses it with exit status 3."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import run_cli, tensor_shapes, write_family

import skillmerge
from skillmerge.errors import CheckFailed
from skillmerge.verbs.target import is_done

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def every_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output with every kind of file that one can have."""
    folder = tmp_path_factory.mktemp("family")
    recipe = write_family(folder, tensor_shapes(layers=1, hidden=8), config={"vocab_size": 32})
    target = folder / "target"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json"):
        (target / name).write_text(json.dumps({"file": name, "padding": "x" * 40}))
    for name in ("merges.txt", "chat_template.jinja", "tokenizer.model", "LICENSE"):
        (target / name).write_text(f"the {name} of this model")
    (target / "1_Pooling").mkdir()
    (target / "1_Pooling" / "config.json").write_text('{"pooling": true}')
    return Path(skillmerge.apply(recipe).output)


def changed(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x20
    path.write_bytes(content)


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def emptied(path: Path) -> None:
    os.truncate(path, 0)


def grown(path: Path) -> None:
    with open(path, "ab") as stream:
        stream.write(b" ")


def removed(path: Path) -> None:
    path.unlink()


def renamed(path: Path) -> None:
    path.rename(path.with_name("other-" + path.name))


def linked(path: Path) -> None:
    outside = path.parents[1] / "outside" / path.name
    outside.parent.mkdir(exist_ok=True)
    path.rename(outside)
    path.symlink_to(outside)


def linked_to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to("nothing")


def made_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def made_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def exchanged(path: Path) -> None:
    """With the next file of the output."""
    others = sorted(other for other in path.parent.iterdir() if other.is_file() and other != path)
    if not others:
        path.write_bytes(b"another's")
        return
    content = path.read_bytes()
    other = others[0]
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


def doubled(path: Path) -> None:
    shutil.copy(path, path.with_name("copy-of-" + path.name))


WAYS = [changed, truncated, emptied, grown, removed, renamed, linked, linked_to_nothing, made_a_pipe, made_a_folder,
        exchanged, doubled]  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_tampering_with_any_file_is_refused(
    every_file: Path, tmp_path: Path, way: Callable[[Path], None], tally: Callable[..., None]
) -> None:
    names = sorted(path.relative_to(every_file).as_posix() for path in every_file.rglob("*") if path.is_file())
    assert len(names) == 15
    for name in names:
        output = tmp_path / name.replace("/", "-") / "merged"
        shutil.copytree(every_file, output)
        skillmerge.verify(output)
        way(output / name)
        with pytest.raises(CheckFailed) as caught:
            skillmerge.verify(output)
        assert caught.value.exit_status == 3, name
        assert not is_done(skillmerge.plan(every_file.parent / "recipe.yaml"), output), name
    tally(files=len(names), refused=len(names))


@pytest.mark.parametrize("name", ["weights.bin", "run.sh", ".hidden", "model.safetensors", "sub/tokenizer.json"])
def test_added_file_is_refused(every_file: Path, tmp_path: Path, name: str) -> None:
    output = Path(shutil.copytree(every_file, tmp_path / "merged"))
    (output / name).parent.mkdir(exist_ok=True)
    (output / name).write_text("added")
    refused = run_cli("verify", output)
    assert refused.returncode == 3
    assert "Traceback" not in refused.stderr
