"""What the rooms are built with, as the settings have it: numbers, limits, API clients. Called by service and dev."""

from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from functools import partial

import httpx

from receiver.config import Settings
from receiver.decide import Policy
from receiver.flora.client import FloraClient
from receiver.flora.rate_limit import RateLimit
from receiver.net.download import DownloadLimits
from receiver.telemetry import Metrics
from receiver.web.accept_limits import fit_connections
from receiver.web.connection_guard import Guard, Limits
from receiver.web.public import CALLBACK_PATH
from receiver.workers.janitor import Retention
from receiver.workers.sweeper import Discovery


def policy(settings: Settings) -> Policy:
    """Return the rules' numbers as the settings have them."""
    reconcile = settings.reconcile
    return Policy(
        first_poll=timedelta(seconds=reconcile.first_poll_seconds),
        eager_poll=timedelta(seconds=4),  # FLORA advises 2 to 5 s
        max_gap=timedelta(seconds=reconcile.max_gap_seconds),
        callback_window=timedelta(seconds=reconcile.callback_window_seconds),
        deadline=timedelta(hours=reconcile.deadline_hours),
        ladder=tuple(timedelta(seconds=pause) for pause in reconcile.ladder_seconds),
        cost_window=timedelta(seconds=reconcile.cost_seconds),
    )


def callback_url(public_url: str | None) -> str | None:
    """Return what FLORA is told to call."""
    return None if public_url is None else public_url.rstrip("/") + CALLBACK_PATH


def public_guard(settings: Settings, metrics: Metrics) -> Guard | None:
    """Return the public listener's guard, with no more places than there are files; None: h11 has none."""
    public = settings.public
    if public.http == "h11":
        return None
    limits = Limits(
        message_bytes=public.max_body_bytes + 32 * 1024,
        head_seconds=public.head_timeout_seconds,
        body_seconds=public.body_timeout_seconds + 1,  # the app's own limit comes first: it answers 408
        connections=fit_connections(public.max_connections),
    )
    return Guard(limits, on_close=partial(metrics.count_closed_connection, "public"))


def retention(settings: Settings) -> Retention:
    """Return how long the janitor keeps things."""
    keep = settings.retention
    return Retention(timedelta(days=keep.bodies_days), timedelta(days=keep.ledger_days), keep.rejections)


def download_limits(settings: Settings) -> DownloadLimits:
    """Return what one download may take."""
    downloads = settings.downloads
    return DownloadLimits(
        max_bytes=downloads.max_bytes,
        stall_seconds=downloads.stall_seconds,
        deadline_seconds=downloads.deadline_seconds,
    )


def discovery(settings: Settings) -> Discovery:
    """Return what the sweeper looks through."""
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


def clients(
    settings: Settings, http: httpx.AsyncClient, metrics: Metrics, clock: Callable[[], datetime]
) -> Mapping[str | None, FloraClient]:
    """Return each workspace's client, as far as it has an API key; None is for every other workspace.

    Clients with the same API key share a rate limit: FLORA counts by key.
    """
    made: dict[str | None, FloraClient] = {}
    limits: dict[str, RateLimit] = {}
    timeout = settings.flora.timeout_seconds
    for workspace_id in (None, *(workspace.id for workspace in settings.workspaces)):
        key = settings.api_key_for(workspace_id)
        if key is not None:
            limit = limits.setdefault(key, RateLimit(settings.reconcile.concurrency, clock=clock))
            made[workspace_id] = FloraClient(
                http, key, limit, timeout_seconds=timeout, on_response=metrics.count_api_request
            )
    return made
