"""Ingest into a ledger that is full already, against an empty one: both take the same callbacks in turn."""

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from tests.bench.bench_door import Measured, fresh, measured
from tests.bench.load import spread, write_requests
from tests.bench.servers import door
from tests.bench.table import Table, ratios

ROUNDS = 5
ROWS = 1_000_000


def fill(path: Path, count: int) -> None:
    """Put settled runs with their deliveries and bodies into a ledger, as a year of traffic leaves them; ids in no order."""
    with closing(sqlite3.connect(path)) as connection:
        for pragma in (
            "journal_mode = OFF",
            "synchronous = OFF",
            "cache_size = -1000000",
            "temp_store = MEMORY",
        ):
            connection.execute(f"PRAGMA {pragma}")
        connection.create_function(
            "key", 1, lambda number: f"{spread(number)}{number:08x}", deterministic=True
        )
        now = int(time.time() * 1000)
        numbers = f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {count})"
        with _without_indexes(connection):
            # In the order of their ids, and the indexes afterwards: minutes rather than hours, and the same pages later.
            connection.execute(
                "CREATE TEMP TABLE made AS " + numbers + " SELECT i, key(i) AS id FROM n ORDER BY id"
            )
            connection.execute(
                f"INSERT INTO runs (run_id, state, origin, first_seen_at, deadline_at, metadata, callback_expected,"
                f" told, reported_at, settled_at, verdict, losses, polls, ladder, failures, missing, version)"
                f" SELECT 'run_' || id, 'completed', 'callback', {now} - i * 30, {now}, '{{}}', 1,"
                f" 'completed', {now}, {now}, 'matched', 0, 1, 0, 0, 0, 2 FROM made"
            )
            connection.execute(
                f"INSERT INTO deliveries (delivery_id, run_id, event, received_at, age, secret, readable, duplicates)"
                f" SELECT 'whd_' || id, 'run_' || id, 'run.completed', {now} - i * 30, 1, 0, 1, 0 FROM made"
            )
            connection.execute(
                "INSERT INTO delivery_bodies (seq, signature, body)"
                " SELECT seq, 't=1,v1=' || hex(zeroblob(32)), zeroblob(230) FROM deliveries"
            )
        connection.commit()
        connection.execute("PRAGMA journal_mode = WAL")


@contextmanager
def _without_indexes(connection: sqlite3.Connection) -> Iterator[None]:
    """Drop the indexes that may be dropped, and make them anew at the end."""
    found = connection.execute(
        "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL"
    ).fetchall()
    for name, _ in found:
        connection.execute(f"DROP INDEX {name}")
    yield
    for _, sql in found:
        connection.execute(sql)


def compare(room: Path, rows: int, rounds: int) -> tuple[list[Measured], list[Measured]]:
    """Return what a full ledger and an empty one have taken."""
    empty, full = fresh(room), fresh(room)
    for directory in (empty, full):
        with door(directory):
            pass  # makes the tables
    fill(full / "receiver.db", rows)
    os.sync()  # else the first commits wait for all that was just written
    with_many, with_few = [], []
    for _ in range(rounds):
        requests = write_requests(room / "requests", 45_000)
        with_few.append(measured(door(empty), requests))
        with_many.append(measured(door(full), requests))
    return with_many, with_few


def test_with_a_full_ledger(room: Path, table: Table) -> None:
    """A million runs, deliveries and bodies."""
    many, few = compare(room, ROWS, ROUNDS)
    speed = ratios([each.per_second for each in many], [each.per_second for each in few])
    table.row(f"callbacks per second: {ROWS:,} runs / empty ledger", speed, at_least=0.9)
    cpu = ratios([each.cpu_us for each in many], [each.cpu_us for each in few])
    table.row(f"CPU per callback: {ROWS:,} runs / empty ledger", cpu)
