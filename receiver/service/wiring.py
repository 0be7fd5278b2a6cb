"""The composition root: builds everything that one process consists of from its settings.

Nothing built here runs yet.

Called by `Service`, which starts and stops what is built. `dev` and the tests use single
converters.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from types import MappingProxyType
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx
from starlette.types import ASGIApp

from receiver.config import Settings, check_operations, ensure_token
from receiver.config.callback_url import CALLBACK_PATH
from receiver.decide import Policy
from receiver.errors import ConfigError, Problem
from receiver.flora.client import FloraClient
from receiver.flora.rate_limit import RateLimit
from receiver.intake.callbacks import Intake, Secret
from receiver.model import Subscription
from receiver.net.addresses import is_loopback
from receiver.net.clients import api_client, tls_context
from receiver.net.download import Downloader, DownloadLimits
from receiver.net.server_certificate import check_pair, check_roots, find_date_problems, find_other_host
from receiver.net.tunnel import route_through
from receiver.plugins.loader import Loaded, load_handlers
from receiver.store import Database, open_database
from receiver.store.changes import Signals
from receiver.telemetry import Metrics
from receiver.web.accept_limits import fit_connections
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
from receiver.web.server import Server, bind, bound_address
from receiver.workers.dispatcher import Dispatcher
from receiver.workers.janitor import Janitor, Retention
from receiver.workers.leader import LeaderLease
from receiver.workers.notifier import ChangeNotifier
from receiver.workers.poller import Poller
from receiver.workers.run_reader import RunReader
from receiver.workers.starter import Starter
from receiver.workers.sweeper import Discovery, Sweeper

Only = Literal["door", "workers"]
"""The part of the work that one process does: it takes callbacks, or it does everything else."""
Loop = Callable[[asyncio.Event], Coroutine[Any, Any, None]]
"""Runs until the event is set."""

_OPERATIONS_LIMITS = Limits(
    # The app itself reads on beyond its own limit before it refuses a body.
    message_bytes=5 * MAX_BODY_BYTES,
    discard_bytes=5 * MAX_BODY_BYTES,
    head_seconds=10.0,
    body_seconds=60.0,
    connections=1000,
)
_EAGER_POLL = timedelta(seconds=4)
"""FLORA advises two to five seconds."""
_HEAD_START = timedelta(seconds=45)
"""Longer than a request to FLORA takes; see `Starter`."""
_LONGEST_JANITOR_PAUSE_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Everything that one process consists of, apart from its two listeners."""

    settings: Settings
    clock: Callable[[], datetime]
    handlers: tuple[Loaded, ...]
    metrics: Metrics
    signals: Signals
    database: Database
    intake: Intake
    api: httpx.AsyncClient
    """Connections to FLORA's API; closed by the service, as is `downloader`."""
    downloader: Downloader
    clients: Mapping[str | None, FloraClient]
    """Those of the API keys that the process started with, as are `readers`."""
    readers: Mapping[str | None, RunReader]
    poller: Poller
    sweeper: Sweeper
    starter: Starter
    dispatcher: Dispatcher
    janitor: Janitor
    notifier: ChangeNotifier

    @property
    def subscriptions(self) -> tuple[Subscription, ...]:
        return tuple(each.subscription for each in self.handlers)

    @property
    def handler_names(self) -> list[str]:
        return [each.subscription.handler for each in self.handlers]


def build_parts(settings: Settings, *, policy: Policy, clock: Callable[[], datetime]) -> Parts:
    """Load the handlers, open the database, build what works on it.

    Raises ConfigError, StoreError.
    """
    handlers = load_handlers(settings)
    subscriptions = [each.subscription for each in handlers]
    metrics, signals = Metrics(), Signals()
    database = open_database(
        settings.database.url,
        listen_url=settings.database.listen_url,
        pool_size=settings.database.pool_size,
    )
    intake = build_intake(settings, database, subscriptions, policy, signals, metrics, clock)
    flora = settings.flora
    tls = tls_context(flora.ca_file)
    route = route_through(flora.proxy, tls)
    api = api_client(flora.base_url, timeout_seconds=flora.timeout_seconds, tls=tls, route=route)
    clients = build_clients(settings, api, metrics, clock)
    readers = build_readers(clients, metrics, clock)
    downloader = build_downloader(settings, metrics)
    return Parts(
        settings=settings,
        clock=clock,
        handlers=handlers,
        metrics=metrics,
        signals=signals,
        database=database,
        intake=intake,
        api=api,
        downloader=downloader,
        clients=clients,
        readers=readers,
        poller=Poller(database, intake, readers, signals=signals, policy=policy, clock=clock),
        sweeper=Sweeper(database, intake, readers, discovery=to_discovery(settings), clock=clock),
        starter=Starter(
            database,
            intake,
            clients,
            signals=signals,
            callback_url=to_callback_url(settings.public_url),
            head_start=_HEAD_START if database.shared else timedelta(0),
            clock=clock,
        ),
        dispatcher=build_dispatcher(
            settings, database, handlers, downloader, intake, signals, metrics, clock
        ),
        janitor=build_janitor(settings, database, intake, clock),
        notifier=ChangeNotifier(database, signals),
    )


