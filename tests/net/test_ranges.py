"""Cut downloads: which are resumed, by which response, and that the bytes are always the same."""

import asyncio
import gzip
import random
from collections.abc import AsyncIterator
from itertools import pairwise

import pytest

from receiver.errors import DownloadError, DownloadFailedError, DownloadRefusedError
from receiver.model import Output
from receiver.net.clients import tls_context
from receiver.net.download import MAX_RESUMES, Downloader
from receiver.net.ranges import ResumableBody, parse_resumable
from tests.support.defaults import download_limits
from tests.support.media import MediaServer, Page, page, redirect, serve_media
from tests.support.patience import PATIENCE_SECONDS

BODY = bytes(range(256)) * 8_000
TLS = tls_context()
STRONG = ("Accept-Ranges: bytes", 'ETag: "one"')


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("receiver.net.download._RESUME_SECONDS", 0)


@pytest.fixture
async def media() -> AsyncIterator[MediaServer]:
    async with serve_media() as server:
        yield server


@pytest.fixture
async def downloader(media: MediaServer) -> AsyncIterator[Downloader]:
    made = Downloader(
        limits=download_limits(stall_seconds=5, deadline_seconds=10),
        allow_private_hosts=[media.authority],
        tls=TLS,
    )
    yield made
    await made.aclose()


def cut(at: int, *headers: str, body: bytes = BODY) -> Page:
    """Announce the whole body, and close the connection after `at` bytes of it."""
    raw = page(body, "image/png", *headers).raw
    return Page(raw[: len(raw) - len(body) + at])


def rest(start: int, *headers: str, until: int = len(BODY), content_range: str | None = None) -> Page:
    content_range = content_range or f"bytes {start}-{len(BODY) - 1}/{len(BODY)}"
    full = page(
        BODY[start:], "image/png", f"Content-Range: {content_range}", *headers, status="206 Partial Content"
    ).raw
    return Page(full[: len(full) - (len(BODY) - until)])


async def read(downloader: Downloader, output: Output) -> bytes:
    async with downloader.open(output) as download:
        return b"".join([chunk async for chunk in download])


def range_lines(media: MediaServer) -> list[str]:
    """Return the range headers of each request."""
    lines = [line for head in media.requests for line in [*head.lower().split("\r\n"), "range: all"]]
    return [line for line in lines if line.startswith(("range: ", "if-range: "))]


@pytest.mark.parametrize("first", [1, 700_000, len(BODY) - 1])
async def test_a_cut_body_is_resumed_where_it_ended(
    media: MediaServer, downloader: Downloader, first: int
) -> None:
    """One request for the rest, bound to the same body; the result is the whole body."""
    output = media.output("/secret", rest(first, *STRONG))
    media.first["/secret"] = [cut(first, *STRONG)]
    assert await read(downloader, output) == BODY
    assert range_lines(media) == ["range: all", f"range: bytes={first}-", 'if-range: "one"', "range: all"]


async def test_the_rest_may_be_cut_too(media: MediaServer, downloader: Downloader) -> None:
    """Several resumptions are tried, whatever their errors; those in a row without a byte are limited."""
    output = media.output("/secret", rest(900_000, *STRONG))
    media.first["/secret"] = [
        cut(300_000, *STRONG),
        page(b"", status="503 Busy"),
        rest(300_000, *STRONG, until=900_000),
    ]
    assert await read(downloader, output) == BODY
    media.first["/secret"] = [
        cut(n * 1000, *STRONG) if n == 1 else rest(1000, until=1000) for n in range(1, 9)
    ]
    with pytest.raises(DownloadFailedError, match="cut"):
        await read(downloader, output)
    assert len(media.requests) == 4 + 1 + MAX_RESUMES


