"""FLORA's rules on the URLs it calls. Pure.

FLORA wants HTTPS and refuses localhost, `*.local`, `*.internal`, cloud metadata names and private, loopback or
link-local IP literals (its documentation of `callback_url`).
"""

from urllib.parse import SplitResult, urlsplit

from receiver.net.addresses import parse_address

__all__ = ["check_callback_url", "split_http_url"]

_REFUSED_NAMES = frozenset({"localhost", "metadata", "metadata.goog", "instance-data"})
_REFUSED_SUFFIXES = (".localhost", ".local", ".internal")


def check_callback_url(url: str) -> str | None:
    """Say why FLORA would refuse to call `url`, or None where it would not."""
    parts = split_http_url(url)
    host = (parts.hostname or "").rstrip(".")
    if parts.scheme != "https":
        return "FLORA only calls HTTPS URLs: this must start with https://"
    if host in _REFUSED_NAMES or host.endswith(_REFUSED_SUFFIXES):
        return "FLORA refuses local and internal names: this must be a host name that the internet can reach"
    address = parse_address(host)
    if address is not None and (not address.is_global or address.is_multicast):
        return "FLORA refuses private addresses: this must be a host name or an address that the internet can reach"
    return None


def split_http_url(url: str) -> SplitResult:
    """Split an absolute http(s) URL without user, query or fragment; ValueError says what is wrong, never the URL."""
    if url != url.strip() or any(character.isspace() for character in url):
        raise ValueError("contains white space")
    try:
        parts = urlsplit(url)
        port_is_fine = parts.port != 0
    except ValueError:
        raise ValueError("is not a URL") from None
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError("must be an absolute URL that starts with https:// or http://")
    if not port_is_fine:
        raise ValueError("is not a URL")
    if parts.username is not None or parts.password is not None:
        raise ValueError("must not contain a user name or a password")
    if parts.query or parts.fragment:
        raise ValueError("must not contain a query or a fragment")
    return parts
