"""The life cycle of one receiver process: start, run, report its health, stop in order."""

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta

import structlog
from starlette.types import ASGIApp

from receiver.config import Settings
from receiver.decide import Policy
from receiver.errors import ConfigError, Problem, StoreUnavailableError
from receiver.plugins.loader import check_handlers, close_handlers
from receiver.plugins.threads import Threads
from receiver.service.reloader import Load, Reloader
from receiver.service.systemd import Supervisor
from receiver.service.terminal import has_terminal
from receiver.service.wiring import (
    Loop,
    Only,
    build_access,
    build_loops,
    build_operations_server,
    build_parts,
    build_public_server,
    find_untrusted,
    find_unusable_files,
    to_callback_url,
    to_policy,
)
from receiver.store import queries, queue
from receiver.store.database import check_writable
from receiver.store.migrate import upgrade
from receiver.web.server import Server

log = structlog.get_logger("receiver.service")

_LOOPS_SECONDS = 10.0
"""How long the loops may take to end."""
_COMMIT_SECONDS = 5.0
"""How long the callbacks in progress may take to be committed once the service stops."""
_PROBE_SECONDS = 5.0
_READY_FOR = timedelta(seconds=1)
"""How long a probe of the database holds: /readyz is public, and must not load the writer."""
_RESTART_SECONDS = 1.0


