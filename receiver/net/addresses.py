"""Hosts and addresses as they appear in URLs, settings, headers and sockets.

Pure; imports the standard library only. Settings, listeners and HTTP clients use the same
functions, so that they agree on what is loopback and which two texts are one address.

An IPv4 address that is written as IPv6 (`::ffff:192.0.2.1`) is the IPv4 address: a socket that
listens on `::` names its IPv4 peers like that. A listener may also be `unix:/path`, a Unix socket.
"""

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

__all__ = [
    "http_origin",
    "is_loopback",
    "is_unspecified",
    "join_address",
    "local_host",
    "local_origin",
    "parse_address",
    "parse_host_and_port",
    "parse_network",
    "parse_peer",
    "to_unix_path",
]

_UNIX = "unix:"
_MAPPED = IPv6Network("::ffff:0:0/96")


def parse_address(host: str) -> IPv4Address | IPv6Address | None:
    """Return the IP address that `host` is, or None for a name; IPv4-mapped IPv6 becomes IPv4."""
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    try:
        address = ip_address(host)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def parse_peer(text: str) -> IPv4Address | IPv6Address | None:
    """Return the address of a caller as proxies write it: with or without a port."""
    host, colon, port = text.rpartition(":")
    if colon and port.isdecimal() and (host.endswith("]") or ":" not in host):
        return parse_address(host)
    return parse_address(text)


def parse_network(text: str) -> IPv4Network | IPv6Network:
    """Return the network that `text` is, or that of one address. Raises ValueError."""
    address = parse_address(text)
    network = ip_network(text if address is None else address, strict=False)
    if isinstance(network, IPv6Network) and network.subnet_of(_MAPPED):
        mapped = network.network_address.ipv4_mapped
        return IPv4Network((str(mapped), network.prefixlen - _MAPPED.prefixlen))
    return network


def to_unix_path(host: str) -> str | None:
    """Return the path that `unix:/path` or `unix:///path` names, or None for any other host."""
    if not host.startswith(_UNIX):
        return None
    path = host.removeprefix(_UNIX)
    return f"/{path.lstrip('/')}" if path.startswith("/") else path


def is_loopback(host: str) -> bool:
    """Return whether `host`, a name, an IP literal or a Unix socket, can only be this machine."""
    if to_unix_path(host) is not None:
        return True
    address = parse_address(host)
    return host.lower().rstrip(".") == "localhost" if address is None else address.is_loopback


def is_unspecified(host: str) -> bool:
    """Return whether a listener bound to `host` accepts connections on every address."""
    address = parse_address(host)
    return address is not None and address.is_unspecified


def local_host(bound: str) -> str:
    """Return the host at which this machine reaches a listener that is bound to `bound`."""
    if not is_unspecified(bound):
        return bound
    return "::1" if ":" in bound else "127.0.0.1"


def join_address(host: str, port: int) -> str:
    """Return `host:port`, with brackets around an IPv6 address; a Unix socket has no port."""
    if to_unix_path(host) is not None:
        return host
    return f"{f'[{host}]' if ':' in host else host}:{port}"


def http_origin(host: str, port: int, *, tls: bool) -> str:
    """Return `scheme://host:port`, with brackets around an IPv6 address."""
    return f"{'https' if tls else 'http'}://{join_address(host, port)}"


def local_origin(bound: str, port: int, *, tls: bool) -> str:
    """Return the origin of requests from this machine to a listener that is bound to `bound`.

    A Unix socket has none: its origin is a name that every listener accepts, without TLS.
    """
    if to_unix_path(bound) is not None:
        return "http://localhost"
    return http_origin(local_host(bound), port, tls=tls)


def parse_host_and_port(text: str) -> tuple[str, int]:
    """Parse `host:port` (IPv6 in brackets) of a setting. Raises ValueError with the reason."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"{text!r} is not host:port")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif not set(host).isdisjoint(":/[]@?#"):
        raise ValueError(f"{text!r} is not host:port")
    return host.lower(), int(port)
