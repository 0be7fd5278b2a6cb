"""Access to the operations listener, decided from the headers alone. Pure.

Every request needs the token. A page in the operator's browser must not reach the listener through
loopback either: the Host must be one of its names (against DNS rebinding), a cross-site request is
refused, and changes must be JSON, which a form cannot send.
"""

import hmac
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus

from receiver.net.addresses import is_loopback, is_unspecified, parse_address
from receiver.web.ops.responses import Refusal

_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_OWN_SITE = frozenset({"same-origin", "none"})


@dataclass(slots=True)
class Access:
    """The token of the listener, and the names that a Host header may have.

    The token may be replaced at any time, for the requests that follow.
    """

    token: str = field(repr=False)
    host: str = "127.0.0.1"
    allowed_hosts: tuple[str, ...] = ()

    def refusal(self, method: str, headers: Mapping[str, str]) -> Refusal | None:
        """Return the refusal of a request, or None. Names in `headers` are lower-case."""
        return (
            self._check_host(headers.get("host", ""))
            or _check_site(headers)
            or self._check_token(headers.get("authorization", ""))
            or _check_media_type(method, headers.get("content-type", ""))
        )

    def _check_host(self, header: str) -> Refusal | None:
        name = host_name(header)
        if is_loopback(name) or name in _names((self.host, *self.allowed_hosts)):
            return None
        if is_unspecified(self.host) and _is_address(name):
            return None  # bound to every address, so each is its own; rebinding needs a name
        message = "this name is not in [operations] allowed_hosts: add it there if it is yours"
        return Refusal(HTTPStatus.FORBIDDEN, "host_not_allowed", message)

    def _check_token(self, header: str) -> Refusal | None:
        scheme, _, given = header.partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self.token.encode()):
            return None
        message = (
            "the token is missing or wrong: send RECEIVER_OPS_TOKEN in the Authorization header (scheme Bearer), "
            "or the content of var/ops-token"
        )
        return Refusal(
            HTTPStatus.UNAUTHORIZED, "unauthorized", message, headers={"WWW-Authenticate": "Bearer"}
        )


def host_name(header: str) -> str:
    """Return the name in a Host header, without port, brackets and case."""
    name = header.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.partition(":")[0].rstrip(".")


def _names(hosts: Iterable[str]) -> frozenset[str]:
    # The colons of a bare IPv6 address in the settings do not introduce a port.
    return frozenset(host.lower() if _is_address(host) else host_name(host) for host in hosts)


def _check_site(headers: Mapping[str, str]) -> Refusal | None:
    """Refuse a request of another site. Browsers name the site, other programs do not."""
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    own = {f"{scheme}://{headers.get('host', '')}".lower() for scheme in ("http", "https")}
    if (site is None or site in _OWN_SITE) and (origin is None or origin.lower() in own):
        return None
    return Refusal(HTTPStatus.FORBIDDEN, "cross_site", "requests from other sites are refused")


def _check_media_type(method: str, content_type: str) -> Refusal | None:
    if method in _SAFE or content_type.partition(";")[0].strip().lower() == "application/json":
        return None
    message = "changes are sent as Content-Type: application/json"
    return Refusal(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", message)


def _is_address(name: str) -> bool:
    return parse_address(name) is not None
