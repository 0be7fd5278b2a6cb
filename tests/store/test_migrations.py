"""The migrations make exactly the tables that the code works on."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine, inspect
from sqlalchemy.exc import IntegrityError

from receiver.errors import StoreUnavailableError
from receiver.store import migrate
from receiver.store.alembic_runner import alembic_config
from receiver.store.schema import metadata
from tests.support.postgres import Postgres


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty database, and beside it another one under the name with `2` at its end."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/empty"
        return
    server = request.getfixturevalue("postgres_server")
    assert isinstance(server, Postgres)
    names = ("empty", "empty2")
    for name in names:
        server.create(name, migrated=False)
    yield f"postgresql+psycopg://flora@/empty?host={server.directory}&port=5432"
    for name in names:
        server.execute(f"DROP DATABASE {name}")


@pytest.fixture
def connection(url: str) -> Iterator[Connection]:
    engine = create_engine(url)
    with engine.connect() as connection:
        yield connection
    engine.dispose()


def shape(connection: Connection) -> dict[str, Any]:
    """Return what alembic does not compare, too: CHECKs, names of constraints, the conditions of indexes."""
    inspector = inspect(connection)
    tables = {}
    for name in sorted(set(inspector.get_table_names()) - {"alembic_version"}):
        tables[name] = {
            "columns": sorted(
                (c["name"], str(c["type"]), c["nullable"]) for c in inspector.get_columns(name)
            ),
            "checks": sorted((c["name"], c["sqltext"]) for c in inspector.get_check_constraints(name)),
            "uniques": sorted(
                (c["name"], c["column_names"]) for c in inspector.get_unique_constraints(name)
            ),
            "keys": sorted(
                (c["constrained_columns"], c["referred_table"], c["options"])
                for c in inspector.get_foreign_keys(name)
            ),
            "indexes": sorted(
                (
                    c["name"],
                    c["column_names"],
                    {key: str(value) for key, value in c["dialect_options"].items()},
                )
                for c in inspector.get_indexes(name)
            ),
        }
    connection.rollback()
    return tables


def test_migrations_make_the_schema(connection: Connection, url: str) -> None:
    """Table by table, CHECKs and partial indexes included: a change of one without the other fails here."""
    migrate.upgrade(connection)
    assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    connection.rollback()
    engine = create_engine(url.replace("/empty", "/empty2"))
    with engine.connect() as direct:
        metadata.create_all(direct)
        direct.commit()
        assert shape(connection) == shape(direct)
    engine.dispose()


def test_head_is_the_newest_migration(connection: Connection) -> None:
    """And there is one newest: two branches would leave a database between them."""
    scripts = ScriptDirectory.from_config(alembic_config(connection))
    assert scripts.get_heads() == [migrate.HEAD]


def test_upgrading_again_changes_nothing(connection: Connection) -> None:
    """Every start upgrades: the rows stay, the tables stay, and it says that there was nothing to do."""
    assert migrate.current_revision(connection) is None
    assert migrate.upgrade(connection) == (None, migrate.HEAD)
    connection.exec_driver_sql("INSERT INTO rejections (rejected_at, code, size) VALUES (1, 'x', 1)")
    connection.commit()
    before = shape(connection)
    assert migrate.upgrade(connection) == (migrate.HEAD, migrate.HEAD)
    assert shape(connection) == before
    assert connection.exec_driver_sql("SELECT count(*) FROM rejections").scalar_one() == 1


def test_an_upgrade_leaves_no_transaction_open(connection: Connection) -> None:
    """The writer's connection goes on to be used: it must come back clean."""
    for _ in range(2):
        migrate.upgrade(connection)
        assert not connection.in_transaction()


def test_a_downgrade_leaves_nothing_behind(connection: Connection) -> None:
    migrate.upgrade(connection)
    command.downgrade(alembic_config(connection), "base")
    assert shape(connection) == {}


