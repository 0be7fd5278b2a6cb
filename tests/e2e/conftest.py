"""Fixtures of the end-to-end tests."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.stage import Stage, run_stage


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    """An emulator to play against, and all that a receiver needs."""
    async with run_stage(tmp_path) as made:
        yield made


@pytest.fixture
async def shared(tmp_path: Path, postgres_url: str) -> AsyncIterator[Stage]:
    """The same with a ledger on PostgreSQL, for several receivers at a time."""
    async with run_stage(tmp_path) as made:
        made.postgres = postgres_url
        yield made


@pytest.fixture(params=["sqlite", "postgres"])
def ledger_url(request: pytest.FixtureRequest) -> str | None:
    """Where the ledger is: None for the stage's own SQLite file, or the URL of an empty one on PostgreSQL."""
    url: str | None = request.getfixturevalue("postgres_url") if request.param == "postgres" else None
    return url
