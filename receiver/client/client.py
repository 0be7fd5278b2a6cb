"""The service for other programs: a small synchronous client of the operations API.

    with ReceiverClient() as receiver:
        start = receiver.start("cctv-cam", [{"id": "prompt", "type": "text", "value": "a lighthouse"}])
        run = receiver.wait(start.run_id)

It finds the service by RECEIVER_OPS_URL and RECEIVER_OPS_TOKEN, else at 127.0.0.1:8081 with the token in var/ops-token.
Everything that goes wrong is a ReceiverApiError.
"""

import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx

from receiver.client.messages import (
    ArtifactView,
    DispatchView,
    ErrorView,
    OutputView,
    RunView,
    StartView,
    error_view,
    run_view,
    start_view,
)
from receiver.errors import ReceiverApiError
from receiver.net.clients import operations_client

__all__ = [
    "ArtifactView",
    "DispatchView",
    "ErrorView",
    "OutputView",
    "ReceiverApiError",
    "ReceiverClient",
    "RunView",
    "StartView",
]

DEFAULT_URL = "http://127.0.0.1:8081"
TOKEN_FILE = Path("var/ops-token")
_LONGEST_POLL_SECONDS = 60.0
_RETRY_SECONDS = (0.2, 0.5, 1.0, 2.0)
_PASSING = (None, 502, 503, 504)
"""Statuses of answers that a restart of the service explains."""


