"""Fixtures that the tests of all handlers share, on top of the public kit."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from receiver.handler import SettledRun
from receiver.net.clients import tls_context
from receiver.net.download import Downloader
from receiver.testing import SETTLED_AT as NOW
from receiver.testing import Lines, MediaServer, MemoryContext, a_settled_run, serve_media
from tests.support.defaults import download_limits

__all__ = ["NOW", "RUN", "Lines", "MemoryContext"]

RUN = a_settled_run()


@pytest.fixture
def run() -> SettledRun:
    """A completed run; tests replace what they need."""
    return RUN


@pytest.fixture
async def media() -> AsyncIterator[MediaServer]:
    async with serve_media() as server:
        yield server


@pytest.fixture(scope="session")
def tls() -> Any:
    return tls_context()


@pytest.fixture
async def context_of(media: MediaServer, tls: Any) -> AsyncIterator[Callable[..., MemoryContext]]:
    """Make contexts: `context_of(run_id, **fields)`."""
    downloader = Downloader(limits=download_limits(), allow_private_hosts=[media.authority], tls=tls)
    places: dict[str, tuple[str, int]] = {}

    def make(run_id: str = "run_1", **fields: Any) -> MemoryContext:
        return MemoryContext(run_id=run_id, downloader=downloader, **{"places": places, **fields})

    yield make
    await downloader.aclose()
