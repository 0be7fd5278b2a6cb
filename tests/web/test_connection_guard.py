"""The guard of a listener, on raw sockets: what it closes, what it keeps, who is served."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from receiver.web.connection_guard import Guard, Limits
from receiver.web.server import Server, bind
from tests.support.defaults import connection_limits
from tests.support.patience import PATIENCE_SECONDS

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]

HONEST = b"POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 5\r\n\r\nhello"


@dataclass
class Clock:
    """A clock that a test sets."""

    seconds: float = 0.0

    def __call__(self) -> float:
        return self.seconds


@dataclass
class Stand:
    """A guarded server and its clock."""

    guard: Guard
    clock: Clock
    port: int
    reasons: list[str]
    """Why connections were closed."""

    async def connect(self) -> Streams:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def advance(self, seconds: float) -> None:
        """Let time pass, then sweep."""
        self.clock.seconds += seconds
        self.guard.sweep()


async def _echo(request: Request) -> PlainTextResponse:
    return PlainTextResponse(str(len(await request.body())))


@asynccontextmanager
async def run_stand(
    limits: Limits, app: Callable[[Request], Awaitable[PlainTextResponse]] = _echo
) -> AsyncIterator[Stand]:
    clock, reasons = Clock(), list[str]()
    guard = Guard(limits, clock=clock, on_close=reasons.append)
    server = Server(
        Starlette(routes=[Route("/", app, methods=["POST"])]), bind("127.0.0.1", 0), guard=guard
    )
    await server.start()
    try:
        yield Stand(guard, clock, server.port, reasons)
    finally:
        await server.stop()


@pytest.fixture
async def stand() -> AsyncIterator[Stand]:
    async with run_stand(connection_limits()) as stand:
        yield stand


async def is_closed(reader: asyncio.StreamReader) -> bool:
    """Return whether the server closes the connection without a response."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        try:
            return await reader.read() == b""
        except ConnectionError:
            return True


async def send_request(streams: Streams, request: bytes = HONEST) -> bytes:
    """Send a request and return the body of the response."""
    reader, writer = streams
    writer.write(request)
    async with asyncio.timeout(PATIENCE_SECONDS):
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        return await reader.readexactly(length)


