"""How the operations listener answers: JSON; a refusal is `{"error": {"code", "message", "fields"?, "request_id"?}}`."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from receiver.errors import FloraError, ReceiverError
from receiver.model import Start

PASSED_ON = (400, 402, 403, 404, 409, 422)
"""FLORA's refusals that are the caller's business: the same status here."""
_RETRY_AFTER_SECONDS = 5


class Refusal(HTTPException):
    """Raised inside an endpoint, caught at its edge: why the request is not carried out."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        fields: Sequence[tuple[str, str]] = (),
        request_id: str | None = None,
        headers: Mapping[str, str] | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.code = code
        self.message = message
        self.fields = tuple(fields)
        self.request_id = request_id
        self.more = dict(more or {})

    def response(self) -> Response:
        error: dict[str, Any] = {"code": self.code, "message": self.message}
        if self.fields:
            error["fields"] = [{"field": field, "message": message} for field, message in self.fields]
        if self.request_id is not None:
            error["request_id"] = self.request_id
        return answered({"error": error, **self.more}, status=self.status_code, headers=self.headers)


def answered(data: Mapping[str, Any], *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a JSON answer that no cache keeps."""
    return JSONResponse(data, status_code=status, headers={"Cache-Control": "no-store", **(headers or {})})


def not_found(what: str) -> Refusal:
    return Refusal(404, "not_found", f"there is no such {what} in the ledger")


def unavailable(reason: str) -> Refusal:
    """Return the answer for what may work a little later."""
    return Refusal(503, "unavailable", reason, headers={"Retry-After": "1"})


def flora_refusal(error: FloraError, *, more: Mapping[str, Any] | None = None) -> Refusal:
    """Return FLORA's refusal as ours: its status, code, fields and request-id, where they concern the caller."""
    return _flora_refusal(
        error.status, error.code, str(error), error.fields, error.request_id, error.retry_after, more=more
    )


def start_refusal(start: Start, *, more: Mapping[str, Any]) -> Refusal:
    """Return the refusal that a start met with."""
    message = start.error_message or "FLORA refused to start the run"
    if start.error_status is None:
        return Refusal(409, start.error_code or "refused", message, more=more)
    return _flora_refusal(
        start.error_status, start.error_code, message, start.error_fields, start.request_id, None, more=more
    )


def _flora_refusal(
    status: int | None,
    code: str | None,
    message: str,
    fields: Sequence[tuple[str, str]],
    request_id: str | None,
    retry_after: float | None,
    *,
    more: Mapping[str, Any] | None,
) -> Refusal:
    headers: dict[str, str] = {}
    if status in PASSED_ON:
        ours, code = status, code or "flora_refused"
    elif status == 401:
        ours, code = 502, "flora_unauthorized"
        message = f"FLORA does not take this service's API key ({message}): check FLORA_API_KEY"
    elif status is None or status == 429 or status >= 500:
        ours, code = 503, "flora_rate_limited" if status == 429 else "flora_unavailable"
        headers["Retry-After"] = str(round(retry_after or _RETRY_AFTER_SECONDS))
    else:
        ours, code = 502, code or "flora_refused"
    return Refusal(ours, code, message, fields=fields, request_id=request_id, headers=headers, more=more)


async def on_http_error(request: Request, error: Exception) -> Response:
    """Answer refusals, and Starlette's own 404 and 405, in our JSON."""
    if isinstance(error, Refusal):
        return error.response()
    status = error.status_code if isinstance(error, HTTPException) else 500
    headers = error.headers if isinstance(error, HTTPException) else None
    match status:
        case 404:
            refusal = Refusal(404, "not_found", "there is nothing here: see /api/openapi.json")
        case 405:
            refusal = Refusal(405, "method_not_allowed", f"{request.method} is not allowed here", headers=headers)
        case _:
            refusal = Refusal(status, "refused", "the request cannot be carried out", headers=headers)
    return refusal.response()


async def on_trouble(_: Request, error: Exception) -> Response:
    """Answer our own errors: FLORA's refusals as such, everything else as `unavailable`."""
    if isinstance(error, FloraError):
        return flora_refusal(error).response()
    reason = str(error) if isinstance(error, ReceiverError) else "the service cannot do this now"
    return unavailable(reason).response()


async def on_bug(_: Request, error: Exception) -> Response:
    """Answer what we did not foresee; the server logs it."""
    return Refusal(500, "internal_error", f"a bug in flora-receiver: {type(error).__name__}, see its log").response()


def parsed(body: bytes) -> dict[str, Any]:
    """Return the JSON object in a body, fit to be stored, or raise Refusal."""
    try:
        found = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
        json.dumps(found, ensure_ascii=False).encode()  # a lone surrogate is JSON, but cannot be stored
    except (ValueError, RecursionError) as error:
        raise Refusal(400, "invalid_json", f"the body is not JSON: {type(error).__name__}") from error
    if not isinstance(found, dict):
        raise Refusal(400, "invalid_json", "the body is not a JSON object")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
