"""How soon a callback is answered under a steady load: with the workers at rest, and with all of them busy.

The sender is on the load's core. The emulator, which the workers ask, is there too, and gives way to it (`nice`).
"""

import asyncio
import time
from pathlib import Path

from tests.bench.bench_door import fresh
from tests.bench.load import LOAD_CORE, late, pinned, request, send, signed
from tests.bench.servers import Process, door, emulator, receiver
from tests.bench.table import Table

ROUNDS = 3
PER_SECOND, SECONDS = 500, 6
CONNECTIONS = 256
"""So many that none is waited for: what is late before it is written is the sender's lateness."""


def steady(process: Process) -> list[tuple[float, float]]:
    """Send by the clock: an answer that is late delays no other callback's sending."""
    requests = [request(body, signature) for body, signature in signed(PER_SECOND * SECONDS)]
    return asyncio.run(send([process.port], requests, per_second=PER_SECOND, connections=CONNECTIONS))


def test_acknowledgement(room: Path, table: Table) -> None:
    """Busy: the poller asks after every run that the callbacks name."""
    rest, busy, middle, unsent, emulated, served = [], [], [], [], [], []
    with pinned(LOAD_CORE), emulator(fresh(room), core=LOAD_CORE, nice=19) as (flora, exported):
        for _ in range(ROUNDS):
            with door(fresh(room)) as process:
                rest.append(late(from_due for from_due, _ in steady(process)))
            with receiver(fresh(room), settings=exported) as process:
                began, flora_before, ours_before = (
                    time.perf_counter(),
                    flora.cpu_seconds(),
                    process.cpu_seconds(),
                )
                took = steady(process)
                seconds = time.perf_counter() - began
                busy.append(late(from_due for from_due, _ in took))
                middle.append(late((from_due for from_due, _ in took), 0.5))
                unsent.append(late(from_due - from_write for from_due, from_write in took))
                emulated.append((flora.cpu_seconds() - flora_before) / seconds * 100)
                served.append((process.cpu_seconds() - ours_before) / seconds * 100)
    table.row(f"acknowledgement at {PER_SECOND}/s, p99: workers at rest", rest, " ms", at_most=15)
    table.row(f"acknowledgement at {PER_SECOND}/s, p99: workers busy", busy, " ms", at_most=15)
    table.row(".. median", middle, " ms")
    table.row(".. of it before the callback was written, p99", unsent, " ms")
    table.row(".. the server's share of its core", served, " %")
    table.row(".. the emulator's share of the sender's core", emulated, " %")