async def test_resumes_that_bring_bytes_are_not_counted(media: MediaServer, downloader: Downloader) -> None:
    """A server that cuts every few bytes is read to the end; only resumes in vain are limited."""
    cuts = [len(BODY) * part // 20 for part in range(1, 21)]
    output = media.output("/secret", page(b"", status="500 Oops"))
    media.first["/secret"] = [
        cut(cuts[0], *STRONG),
        *(rest(start, *STRONG, until=stop) for start, stop in pairwise(cuts)),
    ]
    assert await read(downloader, output) == BODY
    assert len(media.requests) == len(cuts) > 2 * MAX_RESUMES


async def test_resumes_in_vain_are_counted_anew_after_progress(
    media: MediaServer, downloader: Downloader
) -> None:
    """Almost as many failures as are allowed, twice, are survived."""
    busy = [page(b"", status="503 Busy")] * (MAX_RESUMES - 1)
    output = media.output("/secret", page(b"", status="500 Oops"))
    more = rest(100_000, *STRONG, until=200_000)
    media.first["/secret"] = [cut(100_000, *STRONG), *busy, more, *busy, rest(200_000, *STRONG)]
    assert await read(downloader, output) == BODY


async def test_some_bytes_at_a_time_are_no_progress(media: MediaServer, downloader: Downloader) -> None:
    """A server that cuts after every few bytes would be asked a hundred thousand times."""
    output = media.output("/secret", page(b"", status="500 Oops"))
    media.first["/secret"] = [
        cut(5, *STRONG),
        *(rest(at, *STRONG, until=at + 5) for at in range(5, 500, 5)),
    ]
    with pytest.raises(DownloadFailedError, match="cut"):
        await read(downloader, output)
    assert len(media.requests) <= 2 + 2 * MAX_RESUMES


@pytest.mark.parametrize(
    "headers",
    [
        (),
        ("Accept-Ranges: bytes",),
        ("Accept-Ranges: none", 'ETag: "one"'),
        ("Accept-Ranges: bytes", 'ETag: W/"one"'),
        ("Accept-Ranges: bytes", "ETag: one"),
        (
            "Accept-Ranges: bytes",
            "Date: Tue, 24 Nov 2026 12:00:30 GMT",
            "Last-Modified: Tue, 24 Nov 2026 12:00:00 GMT",
        ),
        ("Accept-Ranges: bytes", "Date: yesterday", "Last-Modified: Tue, 24 Nov 2026 12:00:00 GMT"),
    ],
)
async def test_a_body_that_may_have_changed_is_not_resumed(
    media: MediaServer, downloader: Downloader, headers: tuple[str, ...]
) -> None:
    """Without a strong validator or without ranges, a cut download fails."""
    output = media.output("/secret", cut(1000, *headers))
    with pytest.raises(DownloadFailedError, match="cut"):
        await read(downloader, output)
    assert len(media.requests) == 1


async def test_an_old_date_is_a_strong_validator(media: MediaServer, downloader: Downloader) -> None:
    """As in RFC 9110: changed at least a minute before it was sent."""
    old = ("Date: Tue, 24 Nov 2026 12:01:00 GMT", "Last-Modified: Tue, 24 Nov 2026 12:00:00 GMT")
    output = media.output("/secret", rest(1000))
    media.first["/secret"] = [cut(1000, "Accept-Ranges: bytes", *old)]
    assert await read(downloader, output) == BODY
    assert "if-range: tue, 24 nov 2026 12:00:00 gmt" in range_lines(media)


@pytest.mark.parametrize(
    "answer",
    [
        page(BODY, "image/png", 'ETag: "two"'),
        rest(1000, 'ETag: "two"'),
        rest(1000, content_range=f"bytes 999-{len(BODY) - 1}/{len(BODY)}"),
        rest(1000, content_range=f"bytes 1000-{len(BODY) - 1}/{len(BODY) + 1}"),
        rest(1000, content_range=f"bytes 1000-{len(BODY) - 2}/{len(BODY)}"),
        rest(1000, content_range="bytes */5"),
        rest(1000, content_range=f"bytes 1000-{'9' * 5000}/{'9' * 5000}"),
        page(BODY[1000:], "image/png", status="206 Partial Content"),
        page(b"", status="416 Range Not Satisfiable"),
    ],
)
async def test_another_body_is_never_appended(
    media: MediaServer, downloader: Downloader, answer: Page
) -> None:
    """A response that is not exactly the rest ends the download."""
    output = media.output("/secret", answer)
    media.first["/secret"] = [cut(1000, *STRONG)]
    with pytest.raises(DownloadFailedError, match="cut"):
        await read(downloader, output)
    assert len(media.requests) == 2


async def test_more_than_the_whole_is_an_error(media: MediaServer, downloader: Downloader) -> None:
    """A rest that is longer than announced is refused."""
    extra = b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 1000-%d/%d\r\nTransfer-Encoding: chunked\r\n\r\n"
    extra %= (len(BODY) - 1, len(BODY))
    output = media.output("/secret", Page(extra + b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)))
    media.first["/secret"] = [cut(1000, *STRONG)]
    with pytest.raises(DownloadFailedError, match="more than it said"):
        await read(downloader, output)