def build_intake(
    settings: Settings,
    database: Database,
    subscriptions: Sequence[Subscription],
    policy: Policy,
    signals: Signals,
    metrics: Metrics,
    clock: Callable[[], datetime],
) -> Intake:
    return Intake(
        database,
        secrets=to_secrets(settings),
        subscriptions=subscriptions,
        policy=policy,
        signals=signals,
        metrics=metrics,
        tolerance_past=settings.flora.tolerance_past_seconds,
        tolerance_future=settings.flora.tolerance_future_seconds,
        clock=clock,
    )


def build_clients(
    settings: Settings,
    http: httpx.AsyncClient,
    metrics: Metrics,
    clock: Callable[[], datetime],
    before: Mapping[str | None, FloraClient] = MappingProxyType({}),
) -> Mapping[str | None, FloraClient]:
    """Return the client of each workspace that has an API key; None is for all others.

    Clients with the same API key share a rate limit: FLORA counts by key. A client of `before` is
    kept if its workspace has the same key, and so is the rate limit of a key.
    """
    clients: dict[str | None, FloraClient] = {}
    limits = {client.api_key: client.rate_limit for client in before.values()}
    for workspace_id in (None, *(workspace.id for workspace in settings.workspaces)):
        key = settings.api_key_for(workspace_id)
        if (client := before.get(workspace_id)) is not None and client.api_key == key:
            clients[workspace_id] = client
        elif key is not None:
            clients[workspace_id] = FloraClient(
                http,
                key,
                limits.setdefault(key, RateLimit(settings.reconcile.concurrency, clock=clock)),
                timeout_seconds=settings.flora.timeout_seconds,
                on_response=metrics.count_api_request,
            )
    return clients


def build_readers(
    clients: Mapping[str | None, FloraClient],
    metrics: Metrics,
    clock: Callable[[], datetime],
    before: Mapping[str | None, RunReader] = MappingProxyType({}),
) -> Mapping[str | None, RunReader]:
    """Return a reader for each client. One of `before` is kept if it reads with the same client."""
    return {
        key: reader
        if (reader := before.get(key)) is not None and reader.client is client
        else RunReader(key, client, metrics=metrics, clock=clock)
        for key, client in clients.items()
    }


def build_downloader(settings: Settings, metrics: Metrics) -> Downloader:
    downloads = settings.downloads
    tls = tls_context(downloads.ca_file)
    return Downloader(
        limits=to_download_limits(settings),
        allow_private_hosts=downloads.allow_private_hosts,
        tls=tls,
        route=route_through(downloads.proxy, tls, resolves_names=downloads.proxy_resolves_names),
        count_bytes=metrics.count_download,
    )


def build_dispatcher(
    settings: Settings,
    database: Database,
    handlers: Sequence[Loaded],
    downloader: Downloader,
    intake: Intake,
    signals: Signals,
    metrics: Metrics,
    clock: Callable[[], datetime],
) -> Dispatcher:
    return Dispatcher(
        database,
        [each.registration for each in handlers],
        [each.subscription for each in handlers],
        downloader=downloader,
        signals=signals,
        metrics=metrics,
        apply=intake.apply,
        lease=timedelta(seconds=settings.dispatch.lease_seconds),
        takeover=database.shared,
        clock=clock,
    )


def build_janitor(
    settings: Settings, database: Database, intake: Intake, clock: Callable[[], datetime]
) -> Janitor:
    pause = min(_LONGEST_JANITOR_PAUSE_SECONDS, settings.reconcile.callback_window_seconds / 4)
    return Janitor(database, intake, retention=to_retention(settings), pause_seconds=pause, clock=clock)


