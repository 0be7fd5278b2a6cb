"""Responses of the operations listener: JSON, refusals as `{"error": {"code", "message", …}}`."""

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from receiver.client import messages
from receiver.client.messages import Message, Refused
from receiver.errors import FloraError, ReceiverError
from receiver.model import Start
from receiver.net.scrubber import mask
from receiver.web.ops.views import to_start

_PASSED_ON = frozenset({400, 402, 403, 404, 409, 422})
"""Statuses of FLORA's refusals that concern the caller, who gets the same status."""
_RETRY_AFTER_SECONDS = 5


class Refusal(HTTPException):
    """Raised by an endpoint to refuse a request; `start` and the key are sent beside the error."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        fields: Sequence[tuple[str, str]] = (),
        request_id: str | None = None,
        headers: Mapping[str, str] | None = None,
        start: messages.Start | None = None,
        idempotency_key: str | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.code = code
        self.message = message
        self.fields = tuple(fields)
        self.request_id = request_id
        self.start = start
        self.idempotency_key = idempotency_key

    def response(self) -> Response:
        """Return the refusal as it is sent; parts that are empty are left out."""
        fields = [(field, mask(message)) for field, message in self.fields]
        given = {"fields": fields, "request_id": self.request_id}
        error = {
            "code": self.code,
            "message": mask(self.message),
            **{name: part for name, part in given.items() if part},
        }
        beside = {"start": self.start, "idempotency_key": self.idempotency_key}
        refused = {"error": error, **{name: part for name, part in beside.items() if part is not None}}
        return json_response(Refused.model_validate(refused), status=self.status_code, headers=self.headers)


def json_response(
    data: Message | Mapping[str, Any],
    *,
    status: int = HTTPStatus.OK,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Return a JSON response that no cache keeps."""
    content = data.to_json() if isinstance(data, Message) else data
    return JSONResponse(
        content, status_code=status, headers={"Cache-Control": "no-store", **(headers or {})}
    )


def not_found(what: str) -> Refusal:
    """Return the refusal of a request that names something the ledger does not hold."""
    return Refusal(HTTPStatus.NOT_FOUND, "not_found", f"there is no such {what} in the ledger")


def wrong_field(field: str, message: str, *, code: str = "invalid_request") -> Refusal:
    """Return the refusal of one field; `message` is a whole sentence."""
    return Refusal(HTTPStatus.BAD_REQUEST, code, message, fields=[(field, message)])


def unavailable(reason: str) -> Refusal:
    """Return the refusal of a request that may succeed a little later."""
    return Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "unavailable", reason, headers={"Retry-After": "1"})


def flora_refusal(error: FloraError, *, start: messages.Start | None = None) -> Refusal:
    """Return FLORA's refusal as one of this API; its status stays if it concerns the caller."""
    status, code, message = error.status, error.code or "flora_refused", str(error)
    headers: dict[str, str] = {}
    if status not in _PASSED_ON:
        if status == HTTPStatus.UNAUTHORIZED:
            status, code = HTTPStatus.BAD_GATEWAY, "flora_unauthorized"
            message = f"FLORA does not accept this service's API key ({message}): check FLORA_API_KEY"
        elif status is None or status == HTTPStatus.TOO_MANY_REQUESTS or status >= 500:
            code = "flora_rate_limited" if status == HTTPStatus.TOO_MANY_REQUESTS else "flora_unavailable"
            status = HTTPStatus.SERVICE_UNAVAILABLE
            headers["Retry-After"] = str(round(error.retry_after or _RETRY_AFTER_SECONDS))
        else:
            status = HTTPStatus.BAD_GATEWAY
    return Refusal(
        status,
        code,
        message,
        fields=error.fields,
        request_id=error.request_id,
        headers=headers,
        start=start,
    )


def start_refusal(start: Start) -> Refusal:
    """Return the refusal of a start that FLORA refused."""
    message = start.error_message or "FLORA refused to start the run"
    if start.error_status is None:
        return Refusal(HTTPStatus.CONFLICT, start.error_code or "refused", message, start=to_start(start))
    error = FloraError(
        message,
        status=start.error_status,
        code=start.error_code,
        fields=start.error_fields,
        request_id=start.request_id,
    )
    return flora_refusal(error, start=to_start(start))


async def handle_http_error(request: Request, error: Exception) -> Response:
    """Send refusals, and Starlette's own 404 and 405, as JSON."""
    if isinstance(error, Refusal):
        return error.response()
    status = error.status_code if isinstance(error, HTTPException) else HTTPStatus.INTERNAL_SERVER_ERROR
    headers = error.headers if isinstance(error, HTTPException) else None
    match status:
        case HTTPStatus.NOT_FOUND:
            refusal = Refusal(status, "not_found", "there is nothing here: see /api/openapi.json")
        case HTTPStatus.METHOD_NOT_ALLOWED:
            refusal = Refusal(
                status, "method_not_allowed", f"{request.method} is not allowed here", headers=headers
            )
        case _:
            refusal = Refusal(status, "refused", "the request cannot be carried out", headers=headers)
    return refusal.response()


async def handle_receiver_error(request: Request, error: Exception) -> Response:
    """Send FLORA's refusals as such, and other errors of the service as `unavailable`."""
    if isinstance(error, FloraError):
        return flora_refusal(error).response()
    reason = str(error) if isinstance(error, ReceiverError) else "the service cannot do this now"
    return _add_key(unavailable(reason), request).response()


async def handle_bug(request: Request, error: Exception) -> Response:
    """Send 500 for an error that was not foreseen; the server logs it."""
    message = f"a bug in flora-receiver: {type(error).__name__}, see its log"
    return _add_key(
        Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, "internal_error", message), request
    ).response()


def remember_key(request: Request, key: str) -> None:
    """Have a failure of this request name the idempotency key that repeats it safely."""
    request.state.idempotency_key = key


def _add_key(refusal: Refusal, request: Request) -> Refusal:
    refusal.idempotency_key = getattr(request.state, "idempotency_key", None)
    if refusal.idempotency_key is not None:
        refusal.message += "; a run may have been started: send this again with the idempotency_key"
    return refusal
