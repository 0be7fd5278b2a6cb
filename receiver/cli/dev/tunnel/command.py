"""Any program that prints the URL it leads here from: `--command "bore local {port} --to bore.pub" --pattern …`."""

import contextlib
import re
import shlex
from urllib.parse import urlsplit

from receiver.cli.dev.tunnel.process import Program
from receiver.cli.dev.tunnel.provider import Local
from receiver.errors import TunnelError

__all__ = ["ANY_URL", "Command"]

ANY_URL = r"https://(?:\[[0-9A-Fa-f:.]+\]|[\w.-]+)(?::\d+)?"
_HOST = re.compile(r"[\w.:-]+")
_WITHIN_SECONDS = 30.0


class Command:
    """Runs `command` without a shell, `{port}`, `{host}` and `{url}` filled in; the URL is what `pattern` finds.

    The pattern's first group, or else all of it, is the URL; `https://` is put before a bare host name.
    """

    name = "command"
    hint = "is it the right URL? See --pattern"

    def __init__(
        self,
        command: str,
        pattern: str = ANY_URL,
        *,
        public_url: str | None = None,
        within_seconds: float = _WITHIN_SECONDS,
    ) -> None:
        """With `public_url` what is found only says that the tunnel is up. ValueError where something cannot be read."""
        self._arguments = shlex.split(command)
        if not self._arguments:
            raise ValueError("it is empty")
        try:
            self._pattern = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"the pattern is no regular expression: {error}") from error
        self._public_url = public_url
        self._within = within_seconds
        self._program: Program | None = None

    async def open(self, local: Local) -> str:
        await self.close()
        given = {"{port}": str(local.port), "{host}": local.host, "{url}": local.url}
        arguments = [_filled(argument, given) for argument in self._arguments]
        self._program = await Program.start(arguments)
        try:
            found = await self._program.find(self._pattern, within_seconds=self._within)
            return self._public_url or _url(found)
        except BaseException:
            await self.close()
            raise

    async def ended(self) -> str:
        assert self._program is not None, "it is open"
        return await self._program.ended()

    async def close(self) -> None:
        if self._program is not None:
            program, self._program = self._program, None
            await program.stop()


def _filled(argument: str, given: dict[str, str]) -> str:
    for name, value in given.items():
        argument = argument.replace(name, value)
    return argument


def _url(found: re.Match[str]) -> str:
    text = (found[1] if found.re.groups and found[1] else found[0]).rstrip(".,;:!?)}>\"'`")
    text = text if "[" in text else text.rstrip("].,")
    url = text if "://" in text else f"https://{text}"
    with contextlib.suppress(ValueError):
        parts = urlsplit(url)
        host = parts.hostname or ""
        if parts.scheme in {"https", "http"} and _HOST.fullmatch(host) and parts.port != 0 and not url.split()[1:]:
            return f"{parts.scheme}://{parts.netloc}"
    raise TunnelError(f"the pattern found {text[:80]!r}, which is no URL: see --pattern")
