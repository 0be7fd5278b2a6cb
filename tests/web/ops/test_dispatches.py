"""Doing handlers' work again, or for the first time on old runs; and work that waits for a handler nobody has configured."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.support.stage import Stage, eventually
from tests.web.ops.conftest import Ops, operating


def storage(name: str, url: Path, **more: Any) -> dict[str, Any]:
    return {"use": "storage", "name": name, **more, "options": {"url": str(url)}}


LOG = {"use": "log"}
PATIENT = {"first_seconds": 3600, "longest_seconds": 3600}


async def states(ops: Ops, run_id: str) -> dict[str, str]:
    run = (await ops.get(f"/api/runs/{run_id}"))["run"]
    return {f"{row['handler']}:{row['event']}:{row['round']}": row["state"] for row in run["dispatches"]}


async def test_what_waits_for_a_handler_that_is_gone_is_shown_and_not_lost(stage: Stage, tmp_path: Path) -> None:
    """It keeps nobody waiting, is listed and counted as orphaned, and is done once the handler is configured again."""
    async with operating(stage, handlers=[storage("gone", stage.outputs, backoff=PATIENT), LOG]) as ops:
        ops.break_it(kind="expired", status=500)
        run_id = (await ops.start())["run"]["run_id"]

        async def waits() -> bool:
            rows = (await ops.get(f"/api/runs/{run_id}"))["run"]["dispatches"]
            return any(row["state"] == "ready" and row["attempts"] == 1 for row in rows)

        await eventually(waits)
        assert (await ops.get("/api/dispatches", orphaned="true"))["dispatches"] == []
    async with operating(stage, handlers=[LOG]) as ops:
        run = (await ops.get(f"/api/runs/{run_id}/wait", timeout=20))["run"]
        assert run["finished"]
        assert "gone" in {row["handler"] for row in run["dispatches"] if row["orphaned"]}
        listed = (await ops.get("/api/dispatches", orphaned="true"))["dispatches"]
        assert {(row["run_id"], row["handler"], row["orphaned"]) for row in listed} == {(run_id, "gone", True)}
        metrics = (await ops.http.get("/metrics")).text
        assert f'receiver_dispatch_backlog{{state="orphaned"}} {len(listed)}.0' in metrics
        assert 'receiver_dispatch_backlog{state="ready"} 0.0' in metrics
    async with operating(stage, handlers=[storage("gone", stage.outputs), LOG]) as ops:
        assert (await ops.get("/api/dispatches", orphaned="true"))["dispatches"] == []
        assert (await ops.post("/api/dispatches/retry", {"handler": "gone"}))["dispatches"] == 1
        assert (await ops.get(f"/api/runs/{run_id}/wait", timeout=30))["run"]["finished"]
        stage.check_files(run_id)


async def test_again_opens_a_new_round(ops: Ops) -> None:
    """Its effects are applied under new idempotency keys; what was skipped is left alone."""
    run_id = await ops.finished("emu-text")
    before = await states(ops, run_id)
    armed = await ops.post(f"/api/runs/{run_id}/redispatch", {"handler": "log", "again": True})
    assert [(row["handler"], row["round"]) for row in armed["armed"]] == [("log", 1)]
    await ops.get(f"/api/runs/{run_id}/wait", timeout=30)
    assert await states(ops, run_id) == {**before, "log:settled:1": "done"}
    await ops.post(f"/api/runs/{run_id}/redispatch", {"again": True})
    await ops.get(f"/api/runs/{run_id}/wait", timeout=30)
    assert (await states(ops, run_id))["log:settled:2"] == "done"


async def test_a_handler_added_later_is_told_of_old_runs_when_asked(stage: Stage, tmp_path: Path) -> None:
    """Not by itself; then each run once, through the handler's filter, and only those settled since."""
    since = datetime.now(UTC) - timedelta(minutes=1)
    async with operating(stage, handlers=[LOG]) as ops:
        run_ids = [await ops.finished("emu-text") for _ in range(3)]
    new = tmp_path / "later"
    async with operating(stage, handlers=[LOG, storage("later", new)]) as ops:
        assert set(await states(ops, run_ids[0])) == {"log:settled:0"}
        none = await ops.ask(lambda client: client.redispatch_missing("later", datetime.now(UTC) + timedelta(days=1)))
        assert none == 0
        body = {"handler": "later", "since": since.isoformat(), "limit": 2}
        first = await ops.post("/api/runs/redispatch", body)
        assert (first["dispatches"], first["more"]) == (2, True)
        assert await ops.ask(lambda client: client.redispatch_missing("later", since)) == 1
        assert await ops.ask(lambda client: client.redispatch_missing("later", since)) == 0
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
async def test_what_is_wrong_is_told_with_its_field(ops: Ops, body: Any, field: str) -> None:
    refused = await ops.post("/api/runs/redispatch", body, 400)
    assert [each["field"] for each in refused["error"]["fields"]] == [field]
