"""A forward proxy on loopback: a real server that answers CONNECT, as those of offices do."""

import asyncio
import base64
import contextlib
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass, field


@dataclass
class ForwardProxy:
    """What the proxy does, and what it was asked for."""

    port: int = 0
    routes: dict[str, int] = field(default_factory=dict)
    """The port on 127.0.0.1 behind each `host:port` that it connects to; others get 502."""
    credentials: str | None = None
    """The `user:password` that it wants."""
    answer: bytes | None = None
    """Bytes that it sends in place of its answer."""
    targets: list[str] = field(default_factory=list)
    """The `host:port` of each CONNECT."""

    open: dict[asyncio.Task[None], list[asyncio.StreamWriter]] = field(default_factory=dict)
    """The connections that are being served, by task."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.open[task] = [writer]
        task.add_done_callback(self.open.pop)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            method, target, _ = head.split("\r\n")[0].split(" ")
            self.targets.append(target if method == "CONNECT" else f"{method} {target}")
            reply, port = self._decide(target, head)
            writer.write(self.answer or reply)
            await writer.drain()
            if port:
                other_reader, other_writer = await asyncio.open_connection("127.0.0.1", port)
                self.open[task].append(other_writer)
                await asyncio.gather(_pass_on(reader, other_writer), _pass_on(other_reader, writer))
        writer.close()

    def _decide(self, target: str, head: str) -> tuple[bytes, int | None]:
        wanted = base64.b64encode((self.credentials or "").encode()).decode()
        if self.credentials and f"\r\nProxy-Authorization: Basic {wanted}\r\n" not in head:
            return b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", None
        port = self.routes.get(target)
        if port is None:
            return b"HTTP/1.1 502 No Route\r\nContent-Length: 0\r\n\r\n", None
        return b"HTTP/1.1 200 Connection established\r\n\r\n", port


async def _pass_on(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while part := await source.read(65_536):
            target.write(part)
            await target.drain()
    target.close()


@contextlib.asynccontextmanager
async def run_forward_proxy(tls: ssl.SSLContext | None = None) -> AsyncIterator[ForwardProxy]:
    proxy = ForwardProxy()
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0, ssl=tls)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        for writers in proxy.open.values():
            for writer in writers:
                writer.transport.abort()
        await asyncio.gather(*proxy.open, return_exceptions=True)
