"""Lanes with the dispatcher, the storage handler and downloads from loopback."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import BaseModel

from handlers.storage import Storage, StorageConfig
from receiver.decide import HEAVY_BYTES
from receiver.handler import Answer, Context, Done, Handler, Retry, SettledRun
from receiver.model import Lane, Output
from receiver.net.clients import tls_context
from receiver.net.download import Downloader
from receiver.store import Database
from receiver.workers.dispatcher import Dispatcher
from tests.support.core import Clock, Core, a_core, registered_handler, until
from tests.support.defaults import download_limits
from tests.support.media import MediaServer, Page, page, serve_media
from tests.support.patience import PATIENCE_SECONDS

TLS = tls_context()
PNG = b"\x89PNG\r\n\x1a\n" + bytes(40_000)
LARGE = HEAVY_BYTES + 1


def endless(size: int | None = LARGE) -> Page:
    """The beginning of a file that never ends; `size` is what its head says."""
    length = b"" if size is None else f"Content-Length: {size}\r\n".encode()
    return Page(b"HTTP/1.1 200 OK\r\n" + length + b"\r\n" + bytes(600_000), hold=True)


@dataclass
class Scripted:
    """A handler that does what a test tells it, and remembers the runs that it began."""

    Config: ClassVar[type[BaseModel]] = BaseModel
    act: Callable[[SettledRun, Context], Awaitable[Answer]]
    began: list[str] = field(default_factory=list)

    async def handle(self, run: SettledRun, context: Context) -> Answer:
        self.began.append(run.run_id)
        return await self.act(run, context)


async def read_all(run: SettledRun, context: Context) -> Answer:
    """Read every output to its end, one after the other."""
    for output in run.outputs:
        async with context.open(output) as download:
            async for _ in download:
                pass
    return Done()


@dataclass
class Bench:
    core: Core
    media: MediaServer
    downloader: Downloader
    made: list[tuple[asyncio.Event, asyncio.Task[None]]] = field(default_factory=list)

    async def settle(self, run_id: str, *outputs: Output) -> None:
        await self.core.register(run_id)
        await self.core.settle(run_id, outputs=outputs, charged_cost=0.1)

    def output(self, path: str, answer: Page, kind: str = "imageUrl", position: int = 0) -> Output:
        return self.media.output(path, answer, kind=kind, position=position)

    def dispatcher(self, handler: Handler, concurrency: int) -> Dispatcher:
        return Dispatcher(
            self.core.database,
            [registered_handler("h", handler, concurrency=concurrency)],
            self.core.subscriptions,
            downloader=self.downloader,
            signals=self.core.signals,
            metrics=self.core.metrics,
            apply=self.core.intake.apply,
            lease=timedelta(seconds=60),
            clock=self.core.clock,
            jitter=lambda: 0.0,
        )

    def start(self, handler: Handler, concurrency: int) -> Dispatcher:
        """Let a dispatcher run until the test ends."""
        dispatcher, stopping = self.dispatcher(handler, concurrency), asyncio.Event()
        self.made.append((stopping, asyncio.create_task(dispatcher.run(stopping))))
        return dispatcher

    async def stop(self) -> None:
        for stopping, running in self.made:
            stopping.set()
            await running

    async def lanes(self, run_id: str) -> tuple[str, str]:
        """Return where a run's dispatch stands, and in which lane."""
        (row,) = await self.core.dispatches(run_id)
        return row.state.value, row.lane.value


@pytest.fixture
async def bench(database: Database, clock: Clock) -> AsyncIterator[Bench]:
    async with serve_media() as media:
        downloader = Downloader(limits=download_limits(), allow_private_hosts=[media.authority], tls=TLS)
        bench = Bench(a_core(database, clock), media, downloader)
        yield bench
        await bench.stop()
        await downloader.aclose()


def count_requests(media: MediaServer, prefix: str) -> int:
    return sum(head.startswith(f"GET {prefix}") for head in media.requests)


async def test_a_small_output_is_stored_while_large_ones_never_end(bench: Bench, tmp_path: Path) -> None:
    """Twenty endless videos wait for eight slots, all of them older.

    The image is stored at once, and then another.
    """
    for n in range(20):
        await bench.settle(f"run_v{n}", bench.output(f"/v{n}", endless(), "videoUrl"))
    storage = Storage(StorageConfig(url=str(tmp_path), key="{run_id}{ext}"))
    dispatcher = bench.start(storage, 8)
    await until(lambda: count_requests(bench.media, "/v") == 6)
    for n in range(3):
        await bench.settle(f"run_{n}", bench.output(f"/{n}", page(PNG)))
        await until((tmp_path / f"run_{n}.run.json").exists)
        assert (tmp_path / f"run_{n}.png").read_bytes() == PNG
    assert count_requests(bench.media, "/v") == 6
    assert len(dispatcher._running) <= 8
    await storage.close()


