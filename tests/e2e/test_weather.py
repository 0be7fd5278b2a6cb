"""FLORA's API and its media in bad weather: what passes is stored in the end, what does not is loud and explained."""

import asyncio
from collections.abc import Mapping, MutableMapping
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from structlog.testing import capture_logs

from receiver.emulator import parse_faults
from receiver.service.service import Service
from tests.support.stage import Clock, Stage, eventually

Fault = Mapping[str, Any]
Lines = list[MutableMapping[str, Any]]

READS: Fault = {"path": "/techniques", "method": "GET"}


@pytest.fixture
def stage(stage: Stage, ledger_url: str | None) -> Stage:
    """Every test of this file runs on both databases."""
    stage.postgres = ledger_url
    return stage


PASSING: Mapping[str, Fault] = {
    "500": {"kind": "internal_error", "next": 2},
    "503": {"kind": "service_unavailable", "next": 2},
    "HTML": {"kind": "html", "next": 2},
    "HTML of a proxy": {"kind": "html", "status": 502, "next": 2},
    "truncated": {"kind": "truncated_json", "next": 2},
    "cut": {"kind": "cut_answer", "next": 2},
    "slow": {"kind": "slow", "seconds": 5, "next": 1},
    "404": {"kind": "not_found", "next": 2},
}


async def test_reads_that_go_wrong_at_first(stage: Stage) -> None:
    """Each run settles as soon as the API tells, nothing is stored twice or left out, and no run delays another."""
    async with stage.service() as service:
        runs = {
            name: await stage.track(service, "emu-image", {**READS, **PASSING[name]}) for name in PASSING
        }
        await stage.over(*runs.values())
    for name, run_id in runs.items():
        assert (stage.run(run_id)["state"], stage.run(run_id)["verdict"]) == ("completed", "matched"), name
        assert stage.dispatches(run_id, "log")[0]["state"] == "done"
        stage.check_files(run_id)


async def test_reads_that_lag_behind_the_callback(stage: Stage) -> None:
    """The ladder bridges a short lag; past it `diverged` raises the alarm, until the API agrees and the run is stored."""
    with capture_logs() as lines:
        async with stage.service() as service:
            short = await stage.track(service, "emu-image", {"kind": "read_lag", "seconds": 0.5})
            long = await stage.track(service, "emu-image", {"kind": "read_lag", "seconds": 3600})
            await eventually(partial(_said, lines, "run.diverged"))
            stage.end_read_lag(long)
            await stage.over(short, long)
    assert [line["run_id"] for line in lines if line["event"] == "run.diverged"] == [long]
    for run_id in (short, long):
        assert stage.run(run_id)["verdict"] == "matched"
        stage.check_files(run_id)


async def test_a_rate_limit_passes(stage: Stage) -> None:
    """Two answers 429 in a row, each naming its time, then all is well."""
    stage.emulator.faults.add(parse_faults({"kind": "rate_limited", "retry_after": 0.3, "next": 2}))
    async with stage.service() as service:
        run_id = await stage.track(service)
        await stage.over(run_id)
    assert stage.run(run_id)["verdict"] == "matched"
    stage.check_files(run_id)


async def test_a_rate_limit_holds_every_read(stage: Stage) -> None:
    """After a 429 nobody asks until the time that FLORA named; without one, 5 s; callbacks are taken all the while."""
    clock = Clock()
    with capture_logs() as lines:
        await _limited(stage, clock, lines)


async def _limited(stage: Stage, clock: Clock, lines: Lines) -> None:
    async with stage.service(clock=clock) as service, stage.client() as client:
        stage.emulator.faults.add(parse_faults({"kind": "rate_limited", "next": 1}))
        run_ids = [stage.start(callback=False) for _ in range(3)]
        assert (await stage.send(client, stage.body(run_ids[0]))).status_code == 200
        await eventually(partial(_said, lines, "flora.rate_limited"))
        asked = stage.emulator.gate.requests.total()
        for run_id in run_ids[1:]:
            assert (await stage.send(client, stage.body(run_id))).status_code == 200
        await _ticked(service)
        assert stage.emulator.gate.requests.total() == asked
        clock.wrong_by += timedelta(seconds=10)
        service.signals.poll.set()
        await stage.over(*run_ids)
    for run_id in run_ids:
        stage.check_files(run_id)


