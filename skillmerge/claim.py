"""A folder that belongs to one run: a lock if the filesystem supports locks, and the owner's token everywhere.

    folder/lock     locked while a run works in the folder
    folder/owner    a random token of the run that took the folder last

Some filesystems refuse `flock` (Lustre without `-o flock`), others answer it and lock nothing (NFS with `local_lock`,
some FUSE). There the token tells: the run that finds another one in its place stops and touches nothing more.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from skillmerge.durable import (
    UNSUPPORTED,
    disk_errors,
    is_taken,
    remove_tree,
    rename_folder,
    sync_file,
    sync_folder,
)
from skillmerge.errors import OutputLocked, ResourceError, SkillmergeError, UsageError
from skillmerge.reporter import Reporter

LOCK_FILE, OWNER_FILE = "lock", "owner"
CLAIM_FILES = (LOCK_FILE, OWNER_FILE)

_TRIES = 100
"""How often the folder may vanish while it is taken. Where it never comes to be, its path is wrong."""
_NO_LOCKS = (*UNSUPPORTED, errno.ENOLCK)
_TAKEN = (errno.EAGAIN, errno.EACCES)
"""Error numbers of `flock` if another run has the lock; CIFS uses EACCES."""


class Claim:
    """A folder taken for this run, until `close`. Raises UsageError and ResourceError as `disk_errors` says."""

    def __init__(self, folder: Path, target: Path, reporter: Reporter) -> None:
        """Create the folder and take it. target: what messages say is being written.

        Raises OutputLocked if another run holds it. Warns where the filesystem has no locks, and notes where it
        cannot sync folders.
        """
        self.folder, self._target = folder, target
        self.token = secrets.token_hex(16)
        self._token = self.token.encode()
        with disk_errors(folder, "choose another folder with `--output`"):
            self._descriptor, why, synced = self._acquire()
        if why:
            reporter.warn(
                f"the filesystem of {target} has no file locks ({why}), so a second run on it would stop this one",
                fix="run one command at a time on this output",
            )
        if not synced:
            reporter.note(
                f"the filesystem of {target} cannot sync folders; after a power failure, rerun the same command"
            )

    def _acquire(self) -> tuple[int, str, bool]:
        """Return the lock's descriptor, why it locks nothing, where it does not, and whether the folder's names are
        durable.

        Raises OutputLocked, OSError.
        """
        for left in reversed(range(_TRIES)):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                # For writing: NFSv4 locks nothing else.
                descriptor = os.open(self.folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except (FileNotFoundError, FileExistsError):
                if not left or (os.path.lexists(self.folder) and not self.folder.is_dir()):
                    raise
                continue  # another run has just finished and removed the folder
            try:
                why = _lock(descriptor)
                if why or self._is_named(descriptor):
                    return descriptor, why, self._sign(remove=not why)
            except FileNotFoundError:
                pass  # as above, where nothing is locked
            except BlockingIOError as error:
                os.close(descriptor)
                raise self._locked() from error
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
        raise self._locked()

    def _locked(self) -> OutputLocked:
        return OutputLocked(
            f"another run is writing {self._target}", fix="wait for it, or choose another folder with `--output`"
        )

    def _sign(self, remove: bool) -> bool:
        """Write the owner's file. Returns whether the folder's names are durable. Raises OSError."""
        try:
            (self.folder / OWNER_FILE).write_bytes(self._token)
            return sync_folder(self.folder)
        except BaseException:
            if remove:
                self._remove()
            raise

    def _is_named(self, descriptor: int) -> bool:
        """Return whether the file that is locked still has the lock's name: its last owner may have removed it."""
        path = self.folder / LOCK_FILE
        try:
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return True
            # Inode numbers may change at every look: what is written through the one is read through the other.
            os.pwrite(descriptor, self._token, 0)
            sync_file(descriptor)
            return path.read_bytes() == self._token
        except FileNotFoundError:
            return False

    def is_mine(self) -> bool:
        """Return whether this run still owns the folder."""
        with disk_errors(self.folder):
            try:
                return (self.folder / OWNER_FILE).read_bytes() == self._token
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.ESTALE):
                    return False
                raise

    @contextmanager
    def working(self) -> Iterator[None]:
        """Turn any error in a folder that another run has taken over into OutputLocked, and any because of something
        of this run's that is gone: without locks, a run that was late to notice this one may have removed it."""
        try:
            yield
        except (SkillmergeError, OSError) as error:
            if self._descriptor >= 0 and not isinstance(error, OutputLocked):
                with suppress(UsageError, ResourceError):  # who owns it cannot be seen: the first error says more
                    self.check()
                if gone := self._gone(error):
                    raise OutputLocked(
                        f"another run or program has removed {gone}; this run has stopped",
                        fix="let that run finish, then run the same command again",
                    ) from error
            raise

    def _gone(self, error: Exception) -> Path | None:
        """Return what an error says is missing from this run's folder."""
        cause = error.__cause__ if isinstance(error, UsageError) else error
        if not isinstance(cause, FileNotFoundError) or not isinstance(cause.filename, str | bytes | os.PathLike):
            return None
        path = Path(os.fsdecode(cause.filename))
        return path if self.folder in path.parents and not os.path.lexists(path) else None

    def check(self) -> None:
        """Raise OutputLocked if another run has taken the folder meanwhile."""
        if not self.is_mine():
            raise OutputLocked(
                f"another run has taken over {self._target}; this one has stopped and left it alone",
                fix="let that run finish, or choose another folder with `--output`",
            )

    def close(self) -> None:
        """Release the folder, and remove it if it is empty and still this run's."""
        if self._descriptor >= 0:
            mine = False
            with suppress(OSError):
                mine = (self.folder / OWNER_FILE).read_bytes() == self._token
            self._let_go(remove=mine)

    def _let_go(self, remove: bool) -> None:
        if remove:
            self._remove()
        with suppress(OSError):
            os.close(self._descriptor)
        self._descriptor = -1

    def _remove(self) -> None:
        """Remove lock and owner, and the folder where it is empty."""
        with suppress(OSError):
            for name in reversed(CLAIM_FILES):
                (self.folder / name).unlink(missing_ok=True)
            self.folder.rmdir()


