"""A Ray cluster: work is sent there as plain data, and what it raises is raised here.

Ray decides where tasks run, and runs them again where a node is lost or an error may pass. It knows nothing about
shards: whether a task has done its work is read from records.
"""

from __future__ import annotations

import pickle
import signal
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from typing import Any

from skillmerge.errors import ResourceError, SkillmergeError, TemporaryError, UsageError
from skillmerge.reporter import Reporter
from skillmerge.version import __version__

RETRIES = 3
"""How often Ray runs a task again that has lost its node, or raised TemporaryError."""
CPUS = 8
"""Of a task, where `--threads` does not say and a node has as many."""
_NODE = "ray.io/node-id"


def check_cluster(on: str | None, no_local: bool = False) -> None:
    """Raise UsageError, before any work, if this is no cluster that can be asked for, or lacks a folder to share."""
    if on is None:
        return
    host, _, port = on.removeprefix("ray://").rpartition(":")
    if on != "ray" and not (on.startswith("ray://") and host and port.isascii() and port.isdecimal()):
        raise UsageError(f"`{on}` is not a cluster", fix="choose ray, or ray://HOST:PORT")
    if find_spec("ray") is None or (on != "ray" and find_spec("grpc") is None):
        raise UsageError("`--on` needs Ray", fix="pip install 'skillmerge[ray]'")
    if no_local:
        raise UsageError(
            "`--no-local` keeps no files, but tasks share a folder", fix="leave `--no-local` or `--on` out"
        )


