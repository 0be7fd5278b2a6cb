"""Guarded fetching of output URLs, as bounded streams of bytes. The dispatcher and the handlers call it.

Whoever holds the URL of an output has the output: no message, log line or repr made here shows more than its host.
"""

import asyncio
import hashlib
import ssl
from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from receiver.errors import DownloadError, DownloadFailedError, DownloadRefusedError
from receiver.http import PrivateAddressError, Resolve, media_client, resolve, tls_context
from receiver.model import Output

__all__ = ["Download", "DownloadLimits", "Downloader", "Saved", "save", "text_download"]

CHUNK_BYTES = 512 * 1024
MAX_REDIRECTS = 3

_OK = 200
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_EXPIRED = frozenset({403, 404, 410})


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadLimits:
    """How much and how long. `stall_seconds` is the longest silence, `deadline_seconds` the whole of one download."""

    max_bytes: int = 20 * 1024**3
    connect_seconds: float = 10.0
    stall_seconds: float = 30.0
    deadline_seconds: float = 840.0


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
        limits: DownloadLimits | None = None,
        allow_private_hosts: Iterable[str] = (),
        tls: ssl.SSLContext | None = None,
        resolve: Resolve = resolve,
    ) -> None:
        self._limits = limits or DownloadLimits()
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
        response = await self._follow(_parsed(url), deadline)
        try:
            yield Download(
                chunks=self._chunks(response, deadline),
                content_type=_content_type(response),
                content_length=_content_length(response),
            )
        finally:
            await response.aclose()

    async def _follow(self, url: httpx.URL, deadline: float) -> httpx.Response:
        client = self._first
        for _ in range(MAX_REDIRECTS + 1):
            async with _watching(url.host, deadline):
                try:
                    response = await client.send(client.build_request("GET", url), stream=True)
                except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
                    # Most likely an idle connection that the server was just closing: once more, on another.
                    response = await client.send(client.build_request("GET", url), stream=True)
            try:
                if response.status_code not in _REDIRECTS:
                    self._accept(response)
                    return response
                target = _redirected(response)
            except BaseException:
                await response.aclose()
                raise
            await response.aclose()
            url, client = target, self._further
        raise DownloadRefusedError(f"{url.host}: more than {MAX_REDIRECTS} redirects")

    def _accept(self, response: httpx.Response) -> None:
        host, status = response.url.host, response.status_code
        if status in _EXPIRED:
            raise DownloadFailedError(f"{host} answered {status}: the output is no longer there", expired=True)
        if status != _OK:
            raise DownloadFailedError(f"{host} answered {status}")
        if response.headers.get("content-encoding", "identity").strip().lower() not in {"", "identity"}:
            raise DownloadRefusedError(f"{host} sent an encoded body although none was asked for")
        self._within_limit(host, _content_length(response) or 0)

    async def _chunks(self, response: httpx.Response, deadline: float) -> AsyncIterator[bytes]:
        host = response.url.host
        raw = response.aiter_raw()
        received = 0
        while True:
            parts: list[bytes] = []
            size = 0
            async with _watching(host, deadline):
                async for part in raw:
                    parts.append(part)
                    size += len(part)
                    if size >= CHUNK_BYTES:
                        break
            if not parts and not received:
                raise DownloadFailedError(f"{host} answered with an empty body")
            if not parts:
                return
            received += size
            self._within_limit(host, received)
            yield b"".join(parts)

    def _within_limit(self, host: str, size: int) -> None:
        if size > self._limits.max_bytes:
            raise DownloadRefusedError(f"{host}: the output is larger than the limit of {self._limits.max_bytes} bytes")


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


def _parsed(url: str) -> httpx.URL:
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, UnicodeError, TypeError):
        raise DownloadRefusedError("the output's URL cannot be read") from None
    return _clean(parsed)


def _redirected(response: httpx.Response) -> httpx.URL:
    location = response.headers.get("location")
    try:
        target = response.url.join(location) if location else None
    except (httpx.InvalidURL, UnicodeError):
        target = None
    if target is None:
        raise DownloadRefusedError(f"{response.url.host} redirects to something that is not a URL")
    return _clean(target)


def _clean(url: httpx.URL) -> httpx.URL:
    if url.scheme not in {"http", "https"} or not url.host:
        raise DownloadRefusedError(f"{url.host or 'the output'}: outputs are fetched over https only")
    if not 0 <= (url.port or 0) < 65536:  # noqa: PLR2004
        raise DownloadRefusedError(f"{url.host}: there is no such port")
    if url.userinfo:
        raise DownloadRefusedError(f"{url.host}: the output's URL carries credentials")
    return url.copy_with(fragment=None)


def _content_type(response: httpx.Response) -> str | None:
    value = response.headers.get("content-type", "").strip()
    return value if value and len(value) <= 200 and value.isascii() and value.isprintable() else None  # noqa: PLR2004


def _content_length(response: httpx.Response) -> int | None:
    value = response.headers.get("content-length", "")
    return int(value) if value.isdecimal() else None
