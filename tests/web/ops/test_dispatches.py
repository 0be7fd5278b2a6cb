"""Dispatches: retried, repeated, sent to handlers added later, and orphaned."""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

from receiver.model import Dispatch, DispatchState, Event, RunState, Subscription
from receiver.store import ledger
from receiver.store.schema import dispatches
from receiver.web.ops.dispatches import DispatchRoutes
from tests.support.core import NOW, Core, a_run
from tests.support.patience import PATIENCE_SECONDS
from tests.support.stage import Stage, eventually
from tests.web.ops.conftest import Ops, run_ops


def storage(name: str, url: Path, **more: Any) -> dict[str, Any]:
    return {"use": "storage", "name": name, **more, "options": {"url": str(url)}}


LOG = {"use": "log"}
PATIENT = {"first_seconds": 3600, "longest_seconds": 3600}


async def states(ops: Ops, run_id: str) -> dict[str, str]:
    run = (await ops.get(f"/api/runs/{run_id}"))["run"]
    return {f"{row['handler']}:{row['event']}:{row['round']}": row["state"] for row in run["dispatches"]}


async def test_dispatches_of_a_removed_handler_are_orphaned_and_kept(stage: Stage, tmp_path: Path) -> None:
    """They delay no wait, are listed as orphaned, and run once the handler is configured again."""
    async with run_ops(stage, handlers=[storage("gone", stage.outputs, backoff=PATIENT), LOG]) as ops:
        ops.add_fault(kind="expired", status=500)
        run_id = (await ops.start())["run"]["run_id"]

        async def waits() -> bool:
            rows = (await ops.get(f"/api/runs/{run_id}"))["run"]["dispatches"]
            return any(row["state"] == "ready" and row["attempts"] == 1 for row in rows)

        await eventually(waits)
        assert (await ops.get("/api/dispatches", orphaned="true"))["dispatches"] == []
    async with run_ops(stage, handlers=[LOG]) as ops:
        run = (await ops.get(f"/api/runs/{run_id}/wait", timeout=PATIENCE_SECONDS))["run"]
        assert run["finished"]
        assert "gone" in {row["handler"] for row in run["dispatches"] if row["orphaned"]}
        listed = (await ops.get("/api/dispatches", orphaned="true"))["dispatches"]
        assert {(row["run_id"], row["handler"], row["orphaned"]) for row in listed} == {
            (run_id, "gone", True)
        }
        metrics = (await ops.http.get("/metrics")).text
        assert f'receiver_dispatch_backlog{{state="orphaned"}} {len(listed)}.0' in metrics
        assert 'receiver_dispatch_backlog{state="ready"} 0.0' in metrics
    async with run_ops(stage, handlers=[storage("gone", stage.outputs), LOG]) as ops:
        assert (await ops.get("/api/dispatches", orphaned="true"))["dispatches"] == []
        assert (await ops.post("/api/dispatches/retry", {"handler": "gone"}))["dispatches"] == 1
        assert (await ops.get(f"/api/runs/{run_id}/wait", timeout=PATIENCE_SECONDS))["run"]["finished"]
        stage.check_files(run_id)


async def test_again_opens_a_new_round(ops: Ops) -> None:
    """Effects are applied under new idempotency keys; skipped dispatches stay skipped."""
    run_id = await ops.run_to_end("emu-text")
    before = await states(ops, run_id)
    armed = await ops.post(f"/api/runs/{run_id}/redispatch", {"handler": "log", "again": True})
    assert [(row["handler"], row["round"]) for row in armed["armed"]] == [("log", 1)]
    await ops.get(f"/api/runs/{run_id}/wait", timeout=PATIENCE_SECONDS)
    assert await states(ops, run_id) == {**before, "log:settled:1": "done"}
    await ops.post(f"/api/runs/{run_id}/redispatch", {"again": True})
    await ops.get(f"/api/runs/{run_id}/wait", timeout=PATIENCE_SECONDS)
    assert (await states(ops, run_id))["log:settled:2"] == "done"


