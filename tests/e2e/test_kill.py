"""`kill -9` of a real process, anywhere: what was answered 200 ends settled, its files whole, its effects applied once."""

import asyncio
import itertools
import random
import secrets
import signal
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import httpx
import pytest

from receiver.flora.signature import HEADER
from tests.support.lives import Nursery, nursery
from tests.support.stage import Stage, eventually

MOST_COMMITS = 40
"""More than one run's life needs: the test itself finds out how many there are."""


@pytest.fixture
async def lives(stage: Stage) -> AsyncIterator[Nursery]:
    async with nursery(stage) as made:
        yield made


async def insist(stage: Stage, client: httpx.AsyncClient, body: bytes) -> str:
    """Send a callback until it is answered 200, as FLORA does, if not for as long; return what it was told."""

    async def send() -> str | None:
        try:
            answer = await client.post(stage.url, content=body, headers={HEADER: stage.signature(body)})
        except httpx.TransportError:
            return None
        assert answer.status_code in {200, 503}, answer.text
        return str(answer.json()["status"]) if answer.status_code == 200 else None

    told = await eventually(send)
    assert told is not None
    return told


def check(stage: Stage, run_id: str) -> None:
    """The run is settled, each handler has one dispatch of each event, done, and the files are right."""
    assert stage.run(run_id)["state"] == "completed"
    rows = [(row["handler"], row["event"], row["round"]) for row in stage.dispatches(run_id)]
    assert len(rows) == len(set(rows))
    assert {row["state"] for row in stage.dispatches(run_id)} <= {"done", "skipped"}
    assert {row["handler"] for row in stage.dispatches(run_id) if row["state"] == "done"} == {
        "storage",
        "log",
    }
    stage.check_files(run_id)


def visible(stage: Stage) -> dict[Path, tuple[int, int]]:
    """Return what makes a stored output this very file; a manifest may be brought up to date, an output never."""
    files = (path for path in stage.outputs.rglob("*") if path.is_file() and ".part" not in path.name)
    return {
        path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files if path.name != "run.json"
    }


@pytest.mark.parametrize("when", ["before", "after"])
async def test_killed_at_every_commit_of_a_runs_life(lives: Nursery, when: str) -> None:
    """Just before or just after each commit, the answer not yet given: the next life carries on, nothing is done twice."""
    stage = lives.stage
    finished = False
    boundaries = 0
    while not finished:
        boundaries += 1
        assert boundaries <= MOST_COMMITS
        pid = await lives.begin(kill=(boundaries, when))
        if not await lives.ready(pid):  # the first commits belong to the start itself
            await lives.ended(pid)
            continue
        run_id = stage.start("emu-two-images", {"kind": "run_seconds", "seconds": 0}, callback=False)
        body = stage.body(run_id)
        async with stage.client() as client:
            answering = asyncio.create_task(insist(stage, client, body))

            async def over(pid: int = pid, run_id: str = run_id) -> str | None:
                if await lives.status(pid) is not None:
                    return "killed"
                return "over" if stage.is_over(run_id) else None

            if await eventually(over) == "over":
                await answering
                finished = True  # its whole life has fewer commits
                await lives.kill(pid)
                continue
            stored = visible(stage)
            pid = await lives.begin()
            assert await lives.ready(pid)
            await answering
            await stage.over(run_id)
            assert await lives.kill(pid, signal.SIGTERM) == 0
        check(stage, run_id)
        assert visible(stage).items() >= stored.items(), (
            f"a file was written again after commit {boundaries}"
        )
        assert len(stage.deliveries(run_id)) == 1
        assert stage.parts() == [], f"left behind {when} commit {boundaries}"
    assert boundaries >= 8, (
        "a run's life has at least: registered, heard, settled, claimed, 2 x stored, manifest, done"
    )


