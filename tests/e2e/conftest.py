"""Fixtures of the end-to-end tests."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.e2e.stage import Stage, staged


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    """An emulator to play against, and all that a receiver needs."""
    async with staged(tmp_path) as made:
        yield made


@pytest.fixture
async def shared(tmp_path: Path, postgres_url: str) -> AsyncIterator[Stage]:
    """The same with a ledger on PostgreSQL, for several receivers at a time."""
    async with staged(tmp_path) as made:
        made.postgres = postgres_url
        yield made
