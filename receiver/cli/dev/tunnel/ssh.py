"""`ssh -R` to any host, by asyncssh (extra `ssh`). TLS ends here, or at a proxy on that host.

The host's key is always checked against known_hosts; this cannot be turned off.
"""

import asyncio
import contextlib
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from receiver.cli.dev.tunnel.provider import LocalEndpoint
from receiver.errors import TunnelError
from receiver.net.addresses import http_origin

__all__ = ["Account", "Ssh", "parse_account"]

_CONNECT_SECONDS = 20.0
_KEEPALIVE_SECONDS = 15
_HTTPS = 443


@dataclass(frozen=True, slots=True)
class Account:
    """Where to log in. The user and the port, where None, come from ssh's own configuration."""

    host: str
    user: str | None = None
    port: int | None = None


def parse_account(text: str) -> Account:
    """Parse `[user@]host[:port]`, with IPv6 addresses in brackets. Raises ValueError."""
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
    """Listens on `remote_port` of the host: on its public address, or on its loopback for a proxy.

    With `public_url`, a proxy on the host serves that URL and forwards to the loopback port.
    """

    name = "ssh"
    hint = 'check that its sshd has "GatewayPorts clientspecified", and that its firewall is open'

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

    async def open(self, local: LocalEndpoint) -> str:
        await self.close()
        asyncssh = _import_asyncssh()
        try:
            port = await self._connect(asyncssh, local)
        except (asyncssh.Error, asyncssh.ChannelListenError, OSError, TimeoutError, ValueError) as error:
            await self.close()
            raise TunnelError(self._explain(asyncssh, error)) from error
        return self._public_url or self._origin(port, tls=local.tls)

    async def _connect(self, asyncssh: Any, local: LocalEndpoint) -> int:
        """Log in and forward the remote port; return the port that the host listens on."""
        options: dict[str, Any] = {}
        if self._where.user is not None:
            options["username"] = self._where.user
        if self._identity is not None:
            options["client_keys"] = [str(self._identity)]
        self._connection = await asyncssh.connect(
            self._where.host,
            () if self._where.port is None else self._where.port,
            # None would check nothing; a file that does not exist means that no host is known.
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
        return int(listener.get_port())

    async def wait_closed(self) -> str:
        assert self._connection is not None, "the tunnel is open"
        await self._connection.wait_closed()
        return f"the connection to {self._where.host} was closed"

    async def close(self) -> None:
        if self._connection is not None:
            connection, self._connection = self._connection, None
            connection.close()
            with contextlib.suppress(TimeoutError, OSError):
                await asyncio.wait_for(connection.wait_closed(), 2)
            connection.abort()

    def _origin(self, port: int, *, tls: bool) -> str:
        origin = http_origin(self._where.host, port, tls=tls)
        return origin.removesuffix(f":{port}") if tls and port == _HTTPS else origin

    def _explain(self, asyncssh: Any, error: Exception) -> str:
        host = self._where.host
        if isinstance(error, asyncssh.HostKeyNotVerifiable):
            return (
                f"the key of {host} is not in {self._known_hosts}; log in once with `ssh`, which "
                "shows its fingerprint and adds it, or name another file with --known-hosts"
            )
        if isinstance(error, asyncssh.PermissionDenied):
            reason = error.reason
            return f"{host} refused the login ({reason}); check the user name and --identity"
        if isinstance(error, asyncssh.ChannelListenError):
            return (
                f"{host} did not open port {self._remote_port}; the port may be in use, be below "
                "1024, be held by an earlier connection (ClientAliveInterval 15 in its sshd ends "
                "those sooner), or be forbidden by its sshd (AllowTcpForwarding)"
            )
        if isinstance(error, TimeoutError):
            return f"{host} did not answer within {_CONNECT_SECONDS:g} s"
        if isinstance(error, ValueError):  # from a key, known_hosts or ssh's configuration
            locked = "assphrase" in str(error)
            fix = "; add the key with `ssh-add` and omit --identity, or use another key" if locked else ""
            return f"an ssh file on this machine cannot be used: {error}{fix}"
        return f"{host} cannot be reached: {error}"


def _import_asyncssh() -> Any:
    try:
        return importlib.import_module("asyncssh")
    except ImportError:
        raise TunnelError('asyncssh is not installed: pip install "flora-receiver[ssh]"') from None
