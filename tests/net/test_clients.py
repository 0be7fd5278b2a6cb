"""The guard's rules, and what our clients never do."""

import asyncio
import socket
from collections.abc import Sequence

import httpcore
import httpx
import pytest

from receiver.config import load_settings
from receiver.net.clients import (
    GuardedBackend,
    PrivateAddressError,
    api_client,
    is_public,
    media_client,
    tls_context,
)
from tests.support.media import page, redirect, serve_media
from tests.support.patience import PATIENCE_SECONDS

TLS = tls_context()

PRIVATE = [
    "0.0.0.0",
    "0.1.2.3",
    "10.0.0.1",
    "100.64.0.1",
    "127.0.0.1",
    "127.8.8.8",
    "168.63.129.16",
    "169.254.169.254",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.1",
    "192.0.0.192",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.1.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.255.255.250",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::8.8.8.8",
    "::ffff:8.8.8.8",
    "::ffff:127.0.0.1",
    "::ffff:0:8.8.8.8",
    "64:ff9b::8.8.8.8",
    "64:ff9b::7f00:1",
    "64:ff9b:1::1",
    "100::1",
    "2001::1",
    "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    "2001:10::1",
    "2001:db8::1",
    "2002:7f00:1::",
    "2002:808:808::1",
    "3fff::1",
    "5f00::1",
    "fc00::1",
    "fd00:ec2::254",
    "fe80::1",
    "fe80::1%eth0",
    "2606:4700::1111%eth0",
    "fec0::1",
    "ff02::1",
    "ff0e::1",
    "",
    "example.com",
    "127.1",
]


@pytest.mark.parametrize("address", PRIVATE)
def test_every_kind_of_address_that_is_not_public_is_refused(address: str) -> None:
    """Special-purpose, embedded, scoped and malformed addresses are not public.

    That holds whatever `is_global` says.
    """
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "8.8.8.8", "172.32.0.1", "2606:4700::1111", "2a00:1450:4001:81b::200e"]
)
def test_public_addresses_pass(address: str) -> None:
    """The guard must not get in the way of the internet."""
    assert is_public(address)


