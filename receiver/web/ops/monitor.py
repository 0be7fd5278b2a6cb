"""Endpoints that watch the process: metrics, health, and the stream of changes."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from datetime import datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from receiver.store import Database, queries
from receiver.store.changes import Signals
from receiver.telemetry import Metrics
from receiver.web.ops.responses import json_response
from receiver.web.ops.views import to_change
from receiver.web.ops.wait import next_changes


class MonitorRoutes:
    """`/metrics`, `/healthz` and `/api/events`.

    A quiet stream of events sends a comment every `heartbeat_seconds`.
    """

    def __init__(
        self,
        database: Database,
        metrics: Metrics,
        *,
        signals: Signals,
        stopping: asyncio.Event,
        handlers: Collection[str],
        clock: Callable[[], datetime],
        heartbeat_seconds: float = 15.0,
    ) -> None:
        self._database = database
        self._metrics = metrics
        self._signals = signals
        self._stopping = stopping
        self._handlers = frozenset(handlers)
        self._clock = clock
        self._heartbeat_seconds = heartbeat_seconds

    def routes(self) -> Sequence[BaseRoute]:
        return (*self.probes(), Route("/api/events", self.events, methods=["GET"]))

    def probes(self) -> Sequence[BaseRoute]:
        """Return the routes that a process of every role serves."""
        return (
            Route("/metrics", self.metrics, methods=["GET"]),
            Route("/healthz", self.healthz, methods=["GET"]),
        )

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
        return json_response({"status": "ok"})

    async def events(self, _: Request) -> Response:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(self._stream(), media_type="text/event-stream", headers=headers)

    async def _stream(self) -> AsyncIterator[str]:
        with self._signals.changes.subscribe() as listener:
            yield "retry: 2000\n: listening\n\n"
            async for change in next_changes(
                listener, self._stopping, heartbeat_seconds=self._heartbeat_seconds
            ):
                if listener.missed:
                    listener.missed = False
                    yield _event(
                        {"kind": "missed", "run_id": None, "state": "", "detail": "read the ledger again"}
                    )
                yield ": \n\n" if change is None else _event(to_change(change))


def _event(data: Mapping[str, Any]) -> str:
    return f"event: {data['kind']}\ndata: {json.dumps(data)}\n\n"
