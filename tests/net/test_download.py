"""Downloads from a server on loopback: what is fetched, what is refused, and what errors show."""

import asyncio
import gzip
import hashlib
import socket
import sys
import zlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

import brotli
import pytest
from structlog.testing import capture_logs

from receiver.errors import DownloadError, DownloadFailedError, DownloadRefusedError
from receiver.model import Output
from receiver.net.clients import tls_context
from receiver.net.download import CHUNK_BYTES, Downloader, DownloadLimits, save
from tests.support.defaults import download_limits
from tests.support.media import MediaServer, Page, certificate, page, redirect, serve_media

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

TLS = tls_context()
QUICK = download_limits(stall_seconds=5, deadline_seconds=10, max_bytes=10_000_000)


@pytest.fixture
async def media() -> AsyncIterator[MediaServer]:
    async with serve_media() as server:
        yield server


@pytest.fixture
async def downloader(media: MediaServer) -> AsyncIterator[Downloader]:
    made = Downloader(limits=QUICK, allow_private_hosts=[media.authority], tls=TLS)
    yield made
    await made.aclose()


async def read(downloader: Downloader, output: Output) -> bytes:
    async with downloader.open(output) as download:
        return b"".join([chunk async for chunk in download])


async def failure(downloader: Downloader, output: Output) -> DownloadError:
    """Fail to read an output, and return the error, which must not show the URL."""
    with pytest.raises(DownloadError) as caught:
        await read(downloader, output)
    error: BaseException | None = caught.value
    while error is not None:
        assert "secret" not in str(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return caught.value


def limited_downloader(media: MediaServer, limits: DownloadLimits) -> Downloader:
    return Downloader(limits=limits, allow_private_hosts=[media.authority], tls=TLS)


async def test_a_file_arrives_whole_in_bounded_chunks(media: MediaServer, downloader: Downloader) -> None:
    """The bytes are the server's, in bounded chunks however large the file is."""
    body = bytes(range(256)) * 12_000
    async with downloader.open(media.output("/secret.png", page(body, "image/png; x=1"))) as download:
        assert (download.content_type, download.content_length) == ("image/png; x=1", len(body))
        assert "secret" not in repr(download)
        chunks = [chunk async for chunk in download]
    assert b"".join(chunks) == body
    assert len(chunks) > 1
    assert all(CHUNK_BYTES <= len(chunk) < 2 * CHUNK_BYTES for chunk in chunks[:-1])


async def test_bytes_are_counted_as_they_arrive(media: MediaServer) -> None:
    """Those of a download that is cut count too; an inline text, which is not fetched, does not."""
    counts: list[int] = []
    downloader = Downloader(
        limits=QUICK, allow_private_hosts=[media.authority], tls=TLS, count_bytes=counts.append
    )
    body = bytes(range(256)) * 12_000
    await read(downloader, media.output("/whole", page(body)))
    assert sum(counts) == len(body)
    await failure(downloader, media.output("/cut", Page(page(body).raw[:-1])))
    assert sum(counts) == 2 * len(body) - 1
    await read(downloader, Output(position=0, output_id="t", type="text", value="inline"))
    assert sum(counts) == 2 * len(body) - 1
    await downloader.aclose()


async def test_a_download_is_saved_whole_or_not_at_all(
    media: MediaServer, downloader: Downloader, tmp_path: Path
) -> None:
    """A saved file has the server's bytes and their hash.

    Of a cut download nothing is left, and no file is overwritten.
    """
    body = bytes(range(256)) * 12_000
    async with downloader.open(media.output("/secret.png", page(body))) as download:
        saved = await save(download, tmp_path / "whole")
    assert (saved.size, saved.sha256) == (len(body), hashlib.sha256(body).hexdigest())
    assert saved.path.read_bytes() == body
    cut = media.output("/secret-cut", Page(page(body).raw[:-1]))
    with pytest.raises(DownloadFailedError):
        async with downloader.open(cut) as download:
            await save(download, tmp_path / "cut")
    with pytest.raises(FileExistsError):
        async with downloader.open(media.output("/secret.png", page(b"other"))) as download:
            await save(download, saved.path)
    assert not (tmp_path / "cut").exists()
    assert saved.path.read_bytes() == body


async def test_nothing_of_the_receiver_is_sent(media: MediaServer, downloader: Downloader) -> None:
    """Media hosts get no credentials, no cookies, no referer, and no offer of compression."""
    output = media.output("/secret?x=1", page(b"x"))
    await read(downloader, replace(output, value=f"{output.value}#part"))
    head = media.requests[0].lower()
    assert head.startswith("get /secret?x=1 http/1.1")
    assert "accept-encoding: identity" in head
    for name in ("authorization", "cookie", "referer"):
        assert f"{name}:" not in head


async def test_text_is_its_own_download(downloader: Downloader) -> None:
    """FLORA sends text inline: it is returned as UTF-8, without a request."""
    text = "Grüße " * 200_000
    async with downloader.open(Output(position=0, output_id="t", type="text", value=text)) as download:
        assert download.content_type == "text/plain; charset=utf-8"
        assert download.content_length == len(text.encode())
        assert b"".join([chunk async for chunk in download]).decode() == text


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/secret",
        "https://127.0.0.1/secret",
        "https://[::1]/secret",
        "https://[::ffff:10.0.0.1]/secret",
        "https://169.254.169.254/secret",
        "https://2130706433/secret",
        "https://user:secret@example.com/a",
        "ftp://example.com/secret",
        "file:///etc/secret",
        "data:text/plain,secret",
        "/secret",
        "https:///secret",
        "https://exa mple.com:x/secret",
        "https://example.com:99999999/secret",
        "https://exam\nple.com/secret",
        "",
    ],
)
async def test_urls_that_are_never_fetched(downloader: Downloader, url: str) -> None:
    """Every URL but https to a public address is refused for good."""
    error = await failure(downloader, Output(position=0, output_id="o", type="imageUrl", value=url))
    assert isinstance(error, DownloadRefusedError)


