"""What a provider of tunnels is: one small module each, all of them behind this protocol."""

import asyncio
from dataclasses import dataclass
from typing import Protocol

from receiver.net.addresses import http_origin

__all__ = ["Given", "Local", "Provider"]


@dataclass(frozen=True, slots=True)
class Local:
    """Where the receiver listens on this machine, and whether it speaks TLS there."""

    port: int
    tls: bool = False
    host: str = "127.0.0.1"

    @property
    def url(self) -> str:
        return http_origin(self.host, self.port, tls=self.tls)


class Provider(Protocol):
    """One way to a public URL. It may be opened again after it was closed; its URL may be another one then."""

    name: str
    hint: str
    """What to look at when it is open and nobody answers there."""

    async def open(self, local: Local) -> str:
        """Return the public URL that leads to `local`, without a path. Raises TunnelError."""

    async def ended(self) -> str:
        """Return as soon as the tunnel has ended by itself, and say how."""

    async def close(self) -> None:
        """End it, whatever state it is in; may be called twice."""


class Given:
    """A URL that exists already: somebody else leads it here. It cannot be opened again."""

    name = "public-url"
    hint = "what is it that leads it here?"

    def __init__(self, url: str) -> None:
        self._url = url

    async def open(self, local: Local) -> str:
        return self._url

    async def ended(self) -> str:
        return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]

    async def close(self) -> None:
        return
