"""Cloudflare's quick tunnel, by `cloudflared`: no account, a new host name each time."""

import contextlib
import re

from receiver.cli.dev.tunnel.process import Program, ProgramTunnel
from receiver.cli.dev.tunnel.provider import LocalEndpoint
from receiver.errors import TunnelError

__all__ = ["Cloudflared"]

# Error lines name the API's host, which is not the tunnel's.
_URL = re.compile(r"https://(?!api\.)[a-z0-9-]+\.trycloudflare\.com")
_CONNECTED = re.compile(r"Registered tunnel connection|Connection [0-9a-f-]+ registered")
_CONNECTED_SECONDS = 10.0


class Cloudflared(ProgramTunnel):
    """Reads the URL from the output of `cloudflared tunnel --url …`."""

    name = "cloudflared"
    hint = ""

    def __init__(self, *, program: str = "cloudflared", within_seconds: float = 30.0) -> None:
        super().__init__()
        self._name = program
        self._within = within_seconds

    async def open(self, local: LocalEndpoint) -> str:
        await self.close()
        # The certificate is not issued to 127.0.0.1; this connection does not leave the machine.
        tls = ["--no-tls-verify"] if local.tls else []
        arguments = [self._name, "tunnel", "--no-autoupdate", *tls, "--url", local.url]
        self._program = await Program.start(arguments)
        try:
            found = await self._program.find(_URL, within_seconds=self._within)
            # The wording differs between versions; a URL without a connection is found by a canary.
            with contextlib.suppress(TunnelError):
                await self._program.find(_CONNECTED, within_seconds=min(_CONNECTED_SECONDS, self._within))
        except BaseException:
            await self.close()
            raise
        return found[0]
