"""Runs: start, track, list, wait, refresh, dispatch again, resolve; against the emulator."""

import asyncio
import json
import sqlite3
from contextlib import closing
from typing import Any

import pytest

from receiver.emulator import parse_faults
from receiver.model import StartState
from receiver.store import starts
from tests.support.patience import PATIENCE_SECONDS
from tests.support.postgres import Postgres
from tests.support.severing_proxy import run_severing_proxy
from tests.support.stage import Stage, eventually
from tests.web.ops.conftest import PROMPT, Ops, run_ops


async def test_a_start_returns_its_run(ops: Ops) -> None:
    """201 with start and run; after the wait, the run is finished and its files are listed."""
    response = await ops.start(metadata={"market": "de"}, idempotency_key="k")
    assert (response["start"]["state"], response["start"]["idempotency_key"]) == ("started", "k")
    assert not response["repeated"]
    run = response["run"]
    assert (run["origin"], run["metadata"], run["settled"]) == ("started", {"market": "de"}, False)
    waited = (await ops.get(f"/api/runs/{run['run_id']}/wait", timeout=PATIENCE_SECONDS))["run"]
    assert (waited["state"], waited["verdict"], waited["finished"]) == ("completed", "matched", True)
    assert waited["start"]["token"] == response["start"]["token"]
    assert [output["type"] for output in waited["outputs"]] == ["imageUrl"]
    assert {row["position"] for row in waited["artifacts"]} == {-1, 0}
    assert all(row["sha256"] and row["location"].startswith("file://") for row in waited["artifacts"])
    assert {row["state"] for row in waited["dispatches"]} <= {"done", "skipped"}
    ops.stage.check_files(run["run_id"])


async def test_the_same_key_again_is_the_same_run(ops: Ops) -> None:
    """200 the second time; a different request with the same key is 422."""
    first = await ops.start(idempotency_key="k")
    again = await ops.start(idempotency_key="k", status=200)
    assert again["repeated"]
    assert again["run"]["run_id"] == first["run"]["run_id"]
    conflict = await ops.start("emu-image", idempotency_key="k", mode="stream", status=422)
    assert conflict["error"]["code"] == "idempotency_conflict"
    assert conflict["start"]["run_id"] == first["run"]["run_id"]
    elsewhere = await ops.start("emu-text", idempotency_key="k")
    assert elsewhere["run"]["run_id"] != first["run"]["run_id"]
    assert len(ops.stage.rows("SELECT * FROM starts")) == 2


async def test_a_generation_is_started_and_stored(ops: Ops) -> None:
    body = {"type": "image", "prompt": "a fox", "workspace_id": "ws_emulator", "project_id": "prj_emulator"}
    response = await ops.post("/api/runs", {"generate": body, "idempotency_key": "g"}, 201)
    run_id = response["run"]["run_id"]
    waited = (await ops.get(f"/api/runs/{run_id}/wait", timeout=PATIENCE_SECONDS))["run"]
    assert (waited["state"], waited["run_type"], waited["quoted_cost"]) == ("completed", "generation", 0.04)
    assert waited["verdict"] == "matched"
    again = await ops.post("/api/runs", {"generate": body, "idempotency_key": "g"}, 200)
    assert again["run"]["run_id"] == run_id


async def test_a_callback_url_inside_generate_is_the_callers(ops: Ops) -> None:
    """It is not replaced by that of the service."""
    url = "https://hooks.example.com/mine"
    body = {"type": "text", "prompt": "a", "workspace_id": "ws_emulator", "project_id": "prj_emulator"}
    response = await ops.post("/api/runs", {"generate": {**body, "callback_url": url}}, 201)
    assert ops.stage.emulator.runs.get(response["run"]["run_id"]).callback_url == url
    assert not response["run"]["callback_expected"]


