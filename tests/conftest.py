"""Fixtures for every test that needs a ledger. A second database joins as another parameter of `database`."""

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine

from receiver.store import Database
from receiver.store.migrate import upgrade
from tests.core import Clock, Core, a_core


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


@pytest.fixture(params=["sqlite"])
async def database(sqlite_path: Path) -> AsyncIterator[Database]:
    """An open, empty ledger."""
    database = Database(sqlite_path, busy_timeout_ms=50)
    yield database
    await database.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def core(database: Database, clock: Clock) -> Core:
    """A ledger with its door; one handler, `h`, listens to settled runs."""
    return a_core(database, clock)
