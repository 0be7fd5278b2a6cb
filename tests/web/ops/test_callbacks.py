"""Callbacks: those received, those refused, and the health of the channel."""

from receiver.cli.trigger.cases import CASES, CallbackFactory
from tests.support.stage import eventually
from tests.web.ops.conftest import Ops


async def test_callbacks_are_listed_with_their_raw_bodies(ops: Ops) -> None:
    run_id = await ops.run_to_end()
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
    assert await ops.call_client(lambda receiver: receiver.delivery("whd/a/b")["run_id"]) == "run_1"


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


async def test_the_health_of_the_channel(ops: Ops) -> None:
    """Matched runs are healthy; a recovered run is not, and the likely cause is named."""
    await ops.run_to_end()
    channel = await ops.get("/api/channel")
    assert channel["health"]["ok"]
    assert (channel["health"]["matched"], channel["arrivals"]) == (1, 1)
    assert sum(hour.get("matched", 0) for hour in channel["hours"]) == 1
    ops.stage.emulator.faults.add([])
    run_id = ops.stage.emulator.start_run(
        "emu-image", callback_url=ops.stage.url, faults=[{"kind": "drop"}]
    )
    known = {"run_id": run_id, "technique_id": "tech_emu_image", "callback_expected": True}
    await ops.post("/api/runs/track", known)
    await ops.stage.at(run_id, verdict="recovered")
    channel = await ops.get("/api/channel")
    assert not channel["health"]["ok"]
    assert channel["health"]["recovered"] == 1
    assert channel["health"]["cause"]
    assert channel["health"]["cure"]
