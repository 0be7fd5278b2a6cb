"""The door: processor time and throughput against a bare route and against rivals, with a full ledger, under a steady load.

The server has one core, the load another. Every ratio is of two measurements that follow each other.
"""

import asyncio
import os
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.bench.load import LOAD_CORE, Requests, drive, signed, write_requests
from tests.bench.servers import Process, receiver, rival
from tests.bench.table import heading, row

ROUNDS = 3
SECONDS = 3
FULL = 1_000_000
STEADY_PER_SECOND, STEADY_SECONDS, CONNECTIONS = 500, 10, 32
RIVALS = Path(__file__).with_name("rivals")
NODE_PACKAGES = ("express@5", "@flora-ai/flora@0.11.0", "better-sqlite3@11")


@dataclass(frozen=True)
class Measured:
    """One server under full load."""

    per_second: float
    cpu_us: float
    """Processor time of the server for one answer, all of its threads."""


def measured(server: AbstractContextManager[Process], requests: Requests) -> Measured:
    with server as process:
        before = process.cpu_seconds()
        result = drive(process.port, requests, seconds=SECONDS)
        spent = process.cpu_seconds() - before
        assert result.answers
        assert (result.refused, result.failed) == (0, 0)
        return Measured(result.per_second, spent / result.answers * 1e6)


@pytest.fixture
def room() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        yield Path(directory)


def fresh(room: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=room))


def _node(room: Path) -> Path:
    for program in ("node", "npm"):
        assert shutil.which(program), f"the rivals need {program}; on Debian and Ubuntu: apt-get install nodejs npm"
    folder = fresh(room)
    shutil.copy(RIVALS / "express.mjs", folder)
    (folder / "package.json").write_text('{"type": "module"}')
    subprocess.run(
        ["npm", "install", "--no-audit", "--no-fund", *NODE_PACKAGES], cwd=folder, check=True, capture_output=True
    )
    return folder


def _aiosqlite(room: Path) -> str:
    folder = fresh(room)
    command = [sys.executable, "-m", "pip", "install", "-q", "--target", str(folder), "aiosqlite==0.22.1"]
    subprocess.run(command, check=True, capture_output=True)
    return str(folder)


def test_against_rivals(room: Path) -> None:
    node, packages = _node(room), _aiosqlite(room)
    bare, ours, plain, express, storing = [], [], [], [], []
    for _ in range(ROUNDS):
        requests = write_requests(room / "requests", 90_000)
        bare.append(measured(rival("bare", fresh(room)), requests))
        ours.append(measured(receiver(fresh(room)), requests))
        plain.append(measured(rival("aiosqlite_route", fresh(room), PYTHONPATH=packages), requests))
        command = ("node", str(node / "express.mjs"))
        express.append(measured(rival("express", fresh(room), *command), requests))
        storing.append(measured(rival("express", fresh(room), *command, STORE="1"), requests))
    heading("The door, 64 connections, server on one core", ROUNDS)
    row("bare route: CPU per answer", "", [each.cpu_us for each in bare], " us")
    row("ours: CPU per committed callback", "", [each.cpu_us for each in ours], " us")
    row("ours / bare: CPU", "<= 2.2", [o.cpu_us / b.cpu_us for o, b in zip(ours, bare, strict=True)])
    row("ours / bare: callbacks per second", "", [o.per_second / b.per_second for o, b in zip(ours, bare, strict=True)])
    for name, target, others in (
        ("Starlette + aiosqlite, a commit each", "", plain),
        ("Express + unwrap, no storage", ">= 2", express),
        ("Express + unwrap + better-sqlite3, a commit each", ">= 5", storing),
    ):
        pairs = list(zip(ours, others, strict=True))
        row(f"ours / {name}: callbacks per second", target, [o.per_second / t.per_second for o, t in pairs])
        row(f"{name} / ours: CPU", "", [t.cpu_us / o.cpu_us for o, t in pairs])


def fill(path: Path, count: int) -> None:
    """Put settled runs with their deliveries into a ledger, as a year of traffic leaves them; ids in no order."""
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        connection.create_function("spread", 1, lambda n: f"{n * 2654435761 % 2**32:08x}{n:08x}", deterministic=True)
        now = int(time.time() * 1000)
        numbers = f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {count})"
        connection.execute(
            f"INSERT INTO runs (run_id, state, origin, first_seen_at, deadline_at, metadata, callback_expected, told,"
            f" reported_at, settled_at, verdict, losses, polls, ladder, failures, missing, version)"
            f" {numbers} SELECT 'run_' || spread(i), 'completed', 'callback', {now} - i * 30, {now}, '{{}}', 1, 'completed',"
            f" {now}, {now}, 'matched', 0, 1, 0, 0, 0, 2 FROM n"
        )
        connection.execute(
            f"INSERT INTO deliveries (delivery_id, run_id, event, received_at, age, secret, readable, duplicates)"
            f" {numbers} SELECT 'whd_' || spread(i), 'run_' || spread(i), 'run.completed', {now} - i * 30, 1, 0, 1, 0 FROM n"
        )
    connection.close()


