"""Buckets on loopback: moto in its own process, a bad link, a store with scripted responses."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx

from handlers.storage import StorageConfig, open_place
from handlers.storage.objects import ObjectStore
from tests.support.patience import PATIENCE_SECONDS

SECRET = "wJalrXUtnFEMI-very-secret"
MOTO = """
import logging, sys
from moto.server import ThreadedMotoServer
logging.getLogger("werkzeug").disabled = True
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class Bucket:
    """A bucket named `bucket`, which accepts any credentials until told otherwise."""

    endpoint: str

    def options(self, **further: Any) -> dict[str, Any]:
        return {
            "endpoint": self.endpoint,
            "region": "us-east-1",
            "access_key_id": "AKIAEXAMPLE",
            "secret_access_key": SECRET,
            "allow_http": True,
            **further,
        }

    def place(
        self, url: str = "s3://bucket/pre", *, cache_control: str | None = None, **options: Any
    ) -> ObjectStore:
        config = StorageConfig.model_validate({"url": url, "store": self.options(**options)})
        place = open_place(config.url, config.store, cache_control)
        assert isinstance(place, ObjectStore)
        return place

    async def get(self, path: str, method: str = "GET") -> httpx.Response:
        async with httpx.AsyncClient(trust_env=False, timeout=PATIENCE_SECONDS) as client:
            return await client.request(method, f"{self.endpoint}/bucket{path}")

    async def open_uploads(self) -> int:
        return (await self.get("?uploads")).text.count("<UploadId>")

    async def reset(self) -> None:
        async with httpx.AsyncClient(
            trust_env=False, base_url=self.endpoint, timeout=PATIENCE_SECONDS
        ) as client:
            await client.post("/moto-api/reset")
            await client.put("/bucket")

    async def let_in_nobody(self) -> None:
        """Check every signature until the next reset."""
        async with httpx.AsyncClient(
            trust_env=False, base_url=self.endpoint, timeout=PATIENCE_SECONDS
        ) as client:
            await client.post("/moto-api/reset-auth", content=b"0")

    async def let_in_everybody(self) -> None:
        async with httpx.AsyncClient(
            trust_env=False, base_url=self.endpoint, timeout=PATIENCE_SECONDS
        ) as client:
            await client.post("/moto-api/reset-auth", content=b"inf")


@contextmanager
def moto() -> Iterator[Bucket]:
    """Run moto's S3 in its own process, so that its memory is not ours."""
    with subprocess.Popen(
        [sys.executable, "-c", MOTO], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        try:
            yield Bucket(f"http://127.0.0.1:{_port(process)}")
        finally:
            process.kill()


def _port(process: "subprocess.Popen[bytes]") -> int:
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip().isdigit():
            return int(line)
    raise AssertionError("moto did not start")


@dataclass
class Link:
    """A TCP proxy that cuts connections after so many bytes, or slows them down."""

    port: int = 0
    cuts: Callable[[int], int | None] = lambda _: None
    """Number of a connection (from 0) → bytes from the client after which it is cut, or None."""
    bytes_per_second: float | None = None
    silent: bool = False
    """Whether nothing ever comes back."""
    connections: int = 0
    broken: int = 0
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@asynccontextmanager
async def link(target: str, **how: Any) -> AsyncIterator[Link]:
    made = Link(**how)
    host, port = urlsplit(target).hostname, urlsplit(target).port

    async def handle_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        limit, made.connections = made.cuts(made.connections), made.connections + 1
        made.writers.append(writer)
        there, away = await asyncio.open_connection(host, port)
        made.writers.append(away)
        back = asyncio.create_task(_pump(there, writer)) if not made.silent else None
        sent = 0
        try:
            while data := await reader.read(65536):
                sent += len(data)
                if limit is not None and sent > limit:
                    made.broken += 1
                    writer.transport.abort()
                    break
                if made.bytes_per_second:
                    await asyncio.sleep(len(data) / made.bytes_per_second)
                away.write(data)
                await away.drain()
        except OSError:
            pass
        finally:
            away.close()
            if back is not None:
                await back
            writer.close()

    server = await asyncio.start_server(handle_connection, "127.0.0.1", 0)
    made.port = server.sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        server.close()
        for writer in made.writers:
            writer.transport.abort()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass


@dataclass
class RequestLog:
    """A store with one response for each method: (status, headers, body)."""

    answers: dict[str, tuple[int, dict[str, str], bytes]]
    port: int = 0
    requests: list[str] = field(default_factory=list)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@asynccontextmanager
async def scripted_store(**answers: tuple[int, dict[str, str], bytes]) -> AsyncIterator[RequestLog]:
    made = RequestLog(answers)

    async def handle_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                method = head.partition(" ")[0]
                made.requests.append(head)
                length = next(
                    (
                        int(line[15:])
                        for line in head.lower().split("\r\n")
                        if line.startswith("content-length:")
                    ),
                    0,
                )
                await reader.readexactly(length)
                status, headers, body = made.answers[method]
                headers = {
                    "Content-Length": str(len(body)),
                    "Last-Modified": "Tue, 24 Nov 2026 12:00:00 GMT",
                    **headers,
                }
                lines = [
                    f"HTTP/1.1 {status} Told",
                    *(f"{name}: {value}" for name, value in headers.items()),
                ]
                writer.write(
                    "\r\n".join(lines).encode() + b"\r\n\r\n" + (b"" if method == "HEAD" else body)
                )
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(handle_connection, "127.0.0.1", 0)
    made.port = server.sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        server.close()
