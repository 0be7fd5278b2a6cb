"""The operations API on all but runs and dispatches: callbacks, refusals, techniques, the channel, changes, metrics."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from receiver.decide.channel import channel_health
from receiver.store import Database, channel, queries
from receiver.store.changes import Signals
from receiver.telemetry import Metrics
from receiver.web.ops import requests as bodies
from receiver.web.ops.paging import page_of, sequence_of
from receiver.web.ops.responses import answered, not_found
from receiver.web.ops.views import arrival_json, change_json, health_json, rejection_json, technique_json, time_json
from receiver.web.ops.wait import changes_of
from receiver.workers.starter import Starter

_DAY = timedelta(hours=24)


class Ledger:
    """Endpoints. `heartbeat_seconds` is how often a quiet event stream says that it is there."""

    def __init__(
        self,
        database: Database,
        starter: Starter,
        metrics: Metrics,
        *,
        signals: Signals,
        stopping: asyncio.Event,
        handlers: Collection[str],
        clock: Callable[[], datetime],
        heartbeat_seconds: float = 15.0,
    ) -> None:
        self._database = database
        self._starter = starter
        self._metrics = metrics
        self._signals = signals
        self._stopping = stopping
        self._handlers = frozenset(handlers)
        self._clock = clock
        self._heartbeat_seconds = heartbeat_seconds

    def routes(self) -> Sequence[BaseRoute]:
        return (
            Route("/api/techniques/{technique_id}", self.technique, methods=["GET"]),
            Route("/api/deliveries", self.deliveries, methods=["GET"]),
            Route("/api/deliveries/{delivery_id:path}", self.delivery, methods=["GET"]),
            Route("/api/rejections", self.rejections, methods=["GET"]),
            Route("/api/channel", self.channel, methods=["GET"]),
            Route("/api/events", self.events, methods=["GET"]),
            *self.probes(),
        )

    def probes(self) -> Sequence[BaseRoute]:
        """What every process answers, whatever its role."""
        return (
            Route("/metrics", self.metrics, methods=["GET"]),
            Route("/healthz", self.healthz, methods=["GET"]),
        )

    async def technique(self, request: Request) -> Response:
        workspace_id = request.query_params.get("workspace_id") or ""
        found = await self._starter.technique(request.path_params["technique_id"], workspace_id=workspace_id)
        return answered({"technique": technique_json(found)})

    async def deliveries(self, request: Request) -> Response:
        limit, before = bodies.limit_of(request), sequence_of(request)
        run_id = request.query_params.get("run_id")
        page = await self._database.read(
            lambda tx: queries.delivery_page(tx, limit=limit, run_id=run_id, before=before)
        )
        return page_of("deliveries", [(row.seq, arrival_json(row)) for row in page], limit)

    async def delivery(self, request: Request) -> Response:
        delivery_id = request.path_params["delivery_id"]
        found = await self._database.read(lambda tx: queries.delivery_by_id(tx, delivery_id))
        if found is None:
            raise not_found("delivery")
        body = None if found.body is None else found.body.decode("utf-8", "replace")
        return answered({"delivery": {**arrival_json(found), "signature": found.signature, "body": body}})

    async def rejections(self, request: Request) -> Response:
        limit, before = bodies.limit_of(request), sequence_of(request)
        page = await self._database.read(lambda tx: queries.rejection_page(tx, limit=limit, before=before))
        return page_of("rejections", [(seq, rejection_json(row)) for seq, row in page], limit)

    async def channel(self, _: Request) -> Response:
        since = self._clock() - _DAY

        def read(tx: Any) -> Mapping[str, Any]:
            hours = channel.outcomes_by_hour(tx, since=since)
            outcomes: dict[str, int] = {}
            for counts in hours.values():
                for outcome, runs in counts.items():
                    outcomes[outcome] = outcomes.get(outcome, 0) + runs
            arrivals, refusals = channel.count_arrivals(tx, since=since), channel.count_refusals(tx, since=since)
            health = channel_health(outcomes, arrivals=arrivals, refusals=refusals)
            return {
                "since": time_json(since),
                "health": health_json(health),
                "late": outcomes.get("late", 0),
                "arrivals": arrivals,
                "refusals": refusals,
                "hours": [{"hour": time_json(hour), **counts} for hour, counts in hours.items()],
            }

        return answered(await self._database.read(read))

    async def events(self, _: Request) -> Response:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(self._stream(), media_type="text/event-stream", headers=headers)

    async def metrics(self, _: Request) -> Response:
        now, names = self._clock(), self._handlers
        counts = await self._database.read(
            lambda tx: (
                queries.count_unsettled(tx),
                queries.count_backlog(tx, names),
                queries.overdue_seconds(tx, names, now=now),
            )
        )
        self._metrics.set_backlog(*counts)
        body, content_type = self._metrics.render()
        return Response(body, headers={"Content-Type": content_type, "Cache-Control": "no-store"})

    async def healthz(self, _: Request) -> Response:
        return answered({"status": "ok"})

    async def _stream(self) -> AsyncIterator[str]:
        with self._signals.changes.listening() as listener:
            yield "retry: 2000\n: listening\n\n"
            async for change in changes_of(listener, self._stopping, heartbeat_seconds=self._heartbeat_seconds):
                if listener.missed:
                    listener.missed = False
                    yield _event({"kind": "missed", "run_id": None, "state": "", "detail": "read the ledger again"})
                yield ": \n\n" if change is None else _event(change_json(change))


def _event(data: Mapping[str, Any]) -> str:
    return f"event: {data['kind']}\ndata: {json.dumps(data)}\n\n"
