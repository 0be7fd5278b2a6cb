"""The protocols between systemd and the service: readiness, a watchdog, listening sockets.

Used by `serve`.

They are sd_notify(3), datagrams of NAME=value lines, and sd_listen_fds(3), file descriptors from 3
on.
"""

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

_FIRST_DESCRIPTOR = 3
_NAMES = frozenset({"public", "operations"})


def inherited_listeners(environ: Mapping[str, str], pid: int) -> dict[str, socket.socket]:
    """Return the sockets that systemd passed, by their `FileDescriptorName=`.

    Any other name counts as `public`.
    """
    if environ.get("LISTEN_PID") != str(pid):
        return {}
    names = environ.get("LISTEN_FDNAMES", "").split(":")
    listeners = {}
    for number in range(int(environ.get("LISTEN_FDS", "0"))):
        os.set_inheritable(_FIRST_DESCRIPTOR + number, False)
        name = names[number] if number < len(names) else ""
        listener = socket.socket(fileno=_FIRST_DESCRIPTOR + number)
        listener.setblocking(False)
        listeners[name if name in _NAMES else "public"] = listener
    return listeners


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
