"""Serves a renewed certificate without a restart: its files are read again and again, by content.

Called by the reloader. The pair that is served stays until a usable one takes its place.
"""

import asyncio
import contextlib
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime

import structlog

from receiver.config import Tls
from receiver.errors import ConfigError, Problem
from receiver.net.server_certificate import find_date_problems
from receiver.telemetry import Metrics
from receiver.web.certificate import Certificate, read_certificate
from receiver.web.server import Server

log = structlog.get_logger("receiver.service")


@dataclass(frozen=True, slots=True)
class Renewal:
    """A usable certificate, with a context for each listener that will serve it."""

    certificate: Certificate
    contexts: tuple[tuple[Server, ssl.SSLContext], ...]


class CertificateWatch:
    """The certificate of all listeners that serve TLS."""

    def __init__(self, tls: Tls, *, metrics: Metrics, clock: Callable[[], datetime]) -> None:
        self.tls = tls
        """The files; may be others at any time."""
        self._metrics = metrics
        self._clock = clock
        self._servers: Sequence[Server] = ()
        self._current: Certificate | None = None
        self._seen: Certificate | tuple[Problem, ...] | None = None
        self._refused: tuple[Problem, ...] = ()

    def attach(self, *servers: Server) -> None:
        """Keep the certificate of these listeners up to date, as far as they serve TLS."""
        self._servers = [each for each in servers if each.config.is_ssl]
        # A context of our own: between theirs and this look the files may have changed.
        with contextlib.suppress(ConfigError):
            if (renewal := self.prepare(self.tls)) is not None:
                self._serve(renewal)

    def prepare(self, tls: Tls) -> Renewal | None:
        """Build all that is needed to serve what the files hold now; None without TLS.

        Raises ConfigError if it cannot be used, or is out of date while the one in use is not.
        """
        if not self._servers or tls.cert is None or tls.key is None:
            return None
        certificate, now = read_certificate(tls.cert, tls.key), self._clock()
        contexts = tuple((each, each.load_context(tls.cert, tls.key)) for each in self._servers)
        if self._current is not None and self._current.is_valid_at(now):
            problems = list(find_date_problems(tls.cert, now))
            if problems:
                raise ConfigError(problems)
        return Renewal(certificate, contexts)

    def take(self, renewal: Renewal) -> None:
        """Serve it to the connections that follow."""
        if self._current != renewal.certificate:
            log.info("tls.renewed", expires_at=_show(renewal.certificate.not_after))
        self._serve(renewal)

    def _serve(self, renewal: Renewal) -> None:
        self._current, self._refused = renewal.certificate, ()
        for server, context in renewal.contexts:
            server.replace_context(context)
        self._update_metric()

    async def tick(self) -> bool:
        """Look at the files; return whether they have changed and should be read again soon.

        A change counts once two reads agree: two files are not replaced at once.
        """
        if not self._servers or self.tls.cert is None or self.tls.key is None:
            return False
        found: Certificate | tuple[Problem, ...]
        try:
            found = await asyncio.to_thread(read_certificate, self.tls.cert, self.tls.key)
        except ConfigError as error:
            found = error.problems
        is_confirmed, self._seen = found == self._seen, found
        if found == self._current:
            self._refused = ()
        elif is_confirmed:
            await self._renew()
        self._update_metric()
        return not is_confirmed and found != self._current

    async def _renew(self) -> None:
        try:
            renewal = await asyncio.to_thread(self.prepare, self.tls)
        except ConfigError as error:
            if error.problems != self._refused:
                self._refused = error.problems
                log.error(
                    "tls.kept",
                    reason=str(error),
                    expires_at=_show(self._current.not_after if self._current else None),
                    fix="put a usable certificate and its key there; the previous pair is served until then",
                )
            return
        if renewal is not None:
            self.take(renewal)

    def _update_metric(self) -> None:
        left = None if self._current is None else self._current.time_left(self._clock())
        if left is not None:
            for each in self._servers:
                self._metrics.set_certificate_seconds(each.listener_name, left.total_seconds())


def _show(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()
