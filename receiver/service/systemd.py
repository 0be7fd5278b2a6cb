"""What the service says to systemd, and what it is given: readiness, a watchdog, listening sockets. Used by `serve`.

The protocols are sd_notify(3) and sd_listen_fds(3): datagrams of NAME=value lines, and file descriptors from 3 on.
"""

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

_FIRST = 3
_NAMES = frozenset({"public", "operations"})


def listeners(environ: Mapping[str, str], pid: int) -> dict[str, socket.socket]:
    """Return the sockets that were handed over, by `FileDescriptorName=`; one without a name of ours is `public`."""
    if environ.get("LISTEN_PID") != str(pid):
        return {}
    names = environ.get("LISTEN_FDNAMES", "").split(":")
    found = {}
    for number in range(int(environ.get("LISTEN_FDS", "0"))):
        os.set_inheritable(_FIRST + number, False)
        given = names[number] if number < len(names) else ""
        listener = socket.socket(fileno=_FIRST + number)
        listener.setblocking(False)
        found[given if given in _NAMES else "public"] = listener
    return found


@dataclass(frozen=True, slots=True)
class Supervisor:
    """Who started us and wants to hear of us; `address` None: nobody does. `watchdog_seconds` None: there is no watchdog."""

    address: str | None = None
    watchdog_seconds: float | None = None

    @classmethod
    def of(cls, environ: Mapping[str, str], pid: int) -> "Supervisor":
        seconds = None
        if environ.get("WATCHDOG_PID", str(pid)) == str(pid) and environ.get("WATCHDOG_USEC", "").isdecimal():
            seconds = int(environ["WATCHDOG_USEC"]) / 1e6
        return cls(environ.get("NOTIFY_SOCKET") or None, seconds or None)

    def tell(self, *words: str) -> None:
        """Send words such as `READY=1`. Nobody to hear them is no error."""
        if self.address is None:
            return
        address = "\0" + self.address[1:] if self.address.startswith("@") else self.address
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as way,
        ):
            way.sendto("\n".join(words).encode(), address)

    async def watch(self, alive: Callable[[], Awaitable[None]]) -> None:
        """Say that we live twice within the watchdog's time, for as long as `alive` returns.

        That is asked from the event loop and may take long or hang: then nothing is said, and systemd starts us anew.
        """
        if self.watchdog_seconds is None:
            return
        while True:
            await alive()
            self.tell("WATCHDOG=1")
            await asyncio.sleep(self.watchdog_seconds / 2)
