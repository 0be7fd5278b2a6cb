"""What an address as written in a URL is. Pure, and of the standard library alone: settings and HTTP clients must agree."""

from ipaddress import IPv4Address, IPv6Address, ip_address

__all__ = ["is_loopback", "literal"]


def literal(host: str) -> IPv4Address | IPv6Address | None:
    """Return the address that `host` is, an IPv4 one in IPv6 clothes unwrapped; None: it is a name."""
    try:
        address = ip_address(host.strip("[]"))
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def is_loopback(host: str) -> bool:
    """Tell whether `host`, a name or an IP literal, is this machine and nothing else."""
    address = literal(host)
    return host.lower().rstrip(".") == "localhost" if address is None else address.is_loopback