async def test_a_key_that_is_refused_is_said_once_and_everything_settles_when_it_works_again(
    stage: Stage,
) -> None:
    """401: callbacks keep coming in, nothing is lost or failed, one line says what to do; later all is stored."""
    clock = Clock()
    stage.emulator.faults.add(parse_faults({"kind": "unauthorized"}))
    with capture_logs() as lines:
        async with stage.service(clock=clock) as service, stage.client() as client:
            run_ids = [await stage.track(service) for _ in range(6)]
            for run_id in run_ids:
                await stage.at(run_id, state="reported")
            for _ in range(3):  # a minute passes, three times over: asked again, refused again
                asked = stage.emulator.gate.requests.total()
                clock.wrong_by += timedelta(seconds=150)
                service.signals.poll.set()
                await eventually(partial(_more_than, stage, asked))
                await (
                    service.poller.drain()
                )  # an answer heard after the next jump would hold the key for a real minute
            stranger = await stage.send(client, stage.body("run_x"), stage.signature(stage.body("run_x")))
            assert stranger.status_code == 401  # that was another body's signature
            assert (await stage.send(client, stage.body("run_y"), None)).status_code == 200
            stage.emulator.faults.reset()
            clock.wrong_by += timedelta(seconds=150)
            service.signals.poll.set()
            await stage.over(*run_ids)
    assert [line["log_level"] for line in lines if line["event"] == "flora.key_refused"] == ["critical"]
    assert [line["log_level"] for line in lines if line["event"] == "flora.key_accepted"] == ["warning"]
    for run_id in run_ids:
        assert stage.run(run_id)["state"] == "completed"
        stage.check_files(run_id)


async def test_a_cost_that_lags_is_filled_in(stage: Stage) -> None:
    """Files do not wait for the bill; when it comes, the manifest is brought up to date and nothing is fetched again."""
    async with stage.service() as service:
        run_id = await stage.track(service, "emu-image", {"kind": "cost_lag", "seconds": 3})
        await stage.over(run_id)
        assert stage.run(run_id)["charged_cost"] is None
        before = stage.files(run_id)[0].stat()
        await stage.at(run_id, charged_cost=0.04, cost_due_at=None)
        await stage.over(run_id)
    after = stage.files(run_id)[0].stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert stage.check_files(run_id)["charged_cost"] == 0.04
    events = [(row["event"], row["state"]) for row in stage.dispatches(run_id, "storage")]
    assert events == [("settled", "done"), ("cost_final", "done")]


async def test_a_run_that_completes_without_outputs_is_lost_and_said(stage: Stage) -> None:
    """Past the ladder it is `lost`, reason `no_outputs`: never an empty success."""
    with capture_logs() as lines:
        async with stage.service() as service:
            run_id = await stage.track(service, "emu-image", {"kind": "no_outputs"})
            await stage.at(run_id, state="lost", lost_reason="no_outputs")
    assert stage.dispatches(run_id, "storage") == []
    assert [(line["log_level"], line["run_id"]) for line in lines if line["event"] == "run.lost"] == [
        ("error", run_id)
    ]


ONCE: Mapping[str, Fault] = {
    "404": {"kind": "expired", "status": 404, "next": 1},
    "403": {"kind": "expired", "status": 403, "next": 1},
    "500": {"kind": "expired", "status": 500, "next": 1},
    "stalls later": {"kind": "stall", "after_bytes": 10, "next": 1},
    "stalls": {"kind": "stall", "next": 1},
    "cut": {"kind": "cut", "after_bytes": 100, "next": 1},
    "too short": {"kind": "wrong_length", "delta": 100, "next": 1},
    "busy": {"kind": "unavailable", "retry_after": 0.2, "next": 1},
    "redirect": {"kind": "redirect", "url": "https://127.0.0.1:1/x", "next": 1},
    "coding": {"kind": "content_encoding", "value": "compress", "next": 1},
}


