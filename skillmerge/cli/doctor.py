"""The verb doctor: details of this installation, machine and network for a bug report, without secrets.

Anything missing, broken or unreachable is information, never an error. Outside text (variables, addresses,
the output of other programs) is shown only in a form that no secret has, and everything passes `redact` at the end.
"""

from __future__ import annotations

import json
import locale
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from skillmerge.brief import brief, drawn
from skillmerge.cli.messages import FORMAT
from skillmerge.outputs.trials import Trial, tried
from skillmerge.plans.budget import free_disk, free_memory
from skillmerge.threads import cores
from skillmerge.version import __version__

_PACKAGES = ("torch", "numpy", "safetensors", "huggingface_hub", "click", "rich", "tqdm", "ruamel.yaml", "pydantic")
_EXTRAS = ("transformers", "zstandard", "optuna", "cmaes", "lm-eval", "hf-xet", "peft")
_TORCH = """
import json, torch
devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
print(json.dumps({"cuda": torch.version.cuda, "devices": [[d.name, d.total_memory] for d in devices]}))
"""
_TORCH_SECONDS = 90
_PREFIXES = (
    "SKILLMERGE_",
    "HF_",
    "HUGGING",
    "TRANSFORMERS_",
    "CUDA_",
    "PYTORCH_",
    "OMP_",
    "MKL_",
    "SSL_",
    "REQUESTS_CA",
)
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
_PLAIN = re.compile(
    r"(?:-?\d{1,12}(?:\.\d{1,6})?(?:[kKMGT]i?B?)?|true|false|yes|no|on|off|auto|cpu|cuda(?::\d+)?|full|sampled)", re.I
)
"""Numbers, sizes, switches: the only values of variables that are shown."""
_SECRET = re.compile(
    r"\b(?:hf_|api_org_|gh[opsu]_|github_pat_|glpat-|sk-|xox[abprs]-|AKIA|eyJ)[\w.-]{6,}"  # tokens of known kinds
    r"|(?<=//)[^/\s@]+@"  # user and password in an address
)
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW|KEY|CREDENTIAL", re.I)
"""Names of variables whose values are secrets, however short."""
_REMOVED = "<removed>"


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Sections of facts, each under its name; every value is text, a number, yes or no, or None (not known).

    trials: what a run does to a disk, tried in the folder.
    """

    sections: Mapping[str, Mapping[str, Any]]
    trials: tuple[Trial, ...] = ()

    __repr__ = brief
    _repr_html_ = drawn

    def as_dict(self) -> dict[str, Any]:
        facts = {name: dict(facts) for name, facts in self.sections.items()}
        return {**facts, "trials": [trial.as_dict() for trial in self.trials]}


def doctor(path: str | os.PathLike[str] | None = None) -> Diagnosis:
    """Describe this installation, this machine and the Hub, and try in `path` (default: the working folder) what a run
    does there: locks, syncs, renames, direct I/O and the like. Leaves nothing behind."""
    folder = _folder_of(Path(path) if path is not None else Path.cwd())
    trials = tried(folder)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "versions": _versions,
        "processor": _processor,
        "cuda": _cuda,
        "memory": _memory,
        "disk": lambda: _disk(folder, trials),
        "hub": _hub,
        "environment": _environment,
        "terminal": _terminal,
    }
    sections = {name: _facts(part) for name, part in parts.items()}
    secrets = _secrets()
    shown = (replace(trial, follows=redact(trial.follows, secrets)) for trial in trials)
    return Diagnosis(redact(sections, secrets), tuple(shown))


def _facts(part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return part()
    except Exception as error:  # on an odd machine the other sections are still useful
        return {"not known": type(error).__name__}


def redact(value: Any, secrets: tuple[str, ...] = ()) -> Any:
    """Return plain data without `secrets` and what looks like one, and with ~ for the home folder."""
    if isinstance(value, Mapping):
        return {redact(key, secrets): redact(item, secrets) for key, item in value.items()}
    if isinstance(value, list):
        return [redact(item, secrets) for item in value]
    if not isinstance(value, str):
        return value
    for secret in secrets:
        value = value.replace(secret, _REMOVED)
    home = os.path.expanduser("~")
    value = re.sub(rf"{re.escape(home)}(?=/|$)", "~", value) if len(home) > 1 else value
    return _SECRET.sub(_REMOVED, value)


def _secrets() -> tuple[str, ...]:
    """Return the values of variables that are named like secrets, the token, and users and passwords in addresses."""
    found = {value for name, value in os.environ.items() if _SECRET_NAME.search(name)}
    with suppress(Exception):
        from huggingface_hub import get_token

        found.add(get_token() or "")
    for value in os.environ.values():
        with suppress(ValueError):
            address = urlsplit(value)
            found |= {address.username or "", address.password or ""}
    return tuple(sorted((each.strip() for each in found if len(each.strip()) >= 6), key=len, reverse=True))


def _versions() -> dict[str, Any]:
    names = {name: _version(name) for name in (*_PACKAGES, *_EXTRAS)}
    return {
        "skillmerge": __version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": platform.platform(),
        "kernel": platform.release(),
        **{name: version for name, version in names.items() if version or name in _PACKAGES},
        "not installed": ", ".join(name for name, version in names.items() if version is None) or None,
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    with suppress(OSError):
        rows = [row.partition(":") for row in Path("/proc/cpuinfo").read_text().splitlines()]
        model = next((value.strip() for key, _, value in rows if key.strip() == "model name"), model)
    limit = cgroup_limit("cpu.max")
    quota = round(limit[0] / limit[1], 2) if limit and len(limit) == 2 else None
    return {"model": model, "cores": os.cpu_count(), "usable": cores(), "cgroup limit": quota}


def cgroup_limit(
    file: str, root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> list[int] | None:
    """Return the numbers of the lowest limit of this process's control groups (version 2), or None without one."""
    try:
        path = next(row[3:] for row in own.read_text().splitlines() if row.startswith("0::"))
    except (OSError, StopIteration):
        return None
    found = []
    folder = root / path.lstrip("/")
    for each in (folder, *folder.parents):
        if not each.is_relative_to(root):
            break
        with suppress(OSError, ValueError):
            found.append([int(number) for number in (each / file).read_text().split()])
    return min(found, key=lambda numbers: numbers[0] / (numbers[1] if len(numbers) > 1 else 1), default=None)


