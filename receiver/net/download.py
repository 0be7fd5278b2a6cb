"""Guarded downloads of outputs, streamed in bounded chunks. Called by attempts and handlers.

A body that is cut is resumed where it ended, if the server offers that and proves that the rest
belongs to the same body.

The URL of an output is all it takes to fetch it: no message, log line or repr made here shows more
than its host.
"""

import asyncio
import hashlib
import ssl
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path

import httpx

from receiver.errors import DownloadError, DownloadFailedError, DownloadRefusedError
from receiver.model import Output
from receiver.net.clients import PrivateAddressError, Resolve, media_client, resolve, tls_context
from receiver.net.codings import parse_codings
from receiver.net.decoding import decode_chunks
from receiver.net.media_types import describe_mismatch, recognize
from receiver.net.media_urls import parse_media_url, redirect_target
from receiver.net.ranges import ResumableBody, parse_resumable
from receiver.net.retry_after import parse_retry_after
from receiver.net.tunnel import ProxyRoute

__all__ = ["Download", "DownloadLimits", "Downloader", "Saved", "save", "text_download"]

CHUNK_BYTES = 512 * 1024
MAX_REDIRECTS = 3
MAX_RESUMES = 5  # in a row without progress; the deadline bounds all others
PROGRESS_BYTES = 64 * 1024  # or a twentieth of a smaller body: five bytes at a time are no progress

_RESUME_SECONDS = 0.1  # before the first; each further one waits three times as long
_RANGE_STATUSES = frozenset({200, 206, 416})  # the rest, the whole, or that there is no such rest
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_EXPIRED = frozenset({403, 404, 410})


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadLimits:
    """Limits of one download. A stall is the longest wait for further bytes."""

    max_bytes: int
    stall_seconds: float
    deadline_seconds: float
    connect_seconds: float = 10.0


@dataclass(frozen=True, slots=True, eq=False)
class Download:
    """An output that is being read.

    Iterate over it once: `async for chunk in download`. Chunks have about half a MiB, the last one
    less. Iterating raises DownloadFailedError or DownloadRefusedError.
    """

    chunks: AsyncIterator[bytes] = field(repr=False)
    """The bytes; the same as iterating over the download itself."""
    content_type: str | None
    """The type by the first bytes, else as the server states it; None where neither says one."""
    content_length: int | None
    """The announced size in bytes, or None where the server announces none, or sends it compressed.

    A body of another size raises DownloadFailedError at its end.
    """
    content_encoding: str | None = None
    """The server's `Content-Encoding`, or None. The chunks are without gzip, deflate, br and zstd."""
    stated_content_type: str | None = None
    """The server's `Content-Type` as it was sent, or None where it sends none."""

    def __aiter__(self) -> AsyncIterator[bytes]:
        """Return the chunks."""
        return self.chunks


@dataclass(frozen=True, slots=True)
class Saved:
    """A file that holds a whole output."""

    path: Path
    """The path of the file."""
    size: int
    """Its size in bytes."""
    sha256: str
    """The SHA-256 of its bytes, as 64 lower-case hex digits."""
    content_type: str | None
    """The type by the first bytes, else as the server stated it; None where neither says one."""
    stated_content_type: str | None = None
    """The server's `Content-Type` as it was sent, or None where it sent none."""


