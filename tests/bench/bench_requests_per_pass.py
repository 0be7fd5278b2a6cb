"""How many requests it costs to look at all open runs once, by how many there are and how they lie in FLORA's lists."""

import asyncio
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import structlog
from sqlalchemy import create_engine

from receiver.model import Run
from receiver.store import SqliteDatabase
from receiver.store.migrate import upgrade
from tests.core import Clock
from tests.stand import MODEL, OTHER, Ledger, Stand, a_ledger, a_stand

COUNTS = (10, 100, 1_000, 10_000)
MOST = {10: 1, 100: 1, 1_000: 12, 10_000: 110}
"""What a pass may cost where all runs are of one technique."""


def one_technique(stand: Stand, count: int) -> Iterable[Run]:
    return stand.known(stand.fill(count))


def jittered(stand: Stand, count: int) -> Iterable[Run]:
    """A tenth is due; the rest is due within a few seconds."""
    runs = stand.known(stand.fill(count))
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
    return stand.known(made)


def among_others(stand: Stand, count: int) -> Iterable[Run]:
    """Each of our runs lies among three that are not ours."""
    runs = stand.fill(count, apart_seconds=1.0)
    stand.fill(3 * count, prefix="others", apart_seconds=1 / 3)
    return stand.known(runs)


LAYOUTS = (one_technique, jittered, three_kinds, among_others)


async def one_pass(path: Path, layout: str, count: int) -> tuple[int, float]:
    """Return the requests of one look at `count` open runs, and the seconds that it took on loopback."""
    clock = Clock()
    database = SqliteDatabase(path)
    try:
        async with a_stand(clock) as stand:
            ours: Ledger = a_ledger(database, clock, stand)
            rows = list(next(each for each in LAYOUTS if each.__name__ == layout)(stand, count))
            await ours.add(rows)
            began = time.perf_counter()
            while await ours.untouched():
                await ours.look_once()
                clock.forward(1)
            return stand.requests, time.perf_counter() - began
    finally:
        await database.close()


def test_requests_per_pass() -> None:
    """Print the table; a thousand open runs cost at most a dozen requests."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    write = sys.stdout.write
    write(f"\n{'requests of one pass':<22}" + "".join(f"{count:>16,}" for count in COUNTS) + "\n")
    with tempfile.TemporaryDirectory() as directory:
        empty = Path(directory) / "empty.db"
        engine = create_engine(f"sqlite:///{empty}")
        with engine.connect() as connection:
            upgrade(connection)
        engine.dispose()
        for layout in (each.__name__ for each in LAYOUTS):
            cells = []
            for count in COUNTS:
                path = Path(shutil.copy(empty, Path(directory) / f"{layout}-{count}.db"))
                requests, seconds = asyncio.run(one_pass(path, layout, count))
                cells.append(f"{requests:>7,} {seconds:>6.2f} s")
                if layout == "one_technique":
                    assert requests <= MOST[count]
            write(f"{layout.replace('_', ' '):<22}" + "".join(f"{cell:>16}" for cell in cells) + "\n")
