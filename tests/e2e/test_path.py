"""The whole path, over HTTPS: runs end, callbacks come or do not, files are right."""

import pytest
from sqlalchemy import text

from receiver.emulator.techniques import TECHNIQUES
from receiver.store import queue
from tests.support.stage import Stage, eventually


@pytest.fixture
def stage(stage: Stage, ledger_url: str | None) -> Stage:
    """Every test of this file runs on both databases."""
    stage.postgres = ledger_url
    return stage


async def test_every_technique_ends_with_the_right_files(stage: Stage) -> None:
    """Each technique's run settles by its callback as `matched`, each output is stored as it is, a failure is explained."""
    async with stage.service() as service:
        runs = {one.slug: await stage.track(service, one.slug) for one in TECHNIQUES}
        await stage.over(*runs.values())
    for technique in TECHNIQUES:
        run_id = runs[technique.slug]
        run = stage.run(run_id)
        assert run["verdict"] == "matched"
        assert run["charged_cost"] == technique.run_cost
        assert run["technique_id"] == technique.technique_id
        if technique.error_code is None:
            assert run["state"] == "completed"
            manifest = stage.check_files(run_id)
            assert manifest["charged_cost"] == technique.run_cost
            assert {row["state"] for row in stage.dispatches(run_id, "storage")} <= {"done", "skipped"}
        else:
            assert (run["state"], run["error_code"]) == ("failed", technique.error_code)
            assert run["error_message"]
            [storage, *_] = stage.dispatches(run_id, "storage")
            assert (storage["state"], storage["last_error"]) == ("skipped", "status is failed")
            assert stage.dispatches(run_id, "log")[0]["state"] == "done"
            assert stage.files(run_id) == {}
    assert stage.parts() == []


async def test_runs_that_nobody_registered_are_stored_too(stage: Stage) -> None:
    """A callback is enough: the run is found in FLORA's list, its technique is learned, its files are stored."""
    async with stage.service():
        run_ids = [stage.start("emu-two-images"), stage.start("emu-text")]
        await stage.over(*run_ids)
    for run_id in run_ids:
        assert stage.run(run_id)["origin"] == "callback"
        assert stage.run(run_id)["verdict"] == "matched"
        stage.check_files(run_id)


async def test_a_callback_that_never_comes_is_recovered(stage: Stage) -> None:
    """Polling settles what the channel lost, and the verdict says so."""
    async with stage.service(reconcile={"callback_window_seconds": 1.0}) as service:
        run_id = await stage.track(service, "emu-image", {"kind": "drop"})
        await stage.over(run_id)
    assert stage.run(run_id)["verdict"] == "recovered"
    assert stage.deliveries(run_id) == []
    assert stage.check_files(run_id)["settled_by"] == "poll"


async def test_a_callback_that_comes_three_times_is_dispatched_once(stage: Stage) -> None:
    """Copies are answered 200, counted, and change nothing."""
    async with stage.service() as service:
        run_id = await stage.track(service, "emu-audio", {"kind": "duplicate", "copies": 2})
        await stage.over(run_id)

        async def counted() -> bool:
            return bool(stage.deliveries(run_id)[0]["duplicates"] == 2)

        await eventually(counted)
    [delivery] = stage.emulator.deliveries
    assert [attempt.status for attempt in delivery.attempts] == [200, 200, 200]
    assert len(stage.deliveries(run_id)) == 1
    settled = [row for row in stage.dispatches(run_id) if row["event"] == "settled"]
    assert [(row["handler"], row["state"], row["attempts"]) for row in settled] == [
        ("storage", "done", 1),
        ("log", "done", 1),
    ]
    stage.check_files(run_id)


