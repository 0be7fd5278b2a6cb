"""Metrics, health, and the stream of changes."""

import asyncio
from typing import Any

import httpx

from receiver.client.client import ReceiverClient
from receiver.store.changes import Change, Changes
from receiver.web.ops.views import to_change
from receiver.web.ops.wait import next_changes
from receiver.workers.loop import run_until
from tests.support.patience import PATIENCE_SECONDS
from tests.support.stage import Stage, eventually
from tests.web.ops.conftest import Ops, events, run_ops


async def test_changes_are_streamed_as_they_happen(ops: Ops) -> None:
    """A start, the states of its run, its dispatches: each is an event, in order."""
    seen: list[dict[str, Any]] = []
    async with ops.http.stream("GET", "/api/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        lines = stream.aiter_lines()
        while await anext(lines) != ": listening":
            pass
        run_id = (await ops.start())["run"]["run_id"]
        async for line in lines:
            seen += events(line)
            if seen and seen[-1].get("kind") == "dispatch" and seen[-1]["detail"] == "storage":
                break
    assert [(row["kind"], row["run_id"], row["state"]) for row in seen if row["kind"] == "start"] == [
        ("start", run_id, "started")
    ]
    states = [row["state"] for row in seen if (row["kind"], row["run_id"]) == ("run", run_id)]
    assert states[0] == "open"
    assert states[-1] == "completed"


async def test_the_python_client_follows_changes(ops: Ops) -> None:
    """Its stream ends when the service stops."""

    def follow() -> list[str]:
        with ReceiverClient(ops.url, ops.token) as receiver:
            return [change["state"] for change in receiver.events() if change["kind"] == "run"]

    following = asyncio.create_task(asyncio.to_thread(follow))

    async def listening() -> bool:
        return bool(ops.service.signals.changes._all)

    await eventually(listening)
    await ops.run_to_end()
    ops.service._stopping.set()
    states = await following
    assert states[0] == "open"
    assert "completed" in states


async def test_a_slow_listener_misses_changes_and_knows() -> None:
    changes, stopping = Changes(), asyncio.Event()
    with changes.subscribe() as listener:
        for number in range(1001):
            changes.publish(Change("run", f"run_{number}", "open"))
        assert listener.missed
        given = next_changes(listener, stopping, heartbeat_seconds=10)
        first = await anext(given)
        assert first is not None
        assert first.run_id == "run_0"
        stopping.set()
        assert [change async for change in given] == []


async def test_a_quiet_stream_sends_heartbeats() -> None:
    with Changes().subscribe() as listener:
        assert await anext(next_changes(listener, asyncio.Event(), heartbeat_seconds=0)) is None


async def test_a_wait_inside_a_request_ends_with_the_service() -> None:
    stopping = asyncio.Event()
    stopping.set()
    assert await run_until(stopping, asyncio.Event().wait()) is None


def test_a_start_in_the_stream_names_its_run_once_there_is_one() -> None:
    """It is published under its token, which is not a run id."""
    assert to_change(Change("start", "token", "refused"))["run_id"] is None
    assert to_change(Change("start", "token", "started", "run_1"))["run_id"] == "run_1"


async def test_long_requests_end_with_the_service(stage: Stage) -> None:
    """A wait gets 503, a stream ends, and the service stops within its deadlines."""
    async with run_ops(stage) as ops:
        await ops.post("/api/runs/track", {"run_id": "run_1"})
        url, token = ops.url, ops.token
        client = httpx.AsyncClient(
            base_url=url, headers={"Authorization": f"Bearer {token}"}, trust_env=False
        )
        waiting = asyncio.create_task(
            client.get("/api/runs/run_1/wait?timeout=120", timeout=PATIENCE_SECONDS)
        )
        streaming = asyncio.create_task(client.get("/api/events", timeout=PATIENCE_SECONDS))

        async def both() -> bool:
            return bool(ops.service.signals.changes._all and ops.service.signals.changes._by_run)

        await eventually(both)
    response = await waiting
    assert (response.status_code, response.json()["error"]["code"]) == (503, "unavailable")
    assert (await streaming).status_code == 200
    await client.aclose()


async def test_metrics_count_unsettled_runs(ops: Ops) -> None:
    await ops.run_to_end()
    await ops.post("/api/runs/track", {"run_id": "run_1"})
    response = await ops.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    assert 'flora_receiver_runs{state="open"} 1.0' in response.text
    assert 'flora_receiver_runs_settled_total{state="completed"} 1.0' in response.text
    assert 'flora_receiver_dispatch_backlog{state="ready"} 0.0' in response.text
    assert await ops.get("/healthz") == {"status": "ok"}