def build_loops(parts: Parts, only: Only | None) -> Mapping[str, Loop]:
    """Return the loops of one process by name: all of them, or those of its part.

    Work that only one process may do needs a lease.
    """
    janitor, notifier = parts.janitor, parts.notifier
    leased: dict[str, Loop] = {"poller": parts.poller.run, "janitor": janitor.run}
    if parts.settings.discover.enabled:
        leased["sweeper"] = parts.sweeper.run
    if not parts.database.shared:
        if only is not None:
            return {"rejections": janitor.keep_rejections}
        return {**leased, "dispatcher": parts.dispatcher.run, "starter": parts.starter.run}
    loops: dict[str, Loop] = {
        "notifier": notifier.run,
        "listener": notifier.listen,
        "rejections": janitor.keep_rejections,
    }
    if only == "door":
        return loops
    leased["starter"] = parts.starter.recover
    loops |= {name: LeaderLease(parts.database, name, work).run for name, work in leased.items()}
    return loops | {"dispatcher": parts.dispatcher.run, "own_starts": parts.starter.finish_own}


def build_public_server(
    parts: Parts,
    *,
    ready: Callable[[], Awaitable[str | None]],
    wrap: Callable[[ASGIApp], ASGIApp] | None,
    listeners: Sequence[socket.socket],
) -> Server:
    """Build the listener that FLORA calls.

    `wrap` is put around its app; `listeners` are bound already, or else the settings say where.
    """
    settings, public = parts.settings, parts.settings.public
    app = public_app(
        parts.intake,
        parts.metrics,
        ready=ready,
        max_body_bytes=public.max_body_bytes,
        body_timeout_seconds=public.body_timeout_seconds,
        trusted_proxies=public.trusted_proxies,
    )
    if wrap is not None:
        app = wrap(app)
    sockets = list(listeners) or bind(public.host, public.port, setting="public")
    guard = build_public_guard(settings, parts.metrics)
    return Server(
        app,
        sockets,
        cert=settings.tls.cert,
        key=settings.tls.key,
        guard=guard,
        keep_alive_seconds=public.keep_alive_seconds,
        name="public",
    )


def build_public_guard(settings: Settings, metrics: Metrics) -> Guard | None:
    """Return the guard of the public listener.

    It allows as many connections as files may be open. None: h11 has no guard.
    """
    public = settings.public
    if public.http == "h11":
        return None
    limits = Limits(
        message_bytes=public.max_body_bytes + 32 * 1024,
        head_seconds=public.head_timeout_seconds,
        body_seconds=public.body_timeout_seconds + 1,  # the app's own limit comes first, with a 408
        connections=fit_connections(public.max_connections),
    )
    return Guard(limits, on_close=partial(metrics.count_closed_connection, "public"))


def build_access(parts: Parts, listeners: Sequence[socket.socket]) -> Access:
    """Return who may use the operations listener. Raises ConfigError if these settings expose it."""
    settings, operations = parts.settings, parts.settings.operations
    hosts = _operations_hosts(parts, listeners)
    if (problem := check_operations(settings, hosts)) is not None:
        raise ConfigError([problem])
    outer = [host for host in hosts if not is_loopback(host)]
    return Access(ensure_token(settings), (outer or hosts)[0], (*operations.allowed_hosts, *outer))


def _operations_hosts(parts: Parts, listeners: Sequence[socket.socket]) -> list[str]:
    # What is allowed depends on where it listens, which systemd decides if it holds the sockets.
    return [bound_address(each)[0] for each in listeners] or [parts.settings.operations.host]


def build_operations_server(
    parts: Parts,
    access: Access,
    *,
    stopping: asyncio.Event,
    only_probes: bool,
    listeners: Sequence[socket.socket],
) -> Server:
    """Build the listener for operators."""
    settings, operations = parts.settings, parts.settings.operations
    app = build_operations_app(parts, access, stopping=stopping, only_probes=only_probes)
    sockets = list(listeners) or bind(operations.host, operations.port, setting="operations")
    # On loopback nothing has to be hidden; elsewhere TLS is needed, unless a proxy does it.
    is_outer = any(not is_loopback(host) for host in _operations_hosts(parts, listeners))
    is_plain = not is_outer or operations.allow_plaintext
    cert, key = (None, None) if is_plain else (settings.tls.cert, settings.tls.key)
    guard = Guard(_OPERATIONS_LIMITS, on_close=partial(parts.metrics.count_closed_connection, "operations"))
    keep_alive = operations.keep_alive_seconds
    return Server(
        app, sockets, cert=cert, key=key, guard=guard, keep_alive_seconds=keep_alive, name="operations"
    )