async def test_killed_while_it_makes_its_tables(lives: Nursery) -> None:
    """A first start that dies at any statement of its migrations leaves nothing that the next one stumbles over."""
    stage = lives.stage
    finished = False
    statements = itertools.count(3, 7)
    while not finished:
        for file in stage.directory.glob(f"{stage.database.name}*"):
            file.unlink()
        pid = await lives.begin(kill=(next(statements), "statement"))
        finished = await lives.ready(pid)
        await (lives.kill(pid) if finished else lives.ended(pid))
        pid = await lives.begin()
        assert await lives.ready(pid), lives.log.read_text()[-2000:]
        assert await lives.kill(pid, signal.SIGTERM) == 0
    assert next(statements) > 30


async def test_killed_between_commit_and_answer(lives: Nursery) -> None:
    """FLORA heard nothing and tries again: that is a duplicate, and the run is stored once."""
    stage = lives.stage
    pid = await lives.begin()
    assert await lives.ready(pid)
    await lives.kill(pid)
    pid = await lives.begin(kill=(1, "after"))
    assert await lives.ready(pid)
    run_id = stage.start(callback=False)
    body = stage.body(run_id)
    async with stage.client() as client:
        with pytest.raises(httpx.TransportError):
            await stage.send(client, body)
        assert await lives.ended(pid) == -signal.SIGKILL
        assert len(stage.deliveries(run_id)) == 1
        await lives.ready(await lives.begin())
        assert await insist(stage, client, body) == "duplicate"
    await stage.over(run_id)
    check(stage, run_id)


async def test_killed_in_the_middle_of_a_download(lives: Nursery) -> None:
    """What was half there is fetched anew, the other output stays the file that it is, and nothing unfinished is left."""
    stage = lives.stage
    stalled = {"kind": "stall", "after_bytes": 700_000, "path": "/media", "next": 1}
    pid = await lives.begin(downloads={"stall_seconds": 30})
    assert await lives.ready(pid)
    run_id = stage.start("emu-two-images", {"kind": "size", "bytes": 2_000_000}, stalled, callback=False)
    async with stage.client() as client:
        assert await insist(stage, client, stage.body(run_id)) == "accepted"

    async def halfway() -> bool:
        return len(stage.files(run_id)) == 1 and any(
            part.stat().st_size >= 500_000 for part in stage.parts()
        )

    await eventually(halfway)
    stored = visible(stage)
    await lives.kill(pid)
    assert stage.parts()
    assert await lives.ready(await lives.begin())
    await stage.over(run_id)
    check(stage, run_id)
    assert visible(stage).items() >= stored.items()
    assert stage.parts() == []
    assert stage.dispatches(run_id, "storage")[0]["attempts"] == 2


async def test_killed_ten_times_at_random_under_load(lives: Nursery) -> None:
    """Callbacks keep coming while the receiver dies again and again: none that was answered 200 is lost."""
    stage = lives.stage
    chance = random.Random(secrets.randbits(32))
    acknowledged: list[str] = []
    enough = asyncio.Event()

    async def load(client: httpx.AsyncClient) -> None:
        while not enough.is_set():
            run_id = stage.start(chance.choice(["emu-image", "emu-text", "emu-two-images"]), callback=False)
            await insist(stage, client, stage.body(run_id))
            acknowledged.append(run_id)

    async with stage.client() as client:
        senders = [asyncio.create_task(load(client)) for _ in range(4)]
        for _ in range(10):
            pid = await lives.begin()
            await lives.ready(pid)
            aim = len(acknowledged) + chance.randrange(1, 12)
            await eventually(partial(_reached, acknowledged, aim))
            await lives.kill(pid)
        pid = await lives.begin()
        await lives.ready(pid)
        enough.set()  # not cancelled: a TLS handshake that is cut off leaves its socket open
        await asyncio.gather(*senders)
    await stage.over(*acknowledged)
    for run_id in acknowledged:
        check(stage, run_id)
    assert await lives.kill(pid, signal.SIGTERM) == 0
    assert stage.parts() == []


async def _reached(acknowledged: list[str], aim: int) -> bool:
    return len(acknowledged) >= aim
