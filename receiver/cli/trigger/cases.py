"""The cases of `trigger`: the requests that each of them sends. Pure but for times and ids."""

import base64
import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from receiver.flora.signature import HEADER, sign

DEFAULT_WORKSPACE = "ws_trigger"
_NOT_A_RECORD = "was not written by --record"
_LAST_RETRY_SECONDS = 400
"""From the signature to FLORA's last retry, its own time-outs included."""


@dataclass(frozen=True, slots=True)
class CallbackRequest:
    """A request, and its expected result: `accepted`, `duplicate`, `ignored` or an error code."""

    body: bytes
    headers: Mapping[str, str]
    expected: str = "accepted"
    method: str = "POST"
    path_suffix: str = ""
    """Appended to the path of the URL."""
    is_held: bool = False
    """Whether the last byte is not sent."""


@dataclass(frozen=True, slots=True)
class CallbackFactory:
    """Makes callbacks of one workspace; ids that are not given are random."""

    secret: str = field(repr=False)
    workspace_id: str = DEFAULT_WORKSPACE
    run_id: str | None = None
    delivery_id: str | None = None

    def make_body(self, status: str = "completed", **replaced: object) -> bytes:
        """Return the body of a callback in FLORA's format, with top-level fields replaced."""
        data = {
            "run_id": self.run_id or f"run_{secrets.token_hex(8)}",
            "run_type": "generation",
            "workspace_id": self.workspace_id,
            "status": status,
        }
        if status == "failed":
            message = "sent by flora-receiver trigger"
            data |= {"error_code": "provider_error", "error_message": message}
        payload = {
            "id": self.delivery_id or f"whd_{secrets.token_hex(8)}",
            "type": f"run.{status}",
            "api_version": "2026-06-11",
            "created_at": int(time.time() * 1000),
            "data": data,
        }
        return json.dumps(payload | replaced, separators=(",", ":")).encode()

    def make_request(
        self,
        body: bytes | None = None,
        expected: str = "accepted",
        *,
        age_seconds: int = 0,
        secret: str | None = None,
    ) -> CallbackRequest:
        """Return a signed request, signed `age_seconds` ago and with another secret if given."""
        body = self.make_body() if body is None else body
        timestamp = int(time.time()) - age_seconds
        headers = {HEADER: sign(body, secret or self.secret, timestamp=timestamp)}
        return CallbackRequest(body, headers, expected)


def _duplicate(factory: CallbackFactory) -> Sequence[CallbackRequest]:
    first = factory.make_request()
    return first, replace(first, expected="duplicate")


def _contradicting_pair(factory: CallbackFactory) -> Sequence[CallbackRequest]:
    run_id = factory.run_id or f"run_{secrets.token_hex(8)}"
    factory = replace(factory, run_id=run_id, delivery_id=None)
    return (
        factory.make_request(factory.make_body("completed")),
        factory.make_request(factory.make_body("failed")),
    )


def _body_too_large(factory: CallbackFactory) -> Sequence[CallbackRequest]:
    return (factory.make_request(factory.make_body() + b" " * 70_000, "body_too_large"),)


def _mismatch(factory: CallbackFactory) -> Sequence[CallbackRequest]:
    factory = replace(factory, workspace_id="ws_another")
    return (factory.make_request(expected="workspace_mismatch"),)


def _malformed_request(factory: CallbackFactory) -> Sequence[CallbackRequest]:
    request = factory.make_request(expected="malformed_request")
    framing = {"Content-Length": str(len(request.body)), "Transfer-Encoding": "chunked"}
    return (replace(request, headers={**request.headers, **framing}),)


CASES: Mapping[str, Callable[[CallbackFactory], Sequence[CallbackRequest]]] = {
    "completed": lambda it: (it.make_request(),),
    "failed": lambda it: (it.make_request(it.make_body("failed")),),
    "unknown_run": lambda it: (replace(it, run_id=None).make_request(),),
    "unknown_event": lambda it: (it.make_request(it.make_body(type="run.paused"), "ignored"),),
    "duplicate": _duplicate,
    "contradicting_pair": _contradicting_pair,
    "retry_after_six_minutes": lambda it: (it.make_request(age_seconds=_LAST_RETRY_SECONDS),),
    "malformed_request": _malformed_request,
    "missing_signature": lambda it: (CallbackRequest(it.make_body(), {}, "missing_signature"),),
    "malformed_signature": lambda it: (
        CallbackRequest(it.make_body(), {HEADER: "hello"}, "malformed_signature"),
    ),
    "signature_mismatch": lambda it: (
        it.make_request(expected="signature_mismatch", secret=f"{it.secret}-another"),
    ),
    "timestamp_out_of_tolerance": lambda it: (
        it.make_request(expected="timestamp_out_of_tolerance", age_seconds=3600),
    ),
    "workspace_mismatch": _mismatch,
    "body_timeout": lambda it: (replace(it.make_request(expected="body_timeout"), is_held=True),),
    "invalid_payload": lambda it: (it.make_request(b"{", "invalid_payload"),),
    "malformed": lambda it: (it.make_request(b'{"id": 1}', "invalid_payload"),),
    "body_too_large": _body_too_large,
    "oversized": _body_too_large,
    "method_not_allowed": lambda _: (CallbackRequest(b"", {}, "method_not_allowed", "GET"),),
    "not_found": lambda it: (replace(it.make_request(expected="not_found"), path_suffix="/elsewhere"),),
}
"""The requests of every case, by its name."""


def to_record(request: CallbackRequest) -> str:
    """Return a request as a line of JSON, with its body in base64."""
    return json.dumps(
        {
            "method": request.method,
            "headers": dict(request.headers),
            "body": base64.b64encode(request.body).decode(),
            "expected": request.expected,
            "further": request.path_suffix,
            "held": request.is_held,
        }
    )


def from_record(line: str) -> CallbackRequest:
    """Return the request in a line of a record. Raises ValueError."""
    try:
        row = json.loads(line)
        headers = row["headers"]
        texts = [row["method"], row["expected"], row["further"], *headers, *headers.values()]
        request = CallbackRequest(
            base64.b64decode(row["body"], validate=True),
            headers,
            row["expected"],
            row["method"],
            row["further"],
            row.get("held") is True,
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(_NOT_A_RECORD) from error
    if not all(isinstance(text, str) and text.isascii() and text.isprintable() for text in texts):
        raise ValueError(_NOT_A_RECORD)
    return request
