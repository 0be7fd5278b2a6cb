"""Limits on accepting: how many connections the process can hold, and how many TLS handshakes.

asyncio and uvloop report a connection only when its handshake is over. Until then it takes a file
descriptor all the same, so that silent callers could leave none for honest ones, for the database
and for files. `Acceptor` counts handshakes and ends the oldest one when there are too many.
"""

import asyncio
import resource
import socket
import ssl
from collections.abc import Callable

import structlog

log = structlog.get_logger("receiver.web")

_RESERVE = 512
"""File descriptors kept for the database, downloads, files and the operations listener."""
_MIN_HANDSHAKES = 100
"""TLS handshakes that may be in progress at once, at least: callbacks come in bursts."""
_RETRY_SECONDS = 0.2
"""The pause before connections are accepted again when no file descriptor was left."""


def fit_connections(connections: int) -> int:
    """Raise the limit of open files as far as permitted; return how many connections fit into it.

    Shells and service managers set it to 1,024 by default. That is less than the guard's limit on
    connections, which would then never apply.
    """
    wanted = connections + max_handshakes(connections) + _RESERVE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return connections
    possible = max(1, min(connections, (soft - min(_RESERVE, soft // 2)) * 2 // 3))
    fix = "raise the limit of open files"
    log.warning("connections.few", wanted=connections, possible=possible, open_files=soft, fix=fix)
    return possible


def max_handshakes(connections: int) -> int:
    """Return how many TLS handshakes may be in progress beside that many connections."""
    return max(_MIN_HANDSHAKES, connections // 2)


class Acceptor:
    """Accepts TLS connections on one socket; takes the place of `asyncio.Server` for uvicorn.

    At most `at_once` handshakes are in progress; one more ends the oldest.
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
        """Start to accept. Must be called in the event loop that serves."""
        listener.listen(2048)
        listener.setblocking(False)
        self._listener = listener
        self._protocol = protocol
        self.tls = tls
        """May be replaced at any time, for the connections that follow."""
        self._at_once = at_once
        self._handshake_seconds = handshake_seconds
        self._handshakes: dict[asyncio.Task[None], None] = {}
        self._accepting = asyncio.create_task(self._accept(), name="accept")

    def close(self) -> None:
        """Stop accepting, and end the handshakes in progress: no request has been sent on them."""
        for task in (self._accepting, *self._handshakes):
            task.cancel()

    async def wait_closed(self) -> None:
        await asyncio.wait({self._accepting, *self._handshakes})

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(self._listener)
            except OSError as error:
                log.error("connections.not_accepted", reason=error.strerror)
                await self._end_oldest()
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            task = asyncio.create_task(self._handshake(loop, connection), name="tls handshake")
            self._handshakes[task] = None
            task.add_done_callback(lambda done: self._handshakes.pop(done, None))
            if len(self._handshakes) > self._at_once:
                await self._end_oldest()

    async def _end_oldest(self) -> None:
        if oldest := next(iter(self._handshakes), None):
            oldest.cancel()
            await asyncio.wait({oldest})

    async def _handshake(self, loop: asyncio.AbstractEventLoop, connection: socket.socket) -> None:
        try:
            await loop.connect_accepted_socket(
                self._protocol, connection, ssl=self.tls, ssl_handshake_timeout=self._handshake_seconds
            )
        except OSError:  # TLS failed, the peer closed the connection, or it was too slow
            connection.close()