@pytest.mark.parametrize(
    ("answer", "kind", "expired"),
    [
        (page(b"", status="403 Forbidden"), DownloadFailedError, True),
        (redirect("http://10.0.0.1/secret"), DownloadFailedError, False),
        (redirect("https://10.0.0.1/secret"), DownloadFailedError, False),
        (
            page(b"x", "image/png", "Content-Encoding: gzip", status="206 Partial Content"),
            DownloadFailedError,
            False,
        ),
        (Page(b"HTTP/1.1 206 Rest\r\nContent-Length: 99999999999999\r\n\r\n"), DownloadRefusedError, None),
    ],
)
async def test_the_guards_hold_for_the_rest(
    media: MediaServer,
    downloader: Downloader,
    answer: Page,
    kind: type[DownloadError],
    expired: bool | None,
) -> None:
    """A request for the rest is guarded like the first; an expired URL is reported as expired."""
    output = media.output("/secret", answer)
    media.first["/secret"] = [cut(1000, *STRONG)]
    with pytest.raises(kind) as caught:
        await read(downloader, output)
    assert getattr(caught.value, "expired", None) == expired
    assert "secret" not in str(caught.value)


async def test_a_compressed_body_is_resumed_as_it_is_sent(
    media: MediaServer, downloader: Downloader
) -> None:
    """Ranges count the compressed bytes, and the rest is decoded with what came before."""
    body = random.Random(1).randbytes(1_000_000)
    sent = gzip.compress(body)
    coded = (*STRONG, "Content-Encoding: gzip")
    whole = f"bytes 400000-{len(sent) - 1}/{len(sent)}"
    output = media.output(
        "/secret",
        page(sent[400_000:], "image/png", f"Content-Range: {whole}", *coded, status="206 Partial Content"),
    )
    media.first["/secret"] = [cut(400_000, *coded, body=sent)]
    assert await read(downloader, output) == body


async def test_a_stall_is_resumed_too(media: MediaServer) -> None:
    """Silence counts as a cut."""
    limits = download_limits(stall_seconds=0.5, deadline_seconds=PATIENCE_SECONDS)
    downloader = Downloader(limits=limits, allow_private_hosts=[media.authority], tls=TLS)
    output = media.output("/secret", rest(1000, *STRONG))
    media.first["/secret"] = [Page(cut(1000, *STRONG).raw, hold=True)]
    assert await read(downloader, output) == BODY
    await downloader.aclose()


async def test_cancellation_ends_the_rest(media: MediaServer, downloader: Downloader) -> None:
    """A reader that stops closes the connection of the resumed body."""
    output = media.output("/secret", Page(rest(1000, until=2000).raw, hold=True))
    media.first["/secret"] = [cut(1000, *STRONG)]
    task = asyncio.create_task(read(downloader, output))
    await media.held.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_only_some_responses_can_be_resumed() -> None:
    """A length, ranges and a strong validator are all required."""
    headers = {"accept-ranges": "bytes", "content-length": "5", "etag": '"x"'}
    assert parse_resumable(headers) == ResumableBody(5, '"x"')
    assert parse_resumable({**headers, "content-length": "five"}) is None
    assert parse_resumable({**headers, "etag": 'W/"x"'}) is None
    assert parse_resumable({**headers, "accept-ranges": "none"}) is None
    assert parse_resumable({**headers, "transfer-encoding": "chunked"}) is None
