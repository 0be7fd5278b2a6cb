"""The guard in the real service, over TLS: who is slow, large or many is closed; honest callbacks are answered meanwhile."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from receiver.service.service import Service
from tests.support.patience import PATIENCE_SECONDS
from tests.support.stage import Stage

HOSTILE = 500
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]

HALF_HEAD = b"POST /callbacks/flora HTTP/1.1\r\nHost: receiver\r\nX-A: b"
HALF_BODY = b"POST /callbacks/flora HTTP/1.1\r\nHost: receiver\r\nContent-Length: 500\r\n\r\nhel"


def closed_by_guard(service: Service, reason: str, listener: str = "public") -> float:
    return float(service.metrics.connections_closed.labels(listener, reason)._value.get())


async def connected(port: int, tls: ssl.SSLContext | None, start: bytes) -> Streams:
    streams = await asyncio.open_connection("127.0.0.1", port, ssl=tls)
    streams[1].write(start)
    return streams


async def ended(streams: Streams) -> bytes:
    """Return what came until the other side closed."""
    came = b""
    async with asyncio.timeout(PATIENCE_SECONDS):
        with contextlib.suppress(ConnectionError):
            while piece := await streams[0].read(65_536):
                came += piece
    streams[1].transport.abort()
    return came


async def is_honest(stage: Stage, client: httpx.AsyncClient, run_id: str) -> None:
    answer = await stage.send(client, stage.body(run_id))
    assert (answer.status_code, answer.json()) == (200, {"status": "accepted"})


@contextlib.asynccontextmanager
async def crowd(stage: Stage, count: int) -> AsyncIterator[list[Streams]]:
    """Hostile connections over TLS: half of them never end their head, half their body."""
    tls = stage.tls()
    made: list[Streams] = []
    try:
        for begun in range(0, count, 50):  # in groups: the accept queue is not what is looked at here
            batch = range(begun, min(begun + 50, count))
            starts = (HALF_BODY if number % 2 else HALF_HEAD for number in batch)
            made += await asyncio.gather(*(connected(stage.port, tls, start) for start in starts))
        yield made
    finally:
        for _, writer in made:
            writer.transport.abort()


async def test_five_hundred_hostile_connections_and_honest_callbacks(stage: Stage) -> None:
    """Within the limit of connections: everyone honest is answered while the crowd is there; then the crowd is closed."""
    slow = {"head_timeout_seconds": 4, "body_timeout_seconds": 4}
    async with stage.service(public=slow) as service, crowd(stage, HOSTILE) as hostile:
        for number in range(20):
            async with stage.client() as client:  # a connection of its own for each, as FLORA may do
                await is_honest(stage, client, f"run_honest_{number}")
        answers = await asyncio.gather(*(ended(each) for each in hostile))
        assert {answer.partition(b"\r\n")[0] for answer in answers} <= {
            b"",
            b"HTTP/1.1 408 Request Timeout",
        }
        assert closed_by_guard(service, "slow_head") >= HOSTILE / 2
        assert closed_by_guard(service, "crowded") == 0


async def test_beyond_the_limit_the_oldest_unfinished_gives_way(stage: Stage) -> None:
    """Every place is taken by the crowd: each honest callback is answered at once, not after the crowd's time is up."""
    endless = {"head_timeout_seconds": 3600, "body_timeout_seconds": 3600}
    limits = {"max_connections": 50, **endless}
    async with stage.service(public=limits) as service, crowd(stage, 50):
        async with contextlib.AsyncExitStack() as clients, asyncio.timeout(PATIENCE_SECONDS):
            for number in range(10):
                client = await clients.enter_async_context(stage.client())
                await is_honest(stage, client, f"run_honest_{number}")
        assert closed_by_guard(service, "crowded") >= 10