class Cluster:
    """A connection to a cluster. One that the program had already stays open.

    on: ray, for the cluster that this process is part of (a job's, a node's, or that of RAY_ADDRESS), or
    ray://HOST:PORT. threads: CPUs of each task, None for `CPUS`. device: what is computed on. Raises UsageError where
    there is no such cluster.
    """

    def __init__(self, on: str, threads: int | None, device: str) -> None:
        import ray

        self._ray = ray
        self._owned = not ray.is_initialized()
        if self._owned:
            self._connect("auto" if on == "ray" else on)
        self.device = "cuda" if device.startswith("cuda") else "cpu"
        self._given = threads
        self.threads = threads or min(CPUS, self._most()) or CPUS

    def _connect(self, address: str) -> None:
        # Ray would take SIGTERM over, and print what tasks print.
        kept = signal.getsignal(signal.SIGTERM)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the error says the same
                self._ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, RuntimeError, ValueError, OSError, self._ray.exceptions.RayError) as error:
            what = "no Ray cluster runs here" if address == "auto" else f"the cluster {address} cannot be used"
            raise UsageError(
                f"{what}: {_said(error)}",
                fix="run it inside `ray job submit`, start a cluster with `ray start --head`, or name one: "
                "`--on ray://HOST:10001`",
            ) from error
        finally:
            with suppress(ValueError):  # not in the main thread
                signal.signal(signal.SIGTERM, kept)

    def _nodes(self) -> dict[str, dict[str, float]]:
        """Return what each living node has."""
        return {node["NodeID"]: node["Resources"] for node in self._ray.nodes() if node["Alive"]}

    def _most(self) -> int:
        """Return the CPUs that a task can have at most: those of a node, or with CUDA those beside each GPU of it,
        and one where there are more GPUs than CPUs."""
        able = list(self._nodes().values())
        if self.device == "cuda":
            able = [{"CPU": max(1, has.get("CPU", 0) // has["GPU"])} for has in able if has.get("GPU", 0) >= 1]
        return max((int(has.get("CPU", 0)) for has in able), default=0)

    def _places(self) -> dict[str, int]:
        """Return how many tasks each node can run at the same time, for those that can run any."""
        cuda = self.device == "cuda"
        found = {}
        for node, has in self._nodes().items():
            count = has.get("CPU", 0) // self.threads
            found[node] = int(min(count, has.get("GPU", 0)) if cuda else count)
        return {node: count for node, count in found.items() if count}

    @property
    def places(self) -> int:
        """How many tasks the cluster can run at the same time."""
        return sum(self._places().values())

    def find_places(self, reporter: Reporter) -> int:
        """Return how many tasks the cluster can run at the same time. Warn where none can, so that all would wait."""
        if not self.places:
            fix = "let the cluster grow"
            fix += ", or pass a lower `--threads`" if self._given else ""
            fix += ", or compute on the CPU: leave `--device` out" if self.device == "cuda" else ""
            needs = f"{self.threads} CPU{'' if self.threads == 1 else 's'}"
            needs += " and the GPU" if self.device == "cuda" else ""
            reporter.warn(f"no node of the cluster has the {needs} that a task takes; waiting for one", fix)
        return self.places

    def nodes_of(self, host: str) -> set[str]:
        """Return the nodes on a host, named as records name it."""
        return {node["NodeID"] for node in self._ray.nodes() if node["NodeManagerHostname"].partition(".")[0] == host}

    def share(self, work: Callable[..., Any]) -> Any:
        """Send what `submit` takes. work: plain data that can be called."""
        return self._ray.put(pickle.dumps(work))

    def submit(self, work: Any, *arguments: Any, avoid: Collection[str] = ()) -> Any:
        """Start a task: call what was shared. avoid: nodes that are left out, where there are others."""
        options: dict[str, Any] = {"num_cpus": self.threads, "num_gpus": int(self.device == "cuda")}
        if avoid and self._places().keys() - avoid:
            options["label_selector"] = {_NODE: f"!in({','.join(sorted(avoid))})"}
        task = self._ray.remote(_program()).options(
            max_retries=RETRIES, retry_exceptions=[TemporaryError], scheduling_strategy="SPREAD", **options
        )
        return task.remote(__version__, work, arguments)

    def ended(self, tasks: Collection[Any], seconds: float) -> list[Any]:
        """Wait until one of the tasks has ended, for some seconds; return those that have."""
        with self._errors():
            found: list[Any] = self._ray.wait(list(tasks), num_returns=1, timeout=seconds)[0]
        return found

    def result(self, task: Any) -> Any:
        """Return what a task has returned. Raises what it has raised, and TemporaryError where its node was lost."""
        with self._errors():
            version, result = self._ray.get(task)
        if version != __version__:
            has = f"has skillmerge {version}" if version else "lacks skillmerge"
            raise UsageError(
                f"a node of the cluster {has}, and this is skillmerge {__version__}",
                fix=f"pip install skillmerge=={__version__} on every node, or in the job's runtime environment",
            )
        return result

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Raise what tasks have raised, and Ray's errors in words."""
        errors = self._ray.exceptions
        try:
            yield
        except errors.RayTaskError as error:
            if isinstance(error.cause, SkillmergeError):
                raise error.cause from None
            raise
        except errors.OutOfMemoryError as error:
            raise ResourceError(
                "a node of the cluster has too little memory for a task", fix="pass a lower `--threads`"
            ) from error
        except (errors.RuntimeEnvSetupError, errors.TaskUnschedulableError) as error:
            raise UsageError(f"Ray cannot run a task: {_said(error)}", fix="correct the cluster or its job") from error
        except (errors.RayError, ConnectionError) as error:
            raise TemporaryError(f"the cluster has lost a task: {_said(error)}", fix="rerun to continue") from error

    def cancel(self, tasks: Collection[Any], *, kill: bool = False) -> None:
        """Stop tasks, without waiting for their end. kill: with their processes, which run nothing after them. A task
        that was interrupted may have left half of torch imported, and the next one in its process would fail."""
        for task in tasks:
            with suppress(Exception):  # the cluster may be gone
                self._ray.cancel(task, force=kill)

    def close(self) -> None:
        if self._owned:
            self._ray.shutdown()


def _said(error: Exception) -> str:
    """Return the first and the last line of an error of Ray, between which it may have the text of a traceback."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(dict.fromkeys([lines[0].strip(), lines[-1].strip()]))


def this_node() -> str:
    """Return the node that this task runs on."""
    import ray

    return str(ray.get_runtime_context().get_node_id())


def _program() -> Callable[[str, bytes, tuple[Any, ...]], tuple[str, Any]]:
    """Return what runs in a task. Ray sends a function within a function as code, so that a node without skillmerge can
    say so."""

    def skillmerge(version: str, work: bytes, arguments: tuple[Any, ...]) -> tuple[str, Any]:
        import pickle
        from importlib import import_module

        try:
            mine = str(import_module("skillmerge.version").__version__)
        except ImportError:
            mine = ""
        return mine, pickle.loads(work)(*arguments) if mine == version else None

    return skillmerge
