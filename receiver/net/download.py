"""Guarded fetching of output URLs, as bounded streams of bytes. The dispatcher and the handlers call it.

A body that is cut is continued where it ended, if its server offers that and the rest is surely of the same body.

Whoever holds the URL of an output has the output: no message, log line or repr made here shows more than its host.
"""

import asyncio
import hashlib
import ssl
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from receiver.errors import DownloadError, DownloadFailedError, DownloadRefusedError
from receiver.model import Output
from receiver.net.clients import PrivateAddressError, Resolve, media_client, resolve, tls_context
from receiver.net.media_urls import parse_media_url, redirect_target
from receiver.net.ranges import ResumableBody, parse_resumable

__all__ = ["Download", "DownloadLimits", "Downloader", "Saved", "save", "text_download"]

CHUNK_BYTES = 512 * 1024
MAX_REDIRECTS = 3
MAX_RESUMES = 5  # of one download

_OK = 200
_RESUME_SECONDS = 0.1  # before the first; each further one waits three times as long
_TO_A_RANGE = frozenset({200, 206, 416})  # the rest, or word that there is no such rest
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_EXPIRED = frozenset({403, 404, 410})


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadLimits:
    """How much and how long. `stall_seconds` is the longest silence, `deadline_seconds` the whole of one download."""

    max_bytes: int
    stall_seconds: float
    deadline_seconds: float
    connect_seconds: float = 10.0


@dataclass(frozen=True, slots=True, eq=False)
class Download:
    """An output being read: iterate over it once, for chunks of about half a MiB (the last one is shorter)."""

    chunks: AsyncIterator[bytes] = field(repr=False)
    content_type: str | None
    """As the server says, parameters included."""
    content_length: int | None
    """In bytes, where the server says; a body of another length raises DownloadFailedError at its end."""

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self.chunks


@dataclass(frozen=True, slots=True)
class Saved:
    """A file that holds an output. `size` in bytes; `sha256` as 64 lower-case hex digits."""

    path: Path
    size: int
    sha256: str
    content_type: str | None


class Downloader:
    """Opens outputs. Media comes over HTTPS from public addresses, `allow_private_hosts` (exact host:port) excepted."""

    def __init__(
        self,
        *,
        limits: DownloadLimits,
        allow_private_hosts: Iterable[str] = (),
        tls: ssl.SSLContext | None = None,
        resolve: Resolve = resolve,
        count_bytes: Callable[[int], None] | None = None,
    ) -> None:
        self._limits = limits
        self._count_bytes = count_bytes
        tls = tls or tls_context()

        def client(allowed: Iterable[str]) -> httpx.AsyncClient:
            return media_client(
                allow_private_hosts=allowed,
                resolve=resolve,
                tls=tls,
                connect_seconds=self._limits.connect_seconds,
                stall_seconds=self._limits.stall_seconds,
            )

        # Two pools: a redirect must not reach an allowed private host, not even over a connection that is open already.
        self._first = client(allow_private_hosts)
        self._further = client(())

    async def aclose(self) -> None:
        await self._first.aclose()
        await self._further.aclose()

    def open(self, output: Output) -> AbstractAsyncContextManager[Download]:
        """Read an output: its text, or what its URL answers. Raises DownloadRefusedError or DownloadFailedError."""
        return text_download(output.value) if output.is_text else self.fetch(output.value)

    @asynccontextmanager
    async def fetch(self, url: str) -> AsyncIterator[Download]:
        """Read one URL; the deadline covers redirects and body, and is checked whenever bytes are waited for."""
        deadline = asyncio.get_running_loop().time() + self._limits.deadline_seconds
        start = parse_media_url(url)
        response = await self._follow(start, deadline)
        body = _Body(start, response, parse_resumable(response.headers), deadline)
        try:
            yield Download(
                chunks=self._chunks(body),
                content_type=_content_type(response),
                content_length=_content_length(response),
            )
        finally:
            await body.response.aclose()

    async def _follow(self, url: httpx.URL, deadline: float, headers: dict[str, str] | None = None) -> httpx.Response:
        """Send a request, through redirects, and return what it leads to."""
        client = self._first
        for _ in range(MAX_REDIRECTS + 1):
            async with _watching(url.host, deadline):
                try:
                    response = await client.send(client.build_request("GET", url, headers=headers), stream=True)
                except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
                    # Most likely an idle connection that the server was just closing: once more, on another.
                    response = await client.send(client.build_request("GET", url, headers=headers), stream=True)
            try:
                if response.status_code not in _REDIRECTS:
                    self._accept(response, partly=headers is not None)
                    return response
                target = redirect_target(response)
            except BaseException:
                await response.aclose()
                raise
            await response.aclose()
            url, client = target, self._further
        raise DownloadRefusedError(f"{url.host}: more than {MAX_REDIRECTS} redirects")

    def _accept(self, response: httpx.Response, *, partly: bool) -> None:
        host, status = response.url.host, response.status_code
        if status in _EXPIRED:
            raise DownloadFailedError(f"{host} answered {status}: the output is no longer there", expired=True)
        if status not in (_TO_A_RANGE if partly else {_OK}):
            raise DownloadFailedError(f"{host} answered {status}")
        if response.headers.get("content-encoding", "identity").strip().lower() not in {"", "identity"}:
            raise DownloadRefusedError(f"{host} sent an encoded body although none was asked for")
        self._within_limit(host, _content_length(response) or 0)

    async def _chunks(self, body: "_Body") -> AsyncIterator[bytes]:
        received = 0
        while True:
            parts: list[bytes] = []
            size = 0
            host = body.response.url.host
            while size < CHUNK_BYTES:
                try:
                    async with _watching(host, body.deadline):
                        async for part in body.raw:
                            parts.append(part)
                            size += len(part)
                            if self._count_bytes is not None:
                                self._count_bytes(len(part))
                            if size >= CHUNK_BYTES:
                                break
                    if size >= CHUNK_BYTES or body.whole is None or received + size >= body.whole.length:
                        break
                    raise DownloadFailedError(f"{host}: cut")  # noqa: TRY301 - as the HTTP layer says of others
                except DownloadFailedError as cut:
                    await self._resume(body, received + size, cut)
            if not parts and not received:
                raise DownloadFailedError(f"{host} answered with an empty body")
            if not parts:
                return
            received += size
            self._within_limit(host, received)
            if body.whole is not None and received > body.whole.length:
                raise DownloadFailedError(f"{host} sent more than it said it would")
            yield b"".join(parts)

    async def _resume(self, body: "_Body", offset: int, cut: DownloadFailedError) -> None:
        """Go on from `offset` with another answer; where that cannot be, raise `cut`, or what came instead."""
        loop = asyncio.get_running_loop()
        if body.whole is None or not offset:
            raise cut
        await body.response.aclose()
        while body.resumes < MAX_RESUMES:
            pause = _RESUME_SECONDS * 3**body.resumes
            if loop.time() + pause >= body.deadline:
                break
            body.resumes += 1
            await asyncio.sleep(pause)
            try:
                response = await self._follow(body.start, body.deadline, body.whole.range_headers(offset))
            except DownloadFailedError as failure:
                if failure.expired:
                    raise
                continue
            body.go_on_with(response)
            if body.whole.is_continued_by(response.status_code, response.headers, offset):
                return
            await response.aclose()
            break
        raise cut

    def _within_limit(self, host: str, size: int) -> None:
        if size > self._limits.max_bytes:
            raise DownloadRefusedError(f"{host}: the output is larger than the limit of {self._limits.max_bytes} bytes")


