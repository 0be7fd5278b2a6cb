"""`ssh -R` to any host, by asyncssh (extra `ssh`): bytes pass untouched, so TLS ends here, or at a proxy on that host.

The host's key is always checked against known_hosts; there is no way around that.
"""

import asyncio
import contextlib
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from receiver.cli.dev.tunnel.provider import Local
from receiver.errors import TunnelError

__all__ = ["Account", "Ssh", "account"]

_CONNECT_SECONDS = 20.0
_KEEPALIVE_SECONDS = 15
_HTTPS = 443


@dataclass(frozen=True, slots=True)
class Account:
    """Where to log in: `user@host:port`; what is None is left to ssh's own settings."""

    host: str
    user: str | None = None
    port: int | None = None


def account(text: str) -> Account:
    """Read `[user@]host[:port]`, IPv6 in brackets; ValueError says what is wrong."""
    user, _, place = text.rpartition("@")
    if place.startswith("["):
        host, bracket, rest = place[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise ValueError(f"{text!r} is not user@host:port")
        colon, port = rest[:1], rest[1:]
    else:
        host, colon, port = place.partition(":")
    if not host or (colon and not (port.isdecimal() and 0 < int(port) < 65536)):
        raise ValueError(f"{text!r} is not user@host:port")
    return Account(host, user or None, int(port) if colon else None)


class Ssh:
    """Listens on `remote_port` of the host's public side, or on its loopback where `public_url`'s proxy takes it from."""

    name = "ssh"
    hint = "does its sshd say GatewayPorts clientspecified, does a firewall let the port through?"

    def __init__(
        self,
        where: Account,
        *,
        remote_port: int,
        public_url: str | None = None,
        known_hosts: Path | None = None,
        identity: Path | None = None,
    ) -> None:
        self._where = where
        self._remote_port = remote_port
        self._public_url = public_url
        self._known_hosts = known_hosts or Path("~/.ssh/known_hosts").expanduser()
        self._identity = identity
        self._connection: Any = None

    async def open(self, local: Local) -> str:
        await self.close()
        asyncssh = _installed()
        options: dict[str, Any] = {}
        if self._where.user is not None:
            options["username"] = self._where.user
        if self._identity is not None:
            options["client_keys"] = [str(self._identity)]
        try:
            self._connection = await asyncssh.connect(
                self._where.host,
                () if self._where.port is None else self._where.port,
                # Never None, which checks nothing; a file that is not there knows no host.
                known_hosts=str(self._known_hosts) if self._known_hosts.is_file() else b"",
                connect_timeout=_CONNECT_SECONDS,
                login_timeout=_CONNECT_SECONDS,
                keepalive_interval=_KEEPALIVE_SECONDS,
                keepalive_count_max=2,
                **options,
            )
            listen_host = "localhost" if self._public_url else ""
            async with asyncio.timeout(_CONNECT_SECONDS):
                listener = await self._connection.forward_remote_port(
                    listen_host, self._remote_port, local.host, local.port
                )
        except (asyncssh.Error, asyncssh.ChannelListenError, OSError, TimeoutError, ValueError) as error:
            await self.close()
            raise TunnelError(self._advice(asyncssh, error)) from error
        return self._public_url or self._url(listener.get_port(), tls=local.tls)

    async def ended(self) -> str:
        assert self._connection is not None, "it is open"
        await self._connection.wait_closed()
        return f"the connection to {self._where.host} ended"

    async def close(self) -> None:
        if self._connection is not None:
            connection, self._connection = self._connection, None
            connection.close()
            with contextlib.suppress(TimeoutError, OSError):
                await asyncio.wait_for(connection.wait_closed(), 2)
            connection.abort()

    def _url(self, port: int, *, tls: bool) -> str:
        host = f"[{self._where.host}]" if ":" in self._where.host else self._where.host
        return f"{'https' if tls else 'http'}://{host}{'' if tls and port == _HTTPS else f':{port}'}"

    def _advice(self, asyncssh: Any, error: Exception) -> str:
        host = self._where.host
        if isinstance(error, asyncssh.HostKeyNotVerifiable):
            return (
                f"{host} shows a key that {self._known_hosts} does not have: log in once with `ssh`, which shows its "
                "fingerprint and adds it, or name the right file with --known-hosts"
            )
        if isinstance(error, asyncssh.PermissionDenied):
            return f"{host} does not let us in ({error.reason}): check the user, and the key with --identity"
        if isinstance(error, asyncssh.ChannelListenError):
            return (
                f"{host} does not listen on port {self._remote_port} for us: is it taken, is it below 1024, does its sshd "
                "say AllowTcpForwarding? An old connection of ours may hold it: with ClientAliveInterval 15 not for long"
            )
        if isinstance(error, TimeoutError):
            return f"{host} did not answer within {_CONNECT_SECONDS:g} s"
        if isinstance(error, ValueError):  # of the key, of known_hosts, of ssh's own settings
            help_ = ": `ssh-add` it and leave --identity out, or name another key" if "assphrase" in str(error) else ""
            return f"a file of ssh's on this machine cannot be used: {error}{help_}"
        return f"{host} cannot be reached: {error}"


def _installed() -> Any:
    try:
        return importlib.import_module("asyncssh")
    except ImportError:
        raise TunnelError('asyncssh is not installed: pip install "flora-receiver[ssh]"') from None
