"""A SQLite ledger goes to PostgreSQL: every value as it is, all or nothing, and what comes out is compared."""

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import create_engine, insert, select

from receiver.errors import StoreError, StoreInUseError, StoreUnavailableError
from receiver.store import SqliteDatabase, migrate
from receiver.store.move import TABLES, MoveResult, move
from receiver.store.schema import (
    artifacts,
    channel_hours,
    deliveries,
    delivery_bodies,
    dispatch_attempts,
    dispatches,
    outputs,
    rejections,
    run_reads,
    runs,
    starts,
    watermarks,
)
from tests.support.postgres import Postgres

ODD = "é \U0001f9ea \u2028 \\N \\ '\" {a,NULL} \t\r\n \ufeff"
"""Characters that an encoding, an array or a COPY would trip over."""
BIG = 2**63 - 1
RUN = {
    "run_id": "run_1", "state": "reported", "origin": "started", "first_seen_at": 1, "deadline_at": BIG,
    "metadata": '{"a": "\U0001f9ea"}', "callback_expected": True, "told": "both", "reported_at": 5, "losses": 0,
    "next_poll_at": -1, "polls": 3, "failed_polls": 2, "ladder": 0,
    "failures": 0, "missing": 0, "version": 7, "charged_cost": 0.1 + 0.2,
    "quoted_cost": 1e-300, "error_message": ODD, "error_code": "",
}  # fmt: skip
DISPATCH = {
    "run_id": "run_2",
    "handler": "h",
    "event": "settled",
    "attempts": 1,
    "due_at": 9,
    "lane": "heavy",
}
START = {
    "token": "t", "workspace_id": "", "operation": "technique_run", "technique_id": "tech", "idempotency_key": ODD,
    "request": "x" * 300_000, "request_hash": "h", "metadata": "{}", "callback_expected": False, "state": "asking",
    "created_at": 1, "due_at": 2, "attempts": 1, "error_fields": "[]",
}  # fmt: skip
CONTENT: list[tuple[Any, list[dict[str, Any]]]] = [
    (runs, [RUN]),
    (runs, [{**RUN, "run_id": "run_2", "state": "completed", "settled_at": 4, "callback_expected": False}]),
    (
        run_reads,
        [
            {"run_id": "run_1", "slot": slot, "requested_at": 1, "source": "list", "outcome": "failed", "problem": ODD}
            for slot in range(3)
        ],
    ),
    (outputs, [{"run_id": "run_2", "position": at, "output_id": "o", "type": "text", "value": ODD} for at in (0, 1)]),
    (
        deliveries,
        [
            {"seq": seq, "delivery_id": f"whd_{seq}", "run_id": None, "received_at": 1, "age": -3, "secret": 0,
             "readable": seq % 2 == 0, "duplicates": 0}
            for seq in (*range(1, 700, 2), 1_000_000)
        ],
    ),
    (
        delivery_bodies,
        [
            {"seq": 1, "signature": "t=1,v1=ab", "body": bytes(range(256)) * 256},
            {"seq": 3, "signature": "", "body": b""},
            {"seq": 1_000_000, "signature": "s", "body": b"\\x00"},
        ],
    ),
    (
        dispatches,
        [
            {**DISPATCH, "seq": 4, "round": 0, "state": "done", "result": ODD, "finished_at": 3},
            {**DISPATCH, "seq": 9, "round": 1, "state": "leased", "lease_token": "t", "lease_until": 7},
        ],
    ),
    (dispatch_attempts, [{"dispatch_seq": 9, "attempt": 1, "started_at": 1}]),
    (artifacts, [{"run_id": "run_2", "handler": "h", "position": -2, "output_id": "o", "location": ODD, "size": BIG,
                  "sha256": "ab", "stored_at": 1}]),
    (starts, [START]),
    (channel_hours, [{"hour": 3_600_000, "outcome": "matched", "runs": 3}]),
    (watermarks, [{"scope": ODD, "created_at": 1, "swept_at": 2}]),
    (rejections, [{"seq": 77, "rejected_at": 1, "code": "x", "remote": None, "size": 1}]),
]  # fmt: skip


