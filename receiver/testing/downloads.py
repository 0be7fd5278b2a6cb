"""A download server on loopback that sends exactly the bytes it is told to."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from receiver.model import Output


@dataclass(frozen=True)
class Page:
    """What a path answers: raw bytes, then the end of the connection, or silence where `hold` is set."""

    raw: bytes
    hold: bool = False


def page(body: bytes, content_type: str = "image/png", *headers: str, status: str = "200 OK") -> Page:
    head = [f"HTTP/1.1 {status}", f"Content-Type: {content_type}", f"Content-Length: {len(body)}", *headers]
    return Page("\r\n".join(head).encode() + b"\r\n\r\n" + body)


def redirect(location: str) -> Page:
    return page(b"", "text/plain", f"Location: {location}", "Set-Cookie: session=1", status="302 Found")


@dataclass
class MediaServer:
    """What it answers is in `pages`, by path; what it was asked, whole heads, in `requests`."""

    scheme: str
    host: str
    port: int
    pages: dict[str, Page] = field(default_factory=dict)
    first: dict[str, list[Page]] = field(default_factory=dict)
    """What a path answers before its page, one after the other."""
    requests: list[str] = field(default_factory=list)
    held: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when a page that holds has sent all it will."""

    @property
    def authority(self) -> str:
        return f"{self.host}:{self.port}"

    def url(self, path: str) -> str:
        return f"{self.scheme}://{self.authority}{path}"

    def output(
        self, path: str, answer: Page, *, position: int = 0, output_id: str = "out", kind: str = "imageUrl"
    ) -> Output:
        self.pages[path] = answer
        return Output(position=position, output_id=output_id, type=kind, value=self.url(path))

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
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
async def serving(host: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> AsyncIterator[MediaServer]:
    """Serve on 127.0.0.1; `host` is only what URLs call it."""
    media = MediaServer("https" if tls else "http", host, 0)
    server = await asyncio.start_server(media.answer, "127.0.0.1", 0, ssl=tls)
    media.port = server.sockets[0].getsockname()[1]
    try:
        yield media
    finally:
        server.close()
