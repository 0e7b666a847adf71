"""What every kind of stored weights promises: plain weights, a plane of a skill, a patched model, held in memory,
under other names."""

from __future__ import annotations

import hashlib
import os
import random
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import random_tensors, read_checkpoint, write_checkpoint, write_recipe
from skill_reader import read_skill

import skillmerge
from skillmerge.checkpoints.checkpoint import Checkpoint, Difference, Piece, named, read_bytes, versions
from skillmerge.checkpoints.kinds import dense, patch, skill, table
from skillmerge.checkpoints.kinds.table import open_as, open_folder
from skillmerge.checkpoints.store import Store
from skillmerge.checkpoints.stores.folder import Folder
from skillmerge.checkpoints.stores.memory import Held, Memory
from skillmerge.checkpoints.views.renamed import read_as
from skillmerge.engine.values import read_values
from skillmerge.errors import InputError, StalePlan
from skillmerge.tensors import BLOCK, UNIT

SHAPES = {
    "model.embed_tokens.weight": (2 * UNIT + 3 * BLOCK + 5,),
    "model.layers.0.mlp.up_proj.weight": (33, 17),
    "model.layers.0.input_layernorm.weight": (7,),
    "model.layers.1.mlp.up_proj.weight": (2 * BLOCK + 1, 3),
    "model.norm.weight": (0,),
}
KINDS = ["dense", "skill plus", "skill minus", "patch", "held", "renamed"]


@dataclass(frozen=True)
class Family:
    """`sft`, `rl`, the skill between them and the patch from one to the other, in folders; and what they hold."""

    folder: Path
    sft: Mapping[str, torch.Tensor]
    rl: Mapping[str, torch.Tensor]
    planes: Mapping[str, tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = tmp_path_factory.mktemp("kinds")
    sft = random_tensors(SHAPES)
    rl = {name: value.clone() for name, value in sft.items()}
    for name, value in rl.items():
        changed = value.view(-1)[:: 1 if name.startswith("model.layers.0") else 101]
        changed *= -1.5
    for name, tensors in {"sft": sft, "rl": rl}.items():
        write_checkpoint(folder / name, tensors, shards=2)
    skillmerge.extract(str(folder / "rl"), str(folder / "sft"), folder / "skill")
    skillmerge.export_patch(folder / "skill", folder / "patch", onto=str(folder / "sft"))
    return Family(folder, sft, rl, read_skill(folder / "skill"))


def in_folder(folder: Path) -> Store:
    return Folder(folder)


def in_memory(folder: Path) -> Store:
    return Memory({file.name: file.read_bytes() for file in folder.iterdir()}, str(folder))


def open_kind(kind: str, folder: Path, store: Callable[[Path], Store]) -> Checkpoint:
    if kind.startswith("skill"):
        opened = open_as("skill", "uri", store(folder / "skill"))
        assert isinstance(opened, Difference)
        return opened.plus if kind == "skill plus" else opened.minus
    base = open_as("model", "uri", store(folder / "sft"))
    assert isinstance(base, Checkpoint)
    if kind == "renamed":  # and back
        other = read_as("sft", base, [("model.", "other.")], ())
        return read_as("sft", other, [("other.", "model.")], ())
    if kind != "patch":
        return Held(base) if kind == "held" else base
    patched = open_as("patch", "uri", store(folder / "patch"), base)
    assert isinstance(patched, Checkpoint)
    return patched


def wanted(kind: str, family: Family) -> dict[str, torch.Tensor]:
    if kind.startswith("skill"):
        return {name: planes[kind == "skill minus"].view(SHAPES[name]) for name, planes in family.planes.items()}
    return dict(family.rl if kind == "patch" else family.sft)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[in_folder, in_memory])
def checkpoint(request: pytest.FixtureRequest, kind: str, family: Family) -> Checkpoint:
    return open_kind(kind, family.folder, request.param)


def bits(values: torch.Tensor) -> bytes:
    return values.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def ranges(elements: int) -> list[tuple[int, int]]:
    """(first, count): ends of units and blocks, and some at random."""
    draw = random.Random(elements)
    edges = [0, 1, BLOCK - 1, BLOCK, UNIT - 1, UNIT, UNIT + BLOCK + 3, elements - 1]
    edges = [at for at in edges if 0 <= at < elements]
    firsts = [*edges, *(draw.randrange(elements) for _ in range(6) if elements)]
    return [(first, draw.randint(1, min(elements - first, 3 * BLOCK))) for first in firsts] + [(elements, 0)]


# Tensors.


def test_specs_say_what_is_read(checkpoint: Checkpoint, kind: str, family: Family) -> None:
    expected = wanted(kind, family)
    assert {name: spec.shape for name, spec in checkpoint.tensors.items()} == {
        name: tuple(value.shape) for name, value in expected.items()
    }
    for name, spec in checkpoint.tensors.items():
        assert (spec.name, spec.dtype, spec.nbytes) == (name, "BF16", 2 * expected[name].numel())
        assert bits(read_values(checkpoint, name)) == bits(expected[name])