async def test_a_handler_added_later_gets_old_runs_on_request(stage: Stage, tmp_path: Path) -> None:
    """It gets each run once, through its filter, and only those settled since the given time."""
    since = datetime.now(UTC) - timedelta(minutes=1)
    async with run_ops(stage, handlers=[LOG]) as ops:
        run_ids = [await ops.run_to_end("emu-text") for _ in range(3)]
    new = tmp_path / "later"
    async with run_ops(stage, handlers=[LOG, storage("later", new)]) as ops:
        assert set(await states(ops, run_ids[0])) == {"log:settled:0"}
        none = await ops.call_client(
            lambda client: client.redispatch_missing("later", datetime.now(UTC) + timedelta(days=1))
        )
        assert none == 0
        body = {"handler": "later", "since": since.isoformat(), "limit": 2}
        first = await ops.post("/api/runs/redispatch", body)
        assert (first["dispatches"], first["more"]) == (2, True)
        assert await ops.call_client(lambda client: client.redispatch_missing("later", since)) == 1
        assert await ops.call_client(lambda client: client.redispatch_missing("later", since)) == 0
        for run_id in run_ids:
            assert (await ops.get(f"/api/runs/{run_id}/wait", timeout=PATIENCE_SECONDS))["run"]["finished"]
            assert (await states(ops, run_id))["later:settled:0"] == "done"
            assert len(list(new.rglob(f"*/{run_id}/*.txt"))) == 1


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"handler": "nobody", "since": "2026-11-24T00:00:00Z"}, "handler"),
        ({"handler": "log"}, "since"),
        ({"handler": "log", "since": "yesterday"}, "since"),
        ({"handler": "log", "since": "2026-11-24T00:00:00"}, "since"),
        ({"handler": "log", "since": "2026-11-24T00:00:00Z", "limit": 0}, "limit"),
    ],
)
async def test_an_invalid_request_names_its_field(ops: Ops, body: Any, field: str) -> None:
    refused = await ops.post("/api/runs/redispatch", body, 400)
    assert [each["field"] for each in refused["error"]["fields"]] == [field]


async def test_retried_work_keeps_its_history(stage: Stage, tmp_path: Path) -> None:
    """Attempts are numbered on, in the run and in its timeline; the limit counts from the retry on."""
    mended = tmp_path / "mended"
    command = {"command": ["/bin/sh", "-c", f"test -e {mended}"]}
    strict = {"use": "command", "on": ["settled"], "max_attempts": 1, "options": command}
    async with run_ops(stage, handlers=[strict]) as ops:
        run_id = (await ops.start("emu-text"))["run"]["run_id"]
        for tries in (1, 2):
            run = (await ops.get(f"/api/runs/{run_id}/wait", timeout=PATIENCE_SECONDS))["run"]
            assert [(row["state"], row["attempts"]) for row in run["dispatches"]] == [("dead", tries)]
            if tries == 2:
                mended.touch()
            assert (await ops.post("/api/dispatches/retry", {"run_id": run_id}))["dispatches"] == 1
        run = (await ops.get(f"/api/runs/{run_id}/wait", timeout=PATIENCE_SECONDS))["run"]
        assert [(row["state"], row["attempts"]) for row in run["dispatches"]] == [("done", 3)]
        assert (await ops.post(f"/api/runs/{run_id}/redispatch", {}))["dispatches"] == 1
        await ops.get(f"/api/runs/{run_id}/wait", timeout=PATIENCE_SECONDS)
        entries = (await ops.get(f"/api/runs/{run_id}/timeline"))["entries"]
        ended = [(each["attempt"], each["outcome"]) for each in entries if each["kind"] == "attempt_ended"]
        assert ended == [(1, "dead"), (2, "dead"), (3, "done"), (4, "done")]