async def test_a_public_name_for_a_private_address_is_refused() -> None:
    """A name counts as the addresses that it resolves to."""

    async def resolve(host: str, port: int) -> Sequence[str]:
        return ["1.1.1.1", "192.168.0.1"]

    downloader = Downloader(limits=download_limits(), tls=TLS, resolve=resolve)
    output = Output(position=0, output_id="o", type="imageUrl", value="https://media.test/secret")
    error = await failure(downloader, output)
    assert isinstance(error, DownloadRefusedError)
    assert str(error) == "media.test is at 192.168.0.1, which is not a public address"


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_redirects_never_reach_private_hosts(
    media: MediaServer, downloader: Downloader, scheme: str
) -> None:
    """An allowed host is allowed for the first request only.

    A redirect leads neither to another private port nor back to the allowed one.
    """
    async with serve_media() as other:
        for target in (other.authority, media.authority, "10.0.0.1"):
            output = media.output("/secret", redirect(f"{scheme}://{target}/secret2"))
            assert isinstance(await failure(downloader, output), DownloadFailedError)
        assert not other.requests
    assert all(head.startswith("GET /secret ") for head in media.requests)


@pytest.mark.parametrize("location", ["", "ftp://example.com/secret", "https://x:y@example.com/secret"])
async def test_redirects_to_nowhere_are_refused(
    media: MediaServer, downloader: Downloader, location: str
) -> None:
    """A redirect must name a URL, without credentials. The next one may."""
    output = media.output("/secret", redirect(location))
    assert isinstance(await failure(downloader, output), DownloadFailedError)


async def test_an_announced_length_above_the_limit_is_refused(media: MediaServer) -> None:
    """A Content-Length above the limit is refused before the body is read."""
    output = media.output("/secret", Page(b"HTTP/1.1 200 OK\r\nContent-Length: 1001\r\n\r\n", hold=True))
    error = await failure(limited_downloader(media, download_limits(max_bytes=1000)), output)
    assert isinstance(error, DownloadRefusedError)


@pytest.mark.parametrize("size", [1000, 1001])
async def test_too_large_while_streaming(media: MediaServer, size: int) -> None:
    """Without an announced length, bytes are counted; the limit itself is still allowed."""
    body = b"x" * size
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (size, body)
    output = media.output("/secret", Page(chunked))
    downloader = limited_downloader(media, download_limits(max_bytes=1000))
    if size == 1000:
        assert await read(downloader, output) == body
    else:
        assert isinstance(await failure(downloader, output), DownloadRefusedError)


async def test_a_length_beside_chunks_does_not_count(media: MediaServer, downloader: Downloader) -> None:
    """A length beside chunked encoding does not count, and is not passed on."""
    raw = (
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
    )
    async with downloader.open(media.output("/secret", Page(raw))) as download:
        assert download.content_length is None
        assert b"".join([chunk async for chunk in download]) == b"hello"


async def test_bytes_after_the_body_do_not_count(media: MediaServer, downloader: Downloader) -> None:
    """The announced length holds where more is sent, and the connection is not used again."""
    output = media.output("/secret", Page(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello world"))
    assert await read(downloader, output) == await read(downloader, output) == b"hello"


@pytest.mark.parametrize(
    ("status", "expired"),
    [
        ("404 Not Found", True),
        ("403 Forbidden", True),
        ("410 Gone", True),
        ("500 Oops", False),
        ("429 Slow", False),
        ("206 Partial Content", False),
        ("204 No Content", False),
        ("401 Who", False),
    ],
)
async def test_statuses_other_than_200(
    media: MediaServer, downloader: Downloader, status: str, expired: bool
) -> None:
    """Only 200 is an output. 403, 404 and 410 mean that the URL has expired."""
    error = await failure(downloader, media.output("/secret", page(b"", status=status)))
    assert isinstance(error, DownloadFailedError)
    assert error.expired is expired


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nshort\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nContent-Length: secret\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200",
        b"secret nonsense\r\n\r\n",
        b"",
    ],
)
async def test_cut_and_broken_responses_fail(
    media: MediaServer, downloader: Downloader, raw: bytes
) -> None:
    """Fewer bytes than announced are never an output, nor is an empty body."""
    assert isinstance(await failure(downloader, media.output("/secret", Page(raw))), DownloadFailedError)


