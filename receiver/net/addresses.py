"""Hosts and addresses as they appear in URLs and settings. Pure; imports the standard library only.

Settings and HTTP clients use the same functions, so that they agree on what is loopback.
"""

from ipaddress import IPv4Address, IPv6Address, ip_address

__all__ = ["http_origin", "is_loopback", "is_unspecified", "local_host", "parse_address"]


def parse_address(host: str) -> IPv4Address | IPv6Address | None:
    """Return the IP address that `host` is, or None for a name; IPv4-mapped IPv6 becomes IPv4."""
    try:
        address = ip_address(host.strip("[]"))
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def is_loopback(host: str) -> bool:
    """Return whether `host`, a name or an IP literal, can only be this machine."""
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


def http_origin(host: str, port: int, *, tls: bool) -> str:
    """Return `scheme://host:port`, with brackets around an IPv6 address."""
    return f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"
