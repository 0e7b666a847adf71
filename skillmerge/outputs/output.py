"""A finished output: its folder, its manifest, and its run log with the outcomes of its gates.

Used by verify, sign, attest, push, gate and rebuild. Knows the documents, not whether the files match them (`verify`
checks that).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from skillmerge.brief import brief
from skillmerge.checkpoints.kinds.lora.config import CONFIG_FILE, read_config
from skillmerge.checkpoints.missing import near_path
from skillmerge.checkpoints.schemes import bucket_of
from skillmerge.checkpoints.stores.folder import Folder
from skillmerge.errors import CheckFailed, UsageError, some
from skillmerge.outputs import manifest
from skillmerge.outputs.buckets.at_hand import refuse_hub
from skillmerge.outputs.manifest import RUN_LOG_FILE, Manifest
from skillmerge.outputs.staging import MANIFEST_FILE, Staging
from skillmerge.recipes.gate_table import PROOFS
from skillmerge.recipes.parse import parse_recipe
from skillmerge.recipes.recipe import Recipe
from skillmerge.threads import hash_file


@dataclass(frozen=True, slots=True)
class Output:
    """A finished output. Opening it reads `manifest` and checks its digest. place: the bucket that it is in, if the
    folder is a copy."""

    folder: Path
    manifest: Manifest
    place: str = ""

    __repr__ = brief

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Output:
        """Open a finished output. Raises UsageError if there is no folder, CheckFailed if its manifest is not valid."""
        root = check_folder(folder)
        if root.suffix == Staging.folder_of(Path("x")).suffix and not (root / MANIFEST_FILE).exists():
            raise CheckFailed(f"{root} is an unfinished run, not an output", fix=FINISH)
        return cls(root, manifest.read(root))

    @property
    def shown(self) -> str:
        """What to call it."""
        return self.place or str(self.folder)

    @property
    def adapter_base(self) -> str | None:
        """What an adapter calls the model that it is for; None of any other output. Raises InputError."""
        if self.manifest.output.kind != "adapter":
            return None
        return read_config(Folder(self.folder), CONFIG_FILE).base

    def digests(self) -> dict[str, str]:
        """Return the sha256 of every file, manifest included, as the manifest states it."""
        log = self.manifest.environment.run_log
        files = {file.name: file.sha256 for file in self.manifest.files}
        return {**files, log.name: log.sha256, MANIFEST_FILE: hash_file(self.folder / MANIFEST_FILE)}

    def run_log(self) -> RunLog:
        return RunLog.read(self.folder)

    def refuse_failed(self) -> None:
        """Raise CheckFailed if the output failed its gates and was kept for inspection."""
        failed = [outcome.gate for outcome in self.run_log().gates if not outcome.passed]
        if failed:
            raise CheckFailed(
                f"{self.folder} failed its gates: {some(failed)}",
                fix="fix the recipe or its gates, and apply it again",
            )

    def recipe(self, base: Path | None = None) -> tuple[Recipe, dict[str, str]]:
        """Return the output's recipe, with its donor at that time, and the commits of its models on the Hub.

        base: the folder that the recipe's relative paths now start from [default: the recorded one]. Raises
        RecipeError.
        """
        document = self.manifest
        commits = {item.name: item.revision for item in document.inputs if item.revision}
        start = base if base is not None else self.folder.resolve() / document.environment.recipe_folder
        start = Path(os.path.abspath(start))
        recipe = parse_recipe(document.recipe.text, RECIPE_IN_MANIFEST, start, document.overrides)
        return recipe.as_planned(document.donor, {item.name: item.unwrapped or () for item in document.inputs}), commits


FINISH = "run `skillmerge apply` again to finish it"
RECIPE_IN_MANIFEST = "the recipe in the manifest"
"""What messages call an output's recipe, which may have come from a file of any name."""

MOVED = "pass `--base-folder FOLDER`, the folder that the recipe's relative paths now start from"
"""What to do if an output's models are not found."""


def check_folder(folder: str | os.PathLike[str]) -> Path:
    """Raise UsageError if an output is asked for and there is no folder."""
    root = Path(folder)
    if root.is_dir():
        return root
    if bucket_of(folder) is not None:
        raise UsageError(
            f"{os.fspath(folder)} is in a bucket, and this command needs a folder", fix="copy it into a folder first"
        )
    refuse_hub(folder)
    if root.exists():
        raise UsageError(f"{root} is not a folder", fix="name an output of `skillmerge apply`")
    if (unfinished := Staging.folder_of(root)).is_dir():
        raise UsageError(f"folder {root} does not exist, but {unfinished} is an unfinished run", fix=FINISH)
    near = near_path(root, os.fspath(folder), Path.is_dir)
    raise UsageError(f"folder {root} does not exist", fix=near or "name an output of `skillmerge apply`")


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of one gate. measured: None if there is no number; `detail` says why. where: the part of the model
    that `measured` describes, if it is the worst one."""

    gate: str
    asked: str
    measured: float | None
    passed: bool
    detail: str = ""
    where: str = ""

    @property
    def unmeasured(self) -> bool:
        """Whether it failed because nothing was measured."""
        return not self.passed and self.measured is None and self.gate.split()[0] not in PROOFS

    @property
    def shown(self) -> str:
        """The measured value, or why there is none."""
        if self.measured is None:
            return self.detail.splitlines()[0] if self.detail else ("yes" if self.passed else "no")
        return f"{self.measured:.4g}" + (f" at {self.where}" if self.where else "")

    def as_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "where" or value}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Outcome:
        """Read an outcome from an untrusted log: whatever it leaves out has not passed."""
        measured = row.get("measured")
        return cls(
            str(row.get("gate")),
            str(row.get("asked", "")),
            measured if isinstance(measured, int | float) else None,
            bool(row.get("passed")),
            str(row.get("detail", "")),
            str(row.get("where", "")),
        )


@dataclass(frozen=True, slots=True)
class RunLog:
    """When an output was made, how long it took, and the outcomes of its gates. A rebuild does not reproduce them."""

    finished: str = ""
    seconds: float = 0.0
    gates: tuple[Outcome, ...] = ()

    def to_bytes(self) -> bytes:
        gates = [outcome.as_dict() for outcome in self.gates]
        return (json.dumps({"finished": self.finished, "seconds": self.seconds, "gates": gates}) + "\n").encode()

    @classmethod
    def read(cls, folder: Path) -> RunLog:
        """Return the log in `folder`; an empty one where none can be read."""
        try:
            found = json.loads((folder / RUN_LOG_FILE).read_bytes())
            gates = found.get("gates", [])
        except (OSError, ValueError, AttributeError):
            return cls()
        rows = [row for row in gates if isinstance(row, dict)] if isinstance(gates, list) else []
        return cls(found.get("finished", ""), found.get("seconds", 0.0), tuple(map(Outcome.from_dict, rows)))
