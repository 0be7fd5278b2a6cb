"""Who called, as far as it can be known: the peer, or whom a proxy that we trust names. Used by the public listener."""

from collections.abc import Callable, Iterable
from functools import lru_cache
from ipaddress import ip_address, ip_network

FORWARDED = b"x-forwarded-for"


def tells_remote(trusted_proxies: Iterable[str]) -> Callable[[str | None, bytes | None], str | None]:
    """Return a function of the peer's address and its X-Forwarded-For that tells who called.

    Proxies append whom they heard: the last one that is no trusted proxy itself is as far back as anybody can be believed.
    """
    networks = tuple(ip_network(each, strict=False) for each in trusted_proxies)

    @lru_cache(maxsize=1024)
    def trusts(host: str) -> bool:
        try:
            address = ip_address(host)
        except ValueError:
            return False
        return any(address in network for network in networks)

    def remote(peer: str | None, forwarded: bytes | None) -> str | None:
        if forwarded is None or peer is None or not trusts(peer):
            return peer
        for heard in reversed(forwarded.decode("latin-1").split(",")):
            host = heard.strip()
            try:
                ip_address(host)
            except ValueError:
                return peer  # nothing that a proxy writes
            if not trusts(host):
                return host
        return peer

    return remote
