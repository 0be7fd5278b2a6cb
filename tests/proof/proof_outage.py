"""PostgreSQL is away for thirty real seconds under load: what callbacks are told, what is lost, when work goes on."""

import asyncio
import itertools
import time
from collections import Counter
from pathlib import Path

from tests.e2e.test_replicas import check, replicas
from tests.support.postgres import postgres
from tests.support.stage import eventually, run_stage

AWAY_SECONDS = 30
EVERY_SECONDS = 0.25


async def test_thirty_seconds_without_a_database(tmp_path: Path) -> None:
    """Callbacks get 503 in time for FLORA to repeat them; nothing acknowledged is lost; everything goes on by itself."""
    with postgres() as server:
        url = server.create("suite")
        async with run_stage(tmp_path, time_scale=1.0) as stage:
            stage.postgres = url
            async with replicas(stage, (), ()) as them:
                run_ids = [stage.start() for _ in range(20)]

                async def some() -> bool:
                    return bool(stage.rows("SELECT run_id FROM runs WHERE settled_at IS NOT NULL"))

                await eventually(some)
                extra = [stage.start(callback=False) for _ in range(int(AWAY_SECONDS / EVERY_SECONDS))]
                answers: Counter[int] = Counter()
                slowest, refused = 0.0, []

                async def call(run_id: str) -> None:
                    nonlocal slowest
                    began = time.monotonic()
                    answer = await stage.send(them.client, stage.body(run_id, delivery_id=f"whd_{run_id}"))
                    slowest = max(slowest, time.monotonic() - began)
                    answers[answer.status_code] += 1
                    if answer.status_code != 200:
                        assert answer.headers["retry-after"]
                        refused.append(run_id)

                await asyncio.to_thread(server.ctl, "stop", "-m", "immediate")
                began = time.monotonic()
                calls = []
                for run_id in itertools.takewhile(lambda _: time.monotonic() - began < AWAY_SECONDS, extra):
                    calls.append(asyncio.create_task(call(run_id)))
                    await asyncio.sleep(EVERY_SECONDS)
                await asyncio.sleep(max(0.0, AWAY_SECONDS - (time.monotonic() - began)))
                await asyncio.to_thread(server.ctl, "start")
                back = time.monotonic()
                await asyncio.gather(*calls)

                async def taken() -> bool:
                    last = stage.body(extra[-1], delivery_id=f"whd_{extra[-1]}")
                    return (await stage.send(them.client, last)).status_code == 200

                await eventually(taken)
                again = time.monotonic() - back
                for run_id in refused:  # as FLORA repeats them
                    assert (
                        await stage.send(them.client, stage.body(run_id, delivery_id=f"whd_{run_id}"))
                    ).status_code == 200
                await stage.over(*run_ids, *extra, within=120)
                check(stage, [*run_ids, *extra])
    print(f"\naway {AWAY_SECONDS} s: answers {dict(answers)}, slowest {slowest:.2f} s, "  # noqa: T201
          f"accepted again {again:.2f} s after the start, {len(extra) + len(run_ids)} runs settled once, 0 lost")  # fmt: skip
