"""A synchronous client of the operations API, for other programs and for our own commands.

    with ReceiverClient() as receiver:
        prompt = {"id": "prompt", "type": "text", "value": "a lighthouse"}
        start = receiver.start("cctv-cam", [prompt])
        run = receiver.wait(start.run_id)

The address is RECEIVER_OPS_URL, or http://127.0.0.1:8081; `unix:/path` is a Unix socket. The token
is RECEIVER_OPS_TOKEN, or the content of RECEIVER_OPS_TOKEN_FILE (`var/ops-token` by default). Every
error is a ReceiverApiError.
"""

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from http import HTTPStatus
from pathlib import Path
from time import monotonic, sleep
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx

from receiver.client.connection import DEFAULT_URL, TOKEN_FILE, Connection
from receiver.client.messages import (
    ArtifactView,
    DispatchView,
    ErrorView,
    OneRun,
    OutputView,
    RunView,
    Started,
    StartView,
)
from receiver.errors import ReceiverApiError

__all__ = [
    "DEFAULT_URL",
    "TOKEN_FILE",
    "ArtifactView",
    "DispatchView",
    "ErrorView",
    "OutputView",
    "ReceiverApiError",
    "ReceiverClient",
    "RunView",
    "StartView",
]

_LONGEST_POLL_SECONDS = 60.0
_RETRY_SECONDS = (0.2, 0.5, 1.0, 2.0)
_RETRIED_AT_ONCE = 1000
_SETTLED_AT_ONCE = 500
_RESTART_STATUSES = (
    None,
    HTTPStatus.BAD_GATEWAY,
    HTTPStatus.SERVICE_UNAVAILABLE,
    HTTPStatus.GATEWAY_TIMEOUT,
)
"""Statuses that are explained by a restart of the service; None: no response."""


