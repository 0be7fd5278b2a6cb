"""A batch of 500 rows with faults; the receiver is killed five times and the command twice."""

import asyncio
import contextlib
import time
from pathlib import Path

from tests.support.batches import WEATHER, BatchStage
from tests.support.lives import Served, served
from tests.support.stage import Stage, run_stage

ROWS = 500
KILLS = (60, 140, 230, 320, 410)
"""The receiver is killed when this many runs have been started."""
COMMAND_KILLS = (100, 280)


class Lives(contextlib.AsyncExitStack):
    """One receiver process after the other."""

    def __init__(self, stage: Stage, batches: BatchStage) -> None:
        super().__init__()
        self._stage = stage
        self._office = batches
        self.log = stage.directory / "receiver.log"
        self.kills = 0

    async def begin(self) -> Served:
        log = self.enter_context(self.log.open("ab"))
        process = await self.enter_async_context(
            served(self._stage, stdout=log.fileno(), **self._office.settings())
        )
        async with self._stage.client() as client:
            await process.ready(client)
        return process

    async def die_and_rise(self, process: Served) -> None:
        for count in KILLS:
            await self._office.until_started(count)
            process.process.kill()
            await process.ended()
            self.kills += 1
            process = await self.begin()


async def test_five_hundred_rows_in_bad_weather_with_crashes(tmp_path: Path) -> None:
    """Every row settled, none started twice, every file stored, the bill right."""
    await _prove(tmp_path, crashes=True)


async def test_five_hundred_rows_in_bad_weather(tmp_path: Path) -> None:
    """The same without a crash."""
    await _prove(tmp_path, crashes=False)


async def _prove(directory: Path, *, crashes: bool) -> None:
    async with run_stage(directory, faults=WEATHER, run_seconds=0.5) as stage:
        batches = BatchStage(stage)
        async with Lives(stage, batches) as lives:
            process = await lives.begin()
            began = time.monotonic()
            file = batches.table(ROWS)
            arguments = batches.arguments(file, "--yes", "--parallel", "16")
            killer = asyncio.create_task(lives.die_and_rise(process)) if crashes else None
            command = await batches.begin(*arguments)
            for count in COMMAND_KILLS if crashes else ():
                await batches.until_started(count)
                command.kill()
                await command.communicate()
                command = await batches.begin(*arguments)
            ended = await batches.end(command)
            took = time.monotonic() - began
            if killer is not None:
                await killer
                assert lives.kills == len(KILLS)
            assert ended.code == 0, (ended.out[-3000:], ended.err[-3000:])
            batches.check(ROWS)
            verdicts = stage.rows(
                "SELECT verdict, count(*) AS runs FROM runs GROUP BY verdict ORDER BY verdict"
            )
            attempts = [len(each.attempts) for each in stage.emulator.deliveries]
            orphans = lives.log.read_text().count('"start.exists"')
            print(  # noqa: T201 -- the figures are what a proof is for
                f"\n{ROWS} rows in {took:.1f} s, killed {lives.kills} times: {ended.out.strip().splitlines()[-2:]}, "
                f"{orphans} times a run existed whose start was not answered, "
                f"verdicts {[tuple(each.values()) for each in verdicts]}, {sum(attempts)} callback attempts, "
                f"requests {dict(stage.emulator.gate.requests)}"
            )
