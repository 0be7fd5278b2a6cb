"""Connections through an HTTP proxy: `CONNECT host:port`, then TLS with the host itself.

The proxy sees where a connection leads and how much is sent, and nothing of what. Called by
`clients.py`.
"""

import re
import ssl
from dataclasses import dataclass

import httpcore

from receiver.net.proxies import Proxy, parse_proxy

__all__ = ["ProxyRefusedError", "ProxyRoute", "open_tunnel", "route_through"]

_MAX_HEAD = 16 * 1024
_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})(?: ([ -~]{0,80})[ -~]*)?\r\n")
_HINTS = {407: "it asks for a user name and password, which belong into the proxy's URL"}


class ProxyRefusedError(httpcore.ProxyError):
    """The proxy answered, and did not connect. httpx raises it as a `__cause__`."""

    def __init__(self, message: str, status: int) -> None:
        self.status = status
        super().__init__(message)


@dataclass(frozen=True, slots=True)
class ProxyRoute:
    """A proxy, and how it is used.

    With `resolves_names` the proxy is given names; else addresses, which were checked here.
    """

    proxy: Proxy
    tls: ssl.SSLContext
    """For the connection to the proxy itself."""
    resolves_names: bool = False


def route_through(
    url: str | None, tls: ssl.SSLContext, *, resolves_names: bool = False
) -> ProxyRoute | None:
    """Return the route through the proxy of a setting, or None without one. Raises ValueError."""
    return None if url is None else ProxyRoute(parse_proxy(url), tls, resolves_names)


async def open_tunnel(
    backend: httpcore.AsyncNetworkBackend,
    route: ProxyRoute,
    host: str,
    port: int,
    timeout: float | None,
) -> httpcore.AsyncNetworkStream:
    """Return a connection to `host` (a name or an address) through the proxy.

    Raises httpcore.ProxyError, whose message names the proxy.
    """
    proxy = route.proxy
    try:
        stream = await backend.connect_tcp(proxy.host, proxy.port, timeout)
    except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
        raise httpcore.ProxyError(f"the proxy {proxy.address} cannot be reached: {error}") from error
    try:
        if proxy.is_tls:
            stream = await stream.start_tls(route.tls, proxy.host, timeout)
        await stream.write(_request(proxy, host, port), timeout)
        _check_response(proxy, await _read_head(stream, timeout))
    except BaseException as error:
        await stream.aclose()
        if isinstance(error, httpcore.NetworkError | httpcore.TimeoutException):
            reason = str(error) or type(error).__name__
            raise httpcore.ProxyError(f"the proxy {proxy.address} does not answer: {reason}") from error
        raise
    return stream


def _request(proxy: Proxy, host: str, port: int) -> bytes:
    authority = f"{f'[{host}]' if ':' in host else host}:{port}"
    lines = [f"CONNECT {authority} HTTP/1.1", f"Host: {authority}", "User-Agent: flora-receiver"]
    if proxy.authorization is not None:
        lines.append(f"Proxy-Authorization: {proxy.authorization}")
    return "\r\n".join([*lines, "", ""]).encode("ascii")


async def _read_head(stream: httpcore.AsyncNetworkStream, timeout: float | None) -> bytes:
    """Return the response up to the end of its head: the tunnel begins there."""
    head = b""
    while b"\r\n\r\n" not in head and len(head) < _MAX_HEAD:
        part = await stream.read(4096, timeout)
        if not part:
            break
        head += part
    return head


def _check_response(proxy: Proxy, head: bytes) -> None:
    found = _STATUS.match(head)
    if found is None or b"\r\n\r\n" not in head:
        raise httpcore.ProxyError(f"the proxy {proxy.address} does not answer as an HTTP proxy does")
    status, reason = int(found[1]), (found[2] or b"").decode("ascii").strip()
    if not 200 <= status < 300:
        detail = _HINTS.get(status) or reason
        message = f"the proxy {proxy.address} refused with {status}"
        raise ProxyRefusedError(f"{message}: {detail}" if detail else message, status)
    if not head.endswith(b"\r\n\r\n"):  # bytes that belong to no request of ours
        raise httpcore.ProxyError(f"the proxy {proxy.address} sent more than the answer to CONNECT")