class Names:
    """A resolver with fixed results, which counts queries."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = addresses
        self.queries = 0

    async def __call__(self, _host: str, _port: int) -> Sequence[str]:
        self.queries += 1
        return self.addresses


@pytest.mark.parametrize("addresses", [("127.0.0.1",), ("1.1.1.1", "10.0.0.1"), ("2606:4700::1111", "::1")])
async def test_one_private_address_among_public_ones_refuses_the_host(addresses: tuple[str, ...]) -> None:
    """A name is as good as its worst address: which one is used must not be up to chance."""
    with pytest.raises(PrivateAddressError, match=r"media\.test is at .*not a public address"):
        await GuardedBackend(resolve=Names(*addresses)).connect_tcp("media.test", 443)


async def test_the_connection_goes_to_the_address_that_was_checked() -> None:
    """One lookup per connection: a resolver that changes its result is not queried again."""
    async with serve_media() as media:
        names = Names("127.0.0.1")
        backend = GuardedBackend(allowed=[("media.test", media.port)], resolve=names)
        stream = await backend.connect_tcp("media.test", media.port, timeout=PATIENCE_SECONDS)
        assert stream.get_extra_info("server_addr") == ("127.0.0.1", media.port)
        assert names.queries == 1
        await stream.aclose()


async def test_a_dead_address_does_not_hide_a_living_one() -> None:
    """All checked addresses are tried in turn."""
    async with serve_media() as media:
        backend = GuardedBackend(
            allowed=[("media.test", media.port)], resolve=Names("127.0.0.9", "127.0.0.1")
        )
        stream = await backend.connect_tcp("media.test", media.port, timeout=PATIENCE_SECONDS)
        await stream.aclose()


async def test_resolver_errors_become_connect_errors() -> None:
    """Callers see one kind of error, whichever layer failed."""

    async def broken(host: str, port: int) -> Sequence[str]:
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    for resolve in (broken, Names()):
        with pytest.raises(httpcore.ConnectError, match="could not be resolved"):
            await GuardedBackend(resolve=resolve).connect_tcp("nowhere.test", 443)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1", "0x7f000001", "2130706433", "localhost", "::1"])
async def test_no_spelling_of_loopback_passes(host: str) -> None:
    """The real resolver turns odd spellings into addresses, which are checked."""
    with pytest.raises(httpcore.ConnectError):
        await GuardedBackend().connect_tcp(host, 9, timeout=PATIENCE_SECONDS)


async def test_a_cancelled_handshake_closes_its_connection() -> None:
    """A server without TLS leaves no socket open, as it would with httpcore alone."""
    arrived, ended = asyncio.Event(), asyncio.Event()

    async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        arrived.set()
        await reader.read()
        ended.set()
        writer.close()

    async with await asyncio.start_server(mute, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        backend = GuardedBackend(allowed=[("media.test", port)], resolve=Names("127.0.0.1"))
        stream = await backend.connect_tcp("media.test", port, timeout=PATIENCE_SECONDS)
        handshake = asyncio.create_task(stream.start_tls(TLS, "media.test", 60))
        await arrived.wait()
        handshake.cancel()
        with pytest.raises(asyncio.CancelledError):
            await handshake
        await asyncio.wait_for(ended.wait(), PATIENCE_SECONDS)


async def test_unix_sockets_are_refused() -> None:
    """There is no public address on a unix socket."""
    with pytest.raises(PrivateAddressError):
        await GuardedBackend().connect_unix_socket("/run/docker.sock")


async def test_media_client_reaches_only_what_is_allowed() -> None:
    """Plain http and private addresses are allowed for the exact host and port alone."""
    async with serve_media() as media, serve_media() as other:
        media.pages["/a"] = page(b"here")
        async with media_client(allow_private_hosts=[media.authority], tls=TLS) as client:
            assert (await client.get(media.url("/a"))).content == b"here"
            with pytest.raises(httpx.UnsupportedProtocol):
                await client.get(other.url("/a"))
            with pytest.raises(httpx.ConnectError) as caught:
                await client.get(f"https://{other.authority}/a")
            assert isinstance(caught.value.__cause__, PrivateAddressError)
        assert not other.requests


async def test_media_client_keeps_nothing_and_follows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No cookies, no redirects, no compression, no proxy from the environment."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    async with serve_media() as media:
        media.pages["/a"] = redirect("/b")
        async with media_client(allow_private_hosts=[media.authority], tls=TLS) as client:
            for _ in range(2):
                assert (await client.get(media.url("/a"))).status_code == 302
    for head in media.requests:
        assert "cookie" not in head.lower()
        assert "accept-encoding: identity" in head.lower()
        assert head.startswith("GET /a ")


@pytest.mark.parametrize(
    "base_url", ["http://api.example.com/v1", "ftp://api.example.com", "//x", "http://127.0.0.1.evil.test"]
)
def test_the_api_is_called_over_https_only(base_url: str) -> None:
    """The API key must not travel in the clear."""
    with pytest.raises(ValueError, match="must be an https URL"):
        api_client(base_url, tls=TLS)


async def test_the_api_key_stays_with_the_api() -> None:
    """Neither a redirect nor an absolute URL takes the headers to another origin."""
    async with serve_media() as api, serve_media() as other:
        api.pages["/v1/runs"] = redirect(other.url("/steal"))
        async with api_client(api.url("/v1"), headers={"Authorization": "Bearer k"}, tls=TLS) as client:
            assert (await client.get("/runs")).status_code == 302
            with pytest.raises(httpx.UnsupportedProtocol):
                await client.get(other.url("/steal"))
        assert "authorization: bearer k" in api.requests[0].lower()
        assert not other.requests


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "localhost.", "[::1]", "[::ffff:127.0.0.1]"])
async def test_settings_and_clients_agree_about_loopback(host: str) -> None:
    """Settings and clients agree about `localhost.`, or the service would not start."""
    settings = load_settings(None, {"FLORA_BASE_URL": f"http://{host}:9100/api/v1"}, need_secrets=False)
    async with api_client(settings.flora.base_url) as client:
        assert client.base_url.port == 9100
