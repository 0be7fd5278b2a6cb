"""Builds every httpx client, and guards those for outside URLs against private addresses.

Media URLs come from outside. The guard resolves their host itself, refuses it unless every address
is public, and connects to the address that it checked, so that no second lookup can give another;
TLS still verifies the host's name. Plain httpx clients also read proxies from the environment and
keep cookies; these do neither, and follow no redirects.
"""

import asyncio
import contextlib
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import Path
from typing import Any

import httpcore
import httpx

from receiver.net.addresses import (
    is_loopback,
    local_origin,
    parse_address,
    parse_host_and_port,
    to_unix_path,
)
from receiver.net.tunnel import ProxyRoute, open_tunnel

USER_AGENT = "flora-receiver"
MAX_ADDRESSES = 4  # tried per host: a long list of dead ones must not use up the caller's time

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""(host, port) -> addresses as text. Raises OSError where there are none."""

SocketOption = tuple[int, int, int] | tuple[int, int, bytes | bytearray] | tuple[int, int, None, int]

# Global according to `ipaddress`, although they lead, or can be made to lead, elsewhere.
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
_PRIVATE_DOMAINS = frozenset({"arpa", "home", "internal", "intranet", "lan", "local", "localhost"})
# All public IPv6; excludes mapped and compatible IPv4, NAT64, site-local and multicast addresses.
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")


class PrivateAddressError(httpcore.ConnectError):
    """A host that is, or resolves to, a private address. httpx raises it as a `__cause__`."""


def is_public(address: str) -> bool:
    """Return whether an IP address, as text, belongs to the public internet and to nothing else."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address) and (
        parsed.scope_id is not None or parsed not in _GLOBAL_UNICAST
    ):
        return False
    return (
        parsed.is_global
        and not parsed.is_multicast
        and not any(parsed in network for network in _NOT_PUBLIC if network.version == parsed.version)
    )