async def test_slow_loris(stage: Stage) -> None:
    """A byte now and then buys no time: neither for a head nor for a body."""
    async with stage.service(public={"head_timeout_seconds": 0.6, "body_timeout_seconds": 0.6}) as service:
        tls = stage.tls()
        for start, answer in ((HALF_HEAD, b""), (HALF_BODY, b"HTTP/1.1 408")):
            streams = await connected(stage.port, tls, start)

            async def drip(writer: asyncio.StreamWriter = streams[1]) -> None:
                with contextlib.suppress(ConnectionError):
                    while True:
                        writer.write(b"a")
                        await asyncio.sleep(0.05)

            dripping = asyncio.create_task(drip())
            assert (await ended(streams)).startswith(answer)
            dripping.cancel()
        assert closed_by_guard(service, "slow_head") == 1
        assert closed_by_guard(service, "slow_body") == 1


@pytest.mark.parametrize("http", ["httptools", "h11"])
async def test_a_run_from_callback_to_file_on_either_parser(stage: Stage, http: str) -> None:
    async with stage.service(public={"http": http}):
        run_id = stage.start()
        await stage.over(run_id)
    stage.check_files(run_id)


async def test_the_operations_listener_is_guarded_too(stage: Stage) -> None:
    """A head without end is closed there as well."""
    async with stage.service() as service:
        port = service.operations_address[1]
        await ended(await connected(port, None, b"GET /api/runs HTTP/1.1\r\nX-A: " + b"a" * 40_000))
        assert closed_by_guard(service, "too_large", "operations") == 1


async def test_who_never_begins_to_speak_tls_keeps_nobody_out(stage: Stage) -> None:
    """The guard cannot see a connection before its handshake; that has a time of its own, after which it is closed."""
    async with stage.service():
        silent = [await asyncio.open_connection("127.0.0.1", stage.port) for _ in range(300)]
        async with stage.client() as client:
            for _ in range(5):
                await is_honest(stage, client, stage.start(callback=False))
        assert set(await asyncio.gather(*map(ended, silent))) == {b""}


@pytest.mark.parametrize("listener", ["public", "operations"])
@pytest.mark.parametrize("pieces", [1, 2, 3])
@pytest.mark.parametrize("before", [b"", b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"])
async def test_a_body_is_no_request(stage: Stage, listener: str, pieces: int, before: bytes) -> None:
    """An offer of another protocol is ignored, and the body behind it stays a body.

    httptools ends such a message at its head; what a stranger wrote as a body would be a request of its own, and behind
    a proxy its response somebody else's.
    """
    async with stage.service() as service:
        port = stage.port if listener == "public" else service.operations_address[1]
        streams = await connected(port, stage.tls() if listener == "public" else None, before)
        if before:
            await streams[0].readuntil(b"}")
        inner = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
        head = (
            b"POST /callbacks/flora HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, close\r\nUpgrade: h2c\r\n"
        )
        head += b"Content-Length: %d\r\n\r\n" % len(inner)
        for piece in {
            1: [head + inner],
            2: [head, inner],
            3: [head[:40], head[40:] + inner[:9], inner[9:]],
        }[pieces]:
            streams[1].write(piece)
            with contextlib.suppress(ConnectionError):
                await streams[1].drain()
        said = await ended(streams)
    assert (b"HTTP/1.1 401 " if listener == "public" else b"HTTP/1.1 403 ") in said
    assert said.count(b"HTTP/1.1 ") == 1
    assert b'{"error":{"code":' in said


@pytest.mark.parametrize("listener", ["public", "operations"])
async def test_an_idle_connection_is_kept_as_long_as_set(stage: Stage, listener: str) -> None:
    """Shorter than the default here, so that its end can be waited for."""
    sections: dict[str, Any] = {listener: {"keep_alive_seconds": 1}}
    async with stage.service(**sections) as service:
        port = stage.port if listener == "public" else service.operations_address[1]
        request = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
        said = await ended(await connected(port, stage.tls() if listener == "public" else None, request))
    assert said.count(b"HTTP/1.1 ") == 1
