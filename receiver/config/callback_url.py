"""FLORA's rules for the URLs that it calls, from its documentation of `callback_url`. Pure.

FLORA requires HTTPS. It refuses localhost, `*.local`, `*.internal`, the names of cloud metadata
services, and private, loopback and link-local IP addresses.
"""

from urllib.parse import SplitResult, urlsplit

from receiver.net.addresses import parse_address

__all__ = ["CALLBACK_PATH", "check_callback_url", "remove_callback_path", "split_http_url"]

CALLBACK_PATH = "/callbacks/flora"
"""The path that is added to `public_url`, and served by the public listener."""

_REFUSED_NAMES = frozenset({"localhost", "metadata", "metadata.goog", "instance-data"})
_REFUSED_SUFFIXES = (".localhost", ".local", ".internal")


def check_callback_url(url: str) -> str | None:
    """Return why FLORA would refuse to call `url`, or None if it would call it."""
    parts = split_http_url(url)
    host = (parts.hostname or "").rstrip(".")
    if parts.scheme != "https":
        return "must start with https://, because FLORA calls HTTPS URLs only"
    if host in _REFUSED_NAMES or host.endswith(_REFUSED_SUFFIXES):
        return "must have a public host name, because FLORA refuses local and internal names"
    address = parse_address(host)
    if address is not None and (not address.is_global or address.is_multicast):
        return "must have a public host, because FLORA refuses private addresses"
    return None


def remove_callback_path(url: str) -> str:
    """Return a public URL without the callback path, and without a final slash."""
    return url.rstrip("/").removesuffix(CALLBACK_PATH).rstrip("/")


def split_http_url(url: str) -> SplitResult:
    """Split an absolute http(s) URL that has no user name, query or fragment.

    Raises ValueError; its message never contains the URL.
    """
    if any(character.isspace() for character in url):
        raise ValueError("must not contain white space")
    try:
        parts = urlsplit(url)
        is_port_valid = parts.port != 0
    except ValueError:
        raise ValueError("is not a URL") from None
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError("must be an absolute URL that starts with https:// or http://")
    if not is_port_valid:
        raise ValueError("is not a URL")
    if parts.username is not None or parts.password is not None:
        raise ValueError("must not contain a user name or a password")
    if parts.query or parts.fragment:
        raise ValueError("must not contain a query or a fragment")
    return parts