ENCODERS = {"gzip": gzip.compress, "deflate": zlib.compress, "br": brotli.compress, "zstd": zstd.compress}
PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 100


@pytest.mark.parametrize("coding", ENCODERS)
async def test_a_compressed_body_is_decoded(
    media: MediaServer, downloader: Downloader, coding: str
) -> None:
    """The bytes are the original ones, in chunks as ever; their size is not known beforehand."""
    body = bytes(range(256)) * 12_000
    answer = page(ENCODERS[coding](body), "image/png", f"Content-Encoding: {coding}")
    async with downloader.open(media.output("/secret", answer)) as download:
        assert (download.content_length, download.content_encoding) == (None, coding)
        chunks = [chunk async for chunk in download]
    assert b"".join(chunks) == body
    assert all(CHUNK_BYTES <= len(chunk) <= 2 * CHUNK_BYTES for chunk in chunks[:-1])


@pytest.mark.parametrize(
    "label", ["base64", "aws-chunked", "UTF-8", "gzip", "deflate", "br", "zstd", "none, gzip"]
)
async def test_labels_that_the_bytes_do_not_have_are_passed_over(
    media: MediaServer, downloader: Downloader, label: str
) -> None:
    """Stores keep what an uploader wrote into `Content-Encoding`. It is logged."""
    output = media.output("/secret", page(PNG, "image/png", f"Content-Encoding: {label}"))
    with capture_logs() as lines:
        async with downloader.open(output) as download:
            assert download.content_encoding == label
            assert b"".join([chunk async for chunk in download]) == PNG
    assert {line["event"] for line in lines} == {"download.encoding_ignored"}
    assert sorted(line["content_encoding"] for line in lines) == sorted(label.lower().split(", "))


async def test_a_bomb_is_refused(media: MediaServer) -> None:
    """The limit holds for the decoded bytes."""
    answer = page(gzip.compress(bytes(20_000_000)), "image/png", "Content-Encoding: gzip")
    downloader = limited_downloader(media, download_limits(max_bytes=3_000_000))
    error = await failure(downloader, media.output("/secret", answer))
    assert isinstance(error, DownloadRefusedError)
    assert "larger than the limit of 3000000 bytes" in str(error)
    await downloader.aclose()


@pytest.mark.parametrize(
    ("body", "label", "reason"),
    [
        (b"x", "compress", "the coding compress, which is not supported"),
        (gzip.compress(PNG)[:-1], "gzip", "ends in the middle"),
        (gzip.compress(b""), "gzip", "empty body"),
        (PNG, "gzip, gzip, gzip, gzip", "more than 3 codings"),
    ],
    ids=["compress", "cut", "empty", "four"],
)
async def test_bodies_that_cannot_be_decoded_may_be_later(
    media: MediaServer, downloader: Downloader, body: bytes, label: str, reason: str
) -> None:
    """Another response of the server could be readable: the download failed, and is not refused."""
    error = await failure(
        downloader, media.output("/secret", page(body, "image/png", f"Content-Encoding: {label}"))
    )
    assert isinstance(error, DownloadFailedError)
    assert reason in str(error)


