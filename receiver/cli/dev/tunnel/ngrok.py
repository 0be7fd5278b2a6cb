"""ngrok's agent inside this process (extra `ngrok`); its token comes from NGROK_AUTHTOKEN."""

import asyncio
import contextlib
import importlib
from typing import Any, Protocol

from receiver.cli.dev.tunnel.provider import LocalEndpoint
from receiver.errors import TunnelError

__all__ = ["Ngrok"]

_WITHIN_SECONDS = 30.0
_CLOSE_SECONDS = 5.0


class _Agent(Protocol):
    """The part of the module `ngrok` that is used here."""

    async def forward(self, addr: str, **options: Any) -> Any: ...


class Ngrok:
    """An HTTP endpoint of ngrok. With a reserved `domain` its URL stays the same."""

    name = "ngrok"
    hint = ""

    def __init__(self, domain: str | None = None, *, agent: _Agent | None = None) -> None:
        self._domain = domain
        self._agent = agent
        self._listener: Any = None

    async def open(self, local: LocalEndpoint) -> str:
        await self.close()
        options: dict[str, Any] = {"authtoken_from_env": True}
        if self._domain is not None:
            options["domain"] = self._domain
        if local.tls:
            options["verify_upstream_tls"] = False  # the certificate is not issued to 127.0.0.1
        agent = self._agent or _import_agent()
        try:
            async with asyncio.timeout(_WITHIN_SECONDS):
                self._listener = await agent.forward(local.url, **options)
        except TimeoutError:
            message = f"ngrok did not open a tunnel within {_WITHIN_SECONDS:g} s"
            raise TunnelError(message) from None
        except Exception as error:  # the library raises ValueError for whatever its service refuses
            words = " ".join(str(part) for part in error.args) or type(error).__name__
            raise TunnelError(f"ngrok: {words}. Is NGROK_AUTHTOKEN set?") from error
        return str(self._listener.url())

    async def wait_closed(self) -> str:
        """Never return: the agent reconnects by itself, and canaries find a closed tunnel."""
        never: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        return await never

    async def close(self) -> None:
        if self._listener is not None:
            listener, self._listener = self._listener, None
            with contextlib.suppress(Exception):
                await asyncio.wait_for(listener.close(), _CLOSE_SECONDS)


def _import_agent() -> _Agent:
    try:
        return importlib.import_module("ngrok")
    except ImportError:
        raise TunnelError('ngrok is not installed: pip install "flora-receiver[ngrok]"') from None
