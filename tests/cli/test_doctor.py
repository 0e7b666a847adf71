"""Doctor: it says what there is, it never fails, and no secret gets out."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import tempfile
import time
from pathlib import Path

import pytest
from conftest import run_cli, run_process
from hub_server import TOKEN, HubServer

from skillmerge.checkpoints.stores import hub_client
from skillmerge.cli import doctor as module
from skillmerge.cli.doctor import cgroup_limit, doctor, redact
from skillmerge.outputs.trials import tried

CANARY = "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"


def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture(autouse=True)
def _no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its import takes seconds, and has a test of its own."""
    monkeypatch.setattr(module, "_cuda", lambda: {})


def test_doctor_tells_versions_machine_and_disk(tmp_path: Path) -> None:
    process = run_process("doctor", tmp_path / "not" / "there", "--json", HF_HUB_OFFLINE="1")
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout)
    assert found["ok"] is True
    assert set(found) == {
        "ok",
        "versions",
        "processor",
        "cuda",
        "memory",
        "disk",
        "hub",
        "environment",
        "terminal",
        "trials",
    }
    assert found["versions"]["torch"]
    assert found["cuda"]["torch built for"]
    assert found["processor"]["usable"] == len(os.sched_getaffinity(0))
    assert found["memory"]["total"] > found["memory"]["available"] > 0
    disk = found["disk"]
    assert disk["folder"].endswith(tmp_path.name)
    assert disk["writable"] is True
    assert disk["filesystem"] in Path("/proc/filesystems").read_text()
    assert list(tmp_path.iterdir()) == []
    assert found["hub"]["answer"] == "not checked: HF_HUB_OFFLINE is set"


def test_doctor_for_people_has_the_same_facts(tmp_path: Path) -> None:
    process = run_cli("doctor", tmp_path, HF_HUB_OFFLINE="1")
    assert process.returncode == 0
    assert re.search(r"^ ?lock +yes +a second run on the same output exits 6", process.stdout, re.M)
    assert list(tmp_path.iterdir()) == []
    for line in (r"^versions$", r"^  skillmerge: \d", r"^  total: \d+\.\d GB$", r"^  writable: yes$"):
        assert re.search(line, process.stdout, re.M), line


def test_doctor_reaches_a_hub_without_sending_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with HubServer(tmp_path) as hub, hub.environment(monkeypatch):
        found = json.loads(run_cli("doctor", "--json").stdout)["hub"]
        assert hub.requests
        assert not any(request.authorised for request in hub.requests)
    assert found["answer"].startswith("reachable (HTTP ")
    assert found["endpoint"] == hub.endpoint
    assert found["token"] == "present"
    assert found["proxies"] == "NO_PROXY is set"


