"""The one place that builds httpx clients: one for FLORA's API, one for media, and the guard that keeps media public.

Media URLs come from outside. The guard resolves their host itself, refuses unless every address is public, and connects
to the address that it checked, so that no second look-up can answer differently; TLS still verifies the host's name.
Plain clients would also read proxies from the environment, follow redirects and keep cookies: ours do none of it.
"""

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import Path
from typing import Any

import httpcore
import httpx

from receiver.net.addresses import is_loopback

USER_AGENT = "flora-receiver"
MAX_ADDRESSES = 4  # tried per host, so that a long list of dead ones cannot use up the caller's time

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""(host, port) -> addresses as text; raises OSError when there are none."""

SocketOption = tuple[int, int, int] | tuple[int, int, bytes | bytearray] | tuple[int, int, None, int]

# What `ipaddress` calls global although it leads, or can be made to lead, elsewhere.
_NOT_PUBLIC = tuple(
    ipaddress.ip_network(network)
    for network in (
        "192.0.0.0/24",  # protocol assignments
        "192.88.99.0/24",  # 6to4 relays
        "168.63.129.16/32",  # the host of an Azure machine, from inside
        "2001::/23",  # protocol assignments, Teredo among them
        "2001:db8::/32",
        "2002::/16",  # 6to4: carries any IPv4 address
        "3fff::/20",  # documentation
    )
)
# All public IPv6 there is; leaves out mapped and compatible IPv4, NAT64, site-local, multicast.
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")


class PrivateAddressError(httpcore.ConnectError):
    """A host that is, or resolves to, an address which is not public. httpx wraps it: look at `__cause__`."""


def is_public(address: str) -> bool:
    """Whether an IP address, given as text, belongs to the public internet and to nothing else."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address) and (parsed.scope_id is not None or parsed not in _GLOBAL_UNICAST):
        return False
    return (
        parsed.is_global
        and not parsed.is_multicast
        and not any(parsed in network for network in _NOT_PUBLIC if network.version == parsed.version)
    )


async def resolve(host: str, port: int) -> Sequence[str]:
    """Ask the system's resolver; also turns odd spellings of an address (`127.1`, `0x7f000001`) into the address."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def host_and_port(text: str) -> tuple[str, int]:
    """Read `host:port` (IPv6 in brackets) of a setting; ValueError says what is wrong with it."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"{text!r} is not host:port")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif not set(host).isdisjoint(":/[]@?#"):
        raise ValueError(f"{text!r} is not host:port")
    return host.lower(), int(port)


class GuardedBackend(httpcore.AsyncNetworkBackend):
    """Opens connections to public addresses, and to the (host, port) pairs in `allowed` whatever their address is."""

    def __init__(self, *, allowed: Collection[tuple[str, int]] = (), resolve: Resolve = resolve) -> None:
        self._allowed = frozenset(allowed)
        self._resolve = resolve
        self._backend = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[SocketOption] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        try:
            async with asyncio.timeout(timeout):
                addresses = await self._checked(host, port)
                return await self._connect(addresses, port, timeout, local_address, socket_options)
        except TimeoutError as exc:
            raise httpcore.ConnectTimeout(f"no connection within {timeout} s") from exc

    async def _checked(self, host: str, port: int) -> Sequence[str]:
        try:
            addresses = await self._resolve(host, port)
        except (OSError, UnicodeError) as exc:
            raise httpcore.ConnectError(f"the name {host} could not be resolved") from exc
        if not addresses:
            raise httpcore.ConnectError(f"the name {host} could not be resolved")
        if (host.lower(), port) not in self._allowed:
            for address in addresses:
                if not is_public(address):
                    raise PrivateAddressError(f"{host} is at {address}, which is not a public address")
        return addresses[:MAX_ADDRESSES]

    async def _connect(
        self,
        addresses: Sequence[str],
        port: int,
        timeout: float | None,
        local_address: str | None,
        socket_options: Iterable[SocketOption] | None,
    ) -> httpcore.AsyncNetworkStream:
        share = None if timeout is None else timeout / len(addresses)
        failure: Exception | None = None
        for address in addresses:
            try:
                return _Stream(await self._backend.connect_tcp(address, port, share, local_address, socket_options))
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as exc:
                failure = exc
        raise failure or httpcore.ConnectError("no address")

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,
        socket_options: Iterable[SocketOption] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        raise PrivateAddressError(f"unix sockets are not public: {path}")

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class _Stream(httpcore.AsyncNetworkStream):
    """A connection that is closed when its TLS handshake is cancelled: httpcore closes it after errors alone."""

    def __init__(self, stream: httpcore.AsyncNetworkStream) -> None:
        self._stream = stream

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return await self._stream.read(max_bytes, timeout)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        await self._stream.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.AsyncNetworkStream:
        try:
            return await self._stream.start_tls(ssl_context, server_hostname, timeout)
        except BaseException:
            await self._stream.aclose()
            raise

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class GuardedTransport(httpx.AsyncHTTPTransport):
    """httpx over the guarded backend. Plain http passes for `allowed` hosts only; else httpx.UnsupportedProtocol."""

    def __init__(
        self,
        *,
        tls: ssl.SSLContext,
        allowed: Collection[tuple[str, int]] = (),
        resolve: Resolve = resolve,
        max_connections: int = 100,
    ) -> None:
        super().__init__(verify=tls, trust_env=False)
        self._allowed = frozenset(allowed)
        # httpx offers no way to hand a network backend to its pool, so the pool it made (and never used) is replaced.
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=tls,
            max_connections=max_connections,
            max_keepalive_connections=20,
            keepalive_expiry=15,
            network_backend=GuardedBackend(allowed=allowed, resolve=resolve),
        )

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url
        if url.scheme != "https" and (url.scheme != "http" or (url.host.lower(), url.port or 80) not in self._allowed):
            raise httpx.UnsupportedProtocol(f"{url.host}: only https is fetched")
        return await super().handle_async_request(request)