def test_with_a_full_ledger(room: Path) -> None:
    """Both ledgers take the same callbacks in turn."""
    empty, full = fresh(room), fresh(room)
    for directory in (empty, full):
        with receiver(directory):
            pass  # makes the tables
    rows = int(os.environ.get("BENCH_ROWS", FULL))
    fill(full / "receiver.db", rows)
    with_few, with_many = [], []
    for _ in range(ROUNDS):
        requests = write_requests(room / "requests", 45_000)
        with_few.append(measured(receiver(empty), requests))
        with_many.append(measured(receiver(full), requests))
    heading(f"A ledger of {rows:,} runs against an empty one", ROUNDS)
    pairs = list(zip(with_many, with_few, strict=True))
    row("callbacks per second: full / empty", ">= 0.9", [many.per_second / few.per_second for many, few in pairs])
    row("CPU per callback: full / empty", "", [many.cpu_us / few.cpu_us for many, few in pairs])


async def steady(port: int) -> list[float]:
    """Send by the clock, whether or not answers come; return the seconds from each callback's due time to its answer."""
    loop = asyncio.get_running_loop()
    waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
    took: list[float] = []

    async def carry() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            while True:
                due, request = await waiting.get()
                writer.write(request)
                head = await reader.readuntil(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 200"), head
                await reader.readuntil(b"}")
                took.append(loop.time() - due)
        finally:
            writer.close()

    carriers = [asyncio.create_task(carry()) for _ in range(CONNECTIONS)]
    requests = [
        f"POST /callbacks/flora HTTP/1.1\r\nHost: bench\r\nFlora-Signature: {signature}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n".encode()
        + body
        for body, signature in signed(STEADY_PER_SECOND * STEADY_SECONDS)
    ]
    began = loop.time() + 0.1
    for number, request in enumerate(requests):
        due = began + number / STEADY_PER_SECOND
        if due > loop.time():
            await asyncio.sleep(due - loop.time())
        waiting.put_nowait((due, request))
    async with asyncio.timeout(20):
        while len(took) < len(requests):
            assert not any(each.done() for each in carriers), "a callback was not answered 200"
            await asyncio.sleep(0.05)
    for each in carriers:
        each.cancel()
    await asyncio.wait(carriers)
    await asyncio.sleep(0.1)  # the transports end
    return took


def late(took: list[float]) -> float:
    """Return the 99th percentile, in milliseconds."""
    return sorted(took)[int(len(took) * 0.99)] * 1000


def test_acknowledgement(room: Path) -> None:
    """The whole service: its poller asks after every run that the callbacks name, of an emulator on the load's core."""
    command = [sys.executable, "-m", "receiver", "emulator", "--port", "0"]
    emulator = subprocess.Popen(["taskset", "-c", str(LOAD_CORE), *command], stdout=subprocess.PIPE, text=True)
    assert emulator.stdout is not None
    said = [emulator.stdout.readline() for _ in range(5)]
    exported = dict(line.strip().removeprefix("export ").split("=", 1) for line in said if "export" in line)
    exported.pop("FLORA_WEBHOOK_SECRET")
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {LOAD_CORE})
    try:
        alone, middle, high = [], [], []
        for _ in range(ROUNDS):
            with receiver(fresh(room)) as process:
                alone.append(late(asyncio.run(steady(process.port))))
            with receiver(fresh(room), door=False, settings=exported) as process:
                took = asyncio.run(steady(process.port))
                middle.append(statistics.median(took) * 1000)
                high.append(late(took))
    finally:
        os.sched_setaffinity(0, allowed)
        emulator.terminate()
        emulator.communicate()
    heading(f"{STEADY_PER_SECOND} callbacks/s by the clock for {STEADY_SECONDS} s, workers busy", ROUNDS)
    row("acknowledgement, p99, workers at rest", "", alone, " ms")
    row("acknowledgement, median", "", middle, " ms")
    row("acknowledgement, p99", "<= 15 ms", high, " ms")
