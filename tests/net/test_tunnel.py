"""Proxies: what is asked of them, that the guard holds, and what their failures say."""

import ssl
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from receiver.errors import DownloadError, DownloadFailedError, DownloadRefusedError, FloraError
from receiver.flora.client import FloraClient
from receiver.flora.rate_limit import RateLimit
from receiver.model import Output
from receiver.net.clients import PrivateAddressError, api_client, check_name, tls_context
from receiver.net.download import Downloader
from receiver.net.proxies import Proxy, parse_proxy
from receiver.net.tunnel import ProxyRoute, route_through
from tests.support.defaults import download_limits
from tests.support.forward_proxy import ForwardProxy, run_forward_proxy
from tests.support.media import MediaServer, certificate, page, redirect, serve_media

PUBLIC = "1.1.1.1"
LIMITS = download_limits(stall_seconds=5, deadline_seconds=20, connect_seconds=5)
RUN = b'{"run_id": "run_1", "status": "running"}'


async def resolve(host: str, port: int) -> Sequence[str]:
    names = {"media.test": [PUBLIC], "inside.test": ["10.0.0.1"], "local.test": ["127.0.0.1"]}
    return names.get(host, [host])


@pytest.fixture
def tls(tmp_path: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's context for media.test, and one of clients that trust it."""
    server, ca = certificate(tmp_path, "media.test")
    return server, tls_context(ca)


@pytest.fixture
async def media(tls: tuple[ssl.SSLContext, ssl.SSLContext]) -> AsyncIterator[MediaServer]:
    async with serve_media("media.test", tls[0]) as server:
        yield server


@pytest.fixture
async def proxy() -> AsyncIterator[ForwardProxy]:
    async with run_forward_proxy() as running:
        yield running


def route(
    proxy: ForwardProxy, tls: ssl.SSLContext, userinfo: str = "", *, by_name: bool = False
) -> ProxyRoute:
    found = route_through(f"http://{userinfo}127.0.0.1:{proxy.port}", tls, resolves_names=by_name)
    assert found is not None
    return found


async def read(url: str, way: ProxyRoute, allowed: Sequence[str] = ()) -> bytes:
    downloader = Downloader(
        limits=LIMITS, allow_private_hosts=allowed, tls=way.tls, resolve=resolve, route=way
    )
    output = Output(position=0, output_id="o", type="imageUrl", value=url)
    try:
        async with downloader.open(output) as download:
            return b"".join([chunk async for chunk in download])
    finally:
        await downloader.aclose()


async def failure(url: str, way: ProxyRoute, allowed: Sequence[str] = ()) -> DownloadError:
    with pytest.raises(DownloadError) as caught:
        await read(url, way, allowed)
    return caught.value


async def test_the_proxy_is_asked_for_the_address_that_was_checked(
    media: MediaServer, proxy: ForwardProxy, tls: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    """No second look-up can lead elsewhere, and TLS still verifies the host's name."""
    media.pages["/a"] = page(b"through")
    proxy.routes[f"{PUBLIC}:{media.port}"] = media.port
    assert await read(media.url("/a"), route(proxy, tls[1])) == b"through"
    assert proxy.targets == [f"{PUBLIC}:{media.port}"]
    assert media.requests[0].lower().startswith("get /a http/1.1\r\nhost: media.test:")
    media.host = "local.test"
    error = await failure(media.url("/a"), route(proxy, tls[1]))
    assert isinstance(error, DownloadRefusedError)


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize(
    "host",
    [
        "10.0.0.1",
        "127.0.0.1",
        "127.1",
        "0x7f000001",
        "2130706433",
        "169.254.169.254",
        "[::1]",
        "[fd00::1]",
        "localhost",
    ],
)
async def test_private_addresses_are_refused_with_a_proxy(
    proxy: ForwardProxy, tls: tuple[ssl.SSLContext, ssl.SSLContext], host: str, by_name: bool
) -> None:
    """The proxy is not even asked: it stands in a network where they lead somewhere."""

    async def as_it_is(name: str, port: int) -> Sequence[str]:
        return {"127.1": ["127.0.0.1"], "0x7f000001": ["127.0.0.1"], "2130706433": ["127.0.0.1"]}.get(
            name, ["127.0.0.1" if name == "localhost" else name]
        )

    way = route(proxy, tls[1], by_name=by_name)
    downloader = Downloader(limits=LIMITS, tls=tls[1], resolve=as_it_is, route=way)
    output = Output(position=0, output_id="o", type="imageUrl", value=f"https://{host}/x")
    with pytest.raises(DownloadRefusedError, match="not a public"):
        async with downloader.open(output):
            pass
    await downloader.aclose()
    assert proxy.targets == []


async def test_a_name_of_a_private_address_is_refused_unless_the_proxy_resolves(
    media: MediaServer, proxy: ForwardProxy, tls: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    """`proxy_resolves_names` gives that up, as its description says."""
    media.host = "inside.test"
    error = await failure(media.url("/a"), route(proxy, tls[1]))
    assert isinstance(error, DownloadRefusedError)
    assert str(error) == "inside.test is at 10.0.0.1, which is not a public address"
    assert proxy.targets == []
    error = await failure(media.url("/a"), route(proxy, tls[1], by_name=True))
    assert isinstance(error, DownloadFailedError)
    assert proxy.targets == [f"inside.test:{media.port}"]


async def test_a_proxy_that_resolves_is_given_the_name(
    media: MediaServer, proxy: ForwardProxy, tls: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    """Nothing is resolved here: such machines often cannot."""
    media.pages["/a"] = page(b"by name")
    proxy.routes[f"media.test:{media.port}"] = media.port
    assert await read(media.url("/a"), route(proxy, tls[1], by_name=True)) == b"by name"
    assert proxy.targets == [f"media.test:{media.port}"]


async def test_redirects_go_through_the_proxy_and_the_guard(
    media: MediaServer, proxy: ForwardProxy, tls: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    proxy.routes[f"{PUBLIC}:{media.port}"] = media.port
    media.pages |= {"/a": redirect("/b"), "/b": page(b"there")}
    assert await read(media.url("/a"), route(proxy, tls[1])) == b"there"
    media.pages["/a"] = redirect(f"https://inside.test:{media.port}/b")
    assert "not a public address" in str(await failure(media.url("/a"), route(proxy, tls[1])))
    assert set(proxy.targets) == {f"{PUBLIC}:{media.port}"}


async def test_allowed_private_hosts_are_reached_directly(
    proxy: ForwardProxy, tls: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    """They are near, and a proxy would not know them."""
    async with serve_media() as near:
        near.pages["/a"] = page(b"near")
        assert await read(near.url("/a"), route(proxy, tls[1]), [near.authority]) == b"near"
    assert proxy.targets == []


async def test_credentials_are_sent_to_the_proxy_alone(
    media: MediaServer, proxy: ForwardProxy, tls: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    """Percent-encoded ones too; wrong ones are explained, and never shown."""
    media.pages["/a"] = page(b"in")
    proxy.routes[f"{PUBLIC}:{media.port}"] = media.port
    proxy.credentials = "user:p@ss/wörd"
    assert await read(media.url("/a"), route(proxy, tls[1], "user:p%40ss%2Fw%C3%B6rd@")) == b"in"
    assert "proxy-authorization" not in media.requests[0].lower()
    error = await failure(media.url("/a"), route(proxy, tls[1], "user:hunter2@"))
    assert isinstance(error, DownloadFailedError)
    assert "it asks for a user name and password" in str(error)
    assert "hunter2" not in str(error)
    assert "hunter2" not in repr(route(proxy, tls[1], "user:hunter2@"))


async def test_a_proxy_over_tls(
    tmp_path: Path, media: MediaServer, tls: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    """TLS with the proxy, and within it TLS with the host."""
    server, ca = certificate(tmp_path, "localhost")
    tls[1].load_verify_locations(cafile=ca)
    async with run_forward_proxy(server) as proxy:
        media.pages["/a"] = page(bytes(range(256)) * 8000)
        proxy.routes[f"{PUBLIC}:{media.port}"] = media.port
        way = ProxyRoute(parse_proxy(f"https://localhost:{proxy.port}"), tls[1])
        assert await read(media.url("/a"), way) == bytes(range(256)) * 8000
        untrusting = replace(way, tls=tls_context())
        downloader = Downloader(limits=LIMITS, tls=tls[1], resolve=resolve, route=untrusting)
        with pytest.raises(DownloadFailedError, match="certificate"):
            async with downloader.fetch(media.url("/a")):
                pass
        await downloader.aclose()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (None, "refused with 502: No Route"),
        (
            b"HTTP/1.1 403 Forbidden by policy\r\nContent-Type: text/html\r\n\r\n<html>",
            "refused with 403: Forbidden by policy",
        ),
        (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", "does not answer as an HTTP proxy does"),
        (b"HTTP/1.1 200 OK\r\n" + b"X-Long: y\r\n" * 4000, "does not answer as an HTTP proxy does"),
        (b"HTTP/1.1 200 OK\r\n\r\n\x16\x03\x01", "sent more than the answer to CONNECT"),
        (b"HTTP/1.1 200 OK\r\n", "does not answer as an HTTP proxy does"),
    ],
)
async def test_a_proxy_that_fails_may_work_later(
    media: MediaServer,
    proxy: ForwardProxy,
    tls: tuple[ssl.SSLContext, ssl.SSLContext],
    answer: bytes | None,
    reason: str,
) -> None:
    """The failure names the proxy, so that nobody looks for it at the media host."""
    proxy.answer = answer
    error = await failure(media.url("/a"), route(proxy, tls[1]))
    assert isinstance(error, DownloadFailedError)
    assert f"the proxy 127.0.0.1:{proxy.port} {reason}" in str(error)
    assert not media.requests


async def test_a_proxy_that_is_not_there(
    media: MediaServer, tls: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    async with run_forward_proxy() as gone:
        way = route(gone, tls[1])
    error = await failure(media.url("/a"), way)
    assert isinstance(error, DownloadFailedError)
    assert f"the proxy 127.0.0.1:{gone.port} cannot be reached" in str(error)


async def test_the_api_is_called_through_the_proxy(
    media: MediaServer, proxy: ForwardProxy, tls: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    """The proxy gets the name and no key; its failures are not FLORA's."""
    media.pages["/api/v1/runs/run_1"] = page(RUN, "application/json")
    proxy.routes[f"media.test:{media.port}"] = media.port
    way = route(proxy, tls[1])
    async with api_client(media.url("/api/v1"), tls=tls[1], route=way) as http:
        client = FloraClient(http, "sk_test", RateLimit(8))
        assert (await client.run("run_1")).run_id == "run_1"
        assert "authorization: bearer sk_test" in media.requests[0].lower()
    proxy.routes.clear()
    async with api_client(media.url("/api/v1"), tls=tls[1], route=way) as http:
        with pytest.raises(FloraError, match=r"cannot be reached: the proxy .* refused with 502") as caught:
            await FloraClient(http, "sk_test", RateLimit(8)).run("run_1")
        assert caught.value.status is None
    assert set(proxy.targets) == {f"media.test:{media.port}"}


async def test_an_api_on_loopback_is_called_directly(
    proxy: ForwardProxy, tls: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    """Loopback is this machine's, not the proxy's: the key must not end up there."""
    async with serve_media() as near:
        near.pages["/runs"] = page(b"{}")
        async with api_client(near.url("/"), tls=tls[1], route=route(proxy, tls[1])) as http:
            assert (await http.get("runs")).status_code == 200
    assert proxy.targets == []


async def test_no_client_reads_a_proxy_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, proxy: ForwardProxy
) -> None:
    """Only the settings decide."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        monkeypatch.setenv(name.lower(), f"http://127.0.0.1:{proxy.port}")
    async with api_client("https://flora.invalid/api/v1") as http:
        with pytest.raises(httpx.ConnectError):
            await http.get("runs")
    assert proxy.targets == []


@pytest.mark.parametrize(
    "name", ["media", "localhost", "a.localhost", "nas.local", "x.internal.", "1.0.0.127.in-addr.arpa"]
)
def test_names_that_are_private_by_themselves(name: str) -> None:
    with pytest.raises(PrivateAddressError):
        check_name(name)


@pytest.mark.parametrize(
    "name", ["media.example.com", "1.1.1.1", "2606:4700::1111", "xn--bcher-kva.example"]
)
def test_names_that_a_proxy_may_be_given(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize(
    ("text", "proxy"),
    [
        ("http://proxy.test:3128", Proxy("proxy.test", 3128, is_tls=False)),
        ("proxy.test:3128", Proxy("proxy.test", 3128, is_tls=False)),
        ("https://proxy.test:443/", Proxy("proxy.test", 443, is_tls=True)),
        ("http://[::1]:3128", Proxy("::1", 3128, is_tls=False)),
        ("http://u:p@proxy.test:3128", Proxy("proxy.test", 3128, is_tls=False, authorization="Basic dTpw")),
    ],
)
def test_urls_of_proxies(text: str, proxy: Proxy) -> None:
    assert parse_proxy(text) == proxy
    assert "dTpw" not in repr(parse_proxy(text))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("socks5://proxy.test:1080", "SOCKS is not supported"),
        ("socks5h://u:hunter2@proxy.test:1080", "SOCKS is not supported"),
        ("http://proxy.test", "must name the port"),
        ("http://proxy.test:${PORT}", "is not a URL"),
        ("http://proxy.test:99999", "is not a URL"),
        ("ftp://proxy.test:21", "must be like"),
        ("http://proxy.test:3128/path", "must be like"),
        ("http://:3128", "must be like"),
        ("", "must be like"),
        ("http://u:hunter2@x@proxy.test:3128", "as %40"),
        ("http://u:hunter2 @proxy.test:3128", "printable ASCII"),
        ("http://u:hunter2\n@proxy.test:3128", "printable ASCII"),
    ],
)
def test_what_is_no_proxy_is_refused_without_its_password(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        parse_proxy(text)
    assert "hunter2" not in str(caught.value)