def test_dispatches_from_before_the_lanes_are_light(connection: Connection) -> None:
    """They keep their attempts, and nothing odd can be written into the new column; the way back keeps them too."""
    command.upgrade(alembic_config(connection), "0003")
    connection.exec_driver_sql(
        "INSERT INTO runs (run_id, state, origin, first_seen_at, deadline_at, settled_at, metadata, callback_expected, "
        "losses, polls, ladder, failures, missing, version) "
        "VALUES ('run_1', 'completed', 'tracked', 1, 2, 1, '{}', true, 0, 0, 0, 0, 0, 0)"
    )
    connection.exec_driver_sql(
        "INSERT INTO dispatches (seq, run_id, handler, event, round, state, attempts, due_at) "
        "VALUES (1, 'run_1', 'h', 'settled', 0, 'ready', 1, 1)"
    )
    connection.exec_driver_sql(
        "INSERT INTO dispatch_attempts (dispatch_seq, attempt, started_at) VALUES (1, 1, 1)"
    )
    connection.commit()
    migrate.upgrade(connection)
    assert connection.exec_driver_sql("SELECT lane FROM dispatches").scalar_one() == "light"
    with pytest.raises(IntegrityError):
        connection.exec_driver_sql("UPDATE dispatches SET lane = 'odd'")
    connection.rollback()
    command.downgrade(alembic_config(connection), "0003")
    assert connection.exec_driver_sql("SELECT count(*) FROM dispatches").scalar_one() == 1
    assert connection.exec_driver_sql("SELECT count(*) FROM dispatch_attempts").scalar_one() == 1


def test_artifacts_survive_the_room_for_thumbnails(connection: Connection) -> None:
    """The table is made anew on SQLite: its rows stay, up and down, and only thumbnails are lost on the way back."""
    alembic = alembic_config(connection)
    command.upgrade(alembic, "0003")
    connection.exec_driver_sql(
        "INSERT INTO runs (run_id, state, origin, callback_expected, first_seen_at, next_poll_at, deadline_at, metadata,"
        " losses, polls, ladder, failures, missing, version) VALUES ('r', 'open', 'started', true, 1, 1, 1, '{}',"
        " 0, 0, 0, 0, 0, 0)"
    )
    insert = "INSERT INTO artifacts (run_id, handler, position, output_id, location) VALUES ('r', 'h', {0}, 'o', 'l{0}')"
    connection.exec_driver_sql(insert.format(-1))
    connection.commit()
    migrate.upgrade(connection)
    connection.exec_driver_sql(insert.format(-2))
    connection.commit()
    command.downgrade(alembic, "0003")
    assert connection.exec_driver_sql("SELECT position FROM artifacts").scalars().all() == [-1]


def test_runs_from_before_their_reads_were_kept(connection: Connection) -> None:
    """They have all that hangs on them, up and down, and a replica of the earlier version can still add one."""
    command.upgrade(alembic_config(connection), "0005")
    insert = (
        "INSERT INTO runs (run_id, state, origin, callback_expected, first_seen_at, next_poll_at, deadline_at, "
        "metadata, losses, polls, ladder, failures, missing, version) "
        "VALUES ('{0}', 'open', 'started', true, 1, 1, 1, '{{}}', 0, 5, 0, 0, 0, 0)"
    )
    connection.exec_driver_sql(insert.format("run_1"))
    connection.exec_driver_sql(
        "INSERT INTO outputs (run_id, position, output_id, type, value) VALUES ('run_1', 0, 'o', 'text', 'x')"
    )
    connection.commit()
    migrate.upgrade(connection)
    connection.exec_driver_sql(insert.format("run_2"))
    found = connection.exec_driver_sql("SELECT polls, failed_polls FROM runs").fetchall()
    assert [tuple(row) for row in found] == [(5, 0), (5, 0)]
    connection.commit()
    command.downgrade(alembic_config(connection), "0005")
    assert connection.exec_driver_sql("SELECT count(*) FROM runs").scalar_one() == 2
    assert connection.exec_driver_sql("SELECT count(*) FROM outputs").scalar_one() == 1


def steps() -> list[tuple[str, str]]:
    """Return each migration but the first, with the one before it."""
    scripts = ScriptDirectory(str(Path(migrate.__file__).with_name("migrations")))
    return [
        (str(script.down_revision), script.revision)
        for script in reversed(list(scripts.walk_revisions()))
        if script.down_revision
    ]


