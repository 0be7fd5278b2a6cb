"""Sends simulated callbacks about real runs to the receiver, where FLORA has no URL to call."""

import asyncio
import json
import time
from typing import Any

import httpx

from receiver.config import Settings
from receiver.flora.signature import HEADER, sign
from receiver.model import Run, RunState
from receiver.service.service import Service
from receiver.store import ledger

__all__ = ["CallbackSimulator"]

_ATTEMPTS = 3


class CallbackSimulator:
    """Sends the callback that FLORA would have sent about a settled run."""

    def __init__(self, service: Service, settings: Settings, url: str, client: httpx.AsyncClient) -> None:
        self._service = service
        self._secrets = settings.secrets_by_workspace()
        self._url = url
        self._client = client

    async def send(self, run_id: str) -> None:
        """Send the callback, unless FLORA has sent one or the run is not settled."""
        runs = await self._service.database.read(lambda tx: ledger.runs_by_id(tx, [run_id]))
        run = runs.get(run_id)
        if run is None or run.state not in {RunState.COMPLETED, RunState.FAILED}:
            return
        if run.callback_status is not None:
            return
        owners = {None, run.workspace_id}
        secret = next((value for value, owner in self._secrets if owner in owners), None)
        if secret is None:
            return
        body = json.dumps(_to_callback(run), separators=(",", ":")).encode()
        signature = sign(body, secret, timestamp=int(time.time()))
        headers = {"Content-Type": "application/json", HEADER: signature}
        for _ in range(_ATTEMPTS):
            try:
                response = await self._client.post(self._url, content=body, headers=headers)
            except httpx.HTTPError:
                await asyncio.sleep(1)
                continue
            if not response.is_server_error:
                return


def _to_callback(run: Run) -> dict[str, Any]:
    """Return the callback of a run. Its delivery id is the same each time."""
    data = {
        "run_id": run.run_id,
        "run_type": run.run_type,
        "workspace_id": run.workspace_id,
        "status": run.state.value,
    }
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
