"""Filesystems that lack something, played in one folder by `filesystems.c`, which stands in libc's place.

What only makes things safer is done without, with a word where it matters; what fails really ends with status 5, the
path, and what to do. Every verb that writes gives the right bytes or says so, and a finished output is never lost.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import run_process, write_family
from hub_server import HubServer
from observing import Content, MergeServer, assert_finished, content, staging_of, wait_until, wide_shapes
from preloading import built

import skillmerge
from skillmerge.outputs.staging import Staging

pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="LD_PRELOAD and /proc are Linux's"),
]

TRAITS = [
    "no-lock", "empty-lock", "nfs4-lock", "new-inodes", "no-folder-sync", "no-mapping", "no-exchange", "no-direct",
    "quota", "short-writes", "no-allocation", "full-at-close", "full-at-sync", "no-rename-over", "no-statvfs",
    "no-advice", "late-direct",
    "read-only-else", "nameless",
]  # fmt: skip
"""As `enum trait` has them, from the lowest bit."""

LOCKS = "has no file locks (No locks available), so a second run on it would stop this one"
SYNC = "cannot sync folders; after a power failure, rerun the same command"

FULL = {
    "quota": "the disk quota is used up: ",
    "full-at-close": "the disk is full: ",
    "full-at-sync": "the disk is full: ",
}
PROCESS = ("read-only-else", "nameless")
"""Of the machine, not of a folder."""
LACKING = [trait for trait in TRAITS if trait not in (*FULL, *PROCESS)]
FILESYSTEMS: dict[str, list[str]] = {
    **{trait: [trait] for trait in LACKING},
    "NFS": ["nfs4-lock", "no-exchange", "no-rename-over", "short-writes"],
    "FUSE": ["empty-lock", "new-inodes", "no-folder-sync", "no-mapping", "no-direct", "no-exchange", "no-statvfs"],
    "all that only makes things safer": LACKING,
}


@dataclass
class Machine:
    """A process with a folder whose filesystem is played, and a Hub."""

    server: MergeServer
    hub: HubServer
    wanted: dict[str, Content] = field(default_factory=dict)

    def run(self, folder: Path, traits: list[str], verb: str, *given: Any, limit: int = 1 << 40, **keys: Any) -> Any:
        which = sum(1 << TRAITS.index(trait) for trait in traits)
        request = {"verb": verb, "given": list(map(str, given)), "mount": [folder, which, limit], **keys}
        return self.server.run(None, kill_after=60, **request)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is preloaded."""
    return built("filesystems", tmp_path_factory.mktemp("filesystems"))


@pytest.fixture(scope="module")
def machine(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with HubServer(tmp_path_factory.mktemp("hub")) as hub:
        server = MergeServer(LD_PRELOAD=str(library), **hub.variables())
        yield Machine(server, hub)
        server.close()


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Content]:
    """What every verb makes of the family on an ordinary filesystem."""
    recipe = write_family(tmp_path_factory.mktemp("ordinary"), wide_shapes(2, 1024), shards=2)
    folder = recipe.parent
    skillmerge.apply(recipe, device="cpu")
    skillmerge.extract(str(folder / "rl"), str(folder / "sft"), folder / "skill")
    skillmerge.export(folder / "skill", folder / "patch", onto=str(folder / "sft"))
    skillmerge.export(folder / "skill", folder / "adapter", lora_rank=2)
    found = {name: content(folder / name) for name in ("merged", "skill", "patch", "adapter")}
    skillmerge.apply(recipe, folder / "half", device="cpu", coefficients={"lam": 0.5})
    return {**found, "half": content(folder / "half")}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """In a folder of its own, whose filesystem is played."""
    return write_family(tmp_path / "odd", wide_shapes(2, 1024), shards=2)


TOLD = {
    "no-lock": "lock", "empty-lock": "lock", "new-inodes": "stable inodes", "no-folder-sync": "sync folders",
    "no-mapping": "map files", "no-exchange": "exchange names", "no-direct": "direct I/O", "late-direct": "direct I/O",
    "no-allocation": "preallocate", "quota": "write a shard", "full-at-close": "write a shard",
    "full-at-sync": "write a shard",
}  # fmt: skip
"""What `doctor` says does not work, where it can be seen from one process."""


@pytest.mark.parametrize("trait", ["none", *TOLD])
def test_doctor_says_what_does_not_work(machine: Machine, tmp_path: Path, trait: str) -> None:
    (tmp_path / "odd").mkdir()
    ordinary = machine.run(tmp_path / "odd", [], "tried", tmp_path / "odd")["trials"]
    limit = 0 if trait in FULL else 1 << 40
    found = machine.run(tmp_path / "odd", [trait] if trait in TOLD else [], "tried", tmp_path / "odd", limit=limit)[
        "trials"
    ]
    assert found.keys() == ordinary.keys()
    assert found.get(TOLD.get(trait, "")) in (None, False)
    if trait not in FULL:
        assert {what for what in found if found[what] != ordinary[what]} <= {TOLD.get(trait)}
    assert list((tmp_path / "odd").iterdir()) == []


