"""Behind the door: what a run costs from its callback to `done` with one small output, on SQLite and on PostgreSQL.

Processor time of the receivers, per run. Runs per second are of a machine that also runs the emulator and PostgreSQL.
"""

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psycopg

from receiver.emulator import Emulator, EmulatorSettings
from receiver.flora.signature import sign
from receiver.web.server import Server, bind
from tests.bench.bench_door import fresh
from tests.bench.load import SECRET, callback, request, send
from tests.bench.servers import Process, receiver
from tests.bench.table import Table, ratios
from tests.support.postgres import Postgres, postgres
from tests.support.stage import eventually, toml

ROUNDS = 3
WARM, RUNS = 40, 400
_DONE = "SELECT count(*) FROM dispatches WHERE state = 'done' AND event = 'settled'"


@dataclass(frozen=True)
class Measured:
    """One burst of callbacks, worked off."""

    cpu_ms: float
    database_cpu_ms: float
    per_second: float


@contextlib.asynccontextmanager
async def emulated() -> AsyncIterator[tuple[Emulator, int]]:
    flora = Emulator(EmulatorSettings(run_seconds=0.0))
    server = Server(flora.app, bind("127.0.0.1", 0))
    await server.start()
    flora.public_origin = f"http://127.0.0.1:{server.port}"
    try:
        yield flora, server.port
    finally:
        await flora.aclose()
        await server.stop()


def _done(url: str) -> int:
    if url.startswith("postgresql"):
        with psycopg.connect(url) as session:
            found = session.execute(_DONE.encode()).fetchone()
    else:
        path = url.removeprefix("sqlite:///")
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as session_:
            found = session_.execute(_DONE).fetchone()
    assert found is not None
    return int(found[0])


async def work_off(flora: Emulator, doors: Sequence[Process], url: str, runs: int, already: int) -> None:
    """Send the callbacks of as many ended runs, and wait until the files of all of them are stored."""
    now, requests = int(time.time()), []
    for _ in range(runs):
        run_id = flora.start_run("emu-image")
        body = callback(run_id.removeprefix("run_"), run_id, now, flora.settings.workspace_id)
        requests.append(request(body, sign(body, SECRET, timestamp=now)))
    await send([each.port for each in doors], requests, connections=16)

    async def all_done() -> bool:
        return await asyncio.to_thread(_done, url) >= already + runs

    try:
        await eventually(all_done, within=60)
    except AssertionError as error:
        raise AssertionError(f"{_done(url)} of {already + runs} are done; {doors[0].said()}") from error


async def burst(room: Path, replicas: int, server: Postgres | None) -> Measured:
    """Run receivers on a new ledger, send what warms them up, then measure."""
    directory = fresh(room)
    url = (
        f"sqlite:///{directory}/receiver.db"
        if server is None
        else server.create(directory.name.replace("-", "_"))
    )
    async with emulated() as (flora, port):
        (directory / "receiver.toml").write_text(
            toml(
                {
                    "downloads": {"allow_private_hosts": [f"127.0.0.1:{port}"]},
                    "handlers": [{"use": "storage", "options": {"url": str(directory / "outputs")}}],
                }
            )
        )
        settings = {
            "FLORA_BASE_URL": flora.base_url(f"http://127.0.0.1:{port}"),
            "FLORA_API_KEY": flora.settings.api_key,
            "RECEIVER_DATABASE__URL": url,
        }
        with contextlib.ExitStack() as stack:
            doors = [
                await asyncio.to_thread(
                    stack.enter_context,
                    receiver(
                        directory,
                        "--config",
                        str(directory / "receiver.toml"),
                        core=None,
                        settings=settings,
                    ),
                )
                for _ in range(replicas)
            ]
            await work_off(flora, doors, url, WARM, 0)
            before, began = sum(each.cpu_seconds() for each in doors), time.perf_counter()
            database_before = 0.0 if server is None else _database_seconds(server)
            await work_off(flora, doors, url, RUNS, WARM)
            seconds = time.perf_counter() - began
            spent = sum(each.cpu_seconds() for each in doors) - before
            database = 0.0 if server is None else _database_seconds(server) - database_before
    return Measured(spent / RUNS * 1000, database / RUNS * 1000, RUNS / seconds)


def _database_seconds(server: Postgres) -> float:
    """Return the processor time of all of PostgreSQL's processes that run."""
    first = (server.directory / "data" / "postmaster.pid").read_text().split()[0]
    pids = [first, *Path(f"/proc/{first}/task/{first}/children").read_text().split()]
    return sum(
        Process(int(pid), 0, 0.0, Path()).cpu_seconds()
        for pid in pids
        if Path(f"/proc/{pid}/stat").exists()
    )


async def test_from_callback_to_done(room: Path, table: Table) -> None:
    """A burst of runs that FLORA has ended: each is read, its output fetched, hashed, stored, and its manifest written."""
    sqlite, one, two = [], [], []
    with postgres() as server:
        for _ in range(ROUNDS):
            sqlite.append(await burst(room, 1, None))
            one.append(await burst(room, 1, server))
            two.append(await burst(room, 2, server))
    table.row("CPU per run behind the door: SQLite", [each.cpu_ms for each in sqlite], " ms")
    table.row(".. PostgreSQL, 1 replica", [each.cpu_ms for each in one], " ms")
    table.row(".. PostgreSQL, 2 replicas", [each.cpu_ms for each in two], " ms")
    table.row(".. PostgreSQL itself, 2 replicas", [each.database_cpu_ms for each in two], " ms")
    table.row("runs per second: SQLite", [each.per_second for each in sqlite], "/s")
    table.row(".. PostgreSQL, 1 replica", [each.per_second for each in one], "/s")
    table.row(".. PostgreSQL, 2 replicas", [each.per_second for each in two], "/s")
    table.row(
        "CPU per run: 2 replicas / 1", ratios([each.cpu_ms for each in two], [each.cpu_ms for each in one])
    )
    table.row(
        "runs per second: 2 replicas / 1",
        ratios([each.per_second for each in two], [each.per_second for each in one]),
    )
