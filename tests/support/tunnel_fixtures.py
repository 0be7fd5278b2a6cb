"""Fixtures: a receiver, and an sshd for tunnels."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.support.sshd import Sshd, sshd
from tests.support.stage import Stage, run_stage


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    async with run_stage(tmp_path) as stage:
        yield stage


@pytest.fixture
def ssh_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with sshd(tmp_path_factory.mktemp("sshd")) as server:
        yield server