@pytest.mark.parametrize("name", FILESYSTEMS)
def test_every_verb_finishes_with_the_right_bytes(
    machine: Machine, recipe: Path, wanted: dict[str, Content], name: str
) -> None:
    folder, traits = recipe.parent, FILESYSTEMS[name]
    inputs = {path.name for path in folder.iterdir()}
    rl, sft, skill = folder / "rl", folder / "sft", folder / "skill"
    (folder / "merged").mkdir()
    words = [word for trait, word in (("no-lock", LOCKS),) if trait in traits]
    notes = [word for trait, word in (("no-folder-sync", SYNC),) if trait in traits]
    repository = f"acme/{'-'.join(name.split())}"
    commands: list[tuple[Any, ...]] = [
        ("apply", recipe), ("verify", folder / "merged"),
        ("extract", rl, sft, skill), ("verify", skill),
        ("export", skill, folder / "patch", {"onto": str(sft)}),
        ("export", skill, folder / "adapter", {"lora_rank": 2, "base": str(sft)}),
        ("apply", recipe, folder / "half"), ("push", folder / "merged", repository, {"license": "mit"}),
    ]  # fmt: skip
    for verb, *given in commands:
        keys = given.pop() if isinstance(given[-1], dict) else {}
        answer = machine.run(folder, traits, verb, *given, **keys)
        assert answer["status"] == 0, (verb, given, answer)
        writes = verb in ("apply", "extract", "export")
        assert [word for word in words if any(word in warned for warned in answer["warned"])] == (
            words if writes else []
        )
        assert [word for word in notes if any(word in said for said in answer["said"])] == (notes if writes else [])
    # What is there is replaced, and found to be there.
    for expected, coefficients in (("half", {"lam": 0.5}), ("merged", None)):
        answer = machine.run(folder, traits, "apply", recipe, coefficients=coefficients, overwrite=True)
        assert answer["status"] == 0, answer
        assert_finished(folder / "merged", wanted[expected])
    adapter = content(folder / "adapter")
    assert content(folder / "half") == wanted["merged"]
    assert content(skill).keys() == wanted["skill"].keys()
    assert content(folder / "patch") == wanted["patch"]
    assert adapter["adapter_model.safetensors"] == wanted["adapter"]["adapter_model.safetensors"]
    assert {path.name for path in folder.iterdir()} == inputs | {"merged", "half", "skill", "patch", "adapter"}
    for path in (folder / "merged").glob("*.safetensors"):
        assert machine.hub.content(repository, path.name) == path.read_bytes()


@pytest.mark.parametrize("trait", FULL)
def test_full_disk_is_told_and_loses_no_finished_output(
    machine: Machine, recipe: Path, wanted: dict[str, Content], trait: str
) -> None:
    folder, output = recipe.parent, recipe.parent / "merged"
    assert machine.run(folder, [], "apply", recipe)["status"] == 0
    assert machine.run(folder, [], "extract", folder / "rl", folder / "sft", folder / "skill")["status"] == 0
    for limit in (0, 600, 3000, 5000):
        answer = machine.run(folder, [trait], "apply", recipe, limit=limit, overwrite=True, coefficients={"lam": 0.5})
        assert answer["status"] == 5, (limit, answer)
        message, _, fix = answer["message"].partition("\n")
        assert message.startswith(FULL[trait]), (limit, answer)
        assert str(folder) in message
        assert fix == "free disk space, then run the same command again: it continues where it stopped"
        assert content(output) == wanted["merged"], "what was there is there"
        for form in ({"onto": str(folder / "sft")}, {"lora_rank": 2}):
            answer = machine.run(
                folder, [trait], "export", folder / "skill", folder / "new", limit=min(limit, 600), **form
            )
            assert answer["status"] == 5, (limit, answer)
            assert answer["message"].startswith(FULL[trait]), (limit, answer)
            assert not (folder / "new").exists()
            assert not (folder / ".new.writing").exists()
    answer = machine.run(folder, [], "apply", recipe, overwrite=True, coefficients={"lam": 0.5})
    assert answer["status"] == 0, answer
    assert_finished(output, wanted["half"])


@pytest.mark.parametrize("trait", ["no-lock", "empty-lock"])
def test_two_merges_without_locks_make_one_sound_output(
    machine: Machine, recipe: Path, wanted: dict[str, Content], trait: str
) -> None:
    """At least one finishes; the others stop with status 6, or find the output there."""
    folder, output = recipe.parent, recipe.parent / "merged"
    which = 1 << TRAITS.index(trait)
    for paces in ((0.1, 0.0), (0.02, 0.02), (0.05, 0.03)):
        requests = [
            {"recipe": recipe, "mount": [folder, which, 1 << 40], "pace": pace, "threads": 1, "kill_after": 60}
            for pace in paces
        ]
        answers = machine.server.run_all(*requests)
        statuses = [answer["status"] for answer in answers]
        assert set(statuses) <= {0, 6}, answers
        if 0 not in statuses:
            assert machine.run(folder, [trait], "apply", recipe)["status"] == 0
        assert_finished(output, wanted["merged"])
        assert machine.run(folder, [trait], "verify", output)["status"] == 0
        shutil.rmtree(output)
        assert not staging_of(output).exists()