async def test_downloads_that_go_wrong_once(stage: Stage) -> None:
    """They are tried again, with the reason written down, and the files are whole; nothing unfinished is left behind.

    A download that breaks off in the middle may go on where it ended, within its attempt.
    """
    async with stage.service(downloads={"stall_seconds": 3.0}) as service:
        runs = {name: await stage.track(service, "emu-two-images", ONCE[name]) for name in ONCE}
        await stage.over(*runs.values())
    for name, run_id in runs.items():
        stage.check_files(run_id)
        attempts = stage.rows(
            "SELECT a.* FROM dispatch_attempts a JOIN dispatches d ON d.seq = a.dispatch_seq"
            " WHERE d.run_id = ? AND d.handler = 'storage' AND d.event = 'settled' ORDER BY a.attempt",
            run_id,
        )
        outcomes = [attempt["outcome"] for attempt in attempts]
        if name in {"stalls later", "cut", "too short"} and outcomes == ["done"]:
            continue
        assert outcomes == ["ready", "done"], name
        assert "127.0.0.1" in attempts[0]["error"]
        assert "/media/" not in attempts[0]["error"]
    assert stage.parts() == []


LABELS = ("base64", "aws-chunked", "gzip")
CODINGS = ("gzip", "deflate", "br", "zstd")


async def test_content_codings_of_media(stage: Stage) -> None:
    """Files are the same bytes whatever the media server says about them, and however it sends them."""
    faults: list[Fault] = [{"kind": "content_encoding", "value": value} for value in CODINGS]
    faults += [{"kind": "content_encoding", "value": value, "apply": False} for value in LABELS]
    async with stage.service() as service:
        runs = [await stage.track(service, "emu-two-images", fault) for fault in faults]
        await stage.over(*runs)
    for run_id in runs:
        stage.check_files(run_id)
        assert stage.dispatches(run_id, "storage")[0]["attempts"] == 1


NEVER: Mapping[str, tuple[Fault, str]] = {
    "404": ({"kind": "expired", "status": 404}, "no longer there"),
    "stall": ({"kind": "stall"}, "stalled"),
    "cut": ({"kind": "cut", "after_bytes": 5}, "cut"),
    "private http": ({"kind": "redirect", "url": "http://127.0.0.1:1/x"}, "https only"),
    "private https": ({"kind": "redirect", "url": "https://127.0.0.1:1/x"}, "not a public address"),
    "metadata": ({"kind": "redirect", "url": "https://169.254.169.254/latest"}, "not a public address"),
    "file": ({"kind": "redirect", "url": "file:///etc/passwd"}, "https only"),
    "too large": ({"kind": "size", "bytes": 3_000_000}, "larger than the limit"),
}


async def test_downloads_that_never_work_are_dead_and_explained(stage: Stage) -> None:
    """Loud, explained, without a media URL; the other handler and other runs are not delayed."""
    handlers = [
        {"use": "storage", "max_attempts": 2, "options": {"url": str(stage.outputs)}},
        {"use": "log"},
    ]
    limits = {"max_bytes": 2_000_000, "stall_seconds": 3.0}
    with capture_logs() as lines:
        async with stage.service(handlers=handlers, downloads=limits) as service:
            runs = {
                name: await stage.track(service, "emu-image", fault) for name, (fault, _) in NEVER.items()
            }
            good = await stage.track(service, "emu-video")
            await stage.over(good, *runs.values())
    stage.check_files(good)
    dead = {line["run_id"]: line["log_level"] for line in lines if line["event"] == "dispatch.dead"}
    assert dead == dict.fromkeys(runs.values(), "error")
    for name, run_id in runs.items():
        dispatch = stage.dispatches(run_id, "storage")[0]
        assert dispatch["state"] == "dead", name
        assert NEVER[name][1] in dispatch["last_error"], name
        assert "/media/" not in dispatch["last_error"]
        assert stage.dispatches(run_id, "log")[0]["state"] == "done"
        assert stage.run(run_id)["state"] == "completed"
    assert stage.parts() == []


