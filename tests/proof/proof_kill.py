"""A thousand `kill -9` at random moments under load: no callback that was answered 200 is lost, no file is torn.

`make proof`. `PROOF_KILLS` and `PROOF_SECONDS` bound it; what was reached is in the table at the end.
"""

# ruff: noqa: T201 -- a proof prints what it has found
import asyncio
import contextlib
import os
import random
import secrets
import signal
import time
from collections import Counter
from functools import partial
from pathlib import Path

import httpx
from structlog.testing import capture_logs

from receiver.flora.signature import HEADER
from tests.support.lives import Nursery, nursery
from tests.support.stage import Stage, eventually, run_stage

KILLS = int(os.environ.get("PROOF_KILLS", "1000"))
SECONDS = float(os.environ.get("PROOF_SECONDS", "1500"))
SENDERS = 6
BACKLOG = 60
"""Dispatches that may wait while more load is sent: kills shall hit every part of a run's life, not a queue."""
LONGEST_LIFE = 0.6
"""Seconds from the first sign of life to the kill, at most: half of all kills hit a start or its recovery."""


async def test_a_thousand_kills(tmp_path: Path) -> None:
    """Every acknowledged callback is in the ledger, its run settled, its files whole, its dispatches done once."""
    seed = secrets.randbits(32)
    with capture_logs():  # the emulator's side of a killed connection is no news
        async with run_stage(tmp_path, run_seconds=0) as stage, nursery(stage) as lives:
            stage.extra["dispatch"] = {
                "max_attempts": 1000
            }  # a life counts an attempt, and it is we who end it
            facts = await _batter(stage, lives, random.Random(seed))
    print(f"\nseed {seed}")
    for name, value in facts.items():
        print(f"  {name:<44}{value:>12,}")
    assert facts["callbacks answered 200, and not in the ledger"] == 0
    assert facts["runs not settled"] == 0
    assert facts["runs with a wrong, torn or missing file"] == 0
    assert facts["dispatches not done, or twice in the ledger"] == 0
    assert facts["stored files written a second time"] == 0
    assert facts["unfinished files left behind"] == 0


async def _batter(stage: Stage, lives: Nursery, chance: random.Random) -> Counter[str]:
    facts: Counter[str] = Counter()
    acknowledged: dict[str, str] = {}
    stored: dict[Path, tuple[int, int]] = {}
    began = time.monotonic()

    async def load(client: httpx.AsyncClient) -> None:
        while True:
            await eventually(partial(_has_room, stage), within=300)
            run_id = stage.start(chance.choice(["emu-image", "emu-text", "emu-two-images"]), callback=False)
            delivery_id = f"whd_{secrets.token_hex(8)}"
            body = stage.body(run_id, delivery_id=delivery_id)

            async def send(body: bytes = body) -> bool:
                facts["callbacks sent"] += 1
                try:
                    answer = await client.post(
                        stage.url, content=body, headers={HEADER: stage.signature(body)}
                    )
                except httpx.TransportError:
                    return False
                assert answer.status_code in {200, 503}, answer.text
                return answer.status_code == 200

            await eventually(send, within=120)
            acknowledged[run_id] = delivery_id

    first = await lives.begin()
    assert await lives.ready(first)  # the ledger is there
    await lives.kill(first)
    async with stage.client() as client:
        senders = [asyncio.create_task(load(client)) for _ in range(SENDERS)]
        while facts["kills"] < KILLS and time.monotonic() - began < SECONDS:
            pid = await lives.begin()
            if chance.random() < 0.5:
                await lives.ready(pid)
                facts["kills of a ready process"] += 1
            await asyncio.sleep(chance.uniform(0, LONGEST_LIFE))  # the moment is the point
            assert await lives.kill(pid) == -signal.SIGKILL
            facts["kills"] += 1
            if facts["kills"] % 50 == 0:
                _remember(stage, stored)
                print(f"  {facts['kills']} kills, {len(acknowledged)} acknowledged", flush=True)
        _remember(stage, stored)
        pid = await lives.begin()
        await lives.ready(pid)
        for sender in senders:
            sender.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*senders)
    await _all_over(stage)
    assert await lives.kill(pid, signal.SIGTERM) == 0
    _judge(stage, acknowledged, stored, facts)
    facts["seconds"] = round(time.monotonic() - began)
    return facts


def _left(stage: Stage) -> int:
    """Return how many runs and dispatches are not over."""
    [row] = stage.rows(
        "SELECT (SELECT count(*) FROM runs WHERE state NOT IN ('completed', 'failed'))"
        " + (SELECT count(*) FROM dispatches WHERE state IN ('ready', 'leased')) AS n"
    )
    return int(row["n"])


async def _has_room(stage: Stage) -> bool:
    return _left(stage) < BACKLOG


async def _all_over(stage: Stage) -> None:
    """Wait for as long as there is progress; what stands still is counted afterwards, one by one."""
    while (left := _left(stage)) > 0:

        async def fewer(left: int = left) -> bool:
            return _left(stage) < left

        try:
            await eventually(fewer, within=60)
        except AssertionError:
            return


def _remember(stage: Stage, stored: dict[Path, tuple[int, int]]) -> None:
    """Note which files are stored: each must still be that very file in the end."""
    for path in stage.outputs.rglob("*"):
        if path.is_file() and path.name != "run.json" and ".part" not in path.name:
            stored.setdefault(path, (path.stat().st_ino, path.stat().st_mtime_ns))


def _judge(
    stage: Stage, acknowledged: dict[str, str], stored: dict[Path, tuple[int, int]], facts: Counter[str]
) -> None:
    ledger = {row["delivery_id"] for row in stage.rows("SELECT delivery_id FROM deliveries")}
    facts["callbacks answered 200"] = len(acknowledged)
    facts["callbacks answered 200, and not in the ledger"] = len(set(acknowledged.values()) - ledger)
    for name in ("runs not settled", "runs with a wrong, torn or missing file"):
        facts[name] = 0
    for run_id in acknowledged:
        if stage.run(run_id).get("state") != "completed":
            facts["runs not settled"] += 1
            continue
        try:
            stage.check_files(run_id)
        except (AssertionError, OSError, KeyError, ValueError):
            facts["runs with a wrong, torn or missing file"] += 1
    rows = stage.rows("SELECT run_id, handler, event, round, state, attempts FROM dispatches")
    keys = Counter((row["run_id"], row["handler"], row["event"], row["round"]) for row in rows)
    wrong = sum(row["state"] not in {"done", "skipped"} for row in rows) + sum(
        count > 1 for count in keys.values()
    )
    facts["dispatches not done, or twice in the ledger"] = wrong
    facts["dispatches that a kill interrupted"] = sum(row["attempts"] > 1 for row in rows)
    changed = [path for path, it in stored.items() if (path.stat().st_ino, path.stat().st_mtime_ns) != it]
    facts["stored files compared"] = len(stored)
    facts["stored files written a second time"] = len(changed)
    facts["unfinished files left behind"] = len(stage.parts())