@pytest.mark.parametrize("gone", [False, True], ids=["the other works", "the other has finished"])
@pytest.mark.parametrize("trait", ["no-lock", "empty-lock"])
def test_run_that_another_one_overtakes_says_so_whatever_failed(
    machine: Machine, recipe: Path, wanted: dict[str, Content], trait: str, gone: bool
) -> None:
    """In the middle of its work: the disk is full for it, in a folder that is another run's by then, or gone."""
    folder, output = recipe.parent, recipe.parent / "merged"
    with ThreadPoolExecutor(1) as beside:
        full = {"limit": 700, "pace": 0.3, "threads": 1}
        first = beside.submit(machine.run, folder, [trait, "quota"], "apply", recipe, **full)
        wait_until(lambda: list(staging_of(output).glob("files/*.safetensors")))
        with closing(Staging(output)) as second:
            if gone:
                second.discard()
                second.close()
            answer = first.result()
        assert answer["status"] == 6, answer
        assert answer["message"].split("\n") == [
            f"another run has taken over {output}; this one has stopped and left it alone",
            "let that run finish, or choose another folder with `--output`",
        ]
    assert machine.run(folder, [trait], "apply", recipe)["status"] == 0
    assert_finished(output, wanted["merged"])


def test_container_with_a_read_only_root_and_a_nameless_user(
    library: Path, families: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No HOME, no entry in passwd, nowhere to write but beside the recipe: no temporary folder either."""
    folder = tmp_path / "data"
    shutil.copytree(families("llama"), folder, ignore=shutil.ignore_patterns("merged*"))
    for name in ("HOME", "USER", "LOGNAME", "USERNAME", "TMPDIR", "TEMP", "TMP", "XDG_CACHE_HOME", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    which = sum(1 << TRAITS.index(trait) for trait in PROCESS)
    played = {"LD_PRELOAD": str(library), "PLAYED_FILESYSTEM": f"{which}:{folder}", "PYTHONDONTWRITEBYTECODE": "1"}
    (folder / "gates.yaml").write_text("gates: {loads: true}\n")
    output = folder / "merged"
    made = run_process("apply", folder / "recipe.yaml", cwd=folder.parent, **played)
    assert made.returncode == 0, made.stderr
    before = content(output)
    for command in (
        ["verify", output],
        ["verify", output, "--load"],
        ["gate", output, "--gates", folder / "gates.yaml"],
    ):
        done = run_process(*command, cwd=folder.parent, **played)
        assert done.returncode in (0, 5), (command, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        assert done.returncode == 0 or "TMPDIR" in done.stderr, done.stderr
        assert content(output) == before
    said = json.loads(run_process("doctor", folder, "--json", cwd=folder.parent, HF_HUB_OFFLINE="1", **played).stdout)
    works = {trial["what"]: trial["works"] for trial in said["trials"]}
    assert (works["write"], works["temporary folder"]) == (True, False)


def test_locale_that_cannot_name_a_model_is_named(tmp_path: Path) -> None:
    """C and ISO 8859-1 end with status 2 and say what to set; C.UTF-8 works."""
    recipe = write_family(tmp_path, wide_shapes(1, 256), shards=1)
    (tmp_path / "rl").rename(tmp_path / "rl-模型")
    recipe.write_text(recipe.read_text().replace('"rl": "rl"', '"rl": "rl-模型"'))
    locales = {"C": "ascii", "C.UTF-8": ""}
    if shutil.which("localedef") is not None:
        made = ["localedef", "-i", "en_US", "-f", "ISO-8859-1", str(tmp_path / "de_DE.ISO-8859-1")]
        if subprocess.run(made, capture_output=True, check=False).returncode == 0:
            locales["de_DE.ISO-8859-1"] = "iso8859-1"
    for name, encoding in locales.items():
        environment = {"LC_ALL": name, "LOCPATH": str(tmp_path), "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        if name == "C.UTF-8":
            del environment["LOCPATH"]
        for command in (["plan", recipe], ["apply", recipe, "-o", tmp_path / name], ["lint", recipe]):
            done = run_process(*command, **environment)
            if not encoding or command[0] == "lint":
                assert done.returncode == 0, done.stderr
                continue
            assert done.returncode == 2, (name, done.stderr)
            text = done.stderr.encode().decode("unicode_escape") if "\\u" in done.stderr else done.stderr
            assert text.startswith(f"error: the locale `{name}` ({encoding}) cannot name the file `"), done.stderr
            assert "rl-模型" in text
            assert "set LC_ALL=C.UTF-8, or PYTHONUTF8=1" in text
