"""uvicorn in an event loop of ours, on sockets that are bound already.

Used by the service, and by commands for the emulator.
"""

import asyncio
import contextlib
import socket
import ssl
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp

from receiver.errors import ConfigError, Problem
from receiver.net.addresses import join_address, parse_address, to_unix_path
from receiver.web.accept_limits import Acceptor, max_handshakes
from receiver.web.certificate import load_context
from receiver.web.connection_guard import Guard
from receiver.web.connections import H11Connection
from receiver.web.unix_socket import bind_unix

_UNGUARDED_CONNECTIONS = 2000
"""How many connections a listener without a guard is prepared for."""
_HANDSHAKE_SECONDS = 5.0
_IPV6 = 6


def bind(host: str, port: int, *, setting: str = "public") -> list[socket.socket]:
    """Bind a socket to an address, or to the path of `unix:/path`; port 0 takes a free port.

    Raises ConfigError if that is not possible, for example because the port is taken.
    """
    if (path := to_unix_path(host)) is not None:
        return [bind_unix(path, setting=setting)]
    address = parse_address(host)
    family = socket.AF_INET6 if address is not None and address.version == _IPV6 else socket.AF_INET
    # asyncio turns off Nagle's delay (40 ms a response) only for sockets that are named as TCP.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:  # `::` is every address, those of IPv4 too, on every system
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    try:
        listener.bind((host if address is None else str(address), port))
    except OSError as error:
        listener.close()
        message = f"cannot listen on {join_address(host, port)}: {error.strerror}; choose another"
        raise ConfigError([Problem(f"{setting}.port", message)]) from error
    listener.set_inheritable(True)
    return [listener]


def bound_address(listener: socket.socket) -> tuple[str, int]:
    """Return the host and port of a socket: of a Unix socket `unix:/path` (or `unix:@name`) and 0."""
    name = listener.getsockname()
    if listener.family != socket.AF_UNIX:
        return str(name[0]), int(name[1])
    path = f"@{name[1:].decode('utf-8', 'replace')}" if isinstance(name, bytes) else name
    return f"unix:{path}", 0


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
        return bound_address(self.sockets[0])[0]

    @property
    def port(self) -> int:
        return bound_address(self.sockets[0])[1]

    def addresses(self) -> list[str]:
        """Return where it listens: `host:port` or `unix:/path` of each socket."""
        return [join_address(*bound_address(each)) for each in self.sockets]

    def origins(self) -> list[str]:
        """Return where it listens, with the scheme of each address."""
        scheme = "https" if self.config.is_ssl else "http"
        return [each if to_unix_path(each) else f"{scheme}://{each}" for each in self.addresses()]

    @property
    def listener_name(self) -> str:
        return self._name

    def load_context(self, cert: Path, key: Path) -> ssl.SSLContext:
        """Return a context like that of this listener for another pair of files. Raises ConfigError."""
        return load_context(cert, key, ciphers=self.config.ssl_ciphers or "DEFAULT")

    def replace_context(self, context: ssl.SSLContext) -> None:
        """Serve new connections with another certificate. Those that are open keep theirs."""
        self.config.ssl = context
        for each in self.servers:
            if isinstance(each, Acceptor):
                each.tls = context

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
        for listener in self.sockets:
            listener.close()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen as uvicorn does, but on the given sockets alone, with a limit on handshakes."""
        await self.lifespan.startup()
        self.servers = [await self._listen(listener) for listener in self.sockets]
        self.started = True

    async def _listen(self, listener: socket.socket) -> Any:
        loop = asyncio.get_running_loop()
        if listener.family == socket.AF_UNIX:  # it does not leave this machine: there TLS protects nothing
            options: dict[str, Any] = {"backlog": self.config.backlog}
            if sys.version_info >= (3, 13):
                options["cleanup_socket"] = False  # it may belong to systemd
            return await loop.create_unix_server(self._connection, sock=listener, **options)
        if self.config.ssl is None:
            return await loop.create_server(self._connection, sock=listener, backlog=self.config.backlog)
        connections = _UNGUARDED_CONNECTIONS if self._guard is None else self._guard.limits.connections
        return Acceptor(
            listener,
            self._connection,
            self.config.ssl,
            # Together they may take as many file descriptors as are kept for handshakes.
            at_once=max(1, max_handshakes(connections) // len(self.sockets)),
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
