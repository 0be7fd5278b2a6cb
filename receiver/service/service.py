"""The composition root: builds every room from the settings, runs them together, and stops them in order."""

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Literal

import structlog
from starlette.types import ASGIApp

from receiver.config import Settings, check_operations, ensure_token
from receiver.decide import Policy
from receiver.errors import ConfigError, Problem, StoreUnavailableError
from receiver.intake.callbacks import Intake, Secret
from receiver.net.addresses import is_loopback
from receiver.net.clients import api_client, tls_context
from receiver.net.download import Downloader
from receiver.plugins.loader import check_handlers, close_handlers, load_handlers
from receiver.plugins.threads import Threads
from receiver.service import wiring
from receiver.service.systemd import Supervisor
from receiver.store import Database, open_database, queries, queue
from receiver.store.changes import Signals
from receiver.store.database import check_writable, redact_url
from receiver.store.migrate import upgrade
from receiver.telemetry import Metrics
from receiver.web.connection_guard import Guard, Limits
from receiver.web.ops.app import ops_app
from receiver.web.ops.auth import Access
from receiver.web.ops.backup import BackupRoutes
from receiver.web.ops.callbacks import CallbackRoutes
from receiver.web.ops.dispatches import DispatchRoutes
from receiver.web.ops.monitor import MonitorRoutes
from receiver.web.ops.requests import MAX_BODY_BYTES
from receiver.web.ops.runs import RunRoutes
from receiver.web.public import public_app
from receiver.web.server import Server, bind
from receiver.workers.dispatcher import Dispatcher
from receiver.workers.janitor import Janitor
from receiver.workers.leader import LeaderLease
from receiver.workers.notifier import ChangeNotifier
from receiver.workers.poller import Poller
from receiver.workers.run_reader import RunReader
from receiver.workers.starter import Starter
from receiver.workers.sweeper import Sweeper

log = structlog.get_logger("receiver.service")

_OPERATIONS_LIMITS = Limits(  # larger bodies, and the app itself reads on beyond its limit before it refuses
    message_bytes=5 * MAX_BODY_BYTES, discard_bytes=5 * MAX_BODY_BYTES, body_seconds=60, connections=1000
)
Only = Literal["door", "workers"]

_HEAD_START = timedelta(seconds=45)
"""Longer than a question to FLORA takes: see Starter."""
_LOOPS_SECONDS = 10.0
"""How long the loops may take to put down what they hold."""
_COMMIT_SECONDS = 5.0
"""How long what has arrived may take to be committed once we stop: a database that hangs must not hold us."""
_READY_FOR = timedelta(seconds=1)
"""How long a probe of the database is believed: /readyz is public, and must not let anyone load the writer."""


