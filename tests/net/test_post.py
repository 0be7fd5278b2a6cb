"""The guarded way out: what is posted, what is refused, and what errors and excerpts may say."""

import asyncio
import socket
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from receiver.errors import PostError, PostFailedError, PostRefusedError
from receiver.net.post import MAX_BODY_BYTES, Posted, Poster, header_value, target_url, usable_headers
from tests.support.media import Page, certificate
from tests.support.targets import Target, answer, target


@pytest.fixture
async def there() -> AsyncIterator[Target]:
    async with target() as made:
        yield made


async def post_once(there: Target, body: bytes = b"{}", **options: Any) -> Posted:
    poster = Poster(there.url, allow_private=True, **options)
    try:
        return await poster.post(body, content_type="application/json", headers={"X-One": "1"})
    finally:
        await poster.aclose()


async def post_failure(poster: Poster) -> PostError:
    try:
        with pytest.raises(PostError) as caught:
            await poster.post(b"{}", content_type="application/json")
    finally:
        await poster.aclose()
    assert caught.value.__suppress_context__
    assert "secret" not in str(caught.value)
    return caught.value


async def test_a_post_arrives_as_it_is(there: Target) -> None:
    """The body and both sets of headers are sent, nothing from the environment, no compression."""
    assert (await post_once(there, b'{"a": 1}', headers={"Authorization": "Bearer k"})).status == 200
    (post,) = there.posts
    assert post.line == "POST /hooks/flora HTTP/1.1"
    assert post.body == b'{"a": 1}'
    assert (post.headers["authorization"], post.headers["x-one"]) == ("Bearer k", "1")
    assert (post.headers["content-type"], post.headers["accept-encoding"]) == (
        "application/json",
        "identity",
    )
    assert "cookie" not in post.headers


async def test_a_connection_is_used_again(there: Target) -> None:
    """A handshake for each run would cost more than the post."""
    poster = Poster(there.url, allow_private=True)
    for _ in range(3):
        await poster.post(b"{}", content_type="application/json")
    await poster.aclose()
    assert (there.connections, len(there.posts)) == (1, 3)


async def test_a_redirect_is_a_response(there: Target) -> None:
    """It is not followed, and of its target only scheme and host are shown."""
    async with target() as other:
        there.answers = [answer("307 Moved", b"", f"Location: {other.url}?token=secret")]
        found = await post_once(there)
        assert (found.status, found.location) == (307, "http://localhost")
        assert not other.posts


