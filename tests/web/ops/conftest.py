"""The operations API of a running service, with an emulated FLORA, both on loopback."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest

from receiver.client.client import ReceiverClient
from receiver.emulator import parse_faults
from receiver.service.service import Service
from tests.support.patience import PATIENCE_SECONDS
from tests.support.stage import Stage, free_port, run_stage

T = TypeVar("T")
PROMPT = {"id": "prompt", "type": "text", "value": "a lighthouse"}


@dataclass
class Ops:
    """A service, the token that it created, and a client that uses it."""

    stage: Stage
    service: Service
    http: httpx.AsyncClient
    token: str

    @property
    def url(self) -> str:
        host, port = self.service.operations_address
        return f"http://{host}:{port}"

    def add_fault(self, **fault: Any) -> None:
        """Let one of FLORA's next responses be a fault."""
        self.stage.emulator.faults.add(parse_faults({"next": 1, **fault}))

    async def get(self, path: str, status: int = 200, **params: Any) -> dict[str, Any]:
        return _check_response(await self.http.get(path, params=params or None), status)

    async def post(self, path: str, body: Any, status: int = 200) -> dict[str, Any]:
        return _check_response(await self.http.post(path, json=body), status)

    async def start(self, technique: str = "emu-image", status: int = 201, **more: Any) -> dict[str, Any]:
        return await self.post("/api/runs", {"technique_id": technique, "inputs": [PROMPT], **more}, status)

    async def run_to_end(self, technique: str = "emu-image", **more: Any) -> str:
        """Start a run, wait until its files are stored, and return its id."""
        run_id = str((await self.start(technique, **more))["run"]["run_id"])
        waited = await self.get(f"/api/runs/{run_id}/wait", timeout=PATIENCE_SECONDS)
        assert waited["run"]["finished"], waited
        return run_id

    async def call_client(self, call: Callable[[ReceiverClient], T]) -> T:
        """Call the Python client in a thread of its own."""

        def run() -> T:
            with ReceiverClient(self.url, self.token) as receiver:
                return call(receiver)

        return await asyncio.to_thread(run)


def _check_response(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    data: dict[str, Any] = response.json()
    return data


@contextlib.asynccontextmanager
async def run_ops(stage: Stage, **sections: Any) -> AsyncIterator[Ops]:
    """Run a service that FLORA sends its callbacks to."""
    stage.port = stage.port or free_port()
    async with stage.service(public_url=f"https://127.0.0.1:{stage.port}", **sections) as service:
        token = sections.get("operations", {}).get("token")
        token = token or (stage.directory / "ops-token").read_text().strip()
        host, port = service.operations_address
        headers = {"Authorization": f"Bearer {token}"}
        async with httpx.AsyncClient(
            base_url=f"http://{host}:{port}", headers=headers, trust_env=False, timeout=2 * PATIENCE_SECONDS
        ) as http:
            yield Ops(stage, service, http, token)


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    async with run_stage(tmp_path) as made:
        yield made


@pytest.fixture
async def ops(stage: Stage) -> AsyncIterator[Ops]:
    async with run_ops(stage) as made:
        yield made


@pytest.fixture(params=["sqlite", "postgres"])
async def ops_on_both(request: pytest.FixtureRequest, stage: Stage) -> AsyncIterator[Ops]:
    """A service on either database."""
    if request.param == "postgres":
        stage.postgres = request.getfixturevalue("postgres_url")
    async with run_ops(stage, operations={"port": 0, "token": "t" * 40}) as made:
        yield made


def events(text: str) -> list[dict[str, Any]]:
    """Return the data of the events in a piece of a stream."""
    return [
        json.loads(line.removeprefix("data:")) for line in text.splitlines() if line.startswith("data:")
    ]
