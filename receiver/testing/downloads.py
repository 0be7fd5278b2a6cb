"""A download server on loopback that sends exact bytes, valid HTTP or not."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from receiver.model import Output


@dataclass(frozen=True)
class Page:
    """The response at a path."""

    raw: bytes
    """The bytes to send, head included."""
    hold: bool = False
    """Whether the connection then stays open and silent."""


def page(body: bytes, content_type: str = "image/png", *headers: str, status: str = "200 OK") -> Page:
    """Return a complete response. `headers` are further lines, such as `Accept-Ranges: bytes`."""
    head = [f"HTTP/1.1 {status}", f"Content-Type: {content_type}", f"Content-Length: {len(body)}", *headers]
    return Page("\r\n".join(head).encode() + b"\r\n\r\n" + body)


def redirect(location: str) -> Page:
    """Return a redirect, which also sets a cookie."""
    return page(b"", "text/plain", f"Location: {location}", "Set-Cookie: session=1", status="302 Found")


@dataclass
class MediaServer:
    """A download server. It answers 404 at paths that have no page."""

    scheme: str
    """`http` or `https`."""
    host: str
    """The host in its URLs."""
    port: int
    """The port that it listens on."""
    pages: dict[str, Page] = field(default_factory=dict)
    """The response at each path."""
    first: dict[str, list[Page]] = field(default_factory=dict)
    """Responses that a path sends once each, in this order, before its page."""
    requests: list[str] = field(default_factory=list)
    """The heads of the requests so far."""
    held: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when a page with `hold` has been sent."""

    @property
    def authority(self) -> str:
        """`host:port`."""
        return f"{self.host}:{self.port}"

    def url(self, path: str) -> str:
        """Return the URL of a path."""
        return f"{self.scheme}://{self.authority}{path}"

    def output(
        self,
        path: str,
        answer: Page,
        *,
        position: int = 0,
        output_id: str = "out",
        kind: str = "imageUrl",
    ) -> Output:
        """Put a page at a path and return the output that has its URL."""
        self.pages[path] = answer
        return Output(position=position, output_id=output_id, type=kind, value=self.url(path))

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                self.requests.append(head)
                path = head.split(" ")[1]
                before = self.first.get(path)
                found = before.pop(0) if before else self.pages.get(path, page(b"", status="404 Not Found"))
                writer.write(found.raw)
                await writer.drain()
                if found.hold:
                    self.held.set()
                    await reader.read()
                if found.hold or not found.raw.startswith(b"HTTP/1.1 302"):
                    return
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def serve_media(
    host: str = "127.0.0.1", tls: ssl.SSLContext | None = None
) -> AsyncIterator[MediaServer]:
    """Run a download server on 127.0.0.1; `host` is the name in its URLs."""
    media = MediaServer("https" if tls else "http", host, 0)
    server = await asyncio.start_server(media.answer, "127.0.0.1", 0, ssl=tls)
    media.port = server.sockets[0].getsockname()[1]
    try:
        yield media
    finally:
        server.close()


serving = serve_media
"""The former name of `serve_media`."""
