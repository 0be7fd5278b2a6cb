"""Callbacks, refusals, dispatches, techniques, the channel, changes, metrics, and the document that describes it all."""

import asyncio
import re
from typing import Any

import httpx
from starlette.routing import Route

from receiver.cli.trigger.cases import CASES, CallbackFactory
from receiver.service.service import Service
from receiver.store.changes import Change, Changes
from receiver.web.ops.openapi import openapi_document
from receiver.web.ops.views import to_change
from receiver.web.ops.wait import next_changes
from receiver.workers.loop import run_until
from tests.support.stage import Stage, eventually
from tests.web.ops.conftest import Ops, events, operating


async def test_callbacks_are_listed_with_their_raw_bodies(ops: Ops) -> None:
    run_id = await ops.finished()
    [listed] = (await ops.get("/api/deliveries", run_id=run_id))["deliveries"]
    assert (listed["run_id"], listed["event"], listed["duplicates"]) == (run_id, "run.completed", 0)
    shown = (await ops.get(f"/api/deliveries/{listed['delivery_id']}"))["delivery"]
    assert listed["delivery_id"] in shown["body"]
    assert shown["signature"].startswith("t=")
    assert (await ops.get("/api/deliveries", run_id="run_other"))["deliveries"] == []
    await ops.get("/api/deliveries/whd_nobody", 404)


async def test_a_delivery_whose_id_has_a_slash_is_shown(ops: Ops) -> None:
    """FLORA's ids are opaque."""
    async with ops.stage.client() as client:
        body = ops.stage.body("run_1", delivery_id="whd/a/b")
        assert (await ops.stage.send(client, body)).status_code == 200
    assert (await ops.get("/api/deliveries/whd%2Fa%2Fb"))["delivery"]["body"] == body.decode()
    assert await ops.ask(lambda receiver: receiver.delivery("whd/a/b")["run_id"]) == "run_1"


async def test_refused_requests_are_listed_without_their_bodies(ops: Ops) -> None:
    (request,) = CASES["signature_mismatch"](CallbackFactory("", "run_1", "whd_1"))
    async with ops.stage.client() as client:
        for _ in range(3):
            await client.post(ops.stage.url, content=request.body, headers=dict(request.headers))

    async def written() -> bool:
        return len((await ops.get("/api/rejections"))["rejections"]) == 3

    await eventually(written)
    page = await ops.get("/api/rejections", limit=2)
    assert [row["code"] for row in page["rejections"]] == ["signature_mismatch"] * 2
    rest = await ops.get("/api/rejections", limit=2, cursor=page["next_cursor"])
    assert (len(rest["rejections"]), rest["next_cursor"]) == (1, None)
    assert page["rejections"][0].keys() == {"rejected_at", "code", "remote", "size"}


async def test_dispatches_are_listed_by_state(ops: Ops) -> None:
    run_id = await ops.finished()
    done = (await ops.get("/api/dispatches", state="done"))["dispatches"]
    assert {row["run_id"] for row in done} == {run_id}
    assert (await ops.get("/api/dispatches"))["dispatches"] == []


async def test_a_technique_is_told_as_flora_declares_it(ops: Ops) -> None:
    technique = (await ops.get("/api/techniques/emu-two-images"))["technique"]
    assert (technique["technique_id"], technique["slug"]) == ("tech_emu_two_images", "emu-two-images")
    assert technique["run_cost"] == 0.08
    assert technique["inputs"][0] == {"id": "prompt", "type": "text", "name": "Prompt", "optional": False}
    assert {row["id"]: row["optional"] for row in technique["inputs"]} == {"prompt": False, "image": True, "size": True}
    assert [row["type"] for row in technique["outputs"]] == ["imageUrl", "imageUrl"]


TROUBLES = [
    (None, 404, "not_found"),
    ({"kind": "unauthorized"}, 502, "flora_unauthorized"),
    ({"kind": "rate_limited", "retry_after": 0}, 503, "flora_rate_limited"),
    ({"kind": "internal_error"}, 503, "flora_unavailable"),
    ({"kind": "html"}, 502, "flora_refused"),
]


async def test_floras_troubles_are_told(ops: Ops) -> None:
    for fault, status, code in TROUBLES:
        if fault is not None:
            ops.break_it(**fault, path="/techniques")
        answer = await ops.http.get("/api/techniques/nobody")
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        assert ("retry-after" in answer.headers) == (status == 503)


async def test_the_channel_is_judged(ops: Ops) -> None:
    """Healthy with matched runs; a run that had to be recovered is trouble, with its likely cause."""
    await ops.finished()
    channel = await ops.get("/api/channel")
    assert channel["health"]["ok"]
    assert (channel["health"]["matched"], channel["arrivals"]) == (1, 1)
    assert sum(hour.get("matched", 0) for hour in channel["hours"]) == 1
    ops.stage.emulator.faults.add([])
    run_id = ops.stage.emulator.start_run("emu-image", callback_url=ops.stage.url, faults=[{"kind": "drop"}])
    known = {"run_id": run_id, "technique_id": "tech_emu_image", "callback_expected": True}
    await ops.post("/api/runs/track", known)
    await ops.stage.at(run_id, verdict="recovered")
    channel = await ops.get("/api/channel")
    assert not channel["health"]["ok"]
    assert channel["health"]["recovered"] == 1
    assert channel["health"]["cause"]
    assert channel["health"]["cure"]


