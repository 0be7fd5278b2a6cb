"""ngrok's agent inside this process (extra `ngrok`); it takes its token from NGROK_AUTHTOKEN."""

import asyncio
import contextlib
import importlib
from typing import Any, Protocol

from receiver.cli.dev.tunnel.provider import Local
from receiver.errors import TunnelError

__all__ = ["Ngrok"]

_WITHIN_SECONDS = 30.0
_CLOSE_SECONDS = 5.0


class _Agent(Protocol):
    """What we use of the module `ngrok`."""

    async def forward(self, addr: str, **options: Any) -> Any: ...


class Ngrok:
    """One HTTP endpoint; with a reserved `domain` its URL stays the same."""

    name = "ngrok"
    hint = ""

    def __init__(self, domain: str | None = None, *, agent: _Agent | None = None) -> None:
        self._domain = domain
        self._agent = agent
        self._listener: Any = None

    async def open(self, local: Local) -> str:
        await self.close()
        options: dict[str, Any] = {"authtoken_from_env": True}
        if self._domain is not None:
            options["domain"] = self._domain
        if local.tls:
            options["verify_upstream_tls"] = False  # our certificate is not for 127.0.0.1
        agent = self._agent or _installed()
        try:
            async with asyncio.timeout(_WITHIN_SECONDS):
                self._listener = await agent.forward(local.url, **options)
        except TimeoutError:
            raise TunnelError(f"ngrok did not open a tunnel within {_WITHIN_SECONDS:g} s") from None
        except Exception as error:  # the library raises ValueError for all that its service refuses
            words = " ".join(str(part) for part in error.args) or type(error).__name__
            raise TunnelError(f"ngrok: {words}. Is NGROK_AUTHTOKEN set?") from error
        return str(self._listener.url())

    async def ended(self) -> str:
        """The agent connects again by itself, and does not tell: the canary does."""
        return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]

    async def close(self) -> None:
        if self._listener is not None:
            listener, self._listener = self._listener, None
            with contextlib.suppress(Exception):
                await asyncio.wait_for(listener.close(), _CLOSE_SECONDS)


def _installed() -> _Agent:
    try:
        return importlib.import_module("ngrok")
    except ImportError:
        raise TunnelError('ngrok is not installed: pip install "flora-receiver[ngrok]"') from None