class ReceiverClient:
    """One connection pool to one service; close it, or use it as a context manager. Not for several threads at once.

    `token` may be left out where it can be found: see this module's head. `ca` is a PEM file to trust besides.
    """

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        *,
        timeout_seconds: float = 30.0,
        ca: Path | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.url = (url or os.environ.get("RECEIVER_OPS_URL") or DEFAULT_URL).rstrip("/")
        self._timeout_seconds = timeout_seconds
        self._sleep = sleep
        try:
            self._http = operations_client(self.url, token or _found_token(), timeout_seconds=timeout_seconds, ca=ca)
        except (ValueError, OSError, httpx.InvalidURL) as error:
            raise ReceiverApiError(f"{self.url} cannot be used: {error}", code="unusable_url") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    # --- starting ------------------------------------------------------------------------------------------------

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
        """Start a technique run. The same `idempotency_key` again returns the same run and starts nothing.

        Returns as soon as FLORA has answered, or after `wait_seconds` with state `asking`: the service goes on asking,
        call again with the same key to hear more. Raises ReceiverApiError with FLORA's status, code and fields where it
        refuses; with 409 `unknown_outcome` where it cannot be told whether a run exists.
        """
        asked = {"technique_id": technique_id, "inputs": list(inputs), "mode": mode, "callback_url": callback_url}
        return self._start(asked, idempotency_key, metadata, workspace_id, wait_seconds)

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
        """Start a single generation; `body` is that of FLORA's `POST /generate`. Otherwise as `start`."""
        asked = {"generate": dict(body), "callback_url": callback_url}
        return self._start(asked, idempotency_key, metadata, workspace_id, wait_seconds)

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
        """Take up a run that someone else started, by its id or its `poll_url`."""
        body = {
            "run_id": run_id,
            "poll_url": poll_url,
            "technique_id": technique_id,
            "run_type": run_type,
            "workspace_id": workspace_id,
            "callback_expected": callback_expected,
            "metadata": dict(metadata or {}),
        }
        return run_view(self._post("/api/runs/track", body)["run"])

    def resolve(self, start: str, run_id: str | None) -> StartView:
        """Say what became of an unknown start, named by its token or its idempotency key: this run, or (None) no run."""
        return start_view(self._post(f"/api/starts/{_segment(self._token_of(start))}/resolve", {"run_id": run_id}))

    # --- runs ----------------------------------------------------------------------------------------------------

    def run(self, run_id: str) -> RunView:
        """Return a run with its outputs, artifacts and dispatches."""
        return run_view(self._get(f"/api/runs/{_segment(run_id)}")["run"])

    def runs(self, state: str | None = None, limit: int = 100) -> Iterator[RunView]:
        """Give every run, newest first; `limit` is how many are fetched at once."""
        return (run_view(row) for row in self._pages("/api/runs", "runs", limit, state=state))

    def wait(self, run_id: str, *, timeout_seconds: float | None = None) -> RunView:
        """Return the run once it is settled and its dispatches are over, or as it stands when the time is over.

        A restart of the service in between is waited out. Raises ReceiverApiError: 404 at once for an unknown run,
        `unreachable` where the service did not come back in time.
        """
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        failed = 0
        while True:
            left = _LONGEST_POLL_SECONDS if deadline is None else max(0.0, deadline - time.monotonic())
            patience = min(left, _LONGEST_POLL_SECONDS)
            try:
                found = run_view(self._get(f"/api/runs/{_segment(run_id)}/wait", timeout=f"{patience:.3f}")["run"])
            except ReceiverApiError as error:
                if error.status not in _PASSING or (deadline is not None and time.monotonic() >= deadline):
                    raise
                self._sleep(min(_RETRY_SECONDS[min(failed, len(_RETRY_SECONDS) - 1)], left))
                failed += 1
                continue
            failed = 0
            if found.finished or (deadline is not None and time.monotonic() >= deadline):
                return found

    def refresh(self, run_id: str) -> RunView:
        """Have the run read from FLORA now; a lost one is taken up again, a completed one gets fresh output URLs."""
        return run_view(self._post(f"/api/runs/{_segment(run_id)}/refresh", {})["run"])

    def redispatch(self, run_id: str, handler: str | None = None, *, again: bool = False) -> int:
        """Have handlers work on the run again, all or one; return how many dispatches are due again.

        `again` opens a new round, with idempotency keys of its own: effects are applied once more.
        """
        body: dict[str, Any] = {"again": again} if handler is None else {"handler": handler, "again": again}
        return int(self._post(f"/api/runs/{_segment(run_id)}/redispatch", body)["dispatches"])

    def redispatch_missing(self, handler: str, since: datetime) -> int:
        """Tell a handler that was added later of the runs settled since (an aware time); return for how many it is due."""
        armed = 0
        while True:
            answer = self._post("/api/runs/redispatch", {"handler": handler, "since": since.isoformat()})
            armed += int(answer["dispatches"])
            if not answer["more"]:
                return armed

    def timeline(self, run_id: str) -> dict[str, Any]:
        """Return what happened to a run, in order: `{"run_id", "entries": [{"at", "kind", …}]}`."""
        return self._get(f"/api/runs/{_segment(run_id)}/timeline")

    # --- the rest ------------------------------------------------------------------------------------------------

    def technique(self, technique_id: str, workspace_id: str | None = None) -> dict[str, Any]:
        """Return a technique: `technique_id`, `name`, `inputs` (id, type, optional), `outputs`, `run_cost` (USD or None)."""
        found: dict[str, Any] = self._get(f"/api/techniques/{_segment(technique_id)}", workspace_id=workspace_id)[
            "technique"
        ]
        return found

    def starts(
        self, state: str | None = None, key: str | None = None, prefix: str | None = None, limit: int = 100
    ) -> Iterator[dict[str, Any]]:
        """Give the starts, newest first; `state` is `asking`, `started`, `refused` or `unknown`.

        `key` is an idempotency key, `prefix` how keys begin: `batch:spring:` is the batch `spring`.
        """
        return self._pages("/api/starts", "starts", limit, state=state, key=key, prefix=prefix)

    def deliveries(self, run_id: str | None = None, limit: int = 100) -> Iterator[dict[str, Any]]:
        """Give the callbacks that arrived, newest first."""
        return self._pages("/api/deliveries", "deliveries", limit, run_id=run_id)

    def delivery(self, delivery_id: str) -> dict[str, Any]:
        """Return one callback with its raw body."""
        found: dict[str, Any] = self._get(f"/api/deliveries/{_segment(delivery_id)}")["delivery"]
        return found

    def rejections(self, limit: int = 100) -> Iterator[dict[str, Any]]:
        """Give the refused requests that are remembered, newest first."""
        return self._pages("/api/rejections", "rejections", limit)

    def dispatches(self, state: str = "dead", limit: int = 100) -> Iterator[dict[str, Any]]:
        """Give the dispatches in a state, newest first; `orphaned`: what waits for handlers that are not configured."""
        only = {"orphaned": "true"} if state == "orphaned" else {"state": state}
        return self._pages("/api/dispatches", "dispatches", limit, **only)

    def retry_dispatches(self, handler: str | None = None, run_id: str | None = None) -> int:
        """Have dead dispatches tried again, all or those of a handler or a run; return how many."""
        body = {name: value for name, value in (("handler", handler), ("run_id", run_id)) if value is not None}
        return int(self._post("/api/dispatches/retry", body)["dispatches"])

    def backup(self, path: Path) -> int:
        """Have the service copy its SQLite ledger into a new file on its own machine; return the size in bytes."""
        return int(self._post("/api/backup", {"path": str(path)})["size"])

    def channel(self) -> dict[str, Any]:
        """Return the health of the callback channel over the last 24 hours, and its counts by hour."""
        return self._get("/api/channel")

    def events(self) -> Iterator[dict[str, Any]]:
        """Give changes as they happen: `{"kind", "run_id", "state", "detail"}`; kind `missed`: read the ledger again.

        Ends when the service stops.
        """
        request = self._http.build_request("GET", "/api/events", headers={"Accept": "text/event-stream"})
        request.extensions["timeout"] = {**request.extensions["timeout"], "read": None}
        response = self._send(request, stream=True)
        try:
            if not response.is_success:
                response.read()
                raise _refused(response)
            for line in response.iter_lines():
                if line.startswith("data:"):
                    yield json.loads(line.removeprefix("data:"))
        except httpx.TransportError:
            return
        finally:
            response.close()

    # --- how -----------------------------------------------------------------------------------------------------

    def _start(
        self,
        asked: Mapping[str, Any],
        key: str | None,
        metadata: Mapping[str, Any] | None,
        workspace_id: str | None,
        wait_seconds: float,
    ) -> StartView:
        body = {
            **asked,
            "idempotency_key": key or f"auto-{secrets.token_hex(16)}",
            "metadata": dict(metadata or {}),
            "workspace_id": workspace_id,
            "wait_seconds": wait_seconds,
        }
        given = {name: value for name, value in body.items() if value is not None}
        return start_view(self._post("/api/runs", given, patience=wait_seconds))

    def _token_of(self, start: str) -> str:
        found = list(self.starts(key=start))
        if len(found) > 1:
            raise ReceiverApiError(
                f"{len(found)} starts have this key: name one by its token", status=409, code="ambiguous_key"
            )
        return str(found[0]["token"]) if found else start

    def _pages(self, path: str, name: str, limit: int, **params: str | None) -> Iterator[Any]:
        cursor: str | None = None
        while True:
            page = self._get(path, limit=str(limit), cursor=cursor, **params)
            yield from page[name]
            if page.get("next_cursor") in {None, cursor}:
                return
            cursor = page["next_cursor"]

    def _get(self, path: str, *, timeout: str | None = None, **params: str | None) -> dict[str, Any]:
        given = {name: value for name, value in (*params.items(), ("timeout", timeout)) if value is not None}
        return self._call(self._http.build_request("GET", path, params=given), float(timeout or 0))

    def _post(self, path: str, body: Mapping[str, Any], *, patience: float = 0.0) -> dict[str, Any]:
        return self._call(self._http.build_request("POST", path, json=body), patience)

    def _call(self, request: httpx.Request, patience: float) -> dict[str, Any]:
        """Return an answer's JSON; `patience` is how long the service itself may wait before it answers."""
        times = request.extensions["timeout"]
        request.extensions["timeout"] = {**times, "read": self._timeout_seconds + patience}
        response = self._send(request)
        if not response.is_success:
            raise _refused(response)
        try:
            answer: dict[str, Any] = response.json()
        except ValueError as error:
            raise ReceiverApiError(
                f"{self.url} does not answer as flora-receiver does", code="not_a_receiver"
            ) from error
        return answer

    def _send(self, request: httpx.Request, *, stream: bool = False) -> httpx.Response:
        try:
            return self._http.send(request, stream=stream)
        except httpx.TransportError as error:
            raise ReceiverApiError(
                f"no answer from {self.url} ({type(error).__name__}): is the service running? Start it with "
                "`flora-receiver serve`, or name its operations address in RECEIVER_OPS_URL",
                code="unreachable",
            ) from error


def _found_token() -> str:
    """Return the token that this machine holds; empty where there is none, so that the answer says so."""
    if token := os.environ.get("RECEIVER_OPS_TOKEN"):
        return token.strip()
    try:
        return Path(os.environ.get("RECEIVER_OPS_TOKEN_FILE") or TOKEN_FILE).read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _refused(response: httpx.Response) -> ReceiverApiError:
    try:
        found = error_view(response.json()["error"])
    except (ValueError, KeyError, TypeError, AttributeError):
        found = ErrorView("not_a_receiver", f"an answer {response.status_code} that flora-receiver does not give")
    return ReceiverApiError(
        found.message,
        status=response.status_code,
        code=found.code,
        fields=found.fields,
        request_id=found.request_id,
    )


def _segment(identifier: str) -> str:
    return quote(identifier, safe="")