async def test_slow_reads_and_stalled_downloads_of_some_delay_no_others(stage: Stage) -> None:
    """Seven slow reads and seven stalled downloads leave room for the eighth."""
    async with stage.service(downloads={"stall_seconds": 20.0}, flora={"timeout_seconds": 20}) as service:
        stalled = [await stage.track(service, "emu-image", {"kind": "stall"}) for _ in range(7)]
        for _ in range(7):
            await stage.track(service, "emu-image", {"kind": "slow", "seconds": 4, **READS})
        for run_id in stalled:
            await eventually(partial(_leased, stage, run_id))
        quick = await stage.track(service, "emu-everything")
        await stage.over(quick)
        assert not any(stage.is_over(run_id) for run_id in stalled)
    stage.check_files(quick)


async def test_workspaces_do_not_wait_for_each_other(stage: Stage) -> None:
    """A workspace whose key is refused has dozens of runs due: another workspace's runs are read as if there were none."""
    key = stage.emulator.settings.api_key
    workspaces = [
        {"id": "ws_refused", "secrets": ["whsec_of_the_refused"], "api_key": "sk_test_wrong"},
        {"id": "ws_emulator", "secrets": ["whsec_of_the_emulator"], "api_key": key},
    ]
    with capture_logs() as lines:
        async with stage.service(workspaces=workspaces) as service:
            poor = [stage.start("emu-image", callback=False) for _ in range(40)]
            await asyncio.gather(
                *(stage.register(service, run_id, workspace_id="ws_refused") for run_id in poor)
            )
            await eventually(partial(_said, lines, "flora.key_refused"))
            rich = await stage.track(service, "emu-text")
            await stage.over(rich)
    stage.check_files(rich)
    assert {stage.run(run_id)["state"] for run_id in poor} == {"open"}


async def test_nothing_listens_where_flora_should_be(stage: Stage) -> None:
    """FLORA cannot be reached at all: callbacks are taken, and the run waits."""
    async with (
        stage.service(flora={"base_url": "http://127.0.0.1:9/api/v1"}) as service,
        stage.client() as client,
    ):
        assert (await stage.send(client, stage.body("run_waiting"))).status_code == 200
        await stage.at("run_waiting", failures=2, state="reported")
        assert await service.ready() is None


async def _ticked(service: Service) -> None:
    """Let the poller look around once."""
    service.signals.poll.set()

    async def seen() -> bool:
        return not service.signals.poll.is_set()

    await eventually(seen)


async def _said(lines: Lines, event: str) -> bool:
    return any(line["event"] == event for line in lines)


async def _more_than(stage: Stage, asked: int) -> bool:
    return bool(stage.emulator.gate.requests.total() > asked)


async def _leased(stage: Stage, run_id: str) -> bool:
    return any(row["state"] == "leased" for row in stage.dispatches(run_id, "storage"))


async def test_what_lies_at_a_place_decides_who_may_store_there(stage: Stage) -> None:
    """A run that died without storing anything keeps no place, nor does one whose file was removed; a file does."""
    options = {"url": str(stage.outputs), "key": "{technique_id}/{output_id}{ext}"}
    handlers = [{"use": "storage", "max_attempts": 1, "options": options}]

    async def outcome(*faults: Fault) -> tuple[str, str]:
        run_id = await stage.track(service, "emu-image", *faults)
        await stage.over(run_id)
        dispatch = stage.dispatches(run_id, "storage")[0]
        return dispatch["state"], dispatch["last_error"] or ""

    async with stage.service(handlers=handlers) as service:
        assert (await outcome({"kind": "expired"}))[0] == "dead"
        cut = await outcome({"kind": "size", "bytes": 1_500_000}, {"kind": "wrong_length", "delta": 100})
        assert (cut[0], "cut" in cut[1]) == ("dead", True)
        assert await outcome() == ("done", "")
        (file,) = stage.outputs.glob("*/*.png")
        taken = await outcome()
        assert taken[0] == "dead"
        assert "make the key template" in taken[1]
        file.unlink()
        assert await outcome() == ("done", "")
        assert file.exists()
