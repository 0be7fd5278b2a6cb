"""The protocols between systemd and the service: readiness, a watchdog, listening sockets.

Used by `serve`.

They are sd_notify(3), datagrams of NAME=value lines, and sd_listen_fds(3), file descriptors from 3
on.
"""

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from receiver.errors import ConfigError, Problem

_FIRST_DESCRIPTOR = 3
_NAMES = frozenset({"public", "operations"})
_FAMILIES = frozenset({socket.AF_INET, socket.AF_INET6, socket.AF_UNIX})


def inherited_listeners(environ: Mapping[str, str], pid: int) -> dict[str, list[socket.socket]]:
    """Return the sockets that systemd passed, by their `FileDescriptorName=`.

    Any other name counts as `public`. Raises ConfigError if one of them cannot be listened on:
    systemd would accept its connections, and none would get a response.
    """
    if environ.get("LISTEN_PID") != str(pid):
        return {}
    names = environ.get("LISTEN_FDNAMES", "").split(":")
    count = environ.get("LISTEN_FDS", "")
    listeners: dict[str, list[socket.socket]] = {}
    for number in range(int(count) if count.isdecimal() else 0):
        name = names[number] if number < len(names) else ""
        listener = _take(_FIRST_DESCRIPTOR + number, name)
        listeners.setdefault(name if name in _NAMES else "public", []).append(listener)
    return listeners


def _take(descriptor: int, name: str) -> socket.socket:
    """Return a descriptor as a listening socket, which children do not inherit."""
    message = f"socket {descriptor} ({name}) is none to listen on: use ListenStream= and Accept=no"
    try:
        os.set_inheritable(descriptor, False)
        listener = socket.socket(fileno=descriptor)
        is_listening = listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise ConfigError([Problem("LISTEN_FDS", message)]) from error
    if listener.family not in _FAMILIES or listener.type != socket.SOCK_STREAM or not is_listening:
        raise ConfigError([Problem("LISTEN_FDS", message)])
    listener.setblocking(False)
    return listener


@dataclass(frozen=True, slots=True)
class Supervisor:
    """The service manager that started this process.

    `address` is its notification socket, None if there is none.

    `watchdog_seconds` is the longest time between two signs of life that it accepts, None for any.
    """

    address: str | None = None
    watchdog_seconds: float | None = None

    @classmethod
    def from_environment(cls, environ: Mapping[str, str], pid: int) -> "Supervisor":
        seconds = None
        if (
            environ.get("WATCHDOG_PID", str(pid)) == str(pid)
            and environ.get("WATCHDOG_USEC", "").isdecimal()
        ):
            seconds = int(environ["WATCHDOG_USEC"]) / 1e6
        return cls(environ.get("NOTIFY_SOCKET") or None, seconds or None)

    def notify(self, *lines: str) -> None:
        """Send notifications such as `READY=1`; does nothing without a notification socket."""
        if self.address is None:
            return
        address = "\0" + self.address[1:] if self.address.startswith("@") else self.address
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel,
        ):
            channel.sendto("\n".join(lines).encode(), address)

    def notify_reload(self, is_over: bool) -> None:
        """Send that the settings are being read again, or that this is over."""
        if is_over:
            self.notify("READY=1")
        else:
            self.notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    async def run_watchdog(self, check_alive: Callable[[], Awaitable[None]]) -> None:
        """Send two signs of life within the watchdog's time, each after `check_alive`.

        If it hangs, no sign is sent, and systemd restarts the service.
        """
        if self.watchdog_seconds is None:
            return
        while True:
            await check_alive()
            self.notify("WATCHDOG=1")
            await asyncio.sleep(self.watchdog_seconds / 2)
