"""The gate around every API endpoint: the key, the faults, the refusals and the `request-id`."""

import asyncio
import hmac
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.types import Receive, Scope, Send

from receiver.emulator.faults import (
    Family,
    Fault,
    FaultBook,
    InvalidFaultError,
    parse_faults,
    retry_after_headers,
)
from receiver.emulator.problems import ApiProblem, Field, invalid_input
from receiver.emulator.runs import RunBook

__all__ = ["FAULTS_HEADER", "Endpoint", "Gate", "json_body", "requested_faults"]

FAULTS_HEADER = "emulator-faults"

Endpoint = Callable[[Request], Awaitable[Response]]

_REFUSALS = {
    "internal_error": (500, "internal_error", "Internal server error"),
    "service_unavailable": (503, "service_unavailable", "Service unavailable"),
    "unauthorized": (401, "unauthorized", "Authentication required"),
    "not_found": (404, "not_found", "Not found"),
    "insufficient_credits": (402, "insufficient_credits", "Not enough credits"),
}
_GARBAGE = "<!doctype html><html><head><title>502 Bad Gateway</title></head><body><center>nginx</center></body></html>"


class Gate:
    """Wraps endpoints. `requests` counts requests by method and route."""

    def __init__(self, api_key: str, faults: FaultBook, runs: RunBook) -> None:
        self.requests: Counter[str] = Counter()
        self._api_key = api_key
        self._faults = faults
        self._runs = runs

    def __call__(self, endpoint: Endpoint) -> Endpoint:
        async def handle(request: Request) -> Response:
            try:
                return self.stamp(await self._handle(request, endpoint))
            except ApiProblem as problem:
                return self.stamp(problem.response())

        return handle

    def stamp(self, response: Response) -> Response:
        """Add a `request-id` to a response."""
        response.headers["request-id"] = self._runs.new_id("req")
        return response

    async def _handle(self, request: Request, endpoint: Endpoint) -> Response:
        self.requests[f"{request.method} {request.scope['route'].path}"] += 1
        faults = (
            *(fault for fault in requested_faults(request) if fault.family is Family.API),
            *self._faults.take(
                Family.API,
                run_id=request.path_params.get("run_id"),
                path=request.url.path,
                method=request.method,
            ),
        )
        for fault in faults:
            if fault.kind == "slow":
                await asyncio.sleep(fault.number("seconds"))
        for fault in faults:
            if (replacement := _replacement(fault)) is not None:
                return replacement
        self._authorize(request)
        response = await endpoint(request)
        return _spoil(response, faults)

    def _authorize(self, request: Request) -> None:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise ApiProblem(
                401, "unauthorized", "Authentication required: send Authorization: Bearer <API key>"
            )
        if not hmac.compare_digest(key.strip().encode(), self._api_key.encode()):
            raise ApiProblem(401, "invalid_api_key", "Invalid API key")


def _replacement(fault: Fault) -> Response | None:
    """Return the response that a fault gives in place of the endpoint's, or None."""
    if fault.kind in _REFUSALS:
        return ApiProblem(*_REFUSALS[fault.kind]).response()
    if fault.kind == "rate_limited":
        headers = retry_after_headers(fault, datetime.now(UTC))
        return ApiProblem(429, "rate_limited", "Too many requests", headers=headers).response()
    if fault.kind == "html":
        return HTMLResponse(_GARBAGE, status_code=int(fault.number("status")))
    return None


def _spoil(response: Response, faults: Sequence[Fault]) -> Response:
    for fault in faults:
        if fault.kind == "truncated_json":
            half = bytes(response.body)[: len(response.body) // 2]
            return Response(half, response.status_code, media_type="application/json")
        if fault.kind == "cut_answer":
            return _CutResponse(response.body, response.status_code, media_type="application/json")
    return response


class _CutResponse(Response):
    """A response that announces its whole body and sends half of it.

    The server then closes the connection.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        half = bytes(self.body)[: len(self.body) // 2]
        await send({"type": "http.response.body", "body": half, "more_body": True})


def requested_faults(request: Request) -> tuple[Fault, ...]:
    """Return the faults in the `Emulator-Faults` header of a request."""
    header = request.headers.get(FAULTS_HEADER)
    if header is None:
        return ()
    try:
        return parse_faults(json.loads(header))
    except InvalidFaultError as error:
        raise invalid_input(Field(FAULTS_HEADER, str(error))) from error
    except ValueError as error:
        raise invalid_input(Field(FAULTS_HEADER, "must be JSON")) from error


async def json_body(request: Request) -> dict[str, object]:
    """Return the JSON object in the body. Raises ApiProblem as FLORA refuses other bodies."""
    try:
        body: object = json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise ApiProblem(400, "invalid_json", "The request body is not valid JSON") from error
    if not isinstance(body, dict):
        raise invalid_input(Field("body", "must be a JSON object"))
    return body
