"""Private directories, one for each attempt, removed even if the service is killed. For `command`.

The service locks each directory while it is in use. One without a lock is left over from a killed
service, and a program still running in it is killed: its attempt will be repeated, and must not run
twice at a time.
"""

import errno
import fcntl
import os
import shutil
import signal
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

_PREFIX = "attempt-"
_PROGRAM_FILE = "program"
_FILES_DIRECTORY = "files"


def default_parent() -> Path:
    """Return the parent of this user's directories: `flora-receiver-<uid>` in TMPDIR."""
    return Path(tempfile.gettempdir()) / f"flora-receiver-{os.getuid()}"


class Workdir:
    """A new directory below `parent`, only for this user. OSError if it cannot be made."""

    def __init__(self, parent: Path) -> None:
        ensure_parent(parent)
        while True:
            self._root = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
            with suppress(FileNotFoundError):
                self._lock = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                with suppress(
                    OSError
                ):  # no locks on this file system: `sweep` fails likewise and removes nothing
                    fcntl.flock(self._lock, fcntl.LOCK_EX)
                if self._root.exists():  # else a sweep removed it before it was locked
                    break
                os.close(self._lock)
        self.path = self._root / _FILES_DIRECTORY
        try:
            self.path.mkdir(mode=0o700)
        except OSError:
            self.remove()
            raise

    def record_program(self, pid: int) -> None:
        """Record which program runs here, if the system can identify it for good."""
        if identity := _read_identity(pid):
            with suppress(OSError):
                (self._root / _PROGRAM_FILE).write_text(f"{pid} {identity}")

    def remove(self) -> None:
        """Remove the directory and its content. What cannot be removed is left to a later sweep."""
        _remove(self._root)
        os.close(self._lock)


def ensure_parent(parent: Path) -> None:
    """Make the parent, or check that it is this user's alone: another may have made it in /tmp."""
    parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_privacy(parent)


def check_parent(parent: Path) -> None:
    """Check that the parent can be made or is this user's alone. OSError if not; makes nothing."""
    if os.path.lexists(parent):
        return _check_privacy(parent)
    above = next(each for each in parent.absolute().parents if os.path.lexists(each))
    if not os.access(above, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(above))
    return None


def _check_privacy(parent: Path) -> None:
    status = parent.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise PermissionError(
            errno.EPERM, "is not a directory that belongs to this user alone (mode 0700)", str(parent)
        )


def sweep(parent: Path) -> None:
    """Kill programs that killed services have left running, and remove their directories."""
    for path in parent.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _kill_program(path / _PROGRAM_FILE)
                _remove(path)
            finally:
                os.close(lock)


def _kill_program(record: Path) -> None:
    with suppress(OSError, ValueError):
        pid, _, identity = record.read_text().partition(" ")
        if identity and identity == _read_identity(int(pid)):
            os.killpg(int(pid), signal.SIGKILL)


def _read_identity(pid: int) -> str | None:
    """Return what identifies a process beyond its number: the boot, and when in it it began."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return f"{boot} {fields[19]}"


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    if path.exists():  # a directory without permissions, or a process that was still ending
        for directory, names, _ in os.walk(path):  # from the top, so that each can be entered
            for inner in (Path(directory, name) for name in names):
                with suppress(OSError):
                    if not inner.is_symlink():
                        inner.chmod(0o700)
        shutil.rmtree(path, ignore_errors=True)