@pytest.mark.parametrize(("before", "after"), steps())
def test_a_migration_takes_nothing_from_the_version_before(
    connection: Connection, before: str, after: str
) -> None:
    """Its statements still find their columns, may leave out what is new, and break no rule that they do not know.

    Replicas of it go on while a new one migrates. Indexes may be exchanged, and rules loosened.
    """
    alembic = alembic_config(connection)
    command.upgrade(alembic, before)
    old, old_rules = shape(connection), rules(connection)
    command.upgrade(alembic, after)
    new, new_rules = shape(connection), rules(connection)
    inspector = inspect(connection)
    for name, table in old.items():
        assert set(table["columns"]) <= set(new[name]["columns"]), name
        for key in ("uniques", "keys"):
            assert table[key] == new[name][key], (name, key)
        added = {column[0] for column in set(new[name]["columns"]) - set(table["columns"])}
        for column in inspector.get_columns(name):
            if column["name"] in added:
                assert column["nullable"] or column["default"] is not None, (name, column["name"])
        for rule in new_rules[name] - old_rules[name]:
            assert any(column in rule for column in added), (
                f"{name} has a new rule on what was there: {rule}"
            )
    connection.rollback()


def rules(connection: Connection) -> dict[str, set[str]]:
    inspector = inspect(connection)
    found = {
        name: {str(check["sqltext"]) for check in inspector.get_check_constraints(name)}
        for name in inspector.get_table_names()
    }
    connection.rollback()
    return found


def test_a_database_from_the_future_is_refused(connection: Connection) -> None:
    """A newer version's database is not touched, and the operator is told."""
    migrate.upgrade(connection)
    connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    connection.commit()
    with pytest.raises(StoreUnavailableError, match="newer"):
        migrate.upgrade(connection)


def test_processes_that_start_together_migrate_once(url: str) -> None:
    """On PostgreSQL replicas come up at the same moment: one migrates, the others wait and find it done."""
    if url.startswith("sqlite"):
        return  # one process alone may open the file
    engine = create_engine(url, pool_size=4)

    def start(_: int) -> tuple[str | None, str]:
        with engine.connect() as connection:
            return migrate.upgrade(connection)

    with ThreadPoolExecutor(4) as threads:
        found = sorted(threads.map(start, range(4)), key=str)
    engine.dispose()
    assert found == [(migrate.HEAD, migrate.HEAD)] * 3 + [(None, migrate.HEAD)]


@pytest.mark.parametrize("writes", [False, True])
def test_a_migration_gives_way_to_who_is_at_work(
    postgres_server: Postgres, monkeypatch: pytest.MonkeyPatch, writes: bool
) -> None:
    """It does not stand in everybody's way behind a long reader (pg_dump), nor end in a deadlock with a replica that writes.

    It lets go of what it has locked, and tries again until it is through.
    """
    monkeypatch.setattr(migrate, "_LOCK_TIMEOUT", "300ms")
    monkeypatch.setattr(migrate, "_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(migrate, "_TRIES", 100)
    postgres_server.create("busy", migrated=False)
    url = postgres_server.url("busy")
    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    waits = "SELECT 1 FROM pg_stat_activity WHERE datname = 'busy' AND wait_event_type = 'Lock' AND query LIKE 'ALTER%disp%'"

    def upgrade() -> tuple[str | None, str]:
        with engine.connect() as connection:
            return migrate.upgrade(connection)

    try:
        with engine.connect() as connection:
            command.upgrade(alembic_config(connection), "0003")
            connection.commit()
        with ThreadPoolExecutor(1) as thread, psycopg.connect(url) as busy:
            busy.execute("SET deadlock_timeout = '100s'")  # so that it is not this one that ends a deadlock
            busy.execute("SELECT FROM dispatches")
            upgraded = thread.submit(upgrade)
            while not postgres_server.execute(waits):
                assert not upgraded.done(), upgraded.result()
            if writes:
                busy.execute(
                    "SELECT FROM artifacts"
                )  # which the migration has altered already: it must let go
            else:
                while postgres_server.execute(waits):
                    assert not upgraded.done(), upgraded.result()
            busy.commit()
            assert upgraded.result() == ("0003", migrate.HEAD)
    finally:
        engine.dispose()
        postgres_server.execute("DROP DATABASE busy WITH (FORCE)")
