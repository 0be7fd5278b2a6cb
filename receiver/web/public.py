"""The public listener: `POST /callbacks/flora`, `GET /healthz` and `GET /readyz`.

Callbacks are handled by plain ASGI: the objects and middleware that Starlette creates for a request
cost more than verifying the callback does. Starlette serves everything else. FLORA follows no
redirect, so the path is routed with and without a slash at its end.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from http import HTTPStatus
from typing import assert_never

from starlette.applications import Starlette
from starlette.datastructures import QueryParams
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from receiver.config.callback_url import CALLBACK_PATH
from receiver.errors import StoreUnavailableError
from receiver.flora.signature import HEADER
from receiver.intake.callbacks import Accepted, CallbackResult, Canary, Duplicate, Ignored, Intake, Refused
from receiver.telemetry import Metrics
from receiver.web.connections import MALFORMED
from receiver.web.forwarded import FORWARDED, make_remote_finder
from receiver.web.values import find_start_token

STATUS = {
    MALFORMED: 400,
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
"""The error codes of the public listener and the HTTP status of each."""

_RETRY_AFTER_SECONDS = 10
_CALLBACK_PATHS = frozenset({CALLBACK_PATH, CALLBACK_PATH + "/"})
_OTHER_METHODS = ("GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT")
_HEADER = HEADER.lower().encode()


def _constant_response(status: int, body: bytes) -> tuple[Message, Message]:
    """Return the two ASGI messages of a response that is always the same."""
    headers = [(b"content-length", str(len(body)).encode()), (b"content-type", b"application/json")]
    start = {"type": "http.response.start", "status": status, "headers": headers}
    return start, {"type": "http.response.body", "body": body}


_SUCCESS = {
    name: _constant_response(HTTPStatus.OK, b'{"status":"%s"}' % name.encode())
    for name in ("accepted", "duplicate", "ignored", "canary")
} | {
    "disconnected": _constant_response(
        HTTPStatus.BAD_REQUEST, b""
    )  # the sender is gone and does not read it
}


class CallbackEndpoint:
    """An ASGI app that handles callbacks and passes every other request to `rest`."""

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
        self._bodies = _BodyReader(body_timeout_seconds)
        self._find_remote = make_remote_finder(trusted_proxies)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in _CALLBACK_PATHS or scope["method"] != "POST":
            await self._rest(scope, receive, send)
            return
        started = time.perf_counter()
        result = await self._handle(scope, receive)
        if isinstance(result, Refused):
            await refuse(result.code, result.message)(scope, receive, send)
        else:
            for message in _SUCCESS[result]:
                await send(message)
        name = result.code if isinstance(result, Refused) else result
        self._metrics.count_response(name, time.perf_counter() - started)

    async def _handle(self, scope: Scope, receive: Receive) -> str | Refused:
        """Return the result of one callback: a key of `_SUCCESS`, or a refusal."""
        announced, signatures, forwarded = 0, [], None
        for name, value in scope["headers"]:
            if name == _HEADER:
                signatures.append(value.decode("latin-1"))
            elif name == b"content-length" and value.isdigit():
                announced = int(value[:18])
            elif name == FORWARDED:
                forwarded = value if forwarded is None else b"%s,%s" % (forwarded, value)
        remote = self._find_remote(scope["client"][0] if scope["client"] else None, forwarded)
        intake, limit = self._intake, self._limit
        body: bytes | None = None
        if announced <= limit:
            try:
                body = await self._bodies.read(receive, limit)
            except TimeoutError:
                return intake.refuse(
                    "body_timeout", "the body did not arrive in time", remote=remote, size=0
                )
            except ClientDisconnect:
                return "disconnected"
        if body is None:
            message = f"a callback has at most {limit} bytes"
            return intake.refuse("body_too_large", message, remote=remote, size=limit)
        query = scope["query_string"]
        start = find_start_token(QueryParams(query).get("start")) if query else None
        try:
            # FLORA sends one such header. Two are joined, and malformed: they hold two times.
            result = await intake.accept(body, ",".join(signatures) or None, remote=remote, start=start)
        except StoreUnavailableError as error:
            return Refused("unavailable", f"{error}; nothing was committed, please retry")
        return _result_name(result)


def _result_name(result: CallbackResult) -> str | Refused:
    match result:
        case Accepted():
            return "accepted"
        case Duplicate():
            return "duplicate"
        case Ignored():
            return "ignored"
        case Canary():
            return "canary"
        case Refused():
            return result
    assert_never(result)


class _BodyReader:
    """Reads bodies, each within `seconds`. They share one timer: one for each would cost 3 us."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._due: dict[asyncio.Task[object], float] = {}
        """The tasks that are reading and the loop time at which each is late, in that order."""
        self._late: set[asyncio.Task[object]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def read(self, receive: Receive, limit: int) -> bytes | None:
        """Return the body, or None if it has more than `limit` bytes.

        Raises TimeoutError, ClientDisconnect.
        """
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None, "a coroutine runs in a task"
        self._due[task] = due = loop.time() + self._seconds
        if self._timer is None:
            self._timer = loop.call_at(due, self._cancel_late, loop)
        try:
            return await _read_body(receive, limit)
        except asyncio.CancelledError:
            if task in self._late and not task.uncancel():
                raise TimeoutError from None
            raise
        finally:
            self._due.pop(task, None)
            self._late.discard(task)

    def _cancel_late(self, loop: asyncio.AbstractEventLoop) -> None:
        """Cancel the tasks that are late, and set the timer for the next one."""
        self._timer = None
        while self._due:
            task, due = next(iter(self._due.items()))
            if due > loop.time():
                self._timer = loop.call_at(due, self._cancel_late, loop)
                return
            del self._due[task]
            self._late.add(task)
            task.cancel()


async def _read_body(receive: Receive, limit: int) -> bytes | None:
    """Return the body, or None as soon as more than `limit` bytes have come."""
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
            return b"".join(pieces)  # a single piece is returned without a copy


def public_app(
    intake: Intake,
    metrics: Metrics,
    *,
    ready: Callable[[], Awaitable[str | None]],
    max_body_bytes: int = 65_536,
    body_timeout_seconds: float = 10.0,
    trusted_proxies: Sequence[str] = (),
) -> ASGIApp:
    """Return the app. `ready` returns None, or why this process should get no traffic."""

    async def healthz(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def readyz(_: Request) -> Response:
        reason = await ready()
        return JSONResponse({"status": "ready"}) if reason is None else refuse("unavailable", reason)

    async def reject_method(request: Request) -> Response:
        return refuse("method_not_allowed", f"{request.method} is not allowed here", {"Allow": "POST"})

    rest = Starlette(
        routes=[
            *(Route(path, reject_method, methods=_OTHER_METHODS) for path in sorted(_CALLBACK_PATHS)),
            Route("/healthz", healthz),
            Route("/readyz", readyz),
        ],
        exception_handlers={HTTPException: _handle_http_error},
    )
    rest.router.redirect_slashes = False
    return CallbackEndpoint(
        intake,
        metrics,
        rest,
        max_body_bytes=max_body_bytes,
        body_timeout_seconds=body_timeout_seconds,
        trusted_proxies=trusted_proxies,
    )


def refuse(code: str, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """Return the response `{"error": {"code", "message"}}` with the status of the code."""
    status = STATUS[code]
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers = {"Retry-After": str(_RETRY_AFTER_SECONDS)}
    return JSONResponse({"error": {"code": code, "message": message}}, status_code=status, headers=headers)


async def _handle_http_error(request: Request, error: Exception) -> Response:
    """Respond to unknown paths and methods in JSON."""
    if isinstance(error, HTTPException) and error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        response = refuse("method_not_allowed", f"{request.method} is not allowed here")
        response.headers.update(error.headers or {})
        return response
    return refuse("not_found", f"there is nothing here: callbacks go to POST {CALLBACK_PATH}")