async def test_changes_are_streamed_as_they_happen(ops: Ops) -> None:
    """A start, its run's states, its dispatches: each as an event, in order, over a stream that says that it is there."""
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
    """And its stream ends when the service stops."""

    def follow() -> list[str]:
        from receiver.client.client import ReceiverClient  # noqa: PLC0415

        with ReceiverClient(ops.url, ops.token) as receiver:
            return [change["state"] for change in receiver.events() if change["kind"] == "run"]

    following = asyncio.create_task(asyncio.to_thread(follow))

    async def listening() -> bool:
        return bool(ops.service.signals.changes._all)

    await eventually(listening)
    await ops.finished()
    ops.service._stopping.set()
    states = await following
    assert states[0] == "open"
    assert "completed" in states


async def test_who_lags_behind_is_told_so() -> None:
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


async def test_a_quiet_stream_beats() -> None:
    with Changes().subscribe() as listener:
        assert await anext(next_changes(listener, asyncio.Event(), heartbeat_seconds=0)) is None


async def test_a_wait_inside_a_request_ends_with_the_service() -> None:
    stopping = asyncio.Event()
    stopping.set()
    assert await run_until(stopping, asyncio.Event().wait()) is None


def test_a_start_in_the_stream_names_its_run_only_once_it_has_one() -> None:
    """It is published under its token, which is not a run."""
    assert to_change(Change("start", "token", "refused"))["run_id"] is None
    assert to_change(Change("start", "token", "started", "run_1"))["run_id"] == "run_1"


async def test_long_requests_end_with_the_service(stage: Stage) -> None:
    """A wait is answered 503, a stream ends, and the service stops within its deadlines."""
    async with operating(stage) as ops:
        await ops.post("/api/runs/track", {"run_id": "run_1"})
        url, token = ops.url, ops.token
        client = httpx.AsyncClient(base_url=url, headers={"Authorization": f"Bearer {token}"}, trust_env=False)
        waiting = asyncio.create_task(client.get("/api/runs/run_1/wait?timeout=120", timeout=60))
        streaming = asyncio.create_task(client.get("/api/events", timeout=60))

        async def both() -> bool:
            return bool(ops.service.signals.changes._all and ops.service.signals.changes._by_run)

        await eventually(both)
    answer = await waiting
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
    assert (await streaming).status_code == 200
    await client.aclose()


async def test_metrics_count_what_is_unsettled(ops: Ops) -> None:
    await ops.finished()
    await ops.post("/api/runs/track", {"run_id": "run_1"})
    answer = await ops.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    assert 'flora_receiver_runs{state="open"} 1.0' in answer.text
    assert 'flora_receiver_runs_settled_total{state="completed"} 1.0' in answer.text
    assert 'flora_receiver_dispatch_backlog{state="ready"} 0.0' in answer.text
    assert await ops.get("/healthz") == {"status": "ok"}


def routes(service: Service) -> set[tuple[str, str]]:
    """Every (method, path) that the listener serves."""
    assert service._operations is not None
    app: Any = service._operations.config.app
    return {
        (method.lower(), re.sub(r":\w+}", "}", route.path))
        for route in app.routes
        if isinstance(route, Route)
        for method in route.methods or ()
        if method != "HEAD"
    }


async def test_every_route_is_described(ops: Ops) -> None:
    """And no route is described that is not there; every name that is referred to is defined."""
    found = await ops.get("/api/openapi.json")
    described = {(method, path) for path, methods in found["paths"].items() for method in methods}
    assert described == routes(ops.service)
    referred = set(re.findall(r"#/components/schemas/(\w+)", str(found)))
    assert referred == set(found["components"]["schemas"])
    for path, methods in found["paths"].items():
        for operation in methods.values():
            named = {row["name"] for row in operation["parameters"] if row["in"] == "path"}
            assert named == set(re.findall(r"{(\w+)}", path))
            assert {"401", "403", "503"} <= operation["responses"].keys()


async def test_told_stands_beside_the_name_that_replaces_it(ops: Ops) -> None:
    run = (await ops.get(f"/api/runs/{await ops.finished()}"))["run"]
    assert (run["callback_status"], run["told"]) == ("completed", "completed")
    described = openapi_document()["components"]["schemas"]["Run"]["properties"]
    assert described["told"]["deprecated"]
    assert "deprecated" not in described["callback_status"]


async def test_what_is_answered_is_what_is_described(ops: Ops) -> None:
    """Every key of every answer stands in the document."""
    run_id = await ops.finished(idempotency_key="k")
    delivery = (await ops.get("/api/deliveries"))["deliveries"][0]["delivery_id"]
    for path, described in (
        ("/api/runs", "RunPage"),
        (f"/api/runs/{run_id}", "OneRun"),
        (f"/api/runs/{run_id}/timeline", "Timeline"),
        ("/api/starts", "StartPage"),
        ("/api/deliveries", "DeliveryPage"),
        (f"/api/deliveries/{delivery}", "OneDelivery"),
        ("/api/dispatches?state=done", "DispatchPage"),
        ("/api/channel", "Channel"),
        ("/api/techniques/emu-image", "OneTechnique"),
    ):
        hold(await ops.get(path), {"$ref": f"#/components/schemas/{described}"}, path)
    again = await ops.start(idempotency_key="k", status=200)
    hold(again, {"$ref": "#/components/schemas/Started"}, "start")


def hold(value: Any, schema: dict[str, Any], where: str) -> None:
    """Hold an answer's keys against its schema."""
    if "anyOf" in schema:
        schema = schema["anyOf"][0]
    if "$ref" in schema:
        schema = openapi_document()["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    if isinstance(value, list):
        for each in value:
            hold(each, schema["items"], where)
    elif isinstance(value, dict) and "properties" in schema:
        unknown = value.keys() - schema["properties"].keys()
        assert not unknown or schema.get("additionalProperties"), f"{where}: {unknown}"
        for key in value.keys() & schema["properties"].keys():
            hold(value[key], schema["properties"][key], f"{where}.{key}")
