"""The kit as pytest fixtures.

`pytest_plugins = ["receiver.testing.fixtures"]` in `conftest.py` loads them.
"""

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
from receiver.testing.downloads import MediaServer, page, serve_media
from receiver.testing.runs import a_settled_run
from receiver.testing.stand import Stand, run_stand

MEDIA_TYPES = ("imageUrl", "videoUrl", "audioUrl", "documentUrl")
"""Every type of output except `text`, which is inline."""


@pytest_asyncio.fixture
async def flora_media() -> AsyncIterator[MediaServer]:
    """Run a download server on loopback."""
    async with serve_media() as server:
        yield server


@pytest.fixture
def flora_run(flora_media: MediaServer) -> Callable[..., SettledRun]:
    """Return a maker of settled runs, such as `flora_run("imageUrl", "text")`.

    Without arguments the run has an output of every type. Outputs are real files, which
    `flora_media` serves.
    """

    def make(*types: str, **fields: Any) -> SettledRun:
        kinds = types or (
            () if fields.get("status", "completed") != "completed" else (*MEDIA_TYPES, "text")
        )
        return a_settled_run(
            *(_output(flora_media, kind, place) for place, kind in enumerate(kinds)), **fields
        )

    return make


@pytest_asyncio.fixture
async def flora_context(flora_media: MediaServer) -> AsyncIterator[Callable[..., MemoryContext]]:
    """Return a maker of contexts, `flora_context(run)`. Those of one test share their locations."""
    limits = to_download_limits(Settings())
    downloader = Downloader(limits=limits, allow_private_hosts=[flora_media.authority], tls=tls_context())
    places: dict[str, tuple[str, int]] = {}

    def make(run: SettledRun, **fields: Any) -> MemoryContext:
        return MemoryContext(run_id=run.run_id, downloader=downloader, places=places, **fields)

    yield make
    await downloader.aclose()


@pytest.fixture
def flora_stand(tmp_path: Path) -> Callable[..., AbstractAsyncContextManager[Stand]]:
    """Return a maker of stands: a receiver beside an emulated FLORA.

    `async with flora_stand([{"use": "my_package:MyHandler"}]) as stand:
    run = await stand.run("emu-image")`.
    """
    return partial(run_stand, tmp_path)


def _output(media: MediaServer, kind: str, position: int) -> Output:
    name = f"output_{position + 1}"
    if kind == "text":
        return Output(position, name, kind, "a lighthouse")
    made = make_media(kind, name, 0)
    extension, content_type = file_type(kind)
    body = b"".join(made.read(0, made.size))
    return media.output(
        f"/{name}{extension}", page(body, content_type), position=position, output_id=name, kind=kind
    )
