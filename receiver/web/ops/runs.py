"""The operations API on runs and starts: start, track, look, wait, refresh, re-dispatch, resolve."""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from receiver.flora.messages import ids_of_poll_url
from receiver.flora.start_request import StartRequest
from receiver.intake.callbacks import Intake
from receiver.model import Origin, ReadRequested, RunRegistered, RunState, Start, StartState
from receiver.store import Database, queries
from receiver.store.changes import Signals
from receiver.web.ops import requests as bodies
from receiver.web.ops.responses import Refusal, answered, not_found, start_refusal, unavailable
from receiver.web.ops.timeline import timeline
from receiver.web.ops.views import account_json, run_json, start_json
from receiver.web.ops.wait import unless_stopped, until_finished
from receiver.workers.starter import Conflict, Starter


class Runs:
    """Endpoints; `base_url` is FLORA's, to hold a `poll_url` against, `handlers` the names of the configured ones."""

    def __init__(
        self,
        database: Database,
        intake: Intake,
        starter: Starter,
        *,
        signals: Signals,
        stopping: asyncio.Event,
        base_url: str,
        handlers: Collection[str],
        clock: Callable[[], datetime],
    ) -> None:
        self._database = database
        self._intake = intake
        self._starter = starter
        self._signals = signals
        self._stopping = stopping
        self._origin = _origin(base_url)
        self._handlers = frozenset(handlers)
        self._clock = clock

    def routes(self) -> Sequence[BaseRoute]:
        return (
            Route("/api/runs", self.start_or_list, methods=["GET", "POST"]),  # one route: a 405 names both
            Route("/api/runs/track", self.track, methods=["POST"]),
            Route("/api/runs/{run_id}", self.show, methods=["GET"]),
            Route("/api/runs/{run_id}/wait", self.wait, methods=["GET"]),
            Route("/api/runs/{run_id}/timeline", self.timeline, methods=["GET"]),
            Route("/api/runs/{run_id}/refresh", self.refresh, methods=["POST"]),
            Route("/api/starts", self.starts, methods=["GET"]),
            Route("/api/starts/{token}/resolve", self.resolve, methods=["POST"]),
        )

    async def start_or_list(self, request: Request) -> Response:
        return await (self.start(request) if request.method == "POST" else self.list(request))

    async def start(self, request: Request) -> Response:
        body = await bodies.read(request, bodies.StartBody)
        answer = await self._starter.start(_start_request(body))
        if isinstance(answer, Conflict):
            message = "this idempotency_key was used before, to start something else"
            raise Refusal(422, "idempotency_conflict", message, more={"start": start_json(answer.start)})
        start, token = answer.start, answer.start.token
        if start.state is StartState.ASKING:
            work = self._starter.settled(token, timeout_seconds=body.wait_seconds)
            answered_start = await unless_stopped(work, self._stopping)
            start = answered_start or await self._starter.find(token) or start
        return await self._start_answer(start, repeated=answer.repeated)

    async def track(self, request: Request) -> Response:
        body = await bodies.read(request, bodies.TrackBody)
        run_id, technique_id = self._names(body)
        run = await self._starter.track(
            RunRegistered(
                run_id=run_id,
                origin=Origin.TRACKED,
                registered_at=self._clock(),
                callback_expected=body.callback_expected,
                run_type=body.run_type or ("technique" if technique_id else None),
                technique_id=technique_id,
                workspace_id=body.workspace_id,
                poll_url=body.poll_url,
                metadata=body.metadata,
            )
        )
        return await self._run_answer(run.run_id)

    async def list(self, request: Request) -> Response:
        limit, state = bodies.limit_of(request), bodies.state_of(request, RunState)
        before = bodies.cursor_of(request)

        def read(tx: Any) -> Mapping[str, Any]:
            page = queries.run_page(tx, limit=limit, state=state, before=before)
            busy = queries.runs_with_work(tx, [run.run_id for run in page], self._handlers)
            over = {RunState.COMPLETED, RunState.FAILED, RunState.LOST}
            return {
                "runs": [run_json(run, finished=run.state in over and run.run_id not in busy) for run in page],
                "next_cursor": bodies.cursor(*queries.run_key(page[-1])) if len(page) == limit else None,
            }

        return answered(await self._database.read(read))

    async def show(self, request: Request) -> Response:
        return await self._run_answer(request.path_params["run_id"])

    async def wait(self, request: Request) -> Response:
        run_id, seconds = request.path_params["run_id"], bodies.seconds_of(request, default=30)
        finished = await until_finished(
            self._database,
            self._signals.changes,
            self._stopping,
            run_id,
            handlers=self._handlers,
            timeout_seconds=seconds,
        )
        if finished is False and self._stopping.is_set():
            raise unavailable("the service is stopping: ask again when it is back")
        return await self._run_answer(run_id)

    async def timeline(self, request: Request) -> Response:
        run_id = request.path_params["run_id"]

        def read(tx: Any) -> Mapping[str, Any] | None:
            account = queries.run_details(tx, run_id)
            if account is None:
                return None
            arrivals = queries.delivery_page(tx, limit=bodies.MOST_ROWS, run_id=run_id)
            return timeline(account, arrivals, queries.attempts_of_run(tx, run_id), self._handlers)

        found = await self._database.read(read)
        if found is None:
            raise not_found("run")
        return answered(found)

    async def refresh(self, request: Request) -> Response:
        await bodies.read(request, bodies.RefreshBody)
        run_id = request.path_params["run_id"]
        await self._known(run_id)
        await self._intake.apply(ReadRequested(run_id, self._clock()))
        return await self._run_answer(run_id)

    async def starts(self, request: Request) -> Response:
        limit, state = bodies.limit_of(request), bodies.state_of(request, StartState)
        before, given = bodies.cursor_of(request), request.query_params
        key, prefix = given.get("key"), given.get("prefix")
        page = await self._database.read(
            lambda tx: queries.start_page(tx, limit=limit, state=state, key=key, prefix=prefix, before=before)
        )
        cursor = bodies.cursor(*queries.start_key(page[-1])) if len(page) == limit else None
        return answered({"starts": [start_json(start) for start in page], "next_cursor": cursor})

    async def resolve(self, request: Request) -> Response:
        body = await bodies.read(request, bodies.ResolveBody)
        token = request.path_params["token"]
        before = await self._starter.find(token)
        if before is None:
            raise not_found("start")
        if before.state is StartState.STARTED and before.run_id != body.run_id:
            message = f"this start made {before.run_id}: there is nothing to resolve"
            raise Refusal(409, "already_started", message, more={"start": start_json(before)})
        if body.run_id is not None:
            run_id = body.run_id
            owner = await self._database.read(lambda tx: queries.run_details(tx, run_id))
            if owner is not None and owner.start is not None and owner.start.token != token:
                raise Refusal(409, "run_taken", f"{run_id} is the run of another start")
        after = await self._starter.resolve(token, body.run_id)
        if after is None:
            raise not_found("start")
        return await self._with_run(after, status=200, repeated=True)

    async def _start_answer(self, start: Start, *, repeated: bool) -> Response:
        shown = {"start": start_json(start)}
        match start.state:
            case StartState.STARTED:
                return await self._with_run(start, status=200 if repeated else 201, repeated=repeated)
            case StartState.ASKING:
                return answered({**shown, "run": None, "repeated": repeated}, status=202)
            case StartState.REFUSED:
                raise start_refusal(start, more=shown)
            case StartState.UNKNOWN:
                raise Refusal(409, "unknown_outcome", start.error_message or "it is not known", more=shown)

    async def _with_run(self, start: Start, *, status: int, repeated: bool) -> Response:
        run_id = start.run_id or ""
        account = await self._database.read(lambda tx: queries.run_details(tx, run_id))
        run = None if account is None else account_json(account, self._handlers)
        return answered({"start": start_json(start), "run": run, "repeated": repeated}, status=status)

    async def _run_answer(self, run_id: str) -> Response:
        account = await self._known(run_id)
        return answered({"run": account_json(account, self._handlers)})

    async def _known(self, run_id: str) -> queries.RunDetails:
        account = await self._database.read(lambda tx: queries.run_details(tx, run_id))
        if account is None:
            raise not_found("run")
        return account

    def _names(self, body: bodies.TrackBody) -> tuple[str, str | None]:
        """Return (run_id, technique_id) as the body or its poll_url names them. The URL is parsed, never fetched."""
        if body.poll_url is None:
            return body.run_id or "", body.technique_id
        if _origin(body.poll_url) != self._origin:
            message = "poll_url is not on FLORA's API: the API key goes to [flora] base_url only"
            raise Refusal(400, "foreign_poll_url", message, fields=[("poll_url", message)])
        technique_id, run_id = ids_of_poll_url(body.poll_url)
        try:
            run_id = bodies.TrackBody(run_id=run_id or "").run_id
        except ValueError as error:
            message = "poll_url does not end in the id of a run"
            raise Refusal(400, "invalid_request", message, fields=[("poll_url", message)]) from error
        for given, named, field in (
            (body.run_id, run_id, "run_id"),
            (body.technique_id, technique_id, "technique_id"),
        ):
            if given is not None and named is not None and given != named:
                message = f"{field} and poll_url name different ones"
                raise Refusal(400, "invalid_request", message, fields=[(field, message)])
        return run_id or "", body.technique_id or technique_id


