"""Endpoints on the handlers' work: list dispatches, retry dead ones, dispatch a run again."""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any, TypeVar

from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from receiver.client.messages import Armed, DispatchPage
from receiver.decide import settle
from receiver.model import Dispatch, DispatchState, Event, Subscription
from receiver.store import Database, ledger, queries, redispatch
from receiver.store.changes import Change, Signals
from receiver.web.ops.requests import (
    MissingBody,
    RedispatchBody,
    RetryBody,
    flag_of,
    limit_of,
    next_cursor,
    parse_sequence,
    path_of,
    read_body,
    sequence_of,
    state_of,
)
from receiver.web.ops.responses import json_response, not_found, wrong_field
from receiver.web.ops.views import to_dispatch

_SHOWN = 100
"""Dispatches in the response to a request that arms them."""
_READ_AT_ONCE = 10_000
_BATCH = 100
"""Rows that are changed in one transaction."""
_NEXT_BATCH_SECONDS = 0.05

Key = TypeVar("Key")


@dataclass(slots=True)
class _Armed:
    """The dispatches that a request has made due."""

    count: int = 0
    first: list[Dispatch] = field(default_factory=list)


class DispatchRoutes:
    """`/api/dispatches` and `redispatch`; `subscriptions` are the configured handlers'."""

    def __init__(
        self,
        database: Database,
        subscriptions: Sequence[Subscription],
        *,
        signals: Signals,
        clock: Callable[[], datetime],
        pause: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self._database = database
        self._subscriptions = {each.handler: each for each in subscriptions}
        self._signals = signals
        self._clock = clock
        self._pause = pause

    def routes(self) -> Sequence[BaseRoute]:
        return (
            Route("/api/dispatches", self.list, methods=["GET"]),
            Route("/api/dispatches/retry", self.retry, methods=["POST"]),
            Route("/api/runs/redispatch", self.missing, methods=["POST"]),
            Route("/api/runs/{run_id}/redispatch", self.redispatch, methods=["POST"]),
        )

    async def list(self, request: Request) -> Response:
        limit, before, names = limit_of(request), sequence_of(request), self._subscriptions.keys()
        if flag_of(request, "orphaned"):
            page = await self._database.read(
                lambda tx: queries.orphan_page(tx, limit=limit, handlers=names, before=before)
            )
        else:
            state = state_of(request, DispatchState) or DispatchState.DEAD
            page = await self._database.read(
                lambda tx: queries.dispatch_page(tx, limit=limit, state=state, before=before)
            )
        cursor = next_cursor(page, limit, lambda row: (row[0], ""))
        return json_response(
            DispatchPage(dispatches=[to_dispatch(row, names) for _, row in page], next_cursor=cursor)
        )

    async def retry(self, request: Request) -> Response:
        body = await read_body(request, RetryBody)
        after = parse_sequence(body.cursor) or 0
        return await self._retry(
            (DispatchState.DEAD,), run_id=body.run_id, handler=body.handler, after=after, limit=body.limit
        )

    async def redispatch(self, request: Request) -> Response:
        body = await read_body(request, RedispatchBody)
        run_id, handler, now = path_of(request, "run_id"), body.handler, self._clock()
        if not await self._database.read(lambda tx: ledger.runs_by_id(tx, [run_id])):
            raise not_found("run")

        if not body.again:
            return await self._retry(redispatch.OVER, run_id=run_id, handler=handler)
        names, armed = self._subscriptions.keys(), _Armed()
        opened = await self._database.write(
            lambda tx: redispatch.open_round(tx, run_id, names=names, handler=handler, now=now)
        )
        self._publish(opened, armed)
        return self._respond(armed)

    async def missing(self, request: Request) -> Response:
        """Dispatch runs that were settled before a handler was configured, some at a time."""
        body = await read_body(request, MissingBody)
        subscription, now = self._subscriptions.get(body.handler), self._clock()
        if subscription is None:
            names = ", ".join(sorted(self._subscriptions))
            message = f"no handler of this name is configured; there are: {names}"
            raise wrong_field("handler", message, code="unknown_handler")
        if Event.SETTLED not in subscription.on:
            raise wrong_field(
                "handler", "this handler does not listen to `settled`", code="unknown_handler"
            )
        run_ids = await self._database.read(
            lambda tx: redispatch.runs_unknown_to(tx, body.handler, since=body.since, limit=body.limit)
        )

        def job(run_ids: Sequence[str], tx: Connection) -> tuple[Dispatch, ...]:
            runs, outputs = ledger.runs_by_id(tx, run_ids), ledger.outputs_of_runs(tx, run_ids)
            rows = [
                row
                for run_id, run in runs.items()
                for row in settle(run, outputs[run_id], [Event.SETTLED], [subscription], now=now)
            ]
            ledger.add_dispatches(tx, rows)
            return tuple(row for row in rows if row.state is DispatchState.READY)

        armed = _Armed()
        await self._write_in_batches(run_ids, job, armed)
        return self._respond(armed, more=len(run_ids) == body.limit)

    async def _retry(
        self,
        states: Collection[DispatchState],
        *,
        run_id: str | None = None,
        handler: str | None = None,
        after: int = 0,
        limit: int | None = None,
    ) -> Response:
        """Retry dispatches in the order of their keys, so that each is retried once.

        One that dies again meanwhile is not taken up again.
        """
        armed, wanted = _Armed(), limit or _READ_AT_ONCE

        def read(tx: Connection) -> tuple[int, ...]:
            return redispatch.seqs_to_retry(
                tx, states=states, limit=wanted, after=after, run_id=run_id, handler=handler
            )

        def job(seqs: Sequence[int], tx: Connection) -> tuple[Dispatch, ...]:
            return redispatch.retry_dispatches(tx, seqs, now=self._clock(), states=states)

        while seqs := await self._database.read(read):
            await self._write_in_batches(seqs, job, armed)
            after = seqs[-1]
            if len(seqs) < wanted or limit is not None:
                break
        cursor = next_cursor(seqs, wanted, lambda seq: (seq, ""))
        return self._respond(armed, more=cursor is not None, next_cursor=cursor)

    async def _write_in_batches(
        self,
        keys: Sequence[Key],
        job: Callable[[Sequence[Key], Connection], Sequence[Dispatch]],
        armed: _Armed,
    ) -> None:
        """Run `job` on some keys at a time, with pauses: callbacks share the writer."""
        for start in range(0, len(keys), _BATCH):
            if start:
                await self._pause(_NEXT_BATCH_SECONDS)
            batch = keys[start : start + _BATCH]
            self._publish(await self._database.write(partial(job, batch)), armed)

    def _publish(self, dispatches: Sequence[Dispatch], armed: _Armed) -> None:
        """Count dispatches that are due now, publish the changes and wake the dispatcher."""
        armed.count += len(dispatches)
        armed.first += dispatches[: _SHOWN - len(armed.first)]
        for dispatch in dispatches:
            self._signals.changes.publish(
                Change("dispatch", dispatch.run_id, dispatch.state.value, dispatch.handler)
            )
        if dispatches:
            self._signals.dispatch.set()

    def _respond(self, armed: _Armed, **more: Any) -> Response:
        """Return how many dispatches are due, and the first of them."""
        shown = [to_dispatch(dispatch, self._subscriptions.keys()) for dispatch in armed.first]
        return json_response(Armed(dispatches=armed.count, armed=shown, **more))
