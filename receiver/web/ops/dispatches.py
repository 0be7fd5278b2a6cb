"""The operations API on the handlers' work: what waits, what is dead, and doing it again."""

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from receiver.decide import settle
from receiver.model import Dispatch, DispatchState, Event, Subscription
from receiver.store import Database, ledger, queries, redispatch
from receiver.store.changes import Change, Signals
from receiver.web.ops import requests as bodies
from receiver.web.ops.paging import page_of, sequence_of
from receiver.web.ops.responses import Refusal, answered, not_found
from receiver.web.ops.views import dispatch_json


class Dispatches:
    """Endpoints; `subscriptions` are the configured handlers'."""

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
        limit, before, names = bodies.limit_of(request), sequence_of(request), self._subscriptions.keys()
        if bodies.flag_of(request, "orphaned"):
            page = await self._database.read(
                lambda tx: queries.orphan_page(tx, limit=limit, handlers=names, before=before)
            )
        else:
            state = bodies.state_of(request, DispatchState) or DispatchState.DEAD
            page = await self._database.read(
                lambda tx: queries.dispatch_page(tx, limit=limit, state=state, before=before)
            )
        return page_of("dispatches", [(seq, dispatch_json(row, names)) for seq, row in page], limit)

    async def retry(self, request: Request) -> Response:
        body = await bodies.read(request, bodies.RetryBody)
        now, dead = self._clock(), (DispatchState.DEAD,)
        armed = await self._database.write(
            lambda tx: redispatch.reset_dispatches(tx, now=now, states=dead, run_id=body.run_id, handler=body.handler)
        )
        return self._armed(armed)

    async def redispatch(self, request: Request) -> Response:
        body = await bodies.read(request, bodies.RedispatchBody)
        run_id, handler, now = request.path_params["run_id"], body.handler, self._clock()
        if not await self._database.read(lambda tx: ledger.runs_by_id(tx, [run_id])):
            raise not_found("run")

        def job(tx: Any) -> tuple[Dispatch, ...]:
            if body.again:
                return redispatch.open_round(tx, run_id, names=self._subscriptions.keys(), handler=handler, now=now)
            return redispatch.reset_dispatches(tx, now=now, states=redispatch.OVER, run_id=run_id, handler=handler)

        return self._armed(await self._database.write(job))

    async def missing(self, request: Request) -> Response:
        """Tell a handler of runs that were settled before it was configured, some at a time."""
        body = await bodies.read(request, bodies.MissingBody)
        subscription, now = self._subscriptions.get(body.handler), self._clock()
        if subscription is None:
            message = f"no handler of this name is configured; there are: {', '.join(sorted(self._subscriptions))}"
            raise Refusal(400, "unknown_handler", message, fields=[("handler", message)])
        if Event.SETTLED not in subscription.on:
            message = "this handler does not listen to `settled`"
            raise Refusal(400, "unknown_handler", message, fields=[("handler", message)])
        run_ids = await self._database.read(
            lambda tx: redispatch.runs_unknown_to(tx, body.handler, since=body.since, limit=body.limit)
        )

        def job(tx: Any) -> tuple[Dispatch, ...]:
            runs, outputs = ledger.runs_by_id(tx, run_ids), ledger.outputs_of_runs(tx, run_ids)
            rows = [
                row
                for run_id, run in runs.items()
                for row in settle(run, outputs[run_id], [Event.SETTLED], [subscription], now=now)
            ]
            ledger.add_dispatches(tx, rows)
            return tuple(row for row in rows if row.state is DispatchState.READY)

        armed = await self._database.write(job) if run_ids else ()
        return self._armed(armed, more=len(run_ids) == body.limit)

    def _armed(self, armed: Sequence[Dispatch], **further: bool) -> Response:
        """Wake the dispatcher for what is due again, tell listeners, and answer how many that is."""
        if armed:
            self._signals.dispatch.set()
        for dispatch in armed:
            self._signals.changes.publish(Change("dispatch", dispatch.run_id, dispatch.state.value, dispatch.handler))
        shown = [dispatch_json(dispatch, self._subscriptions.keys()) for dispatch in armed[:100]]
        return answered({"dispatches": len(armed), "armed": shown, **further})
