"""The public listener: `POST /callbacks/flora`, `GET /healthz`, `GET /readyz`, and nothing else.

Bytes in, the intake's answer out as HTTP. FLORA follows no redirect, so both spellings of the path are routed.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import assert_never

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from receiver.errors import StoreUnavailableError
from receiver.flora.signature import HEADER
from receiver.intake import Accepted, Duplicate, Ignored, Intake, Refused
from receiver.telemetry import Metrics

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


def public_app(
    intake: Intake,
    metrics: Metrics,
    *,
    ready: Callable[[], Awaitable[str | None]],
    max_body_bytes: int = 65_536,
    body_timeout_seconds: float = 10.0,
) -> Starlette:
    """Build the app. `ready` returns None, or why this process should get no traffic."""

    async def callback(request: Request) -> Response:
        started = time.perf_counter()
        response, result = await _callback(request, intake, max_body_bytes, body_timeout_seconds)
        metrics.answered(result, time.perf_counter() - started)
        return response

    async def healthz(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def readyz(_: Request) -> Response:
        reason = await ready()
        return JSONResponse({"status": "ready"}) if reason is None else refusal("unavailable", reason)

    app = Starlette(
        routes=[
            Route(CALLBACK_PATH, callback, methods=["POST"]),
            Route(CALLBACK_PATH + "/", callback, methods=["POST"]),
            Route("/healthz", healthz),
            Route("/readyz", readyz),
        ],
        exception_handlers={HTTPException: _http_error},
    )
    app.router.redirect_slashes = False
    return app


async def _callback(request: Request, intake: Intake, limit: int, timeout_seconds: float) -> tuple[Response, str]:
    """Return the answer to one callback, and its name for the metrics."""
    remote = request.client.host if request.client else None
    try:
        async with asyncio.timeout(timeout_seconds):
            body = await _body(request, limit)
    except TimeoutError:
        return _refused(intake.refuse("body_timeout", "the body did not arrive in time", remote=remote, size=0))
    except ClientDisconnect:
        return Response(status_code=400), "disconnected"  # nobody is there to read it
    if body is None:
        message = f"a callback has at most {limit} bytes"
        return _refused(intake.refuse("body_too_large", message, remote=remote, size=limit))
    # Two headers of this name are one that FLORA never wrote: joined, they hold two times and are refused as malformed.
    signatures = request.headers.getlist(HEADER)
    try:
        signature = ",".join(signatures) if signatures else None
        answer = await intake.accept(body, signature, remote=remote, start=request.query_params.get("start"))
    except StoreUnavailableError as error:
        return refusal("unavailable", f"{error}; nothing was committed, please retry"), "unavailable"
    match answer:
        case Accepted():
            return JSONResponse({"status": "accepted"}), "accepted"
        case Duplicate():
            return JSONResponse({"status": "duplicate"}), "duplicate"
        case Ignored():
            return JSONResponse({"status": "ignored"}), "ignored"
        case Refused():
            return _refused(answer)
    assert_never(answer)


async def _body(request: Request, limit: int) -> bytes | None:
    """Return the body, or None as soon as it turns out to be longer than `limit` bytes."""
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:18]) > limit:
        return None
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            return None
    return bytes(body)


def _refused(answer: Refused) -> tuple[Response, str]:
    return refusal(answer.code, answer.message), answer.code


def refusal(code: str, message: str) -> Response:
    """Return `{"error": {"code", "message"}}` with the code's status."""
    status = STATUS[code]
    headers = {"Retry-After": str(_RETRY_AFTER_SECONDS)} if status == 503 else None  # noqa: PLR2004
    return JSONResponse({"error": {"code": code, "message": message}}, status_code=status, headers=headers)


async def _http_error(request: Request, error: Exception) -> Response:
    """Answer unknown paths and methods in our JSON too."""
    if isinstance(error, HTTPException) and error.status_code == 405:  # noqa: PLR2004
        response = refusal("method_not_allowed", f"{request.method} is not allowed here")
        response.headers.update(error.headers or {})
        return response
    return refusal("not_found", f"there is nothing here: callbacks go to POST {CALLBACK_PATH}")
