"""Private directories that last for one attempt, and go even if the service is killed. For `handlers.command`.

Each is locked by the service for as long as it is used. One that nobody locks is left over, and so is the program that
still works in it: its attempt will be made again, and must not be under way twice.
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

PREFIX = "attempt-"
_PROGRAM = "program"
_FILES = "files"


def default_parent() -> Path:
    """Where the directories of this user are made: `flora-receiver-<uid>` below TMPDIR."""
    return Path(tempfile.gettempdir()) / f"flora-receiver-{os.getuid()}"


class Workdir:
    """A fresh directory below `parent`, for nobody but this user. `remove` it; OSError where it cannot be made."""

    def __init__(self, parent: Path) -> None:
        prepare(parent)
        while True:
            self._root = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
            with suppress(FileNotFoundError):
                self._lock = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                with suppress(OSError):  # a file system without locks: nobody will take it for left over, see `sweep`
                    fcntl.flock(self._lock, fcntl.LOCK_EX)
                if self._root.exists():  # else a sweep was faster than our lock
                    break
                os.close(self._lock)
        self.path = self._root / _FILES
        try:
            self.path.mkdir(mode=0o700)
        except OSError:
            self.remove()
            raise

    def note(self, pid: int) -> None:
        """Write down which program works here, where the system tells one process from the next of the same number."""
        if identity := _identity(pid):
            with suppress(OSError):
                (self._root / _PROGRAM).write_text(f"{pid} {identity}")

    def remove(self) -> None:
        """Remove it with all that is in it. Where that fails, a later sweep finds it."""
        _remove(self._root)
        os.close(self._lock)


def prepare(parent: Path) -> None:
    """Make the parent, or make sure that it is ours alone: in a shared /tmp anybody may have been there first."""
    parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = parent.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PermissionError(
            errno.EPERM, "is not a directory that belongs to this user alone (mode 0700)", str(parent)
        )


def sweep(parent: Path) -> None:
    """End what killed services have left running, and remove their directories."""
    for path in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _kill(path / _PROGRAM)
                _remove(path)
            finally:
                os.close(lock)


def _kill(record: Path) -> None:
    with suppress(OSError, ValueError):
        pid, _, identity = record.read_text().partition(" ")
        if identity and identity == _identity(int(pid)):
            os.killpg(int(pid), signal.SIGKILL)


def _identity(pid: int) -> str | None:
    """Tell a process from all others that had or will have its number: this boot, and when in it the process began."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return f"{boot} {fields[19]}"


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    if path.exists():  # the program has locked us out of a directory, or one of its processes was still dying
        for directory, names, _ in os.walk(path):  # from the top, so that each is open before it is entered
            for inner in (Path(directory, name) for name in names):
                with suppress(OSError):
                    if not inner.is_symlink():
                        inner.chmod(0o700)
        shutil.rmtree(path, ignore_errors=True)