@pytest.mark.parametrize("fault", ["wrong_secret", "corrupt"])
async def test_what_is_not_signed_by_flora_is_refused_and_the_run_settles_anyway(
    stage: Stage, fault: str
) -> None:
    """Every attempt is refused with 401, in the ring of rejections; polling brings the run home as `recovered`."""
    async with stage.service(reconcile={"callback_window_seconds": 1.0}) as service:
        run_id = await stage.track(service, "emu-image", {"kind": fault})
        await stage.over(run_id)
        async with stage.client() as client:
            body = stage.body(run_id)
            forged = await client.post(
                stage.url, content=body, headers={"Flora-Signature": "t=1,v1=" + "0" * 64}
            )
            bare = await client.post(stage.url, content=body)
    assert (forged.status_code, forged.json()["error"]["code"]) == (401, "signature_mismatch")
    assert (bare.status_code, bare.json()["error"]["code"]) == (401, "missing_signature")
    assert {attempt.status for delivery in stage.emulator.deliveries for attempt in delivery.attempts} == {
        401
    }
    assert stage.run(run_id)["verdict"] == "recovered"
    assert stage.deliveries(run_id) == []
    codes = {row["code"] for row in stage.rows("SELECT code FROM rejections")}
    assert codes == {"signature_mismatch", "missing_signature"}


async def test_a_callback_after_its_run_was_written_off_is_late(stage: Stage) -> None:
    """`late` tells that the channel works after all, only slowly; nothing is dispatched again."""
    async with stage.service(reconcile={"callback_window_seconds": 0.5}) as service:
        run_id = await stage.track(service, "emu-image", {"kind": "drop"})
        await stage.over(run_id)
        before = stage.dispatches(run_id)
        async with stage.client() as client:
            assert (await stage.send(client, stage.body(run_id))).json() == {"status": "accepted"}
        await stage.at(run_id, verdict="late", state="completed")
        assert stage.dispatches(run_id) == before


async def test_storing_again_writes_nothing_new(stage: Stage) -> None:
    """A dispatch that is done over (the crash came before its answer was written down) leaves every file as it is."""
    async with stage.service() as service:
        run_id = await stage.track(service, "emu-everything")
        await stage.over(run_id)
        files = stage.files(run_id)
        before = {
            position: (path.stat().st_ino, path.stat().st_mtime_ns) for position, path in files.items()
        }
        asked = stage.emulator.gate.requests.copy()

    async with stage.service() as service:
        again = "UPDATE dispatches SET state = 'ready', finished_at = NULL WHERE run_id = :run_id AND handler = 'storage'"
        await service.database.write(lambda tx: tx.execute(text(again), {"run_id": run_id}).rowcount)
        service.signals.dispatch.set()
        await stage.over(run_id)
        assert await service.database.read(lambda tx: queue.dispatches_of_run(tx, run_id))
    assert max(row["attempts"] for row in stage.dispatches(run_id, "storage")) == 2
    after = {position: (path.stat().st_ino, path.stat().st_mtime_ns) for position, path in files.items()}
    assert after == before
    assert stage.emulator.gate.requests == asked
    stage.check_files(run_id)


async def test_outputs_that_share_an_id_are_kept_apart(stage: Stage) -> None:
    """Output ids may repeat: each output still gets a file of its own."""
    async with stage.service() as service:
        run_id = await stage.track(service, "emu-everything", {"kind": "same_output_ids"})
        await stage.over(run_id)
    stage.check_files(run_id)
    assert len(set(stage.files(run_id).values())) == 6


async def test_the_public_listener_shows_nothing_else(stage: Stage) -> None:
    """Health, readiness and the callback path; everything else is 404 or 405 in our own words."""
    async with stage.service(), stage.client() as client:
        at = stage.url.removesuffix("/callbacks/flora")
        answers = {
            path: await client.get(at + path)
            for path in ("/healthz", "/readyz", "/", "/metrics", "/callbacks/flora")
        }
        body = stage.body("run_slash")
        slashed = await client.post(
            stage.url + "/", content=body, headers={"Flora-Signature": stage.signature(body)}
        )
    assert {path: answer.status_code for path, answer in answers.items()} == {
        "/healthz": 200,
        "/readyz": 200,
        "/": 404,
        "/metrics": 404,
        "/callbacks/flora": 405,
    }
    assert answers["/callbacks/flora"].json()["error"]["code"] == "method_not_allowed"
    assert slashed.json() == {"status": "accepted"}