class Service:
    """One receiver process. `async with Service(settings).running() as service: …`, or `run_until_signal`."""

    def __init__(
        self,
        settings: Settings,
        *,
        only: Only | None = None,
        policy: Policy | None = None,
        clock: Callable[[], datetime] | None = None,
        around: Callable[[ASGIApp], ASGIApp] | None = None,
        listeners: Mapping[str, socket.socket] | None = None,
    ) -> None:
        """Load handlers and open the database. Raises ConfigError, StoreError; nothing runs yet.

        `only` leaves a part to other processes: the door takes callbacks, the workers do everything else. `around`
        wraps the public app: somebody wants to watch. `listeners` are sockets that are bound already, `public` or
        `operations`.
        """
        if (problem := role_problem(settings, only)) is not None:
            raise ConfigError([problem])
        self._settings = settings
        self._only = only
        self._around = around
        self._given = dict(listeners or {})
        self._clock = clock or (lambda: datetime.now(UTC))
        self._loaded = load_handlers(settings)
        self._threads = Threads()
        self.metrics = Metrics()
        self.signals = Signals()
        self.database: Database = open_database(
            settings.database.url, listen_url=settings.database.listen_url, pool_size=settings.database.pool_size
        )
        self._subscriptions = tuple(each.subscription for each in self._loaded)
        flora = settings.flora
        self.intake = Intake(
            self.database,
            secrets=[Secret(value, workspace) for value, workspace in settings.secrets_by_workspace()],
            subscriptions=self._subscriptions,
            policy=policy or wiring.policy(settings),
            signals=self.signals,
            metrics=self.metrics,
            tolerance_past=flora.tolerance_past_seconds,
            tolerance_future=flora.tolerance_future_seconds,
            clock=self._clock,
        )
        self._api = api_client(flora.base_url, timeout_seconds=flora.timeout_seconds, tls=tls_context(flora.ca_file))
        self.clients = wiring.clients(settings, self._api, self.metrics, self._clock)
        readers = {
            key: RunReader(key, client, metrics=self.metrics, clock=self._clock) for key, client in self.clients.items()
        }
        self.poller = Poller(
            self.database,
            self.intake,
            readers,
            signals=self.signals,
            policy=policy or wiring.policy(settings),
            clock=self._clock,
        )
        self.starter = Starter(
            self.database,
            self.intake,
            self.clients,
            signals=self.signals,
            callback_url=wiring.callback_url(settings.public_url),
            head_start=_HEAD_START if self.database.shared else timedelta(0),
            clock=self._clock,
        )
        self.sweeper = Sweeper(
            self.database,
            self.intake,
            readers,
            discovery=wiring.discovery(settings),
            clock=self._clock,
        )
        downloads = settings.downloads
        self._downloader = Downloader(
            limits=wiring.download_limits(settings),
            allow_private_hosts=downloads.allow_private_hosts,
            tls=tls_context(downloads.ca_file),
            count_bytes=self.metrics.count_download,
        )
        self.dispatcher = Dispatcher(
            self.database,
            [each.registration for each in self._loaded],
            self._subscriptions,
            downloader=self._downloader,
            signals=self.signals,
            metrics=self.metrics,
            apply=self.intake.apply,
            lease=timedelta(seconds=settings.dispatch.lease_seconds),
            takeover=self.database.shared,
            clock=self._clock,
        )
        self.janitor = Janitor(
            self.database,
            self.intake,
            retention=wiring.retention(settings),
            pause_seconds=min(5.0, settings.reconcile.callback_window_seconds / 4),
            clock=self._clock,
        )
        self.herald = ChangeNotifier(self.database, self.signals)
        self._stopping = asyncio.Event()
        self._probed_at: datetime | None = None
        self._probe: asyncio.Future[None] | None = None
        self._public: Server | None = None
        self._operations: Server | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def address(self) -> tuple[str, int]:
        """Return host and port that the public listener is bound to."""
        if self._public is None:
            raise RuntimeError("the service is not running")
        return self._public.host, self._public.port

    @property
    def operations_address(self) -> tuple[str, int]:
        """Return host and port that the operations listener is bound to."""
        if self._operations is None:
            raise RuntimeError("the service is not running")
        return self._operations.host, self._operations.port

    def moved(self, public_url: str) -> None:
        """FLORA reaches us by another URL from now on; what was started before is called back by the old one."""
        self.starter.callback_url = wiring.callback_url(public_url)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Service"]:
        """Run everything inside the block; on leaving it, stop in order."""
        try:
            await self._start()
            yield self
        finally:
            await self._stop()

    async def run_until_signal(self, supervisor: Supervisor = Supervisor()) -> None:  # noqa: B008 -- frozen
        """Run until SIGTERM or SIGINT, and let whoever supervises us know how we are."""
        asked = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, asked.set)
        async with self.running():
            watched = asyncio.create_task(supervisor.watch(self._alive), name="watchdog")
            supervisor.tell("READY=1", f"STATUS=serving as {self._only or 'all'}")
            await asked.wait()
            log.info("service.stopping")
            supervisor.tell("STOPPING=1")
            watched.cancel()

    async def _alive(self) -> None:
        """Return if the event loop and the ledger's threads work. A server that says no, or nothing, is not our hanging."""
        if self.database.shared:
            await self.ready()
            return
        with contextlib.suppress(StoreUnavailableError):
            await self.database.write(check_writable)

    async def ready(self) -> str | None:
        """Return None, or why this process should get no callbacks now. A good answer is believed for a second."""
        if self._stopping.is_set():
            return "stopping"
        now = self._clock()
        if self._probed_at is None or not timedelta(0) <= now - self._probed_at < _READY_FOR:
            if self._probe is None or self._probe.done():  # many may ask while the database does not answer
                self._probe = asyncio.ensure_future(self.database.write(check_writable))
            try:
                async with asyncio.timeout(5):
                    await asyncio.shield(self._probe)
            except (StoreUnavailableError, TimeoutError) as error:
                return str(error) or "the database does not answer"
            self._probed_at = now
        return None

    async def _start(self) -> None:
        settings = self._settings
        asyncio.get_running_loop().set_default_executor(self._threads)
        before, after = await self.database.run(upgrade)
        if before != after:
            log.info("database.migrated", before=before, after=after)
        # Where the database is shared, leases may be held by the living: they run out by themselves.
        if not self.database.shared and (freed := await self.database.write(queue.release_all)):
            log.warning(
                "dispatch.leases_voided", count=freed, reason="the process that held them did not stop in order"
            )
        await self._warn_of_trouble()
        if self._only != "workers":
            self._public = self._public_server()
            await self._public.start()
        self._operations = self._operations_server()
        await self._operations.start()
        for name, run in self._loops().items():
            self._tasks.append(asyncio.create_task(self._survive(name, run), name=name))
        ops_host, ops_port = self.operations_address
        log.info(
            "service.ready", role=self._only or "all", listening=self._listening(), operations=f"{ops_host}:{ops_port}",
            database=redact_url(settings.database.url),
            handlers=[each.registration.name for each in self._loaded],
        )  # fmt: skip

    def _loops(self) -> Mapping[str, Callable[[asyncio.Event], Coroutine[Any, Any, None]]]:
        """Return what this process runs: everything, its role's part, or what it is elected to."""
        if not self.database.shared:
            alone: dict[str, Callable[[asyncio.Event], Coroutine[Any, Any, None]]] = {
                "poller": self.poller.run,
                "dispatcher": self.dispatcher.run,
                "janitor": self.janitor.run,
                "starter": self.starter.run,
            }
            if self._settings.discover.enabled:
                alone["sweeper"] = self.sweeper.run
            return alone if self._only is None else {"rejections": self.janitor.keep_rejections}
        loops = {
            "herald": self.herald.run,
            "listener": self.herald.listen,
            "rejections": self.janitor.keep_rejections,
        }
        if self._only == "door":
            return loops
        elected = {"poller": self.poller.run, "janitor": self.janitor.run, "starter": self.starter.recover}
        if self._settings.discover.enabled:
            elected["sweeper"] = self.sweeper.run
        for name, work in elected.items():
            loops[name] = LeaderLease(self.database, name, work).run
        return loops | {"dispatcher": self.dispatcher.run, "own starts": self.starter.ask_own}

    def _public_server(self) -> Server:
        settings = self._settings
        app = public_app(
            self.intake,
            self.metrics,
            ready=self.ready,
            max_body_bytes=settings.public.max_body_bytes,
            body_timeout_seconds=settings.public.body_timeout_seconds,
            trusted_proxies=settings.public.trusted_proxies,
        )
        if self._around is not None:
            app = self._around(app)
        sockets = self._sockets("public", settings.public.host, settings.public.port)
        guard = wiring.public_guard(settings, self.metrics)
        return Server(app, sockets, cert=settings.tls.cert, key=settings.tls.key, guard=guard, name="public")

    def _sockets(self, name: str, host: str, port: int) -> list[socket.socket]:
        return [self._given[name]] if name in self._given else bind(host, port, setting=name)

    def _listening(self) -> str | None:
        if self._public is None:
            return None
        host, port = self.address
        return f"{'https' if self._settings.tls.cert else 'http'}://{host}:{port}"

    def _operations_server(self) -> Server:
        """Bind the operations listener. Raises ConfigError if it must not be opened like this."""
        settings, operations = self._settings, self._settings.operations
        if (problem := check_operations(settings)) is not None:
            raise ConfigError([problem])
        access = Access(ensure_token(settings), operations.host, operations.allowed_hosts)
        names = [each.handler for each in self._subscriptions]
        runs = RunRoutes(
            self.database,
            self.intake,
            self.starter,
            signals=self.signals,
            stopping=self._stopping,
            base_url=settings.flora.base_url,
            handlers=names,
            clock=self._clock,
        )
        monitor = MonitorRoutes(
            self.database,
            self.metrics,
            signals=self.signals,
            stopping=self._stopping,
            handlers=names,
            clock=self._clock,
        )
        everything = [
            DispatchRoutes(self.database, self._subscriptions, signals=self.signals, clock=self._clock).routes(),
            runs.routes(),
            BackupRoutes(self.database).routes(),
            CallbackRoutes(self.database, clock=self._clock).routes(),
            monitor.routes(),
        ]
        app = ops_app(access, *([monitor.probes()] if self._only == "door" else everything))
        sockets = self._sockets("operations", operations.host, operations.port)
        # On loopback there is nobody to hide from; elsewhere TLS, unless a proxy does it.
        plain = is_loopback(operations.host) or operations.allow_plaintext
        tls = settings.tls
        guard = Guard(_OPERATIONS_LIMITS, on_close=partial(self.metrics.count_closed_connection, "operations"))
        cert, key = (None, None) if plain else (tls.cert, tls.key)
        return Server(app, sockets, cert=cert, key=key, guard=guard, name="operations")

    async def _survive(self, name: str, run: Callable[[asyncio.Event], object]) -> None:
        """Keep a loop running: a bug in one tick must not end the service's work for good."""
        while not self._stopping.is_set():
            try:
                await run(self._stopping)  # type: ignore[misc]
            except Exception:
                log.exception("loop.failed", loop=name)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), 1.0)

    async def _stop(self) -> None:
        """Stop in the order in which things depend on each other; each step has a deadline, nothing needs them all."""
        self._stopping.set()  # readyz says 503 from here on
        if self._public is not None:
            await self._public.stop()
        if self._operations is not None:
            await self._operations.stop()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_LOOPS_SECONDS)
        for task in self._tasks:
            task.cancel()
        with contextlib.suppress(TimeoutError):  # nobody is told 200 for what is dropped here
            await asyncio.wait_for(self.intake.close(), _COMMIT_SECONDS)
        await close_handlers(self._loaded)
        self._threads.release_handlers()
        await self._api.aclose()
        await self._downloader.aclose()
        await self.database.close()
        log.info("service.stopped")

    async def _warn_of_trouble(self) -> None:
        for problem in self._settings.warnings():
            log.warning("config.odd", setting=problem.path, reason=problem.message)
        problems, warnings = await check_handlers(self._loaded)
        for problem in problems:
            log.error("handler.unhealthy", handler=problem.path, reason=problem.message)
        for warning in warnings:
            log.warning("handler.unreachable", handler=warning.path, reason=warning.message)
        names = [each.handler for each in self._subscriptions]
        with contextlib.suppress(StoreUnavailableError):
            waiting = await self.database.read(lambda tx: queries.count_orphans(tx, names))
            for handler, number in waiting.items():
                log.warning(
                    "dispatches.orphaned", handler=handler, dispatches=number, cure="configure the handler again"
                )


def role_problem(settings: Settings, only: Only | None) -> Problem | None:
    """Return why this process must not do only a part of the work; None: it may."""
    if only is None or not settings.database.url.startswith("sqlite"):
        return None
    if only == "door" and os.environ.get("RECEIVER_BENCH_DOOR") == "1":
        return None  # tests/bench measures the callback listener alone; no setting of users
    return Problem("--only", "a SQLite file belongs to one process that does everything: use a postgresql:// url")