@pytest.mark.parametrize(
    "page",
    [
        Page(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 10\r\n\r\nshort"),
        Page(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"),
        answer("200 OK", b"x" * (MAX_BODY_BYTES * 5)),
    ],
)
async def test_the_status_counts_whatever_the_body_does(there: Target, page: Page) -> None:
    """A response with 200 counts, even if its body is cut, garbled or huge."""
    there.answers = [page]
    assert (await post_once(there)).status == 200


async def test_a_body_that_never_ends_is_not_waited_for(
    there: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The response counts; the connection is closed."""
    monkeypatch.setattr("receiver.net.post.BODY_SECONDS", 0.05)
    there.answers = [
        Page(b"HTTP/1.1 503 Busy\r\nRetry-After: 7\r\nContent-Length: 100\r\n\r\nlater", hold=True)
    ]
    found = await post_once(there)
    assert (found.status, found.retry_after_seconds, found.excerpt) == (503, 7.0, "later")
    await there.gone.wait()


@pytest.mark.parametrize("raw", [b"", b"HTTP/1.1 200", b"HTTP/1.1 200 OK\r\nX: 1\r\n"])
async def test_a_missing_response_is_given_up(there: Target, raw: bytes) -> None:
    """Silence, or a head that drips: one deadline holds for both."""
    there.answers = [Page(raw, hold=True)]
    error = await post_failure(Poster(there.url, allow_private=True, timeout_seconds=0.1))
    assert isinstance(error, PostFailedError)
    assert str(error) == "localhost: no answer within 0.1 s"


@pytest.mark.parametrize(
    "raw", [b"", b"HTTP/1.1 200", b"secret nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\nbroken"]
)
async def test_a_malformed_response_fails(there: Target, raw: bytes) -> None:
    """The post may have arrived nevertheless, so it will be repeated."""
    there.answers = [Page(raw)]
    assert isinstance(await post_failure(Poster(there.url, allow_private=True)), PostFailedError)


async def test_a_refused_connection() -> None:
    """A refused connection may be accepted later; `connect` raises the same error."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/secret"
    assert isinstance(await post_failure(Poster(url, allow_private=True)), PostFailedError)
    with pytest.raises(PostFailedError):
        await Poster(url, allow_private=True).connect()


async def test_a_name_that_leads_inside_is_refused() -> None:
    """A name counts as what it resolves to, for `post` and for `connect`."""

    async def resolve(host: str, port: int) -> Sequence[str]:
        return ["1.1.1.1", "10.0.0.1"]

    poster = Poster("https://hooks.test/secret", resolve=resolve)
    with pytest.raises(PostRefusedError, match=r"hooks\.test is at 10\.0\.0\.1, .*allow_private"):
        await poster.connect()
    assert isinstance(await post_failure(poster), PostRefusedError)


async def test_a_name_that_does_not_resolve_may_later() -> None:
    """A failure of DNS may pass."""

    async def resolve(host: str, port: int) -> Sequence[str]:
        raise socket.gaierror(socket.EAI_AGAIN, "try again")

    assert isinstance(
        await post_failure(Poster("https://hooks.test/secret", resolve=resolve)), PostFailedError
    )


async def test_tls_is_verified(tmp_path: Path) -> None:
    """Nothing is posted where the name or the CA is wrong; the error names the fix."""
    tls, ca = certificate(tmp_path, "localhost")
    async with target("localhost", tls) as there, target("127.0.0.1", tls) as wrong:
        assert (await post_once(there, ca_file=ca)).status == 200
        poster = Poster(there.url, allow_private=True, ca_file=ca)
        await poster.connect()
        await poster.aclose()
        assert len(there.posts) == 1
        for url, file in ((there.url, None), (wrong.url, ca)):
            poster = Poster(url, allow_private=True, ca_file=file)
            with pytest.raises(PostRefusedError, match=r"certificate is not valid.*ca_file"):
                await poster.connect()
            assert isinstance(await post_failure(poster), PostRefusedError)
        assert (len(there.posts), len(wrong.posts)) == (1, 0)


async def test_plain_http_where_tls_is_spoken(there: Target) -> None:
    """And the other way round: nothing is posted."""
    poster = Poster(there.url.replace("http:", "https:"), allow_private=True, timeout_seconds=0.2)
    with pytest.raises(PostFailedError):
        await poster.connect()
    assert isinstance(await post_failure(poster), PostFailedError)
    assert not there.posts


async def test_an_excerpt_of_a_response_has_no_secret(there: Target) -> None:
    """Header values, the URL and media URLs are concealed in every spelling that servers quote."""
    body = (
        b'<b>no</b>\r\n\x1b[31m token s3cr&et/key and "s3cr\\&et" s3cr&amp;et/key s3cr%26et%2Fkey s3cr&et\\/key '
        b"https://media.test/a.png https:\\/\\/media.test\\/b.png https%3A%2F%2Fmedia.test%2Fc.png "
        b"POST /hooks/flora \xff end"
    )
    there.answers = [answer("500 Oops", body)]
    found = await post_once(there, headers={"Authorization": "Bearer s3cr&et/key"})
    assert found.excerpt == '<b>no</b> [31m token … and "s3cr\\&et" … … … … … … POST … \ufffd end'


async def test_an_excerpt_is_short(there: Target) -> None:
    there.answers = [answer("500 Oops", b"x" * 100_000)]
    assert (await post_once(there)).excerpt == "x" * 200


async def test_cancellation_closes_the_connection(there: Target) -> None:
    """Shutdown does not wait for a slow server."""
    there.answers = [Page(b"", hold=True)]
    task = asyncio.create_task(post_once(there))
    await there.held.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await there.gone.wait()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "https://host/path"),
        ("hooks.example.com/x", "https://host/path"),
        ("ftp://example.com", "https://host/path"),
        ("https:///x", "https://host/path"),
        ("https://exa mple.com/", "not a URL"),
        ("https://example.com/a\nb", "not a URL"),
        ("https://example.com:99999/", "port"),
        ("https://user:secret@example.com/", "Authorization"),
        ("https://example.com/#secret", "fragment"),
        ("http://example.com/", "plain http"),
        ("https://127.0.0.1/", "public"),
        ("https://localhost./", "public"),
        ("https://[::1]/", "public"),
        ("https://[::ffff:10.0.0.1]/", "public"),
        ("https://169.254.169.254/", "public"),
    ],
)
def test_addresses_that_are_not_posted_to(text: str, words: str) -> None:
    """A bad URL is refused when the configuration is read; the reason does not show it."""
    with pytest.raises(ValueError, match=words) as caught:
        target_url(text, allow_private=False)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1:9000/x",
        "https://example.com/a?b=c",
        "http://[::1]:9/",
        "http://xn--bcher-kva.test/",
    ],
)
def test_addresses_that_are_posted_to(text: str) -> None:
    assert target_url(text, allow_private=True) == text


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({"a b": "x"}, "not a header's name"),
        ({"": "x"}, "not a header's name"),
        ({"X:y": "x"}, "not a header's name"),
        ({"X": "secret\r\nInjected: 1"}, "X has a value"),
        ({"X": "secret\x00"}, "X has a value"),
        ({"X": "sécret"}, "X has a value"),
        ({"X": " secret"}, "X has a value"),
        ({"X": ""}, "X has a value"),
        ({"Host": "secret"}, "Host is set by"),
        ({"content-LENGTH": "3"}, "is set by"),
        ({"Transfer-Encoding": "chunked"}, "connection"),
        ({"Webhook-Id": "1"}, "is set by"),
        ({"X": "1", "x": "2"}, "twice"),
    ],
)
def test_headers_that_no_request_may_carry(headers: dict[str, str], words: str) -> None:
    """No header inside a value, no reserved header; the message never shows the value."""
    with pytest.raises(ValueError, match=words) as caught:
        usable_headers(headers, reserved=("webhook-",))
    assert "secret" not in str(caught.value)


def test_any_text_can_be_a_header_s_value() -> None:
    """Visible ASCII stays as it is; the rest, and the percent sign itself, is encoded."""
    assert header_value("run_1:forward:settled:0") == "run_1:forward:settled:0"
    assert header_value('a b%"ü\r\n\x00\ud800') == "a%20b%25%22%C3%BC%0D%0A%00?"


NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)


def test_a_file_without_a_ca_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("nothing")
    with pytest.raises(ValueError, match="ca_file"):
        Poster("https://example.com/", ca_file=tmp_path / "ca.pem")
