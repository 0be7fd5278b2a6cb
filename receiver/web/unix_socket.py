"""Listening on a Unix socket, for a proxy or for commands on the same machine. Used by `server.py`.

A file system entry stands for the socket. One that a killed process left behind is replaced; one
that another process listens on is not. Who may connect is decided by the permissions of its
directory: the socket itself is open to all, as a port on loopback is.
"""

import contextlib
import os
import socket
import stat

from receiver.errors import ConfigError, Problem

_MODE = 0o666


class UnixListener(socket.socket):
    """A socket that is bound to a path, and removes its entry when it is closed."""

    _entry: tuple[str, int, int] | None = None
    """Path, device and inode of the entry, from when it is bound until it is closed."""

    def __init__(self) -> None:
        super().__init__(socket.AF_UNIX, socket.SOCK_STREAM)

    def bind_path(self, path: str) -> None:
        """Bind. No client can connect before the mode is set, because nothing listens yet."""
        self.bind(path)
        os.chmod(path, _MODE)  # noqa: PTH101  # `Path` has no inode to compare
        made = os.lstat(path)
        self._entry = path, made.st_dev, made.st_ino

    def close(self) -> None:
        """Close, and remove the entry unless another socket has taken the path meanwhile."""
        entry, self._entry = self._entry, None
        if entry is not None:
            path, *inode = entry
            with contextlib.suppress(OSError):
                found = os.lstat(path)
                if [found.st_dev, found.st_ino] == inode:
                    os.unlink(path)  # noqa: PTH108  # see above
        super().close()


def bind_unix(path: str, *, setting: str) -> UnixListener:
    """Bind a socket to a path. Raises ConfigError if that cannot be done."""
    listener = UnixListener()
    try:
        _remove_left_over(path)
        listener.bind_path(path)
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)  # a path that is too long has no `errno`
        raise ConfigError([Problem(f"{setting}.host", f"cannot listen on {path}: {reason}")]) from error
    listener.set_inheritable(True)
    return listener


def _remove_left_over(path: str) -> None:
    """Remove the entry of a socket on which no process listens any more. Raises OSError for any other."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise OSError("there is a file that is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)  # noqa: PTH108  # paths are texts here
            return
        except BlockingIOError:
            pass  # its queue is full
    raise OSError("another process listens there")
