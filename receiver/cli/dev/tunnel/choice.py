"""Which provider is meant: the one that was named, else the first that needs nothing more here."""

import importlib.util
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from receiver.cli.dev.tunnel.cloudflared import Cloudflared
from receiver.cli.dev.tunnel.command import ANY_URL, Command
from receiver.cli.dev.tunnel.ngrok import Ngrok
from receiver.cli.dev.tunnel.provider import Given, Provider
from receiver.cli.dev.tunnel.ssh import Ssh, account
from receiver.errors import ConfigError, Problem

__all__ = ["Kind", "TunnelOptions", "chosen"]

Kind = Literal["cloudflared", "ngrok", "ssh", "command"]

_WAYS = """there is no way to a public URL yet. The easiest ones:
    install cloudflared: then this command needs no option and no account
    --ssh you@host: by a machine of yours that is reachable from outside
    --no-tunnel: no callbacks; runs are polled, and each is played to the receiver as a callback"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TunnelOptions:
    """What the command line says about the tunnel."""

    tunnel: Kind | None = None
    public_url: str | None = None
    ssh: str | None = None
    remote_port: int = 8443
    known_hosts: Path | None = None
    identity: Path | None = None
    command: str | None = None
    pattern: str | None = None
    domain: str | None = None

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The providers that the options name, be it by options of their own; more than one is a contradiction."""
        own: dict[Kind, str | None] = {"ssh": self.ssh, "command": self.command, "ngrok": self.domain}
        named = tuple(kind for kind, value in own.items() if value is not None)
        return named if self.tunnel is None or self.tunnel in named else (self.tunnel, *named)

    @property
    def kind(self) -> Kind | None:
        """The provider that is meant, if one is."""
        return next(iter(self.kinds), None)


def chosen(wanted: TunnelOptions, *, tls: bool, environ: Mapping[str, str] | None = None) -> Provider:
    """Return the provider; `tls`: the receiver itself speaks TLS. Raises ConfigError that says what is missing."""
    if len(wanted.kinds) > 1:
        raise ConfigError([Problem("--tunnel", f"{' and '.join(wanted.kinds)} are several ways: choose one of them")])
    match wanted.kind:
        case "ssh":
            return _ssh(wanted, tls=tls)
        case "command":
            return _command(wanted)
        case "cloudflared" | "ngrok" if wanted.public_url is not None:
            raise ConfigError(
                [Problem("--public-url", f"{wanted.kind} brings a URL of its own: leave one of them out")]
            )
        case "cloudflared":
            return Cloudflared()
        case "ngrok":
            return Ngrok(wanted.domain)
        case None if wanted.public_url is not None:
            return Given(wanted.public_url)
        case None:
            return _available(os.environ if environ is None else environ)


def _available(environ: Mapping[str, str]) -> Provider:
    if shutil.which("cloudflared", path=environ.get("PATH")):
        return Cloudflared()
    if environ.get("NGROK_AUTHTOKEN") and importlib.util.find_spec("ngrok"):
        return Ngrok()
    raise ConfigError([Problem("--tunnel", _WAYS)])


def _ssh(wanted: TunnelOptions, *, tls: bool) -> Provider:
    if wanted.ssh is None:
        raise ConfigError([Problem("--ssh", "is required for this tunnel: user@host or user@host:port")])
    if not tls and wanted.public_url is None:
        raise ConfigError([Problem("--ssh", _NO_TLS.format(port=wanted.remote_port))])
    try:
        where = account(wanted.ssh)
    except ValueError as error:
        raise ConfigError([Problem("--ssh", str(error))]) from error
    return Ssh(
        where,
        remote_port=wanted.remote_port,
        public_url=wanted.public_url,
        known_hosts=wanted.known_hosts,
        identity=wanted.identity,
    )


_NO_TLS = (
    "FLORA calls HTTPS only, and ssh carries bytes as they are: either give this receiver a certificate for that host "
    "([tls] cert and key), or let a proxy there do TLS, lead it to its own localhost:{port}, and name it with --public-url"
)


def _command(wanted: TunnelOptions) -> Provider:
    if wanted.command is None:
        raise ConfigError([Problem("--command", "is required for this tunnel: the program, with {port} where it goes")])
    try:
        return Command(wanted.command, wanted.pattern or ANY_URL, public_url=wanted.public_url)
    except ValueError as error:
        raise ConfigError([Problem("--command, --pattern", str(error))]) from error