class _Body:
    """What is being read: where it was asked for, the answer that it comes in now, and how to ask for its rest."""

    def __init__(
        self, start: httpx.URL, response: httpx.Response, whole: ResumableBody | None, deadline: float
    ) -> None:
        self.start = start
        self.whole = whole
        self.deadline = deadline
        self.resumes = 0
        self.go_on_with(response)

    def go_on_with(self, response: httpx.Response) -> None:
        self.response = response
        self.raw = response.aiter_raw()


async def save(download: Download, path: Path) -> Saved:
    """Write a download into a file that does not exist yet. Nothing is left of it when that fails; it is not synced."""
    digest, size = hashlib.sha256(), 0
    file = await asyncio.to_thread(path.open, "xb")
    try:
        try:
            async for chunk in download:
                digest.update(chunk)
                size += len(chunk)
                await asyncio.to_thread(file.write, chunk)
        finally:
            await asyncio.to_thread(file.close)
    except BaseException:
        path.unlink()  # noqa: ASYNC240 -- quick, and a thread could not be waited for while the attempt is being cancelled
        raise
    return Saved(path, size, digest.hexdigest(), download.content_type)


@asynccontextmanager
async def text_download(text: str) -> AsyncIterator[Download]:
    """Present a text output, which FLORA sends inline, as a download of its UTF-8 bytes."""
    body = text.encode("utf-8", errors="replace")

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(body), CHUNK_BYTES):
            yield body[start : start + CHUNK_BYTES]

    yield Download(chunks=chunks(), content_type="text/plain; charset=utf-8", content_length=len(body))


@asynccontextmanager
async def _watching(host: str, deadline: float) -> AsyncIterator[None]:
    """Stop at the deadline (loop time), and turn httpx's errors into ours."""
    try:
        async with asyncio.timeout_at(deadline):
            yield
    except TimeoutError:
        raise DownloadFailedError(f"{host}: not complete within the time for one download") from None
    except httpx.HTTPError as exc:
        # `from None`: messages of the HTTP layer can quote what was received, redirect targets included.
        raise _translated(exc, host) from None


def _translated(exc: httpx.HTTPError, host: str) -> DownloadError:
    match exc:
        case httpx.UnsupportedProtocol():
            return DownloadRefusedError(f"{host}: outputs are fetched over https only")
        case httpx.ConnectError(__cause__=PrivateAddressError() as cause):
            return DownloadRefusedError(str(cause))
        case httpx.ConnectTimeout():
            return DownloadFailedError(f"{host}: no connection in time")
        case httpx.ConnectError():
            return DownloadFailedError(f"{host}: no connection: {exc}")
        case httpx.TimeoutException():
            return DownloadFailedError(f"{host}: stalled")
        case _:
            return DownloadFailedError(f"{host}: cut, or not proper HTTP ({type(exc).__name__})")


def _content_type(response: httpx.Response) -> str | None:
    value = response.headers.get("content-type", "").strip()
    return value if value and len(value) <= 200 and value.isascii() and value.isprintable() else None


def _content_length(response: httpx.Response) -> int | None:
    value = response.headers.get("content-length", "")
    chunked = "transfer-encoding" in response.headers  # then the length, if there is one, does not count
    return int(value) if value.isdecimal() and not chunked else None
