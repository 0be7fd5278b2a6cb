"""A tunnel by any program that prints its URL: `--command "bore local {port} --to bore.pub"`."""

import contextlib
import re
import shlex
from urllib.parse import urlsplit

from receiver.cli.dev.tunnel.process import Program, ProgramTunnel
from receiver.cli.dev.tunnel.provider import LocalEndpoint
from receiver.errors import TunnelError

__all__ = ["ANY_URL", "Command"]

ANY_URL = r"https://(?:\[[0-9A-Fa-f:.]+\]|[\w.-]+)(?::\d+)?"
_HOST = re.compile(r"[\w.:-]+")
_WITHIN_SECONDS = 30.0


class Command(ProgramTunnel):
    """Runs `command` without a shell and finds its URL with `pattern`.

    `{port}`, `{host}` and `{url}` in the command are replaced. The URL is the first group of the
    pattern, or the whole match; a bare host name gets `https://`.
    """

    name = "command"
    hint = "check that --pattern finds the right URL"

    def __init__(
        self,
        command: str,
        pattern: str = ANY_URL,
        *,
        public_url: str | None = None,
        within_seconds: float = _WITHIN_SECONDS,
    ) -> None:
        """With `public_url`, a match only means that the tunnel is open. Raises ValueError."""
        super().__init__()
        self._arguments = shlex.split(command)
        if not self._arguments:
            raise ValueError("the command is empty")
        try:
            self._pattern = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"the pattern is not a valid regular expression: {error}") from error
        self._public_url = public_url
        self._within = within_seconds

    async def open(self, local: LocalEndpoint) -> str:
        await self.close()
        values = {"{port}": str(local.port), "{host}": local.host, "{url}": local.url}
        self._program = await Program.start([_replace(each, values) for each in self._arguments])
        try:
            found = await self._program.find(self._pattern, within_seconds=self._within)
            return self._public_url or _to_origin(found)
        except BaseException:
            await self.close()
            raise


def _replace(argument: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        argument = argument.replace(name, value)
    return argument


def _to_origin(found: re.Match[str]) -> str:
    text = (found[1] if found.re.groups and found[1] else found[0]).rstrip(".,;:!?)}>\"'`")
    text = text if "[" in text else text.rstrip("].,")
    url = text if "://" in text else f"https://{text}"
    with contextlib.suppress(ValueError):
        parts = urlsplit(url)
        is_http = parts.scheme in {"https", "http"} and _HOST.fullmatch(parts.hostname or "")
        if is_http and parts.port != 0 and len(url.split()) == 1:
            return f"{parts.scheme}://{parts.netloc}"
    raise TunnelError(f"the pattern matched {text[:80]!r}, which is not a URL; correct --pattern")
