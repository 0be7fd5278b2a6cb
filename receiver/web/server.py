"""uvicorn in an event loop of ours, on sockets that are bound already.

Used by the service, and by commands for the emulator.
"""

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp

from receiver.errors import ConfigError, Problem
from receiver.web.accept_limits import Acceptor, max_handshakes
from receiver.web.connection_guard import Guard
from receiver.web.connections import H11Connection

_UNGUARDED_CONNECTIONS = 2000
"""How many connections a listener without a guard is prepared for."""
_HANDSHAKE_SECONDS = 5.0


def bind(host: str, port: int, *, setting: str = "public") -> list[socket.socket]:
    """Bind a socket; port 0 takes a free port. Raises ConfigError if the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns off Nagle's delay (40 ms a response) only for sockets that are named as TCP.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            [
                Problem(
                    f"{setting}.port", f"cannot listen on {host}:{port}: {error.strerror}; choose another"
                )
            ]
        ) from error
    listener.set_inheritable(True)
    return [listener]


class Server(uvicorn.Server):
    """uvicorn without its signal handlers; `start` returns once it accepts connections."""

    def __init__(
        self,
        app: ASGIApp,
        sockets: list[socket.socket],
        *,
        cert: Path | None = None,
        key: Path | None = None,
        guard: Guard | None = None,
        keep_alive_seconds: int = 120,
        name: str = "http",
    ) -> None:
        """Configure uvicorn: httptools within the limits of `guard`, or else h11, which is slower.

        `keep_alive_seconds` is how long a connection may be idle: longer than a proxy in front keeps
        it, so that it is the proxy that ends idle ones. `name` is that of the listener's tasks.
        """
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="off",
                # uvicorn calls the class, so a function that returns a protocol serves as well.
                http=H11Connection if guard is None else cast("type[asyncio.Protocol]", guard.protocol),
                h11_max_incomplete_event_size=16 * 1024,
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,  # the public listener reads them itself
                timeout_keep_alive=keep_alive_seconds,
                timeout_graceful_shutdown=5,
                ssl_certfile=cert,
                ssl_keyfile=key,
            )
        )
        self.sockets = sockets
        self._name = name
        self._guard = guard
        self._serving: asyncio.Task[None] | None = None
        self._sweeping: asyncio.Task[None] | None = None

    @property
    def host(self) -> str:
        return str(self.sockets[0].getsockname()[0])

    @property
    def port(self) -> int:
        return int(self.sockets[0].getsockname()[1])

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Do nothing: uvicorn would raise the signal again before the service has cleaned up."""
        yield

    async def start(self) -> None:
        """Return once connections are accepted."""
        self._serving = asyncio.create_task(self.serve(sockets=self.sockets), name=f"{self._name}.serve")
        while not self.started:
            if self._serving.done():
                await self._serving
                raise RuntimeError("the listener ended before it accepted connections")
            await asyncio.sleep(0.01)
        if self._guard is not None:
            self._sweeping = asyncio.create_task(self._guard.sweep_forever(), name=f"{self._name}.guard")

    async def stop(self) -> None:
        """Stop accepting, give requests in progress 5 s, close."""
        self.should_exit = True
        if self._serving is not None:
            await self._serving
        if self._sweeping is not None:
            self._sweeping.cancel()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen as uvicorn does, but on the given sockets alone, with a limit on handshakes."""
        await self.lifespan.startup()
        self.servers = [await self._listen(listener) for listener in self.sockets]
        self.started = True

    async def _listen(self, listener: socket.socket) -> Any:
        if self.config.ssl is None:
            loop = asyncio.get_running_loop()
            return await loop.create_server(self._connection, sock=listener, backlog=self.config.backlog)
        connections = _UNGUARDED_CONNECTIONS if self._guard is None else self._guard.limits.connections
        return Acceptor(
            listener,
            self._connection,
            self.config.ssl,
            at_once=max_handshakes(connections),
            handshake_seconds=_HANDSHAKE_SECONDS,
        )

    def _connection(self) -> asyncio.Protocol:
        make: Callable[..., asyncio.Protocol] = self.config.http_protocol_class
        return make(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop as uvicorn does, without waiting for TLS peers to confirm: idle ones never do."""
        abort_idle = asyncio.create_task(self._abort_closing(), name=f"{self._name}.abort_closing")
        try:
            await super().shutdown(sockets)
        finally:
            abort_idle.cancel()

    async def _abort_closing(self) -> None:
        while True:
            await asyncio.sleep(0.3)
            for connection in list(self.server_state.connections):
                transport = connection.transport
                if transport.is_closing() and not transport.get_write_buffer_size():
                    transport.abort()
