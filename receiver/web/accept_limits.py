"""Who is let in: how many connections this process has room for, and TLS handshakes that nobody else counts.

asyncio and uvloop tell of a connection when its handshake is over. Until then it is a file descriptor like any other, and
whoever opens many and says nothing would leave none for honest callers, the database and the files.
"""

import asyncio
import resource
import socket
import ssl
from collections.abc import Callable

import structlog

log = structlog.get_logger("receiver.web")

_RESERVE = 512
"""File descriptors that are not for callers: the database, downloads, files, the operations listener."""
_GREETED = 100
"""TLS handshakes that may go on at once, at least: callbacks come in bursts."""
_REST_SECONDS = 0.2
"""Before the next try to accept, where there is no file descriptor left."""


def room_for(connections: int) -> int:
    """Return how many of these connections may be open, having raised the limit of open files as far as we may.

    Shells and service managers give 1,024 by default: fewer than the guard lets in, so it would never come to its turn.
    """
    wanted = connections + greeted_at_once(connections) + _RESERVE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return connections
    room = max(1, min(connections, (soft - min(_RESERVE, soft // 2)) * 2 // 3))
    log.warning("connections.few", wanted=connections, room=room, open_files=soft, cure="raise the limit of open files")
    return room


def greeted_at_once(connections: int) -> int:
    """Return how many TLS handshakes may go on beside that many connections."""
    return max(_GREETED, connections // 2)


class Acceptor:
    """Accepts on one listening socket and greets in TLS; the oldest greeting gives way where there are too many.

    It is what `asyncio.Server` is to uvicorn: something to close and to wait for.
    """

    def __init__(
        self,
        listener: socket.socket,
        protocol: Callable[[], asyncio.Protocol],
        tls: ssl.SSLContext,
        *,
        at_once: int,
        handshake_seconds: float,
    ) -> None:
        """Accept from now on. Must be called inside the loop that serves."""
        listener.listen(2048)
        listener.setblocking(False)
        self._listener = listener
        self._protocol = protocol
        self._tls = tls
        self._at_once = at_once
        self._handshake_seconds = handshake_seconds
        self._greetings: dict[asyncio.Task[None], None] = {}
        self._accepting = asyncio.create_task(self._accept(), name="accept")

    def close(self) -> None:
        """Accept nobody any more; who is being greeted has not asked for anything yet."""
        for task in (self._accepting, *self._greetings):
            task.cancel()

    async def wait_closed(self) -> None:
        await asyncio.wait({self._accepting, *self._greetings})

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(self._listener)
            except OSError as error:
                log.error("connections.not_accepted", reason=error.strerror)
                await self._make_room()
                await asyncio.sleep(_REST_SECONDS)
                continue
            task = asyncio.create_task(self._greet(loop, connection), name="greet")
            self._greetings[task] = None
            task.add_done_callback(lambda done: self._greetings.pop(done, None))
            if len(self._greetings) > self._at_once:
                await self._make_room()

    async def _make_room(self) -> None:
        if oldest := next(iter(self._greetings), None):
            oldest.cancel()
            await asyncio.wait({oldest})

    async def _greet(self, loop: asyncio.AbstractEventLoop, connection: socket.socket) -> None:
        try:
            await loop.connect_accepted_socket(
                self._protocol, connection, ssl=self._tls, ssl_handshake_timeout=self._handshake_seconds
            )
        except OSError:  # what is wrong in TLS, hung up or too slow
            connection.close()
