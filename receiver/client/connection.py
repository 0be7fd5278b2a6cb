"""The HTTP side of `ReceiverClient`: requests with the token, paging, and errors as ReceiverApiError."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx
from pydantic import ValidationError

from receiver.client.messages import ErrorView, Message, Refused
from receiver.errors import ReceiverApiError
from receiver.net.clients import operations_client
from receiver.net.credentials import find_fault

DEFAULT_URL = "http://127.0.0.1:8081"
TOKEN_FILE = Path("var/ops-token")

T = TypeVar("T", bound=Message)


class Connection:
    """A connection pool to one service."""

    def __init__(
        self, url: str | None, token: str | None, *, timeout_seconds: float, ca: Path | None
    ) -> None:
        self.url = (url or os.environ.get("RECEIVER_OPS_URL") or DEFAULT_URL).rstrip("/")
        self._timeout_seconds = timeout_seconds
        token = token or _find_token()
        if token and (fault := find_fault(token)) is not None:
            raise ReceiverApiError(f"the token of the operations API {fault}", code="unusable_token")
        try:
            self.http = operations_client(self.url, token, timeout_seconds=timeout_seconds, ca=ca)
        except (ValueError, OSError, httpx.InvalidURL) as error:
            raise ReceiverApiError(f"{self.url} cannot be used: {error}", code="unusable_url") from error

    def get(self, path: str, *, timeout: str | None = None, **params: str | None) -> dict[str, Any]:
        """Return the JSON at a path; `timeout` is a parameter that lets the service wait that long."""
        given = {
            name: value for name, value in (*params.items(), ("timeout", timeout)) if value is not None
        }
        return self._call(self.http.build_request("GET", path, params=given), float(timeout or 0))

    def post(self, path: str, body: Mapping[str, Any], *, wait_seconds: float = 0.0) -> dict[str, Any]:
        """Send a body and return the JSON of the response, for which the service may wait."""
        return self._call(self.http.build_request("POST", path, json=body), wait_seconds)

    def pages(self, path: str, name: str, limit: int, **params: str | None) -> Iterator[Any]:
        """Yield the rows of every page of a list."""
        cursor: str | None = None
        while True:
            page = self.get(path, limit=str(limit), cursor=cursor, **params)
            yield from page[name]
            if page.get("next_cursor") in {None, cursor}:
                return
            cursor = page["next_cursor"]

    @contextmanager
    def stream(self, path: str) -> Iterator[httpx.Response]:
        """Open a stream of server-sent events that may be quiet for any time."""
        request = self.http.build_request("GET", path, headers={"Accept": "text/event-stream"})
        request.extensions["timeout"] = {**request.extensions["timeout"], "read": None}
        response = self._send(request, stream=True)
        try:
            if not response.is_success:
                response.read()
                raise _to_error(response)
            yield response
        finally:
            response.close()

    def validate(self, model: type[T], data: Any) -> T:
        """Return a response's JSON as a message."""
        try:
            return model.model_validate(data)
        except ValidationError as error:
            raise self._not_a_receiver() from error

    def _call(self, request: httpx.Request, wait_seconds: float) -> dict[str, Any]:
        timeouts = request.extensions["timeout"]
        request.extensions["timeout"] = {**timeouts, "read": self._timeout_seconds + wait_seconds}
        response = self._send(request)
        if not response.is_success:
            raise _to_error(response)
        try:
            data: dict[str, Any] = response.json()
        except ValueError as error:
            raise self._not_a_receiver() from error
        return data

    def _send(self, request: httpx.Request, *, stream: bool = False) -> httpx.Response:
        try:
            return self.http.send(request, stream=stream)
        except httpx.TransportError as error:
            raise ReceiverApiError(
                f"no response from {self.url} ({type(error).__name__}): is the service running? "
                "Start it with `flora-receiver serve`, or set RECEIVER_OPS_URL to its operations address",
                code="unreachable",
            ) from error

    def _not_a_receiver(self) -> ReceiverApiError:
        return ReceiverApiError(
            f"{self.url} does not respond as flora-receiver does", code="not_a_receiver"
        )


def _find_token() -> str:
    """Return this machine's token, or an empty one, which the service refuses with a reason."""
    if token := os.environ.get("RECEIVER_OPS_TOKEN"):
        return token.strip()
    try:
        return Path(os.environ.get("RECEIVER_OPS_TOKEN_FILE") or TOKEN_FILE).read_text("utf-8-sig").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _to_error(response: httpx.Response) -> ReceiverApiError:
    """Return the error that a refusal carries, whatever its body is."""
    try:
        refused = Refused.model_validate(response.json())
    except ValueError:
        message = f"flora-receiver does not respond like this, with status {response.status_code}"
        refused = Refused(error=ErrorView(code="not_a_receiver", message=message))
    found, start = refused.error, refused.start
    own_key = None if start is None else start.idempotency_key
    return ReceiverApiError(
        found.message,
        status=response.status_code,
        code=found.code,
        fields=found.fields,
        request_id=found.request_id,
        idempotency_key=refused.idempotency_key or own_key,
        start=None if start is None else start.to_json(),
    )
