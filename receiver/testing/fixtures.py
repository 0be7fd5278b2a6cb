"""The kit as pytest fixtures: `pytest_plugins = ["receiver.testing.fixtures"]` in your `conftest.py` brings them."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from receiver.config import Settings
from receiver.emulator.media import file_type, make_media
from receiver.handler import Output, SettledRun
from receiver.net.clients import tls_context
from receiver.net.download import Downloader
from receiver.service.wiring import to_download_limits
from receiver.testing.context import MemoryContext
from receiver.testing.downloads import MediaServer, page, serving
from receiver.testing.runs import a_settled_run
from receiver.testing.stand import Stand, standing

MEDIA_TYPES = ("imageUrl", "videoUrl", "audioUrl", "documentUrl")
"""Every type of output but `text`, which comes inline."""


@pytest_asyncio.fixture
async def flora_media() -> AsyncIterator[MediaServer]:
    """A download server on loopback."""
    async with serving() as server:
        yield server


@pytest.fixture
def flora_run(flora_media: MediaServer) -> Callable[..., SettledRun]:
    """Make settled runs: `flora_run("imageUrl", "text")` has two real outputs, `flora_run()` one of each type."""

    def make(*types: str, **fields: Any) -> SettledRun:
        kinds = types or (() if fields.get("status", "completed") != "completed" else (*MEDIA_TYPES, "text"))
        return a_settled_run(*(_output(flora_media, kind, place) for place, kind in enumerate(kinds)), **fields)

    return make


@pytest_asyncio.fixture
async def flora_context(flora_media: MediaServer) -> AsyncIterator[Callable[..., MemoryContext]]:
    """Make contexts, `flora_context(run)`; those of one test share their places, as the runs of a ledger do."""
    limits = to_download_limits(Settings())
    downloader = Downloader(limits=limits, allow_private_hosts=[flora_media.authority], tls=tls_context())
    places: dict[str, tuple[str, int]] = {}

    def make(run: SettledRun, **fields: Any) -> MemoryContext:
        return MemoryContext(run_id=run.run_id, downloader=downloader, places=places, **fields)

    yield make
    await downloader.aclose()


@pytest.fixture
def flora_stand(tmp_path: Path) -> Callable[..., AbstractAsyncContextManager[Stand]]:
    """Run a receiver beside an emulated FLORA.

    `async with flora_stand([{"use": "my_package:MyHandler"}]) as stand: run = await stand.run("emu-image")`.
    """
    return partial(standing, tmp_path)


def _output(media: MediaServer, kind: str, position: int) -> Output:
    name = f"output_{position + 1}"
    if kind == "text":
        return Output(position, name, kind, "a lighthouse")
    made = make_media(kind, name, 0)
    extension, content_type = file_type(kind)
    body = b"".join(made.read(0, made.size))
    return media.output(f"/{name}{extension}", page(body, content_type), position=position, output_id=name, kind=kind)
