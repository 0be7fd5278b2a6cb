"""Endpoints on runs (start, track, list, show, wait, refresh), starts and techniques."""

import asyncio
from collections.abc import Callable, Collection, Sequence
from datetime import datetime
from http import HTTPStatus
from urllib.parse import urlsplit

from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from receiver.client.messages import (
    HoldView,
    OneRun,
    OneTechnique,
    RunPage,
    RunView,
    Started,
    StartPage,
    TimelineView,
)
from receiver.errors import StoreUnavailableError
from receiver.flora.messages import ids_of_poll_url
from receiver.flora.start_request import StartRequest
from receiver.intake.callbacks import Intake
from receiver.model import Origin, ReadRequested, RunRegistered, RunState, Start, StartState
from receiver.store import Database, queries
from receiver.store.changes import Signals
from receiver.web.ops.requests import (
    MOST_ROWS,
    RefreshBody,
    ResolveBody,
    StartBody,
    TrackBody,
    key_of,
    limit_of,
    next_cursor,
    path_of,
    read_body,
    state_of,
    text_of,
    timeout_of,
)
from receiver.web.ops.responses import (
    Refusal,
    json_response,
    not_found,
    remember_key,
    start_refusal,
    unavailable,
    wrong_field,
)
from receiver.web.ops.timeline import to_timeline
from receiver.web.ops.views import to_full_run, to_run, to_start
from receiver.web.ops.wait import until_finished
from receiver.web.values import LONGEST_ID, LONGEST_KEY
from receiver.workers.loop import run_until
from receiver.workers.run_reader import Held
from receiver.workers.starter import Conflict, Starter, new_key

_OVER = frozenset({RunState.COMPLETED, RunState.FAILED, RunState.LOST})