def tls_context(ca: Path | None = None) -> ssl.SSLContext:
    """Verify against the public roots, and against the certificates in the PEM file `ca` besides."""
    context = httpx.create_ssl_context(trust_env=False)
    if ca is not None:
        context.load_verify_locations(cafile=ca)
    return context


def media_client(
    *,
    allow_private_hosts: Iterable[str] = (),
    resolve: Resolve = resolve,
    tls: ssl.SSLContext | None = None,
    connect_seconds: float = 10.0,
    stall_seconds: float = 30.0,
) -> httpx.AsyncClient:
    """Build a client for URLs from outside: guarded, no redirects, no cookies, no compression.

    `allow_private_hosts` are exact `host:port`; ValueError where one is not. Use a client without them for redirects.
    A refused address is an httpx.ConnectError caused by PrivateAddressError.
    """
    allowed = [host_and_port(entry) for entry in allow_private_hosts]
    return httpx.AsyncClient(
        transport=GuardedTransport(tls=tls or tls_context(), allowed=allowed, resolve=resolve),
        headers={"User-Agent": USER_AGENT, "Accept": "*/*", "Accept-Encoding": "identity"},
        # Waiting for a free connection counts against the caller's own deadline only.
        timeout=httpx.Timeout(connect=connect_seconds, read=stall_seconds, write=stall_seconds, pool=None),
        cookies=CookieJar(policy=DefaultCookiePolicy(allowed_domains=())),
        follow_redirects=False,
        trust_env=False,
    )


def api_client(
    base_url: str,
    *,
    headers: Mapping[str, str] | None = None,
    tls: ssl.SSLContext | None = None,
    timeout_seconds: float = 30.0,
    connect_seconds: float = 10.0,
    max_connections: int = 20,
) -> httpx.AsyncClient:
    """Build a client for FLORA's API. `headers` (the API key) go to the origin of `base_url` and nowhere else.

    ValueError where `base_url` is not https, or http on loopback.
    """
    base = httpx.URL(base_url)
    if not base.host or not (base.scheme == "https" or (base.scheme == "http" and is_loopback(base.host))):
        raise ValueError(f"must be an https URL, or http on loopback: {base.scheme}://{base.host}")
    origin = _origin(base)

    async def stay(request: httpx.Request) -> None:
        if _origin(request.url) != origin:
            raise httpx.UnsupportedProtocol(f"not an address of the API: {request.url.host}", request=request)

    return httpx.AsyncClient(
        base_url=base,
        headers={"User-Agent": USER_AGENT, "Accept": "application/json", **(headers or {})},
        verify=tls or tls_context(),
        timeout=httpx.Timeout(timeout_seconds, connect=connect_seconds),
        limits=httpx.Limits(max_connections=max_connections, max_keepalive_connections=max_connections),
        cookies=CookieJar(policy=DefaultCookiePolicy(allowed_domains=())),
        event_hooks={"request": [stay]},
        follow_redirects=False,
        trust_env=False,
    )


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host.lower(), url.port


def probe_client(
    *, ca: Path | None = None, timeout_seconds: float = 15.0, limits: httpx.Limits | None = None
) -> httpx.AsyncClient:
    """Build a client for an address that the operator typed: any host, no redirects."""
    return httpx.AsyncClient(
        headers={"User-Agent": USER_AGENT},
        verify=tls_context(ca),
        timeout=timeout_seconds,
        limits=limits or httpx.Limits(max_connections=100, max_keepalive_connections=20),
        trust_env=False,
    )


def own_client(*, bound: str | None = None, timeout_seconds: float = 5.0) -> httpx.AsyncClient:
    """Build a client for a listener of this very machine: whatever name its certificate bears, it is our own.

    It stays on loopback, or goes to the address that our listener is `bound` to.
    """
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    tls.check_hostname = False
    tls.verify_mode = ssl.CERT_NONE

    async def stay(request: httpx.Request) -> None:
        if not is_loopback(request.url.host) and request.url.host != bound:
            raise httpx.UnsupportedProtocol(f"not on this machine: {request.url.host}", request=request)

    return httpx.AsyncClient(
        headers={"User-Agent": USER_AGENT},
        verify=tls,
        timeout=timeout_seconds,
        event_hooks={"request": [stay]},
        trust_env=False,
    )


def operations_client(url: str, token: str, *, timeout_seconds: float, ca: Path | None = None) -> httpx.Client:
    """Build a client for a service's operations listener; the token goes to the origin of `url` and nowhere else.

    ValueError where `url` is no http or https URL, or the token no token.
    """
    base = httpx.URL(url)
    if base.scheme not in {"http", "https"} or not base.host:
        raise ValueError("it is not an http or https URL")
    if not token.isascii() or not token.isprintable():
        raise ValueError("the token holds what no header can")

    def stay(request: httpx.Request) -> None:
        if _origin(request.url) != _origin(base):
            raise httpx.UnsupportedProtocol(f"not the operations listener: {request.url.host}", request=request)

    return httpx.Client(
        base_url=base,
        headers={"User-Agent": USER_AGENT, "Accept": "application/json", "Authorization": f"Bearer {token}"},
        # Loading the public roots takes longer than a whole request to loopback does.
        verify=tls_context(ca) if base.scheme == "https" else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
        timeout=httpx.Timeout(timeout_seconds, connect=min(10.0, timeout_seconds)),
        cookies=CookieJar(policy=DefaultCookiePolicy(allowed_domains=())),
        event_hooks={"request": [stay]},
        follow_redirects=False,
        trust_env=False,
    )
