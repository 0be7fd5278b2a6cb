"""Fixtures for every test that needs a ledger: what asks for `database` runs on SQLite and on PostgreSQL."""

import shutil
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from sqlalchemy import create_engine

from receiver.store import Database, SqliteDatabase
from receiver.store.migrate import upgrade
from receiver.store.postgres import PostgresDatabase
from tests.support.core import Clock, Core, a_core
from tests.support.postgres import Postgres, pooler, postgres

collect_ignore = ["example_plugin"]
"""A package of its own; `test_kit.py` installs it and runs its tests."""


settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")
"""A property that is slow here is none the worse for it: by default 200 ms are asserted for each example."""


def pytest_configure() -> None:
    """Restore signals that the shell ignores for background jobs and under `nohup`.

    Every program that the tests start would inherit that.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with the tables in it: migrating takes longer than most tests."""
    path = tmp_path_factory.mktemp("migrated") / "receiver.db"
    engine = create_engine(f"sqlite:///{path}")
    with engine.connect() as connection:
        upgrade(connection)
    engine.dispose()
    return path


@pytest.fixture
def sqlite_path(migrated: Path, tmp_path: Path) -> Path:
    """A fresh ledger of its own, not opened yet."""
    return Path(shutil.copy(migrated, tmp_path / "receiver.db"))


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Postgres]:
    """A PostgreSQL server for this worker's tests."""
    with postgres() as server:
        yield server


@pytest.fixture(scope="session")
def postgres_database(postgres_server: Postgres) -> str:
    """The name of a database with the tables in it."""
    postgres_server.create("suite")
    return "suite"


@pytest.fixture
def postgres_url(postgres_server: Postgres, postgres_database: str) -> str:
    """A fresh ledger on PostgreSQL, not opened yet."""
    postgres_server.empty(postgres_database)
    return postgres_server.url(postgres_database)


@pytest.fixture(params=["sqlite", "postgres"])
async def database(request: pytest.FixtureRequest) -> AsyncIterator[Database]:
    """An open, empty ledger: what holds on one database holds on the other."""
    database: Database
    if request.param == "sqlite":
        database = SqliteDatabase(request.getfixturevalue("sqlite_path"), busy_timeout_ms=50)
    else:
        database = PostgresDatabase(
            request.getfixturevalue("postgres_url"), connections=4, database_clock=False
        )
    yield database
    await database.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def core(database: Database, clock: Clock) -> Core:
    """A ledger with its door; one handler, `h`, listens to settled runs."""
    return a_core(database, clock)


@pytest.fixture
def pgbouncer(postgres_server: Postgres, postgres_database: str) -> Iterator[str]:
    """The URL of the suite's database behind a PgBouncer in transaction mode."""
    with pooler(postgres_server, postgres_database) as url:
        yield url
