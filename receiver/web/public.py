"""The public listener: `POST /callbacks/flora`, `GET /healthz`, `GET /readyz`, and nothing else.

Bytes in, the intake's answer out as HTTP. FLORA follows no redirect, so both spellings of the path are routed. A callback
is answered by plain ASGI, without the objects and the middleware that Starlette makes for each request: they cost more
than verifying the callback does. Everything else is Starlette's.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import assert_never

from starlette.applications import Starlette
from starlette.datastructures import QueryParams
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from receiver.errors import StoreUnavailableError
from receiver.flora.signature import HEADER
from receiver.intake.callbacks import Accepted, Answer, Canary, Duplicate, Ignored, Intake, Refused
from receiver.telemetry import Metrics
from receiver.web.forwarded import FORWARDED, tells_remote

CALLBACK_PATH = "/callbacks/flora"

STATUS = {
    "malformed_signature": 400,
    "invalid_payload": 400,
    "missing_signature": 401,
    "signature_mismatch": 401,
    "timestamp_out_of_tolerance": 401,
    "workspace_mismatch": 401,
    "not_found": 404,
    "method_not_allowed": 405,
    "body_timeout": 408,
    "body_too_large": 413,
    "unavailable": 503,
}
"""Every code that the public listener refuses with, and its HTTP status."""

_RETRY_AFTER_SECONDS = 10
_CALLBACK_PATHS = frozenset({CALLBACK_PATH, CALLBACK_PATH + "/"})
_OTHER_METHODS = ("GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT")
_HEADER = HEADER.lower().encode()


def _whole(status: int, body: bytes) -> tuple[Message, Message]:
    """Return the two messages of an answer that is the same every time."""
    headers = [(b"content-length", str(len(body)).encode()), (b"content-type", b"application/json")]
    start = {"type": "http.response.start", "status": status, "headers": headers}
    return start, {"type": "http.response.body", "body": body}


_GOOD = {
    word: _whole(200, b'{"status":"%s"}' % word.encode()) for word in ("accepted", "duplicate", "ignored", "canary")
} | {
    "disconnected": _whole(400, b"")  # nobody is there to read it
}


class Door:
    """An ASGI app: callbacks are its own business, the rest is handed on."""

    def __init__(
        self,
        intake: Intake,
        metrics: Metrics,
        rest: ASGIApp,
        *,
        max_body_bytes: int,
        body_timeout_seconds: float,
        trusted_proxies: Sequence[str] = (),
    ) -> None:
        self._intake = intake
        self._metrics = metrics
        self._rest = rest
        self._limit = max_body_bytes
        self._bodies = _Bodies(body_timeout_seconds)
        self._remote = tells_remote(trusted_proxies)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in _CALLBACK_PATHS or scope["method"] != "POST":
            await self._rest(scope, receive, send)
            return
        started = time.perf_counter()
        answer = await self._callback(scope, receive)
        if isinstance(answer, Refused):
            await refusal(answer.code, answer.message)(scope, receive, send)
        else:
            for message in _GOOD[answer]:
                await send(message)
        result = answer.code if isinstance(answer, Refused) else answer
        self._metrics.count_response(result, time.perf_counter() - started)

    async def _callback(self, scope: Scope, receive: Receive) -> str | Refused:
        """Return the answer to one callback: a word of `_GOOD`, or a refusal."""
        announced, signatures, forwarded = 0, [], None
        for name, value in scope["headers"]:
            if name == _HEADER:
                signatures.append(value.decode("latin-1"))
            elif name == b"content-length" and value.isdigit():
                announced = int(value[:18])
            elif name == FORWARDED:
                forwarded = value if forwarded is None else b"%s,%s" % (forwarded, value)
        remote = self._remote(scope["client"][0] if scope["client"] else None, forwarded)
        intake, limit = self._intake, self._limit
        body: bytes | None = None
        if announced <= limit:
            try:
                body = await self._bodies.read(receive, limit)
            except TimeoutError:
                return intake.refuse("body_timeout", "the body did not arrive in time", remote=remote, size=0)
            except ClientDisconnect:
                return "disconnected"
        if body is None:
            message = f"a callback has at most {limit} bytes"
            return intake.refuse("body_too_large", message, remote=remote, size=limit)
        query = scope["query_string"]
        start = QueryParams(query).get("start") if query else None
        try:
            # Two headers of this name are one that FLORA never wrote: joined, they hold two times: malformed.
            answer = await intake.accept(body, ",".join(signatures) or None, remote=remote, start=start)
        except StoreUnavailableError as error:
            return Refused("unavailable", f"{error}; nothing was committed, please retry")
        return _word(answer)


def _word(answer: Answer) -> str | Refused:
    match answer:
        case Accepted():
            return "accepted"
        case Duplicate():
            return "duplicate"
        case Ignored():
            return "ignored"
        case Canary():
            return "canary"
        case Refused():
            return answer
    assert_never(answer)


class _Bodies:
    """Reads bodies, none for longer than `seconds`. One timer looks after all of them: a timer each costs 3 us."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._due: dict[asyncio.Task[object], float] = {}
        """Who is reading, and until when; in that order."""
        self._late: set[asyncio.Task[object]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def read(self, receive: Receive, limit: int) -> bytes | None:
        """Return the body, or None if it is longer than `limit` bytes. Raises TimeoutError, ClientDisconnect."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None, "a coroutine runs in a task"
        self._due[task] = due = loop.time() + self._seconds
        if self._timer is None:
            self._timer = loop.call_at(due, self._look, loop)
        try:
            return await _body(receive, limit)
        except asyncio.CancelledError:
            if task in self._late and not task.uncancel():
                raise TimeoutError from None
            raise
        finally:
            self._due.pop(task, None)
            self._late.discard(task)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        """Interrupt who is late, and come back for the next."""
        self._timer = None
        while self._due:
            task, due = next(iter(self._due.items()))
            if due > loop.time():
                self._timer = loop.call_at(due, self._look, loop)
                return
            del self._due[task]
            self._late.add(task)
            task.cancel()


async def _body(receive: Receive, limit: int) -> bytes | None:
    """Return the body, or None as soon as it turns out to be longer than `limit` bytes."""
    pieces: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        piece = message.get("body", b"")
        size += len(piece)
        if size > limit:
            return None
        pieces.append(piece)
        if not message.get("more_body", False):
            return b"".join(pieces)  # of a single piece, that piece itself


def public_app(
    intake: Intake,
    metrics: Metrics,
    *,
    ready: Callable[[], Awaitable[str | None]],
    max_body_bytes: int = 65_536,
    body_timeout_seconds: float = 10.0,
    trusted_proxies: Sequence[str] = (),
) -> ASGIApp:
    """Build the app. `ready` returns None, or why this process should get no traffic."""

    async def healthz(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def readyz(_: Request) -> Response:
        reason = await ready()
        return JSONResponse({"status": "ready"}) if reason is None else refusal("unavailable", reason)

    async def not_a_post(request: Request) -> Response:
        return refusal("method_not_allowed", f"{request.method} is not allowed here", {"Allow": "POST"})

    rest = Starlette(
        routes=[
            *(Route(path, not_a_post, methods=_OTHER_METHODS) for path in sorted(_CALLBACK_PATHS)),
            Route("/healthz", healthz),
            Route("/readyz", readyz),
        ],
        exception_handlers={HTTPException: _http_error},
    )
    rest.router.redirect_slashes = False
    return Door(
        intake,
        metrics,
        rest,
        max_body_bytes=max_body_bytes,
        body_timeout_seconds=body_timeout_seconds,
        trusted_proxies=trusted_proxies,
    )


def refusal(code: str, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """Return `{"error": {"code", "message"}}` with the code's status."""
    status = STATUS[code]
    if status == 503:
        headers = {"Retry-After": str(_RETRY_AFTER_SECONDS)}
    return JSONResponse({"error": {"code": code, "message": message}}, status_code=status, headers=headers)


async def _http_error(request: Request, error: Exception) -> Response:
    """Answer unknown paths and methods in our JSON too."""
    if isinstance(error, HTTPException) and error.status_code == 405:
        response = refusal("method_not_allowed", f"{request.method} is not allowed here")
        response.headers.update(error.headers or {})
        return response
    return refusal("not_found", f"there is nothing here: callbacks go to POST {CALLBACK_PATH}")