@pytest.mark.parametrize("raw", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort"])
async def test_silence_is_a_stall(media: MediaServer, raw: bytes) -> None:
    """A server that stops sending is given up after the stall time."""
    error = await failure(
        limited_downloader(media, download_limits(stall_seconds=0.05)),
        media.output("/secret", Page(raw, hold=True)),
    )
    assert isinstance(error, DownloadFailedError)
    assert "stalled" in str(error)


@pytest.mark.parametrize("raw", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort"])
async def test_the_deadline_ends_any_download(media: MediaServer, raw: bytes) -> None:
    """However it is slow, a download ends at its deadline."""
    limits = download_limits(stall_seconds=60, deadline_seconds=0.05)
    error = await failure(limited_downloader(media, limits), media.output("/secret", Page(raw, hold=True)))
    assert isinstance(error, DownloadFailedError)
    assert "time" in str(error)


async def test_names_that_do_not_resolve_may_resolve_later() -> None:
    """A failure of DNS says nothing about the output."""

    async def resolve(host: str, port: int) -> Sequence[str]:
        raise socket.gaierror(socket.EAI_AGAIN, "try again")

    output = Output(position=0, output_id="o", type="imageUrl", value="https://media.test/secret")
    error = await failure(Downloader(limits=download_limits(), tls=TLS, resolve=resolve), output)
    assert isinstance(error, DownloadFailedError)
    assert "could not be resolved" in str(error)


async def test_a_refused_connection_fails(media: MediaServer) -> None:
    """A refused connection may be accepted later."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        authority = f"127.0.0.1:{closed.getsockname()[1]}"
    downloader = Downloader(limits=download_limits(), allow_private_hosts=[authority], tls=TLS)
    output = Output(position=0, output_id="o", type="imageUrl", value=f"http://{authority}/secret")
    assert isinstance(await failure(downloader, output), DownloadFailedError)


async def test_an_error_of_the_reader_stays_its_own(media: MediaServer, downloader: Downloader) -> None:
    """What the handler raises inside the download is not mistaken for a failed download."""
    output = media.output("/secret", page(b"x" * 3_000_000))

    async def impatient() -> None:
        async with downloader.open(output) as download:
            async for _ in download:
                raise TimeoutError("mine")

    with pytest.raises(TimeoutError, match="mine"):
        await impatient()


async def local(host: str, port: int) -> Sequence[str]:
    return ["127.0.0.1"]


async def test_tls_is_verified_against_the_name_and_not_the_address(tmp_path: Path) -> None:
    """The certificate is checked against the host's name, although the address is pinned."""
    server_tls, ca = certificate(tmp_path, "media.test")
    async with (
        serve_media("media.test", server_tls) as media,
        serve_media("other.test", server_tls) as wrong,
    ):
        output = media.output("/secret", page(b"safe"))
        downloader = Downloader(
            limits=download_limits(),
            allow_private_hosts=[media.authority, wrong.authority],
            tls=tls_context(ca),
            resolve=local,
        )
        assert await read(downloader, output) == b"safe"
        assert isinstance(
            await failure(downloader, wrong.output("/secret", page(b"x"))), DownloadFailedError
        )
        untrusting = Downloader(
            limits=download_limits(), allow_private_hosts=[media.authority], tls=TLS, resolve=local
        )
        assert isinstance(await failure(untrusting, output), DownloadFailedError)
        await downloader.aclose()
        assert len(media.requests) == 1
        assert not wrong.requests


async def test_redirects_in_public(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three redirects are followed, without cookies or referer.

    A fourth one, or one to http, is refused.
    """
    monkeypatch.setattr("receiver.net.clients.is_public", lambda _: True)  # loopback plays the internet
    server_tls, ca = certificate(tmp_path, "media.test")
    async with serve_media("media.test", server_tls) as media:
        downloader = Downloader(limits=download_limits(), tls=tls_context(ca), resolve=local)
        output = media.output("/0", redirect(media.url("/1")))
        media.pages |= {"/1": redirect("/2"), "/2": redirect("3"), "/3": page(b"there")}
        assert await read(downloader, output) == b"there"
        assert [head.split(" ")[1] for head in media.requests] == ["/0", "/1", "/2", "/3"]
        assert not any("cookie:" in head.lower() or "referer:" in head.lower() for head in media.requests)
        media.pages["/3"] = redirect("/4")
        assert "redirects" in str(await failure(downloader, output))
        media.pages["/0"] = redirect(f"http://{media.authority}/3")
        assert isinstance(await failure(downloader, output), DownloadFailedError)
        await downloader.aclose()


async def test_a_cancelled_download_closes_its_connection(
    media: MediaServer, downloader: Downloader
) -> None:
    """The server sees the connection end at once."""
    output = media.output("/secret", Page(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort", hold=True))
    task = asyncio.create_task(read(downloader, output))
    await media.held.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# --- content types ---------------------------------------------------------------------------------------------------


async def test_what_a_body_is_and_what_its_server_says(media: MediaServer, downloader: Downloader) -> None:
    """The type follows the first bytes; the server's own is kept beside it; every byte arrives once."""
    body = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 5000
    async with downloader.open(media.output("/a", page(body, "text/css"))) as download:
        assert (download.content_type, download.stated_content_type) == ("image/png", "text/css")
        assert b"".join([chunk async for chunk in download]) == body


async def test_a_page_in_place_of_an_image_may_be_an_image_later(
    media: MediaServer, downloader: Downloader
) -> None:
    """Status 200 or not. The run is read again, since the page may say that the URL has expired."""
    output = media.output("/a", page(b"<html>Please sign in", "text/html"))
    with pytest.raises(
        DownloadFailedError, match="answered with an HTML page in place of an image"
    ) as caught:
        async with downloader.open(output):
            raise AssertionError("it was opened")
    assert caught.value.expired
