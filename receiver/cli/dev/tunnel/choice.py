"""Chooses the tunnel provider: the one that the options name, else the first that is installed."""

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
from receiver.cli.dev.tunnel.provider import FixedUrl, Provider
from receiver.cli.dev.tunnel.ssh import Ssh, parse_account
from receiver.errors import ConfigError, Problem

__all__ = ["Kind", "TunnelOptions", "choose_provider"]

Kind = Literal["cloudflared", "ngrok", "ssh", "command"]

_NO_TUNNEL = """no tunnel to a public URL is available. The simplest ways to get one:
    install cloudflared: `flora-receiver dev` then needs no option and no account
    --ssh you@host: through a machine of yours that the internet can reach
    --no-tunnel: no callbacks from FLORA; runs are polled, and a callback is simulated for each"""
_NO_TLS = (
    "FLORA calls HTTPS URLs only, and ssh forwards bytes unchanged; either give this receiver a "
    "certificate for that host ([tls] cert and key), or run a proxy there that ends TLS and "
    "forwards to its own localhost:{port}, and name its URL with --public-url"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TunnelOptions:
    """The options of `dev` that concern the tunnel."""

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
        """The providers that the options name, directly or by an option of their own."""
        own: dict[Kind, str | None] = {
            "ssh": self.ssh,
            "command": self.command,
            "ngrok": self.domain,
        }
        named = tuple(kind for kind, value in own.items() if value is not None)
        return named if self.tunnel is None or self.tunnel in named else (self.tunnel, *named)

    @property
    def kind(self) -> Kind | None:
        """The provider that the options name, if any."""
        return next(iter(self.kinds), None)


def choose_provider(
    options: TunnelOptions, *, tls: bool, environ: Mapping[str, str] | None = None
) -> Provider:
    """Return the provider. `tls` says that the receiver itself speaks TLS.

    Raises ConfigError if options contradict each other, or if something is missing.
    """
    if len(options.kinds) > 1:
        message = f"{' and '.join(options.kinds)} are different tunnels; choose one of them"
        raise ConfigError([Problem("--tunnel", message)])
    match options.kind:
        case "ssh":
            return _build_ssh(options, tls=tls)
        case "command":
            return _build_command(options)
        case "cloudflared" | "ngrok" if options.public_url is not None:
            message = f"{options.kind} assigns a URL of its own; omit this option or the tunnel"
            raise ConfigError([Problem("--public-url", message)])
        case "cloudflared":
            return Cloudflared()
        case "ngrok":
            return Ngrok(options.domain)
        case None if options.public_url is not None:
            return FixedUrl(options.public_url)
        case None:
            return _find_installed(os.environ if environ is None else environ)


def _find_installed(environ: Mapping[str, str]) -> Provider:
    if shutil.which("cloudflared", path=environ.get("PATH")):
        return Cloudflared()
    if environ.get("NGROK_AUTHTOKEN") and importlib.util.find_spec("ngrok"):
        return Ngrok()
    raise ConfigError([Problem("--tunnel", _NO_TUNNEL)])


def _build_ssh(options: TunnelOptions, *, tls: bool) -> Provider:
    if options.ssh is None:
        message = "is required for this tunnel: user@host or user@host:port"
        raise ConfigError([Problem("--ssh", message)])
    if not tls and options.public_url is None:
        raise ConfigError([Problem("--ssh", _NO_TLS.format(port=options.remote_port))])
    try:
        where = parse_account(options.ssh)
    except ValueError as error:
        raise ConfigError([Problem("--ssh", str(error))]) from error
    return Ssh(
        where,
        remote_port=options.remote_port,
        public_url=options.public_url,
        known_hosts=options.known_hosts,
        identity=options.identity,
    )


def _build_command(options: TunnelOptions) -> Provider:
    if options.command is None:
        message = "is required for this tunnel: the program to run, with {port} where the port belongs"
        raise ConfigError([Problem("--command", message)])
    try:
        return Command(options.command, options.pattern or ANY_URL, public_url=options.public_url)
    except ValueError as error:
        raise ConfigError([Problem("--command, --pattern", str(error))]) from error
