"""FLORA's rule for callback URLs: HTTPS, and no private host. Pure: no name is resolved."""

import ipaddress
import re
import socket
from urllib.parse import urlsplit

__all__ = ["callback_problem"]

_REFUSED_NAMES = frozenset(
    {"localhost", "metadata", "instance-data", "metadata.google.internal", "metadata.azure.com"}
)
_REFUSED_ENDINGS = (".localhost", ".local", ".internal", ".home.arpa")
_MAX_URL = 2048
# Resolvers also read 127.1, 0x7f000001 and 2130706433 as the loopback address.
_ODD_ADDRESS = re.compile(r"(0x[0-9a-f]+|[0-9]+)(\.(0x[0-9a-f]+|[0-9]+)){0,3}")


def callback_problem(url: str, *, allow_private: bool) -> str | None:
    """Return the reason for which FLORA refuses `url`, or None where it accepts it.

    `allow_private` accepts private hosts, over http as well, since no CA certifies them.
    """
    if len(url) > _MAX_URL or not url.isascii() or any(character <= " " for character in url):
        return "must be a valid URL"
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        return "must be a valid URL"
    if parts.scheme not in ("https", "http") or not host:
        return "must be a valid HTTPS URL"
    private = _is_private(host.rstrip("."))
    if private and not allow_private:
        return "must not point to a private or internal host"
    if parts.scheme != "https" and not private:
        return "must be an HTTPS URL"
    return None


def _is_private(host: str) -> bool:
    if host in _REFUSED_NAMES or host.endswith(_REFUSED_ENDINGS):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        if not _ODD_ADDRESS.fullmatch(host):
            return "." not in host
        try:
            address = ipaddress.IPv4Address(socket.inet_aton(host))
        except OSError:
            return True
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return not address.is_global or address.is_multicast
