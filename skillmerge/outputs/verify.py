"""The checks of the verb verify: an output's structure, digests and values against its manifest.

`check_structure` is the cheap part, which `apply` runs before publishing; `verify_files` reads every byte once, in
bounded memory. The safetensors library is the independent reader of files that skillmerge's own code wrote.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from skillmerge.brief import brief, drawn
from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.checkpoints.kinds import skill
from skillmerge.checkpoints.kinds.lora import adapter
from skillmerge.checkpoints.kinds.table import open_folder
from skillmerge.checkpoints.model_config import contradictions
from skillmerge.checkpoints.safetensors import read_header
from skillmerge.checkpoints.stores.folder import Folder
from skillmerge.errors import CheckFailed, InputError, ResourceError, StalePlan, is_machine, some, unusable
from skillmerge.outputs.buckets.at_hand import PIECE, Content, plainly
from skillmerge.outputs.manifest import File, Manifest, ManifestBody, Tensor
from skillmerge.outputs.output import Output
from skillmerge.plans.tasks.division import share_of
from skillmerge.reporter import Reporter, default_reporter
from skillmerge.tensors import BLOCK, DTYPES, StoredTensor, TensorSpec
from skillmerge.threads import hash_file, in_threads

SIGNATURE_FILE = "model.sig"
BESIDE = frozenset({"README.md", ".gitattributes", SIGNATURE_FILE})
"""Files that an output may have without its manifest naming them: those that the Hub adds, and a signature."""

DOWNLOADS = ".cache/huggingface"
"""A folder in which the Hub's client keeps notes about files that it fetched with `--local-dir`. Nothing loads it."""

Contents = Callable[[Path], Content]


