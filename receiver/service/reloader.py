"""Takes changed settings over while the service runs: keys, secrets, the certificate, the log level.

A loop of the service. Each tick reads the files of single values and of the certificate, by their
content, so that a swapped symlink is seen as well; `request` (SIGHUP) has `receiver.toml` read too.
Everything new is built before anything is replaced: what cannot be used changes nothing.
"""

import asyncio
from collections.abc import Callable, Mapping

import structlog

from receiver.config import Settings, ensure_token, find_changes, take_over
from receiver.errors import ConfigError, Problem
from receiver.service.certificate_watch import CertificateWatch
from receiver.service.wiring import Parts, build_clients, build_readers, to_secrets
from receiver.telemetry import set_log_level
from receiver.web.ops.auth import Access
from receiver.web.server import Server
from receiver.workers.loop import run_loop
from receiver.workers.run_reader import RunReader

log = structlog.get_logger("receiver.service")

_PAUSE_SECONDS = 5.0
_CONFIRM_SECONDS = 1.0
"""What has changed is read again after this long: a file may have been written in part."""

Load = Callable[[bool], Settings]
"""Loads the settings, with `receiver.toml` read again if True. Raises ConfigError."""


class Reloader:
    """Replaces what may change in the parts of a running service."""

    def __init__(self, parts: Parts, *, load: Load | None = None) -> None:
        """Without `load` the settings stay as they are, and the certificate alone is watched."""
        self._parts = parts
        self._settings = parts.settings
        self._load: Load = load or (lambda _: self._settings)
        self._clients, self._readers = parts.clients, parts.readers
        self._certificate = CertificateWatch(parts.settings.tls, metrics=parts.metrics, clock=parts.clock)
        self._access: Access | None = None
        self._wake = asyncio.Event()
        self._is_requested = False
        self._is_key_replaced = False
        """Whether a key that FLORA refused has been replaced: the runs that it held back are read now."""
        self._seen: Settings | tuple[Problem, ...] = parts.settings
        self._refused: tuple[Problem, ...] = ()
        self._waiting: tuple[str, ...] = ()
        """The settings that need a restart, as they were logged."""
        self.on_request: Callable[[bool], None] = lambda _: None
        """Called before (False) and after (True) a reload that was requested."""

    def attach(self, access: Access, *servers: Server) -> None:
        """Keep the listeners up to date too, once they accept connections."""
        self._access = access
        self._certificate.attach(*servers)

    def request(self) -> None:
        """Have all settings read again soon."""
        self._is_requested = True
        self._wake.set()

    async def run(self, stopping: asyncio.Event) -> None:
        """Tick until `stopping` is set."""
        await run_loop("reloader", self.tick, stopping, wake=self._wake)

    async def tick(self) -> float:
        """Take over what has changed; return the seconds until the next tick."""
        if self._is_requested:
            self._is_requested = False
            self.on_request(False)
            await self._reload()
            self.on_request(True)
        is_unsure = await self._watch_files()
        if self._is_key_replaced:
            await self._parts.poller.read_now()
            self._is_key_replaced = False
        is_unsure |= await self._certificate.tick()
        return 0.0 if self._is_requested else _CONFIRM_SECONDS if is_unsure else _PAUSE_SECONDS

    async def _reload(self) -> None:
        """Take over everything that may change, or nothing of it."""
        try:
            new = await asyncio.to_thread(self._load, True)
            merged = take_over(self._settings, new)
            renewal = await asyncio.to_thread(self._certificate.prepare, merged.tls)
            changed = self._apply(merged)
        except ConfigError as error:
            self._log_refusal(error.problems)
            return
        if renewal is not None:
            self._certificate.take(renewal)
        self._seen, self._refused, self._waiting = new, (), ()
        log.info("settings.reloaded", changed=changed)
        self._log_waiting(merged, new)

    async def _watch_files(self) -> bool:
        """Take over what files of single values hold; return whether to read them again soon.

        A change counts once two reads agree.
        """
        found: Settings | tuple[Problem, ...]
        try:
            found = await asyncio.to_thread(self._load, False)
        except ConfigError as error:
            found = error.problems
        is_confirmed, self._seen = found == self._seen, found
        if not is_confirmed:
            return True
        if not isinstance(found, Settings):
            self._log_refusal(found)
            return False
        merged = take_over(self._settings, found)
        if find_changes(self._settings, merged):
            try:
                log.info("settings.reloaded", changed=self._apply(merged))
            except ConfigError as error:
                self._log_refusal(error.problems)
                return False
        self._refused = ()
        self._log_waiting(merged, found)
        return False

    def _apply(self, settings: Settings) -> tuple[str, ...]:
        """Put settings in force; return what changed. Raises ConfigError, and then nothing has.

        There is no `await` in it: no callback and no request sees one half of it.
        """
        changed = find_changes(self._settings, settings)
        parts, token = self._parts, ensure_token(settings)
        clients = build_clients(settings, parts.api, parts.metrics, parts.clock, self._clients)
        readers = build_readers(clients, parts.metrics, parts.clock, self._readers)
        parts.intake.set_secrets(to_secrets(settings))
        if clients != self._clients:
            self._replace_readers(readers)
            self._clients = clients
            parts.starter.set_clients(clients)
        if self._access is not None:
            self._access.token = token
        if settings.log.level != self._settings.log.level:
            set_log_level(settings.log.level)
        self._certificate.tls = settings.tls
        self._settings = settings
        return changed

    def _replace_readers(self, readers: Mapping[str | None, RunReader]) -> None:
        before, self._readers = self._readers, readers
        if any(reader.is_refused and readers.get(key) is not reader for key, reader in before.items()):
            self._is_key_replaced = True
        self._parts.poller.set_readers(readers)
        self._parts.sweeper.set_readers(readers)

    def _log_refusal(self, problems: tuple[Problem, ...]) -> None:
        """Log why new settings are not used; while files stay wrong, once."""
        if problems != self._refused:
            self._refused = problems
            reasons = [f"{problem.path}: {problem.message}" for problem in problems]
            log.error("settings.not_reloaded", reasons=reasons, fix="correct them; nothing was changed")

    def _log_waiting(self, running: Settings, new: Settings) -> None:
        waiting = find_changes(running, new)
        if waiting and waiting != self._waiting:
            log.warning("settings.need_restart", settings=waiting, fix="restart the service to apply them")
        self._waiting = waiting
