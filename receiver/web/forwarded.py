"""The caller's address: the peer, or the one that a trusted proxy names. Used by `public.py`."""

from collections.abc import Callable, Iterable
from functools import lru_cache

from receiver.net.addresses import parse_network, parse_peer
from receiver.web.connections import UNIX_PEER

FORWARDED = b"x-forwarded-for"


def make_remote_finder(trusted_proxies: Iterable[str]) -> Callable[[str | None, bytes | None], str | None]:
    """Return a function from the peer's address and its X-Forwarded-For to the caller's address.

    Each proxy appends the address that it was called from. The last one that is not a trusted proxy
    is the caller, or else the first one: what stands before it was not written by a trusted proxy. A
    proxy that speaks on a Unix socket is on this machine, and trusted.
    """
    networks = tuple(parse_network(each) for each in trusted_proxies)

    @lru_cache(maxsize=1024)
    def read(text: str) -> tuple[str, bool] | None:
        """Return an address in its one form, and whether it is a trusted proxy's."""
        address = parse_peer(text)
        if address is None:
            return None
        return str(address), any(address in network for network in networks)

    def find_remote(peer: str | None, forwarded: bytes | None) -> str | None:
        if peer is None:
            return None
        remote, is_trusted = (peer, True) if peer == UNIX_PEER[0] else read(peer) or (peer, False)
        if forwarded is None or not is_trusted:
            return remote
        for entry in reversed(forwarded.decode("latin-1").split(",")):
            found = read(entry.strip())
            if found is None:
                break  # not written by a proxy
            remote, is_trusted = found
            if not is_trusted:
                break
        return remote

    return find_remote
