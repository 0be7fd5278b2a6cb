"""Dispatches: retried, repeated, sent to handlers added later, and orphaned."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

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
        run = (await ops.get(f"/api/runs/{run_id}/wait", timeout=20))["run"]
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
        assert (await ops.get(f"/api/runs/{run_id}/wait", timeout=30))["run"]["finished"]
        stage.check_files(run_id)


async def test_again_opens_a_new_round(ops: Ops) -> None:
    """Effects are applied under new idempotency keys; skipped dispatches stay skipped."""
    run_id = await ops.run_to_end("emu-text")
    before = await states(ops, run_id)
    armed = await ops.post(f"/api/runs/{run_id}/redispatch", {"handler": "log", "again": True})
    assert [(row["handler"], row["round"]) for row in armed["armed"]] == [("log", 1)]
    await ops.get(f"/api/runs/{run_id}/wait", timeout=30)
    assert await states(ops, run_id) == {**before, "log:settled:1": "done"}
    await ops.post(f"/api/runs/{run_id}/redispatch", {"again": True})
    await ops.get(f"/api/runs/{run_id}/wait", timeout=30)
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
            assert (await ops.get(f"/api/runs/{run_id}/wait", timeout=30))["run"]["finished"]
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


async def test_dispatches_are_listed_by_state(ops: Ops) -> None:
    run_id = await ops.run_to_end()
    done = (await ops.get("/api/dispatches", state="done"))["dispatches"]
    assert {row["run_id"] for row in done} == {run_id}
    assert (await ops.get("/api/dispatches"))["dispatches"] == []
