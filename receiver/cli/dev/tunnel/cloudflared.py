"""Cloudflare's quick tunnel, by the program `cloudflared` on the PATH: no account, a new host name each time."""

import contextlib
import re

from receiver.cli.dev.tunnel.process import Program
from receiver.cli.dev.tunnel.provider import Local
from receiver.errors import TunnelError

__all__ = ["Cloudflared"]

# Error lines name the API's host: that is not ours.
_URL = re.compile(r"https://(?!api\.)[a-z0-9-]+\.trycloudflare\.com")
_CONNECTED = re.compile(r"Registered tunnel connection|Connection [0-9a-f-]+ registered")
_CONNECTED_SECONDS = 10.0


class Cloudflared:
    """Reads the URL from what `cloudflared tunnel --url …` prints."""

    name = "cloudflared"
    hint = ""

    def __init__(self, *, program: str = "cloudflared", within_seconds: float = 30.0) -> None:
        self._name = program
        self._within = within_seconds
        self._program: Program | None = None

    async def open(self, local: Local) -> str:
        await self.close()
        # Our certificate is for whom it names, not for 127.0.0.1; this last stretch does not leave the machine.
        trusting = ["--no-tls-verify"] if local.tls else []
        self._program = await Program.start([self._name, "tunnel", "--no-autoupdate", *trusting, "--url", local.url])
        try:
            found = await self._program.find(_URL, within_seconds=self._within)
            with contextlib.suppress(TunnelError):  # its words change; a URL without a connection is found by probing
                await self._program.find(_CONNECTED, within_seconds=min(_CONNECTED_SECONDS, self._within))
        except BaseException:
            await self.close()
            raise
        return found[0]

    async def ended(self) -> str:
        assert self._program is not None, "it is open"
        return await self._program.ended()

    async def close(self) -> None:
        if self._program is not None:
            program, self._program = self._program, None
            await program.stop()
