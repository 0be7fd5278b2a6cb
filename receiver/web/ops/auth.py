"""Who may use the operations listener, decided on headers alone. Pure.

A token is always asked for. Besides, a page in the operator's browser must not reach us through loopback: the Host must
be a name of ours (against DNS rebinding), a cross-site request is refused, and changes have to be JSON (a form is not).
"""

import hmac
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address

from receiver.net.addresses import is_unspecified
from receiver.web.ops.responses import Refusal

_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_OWN_SITE = frozenset({"same-origin", "none"})


@dataclass(frozen=True, slots=True)
class Access:
    """The listener's token, and the names by which it may be called."""

    token: str = field(repr=False)
    host: str = "127.0.0.1"
    allowed_hosts: tuple[str, ...] = ()

    def refusal(self, method: str, headers: Mapping[str, str]) -> Refusal | None:
        """Return why a request is refused, None if it is not. `headers` has lower-case names, or is case-insensitive."""
        return (
            self._wrong_host(headers.get("host", ""))
            or _cross_site(headers)
            or self._wrong_token(headers.get("authorization", ""))
            or _not_json(method, headers.get("content-type", ""))
        )

    def _wrong_host(self, header: str) -> Refusal | None:
        name = host_name(header)
        if _is_loopback(name) or name in _names((self.host, *self.allowed_hosts)):
            return None
        if is_unspecified(self.host) and _is_address(name):
            return None  # bound to every address: it may be called by each; rebinding needs a name
        return Refusal(
            403, "host_not_allowed", "this name is not in [operations] allowed_hosts: add it there if it is ours"
        )

    def _wrong_token(self, header: str) -> Refusal | None:
        scheme, _, given = header.partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self.token.encode()):
            return None
        message = "the token is missing or wrong: send Authorization: Bearer with RECEIVER_OPS_TOKEN, or var/ops-token"
        return Refusal(401, "unauthorized", message, headers={"WWW-Authenticate": "Bearer"})


def host_name(header: str) -> str:
    """Return the name in a Host header, without port, brackets and case."""
    name = header.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.partition(":")[0].rstrip(".")


def _names(hosts: Iterable[str]) -> frozenset[str]:
    # A bare IPv6 address in the settings has colons that are no port.
    return frozenset(host.lower() if _is_address(host) else host_name(host) for host in hosts)


def _cross_site(headers: Mapping[str, str]) -> Refusal | None:
    """A browser says where a request comes from; other programs say nothing."""
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    own = {f"{scheme}://{headers.get('host', '')}".lower() for scheme in ("http", "https")}
    if (site is None or site in _OWN_SITE) and (origin is None or origin.lower() in own):
        return None
    return Refusal(403, "cross_site", "requests from other sites are refused")


def _not_json(method: str, content_type: str) -> Refusal | None:
    if method in _SAFE or content_type.partition(";")[0].strip().lower() == "application/json":
        return None
    return Refusal(415, "unsupported_media_type", "changes are sent as Content-Type: application/json")


def _is_loopback(name: str) -> bool:
    return name == "localhost" or (_is_address(name) and ip_address(name).is_loopback)


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
