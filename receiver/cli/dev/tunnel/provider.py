"""The protocol of tunnel providers, and the simplest one: a URL that exists already."""

import asyncio
from dataclasses import dataclass
from typing import Protocol

from receiver.net.addresses import http_origin

__all__ = ["FixedUrl", "LocalEndpoint", "Provider"]


@dataclass(frozen=True, slots=True)
class LocalEndpoint:
    """Where the receiver listens on this machine, and whether it speaks TLS there."""

    port: int
    tls: bool = False
    host: str = "127.0.0.1"

    @property
    def url(self) -> str:
        return http_origin(self.host, self.port, tls=self.tls)


class Provider(Protocol):
    """One way to get a public URL. It can be reopened after `close`, maybe with another URL."""

    name: str
    hint: str
    """What to check when the tunnel is open but nothing answers at its URL."""

    async def open(self, local: LocalEndpoint) -> str:
        """Return the public URL that leads to `local`, without a path. Raises TunnelError."""

    async def wait_closed(self) -> str:
        """Wait until the tunnel closes by itself; return the reason."""

    async def close(self) -> None:
        """Close the tunnel, whatever state it is in. Can be called more than once."""


class FixedUrl:
    """A URL that is routed to this machine by other means."""

    name = "public-url"
    hint = "check what routes this URL to this machine"

    def __init__(self, url: str) -> None:
        self._url = url

    async def open(self, local: LocalEndpoint) -> str:
        return self._url

    async def wait_closed(self) -> str:
        never: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        return await never

    async def close(self) -> None:
        return