def build_operations_app(
    parts: Parts, access: Access, *, stopping: asyncio.Event, only_probes: bool
) -> ASGIApp:
    monitor = MonitorRoutes(
        parts.database,
        parts.metrics,
        signals=parts.signals,
        stopping=stopping,
        handlers=parts.handler_names,
        clock=parts.clock,
    )
    if only_probes:
        return ops_app(access, monitor.probes())
    runs = RunRoutes(
        parts.database,
        parts.intake,
        parts.starter,
        signals=parts.signals,
        stopping=stopping,
        base_url=parts.settings.flora.base_url,
        handlers=parts.handler_names,
        find_hold=parts.poller.find_hold,
        clock=parts.clock,
    )
    return ops_app(
        access,
        DispatchRoutes(
            parts.database, parts.subscriptions, signals=parts.signals, clock=parts.clock
        ).routes(),
        runs.routes(),
        BackupRoutes(parts.database).routes(),
        CallbackRoutes(parts.database, clock=parts.clock).routes(),
        monitor.routes(),
    )


def to_policy(settings: Settings) -> Policy:
    """Return the numbers of the rules."""
    reconcile = settings.reconcile
    return Policy(
        first_poll=timedelta(seconds=reconcile.first_poll_seconds),
        eager_poll=_EAGER_POLL,
        max_gap=timedelta(seconds=reconcile.max_gap_seconds),
        callback_window=timedelta(seconds=reconcile.callback_window_seconds),
        deadline=timedelta(hours=reconcile.deadline_hours),
        confirmation_delays=tuple(timedelta(seconds=pause) for pause in reconcile.ladder_seconds),
        cost_window=timedelta(seconds=reconcile.cost_seconds),
    )


def to_secrets(settings: Settings) -> list[Secret]:
    """Return the signing secrets with their workspaces, in the order to try them."""
    return [Secret(value, workspace) for value, workspace in settings.secrets_by_workspace()]


def to_callback_url(public_url: str | None) -> str | None:
    """Return the URL that FLORA calls."""
    return None if public_url is None else public_url.rstrip("/") + CALLBACK_PATH


def find_unusable_files(settings: Settings) -> list[Problem]:
    """Return the certificates, keys and CAs with which no connection can be made."""
    cert, key = settings.tls.cert, settings.tls.key
    found = [check_pair(cert, key)] if cert and key else []
    roots = (("flora.ca_file", settings.flora.ca_file), ("downloads.ca_file", settings.downloads.ca_file))
    found += [check_roots(path, setting) for setting, path in roots if path]
    return [problem for problem in found if problem is not None]


def find_untrusted(settings: Settings, now: datetime) -> tuple[list[Problem], list[Problem]]:
    """Return why FLORA refuses the certificate in `[tls]`, and why it may. The files are usable."""
    cert = settings.tls.cert
    if cert is None:
        return [], []
    host = None if settings.public_url is None else urlsplit(settings.public_url).hostname
    other = None if host is None else find_other_host(cert, host)
    return list(find_date_problems(cert, now)), [] if other is None else [other]


def to_retention(settings: Settings) -> Retention:
    """Return how long the janitor keeps rows."""
    keep = settings.retention
    return Retention(timedelta(days=keep.bodies_days), timedelta(days=keep.ledger_days), keep.rejections)


def to_download_limits(settings: Settings) -> DownloadLimits:
    """Return the limits of one download."""
    downloads = settings.downloads
    return DownloadLimits(
        max_bytes=downloads.max_bytes,
        stall_seconds=downloads.stall_seconds,
        deadline_seconds=downloads.deadline_seconds,
    )


def to_discovery(settings: Settings) -> Discovery:
    """Return what the sweeper searches."""
    discover = settings.discover
    return Discovery(
        every=timedelta(seconds=discover.every_seconds),
        overlap=timedelta(seconds=discover.overlap_seconds),
        first=timedelta(hours=discover.first_hours),
        workspace_ids=discover.workspace_ids,
        project_ids=discover.project_ids,
        technique_ids=discover.technique_ids,
        run_types=discover.run_types,
    )