class ReceiverClient:
    """A client of one service, with a connection pool. Close it, or use it as a context manager.

    Not safe for use by several threads at once. `ca` is a PEM file of further roots to trust.
    """

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        *,
        timeout_seconds: float = 30.0,
        ca: Path | None = None,
    ) -> None:
        self._connection = Connection(url, token, timeout_seconds=timeout_seconds, ca=ca)
        self.url = self._connection.url

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._connection.http.close()

    # --- starting -------------------------------------------------------------------------------

    def start(
        self,
        technique_id: str,
        inputs: Sequence[Mapping[str, Any]],
        *,
        mode: str = "async",
        idempotency_key: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        callback_url: str | None = None,
        workspace_id: str | None = None,
        wait_seconds: float = 30.0,
    ) -> StartView:
        """Start a technique run, or return the run that was started with this `idempotency_key`.

        Returns once FLORA has responded, or after `wait_seconds` with state `asking`: the service
        keeps retrying, so call again with the same key for the outcome. Raises ReceiverApiError
        with FLORA's status, code and fields if it refuses, and with 409 `unknown_outcome` if it is not
        known whether a run exists. If the service fails or cannot be reached, the error's
        `idempotency_key` repeats the call without a second run, also where none was given.
        """
        request = {
            "technique_id": technique_id,
            "inputs": list(inputs),
            "mode": mode,
            "callback_url": callback_url,
        }
        return self._start(request, idempotency_key, metadata, workspace_id, wait_seconds)

    def generate(
        self,
        body: Mapping[str, Any],
        *,
        idempotency_key: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        callback_url: str | None = None,
        workspace_id: str | None = None,
        wait_seconds: float = 30.0,
    ) -> StartView:
        """Start a single generation, like `start`. `body` is that of FLORA's `POST /generate`."""
        request = {"generate": dict(body), "callback_url": callback_url}
        return self._start(request, idempotency_key, metadata, workspace_id, wait_seconds)

    def track(
        self,
        run_id: str | None = None,
        poll_url: str | None = None,
        *,
        technique_id: str | None = None,
        run_type: str | None = None,
        workspace_id: str | None = None,
        callback_expected: bool = False,
        metadata: Mapping[str, Any] | None = None,
    ) -> RunView:
        """Track a run that another program started, by its id or its `poll_url`."""
        body = {
            "run_id": run_id,
            "poll_url": poll_url,
            "technique_id": technique_id,
            "run_type": run_type,
            "workspace_id": workspace_id,
            "callback_expected": callback_expected,
            "metadata": dict(metadata or {}),
        }
        return self._to_run_view(self._connection.post("/api/runs/track", body))

    def resolve(self, start: str, run_id: str | None) -> StartView:
        """Resolve a start of unknown outcome: it made the run `run_id`, or no run if that is None.

        `start` is its token or its idempotency key.
        """
        path = f"/api/starts/{_segment(self._token_of(start))}/resolve"
        return self._to_start_view(self._connection.post(path, {"run_id": run_id}))

    # --- runs -----------------------------------------------------------------------------------

    def run(self, run_id: str) -> RunView:
        """Return a run with its outputs, artifacts and dispatches."""
        return self._to_run_view(self._connection.get(f"/api/runs/{_segment(run_id)}"))

    def runs(self, state: str | None = None, limit: int = 100) -> Iterator[RunView]:
        """Yield every run, newest first; `limit` is the size of a page."""
        return (
            self._connection.validate(RunView, row)
            for row in self._connection.pages("/api/runs", "runs", limit, state=state)
        )

    def wait(self, run_id: str, *, timeout_seconds: float | None = None) -> RunView:
        """Return the run once it is settled and its dispatches are over.

        After `timeout_seconds` the run is returned as it is. Continues through a restart of the
        service. Raises ReceiverApiError: 404 at once for an unknown run, `unreachable` if the
        service does not return in time.
        """
        deadline = None if timeout_seconds is None else monotonic() + timeout_seconds
        path = f"/api/runs/{_segment(run_id)}/wait"
        failures = 0
        while True:
            left = _LONGEST_POLL_SECONDS if deadline is None else max(0.0, deadline - monotonic())
            timeout = min(left, _LONGEST_POLL_SECONDS)
            try:
                run = self._to_run_view(self._connection.get(path, timeout=f"{timeout:.3f}"))
            except ReceiverApiError as error:
                if error.status not in _RESTART_STATUSES or (
                    deadline is not None and monotonic() >= deadline
                ):
                    raise
                sleep(min(_RETRY_SECONDS[min(failures, len(_RETRY_SECONDS) - 1)], left))
                failures += 1
                continue
            failures = 0
            if run.finished or (deadline is not None and monotonic() >= deadline):
                return run

    def refresh(self, run_id: str) -> RunView:
        """Have the service read the run from FLORA now; return the run as it was before.

        A lost run is tracked again, a completed one gets fresh output URLs.
        """
        return self._to_run_view(self._connection.post(f"/api/runs/{_segment(run_id)}/refresh", {}))

    def redispatch(self, run_id: str, handler: str | None = None, *, again: bool = False) -> int:
        """Dispatch the run again, to all its handlers or one; return how many dispatches are due.

        `again` opens a new round with new idempotency keys, so that effects are applied once more.
        """
        body: dict[str, Any] = {"again": again} if handler is None else {"handler": handler, "again": again}
        return int(self._connection.post(f"/api/runs/{_segment(run_id)}/redispatch", body)["dispatches"])

    def redispatch_missing(self, handler: str, since: datetime) -> int:
        """Dispatch runs settled since an aware time to a handler added later; return how many."""
        armed = 0
        while True:
            page = self._connection.post(
                "/api/runs/redispatch",
                {"handler": handler, "since": since.isoformat(), "limit": _SETTLED_AT_ONCE},
            )
            armed += int(page["dispatches"])
            if not page["more"]:
                return armed

    def timeline(self, run_id: str) -> dict[str, Any]:
        """Return a run's history, oldest first: `{"run_id", "entries": [{"at", "kind", …}]}`."""
        return self._connection.get(f"/api/runs/{_segment(run_id)}/timeline")

    # --- the rest -------------------------------------------------------------------------------

    def technique(self, technique_id: str, workspace_id: str | None = None) -> dict[str, Any]:
        """Return a technique: `technique_id`, `name`, `inputs`, `outputs`, `run_cost`.

        An input has `id`, `type` and `optional`. `run_cost` is in US dollars, or None if unknown.
        """
        path = f"/api/techniques/{_segment(technique_id)}"
        technique: dict[str, Any] = self._connection.get(path, workspace_id=workspace_id)["technique"]
        return technique

    def starts(
        self, state: str | None = None, key: str | None = None, prefix: str | None = None, limit: int = 100
    ) -> Iterator[dict[str, Any]]:
        """Yield the starts, newest first; `state` is `asking`, `started`, `refused` or `unknown`.

        `key` is an idempotency key, `prefix` the beginning of one (`batch:spring:` for the batch
        `spring`).
        """
        return self._connection.pages("/api/starts", "starts", limit, state=state, key=key, prefix=prefix)

    def deliveries(self, run_id: str | None = None, limit: int = 100) -> Iterator[dict[str, Any]]:
        """Yield the callbacks that were received, newest first."""
        return self._connection.pages("/api/deliveries", "deliveries", limit, run_id=run_id)

    def delivery(self, delivery_id: str) -> dict[str, Any]:
        """Return one callback with its raw body."""
        delivery: dict[str, Any] = self._connection.get(f"/api/deliveries/{_segment(delivery_id)}")[
            "delivery"
        ]
        return delivery

    def rejections(self, limit: int = 100) -> Iterator[dict[str, Any]]:
        """Yield the refused requests on record, newest first."""
        return self._connection.pages("/api/rejections", "rejections", limit)

    def dispatches(self, state: str = "dead", limit: int = 100) -> Iterator[dict[str, Any]]:
        """Yield the dispatches in a state, newest first.

        The state `orphaned` yields those that wait for handlers that are not configured.
        """
        only = {"orphaned": "true"} if state == "orphaned" else {"state": state}
        return self._connection.pages("/api/dispatches", "dispatches", limit, **only)

    def retry_dispatches(
        self, handler: str | None = None, run_id: str | None = None, *, all_dead: bool = False
    ) -> int:
        """Retry dead dispatches: those of a handler or a run, or all of them; return how many.

        Some at a time, so that no request takes long.
        """
        chosen = {"handler": handler, "run_id": run_id, "all": all_dead or None}
        body: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
        armed, more = 0, True
        while more:
            page = self._connection.post("/api/dispatches/retry", {**body, "limit": _RETRIED_AT_ONCE})
            armed, more, body["cursor"] = armed + int(page["dispatches"]), page["more"], page["next_cursor"]
        return armed

    def backup(self, path: Path) -> int:
        """Copy the SQLite ledger to a new file on the service's machine; return its bytes."""
        return int(self._connection.post("/api/backup", {"path": str(path)})["size"])

    def channel(self) -> dict[str, Any]:
        """Return the health of the callback channel in the last 24 hours, and counts by hour."""
        return self._connection.get("/api/channel")

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield changes as they happen: `{"kind", "run_id", "state", "detail"}`.

        The kind `missed` means that changes were lost: read the runs again. Ends when the service
        stops.
        """
        with suppress(httpx.TransportError), self._connection.stream("/api/events") as response:
            for line in response.iter_lines():
                if line.startswith("data:"):
                    yield json.loads(line.removeprefix("data:"))

    # --- requests -------------------------------------------------------------------------------

    def _start(
        self,
        request: Mapping[str, Any],
        key: str | None,
        metadata: Mapping[str, Any] | None,
        workspace_id: str | None,
        wait_seconds: float,
    ) -> StartView:
        body = {
            **request,
            "idempotency_key": key or f"auto-{secrets.token_hex(16)}",
            "metadata": dict(metadata or {}),
            "workspace_id": workspace_id,
            "wait_seconds": wait_seconds,
        }
        given = {name: value for name, value in body.items() if value is not None}
        try:
            return self._to_start_view(self._connection.post("/api/runs", given, wait_seconds=wait_seconds))
        except ReceiverApiError as error:
            error.idempotency_key = str(body["idempotency_key"])
            raise

    def _token_of(self, start: str) -> str:
        found = list(self.starts(key=start))
        if len(found) > 1:
            message = f"{len(found)} starts have this key: name one by its token"
            raise ReceiverApiError(message, status=HTTPStatus.CONFLICT, code="ambiguous_key")
        return str(found[0]["token"]) if found else start

    # --- responses ------------------------------------------------------------------------------

    def _to_run_view(self, data: Any) -> RunView:
        return self._connection.validate(OneRun, data).run

    def _to_start_view(self, data: Any) -> StartView:
        started = self._connection.validate(Started, data)
        return StartView(**dict(started.start), run=started.run, repeated=started.repeated)


def _segment(identifier: str) -> str:
    return quote(identifier, safe="")
