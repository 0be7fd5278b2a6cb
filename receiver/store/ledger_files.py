"""The files of a SQLite ledger: the locks on them, and whether the path still names them.

A file that is removed or replaced stays open: SQLite would go on committing to it, and everything
committed would be gone after a restart. `find_change` compares what the path names with what is
open. It costs a few microseconds, so every commit can be checked before it is acknowledged.

Two locks keep a second service away. The lock file beside the ledger is held from before the ledger
exists until it is closed. A byte of the ledger itself is locked too, for a lock file can be removed:
then a second service would lock a new one.
"""

import contextlib
import errno
import fcntl
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from receiver.errors import StoreInUseError, StoreUnavailableError
from receiver.net.ownership import match_owner

_LOCKED_BYTE = 1 << 40
"""Far from the bytes around 1 GiB that SQLite locks; no byte has to exist there."""
_IS_HELD = frozenset({errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES})
_GIVES_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL})
"""What `flock` answers on NFS without a lock daemon, and on some FUSE file systems."""
_SIDE_FILES = ("-wal", "-shm")


@dataclass(frozen=True, slots=True)
class Change:
    """A file is no longer the one that is open; `lock_only`: the ledger itself is."""

    reason: str
    lock_only: bool = False


class LedgerFiles:
    """A ledger that is locked, by this process alone.

    Close it after the last connection: closing any handle of a file drops SQLite's own locks on it.
    """

    def __init__(self, path: Path, *, create: bool = True) -> None:
        """Lock a ledger. Raises StoreInUseError, StoreUnavailableError.

        `create` makes the file if there is none; otherwise only its lock file is made.
        """
        self._path = str(path)
        # SQLite puts its files beside the file that a symbolic link leads to. With the lock there,
        # too, it does not matter by which of its names a ledger is opened.
        self._file = path.resolve()
        self._lock_path = f"{self._file}.lock"
        self._side_files: dict[str, os.stat_result] = {}
        self._handle: int | None = None
        self._lock = _open_locked(self._lock_path, self._path)
        try:
            self._handle = self._open_ledger(create=create)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Unlock the ledger."""
        if self._handle is not None:
            os.close(self._handle)
        os.close(self._lock)

    def note_side_files(self) -> None:
        """Remember the log and its index: SQLite makes them when the writer connects."""
        for suffix in _SIDE_FILES:
            path = self._file.with_name(self._file.name + suffix)
            with contextlib.suppress(FileNotFoundError):
                self._side_files[str(path)] = path.stat()

    def forget_side_files(self) -> None:
        """Forget the log and its index: SQLite removes them with the last connection."""
        self._side_files = {}

    def find_change(self) -> Change | None:
        """Return what has happened to the files since they were opened, or None."""
        assert self._handle is not None
        ledger = os.fstat(self._handle)
        if self._side_files and not ledger.st_size:
            return Change(f"{self._path} was emptied")
        if reason := _compare(self._path, ledger):
            return Change(reason)
        for path, known in self._side_files.items():
            if reason := _compare(path, known):
                return Change(reason)
        if reason := _compare(self._lock_path, os.fstat(self._lock)):
            return Change(reason, lock_only=True)
        return None

    def _open_ledger(self, *, create: bool) -> int | None:
        try:
            handle = _open_or_create(self._file) if create else os.open(self._file, os.O_RDWR)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and not create:
                return None
            raise StoreUnavailableError(f"cannot open {self._path}: {error.strerror}") from error
        if not _lock_byte(handle):
            os.close(handle)
            raise _in_use(self._path)
        return handle


def _open_or_create(path: Path) -> int:
    """Open a ledger; make it before SQLite does, so that its log and index get its owner, too."""
    with contextlib.suppress(FileExistsError):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        match_owner(handle, path.parent)
        return handle
    return os.open(path, os.O_RDWR)


def _open_locked(lock_path: str, ledger: str) -> int:
    """Open and lock the file beside a ledger; closing the handle unlocks it."""
    try:
        handle = os.open(lock_path, os.O_CREAT | os.O_RDWR, 0o600)
        match_owner(handle, Path(lock_path).parent)
    except OSError as error:
        raise StoreUnavailableError(f"cannot write beside {ledger}: {error.strerror}") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if error.errno not in _IS_HELD:
            raise StoreUnavailableError(_describe_lock_error(lock_path, error)) from error
        raise _in_use(ledger) from error
    if _compare(lock_path, os.fstat(handle)) is not None:  # removed between the two calls
        os.close(handle)
        raise StoreUnavailableError(f"{lock_path} was removed while it was being locked")
    return handle


def _lock_byte(handle: int) -> bool:
    """Lock one byte of a ledger; return False if another process has.

    The lock is the open file's, not the process's (F_OFD_SETLK): SQLite opens and closes the same
    file, which would drop an ordinary one. Where there is no such lock, the lock file stands alone.
    """
    command = getattr(fcntl, "F_OFD_SETLK", None)
    if command is None:
        return True
    try:
        fcntl.fcntl(handle, command, struct.pack("hhqqi0q", fcntl.F_WRLCK, os.SEEK_SET, _LOCKED_BYTE, 1, 0))
    except OSError as error:
        return error.errno not in _IS_HELD
    return True


def _compare(path: str, known: os.stat_result) -> str | None:
    """Return what happened to a file since it was opened, or None if the path still names it."""
    try:
        found = os.stat(path)  # noqa: PTH116 - half the time of Path.stat, at every commit
    except OSError as error:
        return f"{path} was removed" if error.errno == errno.ENOENT else f"{path}: {error.strerror}"
    return None if os.path.samestat(found, known) else f"{path} was replaced by another file"


def _describe_lock_error(lock_path: str, error: OSError) -> str:
    if error.errno in _GIVES_NO_LOCKS:
        return (
            f"the file system of {Path(lock_path).parent} gives no locks ({error.strerror}), and without "
            "one two processes could write the ledger at once: put it on a local disk"
        )
    return f"cannot lock {lock_path}: {error.strerror}"


def _in_use(path: str) -> StoreInUseError:
    return StoreInUseError(
        f"{path} belongs to another running flora-receiver: stop it, or give this one its own [database] url"
    )
