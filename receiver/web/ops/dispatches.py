"""Endpoints on the handlers' work: list dispatches, retry dead ones, dispatch a run again."""

from collections.abc import Callable, Sequence
from datetime import datetime

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
    read_body,
    sequence_of,
    state_of,
)
from receiver.web.ops.responses import json_response, not_found, wrong_field
from receiver.web.ops.views import to_dispatch

_SHOWN = 100
"""Dispatches in the response to a request that arms them."""


class DispatchRoutes:
    """`/api/dispatches` and `redispatch`; `subscriptions` are the configured handlers'."""

    def __init__(
        self,
        database: Database,
        subscriptions: Sequence[Subscription],
        *,
        signals: Signals,
        clock: Callable[[], datetime],
    ) -> None:
        self._database = database
        self._subscriptions = {each.handler: each for each in subscriptions}
        self._signals = signals
        self._clock = clock

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
        now, dead = self._clock(), (DispatchState.DEAD,)
        armed = await self._database.write(
            lambda tx: redispatch.reset_dispatches(
                tx, now=now, states=dead, run_id=body.run_id, handler=body.handler
            )
        )
        return self._respond(armed)

    async def redispatch(self, request: Request) -> Response:
        body = await read_body(request, RedispatchBody)
        run_id, handler, now = request.path_params["run_id"], body.handler, self._clock()
        if not await self._database.read(lambda tx: ledger.runs_by_id(tx, [run_id])):
            raise not_found("run")

        def job(tx: Connection) -> tuple[Dispatch, ...]:
            if body.again:
                return redispatch.open_round(
                    tx, run_id, names=self._subscriptions.keys(), handler=handler, now=now
                )
            return redispatch.reset_dispatches(
                tx, now=now, states=redispatch.OVER, run_id=run_id, handler=handler
            )

        return self._respond(await self._database.write(job))

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

        def job(tx: Connection) -> tuple[Dispatch, ...]:
            runs, outputs = ledger.runs_by_id(tx, run_ids), ledger.outputs_of_runs(tx, run_ids)
            rows = [
                row
                for run_id, run in runs.items()
                for row in settle(run, outputs[run_id], [Event.SETTLED], [subscription], now=now)
            ]
            ledger.add_dispatches(tx, rows)
            return tuple(row for row in rows if row.state is DispatchState.READY)

        armed = await self._database.write(job) if run_ids else ()
        return self._respond(armed, more=len(run_ids) == body.limit)

    def _respond(self, armed: Sequence[Dispatch], **more: bool) -> Response:
        """Wake the dispatcher, publish the changes, and return how many dispatches are due."""
        if armed:
            self._signals.dispatch.set()
        for dispatch in armed:
            self._signals.changes.publish(
                Change("dispatch", dispatch.run_id, dispatch.state.value, dispatch.handler)
            )
        shown = [to_dispatch(dispatch, self._subscriptions.keys()) for dispatch in armed[:_SHOWN]]
        return json_response(Armed(dispatches=len(armed), armed=shown, **more))