@pytest.fixture
def ledger(sqlite_path: Path) -> Path:
    """A ledger with something in each table."""
    engine = create_engine(f"sqlite:///{sqlite_path}")
    with engine.begin() as connection:
        for table, rows in CONTENT:
            for row in rows:
                connection.execute(insert(table), row)
    engine.dispose()
    return sqlite_path


@pytest.fixture
def target(postgres_server: Postgres) -> Iterator[str]:
    """An empty database, without tables."""
    postgres_server.create("target", migrated=False)
    yield "target"
    postgres_server.execute("DROP DATABASE target WITH (FORCE)")


def content(url: str) -> dict[str, list[tuple[Any, ...]]]:
    """Return every row of a ledger, in an order that both databases have."""
    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.connect() as connection:
        found = {
            table.name: sorted(map(tuple, connection.execute(select(table))), key=repr) for table in TABLES
        }
    engine.dispose()
    return found


def is_empty(url: str) -> bool:
    return not any(content(url).values())


def test_every_row_arrives_as_it_is(ledger: Path, postgres_server: Postgres, target: str) -> None:
    """Numbers, costs, odd characters and bodies byte for byte; the source is not changed, and it may be said twice."""
    before = content(f"sqlite:///{ledger}")
    url = postgres_server.url(target)
    moved = move(ledger, url)
    assert moved.copied
    assert content(url) == before == content(f"sqlite:///{ledger}")
    assert {name: held.rows for name, held in moved.tables.items()} == {
        name: len(rows) for name, rows in before.items()
    }
    assert all(before.values()), "a table of which nothing is tried here"
    assert move(ledger, url) == MoveResult(moved.tables, copied=False)


def test_it_goes_through_a_pooler(ledger: Path, pgbouncer: str, postgres_url: str) -> None:
    """Into tables that are there already, with nothing that outlives a transaction."""
    assert move(ledger, pgbouncer).copied
    assert content(postgres_url) == content(f"sqlite:///{ledger}")


def test_what_is_new_is_numbered_on(ledger: Path, postgres_server: Postgres, target: str) -> None:
    move(ledger, postgres_server.url(target))
    row = "INSERT INTO {} VALUES (DEFAULT, {}) RETURNING seq"
    inserts = {
        row.format("deliveries", "'new', NULL, NULL, NULL, 1, 0, 0, true, 0, NULL"): 1_000_001,
        row.format("rejections", "1, 'x', NULL, 1"): 78,
        "INSERT INTO dispatches (run_id, handler, event, round, state, attempts, due_at) "
        "VALUES ('run_1', 'h', 'settled', 0, 'ready', 0, 0) RETURNING seq": 10,
    }
    for statement, seq in inserts.items():
        assert postgres_server.execute(statement, target) == [(seq,)]


def test_an_empty_ledger_is_moved_too(sqlite_path: Path, postgres_server: Postgres, target: str) -> None:
    """And its first row gets the first number."""
    assert move(sqlite_path, postgres_server.url(target)).copied
    new = "INSERT INTO rejections (rejected_at, code, size) VALUES (1, 'x', 1) RETURNING seq"
    assert postgres_server.execute(new, target) == [(1,)]


def test_sums_tell_any_difference(ledger: Path, postgres_server: Postgres, target: str) -> None:
    """A copy in which one value, one type or one row is another is not called the same."""
    url = postgres_server.url(target)
    move(ledger, url)
    for changed, told in (
        ("UPDATE outputs SET value = value || ' ' WHERE position = 1", "outputs"),
        ("UPDATE runs SET error_code = NULL WHERE run_id = 'run_1'", "runs"),
        ("UPDATE runs SET charged_cost = 0.3", "runs"),
        ("UPDATE outputs SET position = 1 - position + 10", "outputs"),
        ("UPDATE delivery_bodies SET body = body || '\\x00' WHERE seq = 3", "delivery_bodies"),
        ("DELETE FROM watermarks", "watermarks"),
        ("INSERT INTO channel_hours VALUES (0, 'lost', 1)", "channel_hours"),
    ):
        with psycopg.connect(url) as session:
            session.execute(changed.encode())
            session.commit()
            with pytest.raises(StoreError, match=rf"has another ledger: {told} differ"):
                move(ledger, url)
        postgres_server.empty(target)
        assert move(ledger, url).copied