def test_any_part_is_that_part_of_the_whole(checkpoint: Checkpoint, kind: str, family: Family) -> None:
    for name, value in wanted(kind, family).items():
        whole = bits(value)
        for first, count in ranges(value.numel()):
            assert read_bytes(checkpoint, name, first, count) == whole[2 * first : 2 * (first + count)], (name, first)


def test_what_is_read_together_goes_where_it_belongs(checkpoint: Checkpoint, kind: str, family: Family) -> None:
    """Neighbours in the file and in the buffer, neighbours in one alone, the same elements twice; nothing beside."""
    buffer, end = bytearray(b"\xaa" * 3_000_000), 6
    other = bytearray(b"\xaa" * 200_000)
    pieces: list[Piece] = []
    places: list[tuple[Piece, bytes]] = []
    memory = {id(it): memoryview(it) for it in (buffer, other)}
    for name, value in wanted(kind, family).items():
        elements = value.numel()
        for first, count in [*ranges(elements)[:4], (0, elements // 3), (elements // 3, elements // 2)]:
            count = min(count, BLOCK)
            pieces.append(Piece(name, first, count, memory[id(buffer)], end))
            places.append((pieces[-1], bits(value.view(-1)[first : first + count])))
            end += 2 * count + (4 if len(pieces) % 3 == 0 else 0)
    pieces.append(Piece("model.layers.0.mlp.up_proj.weight", 3, 500, memory[id(other)], 10))
    places.append((pieces[-1], bits(wanted(kind, family)[pieces[-1].tensor].view(-1)[3:503])))
    checkpoint.read(pieces)()
    for target in (buffer, other):
        expected = bytearray(b"\xaa" * len(target))
        for piece, content in places:
            if piece.buffer is memory[id(target)]:
                expected[piece.start : piece.start + len(content)] = content
        assert target == expected


def test_threads_read_together(checkpoint: Checkpoint, kind: str, family: Family) -> None:
    expected = wanted(kind, family)
    work = [(name, first, count) for name, value in expected.items() for first, count in ranges(value.numel())] * 3
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda item: read_bytes(checkpoint, *item), work))
    for (name, first, count), content in zip(work, found, strict=True):
        assert content == bits(expected[name].view(-1)[first : first + count])


def test_a_hint_changes_nothing(checkpoint: Checkpoint, kind: str, family: Family) -> None:
    for name, value in wanted(kind, family).items():
        for first, count in ranges(value.numel()):
            checkpoint.hint(name, first, count)
    checkpoint.check_unchanged()


# Files.


def test_files_hold_the_tensors(checkpoint: Checkpoint) -> None:
    assert [name for file in checkpoint.files.values() for name in file.tensors] == list(checkpoint.tensors)
    for name, file in checkpoint.files.items():
        assert all(checkpoint.tensors[tensor].file == name for tensor in file.tensors)


def test_a_tensor_costs_what_is_read_of_its_file(checkpoint: Checkpoint, kind: str, family: Family) -> None:
    for file in checkpoint.files.values():
        assert 0 < sum(checkpoint.cost(tensor) for tensor in file.tensors) < file.size or kind == "skill minus"
    if not kind.startswith("skill"):
        assert all(checkpoint.cost(name) == spec.nbytes for name, spec in checkpoint.tensors.items())
        return
    both = [open_kind(plane, family.folder, in_folder) for plane in ("skill plus", "skill minus")]
    for name, file in checkpoint.files.items():  # a header apart, the planes are all that there is
        read = sum(plane.cost(tensor) for plane in both for tensor in file.tensors)
        header = int.from_bytes((family.folder / "skill" / name).read_bytes()[:8], "little")
        assert read == file.size - 8 - header


def test_digests_are_those_of_the_files(checkpoint: Checkpoint, kind: str, family: Family) -> None:
    """Of a patched model, those of the files that hold the same tensors."""
    folder = family.folder / {"skill plus": "skill", "skill minus": "skill", "patch": "rl"}.get(kind, "sft")
    for file in checkpoint.files:
        assert checkpoint.sha256(file) == hashlib.sha256((folder / file).read_bytes()).hexdigest()
        stopped = threading.Event()
        stopped.set()
        assert checkpoint.sha256(file, stopped) == ""


def test_what_plans_keep_is_the_same_each_time(kind: str, family: Family) -> None:
    """And says which of the kinds it was, where they share a place."""
    first, second = (open_kind(kind, family.folder, in_folder) for _ in range(2))
    assert {name: file.described for name, file in first.files.items()} == {
        name: file.described for name, file in second.files.items()
    }
    assert versions({"a": first}) == versions({"a": second})
    base = open_kind("dense", family.folder, in_folder)
    for file, item in first.files.items():
        if kind == "patch":
            assert item.described != base.files[file].described
            assert len(item.version) > len(base.files[file].version)
            assert first.stated(file) is None


