"""A Slurm of one controller and two nodes on this host, from Debian's packages, without installing them.

    with Slurm(folder) as slurm:
        job = slurm.submit("--array=0-3", script, PATH=...)
        slurm.wait(job)

The packages are unpacked into a folder. The daemons run as this user, without munge, and without control groups.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

PACKAGES = (
    "slurmd", "slurmctld", "slurm-client", "slurm-wlm-basic-plugins", "libslurm38", "libhwloc15", "libmunge2",
    "liblua5.1-0", "libjson-c5", "libyaml-0-2", "libdbus-1-3", "libnuma1", "liblz4-1",
)  # fmt: skip
NODES = ("n1", "n2")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")

CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
PluginDir={plugins}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
MailProg=/bin/true
SchedulerType=sched/builtin
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
JobRequeue=1
ReturnToService=2
SlurmdTimeout=10
KillWait=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
{nodes}
PartitionName=all Nodes={names} Default=YES MaxTime=INFINITE State=UP
"""


class Unavailable(Exception):
    """The packages cannot be had on this system, or do not run."""


def unpack(folder: Path) -> Path:
    """The root of the packages' files, fetched where they are not there yet."""
    root = folder / "root"
    if (root / "usr/sbin/slurmctld-wlm").exists():
        return root
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise Unavailable("this system has no apt-get and dpkg-deb")
    packages = folder / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:  # the name of a library may be another one elsewhere: what is missing shows below
        subprocess.run(["apt-get", "download", "-qq", package], cwd=packages, capture_output=True, check=False)
    for package in packages.glob("*.deb"):
        subprocess.run(["dpkg-deb", "--extract", package, root], check=True)
    if not (root / "usr/sbin/slurmctld-wlm").exists():
        raise Unavailable("Debian's Slurm packages cannot be fetched")
    return root


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class Slurm:
    """`folder` holds packages, configuration, state and logs."""

    def __init__(self, packages: Path, folder: Path) -> None:
        self.folder, root = folder, unpack(packages)
        libraries = next(path.parent for path in (root / "usr/lib").rglob("libslurm.so.*"))
        self._programs = root / "usr"
        ports = free_ports(1 + len(NODES))
        nodes = [
            f"NodeName={name} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={port} CPUs=1 State=UNKNOWN"
            for name, port in zip(NODES, ports[1:], strict=True)
        ]
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (folder / name).mkdir(parents=True)
        conf = CONF.format(
            host=socket.gethostname(), port=ports[0], user=getpass.getuser(), plugins=libraries / "slurm-wlm",
            folder=folder, nodes="\n".join(nodes), names=",".join(NODES),
        )  # fmt: skip
        (folder / "slurm.conf").write_text(conf)
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SLURM")},
            "SLURM_CONF": str(folder / "slurm.conf"),
            "LD_LIBRARY_PATH": f"{libraries}:{libraries / 'slurm-wlm'}",
            "PATH": f"{root}/usr/bin:{os.environ['PATH']}",
        }
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Slurm:
        try:
            self._start("slurmctld", "slurmctld-wlm", "-D")
            for node in NODES:
                self.start_node(node)
            self._wait_for_nodes()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in NODES:
            self.kill_node(node)
        for daemon in self._daemons.values():
            daemon.kill()
            daemon.wait()

    def _start(self, name: str, program: str, *options: str) -> None:
        command = [str(self._programs / "sbin" / program), *options]
        with open(self.folder / f"{name}.out", "wb") as log:
            self._daemons[name] = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)

    def start_node(self, node: str) -> None:
        steps = str(self._programs / "sbin/slurmstepd-wlm")
        self._start(node, "slurmd-wlm", "-D", "-N", node, "-d", steps)

    def _wait_for_nodes(self) -> None:
        end = time.monotonic() + 60
        while self.run("sinfo", "-h", "-t", "idle", "-o", "%D", check=False).strip() != str(len(NODES)):
            dead = [name for name, daemon in self._daemons.items() if daemon.poll() is not None]
            if dead or time.monotonic() > end:
                logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in self.folder.glob("*.out"))
                raise Unavailable(f"Slurm does not run here ({', '.join(dead) or 'its nodes stay down'}): {logs}")
            time.sleep(0.5)

    def run(self, *words: str, check: bool = True) -> str:
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, check=False)
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, *words: str, **environment: str) -> str:
        """The number of a job."""
        done = subprocess.run(
            ["sbatch", "--parsable", *words], env={**self.environment, **environment}, capture_output=True, text=True,
            cwd=self.folder, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def states(self, job: str) -> dict[str, dict[str, str]]:
        """What is known of a job, or of each task of an array that has begun."""
        found = {}
        for line in self.run("scontrol", "-o", "show", "job", job).splitlines():
            row = dict(word.split("=", 1) for word in line.split() if "=" in word)
            found[row.get("ArrayTaskId", "")] = row
        return found

    def wait(self, job: str, seconds: float = 600) -> dict[str, dict[str, str]]:
        end = time.monotonic() + seconds
        while True:
            found = self.states(job)
            if found and all(row["JobState"] in ENDED for row in found.values()):
                return found
            assert time.monotonic() < end, found
            time.sleep(0.5)

    def kill_node(self, node: str) -> list[int]:
        """SIGKILL a node's daemon and all that runs under it, as if its power was cut; which they were."""
        daemon = self._daemons.pop(node, None)
        if daemon is not None:
            daemon.kill()
            daemon.wait()
        killed = list(self._processes(node))
        for process in killed:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        return killed

    def _processes(self, node: str) -> Iterator[int]:
        """Processes of jobs on a node: steps, the parents of what runs in them, come first."""
        ours, steps = str(self.folder / "slurm.conf").encode(), str(self._programs / "sbin/slurmstepd-wlm")
        found, parents = [], []
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                words = (path / "environ").read_bytes().split(b"\0")
                if b"SLURM_CONF=" + ours in words and b"SLURMD_NODENAME=" + node.encode() in words:
                    found.append(int(path.name))
                    parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                    if os.readlink(f"/proc/{parent}/exe") == steps:
                        parents.append(parent)
        yield from dict.fromkeys([*parents, *found])