def test_a_hub_out_of_reach_is_information(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with HubServer(tmp_path) as hub, hub.environment(monkeypatch, token=None):
        monkeypatch.setattr(hub_client.constants, "ENDPOINT", closed_port())
        process = run_cli("doctor", "--json")
    assert process.returncode == 0
    hub = json.loads(process.stdout)["hub"]
    assert hub["answer"] == "not reachable (ConnectError)"
    assert hub["token"] == "none"


def test_a_hub_that_says_nothing_is_waited_for_only_so_long() -> None:
    with socket.socket() as silent, pytest.MonkeyPatch.context() as patch:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        patch.setattr(hub_client.constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        patch.setattr(hub_client.constants, "HF_HUB_OFFLINE", False)
        started = time.monotonic()
        answer = hub_client.probe(0.3)["answer"]
        assert time.monotonic() - started < 3
    assert str(answer).startswith(("none in 0.3 s", "not reachable"))


@pytest.mark.parametrize("as_json", [True, False])
def test_no_secret_gets_out(tmp_path: Path, as_json: bool) -> None:
    """A canary in every variable there is, in proxies' and the endpoint's addresses, and in the token file."""
    home = tmp_path / "home"
    (home / ".cache" / "huggingface").mkdir(parents=True)
    (home / ".cache" / "huggingface" / "token").write_text(f"{CANARY}file\n")
    names = [
        "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HUB_USER_AGENT_ORIGIN", "HF_MIRROR_KEY",
        "SKILLMERGE_PUSH", "SKILLMERGE_MESSAGE", "SKILLMERGE_SET", "SKILLMERGE_ODD", "AWS_SECRET_ACCESS_KEY",
        "TRANSFORMERS_CACHE", "CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF", "LANG", "LC_ALL", "TERM",
        "SSL_CERT_DIR", "OMP_NUM_THREADS", "LOGNAME", "USER",
    ]  # fmt: skip
    secret = {name: f"{CANARY}{index}" for index, name in enumerate(names)}
    address = "http://alicecanary:plainpassword@127.0.0.1:9/private?key=alsosecret"
    secret |= dict.fromkeys(("HTTP_PROXY", "https_proxy", "ALL_PROXY", "HF_ENDPOINT"), address)
    arguments = ("doctor", str(tmp_path), *(["--json"] if as_json else []))
    process = run_process(*arguments, **secret, HOME=str(home), NO_PROXY="127.0.0.1")
    assert process.returncode == 0, process.stderr
    out = process.stdout + process.stderr
    assert "versions" in out
    for word in ("canary", "plainpassword", "alsosecret", "private", TOKEN):
        assert word not in out, word


def test_variables_are_shown_only_where_their_values_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKILLMERGE_THREADS", "4")
    monkeypatch.setenv("SKILLMERGE_MEMORY_LIMIT", "2GB")
    monkeypatch.setenv("SKILLMERGE_OUTPUT", "/somewhere/of/alice")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("SKILLMERGE_KEY_PASSWORD", "1234")
    found = doctor().sections["environment"]
    assert found["SKILLMERGE_THREADS"] == "4"
    assert found["SKILLMERGE_MEMORY_LIMIT"] == "2GB"
    assert found["SKILLMERGE_OUTPUT"] == "set"
    assert found["HF_HUB_OFFLINE"] == "1"
    assert found["SKILLMERGE_KEY_PASSWORD"] == "set"


def test_the_default_of_an_option_is_no_variable_of_the_user() -> None:
    assert "SKILLMERGE_LOG_FORMAT" not in run_cli("doctor").stdout


def test_redact_takes_out_secrets_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/alice")
    value = {"a": ["https://bob:pw@host/x", "hunter22 and ghp_abcdefghij1234", 7, None, True], "b": "/home/alice/x"}
    assert redact(value, ("hunter22",)) == {
        "a": ["https://<removed>host/x", "<removed> and <removed>", 7, None, True],
        "b": "~/x",
    }


def test_what_goes_wrong_in_one_section_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> dict[str, object]:
        raise RuntimeError(CANARY)

    monkeypatch.setattr(module, "_memory", broken)
    found = doctor().sections
    assert found["memory"] == {"not known": "RuntimeError"}
    assert found["disk"]["writable"] is True


def test_a_folder_that_cannot_be_written_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    found = doctor("/proc").sections["disk"]
    assert found["writable"] is False
    assert found["why"]


def test_the_tightest_limit_of_all_control_groups_counts(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    own.write_text("12:memory:/old\n0::/a/b\n")
    root = tmp_path / "fs"
    (root / "a" / "b").mkdir(parents=True)
    (root / "a" / "b" / "memory.max").write_text("max\n")
    (root / "a" / "memory.max").write_text("1000\n")
    (root / "memory.max").write_text("2000\n")
    (root / "a" / "b" / "cpu.max").write_text("150000 100000\n")
    assert cgroup_limit("memory.max", root, own) == [1000]
    assert cgroup_limit("cpu.max", root, own) == [150000, 100000]
    assert cgroup_limit("pids.max", root, own) is None
    assert cgroup_limit("memory.max", root, tmp_path / "none") is None


def test_torch_that_cannot_be_imported_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.12: cannot open')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert doctor().sections["cuda"]["torch"] == "cannot be imported: OSError: libcudart.so.12: cannot open"


def test_nothing_in_the_working_folder_is_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    (tmp_path / "torch.py").write_text("raise OSError('not the real one')")
    monkeypatch.chdir(tmp_path)
    assert "torch" not in doctor().sections["cuda"]


WORKING = [
    "write", "lock", "sync files", "sync folders", "rename", "stable inodes", "map files", "preallocate",
    "write a shard", "free space", "temporary folder", "any file name",
]  # fmt: skip
"""What works on every disk that tests run on."""


def test_doctor_tries_what_a_run_does_and_leaves_nothing(tmp_path: Path) -> None:
    found = {trial.what: trial for trial in doctor(tmp_path).trials}
    assert [what for what in WORKING if not found[what].works] == []
    assert found["temporary folder"].follows == tempfile.gettempdir()
    assert list(tmp_path.iterdir()) == []


def test_doctor_finds_no_temporary_folder_and_no_locale(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def none() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "_get_default_tempdir", none)
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(os, "fsencode", lambda name: name.encode("latin-1"))
    found = {trial.what: trial for trial in tried(tmp_path)}
    assert (found["temporary folder"].works, found["any file name"].works) == (False, False)
    assert found["temporary folder"].follows.startswith("set TMPDIR: ")
    assert found["any file name"].follows.startswith("set LC_ALL=C.UTF-8: ")
    assert found["write"].works