@pytest.mark.parametrize(
    "body",
    [{}, {"all": False}, {"all": True, "handler": "log"}, {"all": True, "run_id": "run_1"}, {"limit": 5}],
)
async def test_all_dispatches_are_retried_only_if_all_is_asked_for(ops: Ops, body: Any) -> None:
    refused = await ops.post("/api/dispatches/retry", body, 400)
    assert '"all": true' in refused["error"]["message"]


async def test_a_retry_with_a_cursor_of_another_list_is_refused(ops: Ops) -> None:
    await ops.post("/api/dispatches/retry", {"all": True, "cursor": "???"}, 400)


DEAD = 250


@pytest.fixture
async def dead(core: Core) -> Core:
    """Runs, each with a dead dispatch."""
    runs = [a_run(RunState.COMPLETED, run_id=f"run_{n:03}") for n in range(DEAD)]

    def job(tx: Any) -> None:
        ledger.add_runs(tx, runs)
        ledger.add_dispatches(
            tx, [Dispatch(run.run_id, "h", Event.SETTLED, 0, DispatchState.DEAD, NOW) for run in runs]
        )

    await core.database.write(job)
    return core


@contextlib.asynccontextmanager
async def dispatch_api(
    core: Core, pause: Callable[[float], Awaitable[object]], handler: str = "h"
) -> AsyncIterator[httpx.AsyncClient]:
    """Serve the endpoints on dispatches, with a pause of the test's own between transactions."""
    routes = DispatchRoutes(
        core.database, [Subscription(handler)], signals=core.signals, clock=core.clock, pause=pause
    )
    transport = httpx.ASGITransport(Starlette(routes=routes.routes()))
    async with httpx.AsyncClient(transport=transport, base_url="http://ops") as http:
        yield http


@pytest.mark.parametrize("late", [False, True])
async def test_thousands_are_made_due_with_room_for_callbacks(dead: Core, late: bool) -> None:
    """A hundred at a time: in every pause a callback is committed, for old runs and for a new handler."""
    count = "SELECT count(*) FROM dispatches WHERE state = 'ready'"
    seen: list[tuple[int, ...]] = []

    async def pause(seconds: float) -> None:
        assert seconds > 0
        await dead.call(f"whd_{len(seen)}", run_id=f"run_new_{len(seen)}")
        seen.extend(tuple(row) for row in await dead.rows(count))

    handler = "later" if late else "h"
    path = "/api/runs/redispatch" if late else "/api/dispatches/retry"
    since = (NOW - timedelta(days=1)).isoformat()
    body = {"handler": "later", "since": since, "limit": 500} if late else {"all": True}
    async with dispatch_api(dead, pause, handler) as http:
        answer = (await http.post(path, json=body)).json()
    assert seen == [(100,), (200,)]
    assert (answer["dispatches"], len(answer["armed"]), answer["more"]) == (DEAD, 100, False)
    assert dead.signals.dispatch.is_set()


async def test_a_retry_in_parts_takes_each_dispatch_once(dead: Core) -> None:
    """One that is dead again meanwhile is not retried for ever."""

    async def pause(seconds: float) -> None:
        await dead.database.write(lambda tx: tx.execute(dispatches.update().values(state="dead")).close())

    counts, cursor = [], None
    async with dispatch_api(dead, pause) as http:
        while True:
            body = {"handler": "h", "limit": 120} | ({"cursor": cursor} if cursor else {})
            answer = (await http.post("/api/dispatches/retry", json=body)).json()
            counts.append(answer["dispatches"])
            await pause(0)
            if not answer["more"]:
                break
            cursor = answer["next_cursor"]
    assert counts == [120, 120, 10]
    assert answer["next_cursor"] is None


async def test_dispatches_are_listed_by_state(ops: Ops) -> None:
    run_id = await ops.run_to_end()
    done = (await ops.get("/api/dispatches", state="done"))["dispatches"]
    assert {row["run_id"] for row in done} == {run_id}
    assert (await ops.get("/api/dispatches"))["dispatches"] == []
