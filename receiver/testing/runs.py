"""Settled runs as handlers see them, and callbacks as FLORA signs them."""

import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from receiver.flora.signature import HEADER, sign
from receiver.handler import Output, SettledRun

SETTLED_AT = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
"""When the runs made here ended, by FLORA's clock."""


def a_settled_run(*outputs: Output, **fields: Any) -> SettledRun:
    """Return a completed technique run with these outputs. `fields` replace other fields of it."""
    given: dict[str, Any] = {
        "run_id": "run_1",
        "run_type": "technique",
        "status": "completed",
        "technique_id": "tech_1",
        "workspace_id": "ws_1",
        "project_id": None,
        "outputs": outputs,
        "metadata": {"market": "DE"},
        "charged_cost": None,
        "error_code": None,
        "error_message": None,
        "created_at": SETTLED_AT - timedelta(minutes=2),
        "started_at": SETTLED_AT - timedelta(minutes=1),
        "completed_at": SETTLED_AT,
        "settled_at": SETTLED_AT + timedelta(seconds=1),
        "settled_by": "callback",
        "verdict": "matched",
    }
    return SettledRun(**(given | fields))


def signed_callback(
    run_id: str,
    secret: str,
    *,
    status: str = "completed",
    delivery_id: str | None = None,
    age_seconds: int = 0,
    secrets_too: Sequence[str] = (),
) -> tuple[bytes, dict[str, str]]:
    """Return the body and the headers of a callback as FLORA sends it, signed `age_seconds` ago.

    `secrets_too` sign it as well, as FLORA does while a secret is rotated.
    """
    delivery_id = delivery_id or f"whd_{run_id}"
    message = {
        "id": delivery_id,
        "type": f"run.{status}",
        "api_version": "2026-06-11",
        "created_at": int(time.time() * 1000),
        "data": {
            "run_id": run_id,
            "run_type": "technique",
            "workspace_id": "ws_emulator",
            "status": status,
        },
    }
    body = json.dumps(message, separators=(",", ":")).encode()
    signed_at = int(time.time()) - age_seconds
    signature = sign(body, secret, timestamp=signed_at)
    for other in secrets_too:
        signature += "," + sign(body, other, timestamp=signed_at).partition(",")[2]
    headers = {
        "Content-Type": "application/json",
        HEADER: signature,
        "Flora-Webhook-Id": delivery_id,
        "Flora-Event": f"run.{status}",
    }
    return body, headers