def test_a_changed_file_is_noticed(kind: str, family: Family, tmp_path: Path) -> None:
    for name in ("sft", "skill", "patch"):
        (tmp_path / name).mkdir()
        for file in (family.folder / name).iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    used = {"skill plus": ["skill"], "skill minus": ["skill"], "patch": ["sft", "patch"]}.get(kind, ["sft"])
    for name in used:
        for file in sorted((tmp_path / name).glob("*.safetensors")):
            checkpoint = open_kind(kind, tmp_path, in_folder)
            checkpoint.check_unchanged()
            os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
            with pytest.raises(StalePlan, match=f"{file.name} changed while it was in use"):
                checkpoint.check_unchanged()
            checkpoint.close()


def test_it_may_be_closed_twice(checkpoint: Checkpoint) -> None:
    read_bytes(checkpoint, "model.layers.0.mlp.up_proj.weight")
    checkpoint.cancel()
    checkpoint.close()
    checkpoint.close()


# Which kind it is.


@pytest.mark.parametrize(("name", "claimant"), [("sft", dense), ("skill", skill), ("patch", patch)])
def test_one_kind_claims_a_place(family: Family, name: str, claimant: object) -> None:
    assert table.claimant(in_folder(family.folder / name), (*table.MARKED, table.PLAIN)) is claimant


def test_what_two_kinds_claim_is_neither() -> None:
    files = {skill.SKILL_FILE: b"{}", patch.PATCH_FILE: b"{}", "model.safetensors": b""}
    with pytest.raises(InputError, match="shelf is a skill and a sparse patch at once"):
        open_as("model", "uri", Memory(files, "shelf"))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "has no *.safetensors"),
        (["inner/model.safetensors"], "has no *.safetensors"),
        (["pytorch_model.bin"], "has no *.safetensors, only pytorch_model.bin"),
        (["adapter_config.json"], "is a PEFT adapter without adapter_model.safetensors"),
        (["adapter_config.json", "adapter_model.safetensors"], "is a PEFT adapter"),
        (["a.safetensors", "b.safetensors"], "has 2 *.safetensors files but no"),
        (["skill.json", "model.safetensors"], "is a skill, not a model"),
        (["delta_metadata.json", "model.safetensors"], "is a sparse patch, not a model"),
    ],
)
def test_what_no_kind_of_model_claims_is_told_why(files: Collection[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        open_as("model", "uri", Memory(dict.fromkeys(files, b""), "shelf"))
    assert caught.value.message.startswith(f"shelf {message}")
    assert caught.value.fix


def test_a_skill_has_two_names_and_a_model_one(family: Family) -> None:
    difference = open_as("skill", "uri", in_folder(family.folder / "skill"))
    assert isinstance(difference, Difference)
    assert named("math", difference) == {"math": difference.plus, "math:minus": difference.minus}
    assert named("rl", difference.plus) == {"rl": difference.plus}


class Negated:
    """A toy kind, of one method for reading: the elements of `plain/`, which `negated.txt` says are negated."""

    WORD, NOUN, WRITTEN = "model", "a negated model", "{uri}"

    def claims(self, store: Store) -> bool:
        return "negated.txt" in store.list()

    def open(self, uri: str, store: Store, onto: Checkpoint | None) -> Checkpoint:
        negated = dense.open(uri, store)
        read = negated.read

        def read_negated(pieces: list[Piece]) -> Callable[[], None]:
            wait = read(pieces)

            def finish() -> None:
                wait()
                for piece in pieces:
                    torch.frombuffer(negated.view(piece), dtype=torch.bfloat16).neg_()

            return finish

        negated.read = read_negated  # type: ignore[method-assign,assignment]
        return negated


def test_another_kind_is_one_line_in_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = random_tensors({"w": (64, 3), "v": (7,)})
    write_checkpoint(tmp_path / "plain", {name: -value for name, value in tensors.items()})
    (tmp_path / "plain" / "negated.txt").write_text("")
    monkeypatch.setattr(table, "MARKED", (*table.MARKED, Negated()))
    out = skillmerge.apply(write_recipe(tmp_path, "plain", models={"plain": "plain"}, coefficients=None)).output
    assert all(torch.equal(value, tensors[name]) for name, value in read_checkpoint(out).items())


def test_a_folder_is_opened_as_a_model(family: Family) -> None:
    assert open_folder("uri", family.folder / "sft").tensors.keys() == SHAPES.keys()
    with pytest.raises(InputError, match="is a skill, not a model"):
        open_folder("uri", family.folder / "skill")
