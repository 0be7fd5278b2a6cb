"""How many requests it costs to look at all open runs once, by how many there are and how they lie in FLORA's lists."""

import asyncio
import logging
import shutil
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path

import structlog
from msgspec.structs import replace
from sqlalchemy import create_engine

from receiver.model import Run
from receiver.store import SqliteDatabase
from receiver.store.migrate import upgrade
from tests.bench.table import Table
from tests.support.core import Clock
from tests.support.stand import MODEL, OTHER, Ledger, Stand, a_ledger, a_stand


def one_technique(stand: Stand, count: int) -> Iterable[Run]:
    return stand.to_rows(stand.fill(count))


def jittered(stand: Stand, count: int) -> Iterable[Run]:
    """A tenth is due; the rest is due within a few seconds."""
    runs = stand.to_rows(stand.fill(count))
    return [
        replace(run, next_poll_at=stand.clock.now + timedelta(milliseconds=n * 9 % 15_000))
        for n, run in enumerate(runs)
    ]


def three_kinds(stand: Stand, count: int) -> Iterable[Run]:
    """Two techniques and generations, mixed."""
    third = count // 3
    made = [
        *stand.fill(count - 2 * third),
        *stand.fill(third, prefix="b", subject=OTHER),
        *stand.fill(third, prefix="g", subject=MODEL),
    ]
    return stand.to_rows(made)


def among_others(stand: Stand, count: int) -> Iterable[Run]:
    """Each of our runs lies among three that are not ours."""
    runs = stand.fill(count, apart_seconds=1.0)
    stand.fill(3 * count, prefix="others", apart_seconds=1 / 3)
    return stand.to_rows(runs)


Layout = Callable[[Stand, int], Iterable[Run]]
CASES: tuple[tuple[Layout, int, int | None], ...] = (
    (one_technique, 100, 1),
    (one_technique, 1_000, 12),
    (jittered, 1_000, None),
    (three_kinds, 1_000, None),
    (among_others, 1_000, None),
    (one_technique, 10_000, 110),
)
"""Layout, open runs, and the most requests that a look may cost."""


async def one_pass(path: Path, layout: Layout, count: int) -> tuple[int, float]:
    """Return the requests of one look at `count` open runs, and the seconds that it took on loopback."""
    clock = Clock()
    database = SqliteDatabase(path)
    try:
        async with a_stand(clock) as stand:
            ours: Ledger = a_ledger(database, clock, stand)
            rows = list(layout(stand, count))
            await ours.add(rows)
            began = time.perf_counter()
            while await ours.count_unread():
                await ours.look_once()
                clock.forward(1)
            return stand.requests, time.perf_counter() - began
    finally:
        await database.close()


def test_requests_per_pass(room: Path, table: Table) -> None:
    """A thousand open runs, by how they lie; and of one technique, ten thousand."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    empty = room / "empty.db"
    engine = create_engine(f"sqlite:///{empty}")
    with engine.connect() as connection:
        upgrade(connection)
    engine.dispose()
    try:
        for layout, count, most in CASES:
            path = Path(shutil.copy(empty, room / f"{layout.__name__}-{count}.db"))
            requests, seconds = asyncio.run(one_pass(path, layout, count))
            name = f"requests for one look at {count:,} runs: {layout.__name__.replace('_', ' ')}"
            table.row(f"{name} ({seconds:.2f} s)", [requests], at_most=most)
    finally:
        structlog.reset_defaults()
