"""HTTP proxies for outgoing connections: how one is named, and what may be shown of it. Pure.

Used by the settings, and by `tunnel.py`, which connects through them.
"""

import base64
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

__all__ = ["Proxy", "parse_proxy"]


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy. Its `repr` and `address` show no password."""

    host: str
    port: int
    is_tls: bool
    """Whether the connection to the proxy itself is encrypted."""
    authorization: str | None = field(default=None, repr=False)
    """The value of `Proxy-Authorization`."""

    @property
    def address(self) -> str:
        """`host:port`, for messages."""
        return f"{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


def parse_proxy(text: str) -> Proxy:
    """Parse the URL of a proxy, `http://user:password@host:port`; `host:port` is http.

    Raises ValueError with the reason, which does not contain the URL.
    """
    if not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError("must be printable ASCII without spaces; write others as %XX")
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ValueError("is not a URL such as http://proxy.example.com:3128") from None
    if parts.scheme.startswith("socks"):
        raise ValueError("must be an HTTP proxy; SOCKS is not supported")
    if parts.scheme not in {"http", "https"} or not host or parts.path not in {"", "/"} or parts.query:
        raise ValueError("must be like http://proxy.example.com:3128")
    if parts.netloc.count("@") > 1:  # what shows a URL without its password would show half of it
        raise ValueError("must write the @ of a user name or password as %40")
    if not port:
        raise ValueError("must name the port, as in http://proxy.example.com:3128")
    return Proxy(host, port, parts.scheme == "https", _to_authorization(parts.username, parts.password))


def _to_authorization(username: str | None, password: str | None) -> str | None:
    if username is None:
        return None
    pair = f"{unquote(username)}:{unquote(password or '')}"
    return f"Basic {base64.b64encode(pair.encode()).decode('ascii')}"