@pytest.mark.parametrize(
    ("alteration", "told"),
    [
        ("NEW.value := upper(NEW.value); RETURN NEW;", "outputs: 2 rows in the source, 2 in the target"),
        (
            "IF NEW.position = 1 THEN RETURN NULL; END IF; RETURN NEW;",
            "outputs: 2 rows in the source, 1 in the target",
        ),
        ("NEW.output_id := NULL; RETURN NEW;", "outputs has a row that PostgreSQL does not accept"),
    ],
)
def test_what_does_not_arrive_as_it_was_is_not_kept(
    ledger: Path, postgres_server: Postgres, target: str, alteration: str, told: str
) -> None:
    """A database that alters, drops or refuses a row is told of, and stays empty; once that is mended it works."""
    url = postgres_server.create("altering")
    try:
        _on_each_output(postgres_server, "altering", alteration)
        with pytest.raises(StoreError, match=told):
            move(ledger, url)
        assert is_empty(url)
        postgres_server.execute("DROP TRIGGER t ON outputs", "altering")
        assert move(ledger, url).copied
    finally:
        postgres_server.execute("DROP DATABASE altering WITH (FORCE)")


def _on_each_output(server: Postgres, database: str, body: str) -> None:
    server.execute(
        f"CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body} END $$", database
    )
    server.execute("CREATE TRIGGER t BEFORE INSERT ON outputs FOR EACH ROW EXECUTE FUNCTION f()", database)


def test_killed_half_way_it_leaves_an_empty_target(
    ledger: Path, postgres_server: Postgres, target: str
) -> None:
    """`kill -9` while the rows of a table in the middle go over; the next one finds an empty database and succeeds."""
    url = postgres_server.url(target)
    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.connect() as connection:
        migrate.upgrade(connection)
    engine.dispose()
    _on_each_output(postgres_server, target, "PERFORM pg_advisory_xact_lock(1); RETURN NEW;")
    code = "import sys; from pathlib import Path; from receiver.store.move import move; move(Path(sys.argv[1]), sys.argv[2])"
    waiting = "SELECT pid FROM pg_stat_activity WHERE datname = 'target' AND wait_event = 'advisory'"
    with psycopg.connect(url, autocommit=True) as holding:
        holding.execute("SELECT pg_advisory_lock(1)")
        process = subprocess.Popen([sys.executable, "-c", code, str(ledger), url])
        while not postgres_server.execute(waiting):
            assert process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    while postgres_server.execute("SELECT 1 FROM pg_stat_activity WHERE datname = 'target'"):
        pass  # the server notices that nobody listens, and rolls back
    assert is_empty(url)
    assert move(ledger, url).copied


async def test_a_ledger_in_use_is_left_alone(ledger: Path, postgres_server: Postgres, target: str) -> None:
    """So is a database at which nobody answers, and a file that is none or another version's."""
    url = postgres_server.url(target)
    database = SqliteDatabase(ledger)
    with pytest.raises(StoreInUseError):
        move(ledger, url)
    await database.close()
    with pytest.raises(StoreUnavailableError, match="does not exist"):
        move(ledger.with_name("other.db"), url)
    with pytest.raises(StoreUnavailableError):
        move(ledger, postgres_server.url("nowhere"))
    with contextlib.closing(sqlite3.connect(ledger)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '0001'")
    with pytest.raises(StoreError, match="at revision 0001"):
        move(ledger, url)
    assert (
        postgres_server.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'", target) == []
    )


def test_a_target_of_another_version_is_left_alone(
    ledger: Path, postgres_server: Postgres, target: str
) -> None:
    url = postgres_server.url(target)
    postgres_server.execute("CREATE TABLE alembic_version (version_num text)", target)
    postgres_server.execute("INSERT INTO alembic_version VALUES ('someone')", target)
    with pytest.raises(StoreError, match="at revision someone"):
        move(ledger, url)


def test_memory_is_bounded(ledger: Path, postgres_server: Postgres, target: str) -> None:
    """20 MiB of bodies go over in pieces."""
    engine = create_engine(f"sqlite:///{ledger}")
    with engine.begin() as connection:
        for seq in range(5, 700, 2):
            connection.execute(
                insert(delivery_bodies), {"seq": seq, "signature": "s", "body": os.urandom(60_000)}
            )
    engine.dispose()
    tracemalloc.start()
    try:
        move(ledger, postgres_server.url(target))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 12 << 20