class RunRoutes:
    """`/api/runs`, `/api/starts` and `/api/techniques`.

    A `poll_url` must belong to `base_url`, which is FLORA's. `handlers` names the configured ones.
    """

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
        find_hold: Callable[[str | None], Held | None],
        clock: Callable[[], datetime],
    ) -> None:
        """`find_hold` returns why no run of a workspace is read from FLORA now."""
        self._database = database
        self._intake = intake
        self._starter = starter
        self._signals = signals
        self._stopping = stopping
        self._origin = _origin(base_url)
        self._handlers = frozenset(handlers)
        self._find_hold = find_hold
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
            Route("/api/techniques/{technique_id}", self.technique, methods=["GET"]),
        )

    async def start_or_list(self, request: Request) -> Response:
        return await (self.start(request) if request.method == "POST" else self.list(request))

    async def start(self, request: Request) -> Response:
        body = await read_body(request, StartBody)
        key = body.idempotency_key or new_key()
        remember_key(request, key)
        result = await self._starter.start(_start_request(body, key))
        if isinstance(result, Conflict):
            message = "this idempotency_key was used before, to start something else"
            raise Refusal(
                HTTPStatus.UNPROCESSABLE_ENTITY,
                "idempotency_conflict",
                message,
                start=to_start(result.start),
            )
        try:
            start = await self._wait_for_response(result.start, body.wait_seconds)
            return await self._start_response(start, repeated=result.is_repeat)
        except StoreUnavailableError:
            # It is committed, and FLORA is requested: the response has what is known.
            started = Started(start=to_start(result.start), run=None, repeated=result.is_repeat)
            return json_response(started, status=HTTPStatus.ACCEPTED)

    async def _wait_for_response(self, start: Start, seconds: float) -> Start:
        if start.state is not StartState.ASKING:
            return start
        wait = self._starter.wait_for_response(start.token, timeout_seconds=seconds)
        settled = await run_until(self._stopping, wait)
        return settled or await self._starter.find(start.token) or start

    async def track(self, request: Request) -> Response:
        body = await read_body(request, TrackBody)
        run_id, technique_id = self._ids_of(body)
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
        return await self._run_response(run.run_id)

    async def list(self, request: Request) -> Response:
        limit, state, before = limit_of(request), state_of(request, RunState), key_of(request)

        def read(tx: Connection) -> RunPage:
            page = queries.run_page(tx, limit=limit, state=state, before=before)
            busy = queries.runs_with_work(tx, [run.run_id for run in page], self._handlers)
            runs = [to_run(run, finished=run.state in _OVER and run.run_id not in busy) for run in page]
            return RunPage(runs=runs, next_cursor=next_cursor(page, limit, queries.run_key))

        return json_response(await self._database.read(read))

    async def show(self, request: Request) -> Response:
        return await self._run_response(path_of(request, "run_id"))

    async def wait(self, request: Request) -> Response:
        run_id, seconds = path_of(request, "run_id"), timeout_of(request, default=30)
        finished = await until_finished(
            self._database,
            self._signals.changes,
            self._stopping,
            run_id,
            handlers=self._handlers,
            timeout_seconds=seconds,
        )
        if finished is False and self._stopping.is_set():
            raise unavailable("the service is stopping: send the request again when it is back")
        return await self._run_response(run_id)

    async def timeline(self, request: Request) -> Response:
        run_id = path_of(request, "run_id")

        def read(tx: Connection) -> TimelineView | None:
            details = queries.run_details(tx, run_id)
            if details is None:
                return None
            deliveries = queries.delivery_page(tx, limit=MOST_ROWS, run_id=run_id)
            return to_timeline(details, deliveries, queries.attempts_of_run(tx, run_id), self._handlers)

        timeline = await self._database.read(read)
        if timeline is None:
            raise not_found("run")
        run = self._with_hold(timeline.run)
        return json_response(timeline.model_copy(update={"run": run}))

    async def refresh(self, request: Request) -> Response:
        await read_body(request, RefreshBody)
        run_id = path_of(request, "run_id")
        await self._read_details(run_id)
        await self._intake.apply(ReadRequested(run_id, self._clock()))
        return await self._run_response(run_id, is_due=True)

    async def starts(self, request: Request) -> Response:
        limit, state, before = limit_of(request), state_of(request, StartState), key_of(request)
        key, prefix = (text_of(request, name, longest=LONGEST_KEY) for name in ("key", "prefix"))
        page = await self._database.read(
            lambda tx: queries.start_page(
                tx, limit=limit, state=state, key=key, prefix=prefix, before=before
            )
        )
        cursor = next_cursor(page, limit, queries.start_key)
        return json_response(StartPage(starts=[to_start(start) for start in page], next_cursor=cursor))

    async def resolve(self, request: Request) -> Response:
        body = await read_body(request, ResolveBody)
        token = path_of(request, "token")
        before = await self._starter.find(token)
        if before is None:
            raise not_found("start")
        if before.state is StartState.STARTED and before.run_id != body.run_id:
            message = f"this start made {before.run_id}: there is nothing to resolve"
            raise Refusal(HTTPStatus.CONFLICT, "already_started", message, start=to_start(before))
        if body.run_id is not None:
            run_id = body.run_id
            owner = await self._database.read(lambda tx: queries.run_details(tx, run_id))
            if owner is not None and owner.start is not None and owner.start.token != token:
                raise Refusal(HTTPStatus.CONFLICT, "run_taken", f"{run_id} is the run of another start")
        after = await self._starter.resolve(token, body.run_id)
        if after is None:
            raise not_found("start")
        return await self._run_of_start(after, status=HTTPStatus.OK, repeated=True)

    async def technique(self, request: Request) -> Response:
        workspace_id = text_of(request, "workspace_id", longest=LONGEST_ID) or ""
        found = await self._starter.find_technique(
            path_of(request, "technique_id"), workspace_id=workspace_id
        )
        return json_response(OneTechnique(technique=found))

    async def _start_response(self, start: Start, *, repeated: bool) -> Response:
        match start.state:
            case StartState.STARTED:
                status = HTTPStatus.OK if repeated else HTTPStatus.CREATED
                return await self._run_of_start(start, status=status, repeated=repeated)
            case StartState.ASKING:
                started = Started(start=to_start(start), run=None, repeated=repeated)
                return json_response(started, status=HTTPStatus.ACCEPTED)
            case StartState.REFUSED:
                raise start_refusal(start)
            case StartState.UNKNOWN:
                message = start.error_message or "the outcome is not known"
                raise Refusal(HTTPStatus.CONFLICT, "unknown_outcome", message, start=to_start(start))

    async def _run_of_start(self, start: Start, *, status: int, repeated: bool) -> Response:
        run_id = start.run_id or ""
        details = await self._database.read(lambda tx: queries.run_details(tx, run_id))
        run = None if details is None else to_full_run(details, self._handlers)
        return json_response(Started(start=to_start(start), run=run, repeated=repeated), status=status)

    async def _run_response(self, run_id: str, *, is_due: bool = False) -> Response:
        details = await self._read_details(run_id)
        run = self._with_hold(to_full_run(details, self._handlers), is_due=is_due)
        return json_response(OneRun(run=run))

    def _with_hold(self, run: RunView, *, is_due: bool = False) -> RunView:
        """Return a run with the reason why it is not read now, if there is one."""
        if run.settled and not is_due:
            return run
        held = self._find_hold(run.workspace_id)
        if held is None:
            return run
        return run.model_copy(update={"reads_held": HoldView(reason=held.reason, until=held.until)})

    async def _read_details(self, run_id: str) -> queries.RunDetails:
        details = await self._database.read(lambda tx: queries.run_details(tx, run_id))
        if details is None:
            raise not_found("run")
        return details

    def _ids_of(self, body: TrackBody) -> tuple[str, str | None]:
        """Return (run_id, technique_id) of the body or its poll_url, which is never fetched."""
        if body.poll_url is None:
            return body.run_id or "", body.technique_id
        if _origin(body.poll_url) != self._origin:
            message = "poll_url is not on FLORA's API: the API key is sent to [flora] base_url only"
            raise wrong_field("poll_url", message, code="foreign_poll_url")
        technique_id, run_id = ids_of_poll_url(body.poll_url)
        try:
            run_id = TrackBody(run_id=run_id or "").run_id
        except ValueError as error:
            raise wrong_field("poll_url", "poll_url does not end in the id of a run") from error
        for given, named, field in (
            (body.run_id, run_id, "run_id"),
            (body.technique_id, technique_id, "technique_id"),
        ):
            if given is not None and named is not None and given != named:
                raise wrong_field(field, f"{field} is not the one in poll_url")
        return run_id or "", body.technique_id or technique_id


def _start_request(body: StartBody, key: str) -> StartRequest:
    generate, callback_url, workspace_id = body.generate, body.callback_url, body.workspace_id
    if generate is not None:
        # FLORA's body may name a callback_url and a workspace of its own; ours take precedence.
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
        idempotency_key=key,
        metadata=body.metadata,
    )


def _origin(url: str) -> tuple[str, str, int | None]:
    """Return scheme, host and port; empty ones if the URL cannot be parsed or holds a password."""
    try:
        parts = urlsplit(url)
        if parts.username is not None or parts.password is not None:
            return "", "", None
        return (
            parts.scheme,
            parts.hostname or "",
            parts.port or {"https": 443, "http": 80}.get(parts.scheme),
        )
    except ValueError:
        return "", "", None
