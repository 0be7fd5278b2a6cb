"""The sources of the events that `dev` shows: callbacks, and changes in the ledger."""

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from sqlalchemy import Connection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from receiver.cli.dev.view import View
from receiver.cli.output import format_size
from receiver.config.callback_url import CALLBACK_PATH
from receiver.model import Artifact, DispatchState, Event, RunState, StartState
from receiver.service.service import Service
from receiver.store import ledger, queries, starts
from receiver.store.changes import Change

__all__ = ["CallbackEvents", "LedgerEvents"]

_SETTLED = {RunState.COMPLETED, RunState.FAILED}
_MAX_BODY_BYTES = 65_536


class CallbackEvents:
    """ASGI middleware that shows each callback with its response, except canaries."""

    def __init__(self, app: ASGIApp, view: View) -> None:
        self._app = app
        self._view = view

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].rstrip("/") != CALLBACK_PATH:
            await self._app(scope, receive, send)
            return
        body, response, status = bytearray(), bytearray(), 0

        async def receive_and_copy() -> Message:
            message = await receive()
            if len(body) < _MAX_BODY_BYTES:
                body.extend(message.get("body", b""))
            return message

        async def copy_and_send(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            response.extend(message.get("body", b""))
            await send(message)

        await self._app(scope, receive_and_copy, copy_and_send)
        self._show(bytes(body), bytes(response), status)

    def _show(self, body: bytes, response: bytes, status: int) -> None:
        document = _parse_object(response)
        error = document.get("error")
        answer = error.get("code") if isinstance(error, dict) else document.get("status")
        if answer == "canary" or not status:
            return
        # Only a verified body may name a run: nothing that a stranger wrote is shown.
        is_verified = not isinstance(error, dict)
        data = _parse_object(body).get("data") if is_verified else None
        run_id = data.get("run_id") if isinstance(data, dict) else None
        says = data.get("status") if isinstance(data, dict) else None
        text = f"{run_id or '-'}  {says or ''}  {answer}"
        if not is_verified:
            text = f"-  refused: {status} {answer}"
        self._view.show("callback", text, run_id=run_id, status=status, answer=answer, says=says)


def _parse_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object that `body` is, or an empty one."""
    try:
        document = json.loads(body)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


class LedgerEvents:
    """Shows each change in the ledger, beginning with the next one."""

    def __init__(self, service: Service, view: View) -> None:
        self._service = service
        self._view = view
        self._shown: dict[str, tuple[str, str | None]] = {}
        """The state and the verdict last shown of each run."""
        self._files: set[tuple[str, str, int, str]] = set()

    async def run(self, on_settled: Callable[[str], Awaitable[None]] | None = None) -> None:
        """Show changes until cancelled; call `on_settled` with the id of each run that settles."""
        with self._service.signals.changes.subscribe() as listener:
            while True:
                change = await listener.next()
                if listener.missed:
                    listener.missed = False
                    text = "too many changes at once: some lines are missing"
                    self._view.show("view", text, missed=True)
                await self._show(change)
                is_settled = change.kind == "run" and Event.SETTLED.value in change.detail.split()
                if on_settled is not None and is_settled:
                    await on_settled(change.run_id)

    async def _show(self, change: Change) -> None:
        match change.kind:
            case "run":
                await self._show_run(change.run_id)
            case "dispatch":
                await self._show_dispatch(change)
            case "start" if change.state != StartState.STARTED.value:
                await self._show_start(change)
            case _:
                pass

    async def _show_run(self, run_id: str) -> None:
        runs = await self._service.database.read(lambda tx: ledger.runs_by_id(tx, [run_id]))
        run = runs.get(run_id)
        if run is None:
            return
        verdict = run.verdict and run.verdict.value
        if self._shown.get(run_id) == (run.state.value, verdict):
            return
        self._shown[run_id] = (run.state.value, verdict)
        has_cost = run.charged_cost is not None and run.state in _SETTLED
        lost_reason = run.lost_reason.value if run.lost_reason else ""
        words = " ".join(filter(None, (run.state.value, run.error_code, lost_reason)))
        parts = [run_id, words, verdict, f"${run.charged_cost:.2f}" if has_cost else ""]
        self._view.show(
            "run",
            "  ".join(filter(None, parts)),
            run_id=run_id,
            state=run.state.value,
            verdict=verdict,
            error_code=run.error_code,
            charged_cost=run.charged_cost,
        )

    async def _show_dispatch(self, change: Change) -> None:
        def read(tx: Connection) -> queries.RunDetails | None:
            return queries.run_details(tx, change.run_id)

        account = await self._service.database.read(read)
        if account is None:
            return
        for file in account.artifacts:
            key = (file.run_id, file.handler, file.position, file.location)
            is_stored = file.handler == change.detail and file.stored_at is not None
            if is_stored and key not in self._files:
                self._files.add(key)
                self._show_file(file)
        if change.state == DispatchState.DONE.value:
            return
        errors = (row.last_error for row in account.dispatches if row.handler == change.detail)
        error = next(errors, None)
        self._view.show(
            "handler",
            f"{change.run_id}  {change.detail}  {change.state}{f': {error}' if error else ''}",
            run_id=change.run_id,
            handler=change.detail,
            state=change.state,
            error=error,
        )

    def _show_file(self, file: Artifact) -> None:
        size = "" if file.size is None else f"  {format_size(file.size)}"
        path = _to_path(file.location)
        self._view.show(
            "file",
            f"{file.run_id}  {path}{size}",
            run_id=file.run_id,
            handler=file.handler,
            file=path,
            size=file.size,
        )

    async def _show_start(self, change: Change) -> None:
        token = change.run_id
        found = await self._service.database.read(lambda tx: starts.by_token(tx, [token]))
        start = found.get(token)
        key = token if start is None else start.idempotency_key
        words = () if start is None else (start.error_code, start.error_message)
        error = " ".join(filter(None, words))
        text = f"{key}  {change.state}: {error}"
        self._view.show("start", text, key=key, state=change.state, error=error)


def _to_path(location: str) -> str:
    """Return a `file:` URL as a path, relative to the working directory where possible."""
    parts = urlsplit(location)
    if parts.scheme != "file":
        return location
    path = Path(unquote(parts.path))
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