def _lock(descriptor: int) -> str:
    """Lock a file. Returns why locking is unsupported here, or "". Raises BlockingIOError if it is taken."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            raise BlockingIOError(error.errno, error.strerror) from error
        if error.errno not in _NO_LOCKS:
            raise
        return error.strerror or "flock"
    return ""


def is_held(folder: Path, unknown: bool = False) -> bool:
    """Return whether a run holds a folder's lock at this instant. unknown: what is returned where the filesystem has no
    locks."""
    try:
        descriptor = os.open(folder / LOCK_FILE, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _TAKEN or (unknown and error.errno in _NO_LOCKS)
    finally:
        os.close(descriptor)
    return False


@contextmanager
def hold(folder: Path, reporter: Reporter) -> Iterator[Claim]:
    """Hold a folder for this run alone. Raises OutputLocked if another run does."""
    with closing(Claim(folder, folder, reporter)) as claim, claim.working():
        yield claim


@contextmanager
def new_folder(target: Path, reporter: Reporter) -> Iterator[Path]:
    """Yield a folder to fill, which is called `target` when all is done and does not exist otherwise.

    For outputs that are small beside a merge: nothing is kept of a failed try, and what a killed one left is
    removed by the next. Raises UsageError if there is something at `target` already; OutputLocked if
    another run fills it; ResourceError.
    """
    with disk_errors(target):
        if is_taken(target):
            raise UsageError(
                f"{target} already exists", fix="choose another folder with `--output`, or remove it yourself"
            )
        folder = target.with_name(f".{target.name}.writing")
        with closing(Claim(folder, target, reporter)) as claim, claim.working():
            _clear(claim)
            folder = claim.folder / "files"
            folder.mkdir()
            try:
                yield folder
                for path in folder.iterdir():
                    with open(path, "rb+") as stream:  # for writing: some filesystems sync nothing else
                        sync_file(stream.fileno())
                sync_folder(folder)
                claim.check()
                rename_folder(folder, target)
                sync_folder(target.parent)
            finally:
                with suppress(OSError, SkillmergeError):
                    _clear(claim)


def _clear(claim: Claim) -> None:
    """Remove what is in a folder, where it is still this run's. Raises OSError."""
    if claim.is_mine():
        for path in claim.folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                remove_tree(path)
            elif path.name not in CLAIM_FILES:
                path.unlink()