async def test_mode_stream_is_passed_on(ops: Ops) -> None:
    response = await ops.start(mode="stream")
    request = ops.stage.rows("SELECT request FROM starts")[0]["request"]
    assert json.loads(request)["mode"] == "stream"
    assert response["start"]["state"] == "started"


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        ({"kind": "insufficient_credits"}, 402, "insufficient_credits"),
        ({"kind": "not_found"}, 404, "not_found"),
        ({"kind": "unauthorized"}, 502, "flora_unauthorized"),
        ({"kind": "html", "status": 403}, 403, "flora_refused"),
        ({"kind": "html", "status": 418}, 502, "flora_refused"),
        ({"kind": "html", "status": 422}, 422, "flora_refused"),
    ],
)
async def test_a_refusal_of_flora_is_passed_on(
    ops: Ops, fault: dict[str, Any], status: int, code: str
) -> None:
    """With its status if it concerns the caller; 502 if FLORA refuses the service's key."""
    ops.add_fault(**fault, method="POST")
    response = await ops.start(idempotency_key="k", status=status)
    assert response["error"]["code"] == code
    assert response["error"]["request_id"].startswith("req_")
    assert response["start"]["state"] == "refused"
    if status == 402:
        assert (await ops.start(idempotency_key="k"))["start"]["state"] == "started"


async def test_the_fields_that_flora_names_are_passed_on(ops: Ops) -> None:
    body = {
        "technique_id": "emu-image",
        "inputs": [{"id": "q", "type": "text", "value": "x"}, {"id": "prompt"}],
    }
    error = (await ops.post("/api/runs", body, 400))["error"]
    assert error["code"] == "input_validation_error"
    assert [row["field"] for row in error["fields"]] == ["inputs.0.id", "inputs.1.type"]
    assert error["request_id"].startswith("req_")


async def test_without_a_response_of_flora_a_start_is_202(ops: Ops) -> None:
    """The service retries by itself; the same key gets the outcome."""
    ops.add_fault(kind="service_unavailable", method="POST")
    response = await ops.start(idempotency_key="k", wait_seconds=0, status=202)
    assert (response["start"]["state"], response["run"]) == ("asking", None)

    async def is_started() -> bool:
        response = await ops.http.post(
            "/api/runs", json={"technique_id": "emu-image", "inputs": [PROMPT], "idempotency_key": "k"}
        )
        return bool(response.json()["start"]["state"] == "started")

    await eventually(is_started)
    assert len(ops.stage.rows("SELECT * FROM runs")) == 1