class Service:
    """One receiver process.

    `async with Service(settings).running() as service: …`, or `run_until_signal`.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        only: Only | None = None,
        policy: Policy | None = None,
        clock: Callable[[], datetime] | None = None,
        around: Callable[[ASGIApp], ASGIApp] | None = None,
        listeners: Mapping[str, Sequence[socket.socket]] | None = None,
        load: Load | None = None,
    ) -> None:
        """Load the handlers and open the database; nothing runs yet.

        Raises ConfigError, StoreError.

        `only` leaves a part of the work to other processes: `door` accepts callbacks, `workers`
        does everything else. `policy` replaces the numbers of the settings. `around` wraps the app
        of the public listener. `listeners` are sockets that are bound already and take the place of
        the configured addresses, by the name of their section: `public`, `operations`.
        `load` loads the settings again, for `reload`.
        """
        if (problem := check_role(settings, only)) is not None:
            raise ConfigError([problem])
        if unusable := find_unusable_files(settings):
            raise ConfigError(unusable)
        self._settings = settings
        self._only = only
        self._around = around
        self._listeners = listeners or {}
        self._clock = clock or (lambda: datetime.now(UTC))
        self._parts = parts = build_parts(settings, policy=policy or to_policy(settings), clock=self._clock)
        self.metrics, self.signals, self.database = parts.metrics, parts.signals, parts.database
        self.intake, self.poller, self.starter = parts.intake, parts.poller, parts.starter
        self._reloader = Reloader(parts, load=load)
        self._threads = Threads()
        self._stopping = asyncio.Event()
        self._probe: asyncio.Future[None] | None = None
        self._probed_at: datetime | None = None
        self._public: Server | None = None
        self._operations: Server | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that the public listener is bound to; `unix:/path` and 0 on a Unix socket."""
        return _address(self._public)

    @property
    def operations_address(self) -> tuple[str, int]:
        """Host and port that the operations listener is bound to, as in `address`."""
        return _address(self._operations)

    def set_public_url(self, public_url: str) -> None:
        """Give FLORA this URL with every further start.

        Runs started before call back the old one.
        """
        self.starter.callback_url = to_callback_url(public_url)

    def reload(self) -> None:
        """Have the settings read again soon; what becomes of it is logged."""
        self._reloader.request()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Service"]:
        """Run everything inside the block; on leaving it, stop in order."""
        try:
            await self._start()
            yield self
        finally:
            await self._stop()

    async def run_until_signal(self, supervisor: Supervisor | None = None) -> None:
        """Run until SIGTERM or SIGINT; SIGHUP reloads the settings, or ends it with its terminal.

        The supervisor, if any, is notified of start, reloads, stop and good health.
        """
        supervisor = supervisor or Supervisor()
        received = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, received.set)
        self._reloader.on_request = supervisor.notify_reload
        has_owner = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN and has_terminal()

        def hang_up() -> None:
            is_orphan = has_owner and not has_terminal()
            (received.set if is_orphan else self.reload)()

        loop.add_signal_handler(signal.SIGHUP, hang_up)
        async with self.running():
            watchdog = asyncio.create_task(supervisor.run_watchdog(self._check_alive), name="watchdog")
            supervisor.notify("READY=1", f"STATUS=serving as {self._only or 'all'}")
            await received.wait()
            log.info("service.stopping")
            supervisor.notify("STOPPING=1")
            watchdog.cancel()

    async def ready(self) -> str | None:
        """Return None, or the reason why this process should get no callbacks now."""
        if self._stopping.is_set():
            return "stopping"
        now = self._clock()
        if self._probed_at is None or not timedelta(0) <= now - self._probed_at < _READY_FOR:
            # Requests share a probe that is in progress.
            if self._probe is None or self._probe.done():
                self._probe = asyncio.ensure_future(self.database.write(check_writable))
            try:
                async with asyncio.timeout(_PROBE_SECONDS):
                    await asyncio.shield(self._probe)
            except (StoreUnavailableError, TimeoutError) as error:
                return str(error) or "the database does not respond"
            self._probed_at = now
        return None

    async def _check_alive(self) -> None:
        """Return if the event loop and the database's threads work.

        A database server that fails does not count.
        """
        if self.database.shared:
            await self.ready()
            return
        with contextlib.suppress(StoreUnavailableError):
            await self.database.write(check_writable)

    async def _start(self) -> None:
        asyncio.get_running_loop().set_default_executor(self._threads)
        await self._prepare_database()
        await self._log_warnings()
        if self._only != "workers":
            self._public = build_public_server(
                self._parts,
                ready=self.ready,
                wrap=self._around,
                listeners=self._listeners.get("public", ()),
            )
            await self._public.start()
        listeners = self._listeners.get("operations", ())
        access = build_access(self._parts, listeners)
        self._operations = build_operations_server(
            self._parts,
            access,
            stopping=self._stopping,
            only_probes=self._only == "door",
            listeners=listeners,
        )
        await self._operations.start()
        self._reloader.attach(access, *(each for each in (self._public, self._operations) if each))
        loops = {**build_loops(self._parts, self._only), "reloader": self._reloader.run}
        for name, loop in loops.items():
            self._tasks.append(asyncio.create_task(self._keep_running(name, loop), name=name))
        log.info(
            "service.ready",
            role=self._only or "all",
            listening=self._public and ", ".join(self._public.origins()),
            operations=", ".join(self._operations.addresses()),
            database=str(self._settings.database.location),
            handlers=self._parts.handler_names,
        )

    async def _prepare_database(self) -> None:
        """Bring the schema up to date; release leases of a process that was killed.

        In a shared database leases may belong to processes that still run: those expire by
        themselves.
        """
        before, after = await self.database.run(upgrade)
        if before != after:
            log.info("database.migrated", before=before, after=after)
        if not self.database.shared and (count := await self.database.write(queue.release_all)):
            log.warning(
                "dispatch.leases_released", count=count, reason="the process that held them was killed"
            )

    async def _log_warnings(self) -> None:
        """Log odd settings, unhealthy handlers, and dispatches without a configured handler."""
        if self._only == "workers" and self._listeners.get("public"):
            reason = "workers take no callbacks, so connections to the public socket wait for ever"
            log.warning("listener.unanswered", reason=reason, fix="give that socket to the doors alone")
        for problem in self._settings.find_warnings():
            log.warning("config.odd", setting=problem.path, reason=problem.message)
        for level, found in zip(
            (log.error, log.warning), find_untrusted(self._settings, self._clock()), strict=True
        ):
            for problem in found:
                level("tls.untrusted", setting=problem.path, reason=problem.message)
        problems, warnings = await check_handlers(self._parts.handlers)
        for problem in problems:
            log.error("handler.unhealthy", handler=problem.path, reason=problem.message)
        for warning in warnings:
            log.warning(warning.event, handler=warning.path, reason=warning.message)
        with contextlib.suppress(StoreUnavailableError):
            orphans = await self.database.read(
                lambda tx: queries.count_orphans(tx, self._parts.handler_names)
            )
            for handler, number in orphans.items():
                fix = "configure the handler again"
                log.warning("dispatches.orphaned", handler=handler, dispatches=number, fix=fix)

    async def _keep_running(self, name: str, loop: Loop) -> None:
        """Run a loop again after a bug: one tick that fails must not end its work for good."""
        while not self._stopping.is_set():
            try:
                await loop(self._stopping)
            except Exception:
                log.exception("loop.failed", loop=name)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), _RESTART_SECONDS)

    async def _stop(self) -> None:
        """Stop in the order of dependence.

        Each step has a time limit, and none needs the one before to succeed.
        """
        self._stopping.set()  # /readyz responds with 503 from here on
        for server in (self._public, self._operations):
            if server is not None:
                await server.stop()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_LOOPS_SECONDS)
        for task in self._tasks:
            task.cancel()
        # A callback that is dropped here was not acknowledged.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.intake.close(), _COMMIT_SECONDS)
        await close_handlers(self._parts.handlers)
        self._threads.release_handlers()
        await self._parts.api.aclose()
        await self._parts.downloader.aclose()
        await self.database.close()
        log.info("service.stopped")


def check_role(settings: Settings, only: Only | None) -> Problem | None:
    """Return the problem with doing only a part of the work, if there is one."""
    if only is None or settings.database.location.path is None:
        return None
    if only == "door" and os.environ.get("RECEIVER_BENCH_DOOR") == "1":
        # tests/bench measures the callback listener alone; this is no setting for users.
        return None
    return Problem(
        "--only", "a SQLite file belongs to one process that does everything: use a postgresql:// url"
    )


def _address(server: Server | None) -> tuple[str, int]:
    if server is None:
        raise RuntimeError("the service is not running")
    return server.host, server.port
