"""uvicorn inside our own loop: bound sockets in, requests to an ASGI app out. Called by the service."""

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from receiver.errors import ConfigError, Problem


def bind(host: str, port: int) -> list[socket.socket]:
    """Bind a listening socket; port 0 takes a free one. Raises ConfigError if it is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named: asyncio turns Nagle's delay (40 ms an answer) off only for sockets that say they are TCP.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError([Problem("public.port", f"cannot listen on {host}:{port}: {error.strerror}")]) from error
    listener.set_inheritable(True)
    return [listener]


class Server(uvicorn.Server):
    """uvicorn inside our loop: it leaves signals to us, and tells when it accepts."""

    def __init__(
        self, app: ASGIApp, sockets: list[socket.socket], *, cert: Path | None = None, key: Path | None = None
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="off",
                http="h11",  # its head is limited to 16 KiB; httptools' is not
                h11_max_incomplete_event_size=16 * 1024,
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=120,  # a proxy's idle connection must end at the proxy, not here
                timeout_graceful_shutdown=5,
                ssl_certfile=cert,
                ssl_keyfile=key,
            )
        )
        self.sockets = sockets
        self._serving: asyncio.Task[None] | None = None

    @property
    def host(self) -> str:
        return str(self.sockets[0].getsockname()[0])

    @property
    def port(self) -> int:
        return int(self.sockets[0].getsockname()[1])

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Do nothing: uvicorn's own would raise the signal again at the end, and our clean-up would never run."""
        yield

    async def start(self) -> None:
        """Return once connections are accepted."""
        self._serving = asyncio.create_task(self.serve(sockets=self.sockets), name="public")
        while not self.started:
            if self._serving.done():
                await self._serving
                raise RuntimeError("the public listener ended before it began")
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        """Stop accepting, give requests in hand 5 s, close."""
        self.should_exit = True
        if self._serving is not None:
            await self._serving