def _cuda() -> dict[str, Any]:
    """Return what torch sees. It runs in another process, because a driver that does not match can kill it."""
    facts: dict[str, Any] = {"driver": _driver()}
    try:
        process = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", _TORCH],
            capture_output=True,
            text=True,
            timeout=_TORCH_SECONDS,
            check=False,
            cwd=os.sep,  # nothing in the working folder is imported
        )
        seen = json.loads(process.stdout.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {**facts, "torch": f"did not answer in {_TORCH_SECONDS} s"}
    except (ValueError, IndexError):
        last = (process.stderr.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
        return {**facts, "torch": f"cannot be imported: {last[:200]}"}
    facts["torch built for"] = f"CUDA {seen['cuda']}" if seen["cuda"] else "no CUDA"
    facts["devices"] = [{"name": name, "memory": memory} for name, memory in seen["devices"]]
    return facts


def _driver() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    with suppress(OSError, subprocess.TimeoutExpired, IndexError):
        command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
        out = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout
        return out.strip().splitlines()[0][:40]
    return None


def _memory() -> dict[str, Any]:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = cgroup_limit("memory.max")
    return {"total": total, "available": free_memory(), "cgroup limit": limit[0] if limit else None}


def _folder_of(path: Path) -> Path:
    """Return the folder, or the nearest parent that exists."""
    folder = path.absolute()
    while not os.path.isdir(folder):
        folder = folder.parent
    return folder


def _disk(folder: Path, trials: Sequence[Trial]) -> dict[str, Any]:
    facts: dict[str, Any] = {"folder": str(folder), "filesystem": _filesystem(folder), "free": free_disk(folder)}
    works = {trial.what: trial.works for trial in trials}
    facts["writable"] = works["write"]
    if not works["write"]:
        return {**facts, "why": trials[0].follows}
    return {**facts, "direct I/O": works["direct I/O"], "rename-exchange": works["exchange names"]}


def _filesystem(folder: Path) -> str | None:
    """Return the kind of the filesystem, from the mount that is the folder's device."""
    device = os.stat(folder).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with suppress(OSError):
        for row in Path("/proc/self/mountinfo").read_text().splitlines():
            fields, _, rest = row.partition(" - ")
            if fields.split()[2] == wanted:
                return rest.split()[0]
    return None


def _hub() -> dict[str, Any]:
    from skillmerge.checkpoints.stores.hub_client import probe

    proxies = [name for name in _PROXIES if os.environ.get(name) or os.environ.get(name.lower())]
    return {**probe(), "proxies": ", ".join(f"{name} is set" for name in proxies) or "none"}


def _environment() -> dict[str, Any]:
    names = sorted(name for name in os.environ if name.startswith(_PREFIXES))
    if os.environ.get(FORMAT) == "text":  # the option's default, for processes that this one starts
        names.remove(FORMAT)
    plain = {name for name in names if _PLAIN.fullmatch(os.environ[name]) and not _SECRET_NAME.search(name)}
    return {name: os.environ[name] if name in plain else "set" for name in names}


def _terminal() -> dict[str, Any]:
    return {
        "stdout is a terminal": sys.stdout.isatty(),
        "stdout's encoding": sys.stdout.encoding,
        "filesystem's encoding": sys.getfilesystemencoding(),
        "preferred encoding": locale.getpreferredencoding(False),
        "columns": shutil.get_terminal_size().columns,
        "NO_COLOR": "NO_COLOR" in os.environ,
    }
