"""What `trigger` sends: each case by its name, as the requests that make it. Pure but for the time and the ids."""

import base64
import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from receiver.flora.signature import HEADER, sign

_NO_RECORD = "is no line that --record writes"
MADE_UP_WORKSPACE = "ws_trigger"
_SIX_MINUTES = 400
"""Seconds from signing to FLORA's last retry, its own time-outs included."""


@dataclass(frozen=True, slots=True)
class Shot:
    """One request, and the code or the word that it should be answered with (`accepted`, `duplicate`, a refusal's code)."""

    body: bytes
    headers: Mapping[str, str]
    expected: str = "accepted"
    method: str = "POST"
    further: str = ""
    """What is added to the URL's path."""
    held: bool = False
    """Whether its last byte is held back."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What the callbacks are about; made up where it is not given."""

    secret: str = field(repr=False)
    workspace_id: str = MADE_UP_WORKSPACE
    run_id: str | None = None
    delivery_id: str | None = None

    def body(self, status: str = "completed", **top: object) -> bytes:
        """Return a callback as FLORA writes it."""
        data = {
            "run_id": self.run_id or f"run_{secrets.token_hex(8)}",
            "run_type": "generation",
            "workspace_id": self.workspace_id,
            "status": status,
        }
        if status == "failed":
            data |= {"error_code": "provider_error", "error_message": "sent by flora-receiver trigger"}
        payload = {
            "id": self.delivery_id or f"whd_{secrets.token_hex(8)}",
            "type": f"run.{status}",
            "api_version": "2026-06-11",
            "created_at": int(time.time() * 1000),
            "data": data,
        }
        return json.dumps(payload | top, separators=(",", ":")).encode()

    def signed(self, body: bytes, *, age: int = 0, secret: str | None = None) -> dict[str, str]:
        return {HEADER: sign(body, secret or self.secret, timestamp=int(time.time()) - age)}

    def shot(self, body: bytes | None = None, expected: str = "accepted", **signing: int | str) -> Shot:
        body = self.body() if body is None else body
        return Shot(body, self.signed(body, **signing), expected)  # type: ignore[arg-type]


def _duplicate(subject: Subject) -> Sequence[Shot]:
    first = subject.shot()
    return first, replace(first, expected="duplicate")


def _contradicting(subject: Subject) -> Sequence[Shot]:
    one = replace(subject, run_id=subject.run_id or f"run_{secrets.token_hex(8)}", delivery_id=None)
    return one.shot(one.body("completed")), one.shot(one.body("failed"))


def _too_large(subject: Subject) -> Sequence[Shot]:
    return (subject.shot(subject.body() + b" " * 70_000, "body_too_large"),)


CASES: Mapping[str, Callable[[Subject], Sequence[Shot]]] = {
    "completed": lambda it: (it.shot(),),
    "failed": lambda it: (it.shot(it.body("failed")),),
    "unknown_run": lambda it: (replace(it, run_id=None).shot(),),
    "unknown_event": lambda it: (it.shot(it.body(type="run.paused"), "ignored"),),
    "duplicate": _duplicate,
    "contradicting_pair": _contradicting,
    "retry_after_six_minutes": lambda it: (it.shot(age=_SIX_MINUTES),),
    "missing_signature": lambda it: (Shot(it.body(), {}, "missing_signature"),),
    "malformed_signature": lambda it: (Shot(it.body(), {HEADER: "hello"}, "malformed_signature"),),
    "signature_mismatch": lambda it: (it.shot(expected="signature_mismatch", secret="whsec_another"),),  # noqa: S106
    "timestamp_out_of_tolerance": lambda it: (it.shot(expected="timestamp_out_of_tolerance", age=3600),),
    "workspace_mismatch": lambda it: (replace(it, workspace_id="ws_another").shot(expected="workspace_mismatch"),),
    "body_timeout": lambda it: (replace(it.shot(expected="body_timeout"), held=True),),
    "invalid_payload": lambda it: (it.shot(b"{", "invalid_payload"),),
    "malformed": lambda it: (it.shot(b'{"id": 1}', "invalid_payload"),),
    "body_too_large": _too_large,
    "oversized": _too_large,
    "method_not_allowed": lambda _: (Shot(b"", {}, "method_not_allowed", "GET"),),
    "not_found": lambda it: (replace(it.shot(expected="not_found"), further="/elsewhere"),),
}
"""Every case by name: how the requests of this kind are made."""


def kept(shot: Shot) -> str:
    """Return a shot as one line of a record: JSON, its body in base64, so that every byte is there."""
    return json.dumps(
        {
            "method": shot.method,
            "headers": dict(shot.headers),
            "body": base64.b64encode(shot.body).decode(),
            "expected": shot.expected,
            "further": shot.further,
            "held": shot.held,
        }
    )


def again(line: str) -> Shot:
    """Return the shot of a line. ValueError where it is none."""
    try:
        row = json.loads(line)
        words = [row["method"], row["expected"], row["further"], *row["headers"].keys(), *row["headers"].values()]
        body = base64.b64decode(row["body"], validate=True)
        shot = Shot(body, row["headers"], row["expected"], row["method"], row["further"], row.get("held") is True)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(_NO_RECORD) from error
    if not all(isinstance(word, str) and word.isascii() and word.isprintable() for word in words):
        raise ValueError(_NO_RECORD)
    return shot