@pytest.mark.parametrize("concurrency", [1, 2, 8])
async def test_a_large_output_comes_through_an_endless_stream_of_small_ones(
    bench: Bench, concurrency: int
) -> None:
    """Each small run that ends is followed by two more, so that there is always one due.

    The video still starts.
    """
    begun = asyncio.Event()
    made = 0

    async def act(run: SettledRun, context: Context) -> Answer:
        nonlocal made
        if run.run_id == "run_video":
            begun.set()
        elif not begun.is_set():
            for _ in range(2):
                made += 1
                bench.core.clock.forward(0.001)
                await bench.settle(f"run_{made}", bench.output("/small", page(PNG)))
        return Done()

    for n in range(concurrency):
        await bench.settle(f"run_first{n}", bench.output("/small", page(PNG)))
    await bench.settle("run_video", bench.output("/video", endless(), "videoUrl"))
    bench.start(Scripted(act), concurrency)
    async with asyncio.timeout(PATIENCE_SECONDS):
        await begun.wait()


async def test_with_one_slot_the_oldest_goes_first(bench: Bench) -> None:
    """There is nothing to share: neither lane overtakes the other."""
    handler = Scripted(read_all)
    for n, kind in enumerate(("videoUrl", "imageUrl", "videoUrl", "imageUrl")):
        await bench.settle(f"run_{n}", bench.output(f"/{n}", page(PNG), kind))
        bench.core.clock.forward(1)
    dispatcher = bench.dispatcher(handler, 1)
    for _ in range(4):
        await dispatcher.tick(bench.core.clock.now)
        await dispatcher.drain()
    assert handler.began == ["run_0", "run_1", "run_2", "run_3"]


@pytest.mark.parametrize("size", [LARGE, None])
async def test_an_image_that_turns_out_large_counts_as_heavy(bench: Bench, size: int | None) -> None:
    """By what the server says, or by what comes.

    Heavy work waits then, light work does not, its retry knows.
    """
    raw = Page(endless(size).raw + (bytes(HEAVY_BYTES) if size is None else b""), hold=True)
    turns_out, free = asyncio.Event(), asyncio.Event()

    async def act(run: SettledRun, context: Context) -> Answer:
        if run.run_id != "run_large":
            return await read_all(run, context)
        async with context.open(run.outputs[0]) as download:
            received = 0
            async for chunk in download:
                received += len(chunk)
                if size is not None or received > HEAVY_BYTES:
                    turns_out.set()
                    await free.wait()
                    return Retry("later", after_seconds=5)
        return Done()

    handler = Scripted(act)
    await bench.settle("run_large", bench.output("/large", raw))
    assert await bench.lanes("run_large") == ("ready", "light")
    dispatcher = bench.start(handler, 2)
    await turns_out.wait()
    assert [attempt.progress.lane for attempt in dispatcher._running.values()] == [Lane.HEAVY]
    await bench.settle("run_video", bench.output("/video", endless(), "videoUrl"))
    await bench.settle("run_small", bench.output("/small", page(PNG)))
    while (await bench.lanes("run_small"))[0] != "done":  # noqa: ASYNC110  # no event is set
        await asyncio.sleep(0)
    assert handler.began == ["run_large", "run_small"]
    free.set()
    await until(lambda: "run_video" in handler.began)
    assert await bench.lanes("run_large") == ("ready", "heavy")


async def test_a_video_that_turns_out_small_counts_as_light(bench: Bench) -> None:
    """Its retry may take any slot."""

    async def act(run: SettledRun, context: Context) -> Answer:
        await read_all(run, context)
        return Retry("once more")

    await bench.settle("run_1", bench.output("/v", page(PNG), "videoUrl"))
    assert await bench.lanes("run_1") == ("ready", "heavy")
    dispatcher = bench.dispatcher(Scripted(act), 2)
    await dispatcher.tick(bench.core.clock.now)
    await dispatcher.drain()
    assert await bench.lanes("run_1") == ("ready", "light")


async def test_what_is_stored_weighs_nothing_any_more(bench: Bench) -> None:
    """A large video is safe, an image failed: fetching the image again is light work."""

    async def act(run: SettledRun, context: Context) -> Answer:
        await context.reserve(0, "out", "/a")
        if context.attempt == 1:
            return Retry("not yet")
        await context.store_artifact(0, size=LARGE, sha256="ab", content_type=None)
        return Retry("the image")

    await bench.settle(
        "run_1", bench.output("/v", endless(), "videoUrl"), bench.output("/i", page(PNG), position=1)
    )
    dispatcher = bench.dispatcher(Scripted(act), 2)
    for lane in ("heavy", "light"):
        await dispatcher.tick(bench.core.clock.forward(10))
        await dispatcher.drain()
        assert await bench.lanes("run_1") == ("ready", lane)


async def test_whatever_turns_out_large_no_more_run_than_allowed(bench: Bench) -> None:
    """Four slots, all taken by images that turn out large.

    The next free one is for light work, whatever is older.
    """
    handler = Scripted(read_all)
    for n in range(4):
        await bench.settle(f"run_l{n}", bench.output(f"/l{n}", endless()))
    dispatcher = bench.start(handler, 4)
    await until(lambda: [each.progress.lane for each in dispatcher._running.values()] == [Lane.HEAVY] * 4)
    await bench.settle("run_video", bench.output("/video", endless(), "videoUrl"))
    await bench.settle("run_small", bench.output("/small", page(PNG)))
    await dispatcher.tick(bench.core.clock.now)
    assert len(dispatcher._running) == 4
    one = next(iter(dispatcher._running.values()))
    assert one.task
    one.task.cancel()
    await until(lambda: len(handler.began) == 5)
    assert handler.began[4] == "run_small"