async def resolve(host: str, port: int) -> Sequence[str]:
    """Return a host's addresses.

    The system's resolver also reads `127.1` and `0x7f000001` as addresses.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def check_name(host: str) -> None:
    """Raise PrivateAddressError for a host that is private by its name or spelling alone."""
    with contextlib.suppress(OSError):  # the spellings that the system's resolver reads as addresses
        host = socket.inet_ntoa(socket.inet_aton(host))
    address = parse_address(host)
    labels = host.lower().rstrip(".").split(".")
    if address is not None and not is_public(str(address)):
        raise PrivateAddressError(f"{host} is not a public address")
    if address is None and (len(labels) < 2 or labels[-1] in _PRIVATE_DOMAINS):
        raise PrivateAddressError(f"{host} is not a public name")


class GuardedBackend(httpcore.AsyncNetworkBackend):
    """Connects to public addresses, and to the (host, port) pairs in `allowed` at any address.

    With `route`, public addresses are reached through its proxy: it is asked for the address that was
    checked here. Where the proxy resolves names, only what a name reveals is checked.
    """

    def __init__(
        self,
        *,
        allowed: Collection[tuple[str, int]] = (),
        resolve: Resolve = resolve,
        route: ProxyRoute | None = None,
    ) -> None:
        self._allowed = frozenset(allowed)
        self._resolve = resolve
        self._route = route
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
                if self._route is not None and (host.lower(), port) not in self._allowed:
                    return await self._connect_by_proxy(self._route, host, port, timeout)
                addresses = await self._resolve_public(host, port)
                return await self._connect(addresses, port, timeout, local_address, socket_options)
        except TimeoutError as error:
            raise httpcore.ConnectTimeout(f"no connection within {timeout} s") from error

    async def _connect_by_proxy(
        self, route: ProxyRoute, host: str, port: int, timeout: float | None
    ) -> httpcore.AsyncNetworkStream:
        if route.resolves_names:
            check_name(host)
            return _Stream(await open_tunnel(self._backend, route, host, port, timeout))
        addresses = await self._resolve_public(host, port)
        failure: httpcore.ProxyError | None = None
        for address in addresses:
            try:
                return _Stream(await open_tunnel(self._backend, route, address, port, timeout))
            except httpcore.ProxyError as error:
                failure = error
        raise failure or httpcore.ConnectError("no address")

    async def _resolve_public(self, host: str, port: int) -> Sequence[str]:
        try:
            addresses = await self._resolve(host, port)
        except (OSError, UnicodeError) as error:
            raise httpcore.ConnectError(f"the name {host} could not be resolved") from error
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
                return _Stream(
                    await self._backend.connect_tcp(address, port, share, local_address, socket_options)
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
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


class _TunnelBackend(httpcore.AsyncNetworkBackend):
    """Connects to every host through a proxy, which resolves its name."""

    def __init__(self, route: ProxyRoute) -> None:
        self._route = route
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
                return _Stream(await open_tunnel(self._backend, self._route, host, port, timeout))
        except TimeoutError as error:
            raise httpcore.ConnectTimeout(f"no connection within {timeout} s") from error

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class _Stream(httpcore.AsyncNetworkStream):
    """A connection that is also closed when its TLS handshake is cancelled.

    httpcore closes it after errors alone.
    """

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
    """The transport of httpx on the guarded backend.

    Plain http is refused with httpx.UnsupportedProtocol, except for `allowed` hosts.
    """

    def __init__(
        self,
        *,
        tls: ssl.SSLContext,
        allowed: Collection[tuple[str, int]] = (),
        resolve: Resolve = resolve,
        max_connections: int = 100,
        route: ProxyRoute | None = None,
    ) -> None:
        super().__init__(verify=tls, trust_env=False)
        self._allowed = frozenset(allowed)
        # httpx cannot pass a network backend to its pool, so its (unused) pool is replaced.
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=tls,
            max_connections=max_connections,
            max_keepalive_connections=20,
            keepalive_expiry=15,
            network_backend=GuardedBackend(allowed=allowed, resolve=resolve, route=route),
        )

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url
        is_allowed = url.scheme == "http" and (url.host.lower(), url.port or 80) in self._allowed
        if url.scheme != "https" and not is_allowed:
            raise httpx.UnsupportedProtocol(f"{url.host}: only https is fetched")
        return await super().handle_async_request(request)


class TunnelTransport(httpx.AsyncHTTPTransport):
    """The transport of httpx through a proxy, for one origin that the operator names."""

    def __init__(self, route: ProxyRoute, *, tls: ssl.SSLContext, max_connections: int) -> None:
        super().__init__(verify=tls, trust_env=False)
        self._pool = httpcore.AsyncConnectionPool(  # as in `GuardedTransport`
            ssl_context=tls,
            max_connections=max_connections,
            max_keepalive_connections=max_connections,
            keepalive_expiry=5,
            network_backend=_TunnelBackend(route),
        )


def tls_context(ca: Path | None = None) -> ssl.SSLContext:
    """Return a context that trusts the public roots, and the certificates in the PEM file `ca`."""
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
    route: ProxyRoute | None = None,
) -> httpx.AsyncClient:
    """Build a client for URLs from outside: guarded, no redirects, no cookies, no compression.

    `allow_private_hosts` are exact `host:port`; another form raises ValueError. Redirects need a
    client without them. A private address raises httpx.ConnectError, caused by PrivateAddressError.
    All other hosts are reached through the proxy of `route`, whose failures raise httpx.ProxyError.
    """
    allowed = [parse_host_and_port(entry) for entry in allow_private_hosts]
    return httpx.AsyncClient(
        transport=GuardedTransport(tls=tls or tls_context(), allowed=allowed, resolve=resolve, route=route),
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
    route: ProxyRoute | None = None,
) -> httpx.AsyncClient:
    """Build a client for FLORA's API, which sends `headers` to the origin of `base_url` alone.

    It goes through the proxy of `route`, unless `base_url` is on loopback. Raises ValueError where
    `base_url` is neither https nor http on loopback.
    """
    base = httpx.URL(base_url)
    if not base.host or not (base.scheme == "https" or (base.scheme == "http" and is_loopback(base.host))):
        raise ValueError(f"must be an https URL, or http on loopback: {base.scheme}://{base.host}")
    origin = _origin(base)

    async def check_origin(request: httpx.Request) -> None:
        if _origin(request.url) != origin:
            raise httpx.UnsupportedProtocol(
                f"not an address of the API: {request.url.host}", request=request
            )

    tls = tls or tls_context()
    transport = (
        None
        if route is None or is_loopback(base.host)
        else TunnelTransport(route, tls=tls, max_connections=max_connections)
    )
    return httpx.AsyncClient(
        base_url=base,
        transport=transport,
        headers={
            "User-Agent": USER_AGENT,
            "Accept": "application/json",
            "Accept-Encoding": "gzip, deflate",
            **(headers or {}),
        },
        verify=tls,
        timeout=httpx.Timeout(timeout_seconds, connect=connect_seconds),
        limits=httpx.Limits(max_connections=max_connections, max_keepalive_connections=max_connections),
        cookies=CookieJar(policy=DefaultCookiePolicy(allowed_domains=())),
        event_hooks={"request": [check_origin]},
        follow_redirects=False,
        trust_env=False,
    )


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host.lower(), url.port


def probe_client(
    *, ca: Path | None = None, timeout_seconds: float = 15.0, limits: httpx.Limits | None = None
) -> httpx.AsyncClient:
    """Build a client for a URL that the operator gives: any host, no redirects."""
    return httpx.AsyncClient(
        headers={"User-Agent": USER_AGENT},
        verify=tls_context(ca),
        timeout=timeout_seconds,
        limits=limits or httpx.Limits(max_connections=100, max_keepalive_connections=20),
        trust_env=False,
    )


def own_client(*, bound: str | None = None, timeout_seconds: float = 5.0) -> httpx.AsyncClient:
    """Build a client for a listener on this machine, which does not verify its certificate.

    It connects to loopback, or to the host or the Unix socket that the listener is `bound` to, and
    nowhere else.
    """
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    tls.check_hostname = False
    tls.verify_mode = ssl.CERT_NONE

    async def check_host(request: httpx.Request) -> None:
        if not is_loopback(request.url.host) and request.url.host != bound:
            raise httpx.UnsupportedProtocol(f"not on this machine: {request.url.host}", request=request)

    path = to_unix_path(bound or "")
    return httpx.AsyncClient(
        headers={"User-Agent": USER_AGENT},
        verify=tls,
        transport=None if path is None else httpx.AsyncHTTPTransport(verify=tls, uds=path),
        timeout=timeout_seconds,
        event_hooks={"request": [check_host]},
        trust_env=False,
    )


def operations_client(
    url: str, token: str, *, timeout_seconds: float, ca: Path | None = None
) -> httpx.Client:
    """Build a client for an operations listener. It sends the token to the origin of `url` alone.

    `url` may also be `unix:/path`. Raises ValueError where it is neither that nor an http or https
    URL, or where the token cannot be sent.
    """
    path = to_unix_path(url)
    if path is not None and not path.startswith("/"):
        raise ValueError("it does not name an absolute path, unix:/path")
    base = httpx.URL(url if path is None else local_origin(url, 0, tls=False))
    if base.scheme not in {"http", "https"} or not base.host:
        raise ValueError("it is not an http or https URL")
    if not token.isascii() or not token.isprintable():
        raise ValueError("the token has characters that no header can hold")
    # Loading the public roots takes longer than a whole request to loopback.
    tls = tls_context(ca) if base.scheme == "https" else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

    def check_origin(request: httpx.Request) -> None:
        if _origin(request.url) != _origin(base):
            raise httpx.UnsupportedProtocol(
                f"not the operations listener: {request.url.host}", request=request
            )

    return httpx.Client(
        base_url=base,
        headers={
            "User-Agent": USER_AGENT,
            "Accept": "application/json",
            "Authorization": f"Bearer {token}",
        },
        verify=tls,
        transport=None if path is None else httpx.HTTPTransport(verify=tls, uds=path),
        timeout=httpx.Timeout(timeout_seconds, connect=min(10.0, timeout_seconds)),
        cookies=CookieJar(policy=DefaultCookiePolicy(allowed_domains=())),
        event_hooks={"request": [check_origin]},
        follow_redirects=False,
        trust_env=False,
    )