async def test_a_start_without_a_key_can_be_repeated_after_a_failure(ops: Ops) -> None:
    """503 names the key that the service chose: whether it has committed the start or not, one run."""
    with closing(sqlite3.connect(ops.stage.database, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        failed = await ops.start(status=503)
        other.execute("ROLLBACK")
    key = failed["idempotency_key"]
    assert failed["error"]["code"] == "unavailable"
    assert "idempotency_key" in failed["error"]["message"]
    first = await ops.start(idempotency_key=key)
    again = await ops.start(idempotency_key=key, status=200)
    assert first["run"]["run_id"] == again["run"]["run_id"]
    assert "idempotency_key" not in await ops.get("/api/runs/run_unknown", 404)


async def test_a_committed_start_is_shown_though_the_database_is_gone(
    stage: Stage, postgres_server: Postgres, postgres_url: str
) -> None:
    """202 with its token and key, not 503: FLORA has been requested, and a repetition finds that start."""
    assert postgres_url
    body = {"technique_id": "emu-image", "inputs": [PROMPT], "wait_seconds": 0.5}
    with run_severing_proxy(postgres_server, "suite") as way:
        stage.postgres = way.url
        async with run_ops(stage, operations={"token": "0123456789abcdef"}) as ops:
            ops.add_fault(kind="slow", method="POST", seconds=2)
            sending = asyncio.create_task(ops.post("/api/runs", body, 202))

            async def is_requested() -> bool:
                return bool(stage.emulator.gate.requests["POST /techniques/{technique_id}/runs"])

            await eventually(is_requested)
            way.refusing = True
            way.sever()
            begun = await sending
            way.refusing = False
            assert (begun["start"]["state"], begun["run"]) == ("asking", None)
            key = begun["start"]["idempotency_key"]

            async def is_found() -> bool:
                response = await ops.http.post("/api/runs", json={**body, "idempotency_key": key})
                return response.status_code == 200 and response.json()["start"]["state"] == "started"

            await eventually(is_found)
            [run_id] = stage.emulator.runs._order
            found = await ops.post("/api/runs", {**body, "idempotency_key": key}, 200)
            assert (found["run"]["run_id"], found["start"]["token"]) == (run_id, begun["start"]["token"])


async def test_an_unknown_outcome_is_reported_and_resolved(ops: Ops) -> None:
    """409 with what to do; once resolved, it is a start like any other."""
    run_id = await ops.run_to_end(idempotency_key="k")  # else its callback might resolve it
    token = (await ops.start(idempotency_key="k", status=200))["start"]["token"]

    def forget(tx: Any) -> None:
        tx.exec_driver_sql(
            "UPDATE starts SET state = 'unknown', run_id = NULL, error_message = 'use runs resolve'"
        )

    await ops.service.database.write(forget)
    error = await ops.start(idempotency_key="k", status=409)
    assert (error["error"]["code"], error["start"]["token"]) == ("unknown_outcome", token)
    assert "runs resolve" in error["error"]["message"]
    [listed] = (await ops.get("/api/starts", state="unknown"))["starts"]
    assert listed["token"] == token
    for body in ({}, {"run_id": "nope"}, {"run_id": run_id, "more": 1}):
        await ops.post(f"/api/starts/{token}/resolve", body, 400)
    resolved = await ops.post(f"/api/starts/{token}/resolve", {"run_id": run_id})
    assert (resolved["start"]["state"], resolved["run"]["run_id"]) == ("started", run_id)
    again = await ops.post(f"/api/starts/{token}/resolve", {"run_id": run_id})
    assert again["start"]["state"] == "started"
    assert (await ops.post(f"/api/starts/{token}/resolve", {"run_id": None}, 409))["error"][
        "code"
    ] == "already_started"
    await ops.post("/api/starts/nobody/resolve", {"run_id": run_id}, 404)
    await ops.run_to_end(idempotency_key="k2")
    other = (await ops.start(idempotency_key="k2", status=200))["start"]["token"]
    await ops.service.database.write(forget_only(other))
    taken = await ops.post(f"/api/starts/{other}/resolve", {"run_id": run_id}, 409)
    assert taken["error"]["code"] == "run_taken"
    none = await ops.post(f"/api/starts/{other}/resolve", {"run_id": None})
    assert (none["start"]["state"], none["start"]["error"]["code"]) == ("refused", "resolved")


def forget_only(token: str) -> Any:
    def job(tx: Any) -> None:
        start = starts.by_token(tx, [token])[token]
        assert start.state is StartState.STARTED
        tx.exec_driver_sql("UPDATE starts SET state = 'unknown', run_id = NULL WHERE token = ?", (token,))

    return job


WRONG_STARTS = [
    ({"inputs": [PROMPT]}, ""),
    ({"technique_id": "a", "generate": {}}, ""),
    ({"generate": {}, "inputs": [PROMPT]}, ""),
    ({"technique_id": ""}, "technique_id"),
    ({"technique_id": "a b"}, "technique_id"),
    ({"technique_id": ".."}, "technique_id"),
    ({"technique_id": 7}, "technique_id"),
    ({"technique_id": "a", "inputs": {}}, "inputs"),
    ({"technique_id": "a", "inputs": ["b"]}, "inputs.0"),
    ({"technique_id": "a", "mode": "sync"}, "mode"),
    ({"technique_id": "a", "wait_seconds": 61}, "wait_seconds"),
    ({"technique_id": "a", "wait_seconds": -1}, "wait_seconds"),
    ({"technique_id": "a", "wait_seconds": "1"}, "wait_seconds"),
    ({"technique_id": "a", "idempotency_key": ""}, "idempotency_key"),
    ({"technique_id": "a", "idempotency_key": "a\u0000"}, "idempotency_key"),
    ({"technique_id": "a", "idempotency_key": "a" * 256}, "idempotency_key"),
    ({"technique_id": "a", "metadata": []}, "metadata"),
    ({"technique_id": "a", "colour": "red"}, "colour"),
]


async def test_an_invalid_start_is_neither_stored_nor_sent(ops: Ops) -> None:
    for body, field in WRONG_STARTS:
        error = (await ops.post("/api/runs", body, 400))["error"]
        assert error["code"] == "invalid_request"
        assert field in [row["field"] for row in error["fields"]]
        assert ops.stage.emulator.gate.requests.total() == 0
        assert ops.stage.rows("SELECT * FROM starts") == []


async def test_a_run_is_tracked_by_its_id_or_its_poll_url(ops: Ops) -> None:
    base = ops.stage.emulator.base_url(ops.stage.origin)
    by_id, by_url = ops.stage.start(callback=False), ops.stage.start("emu-text", callback=False)
    one = await ops.post(
        "/api/runs/track", {"run_id": by_id, "technique_id": "tech_emu_image", "metadata": {"a": [1, None]}}
    )
    assert (one["run"]["origin"], one["run"]["metadata"]) == ("tracked", {"a": [1, None]})
    two = await ops.post(
        "/api/runs/track", {"poll_url": f"{base}/techniques/tech_emu_text/runs/{by_url}", "metadata": {}}
    )
    assert (two["run"]["run_id"], two["run"]["technique_id"]) == (by_url, "tech_emu_text")
    for run_id in (by_id, by_url):
        waited = (await ops.get(f"/api/runs/{run_id}/wait", timeout=PATIENCE_SECONDS))["run"]
        assert (waited["state"], waited["verdict"], waited["finished"]) == ("completed", None, True)
        ops.stage.check_files(run_id)


WRONG_TRACKS: list[tuple[dict[str, Any], str]] = [
    ({}, "invalid_request"),
    ({"run_id": "abc"}, "invalid_request"),
    ({"run_id": "run_"}, "invalid_request"),
    ({"run_id": "run_a b"}, "invalid_request"),
    ({"run_id": "run_a/b"}, "invalid_request"),
    ({"run_id": "run_" + "a" * 300}, "invalid_request"),
    ({"run_id": 5}, "invalid_request"),
    ({"run_id": "run_a", "run_type": "other"}, "invalid_request"),
    ({"poll_url": "https://evil.example/api/v1/runs/run_a"}, "foreign_poll_url"),
    ({"poll_url": "http://127.0.0.1:9100@evil.example/runs/run_a"}, "foreign_poll_url"),
    ({"poll_url": "http://evil@127.0.0.1/runs/run_a"}, "foreign_poll_url"),
    ({"poll_url": "http://127.0.0.1:1/api/v1/runs/run_a"}, "foreign_poll_url"),
    ({"poll_url": "//[::1/runs/run_a"}, "foreign_poll_url"),
    ({"poll_url": "run_a"}, "foreign_poll_url"),
    ({"poll_url": "{base}/runs/"}, "invalid_request"),
    ({"poll_url": "{base}/runs/abc"}, "invalid_request"),
    ({"poll_url": "{base}/runs/run_a", "run_id": "run_b"}, "invalid_request"),
    ({"poll_url": "{base}/techniques/t/runs/run_a", "technique_id": "u"}, "invalid_request"),
]


async def test_an_invalid_run_is_not_tracked(ops: Ops) -> None:
    """The API key is sent to FLORA's base URL only: a poll_url elsewhere is refused."""
    for body, code in WRONG_TRACKS:
        base = ops.stage.emulator.base_url(ops.stage.origin)
        given = {
            key: value.replace("{base}", base) if isinstance(value, str) else value
            for key, value in body.items()
        }
        assert (await ops.post("/api/runs/track", given, 400))["error"]["code"] == code
        assert ops.stage.rows("SELECT * FROM runs") == []


async def test_runs_are_listed_page_by_page(ops: Ops) -> None:
    """Newest first, none twice and none left out, while others are added between two pages."""
    for number in range(7):
        await ops.post("/api/runs/track", {"run_id": f"run_{number}"})
    seen: list[str] = []
    cursor = None
    while True:
        page = await ops.get("/api/runs", limit=3, **({"cursor": cursor} if cursor else {}))
        seen += [run["run_id"] for run in page["runs"]]
        await ops.post("/api/runs/track", {"run_id": f"run_new_{len(seen)}"})
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert sorted(seen) == [f"run_{number}" for number in range(7)]
    assert (await ops.get("/api/runs", state="completed"))["runs"] == []
    assert len((await ops.get("/api/runs", state="open", limit=500))["runs"]) == 10
    assert "outputs" not in page["runs"][0]


WRONG_PARAMETERS = [
    ("/api/runs?limit=0", "limit"),
    ("/api/runs?limit=501", "limit"),
    ("/api/runs?limit=ten", "limit"),
    ("/api/runs?limit=%C2%B2", "limit"),
    ("/api/runs?state=done", "state"),
    ("/api/runs?cursor=x", "cursor"),
    ("/api/runs?cursor=WzEsMl0=", "cursor"),
    ("/api/runs?cursor=%C3%A4", "cursor"),
    ("/api/starts?state=open", "state"),
    ("/api/dispatches?state=open", "state"),
    ("/api/deliveries?cursor=WzEsICJhIl0=", "cursor"),
    ("/api/runs/run_1/wait?timeout=-1", "timeout"),
    ("/api/runs/run_1/wait?timeout=121", "timeout"),
    ("/api/runs/run_1/wait?timeout=nan", "timeout"),
    ("/api/runs/run_1/wait?timeout=soon", "timeout"),
]


async def test_parameters_out_of_range_are_named(ops: Ops) -> None:
    for path, field in WRONG_PARAMETERS:
        error = (await ops.get(path, 400))["error"]
        assert [row["field"] for row in error["fields"]] == [field]


async def test_an_unknown_run_is_404_at_once(ops: Ops) -> None:
    for path in ("", "/wait?timeout=120", "/timeline"):
        assert (await ops.get(f"/api/runs/run_nobody{path}", 404))["error"]["code"] == "not_found"
    for action in ("refresh", "redispatch"):
        await ops.post(f"/api/runs/run_nobody/{action}", {}, 404)


async def test_a_wait_ends_with_its_timeout(ops: Ops) -> None:
    """An unfinished run is returned as it is; a timeout of 0 reads it once."""
    await ops.post("/api/runs/track", {"run_id": "run_1"})
    response = await ops.get("/api/runs/run_1/wait", timeout=0)
    assert not response["run"]["finished"]
    assert not (await ops.get("/api/runs/run_1/wait", timeout=0.2))["run"]["finished"]


async def test_many_requests_can_wait_for_one_run(ops: Ops) -> None:
    run_id = (await ops.start())["run"]["run_id"]
    responses = await asyncio.gather(
        *(ops.get(f"/api/runs/{run_id}/wait", timeout=PATIENCE_SECONDS) for _ in range(5))
    )
    assert all(response["run"]["finished"] for response in responses)


async def test_a_wait_ends_when_a_dispatch_is_dead(stage: Stage) -> None:
    """A dead dispatch is over: the run is finished."""
    handlers = [{"use": "storage", "max_attempts": 1, "options": {"url": str(stage.outputs)}}]
    async with run_ops(stage, handlers=handlers) as ops:
        ops.add_fault(kind="expired", status=404)
        run_id = (await ops.start())["run"]["run_id"]
        run = (await ops.get(f"/api/runs/{run_id}/wait", timeout=PATIENCE_SECONDS))["run"]
        assert run["finished"]
        [dead] = (await ops.get("/api/dispatches"))["dispatches"]
        assert (dead["run_id"], dead["handler"], dead["state"]) == (run_id, "storage", "dead")
        assert dead["last_error"]
        assert (await ops.post("/api/dispatches/retry", {"handler": "other"}))["dispatches"] == 0
        armed = await ops.post("/api/dispatches/retry", {"run_id": run_id})
        assert armed["dispatches"] == 1
        await ops.get(f"/api/runs/{run_id}/wait", timeout=PATIENCE_SECONDS)
        stage.check_files(run_id)
        assert (await ops.get("/api/dispatches"))["dispatches"] == []


async def test_a_run_is_dispatched_again(ops: Ops) -> None:
    """Attempts are numbered on, and the handler's effect is applied once."""
    run_id = await ops.run_to_end("emu-two-images")
    before = ops.stage.files(run_id)
    armed = await ops.post(f"/api/runs/{run_id}/redispatch", {"handler": "storage"})
    assert {row["handler"] for row in armed["armed"]} == {"storage"}
    run = (await ops.get(f"/api/runs/{run_id}/wait", timeout=PATIENCE_SECONDS))["run"]
    settled = next(
        row for row in run["dispatches"] if (row["handler"], row["event"]) == ("storage", "settled")
    )
    assert (settled["state"], settled["attempts"]) == ("done", 2)
    assert ops.stage.files(run_id) == before
    assert (await ops.post(f"/api/runs/{run_id}/redispatch", {"handler": "nobody"}))["dispatches"] == 0
    assert (await ops.post(f"/api/runs/{run_id}/redispatch", {}))["dispatches"] > 1
    await ops.get(f"/api/runs/{run_id}/wait", timeout=PATIENCE_SECONDS)


async def test_a_refresh_says_that_reads_are_held(ops: Ops) -> None:
    """FLORA refuses the key: nothing is read, and the run says so until it is settled."""
    ops.stage.emulator.faults.add(parse_faults({"kind": "unauthorized", "method": "GET"}))
    run_id = ops.stage.start(callback=False)
    await ops.post("/api/runs/track", {"run_id": run_id, "technique_id": "emu-image"})

    async def is_held() -> bool:
        return "reads_held" in (await ops.get(f"/api/runs/{run_id}"))["run"]

    await eventually(is_held)
    held = (await ops.post(f"/api/runs/{run_id}/refresh", {}))["run"]["reads_held"]
    assert "FLORA does not accept this service's API key" in held["reason"]
    assert "check FLORA_API_KEY" in held["reason"]
    run = await ops.call_client(lambda receiver: receiver.refresh(run_id))
    assert run.reads_held is not None
    assert "reads_held" not in (await ops.get("/api/runs"))["runs"][0]


async def test_a_refresh_reads_the_run_now(stage: Stage) -> None:
    async with run_ops(stage, reconcile={"first_poll_seconds": 600, "max_gap_seconds": 600}) as ops:
        run_id = stage.start(callback=False)
        known = {"run_id": run_id, "technique_id": "tech_emu_image", "callback_expected": True}
        await ops.post("/api/runs/track", known)
        await eventually(lambda: _has_ended(stage, run_id))
        await ops.post(f"/api/runs/{run_id}/refresh", {})
        assert (await ops.get(f"/api/runs/{run_id}/wait", timeout=PATIENCE_SECONDS))["run"]["finished"]
        await ops.post(f"/api/runs/{run_id}/refresh", {"force": True}, 400)


async def _has_ended(stage: Stage, run_id: str) -> bool:
    emulator = stage.emulator
    return emulator.runs.get(run_id).status_at(emulator.runs.clock()) == "completed"


async def test_the_timeline_lists_what_happened_in_order(ops: Ops) -> None:
    run_id = await ops.run_to_end(idempotency_key="k")
    found = await ops.get(f"/api/runs/{run_id}/timeline")
    kinds = [entry["kind"] for entry in found["entries"]]
    assert {"asked", "first_seen", "callback", "settled", "attempt", "attempt_ended", "stored"} <= set(
        kinds
    )
    assert kinds.index("callback") < kinds.index("settled") < kinds.index("stored")
    assert [entry["at"] for entry in found["entries"]] == sorted(entry["at"] for entry in found["entries"])
    assert found["reads"] >= 1
    assert found["run"]["run_id"] == run_id


async def test_a_run_shows_its_last_reads_and_its_poll_url(ops: Ops) -> None:
    """What failed is not counted as a read; each is in the run and in its timeline, with FLORA's request id."""
    ops.add_fault(kind="html", status=503, method="GET", next=2)
    run_id = ops.stage.emulator.start_run("emu-image")
    base = ops.stage.emulator.base_url(ops.stage.origin)
    url = f"{base}/techniques/tech_emu_image/runs/{run_id}"
    tracked = await ops.post("/api/runs/track", {"poll_url": url})
    assert tracked["run"]["poll_url"] == url
    await ops.get(f"/api/runs/{run_id}/wait", timeout=30)
    run = (await ops.get(f"/api/runs/{run_id}"))["run"]
    assert run["failed_polls"] == 2
    assert run["polls"] == len(run["last_reads"]) - 2 >= 1
    assert [read["outcome"] for read in run["last_reads"][:2]] == ["failed", "failed"]
    assert {read["http_status"] for read in run["last_reads"][:2]} == {503}
    last = run["last_reads"][-1]
    assert (last["outcome"], last["run_status"], last["http_status"]) == ("returned", "completed", 200)
    assert all(read["request_id"].startswith("req_") for read in run["last_reads"])
    timeline = await ops.get(f"/api/runs/{run_id}/timeline")
    assert (timeline["reads"], timeline["failed_reads"]) == (run["polls"], 2)
    shown = [entry for entry in timeline["entries"] if entry["kind"] == "read"]
    assert [
        {"requested_at": entry["at"], **read} for entry, read in zip(shown, run["last_reads"], strict=True)
    ] == run["last_reads"]
    assert timeline["run"]["last_reads"] == run["last_reads"]
    listed = (await ops.get("/api/runs"))["runs"][0]
    assert (listed["failed_polls"], listed["poll_url"], "last_reads" in listed) == (2, url, False)
    seen = await ops.call_client(lambda receiver: receiver.run(run_id))
    assert seen.last_reads[-1].request_id == last["request_id"]


async def test_a_wait_continues_through_a_restart(stage: Stage) -> None:
    """The Python client waits while the service restarts, and returns when the run is over."""
    slow = [{"kind": "run_seconds", "seconds": 1.5}]
    async with run_ops(stage) as ops:
        run_id = stage.emulator.start_run("emu-image", callback_url=stage.url, faults=slow)
        await ops.post("/api/runs/track", {"run_id": run_id, "technique_id": "tech_emu_image"})
        port = ops.service.operations_address[1]
        waiter = asyncio.create_task(
            ops.call_client(lambda receiver: receiver.wait(run_id, timeout_seconds=PATIENCE_SECONDS))
        )
        await eventually(lambda: _is_waited_for(ops, run_id))
    assert not waiter.done()
    async with run_ops(stage, operations={"port": port}):
        run = await waiter
    assert (run.run_id, run.state, run.finished) == (run_id, "completed", True)
    stage.check_files(run_id)


async def _is_waited_for(ops: Ops, run_id: str) -> bool:
    return run_id in ops.service.signals.changes._by_run


async def test_a_technique_is_returned_as_flora_declares_it(ops: Ops) -> None:
    technique = (await ops.get("/api/techniques/emu-two-images"))["technique"]
    assert (technique["technique_id"], technique["slug"]) == ("tech_emu_two_images", "emu-two-images")
    assert technique["run_cost"] == 0.08
    assert technique["inputs"][0] == {"id": "prompt", "type": "text", "name": "Prompt", "optional": False}
    assert {row["id"]: row["optional"] for row in technique["inputs"]} == {
        "prompt": False,
        "image": True,
        "size": True,
    }
    assert [row["type"] for row in technique["outputs"]] == ["imageUrl", "imageUrl"]


FLORA_ERRORS = [
    (None, 404, "not_found"),
    ({"kind": "unauthorized"}, 502, "flora_unauthorized"),
    ({"kind": "rate_limited", "retry_after": 0}, 503, "flora_rate_limited"),
    ({"kind": "internal_error"}, 503, "flora_unavailable"),
    ({"kind": "html"}, 502, "flora_refused"),
]


async def test_errors_of_flora_are_passed_on(ops: Ops) -> None:
    for fault, status, code in FLORA_ERRORS:
        if fault is not None:
            ops.add_fault(**fault, path="/techniques")
        response = await ops.http.get("/api/techniques/nobody")
        assert (response.status_code, response.json()["error"]["code"]) == (status, code)
        assert ("retry-after" in response.headers) == (status == 503)