@dataclass(frozen=True, slots=True)
class Share:
    """One of `of` parts of an output's files, by bytes as equal as files are; index counts from 0."""

    index: int
    of: int
    files: int
    bytes: int

    def as_dict(self) -> dict[str, int]:
        return {"index": self.index, "of": self.of, "files": self.files, "bytes": self.bytes}


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of `verify` for an output that passed: counts, and the requested extra checks.

    load: the report of loading. parent: for a skill, which model of its expression the given one is. signature: its
    path, how many files it covers, and the signer. share: the part whose bytes were read, if not all.
    """

    output: Output
    load: Mapping[str, Any] | None = None
    parent: str | None = None
    signature: Mapping[str, Any] | None = None
    share: Share | None = None

    __repr__ = brief
    _repr_html_ = drawn

    def as_dict(self) -> dict[str, Any]:
        return {
            "folder": self.output.shown,
            "files": self.files,
            "tensors": self.tensors,
            "bytes": self.bytes,
            "load": self.load,
            "parent": self.parent,
            "signature": self.signature,
            **({"share": self.share.as_dict()} if self.share is not None else {}),
        }

    @property
    def folder(self) -> Path:
        return self.output.folder

    @property
    def files(self) -> int:
        return len(self.output.manifest.file_names)

    @property
    def tensors(self) -> int:
        return len(self.output.manifest.tensors)

    @property
    def bytes(self) -> int:
        return self.output.manifest.size


def verify_files(
    folder: str | os.PathLike[str],
    *,
    allow_nonfinite: bool = False,
    shard: tuple[int, int] | None = None,
    reporter: Reporter | None = None,
    contents: Contents = plainly,
) -> Verdict:
    """Check every file of an output. Raises CheckFailed with the first difference, UsageError if there is no folder.

    shard: (I, N) to read only part I of N of the files, counted from 0; all of them must be there. contents: how to
    open a file that is read whole.
    """
    reporter = reporter or default_reporter("verifying")
    with checked(reporter, "manifest"):
        output = Output.open(folder)
    root, proof = output.folder, output.manifest
    with checked(reporter, "files, index and headers"):
        check_structure(root, proof)
    files, share = proof.files, None
    if shard is not None:
        sizes = {file.name: file.size for file in proof.files}
        mine = share_of(sizes, *shard)
        files = tuple(file for file in proof.files if file.name in mine)
        share = Share(*shard, len(files), sum(file.size for file in files))
    size = share.bytes if share is not None else proof.size
    with checked(reporter, "digests and values"), _reading(root), reporter.bar(size, "verifying") as progress:
        _check_contents(root, files, allow_nonfinite, progress, contents)
    return Verdict(output, share=share)


def check_structure(root: Path, proof: Manifest) -> None:
    """Check names and sizes of files, index, headers, tensor set, shapes and dtypes. Raises CheckFailed."""
    with _reading(root):
        _check_files(root, proof)
        if proof.makes_skill:
            return _check_files_of(root, skill.open(str(root), Folder(root)).plus, proof)
        if proof.output.kind == "adapter":
            return _check_files_of(root, adapter.open(str(root), Folder(root)), proof)
        checkpoint = open_folder(str(root), root)
        _check_tensors(root, checkpoint, proof)
        for file in checkpoint.files:
            check_shard(root / file, read_header(str(root / file), file).tensors)


def _check_files_of(root: Path, checkpoint: Checkpoint, proof: ManifestBody) -> None:
    """Check what is no whole model."""
    try:
        _compare_tensors(root, checkpoint, proof)
        for file in checkpoint.files:
            check_shard(root / file, read_header(str(root / file), file).tensors)
    finally:
        checkpoint.close()


@contextmanager
def checked(reporter: Reporter, what: str) -> Iterator[None]:
    """Report the end of a check, unless the machine or the network failed."""
    try:
        yield
    except (CheckFailed, InputError, StalePlan) as error:
        reporter.event("checked", check=what, problem=error.message)
        raise
    reporter.event("checked", check=what, problem="")


@contextmanager
def _reading(root: Path) -> Iterator[None]:
    """Turn errors of reading an output into CheckFailed, unless the machine is at fault."""
    try:
        yield
    except InputError as error:
        raise CheckFailed(error.message) from error
    except OSError as error:
        if is_machine(error):
            raise unusable(str(error.filename or root), error) from error
        raise CheckFailed(f"{error.filename or root}: cannot be read: {error.strerror}") from error


def _check_files(root: Path, proof: Manifest) -> None:
    wanted = proof.file_names
    found = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_symlink() or not path.is_dir()}
    found = {name for name in found if not name.startswith(f"{DOWNLOADS}/")}
    if missing := sorted(wanted - found):
        raise CheckFailed(
            f"{root}: files are missing: {some(missing)}",
            fix="restore them, or make the output again with `--overwrite`",
        )
    if extra := sorted(found - wanted - BESIDE):
        raise CheckFailed(
            f"{root}: files do not belong to the output: {some(extra)}", fix="move them out of the folder"
        )
    for name in sorted(found):
        if not stat.S_ISREG((root / name).lstat().st_mode):
            raise CheckFailed(f"{root / name}: is not a plain file")
    for file in proof.files:
        path = root / file.name
        if path.stat().st_size != file.size:
            raise CheckFailed(f"{path}: is not {file.size} bytes long, as the manifest states")
    log = proof.environment.run_log
    if hash_file(root / log.name) != log.sha256:
        raise CheckFailed(f"{root / log.name}: was changed after it was written")


def _check_tensors(root: Path, checkpoint: Checkpoint, proof: ManifestBody) -> None:
    _compare_tensors(root, checkpoint, proof)
    shapes = {name: spec.shape for name, spec in checkpoint.tensors.items()}
    for problem in contradictions(checkpoint.config, shapes):
        raise CheckFailed(f"{root}: {problem}")
    asked = proof.output.dtype
    stated = checkpoint.config.get("dtype", checkpoint.config.get("torch_dtype", asked))
    if asked not in ("same", stated):
        raise CheckFailed(f"{root}: config.json says {stated}, but the weights were written as {asked}")


def _compare_tensors(root: Path, checkpoint: Checkpoint, proof: ManifestBody) -> None:
    wanted = {tensor.name: tensor for tensor in proof.tensors}
    if checkpoint.tensors.keys() != wanted.keys():
        different = sorted(checkpoint.tensors.keys() ^ wanted.keys())
        raise CheckFailed(f"{root}: tensors differ from the manifest: {some(different)}")
    for name, spec in checkpoint.tensors.items():
        _check_tensor(root, spec, wanted[name])


def _check_tensor(root: Path, spec: TensorSpec, described: Tensor) -> None:
    found = (spec.file, spec.dtype, list(spec.shape))
    wanted = (described.file, described.dtype, list(described.shape))
    if found != wanted:
        raise CheckFailed(f"{root}: tensor `{spec.name}` is {found}, the manifest says {wanted}")


def check_shard(path: Path, specs: tuple[StoredTensor, ...]) -> None:
    """Open a shard with the safetensors library and compare what it sees. Raises CheckFailed, ResourceError."""
    from safetensors import SafetensorError

    try:
        with _opened_by_library(path) as reader:
            if set(reader.keys()) != {spec.name for spec in specs}:
                raise CheckFailed(f"{path}: the safetensors library reads different tensors")
            for spec in specs:
                piece = reader.get_slice(spec.name)
                if tuple(piece.get_shape()) != spec.shape or piece.get_dtype() != spec.dtype:
                    raise CheckFailed(f"{path}: the safetensors library reads a different `{spec.name}`")
    except (SafetensorError, OSError, RuntimeError) as error:
        if is_machine(error):
            raise ResourceError(
                f"{path}: could not be opened on this machine: {error}",
                fix=f"check it with `skillmerge doctor {path.parent}`",
            ) from error
        raise CheckFailed(f"{path}: the safetensors library refuses it: {error}") from error


@contextmanager
def _opened_by_library(path: Path) -> Iterator[Any]:
    """Yield a shard as the safetensors library sees it. If its filesystem maps no files, use a copy in memory with the
    header and zeros after it. Raises SafetensorError, OSError, RuntimeError."""
    from safetensors import SafetensorError, safe_open

    # Only names, shapes and dtypes are asked for, which needs no torch: to import it takes a second.
    framework = "pt" if "torch" in sys.modules or find_spec("numpy") is None else "np"
    with ExitStack() as stack:
        try:
            reader = stack.enter_context(safe_open(path, framework=framework))
        except (SafetensorError, OSError, RuntimeError) as error:  # the last is torch's
            if os.strerror(errno.ENODEV) not in str(error) or not hasattr(os, "memfd_create"):
                raise
            with open(path, "rb") as shard:
                head = shard.read(8)
                head += shard.read(int.from_bytes(head, "little"))
            stand_in = stack.enter_context(open(os.memfd_create(path.name), "wb"))
            stand_in.write(head)
            stand_in.truncate(path.stat().st_size)
            reader = stack.enter_context(safe_open(f"/proc/self/fd/{stand_in.fileno()}", framework=framework))
        yield reader


def check_values(root: Path, proof: ManifestBody) -> None:
    """Digest every file and look for NaN and Inf on the way. Raises CheckFailed."""
    with _reading(root):
        _check_contents(root, proof.files, False)


def _check_contents(
    root: Path,
    files: Sequence[File],
    allow_nonfinite: bool,
    progress: Callable[[int], None] = lambda done: None,
    contents: Contents = plainly,
) -> None:
    """Digest files and look for NaN and Inf on the way. progress: takes how many bytes are finished."""
    done, lock = 0, threading.Lock()

    def moved(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            progress(done)

    def check(file: File, stop: threading.Event) -> None:
        path = root / file.name
        specs: tuple[StoredTensor, ...] = ()
        if path.suffix == ".safetensors" and not allow_nonfinite:
            specs = read_header(str(path), path.name).tensors
        with closing(contents(path)) as stream:
            digest = _digest_and_scan(stream, path, specs, stop, moved)
        if digest != file.sha256:
            raise CheckFailed(f"{path}: its bytes are not those that were written (sha256 differs)")

    for _ in in_threads(check, files):
        pass


def _digest_and_scan(
    stream: Content, path: Path, specs: tuple[StoredTensor, ...], stop: threading.Event, moved: Callable[[int], None]
) -> str:
    """sha256 of an open file; `moved` takes the size of each piece that was read.

    Raises CheckFailed if a float tensor among `specs` holds NaN or Inf.
    """
    import torch

    from skillmerge.bits import any_nonfinite, torch_dtype

    digest = hashlib.sha256()
    pending = [spec for spec in specs if DTYPES[spec.dtype].is_float and spec.nbytes]
    position = 0
    buffer = bytearray(PIECE)
    while not stop.is_set() and (count := _fill(stream, buffer)):
        digest.update(memoryview(buffer)[:count])
        # Tensors are aligned to their items (the header is padded), and so is every piece but the last.
        for spec in [spec for spec in pending if spec.start < position + count and spec.end > position]:
            first, last = max(spec.start, position) - position, min(spec.end, position + count) - position
            dtype = torch_dtype(spec.dtype)
            values = torch.frombuffer(buffer, dtype=dtype, offset=first, count=(last - first) // dtype.itemsize)
            for start in range(0, values.numel(), BLOCK):
                if any_nonfinite(values[start : start + BLOCK]):
                    raise CheckFailed(f"{path}: tensor `{spec.name}` holds NaN or Inf")
        position += count
        moved(count)
        pending = [spec for spec in pending if spec.end > position]
    return digest.hexdigest()


def _fill(stream: Content, buffer: bytearray) -> int:
    """Read as much as the buffer takes: one call of the system may give less."""
    view = memoryview(buffer)
    count = 0
    while count < len(buffer) and (more := stream.readinto(view[count:])):
        count += more
    return count


def is_intact(folder: Path, proof: ManifestBody) -> bool:
    """Return whether every file still has its digest. Raises ResourceError if the machine cannot tell."""
    try:
        digests = in_threads(lambda file, stop: hash_file(folder / file.name, stop), proof.files)
        return all(file.sha256 == digest for file, digest in zip(proof.files, digests, strict=True))
    except OSError as error:
        if is_machine(error):
            raise unusable(str(error.filename or folder), error) from error
        return False


def input_digests(checkpoints: Mapping[str, Checkpoint]) -> dict[tuple[str, str], str]:
    """sha256 of every weight file, a few at a time."""
    files = [(name, file) for name, checkpoint in checkpoints.items() for file in checkpoint.files]
    digests = in_threads(lambda item, stop: checkpoints[item[0]].sha256(item[1], stop), files)
    return dict(zip(files, digests, strict=True))