async def hang_up(writer: asyncio.StreamWriter) -> None:
    """Close without sending the rest, and wait until that is done."""
    writer.transport.abort()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def wait_for_count(stand: Stand, waiting: Callable[[], int], count: int) -> None:
    """Wait until the guard knows that many connections."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while waiting() < count:  # noqa: ASYNC110  # the server runs in this loop
            await asyncio.sleep(0)


async def test_requests_pass_in_one_piece_and_in_many(stand: Stand) -> None:
    """One connection, three requests: whole, byte by byte, and two at once."""
    streams = await stand.connect()
    assert await send_request(streams) == b"5"
    for byte in HONEST[:-1]:
        streams[1].write(bytes([byte]))
        await streams[1].drain()
    assert await send_request(streams, HONEST[-1:]) == b"5"
    streams[1].write(HONEST)
    assert await send_request(streams) == b"5"
    assert await send_request(streams, b"") == b"5"
    assert stand.guard.closed == 0
    assert not stand.guard.heads
    assert not stand.guard.bodies
    await hang_up(streams[1])


@pytest.mark.parametrize(
    "start",
    [
        pytest.param(b"", id="nothing at all"),
        pytest.param(b"\r\n\r\n", id="empty lines"),
        pytest.param(b"POST / HTTP/1.1\r\nHost: t\r\nX-A: b", id="half a head"),
        pytest.param(b"POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 5\r\n\r\nhel", id="half a body"),
        pytest.param(
            b"POST / HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel", id="half a chunk"
        ),
    ],
)
async def test_an_unfinished_request_is_closed(stand: Stand, start: bytes) -> None:
    """Slow loris: a head has ten seconds, a body ten more."""
    reader, writer = await stand.connect()
    writer.write(start)
    await wait_for_count(stand, lambda: len(stand.guard.heads) + len(stand.guard.bodies), 1)
    await stand.advance(9.9)
    assert stand.guard.closed == 0
    await stand.advance(0.2)
    assert await is_closed(reader)
    assert stand.guard.closed == 1
    await hang_up(writer)


async def test_a_trickle_does_not_extend_the_time(stand: Stand) -> None:
    """With a header every nine seconds, the head is timed from its first byte."""
    reader, writer = await stand.connect()
    writer.write(b"POST / HTTP/1.1\r\n")
    await wait_for_count(stand, lambda: len(stand.guard.heads), 1)
    await stand.advance(9)
    writer.write(b"X-A: b\r\n")
    await writer.drain()
    await stand.advance(2)
    assert await is_closed(reader)
    await hang_up(writer)


async def test_a_second_request_is_timed_like_the_first(stand: Stand) -> None:
    """After a complete request on the same connection, half a head is closed too."""
    streams = await stand.connect()
    assert await send_request(streams) == b"5"
    await stand.advance(60)
    assert stand.guard.closed == 0, "uvicorn closes idle connections"
    streams[1].write(b"POST / HT")
    await wait_for_count(stand, lambda: len(stand.guard.heads), 1)
    await stand.advance(10.1)
    assert await is_closed(streams[0])
    await hang_up(streams[1])


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(b"POST / HTTP/1.1\r\nHost: t\r\nX-A: " + b"a" * 17_000, id="head without end"),
        pytest.param(
            b"POST / HTTP/1.1\r\nX-A: " + b"a" * 17_000 + b"\r\n\r\n", id="large head in one piece"
        ),
        pytest.param(b"POST /" + b"a" * 17_000 + b" HTTP/1.1\r\nHost: t\r\n\r\n", id="large request line"),
        pytest.param(
            b"POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 900000\r\n\r\n" + b"a" * 800_000,
            id="large body",
        ),
        pytest.param(
            b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
            + (b"1;" + b"x" * 2000 + b"\r\na\r\n") * 400,
            id="small body in large framing",
        ),
        pytest.param(
            b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + b"T: " + b"t" * 800_000,
            id="trailers",
        ),
    ],
)
async def test_a_message_that_is_too_large_is_closed(stand: Stand, request_: bytes) -> None:
    """A head has 16 KiB, a message 96 KiB and the rest of a piece, framing included."""
    reader, writer = await stand.connect()
    writer.write(request_)
    async with asyncio.timeout(PATIENCE_SECONDS):
        with contextlib.suppress(ConnectionError):
            while await reader.read(65_536):
                pass
    assert stand.guard.closed == 1
    await hang_up(writer)


async def test_callers_are_served_in_a_crowd() -> None:
    """500 connections with unfinished heads take every place; newcomers replace the oldest."""
    async with run_stand(connection_limits(connections=500)) as stand:
        crowd = [await stand.connect() for _ in range(500)]
        for _, writer in crowd:
            writer.write(b"POST / HTTP/1.1\r\nX: ")
        await wait_for_count(stand, lambda: len(stand.guard.heads), 500)
        for _ in range(20):
            honest = await stand.connect()
            assert await send_request(honest) == b"5"
            await hang_up(honest[1])
        assert await is_closed(crowd[0][0])
        for _, writer in crowd:
            await hang_up(writer)


async def test_unusual_requests_are_served(stand: Stand) -> None:
    """Chunk extensions, trailers, Expect: 100-continue, and a body that is refused unread."""
    streams = await stand.connect()
    chunks = b"5;a=b\r\nhello\r\n0\r\nX-Trailer: 1\r\n\r\n"
    assert (
        await send_request(
            streams, b"POST / HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks
        )
        == b"5"
    )
    streams[1].write(b"POST / HTTP/1.1\r\nHost: t\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
    async with asyncio.timeout(PATIENCE_SECONDS):
        assert await streams[0].readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert await send_request(streams, b"hello") == b"5"
    refused = b"POST /nowhere HTTP/1.1\r\nHost: t\r\nContent-Length: 300000\r\n\r\n" + b"a" * 300_000
    assert await send_request(streams, refused) == b"Not Found"
    assert await send_request(streams) == b"5"
    assert stand.guard.closed == 0
    await hang_up(streams[1])


async def test_callers_are_served_beside_an_idle_crowd() -> None:
    """Newcomers replace the longest idle connection, although keep-alive lasts two minutes."""
    async with run_stand(connection_limits(connections=50)) as stand:
        crowd = [await stand.connect() for _ in range(50)]
        for streams in crowd:
            assert await send_request(streams) == b"5"
        assert await send_request(crowd[0]) == b"5"
        for _ in range(20):
            honest = await stand.connect()
            assert await send_request(honest) == b"5"
            await hang_up(honest[1])
        assert await is_closed(crowd[1][0])
        assert await send_request(crowd[0]) == b"5"  # not the longest idle one
        for _, writer in crowd:
            await hang_up(writer)


async def test_a_young_request_is_kept_and_an_idle_connection_closed() -> None:
    """An unfinished request is young for one second; after that it is closed first."""
    async with run_stand(connection_limits(connections=2)) as stand:
        idle, begun = await stand.connect(), await stand.connect()
        assert await send_request(idle) == b"5"
        begun[1].write(HONEST[:-3])
        await wait_for_count(stand, lambda: len(stand.guard.bodies), 1)
        newcomer = await stand.connect()
        assert await is_closed(idle[0])
        assert await send_request(newcomer) == b"5"
        stand.clock.seconds += 1.1
        other = await stand.connect()
        assert await is_closed(begun[0])
        for streams in (newcomer, other):
            assert await send_request(streams) == b"5"
        for _, writer in (idle, begun, newcomer, other):
            await hang_up(writer)


async def test_a_connection_that_waits_for_a_response_is_kept() -> None:
    """If all of them wait for a response, the newcomer is closed."""
    free = asyncio.Event()

    async def slow(_: Request) -> PlainTextResponse:
        await free.wait()
        return PlainTextResponse("done")

    async with run_stand(connection_limits(connections=2), slow) as stand:
        waiting = [await stand.connect() for _ in range(2)]
        calls = [asyncio.create_task(send_request(streams)) for streams in waiting]
        await wait_for_count(stand, lambda: len(stand.guard.idle), 2)
        newcomer = await stand.connect()
        assert await is_closed(newcomer[0])
        free.set()
        assert await asyncio.gather(*calls) == [b"done", b"done"]
        for _, writer in (*waiting, newcomer):
            await hang_up(writer)


async def test_a_few_requests_may_be_pipelined(stand: Stand) -> None:
    """Many tiny ones in one piece would take a hundred times their bytes in memory: closed."""
    few = await stand.connect()
    few[1].write(HONEST * 17)
    assert [await send_request(few, b"") for _ in range(17)] == [b"5"] * 17
    many = await stand.connect()
    many[1].write(HONEST * 5000)
    assert await is_closed(many[0])
    assert stand.guard.closed == 1
    assert stand.reasons == ["too_many"]
    assert await send_request(few) == b"5"
    await hang_up(few[1])
    await hang_up(many[1])