class Downloader:
    """Opens outputs: over HTTPS from public addresses, and from the `allow_private_hosts`.

    The latter are exact `host:port`, and are reached directly; the former through the proxy of `route`
    if there is one. `count_bytes` is called with the number of bytes whenever some arrive.
    """

    def __init__(
        self,
        *,
        limits: DownloadLimits,
        allow_private_hosts: Iterable[str] = (),
        tls: ssl.SSLContext | None = None,
        resolve: Resolve = resolve,
        route: ProxyRoute | None = None,
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
                route=route,
            )

        # Two pools: a redirect must not reach an allowed private host, not even over a connection
        # that is already open.
        self._client = client(allow_private_hosts)
        self._redirect_client = client(())

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.aclose()
        await self._redirect_client.aclose()

    def open(self, output: Output) -> AbstractAsyncContextManager[Download]:
        """Open an output: its inline text, or its URL, of which the first bytes are awaited.

        Raises DownloadRefusedError or DownloadFailedError.
        """
        return text_download(output.value) if output.is_text else self._open_media(output)

    @asynccontextmanager
    async def _open_media(self, output: Output) -> AsyncIterator[Download]:
        """Open the URL of an output, and look at its first bytes."""
        async with self.fetch(output.value) as download:
            first = await anext(download.chunks, b"")
            content_type = recognize(first, download.content_type, output)
            mismatch = describe_mismatch(content_type, output)
            if mismatch is not None:
                host = parse_media_url(output.value).host
                raise DownloadFailedError(f"{host} answered with {mismatch}", expired=True)
            yield replace(download, chunks=_chain(first, download.chunks), content_type=content_type)

    @asynccontextmanager
    async def fetch(self, url: str) -> AsyncIterator[Download]:
        """Open a URL.

        The deadline covers redirects and body, and is checked at every wait for bytes.
        """
        deadline = asyncio.get_running_loop().time() + self._limits.deadline_seconds
        start = parse_media_url(url)
        response = await self._follow(start, deadline)
        body = _Body(start, response, parse_resumable(response.headers), deadline)
        codings = parse_codings(response.headers.get("content-encoding", ""))
        chunks = decode_chunks(
            self._read(body), codings, max_bytes=self._limits.max_bytes, host=response.url.host
        )
        try:
            yield Download(
                chunks=chunks,
                content_type=_printable_header(response, "content-type"),
                stated_content_type=_printable_header(response, "content-type"),
                content_length=None if codings.decodable else _content_length(response),
                content_encoding=_printable_header(response, "content-encoding"),
            )
        finally:
            await body.response.aclose()

    async def _follow(
        self, url: httpx.URL, deadline: float, headers: dict[str, str] | None = None
    ) -> httpx.Response:
        """Send a request, follow its redirects, and return the final response."""
        client = self._client
        for _ in range(MAX_REDIRECTS + 1):
            async with _enforce_deadline(url.host, deadline, is_redirect=client is not self._client):
                try:
                    response = await client.send(
                        client.build_request("GET", url, headers=headers), stream=True
                    )
                except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
                    # Most likely the server closed an idle connection: try once more.
                    response = await client.send(
                        client.build_request("GET", url, headers=headers), stream=True
                    )
            try:
                if response.status_code not in _REDIRECTS:
                    self._check_response(response, partial=headers is not None)
                    return response
                target = redirect_target(response)
            except BaseException:
                await response.aclose()
                raise
            await response.aclose()
            url, client = target, self._redirect_client
        raise DownloadFailedError(f"{url.host}: more than {MAX_REDIRECTS} redirects")

    def _check_response(self, response: httpx.Response, *, partial: bool) -> None:
        host, status = response.url.host, response.status_code
        if status in _EXPIRED:
            raise DownloadFailedError(
                f"{host} answered {status}: the output is no longer there", expired=True
            )
        if status not in (_RANGE_STATUSES if partial else {HTTPStatus.OK}):
            pause = parse_retry_after(response.headers, datetime.now(UTC))
            raise DownloadFailedError(f"{host} answered {status}", retry_after_seconds=pause)
        if unknown := parse_codings(response.headers.get("content-encoding", "")).unknown:
            raise DownloadFailedError(
                f"{host} sent the body in the coding {unknown[0]}, which is not supported: have the server "
                "send or keep it without Content-Encoding"
            )
        self._check_size(host, _content_length(response) or 0)

    async def _read(self, body: "_Body") -> AsyncIterator[bytes]:
        received = 0
        while True:
            parts: list[bytes] = []
            size = 0
            host = body.response.url.host
            while size < CHUNK_BYTES:
                try:
                    async with _enforce_deadline(host, body.deadline):
                        async for part in body.raw:
                            parts.append(part)
                            size += len(part)
                            if self._count_bytes is not None:
                                self._count_bytes(len(part))
                            if size >= CHUNK_BYTES:
                                break
                    if (
                        size >= CHUNK_BYTES
                        or body.resumable is None
                        or received + size >= body.resumable.length
                    ):
                        break
                    cut = DownloadFailedError(f"{host}: cut")
                except DownloadFailedError as error:
                    cut = error
                await self._resume(body, received + size, cut)
            if not parts and not received:
                raise DownloadFailedError(f"{host} answered with an empty body")
            if not parts:
                return
            received += size
            self._check_size(host, received)
            if body.resumable is not None and received > body.resumable.length:
                raise DownloadFailedError(f"{host} sent more than it said it would")
            yield b"".join(parts)

    async def _resume(self, body: "_Body", offset: int, cut: DownloadFailedError) -> None:
        """Continue the body from `offset` with another response.

        Raises `cut` where that is not possible, or an error that says that the output has expired.
        """
        loop = asyncio.get_running_loop()
        if body.resumable is None or not offset:
            raise cut
        await body.response.aclose()
        body.count_progress(offset)
        while body.resumes < MAX_RESUMES:
            pause = _RESUME_SECONDS * 3**body.resumes
            if loop.time() + pause >= body.deadline:
                break
            body.resumes += 1
            await asyncio.sleep(pause)
            try:
                response = await self._follow(
                    body.start, body.deadline, body.resumable.range_headers(offset)
                )
            except DownloadFailedError as failure:
                if failure.expired:
                    raise
                continue
            body.switch_to(response)
            if body.resumable.is_continued_by(response.status_code, response.headers, offset):
                return
            await response.aclose()
            break
        raise cut

    def _check_size(self, host: str, size: int) -> None:
        if size > self._limits.max_bytes:
            raise DownloadRefusedError(
                f"{host}: the output is larger than the limit of {self._limits.max_bytes} bytes"
            )