Endpoint = Callable[[Request], Awaitable[Response]]


def _start_request(body: bodies.StartBody) -> StartRequest:
    generate, callback_url, workspace_id = body.generate, body.callback_url, body.workspace_id
    if generate is not None:
        # Its own callback_url is the caller's word as much as ours beside it; its workspace decides whose key asks.
        generate = dict(generate)
        inner = generate.pop("callback_url", None)
        callback_url = callback_url or (inner if isinstance(inner, str) else None)
        owner = generate.get("workspace_id")
        workspace_id = workspace_id or (owner if isinstance(owner, str) and owner.isprintable() else None)
    return StartRequest(
        technique_id=body.technique_id or "",
        inputs=tuple(body.inputs),
        mode=body.mode,
        generate=generate,
        workspace_id=workspace_id or "",
        callback_url=callback_url,
        idempotency_key=body.idempotency_key,
        metadata=body.metadata,
    )


def _origin(url: str) -> tuple[str, str, int | None]:
    """Return scheme, host and port; a URL that cannot be read has an origin that nothing has."""
    try:
        parts = urlsplit(url)
        if parts.username is not None or parts.password is not None:
            return "", "", None
        return parts.scheme, parts.hostname or "", parts.port or {"https": 443, "http": 80}.get(parts.scheme)
    except ValueError:
        return "", "", None
