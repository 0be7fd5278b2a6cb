"""The caller's address: the peer, or the one that a trusted proxy names. Used by `public.py`."""

from collections.abc import Callable, Iterable
from functools import lru_cache
from ipaddress import ip_address, ip_network

FORWARDED = b"x-forwarded-for"


def make_remote_finder(trusted_proxies: Iterable[str]) -> Callable[[str | None, bytes | None], str | None]:
    """Return a function from the peer's address and its X-Forwarded-For to the caller's address.

    Each proxy appends the address that it was called from. The last one that is not a trusted proxy
    is the caller: what stands before it was not written by a trusted proxy.
    """
    networks = tuple(ip_network(each, strict=False) for each in trusted_proxies)

    @lru_cache(maxsize=1024)
    def is_trusted(host: str) -> bool:
        try:
            address = ip_address(host)
        except ValueError:
            return False
        return any(address in network for network in networks)

    def find_remote(peer: str | None, forwarded: bytes | None) -> str | None:
        if forwarded is None or peer is None or not is_trusted(peer):
            return peer
        for entry in reversed(forwarded.decode("latin-1").split(",")):
            host = entry.strip()
            try:
                ip_address(host)
            except ValueError:
                return peer  # not written by a proxy
            if not is_trusted(host):
                return host
        return peer

    return find_remote
