"""What `dev` sees of a service: each callback at the door, each run and file in the ledger; and it plays callbacks."""

import asyncio
import json
import time
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import httpx
from sqlalchemy import Connection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from receiver.cli.demo import human
from receiver.cli.dev.view import View
from receiver.config import Settings
from receiver.flora.signature import HEADER, sign
from receiver.model import Artifact, DispatchState, Event, Run, RunState, StartState
from receiver.service.service import Service
from receiver.store import ledger, queries, starts
from receiver.store.changes import Change
from receiver.web.public import CALLBACK_PATH

__all__ = ["Follower", "Player", "WatchedDoor"]

_SETTLED = {RunState.COMPLETED, RunState.FAILED}
_SHOWN_BYTES = 65_536


class WatchedDoor:
    """Wraps the public app: tells of each callback with the answer that it got, canaries apart."""

    def __init__(self, app: ASGIApp, view: View) -> None:
        self._app = app
        self._view = view

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].rstrip("/") != CALLBACK_PATH:
            await self._app(scope, receive, send)
            return
        body, answer, status = bytearray(), bytearray(), 0

        async def received() -> Message:
            message = await receive()
            if len(body) < _SHOWN_BYTES:
                body.extend(message.get("body", b""))
            return message

        async def sent(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            answer.extend(message.get("body", b""))
            await send(message)

        await self._app(scope, received, sent)
        self._tell(bytes(body), bytes(answer), status)

    def _tell(self, body: bytes, answer: bytes, status: int) -> None:
        document = _document(answer)
        error = document.get("error")
        word = error.get("code") if isinstance(error, dict) else document.get("status")
        if word == "canary" or not status:
            return
        # What a stranger sent is not shown: only what a verified body says may name a run.
        verified = not isinstance(error, dict)
        data = _document(body).get("data") if verified else None
        run_id = data.get("run_id") if isinstance(data, dict) else None
        said = data.get("status") if isinstance(data, dict) else None
        text = f"{run_id or '-'}  {said or ''}  {word}" if verified else f"-  refused: {status} {word}"
        self._view.tell("callback", text, run_id=run_id, status=status, answer=word, says=said)


def _document(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


class Follower:
    """Tells of each change in the ledger, from now on."""

    def __init__(self, service: Service, view: View) -> None:
        self._service = service
        self._view = view
        self._told: dict[str, tuple[str, str | None]] = {}
        self._files: set[tuple[str, str, int, str]] = set()

    async def run(self, player: "Player | None" = None) -> None:
        """Follow until cancelled; `player` is told of each run that settles."""
        with self._service.signals.changes.listening() as listener:
            while True:
                change = await listener.next()
                if listener.missed:
                    listener.missed = False
                    self._view.tell("view", "too much happened at once: some lines are missing", missed=True)
                await self._follow(change)
                if player is not None and change.kind == "run" and Event.SETTLED.value in change.detail.split():
                    await player.play(change.run_id)

    async def _follow(self, change: Change) -> None:
        match change.kind:
            case "run":
                await self._run(change.run_id)
            case "dispatch":
                await self._dispatch(change)
            case "start" if change.state != StartState.STARTED.value:
                await self._start(change)
            case _:
                pass

    async def _run(self, run_id: str) -> None:
        run = await _run_of(self._service, run_id)
        if run is None:
            return
        now_is = (run.state.value, run.verdict and run.verdict.value)
        if self._told.get(run_id) == now_is:
            return
        self._told[run_id] = now_is
        cost = f"  ${run.charged_cost:.2f}" if run.charged_cost is not None and run.state in _SETTLED else ""
        words = [run.state.value, run.error_code or "", run.lost_reason.value if run.lost_reason else ""]
        verdict = f"  {run.verdict.value}" if run.verdict else ""
        self._view.tell(
            "run",
            f"{run_id}  {' '.join(filter(None, words))}{verdict}{cost}",
            run_id=run_id,
            state=run.state.value,
            verdict=run.verdict and run.verdict.value,
            error_code=run.error_code,
            charged_cost=run.charged_cost,
        )

    async def _dispatch(self, change: Change) -> None:
        def read(tx: Connection) -> queries.RunDetails | None:
            return queries.run_details(tx, change.run_id)

        account = await self._service.database.read(read)
        if account is None:
            return
        for file in account.artifacts:
            key = (file.run_id, file.handler, file.position, file.location)
            if file.handler == change.detail and file.stored_at is not None and key not in self._files:
                self._files.add(key)
                self._file(file)
        if change.state == DispatchState.DONE.value:
            return
        error = next((row.last_error for row in account.dispatches if row.handler == change.detail), None)
        self._view.tell(
            "handler",
            f"{change.run_id}  {change.detail}  {change.state}{f': {error}' if error else ''}",
            run_id=change.run_id,
            handler=change.detail,
            state=change.state,
            error=error,
        )

    def _file(self, file: Artifact) -> None:
        size = "" if file.size is None else f"  {human(file.size)}"
        place = _place(file.location)
        self._view.tell(
            "file",
            f"{file.run_id}  {place}{size}",
            run_id=file.run_id,
            handler=file.handler,
            file=place,
            size=file.size,
        )

    async def _start(self, change: Change) -> None:
        found = (await self._service.database.read(lambda tx: starts.by_token(tx, [change.run_id]))).get(change.run_id)
        reason = "" if found is None else f"{found.error_code or ''} {found.error_message or ''}".strip()
        key = change.run_id if found is None else found.idempotency_key
        self._view.tell("start", f"{key}  {change.state}: {reason}", key=key, state=change.state, error=reason)


class Player:
    """Plays a settled run to the receiver as FLORA would have called it: real data, signed here, by the real door."""

    def __init__(self, service: Service, settings: Settings, url: str, client: httpx.AsyncClient) -> None:
        self._service = service
        self._secrets = settings.secrets_by_workspace()
        self._url = url
        self._client = client

    async def play(self, run_id: str) -> None:
        run = await _run_of(self._service, run_id)
        if run is None or run.state not in _SETTLED or run.callback_status is not None:
            return  # FLORA itself has told
        body = json.dumps(_callback(run), separators=(",", ":")).encode()
        secret = next((value for value, owner in self._secrets if owner in {None, run.workspace_id}), None)
        if secret is None:
            return
        headers = {"Content-Type": "application/json", HEADER: sign(body, secret, timestamp=int(time.time()))}
        for _ in range(3):
            try:
                response = await self._client.post(self._url, content=body, headers=headers)
            except httpx.HTTPError:
                await asyncio.sleep(1)
                continue
            if response.status_code < 500:
                return


def _callback(run: Run) -> dict[str, Any]:
    """Return what FLORA would have sent about a run. Its delivery id is the same however often it is played."""
    data = {"run_id": run.run_id, "run_type": run.run_type, "workspace_id": run.workspace_id, "status": run.state.value}
    if run.state is RunState.FAILED:
        data |= {"error_code": run.error_code, "error_message": run.error_message}
    ended_at = run.completed_at or run.settled_at or run.first_seen_at
    return {
        "id": f"whd_dev_{run.run_id}",
        "type": f"run.{run.state.value}",
        "api_version": "2026-06-11",
        "created_at": int(ended_at.timestamp() * 1000),
        "data": {key: value for key, value in data.items() if value is not None},
    }


async def _run_of(service: Service, run_id: str) -> Run | None:
    return (await service.database.read(lambda tx: ledger.runs_by_id(tx, [run_id]))).get(run_id)


def _place(location: str) -> str:
    parts = urlsplit(location)
    if parts.scheme != "file":
        return location
    path = Path(unquote(parts.path))
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