class _Body:
    """A body that is being read: its URL, its current response, and how it can be resumed."""

    def __init__(
        self,
        start: httpx.URL,
        response: httpx.Response,
        resumable: ResumableBody | None,
        deadline: float,
    ) -> None:
        self.start = start
        self.resumable = resumable
        self.deadline = deadline
        self.resumes = 0
        self._resumed_at = 0
        self.switch_to(response)

    def count_progress(self, offset: int) -> None:
        """Forget the resumes so far if the body has got on since they began."""
        length = self.resumable.length if self.resumable else 0
        if offset - self._resumed_at >= min(PROGRESS_BYTES, length // 20):
            self.resumes, self._resumed_at = 0, offset

    def switch_to(self, response: httpx.Response) -> None:
        self.response = response
        self.raw = response.aiter_raw()


async def save(download: Download, path: Path) -> Saved:
    """Write a download into a new file, which is removed if that fails. The file is not synced."""
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
        _discard(path)
        raise
    return Saved(path, size, digest.hexdigest(), download.content_type, download.stated_content_type)


def _discard(path: Path) -> None:
    # Not in a thread: while the attempt is being cancelled, it could not be waited for.
    path.unlink()


async def _chain(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for chunk in rest:
        yield chunk


@asynccontextmanager
async def text_download(text: str) -> AsyncIterator[Download]:
    """Open a text output, which FLORA sends inline, as a download of its UTF-8 bytes."""
    body = text.encode("utf-8", errors="replace")

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(body), CHUNK_BYTES):
            yield body[start : start + CHUNK_BYTES]

    yield Download(chunks=chunks(), content_type="text/plain; charset=utf-8", content_length=len(body))


@asynccontextmanager
async def _enforce_deadline(
    host: str, deadline: float, *, is_redirect: bool = False
) -> AsyncIterator[None]:
    """Raise DownloadFailedError at the deadline (loop time), and convert the errors of httpx."""
    try:
        async with asyncio.timeout_at(deadline):
            yield
    except TimeoutError:
        raise DownloadFailedError(f"{host}: not complete within the time for one download") from None
    except httpx.HTTPError as error:
        # `from None`: messages of the HTTP layer may quote what was received, redirects included.
        raise _to_download_error(error, host, is_redirect=is_redirect) from None


def _to_download_error(error: httpx.HTTPError, host: str, *, is_redirect: bool) -> DownloadError:
    # The URL of an output stays as it is; where a server redirects to may be another next time.
    refused = DownloadFailedError if is_redirect else DownloadRefusedError
    match error:
        case httpx.UnsupportedProtocol():
            return refused(f"{host}: outputs are fetched over https only")
        case httpx.ConnectError(__cause__=PrivateAddressError() as cause):
            return refused(str(cause))
        case httpx.ProxyError():
            return DownloadFailedError(f"{host}: {error}")
        case httpx.ConnectTimeout():
            return DownloadFailedError(f"{host}: no connection in time")
        case httpx.ConnectError():
            return DownloadFailedError(f"{host}: no connection: {error}")
        case httpx.TimeoutException():
            return DownloadFailedError(f"{host}: stalled")
        case _:
            return DownloadFailedError(f"{host}: cut, or not proper HTTP ({type(error).__name__})")


def _printable_header(response: httpx.Response, name: str) -> str | None:
    value = response.headers.get(name, "").strip()
    return value if value and len(value) <= 200 and value.isascii() and value.isprintable() else None


def _content_length(response: httpx.Response) -> int | None:
    value = response.headers.get("content-length", "")
    chunked = "transfer-encoding" in response.headers  # then a length does not count
    return int(value) if value.isdecimal() and not chunked else None
