"""An HTTP(S) server on loopback that records posts and sends scripted responses."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from tests.support.media import Page


@dataclass(frozen=True)
class Post:
    """One request: its first line, its headers in lower case, its body."""

    line: str
    headers: dict[str, str]
    body: bytes


def answer(status: str = "200 OK", body: bytes = b"", *headers: str) -> Page:
    head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
    return Page("\r\n".join(head).encode() + b"\r\n\r\n" + body)


@dataclass
class Target:
    scheme: str
    host: str
    port: int = 0
    answers: list[Page] = field(default_factory=list)
    """One for each post, the last one for all that follow."""
    posts: list[Post] = field(default_factory=list)
    connections: int = 0
    held: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when a page that holds has been sent."""
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the client has disconnected."""

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.host}:{self.port}/hooks/flora"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                line, *rest = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").strip().split("\r\n")
                headers = {
                    name.lower(): value.strip() for name, _, value in (each.partition(":") for each in rest)
                }
                body = await reader.readexactly(int(headers["content-length"]))
                self.posts.append(Post(line, headers, body))
                chosen = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
                writer.write(chosen.raw)
                await writer.drain()
                if chosen.hold:
                    self.held.set()
                    await reader.read()
                if chosen.hold or b"Content-Length" not in chosen.raw or b"Connection: close" in chosen.raw:
                    return
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.gone.set()
            writer.close()


@asynccontextmanager
async def target(host: str = "localhost", tls: ssl.SSLContext | None = None) -> AsyncIterator[Target]:
    """Listen on 127.0.0.1; `host` is the name in its URL."""
    made = Target("https" if tls else "http", host, answers=[answer()])
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0, ssl=tls)
    made.port = server.sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        server.close()
